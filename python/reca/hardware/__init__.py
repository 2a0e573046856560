"""Facts about the machine: host memory, limits of containers and jobs, peak rates of GPUs, and full memory."""
