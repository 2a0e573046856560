"""Numbers at which a conversion to 16 bits shows how it rounds."""

import torch
from torch import Tensor


def ties(dtype: torch.dtype) -> Tensor:
    """Return fp32 numbers: halfway between neighbours of a 16-bit dtype, just beside that, infinities and NaN.

    The last midpoint, above the largest finite number, rounds to infinity.
    """
    infinity = torch.tensor(torch.inf, dtype=dtype).view(torch.int16)
    numbers = torch.arange(int(infinity), dtype=torch.int16).view(dtype).double()
    above = torch.cat((numbers[1:], 2 * numbers[-1:] - numbers[-2:-1]))
    middle = ((numbers + above) / 2).float()
    beside = [torch.nextafter(middle, torch.tensor(end)) for end in (-torch.inf, torch.inf)]
    positive = torch.cat((middle, *beside, torch.tensor([0.0, torch.inf])))
    nan = torch.tensor([0x7FC00000, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)  # the usual, least, largest
    return torch.cat((positive, -positive, nan))


def same_numbers(got: Tensor, want: Tensor) -> bool:
    """Return whether all bits are the same, but those of NaN."""
    bits = torch.int16 if want.element_size() == 2 else torch.int32
    known = ~want.isnan()
    return torch.equal(got.isnan(), ~known) and torch.equal(got[known].view(bits), want[known].view(bits))
