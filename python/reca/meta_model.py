"""A recipe's model without memory: sizes, types, roles and layers as in training, and no numbers."""

from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from reca.config import Recipe
from reca.lora import choose_trained
from reca.models import umm_package
from reca.models.base import Adapter


def build_meta(recipe: Recipe) -> tuple[Adapter, FakeTensorMode]:
    """Build the recipe's model without memory, frozen as in training. Returns it with the mode its tensors belong to.

    Raises ValueError for roles and patterns that the model does not have.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        adapter = umm_package(recipe.umm).Adapter.build_meta(recipe.model)
    choose_trained(adapter, recipe)
    for module in adapter.modules():  # LoRA's are made with memory
        for name, p in module._parameters.items():
            if p is not None and not isinstance(p, FakeTensor):
                module._parameters[name] = nn.Parameter(fake.from_tensor(p.detach()), requires_grad=p.requires_grad)
    return adapter, fake
