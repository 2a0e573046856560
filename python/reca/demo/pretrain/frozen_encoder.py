"""Models with a frozen EfficientNet as understanding encoder: its features, computed once for all images."""

from typing import Any

import torch
from torch import Tensor

from reca.demo.pretrain.optimize import unit
from reca.models.common.efficientnet import EfficientNetLite0
from reca.models.common.pooled_features import PooledProjector, pooled, resized

AT_ONCE = 64  # images per batch


def encode_once(
    config: Any, encoder: EfficientNetLite0, projector: PooledProjector, named: Tensor, every_thing: Tensor
) -> Tensor:
    """Encode the images that have captions, fp32 [n, FEATURES], and fit the projector's scale to all images.

    The normalisation layers of a randomly initialised encoder are fitted first.

    config: config of the model. named, every_thing: images with captions and all images, uint8 [n, 3, H, W]
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
