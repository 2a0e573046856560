"""Example of an op: copy this folder into reca_kernels, and it is one of its ops (tests/test_contributing.py)."""
