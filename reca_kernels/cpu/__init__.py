"""C++ kernels: what each op calls in the native module. Signatures are stated in reca_kernels/ops/<op>.py."""
