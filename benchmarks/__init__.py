import os

os.environ.setdefault(
    "KINETO_LOG_LEVEL", "99"
)  # no lines of torch's profiler between the tables; read when torch loads
