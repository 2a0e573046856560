"""CUDA C++ kernels: what each op calls in native.module.cuda. Signatures are stated in reca_kernels/ops/<op>.py."""
