"""The views of an image that an adapter needs: one for understanding, one for generation."""

from dataclasses import dataclass


@dataclass(frozen=True)
class View:
    """Say how a decoded RGB image becomes one uint8 [3, H, W] tensor. Normalisation happens later, on the device.

    fit:
      squash       resize to size x size, aspect ratio not kept
      stretch      resize to a square of the long side, then to size x size (two filters, as Harmon's data code does)
      center_crop  resize the short side to `size`, cut the middle size x size where torchvision's CenterCrop does
      clip_crop    the same, cut where CLIP's processor does: half a pixel off the middle is rounded down
      random_crop  cut a random square of the short side's length, resize to `size`
      pad          centre on a square of the long side filled with `fill`, resize to `size`
      letterbox    resize the long side to `size` and the short one alike, rounded down but at least `min_size`, then
                   centre on a square filled with `fill`
      bound        keep the aspect ratio: long side at most `size`, short side at least `min_size`, both rounded to
                   multiples of `stride`, area at most `max_pixels`
    """

    size: int
    fit: str = "squash"
    resample: str = "bicubic"  # or "bilinear"; both with antialias, as Pillow computes them
    fill: int = 127
    min_size: int = 0
    stride: int = 1
    max_pixels: int | None = None
    blur: int = 1  # shrink by this factor and resize back (bilinear): the information bottleneck of the blur recipes


@dataclass(frozen=True)
class Views:
    """Hold the views that one task needs; None: that view is not needed."""

    gen: View | None
    und: View | None
