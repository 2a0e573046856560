"""LoRA and DoRA by peft: low-rank adapters on the linear layers that would otherwise be trained.

Adapters are added to the linear layers in the model's blocks whose weights `freeze` leaves trainable, so that roles and
train.frozen have the same meaning as without LoRA. Nothing else is trained. The model's own parameters keep their
published names in checkpoints, and an export contains the merged weights under those names.
"""

import contextlib
import functools
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from reca.config.recipe import LoraConfig, Recipe
from reca.models.base import Adapter
from reca.models.common.deferred_weights import local_part, own_rows
from reca.models.common.exporting import LORA, export_to
from reca.optim import freeze
from reca.optim.gradients import HALVES
from reca.rng import CounterRNG

NAME = "default"  # peft's name for the only adapter of a layer
PREFIX = "base_model.model."  # of tensor names in peft's files
DROPOUT = 0x64726F70  # separates the dropout's random stream from the other streams of a run


def choose_trained(adapter: Adapter, recipe: Recipe) -> list[str]:
    """Freeze everything that the recipe does not train and add LoRA if requested. Return the trained roles.

    A model that already has LoRA keeps its layers.
    Raises ValueError as `freeze` does, if existing LoRA differs from the recipe's, if a pattern of lora.targets matches
    no layer, and if no layer can have LoRA.
    """
    if adapter.lora is None:
        trained = freeze(adapter, recipe.train.roles, recipe.train.frozen)
        if not recipe.lora.rank:
            return trained
        add(adapter, recipe.lora, recipe.train.seed)
    elif adapter.lora != recipe.lora:
        raise ValueError(f"the model has LoRA {asdict(adapter.lora)}, but the recipe asks for {asdict(recipe.lora)}")
    roles = adapter.roles()
    return sorted({roles[name] for name, p in adapter.named_parameters() if p.requires_grad})


def add(adapter: Adapter, config: LoraConfig, seed: int) -> None:
    """Add LoRA to the trainable linear layers in an adapter's blocks and freeze all other parameters."""
    peft = _peft()
    names = target_names(adapter, config)
    wanted = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.rank if config.alpha is None else config.alpha,
        lora_dropout=config.dropout,
        use_dora=config.dora,
        target_modules=names,
    )
    modules = dict(adapter.named_modules())
    if config.base_dtype == "bf16":
        for name in names:
            for parameter in modules[name].parameters():  # in place: Module.to would replace meta parameters
                parameter.data = parameter.data.to(torch.bfloat16)
    peft.inject_adapter_in_model(wanted, _holder(adapter), adapter_name=NAME)
    found = layers(adapter)
    if sorted(found) != sorted(names):
        raise RuntimeError(f"peft added LoRA to {len(found)} layers instead of {len(names)}: unsupported peft version?")
    for name, parameter in adapter.named_parameters():
        parameter.requires_grad_(is_lora(name))
        if is_lora(name) and parameter.dtype in HALVES:
            parameter.data = parameter.data.float()
    for layer in found.values():
        _give_memory(layer)
    adapter.lora = config
    adapter.roles = functools.partial(_roles, adapter, adapter.roles)  # type: ignore[method-assign]
    adapter.export = functools.partial(_export, adapter, adapter.export, wanted)  # type: ignore[method-assign]
    if config.dropout:
        adapter.register_forward_pre_hook(_seed_dropout)
    reset(adapter, seed)


def target_names(adapter: Adapter, config: LoraConfig) -> list[str]:
    """List the layers that get LoRA. Raises ValueError if there are none or a pattern of lora.targets matches none."""
    inside = {id(module) for block in adapter.blocks() for module in block.modules()}
    able = [
        name
        for name, module in adapter.named_modules()
        if type(module) is nn.Linear and id(module) in inside and module.weight.requires_grad
    ]
    if not able:
        raise ValueError(f"lora.rank={config.rank}: {adapter.name} trains no linear layer inside its blocks")
    for pattern in config.targets:
        if not any(fnmatch(name, pattern) for name in able):
            raise ValueError(f"lora.targets: no trained linear layer matches {pattern!r}; names look like {able[0]!r}")
    return [name for name in able if any(fnmatch(name, pattern) for pattern in config.targets)]


