"""Models that understand by a frozen EfficientNet: its features of all images, encoded once."""

from typing import Any

import torch
from torch import Tensor

from reca.demo.pretrain.optimize import unit
from reca.models.common.efficientnet import EfficientNetLite0
from reca.models.common.pooled_features import PooledProjector, pooled, resized

AT_ONCE = 64  # images


def encode_once(
    config: Any, encoder: EfficientNetLite0, projector: PooledProjector, named: Tensor, every_thing: Tensor
) -> Tensor:
    """Encode the images that captions name, fp32 [n, FEATURES], and fit the projector's scale to all images.

    An encoder of random weights gets its norms before.

    config: of a model that has these two. named, every_thing: uint8 [n, 3, H, W]
    """
    sizes = config.efficientnet
    if not config.efficientnet_weights:
        encoder.fit_norms(resized(unit(every_thing), sizes.image_size))
    encoded, of_every_thing = (
        torch.cat([pooled(encoder, unit(part), sizes) for part in images.split(AT_ONCE)])
        for images in (named, every_thing)
    )
    projector.fit(torch.cat([encoded, of_every_thing]))
    return encoded
