"""Suppression of library warnings about features that reca does not use."""

import logging

# transformers and diffusers import torchao if it is installed; all of them then warn about it
UNUSED = ("torchao", "torch.utils._pytree", "diffusers.quantizers")


def leave_out_unused() -> None:
    """Suppress warnings of library modules that reca does not use."""
    for library in UNUSED:
        logging.getLogger(library).setLevel(logging.ERROR)