def layers(adapter: nn.Module) -> dict[str, Any]:
    """Return the layers with LoRA by name."""
    return {name: module for name, module in adapter.named_modules() if hasattr(module, "lora_A")}


def reset(adapter: Adapter, seed: int) -> None:
    """Initialise LoRA to the identity: A uniform as in peft, B zero, DoRA magnitudes equal to the row norms of W.

    A depends on `seed` and the layer's name only, not on device or rank. DoRA magnitudes of deferred weights are left
    as they are; call this again when the weights are loaded.
    Raises ValueError for DoRA if a weight has zero rows: it divides by their norms.
    """
    for name, layer in layers(adapter).items():
        first, second, base = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight, layer.get_base_layer().weight
        if isinstance(base, FakeTensor):
            continue
        generator = torch.Generator().manual_seed(CounterRNG(seed, zlib.crc32(name.encode())).seed)
        drawn = (torch.rand(first.shape, generator=generator) * 2 - 1) / first.shape[1] ** 0.5
        with torch.no_grad():
            local_part(first).copy_(drawn[own_rows(first)])
            local_part(second).zero_()
            if NAME in layer.lora_magnitude_vector and not base.is_meta:
                norms = _row_norms(local_part(base).float())
                if not norms.all():
                    raise ValueError(
                        f"lora.dora=true divides by row norms, and {name}.weight has zero rows, as in zero-initialised "
                        "layers: exclude those with lora.targets, or set lora.dora=false"
                    )
                local_part(layer.lora_magnitude_vector[NAME].weight).copy_(norms)


def is_lora(name: str) -> bool:
    """Tell whether a parameter belongs to LoRA."""
    return ".lora_" in name


def published_name(name: str) -> str:
    """Return the name that a parameter of the model has without LoRA. Names of LoRA parameters are unchanged."""
    return name.replace(".base_layer.", ".")


def weight_beside(name: str) -> str:
    """Return the published name of the weight that a LoRA parameter belongs to."""
    return f"{name.partition('.lora_')[0]}.weight"


def fits(name: str, shape: tuple[int, ...], others: Mapping[str, tuple[int, ...]]) -> bool:
    """Tell whether a tensor is a LoRA tensor whose shape fits one of a model's weights.

    others: shapes of the model's parameters by published name.
    """
    layer, _, rest = name.partition(".lora_")
    weight = others.get(f"{layer}.weight", ())
    if not rest or len(weight) != 2:
        return False
    return shape[1:] == weight[1:] if rest.startswith("A.") else shape[0] == weight[0]


def continues(before: Recipe, recipe: Recipe) -> bool:
    """Tell whether a run can start from the LoRA of run `before` without merging it."""

    def form(r: Recipe) -> tuple:
        alpha = r.lora.rank if r.lora.alpha is None else r.lora.alpha
        return r.lora.rank, alpha, r.lora.dora, r.lora.targets, r.train.roles, r.train.frozen

    return form(before) == form(recipe)


