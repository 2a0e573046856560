"""What libraries log about parts of them that are not used here."""

import logging

# transformers and diffusers import torchao where it is installed, and all of them warn of its parts
UNUSED = ("torchao", "torch.utils._pytree", "diffusers.quantizers")


def leave_out_unused() -> None:
    """Leave out warnings about parts of libraries that are not used here."""
    for library in UNUSED:
        logging.getLogger(library).setLevel(logging.ERROR)
