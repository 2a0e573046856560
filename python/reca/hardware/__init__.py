"""Facts about the machine: host memory, peak rates of GPUs, and detection of out-of-memory errors."""
