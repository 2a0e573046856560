"""Image sizes of BAGEL."""

from dataclasses import replace

from reca.data.views import View, Views
from reca.models.bagel.modules import Network

MAX_PIXELS = 14 * 14 * 9 * 1024  # maximum area of an image, except in conversations
MAX_ANSWER_PIXELS = 2_007_040


def task_views(net: Network, task: str) -> Views:
    """Return the views of a training task."""
    c, patch, side = net.config, net.config.vision.patch_size, net.token_side
    if task == "i2t":
        return Views(gen=None, und=_bound(c.answer_size, c.answer_min_size, patch, MAX_ANSWER_PIXELS))
    gen = _bound(c.image_size, c.image_min_size, side)
    if task in ("t2i", "srum"):
        return Views(gen=gen, und=None)
    size, stride = c.understanding_size, patch if c.hv_source == "vit" else side
    return Views(gen=gen, und=replace(_bound(size, size, stride), blur=c.hv_blur))


def edit_views(net: Network) -> Views:
    """Return the views of an image to edit: the codec's input, and SigLIP's input, which is computed from it."""
    c = net.config
    gen = task_views(net, "t2i").gen
    return Views(gen=gen, und=_bound(c.edit_size, c.edit_min_size, c.vision.patch_size))


def _bound(size: int, least: int, stride: int, max_pixels: int = MAX_PIXELS) -> View:
    return View(size, "bound", min_size=least, stride=stride, max_pixels=max_pixels)
