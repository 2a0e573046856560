import os

# Silences torch's profiler, whose messages would interrupt the tables. It is read when torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
