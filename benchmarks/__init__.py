import os

# No lines of torch's profiler between the tables; read when torch loads.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
