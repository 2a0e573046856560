"""Views of an image that an adapter needs: one for understanding, one for generation."""

from dataclasses import dataclass


@dataclass(frozen=True)
class View:
    """Conversion of a decoded RGB image to a uint8 [3, H, W] tensor. Normalisation happens later, on the device.

    fit:
      squash       resize to size x size, ignoring the aspect ratio
      stretch      resize to a square of the long side, then to size x size (two filters, as in Harmon's data code)
      center_crop  resize the short side to `size`, crop the central size x size like torchvision's CenterCrop
      clip_crop    the same, cropped like CLIP's processor: offsets of half a pixel are rounded down
      random_crop  crop a random square of the short side's length, resize to `size`
      pad          centre on a square of the long side filled with `fill`, resize to `size`
      letterbox    resize the long side to `size` and the short side in proportion, rounded down but at least
                   `min_size`, then centre on a square filled with `fill`
      bound        keep the aspect ratio: long side at most `size`, short side at least `min_size`, both rounded to
                   multiples of `stride`, area at most `max_pixels`
    """

    size: int
    fit: str = "squash"
    resample: str = "bicubic"  # or "bilinear"; both antialiased like Pillow's
    fill: int = 127
    min_size: int = 0
    stride: int = 1
    max_pixels: int | None = None
    blur: int = 1  # shrink by this factor and resize back (bilinear): the information bottleneck of the blur recipes


@dataclass(frozen=True)
class Views:
    """Views that one task needs; None: not needed."""

    gen: View | None
    und: View | None