def merged_weight(weight: Tensor, a: Tensor, b: Tensor, config: LoraConfig, norms: Tensor | None) -> Tensor:
    """Compute W + alpha / rank * B A in at least fp32, with rows rescaled to `norms` for DoRA.

    The result has the dtype of `weight`.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    scale = 1.0 if config.alpha is None else config.alpha / config.rank
    whole = weight.to(wide) + scale * (b.to(wide) @ a.to(wide))
    if norms is not None:
        whole *= (norms.to(wide) / _row_norms(whole))[:, None]
    return whole.to(weight.dtype)


@contextlib.contextmanager
def merged(adapter: Adapter) -> Iterator[None]:
    """Replace LoRA layers by plain layers with merged weights, under published names, inside the context.

    On exit the original layers and weights are restored bit for bit.
    """
    assert adapter.lora is not None
    replaced = []
    try:
        for name, layer in layers(adapter).items():
            base, parent = layer.get_base_layer(), adapter.get_submodule(name.rpartition(".")[0])
            replaced.append((parent, name.rpartition(".")[2], layer, base, base.weight.data))
            norms = layer.lora_magnitude_vector[NAME].weight if NAME in layer.lora_magnitude_vector else None
            with torch.no_grad():
                base.weight.data = merged_weight(
                    base.weight, layer.lora_A[NAME].weight, layer.lora_B[NAME].weight, adapter.lora, norms
                )
            setattr(parent, name.rpartition(".")[2], base)
        yield
    finally:
        for parent, last, layer, base, weight in replaced:
            base.weight.data = weight
            setattr(parent, last, layer)


@torch.no_grad()
def merge_tensors(adapter: Adapter, tensors: dict[str, Tensor], config: LoraConfig) -> frozenset[str]:
    """Merge another run's LoRA into the model's weights. Return the published names of the changed weights.

    tensors: that run's LoRA parameters by name. config: that run's LoraConfig.
    """
    weights = {published_name(name): parameter for name, parameter in adapter.named_parameters()}
    changed = []
    for name in tensors:
        layer, _, rest = name.partition(".lora_A.")
        if not rest:
            continue
        norms = tensors.get(f"{layer}.lora_magnitude_vector.{NAME}.weight")
        weight, b = weights[f"{layer}.weight"], tensors[f"{layer}.lora_B.{NAME}.weight"]
        rows, own = own_rows(weight), local_part(weight.detach())
        own.copy_(merged_weight(own.cpu(), tensors[name], b[rows], config, None if norms is None else norms[rows]))
        changed.append(f"{layer}.weight")
    return frozenset(changed)


def _export(adapter: Adapter, export: Callable[..., list[str]], wanted: Any, folder: Path, *given: Any, **options: Any):
    """Export the published files with merged weights, and the LoRA in peft's format in the subfolder `lora`."""
    peft = _peft()
    holder = _holder(adapter)
    holder.peft_config = {NAME: wanted}  # type: ignore[assignment]
    own = peft.get_peft_model_state_dict(holder, adapter_name=NAME)
    described = {key: sorted(value) if isinstance(value, set) else value for key, value in wanted.to_dict().items()}
    described |= {"inference_mode": True, "base_model_name_or_path": getattr(adapter.config, "weights", None)}
    with export_to(folder) as out:
        with merged(adapter):
            out.include(lambda place: export(place, *given, **options))
        out.tensors(f"{LORA}/adapter_model.safetensors", {f"{PREFIX}{name}": tensor for name, tensor in own.items()})
        out.json(f"{LORA}/adapter_config.json", described)
        return out.done()


def _roles(adapter: Adapter, roles: Callable[[], dict[str, str]]) -> dict[str, str]:
    """Map every parameter to its role. A LoRA parameter has the role of the weight it belongs to."""
    known = {published_name(name): role for name, role in roles().items()}
    return {
        name: known[weight_beside(name) if is_lora(name) else published_name(name)]
        for name, _ in adapter.named_parameters()
    }


def _seed_dropout(_: nn.Module, given: tuple) -> None:
    """Seed dropout from the run's seed and the id of the first sample of the micro-batch."""
    batch, rng = given[:2]
    torch.manual_seed(CounterRNG(rng.seed, DROPOUT, int(batch.host_ids[0])).seed)


def _holder(adapter: Adapter) -> nn.Module:
    """Return a plain module with the adapter's children: peft sets attributes on the module it is given."""
    holder = nn.Module()
    for name, child in adapter.named_children():
        holder.add_module(name, child)
    return holder


def _row_norms(weight: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight, dim=1)


def _give_memory(layer: Any) -> None:
    """Allocate LoRA parameters of deferred weights in host memory: no file to load contains them."""
    for part in (*layer.lora_A.values(), *layer.lora_B.values(), *layer.lora_magnitude_vector.values()):
        if part.weight.is_meta and not isinstance(part.weight, FakeTensor):
            part.weight = nn.Parameter(torch.zeros(part.weight.shape, dtype=part.weight.dtype))


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ValueError(
            "lora.rank above 0 needs peft, which is not installed: run pip install 'reca[lora]', or set lora.rank=0"
        ) from error
    return peft
