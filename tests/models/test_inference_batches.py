"""Lists of any length take the memory of one batch at inference."""

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from reca.models import UMMS
from tests.models.contract import images, quick, shared

MOST = 64  # questions at a time, or fewer


@pytest.fixture
def largest():
    """Return the elements of the largest tensor that a module reads in a call."""

    def measure(call, *args, **options) -> int:
        seen = [0]

        def read(module, args):
            seen.append(max((x.numel() for x in args if isinstance(x, torch.Tensor)), default=0))

        hook = register_module_forward_pre_hook(read)
        try:
            call(*args, **options)
        finally:
            hook.remove()
        return max(seen)

    return measure


@pytest.mark.parametrize("name", UMMS)
def test_answers(name, largest):
    model = shared(name)
    one, full, twice = (
        largest(model.answer, images([(20, 20)]) * n, ["what is this"] * n, max_new_tokens=1)
        for n in (1, MOST, 2 * MOST)
    )
    assert one < full == twice


@pytest.mark.parametrize("method", ["generate", "edit"])
@pytest.mark.parametrize("name", UMMS)
def test_images(name, method, largest):
    model = shared(name)
    if method not in model.abilities:
        pytest.skip(f"{name} cannot {method}")

    def arguments(n: int):
        shown = [images([(20, 20)]) * n] if method == "edit" else []
        return (*shown, ["a red square"] * n, list(range(n)))

    one, full, twice = (largest(getattr(model, method), *arguments(n), **quick(name, 2), batch=4) for n in (1, 4, 8))
    assert one < full == twice
