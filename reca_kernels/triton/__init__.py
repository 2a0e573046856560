"""Triton kernels, one file per op. Signatures are stated in reca_kernels/ops/<op>.py.

A launcher enters its tensors' device with `torch.cuda.device_of`, which leaves CPU tensors alone: those run under
TRITON_INTERPRET=1, as the tests do where there is no GPU. Row numbers are int64 from the first line of a kernel.
"""
