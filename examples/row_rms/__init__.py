"""An example op: copied into reca_kernels, this folder becomes one of its ops (tests/test_contributing.py)."""
