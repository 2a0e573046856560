"""Published weight files: finding them, reading them, and putting them into modules that hold no memory yet."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


def fetch(source: str, patterns: list[str] | None = None) -> Path:
    """The local folder (or file) of `source`: a path, a hub id, or owner/name/file of the hub. Downloads are cached.

    patterns: glob patterns of the files wanted from the hub; None takes all.
    Raises ValueError when neither exists.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    parts = source.split("/")
    if source.startswith((".", "/", "~")) or len(parts) < 2 or (len(parts) > 2 and not path.suffix):
        raise ValueError(f"{source!r} does not exist; give a folder, a file, or a hub id such as 'owner/name'")
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        if len(parts) > 2:
            return Path(hf_hub_download("/".join(parts[:2]), "/".join(parts[2:])))
        return Path(snapshot_download(source, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError) as error:
        raise ValueError(
            f"{source!r} is neither a local path nor a hub repository that can be reached ({type(error).__name__}: "
            f"{error}). Download it elsewhere and give the folder"
        ) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a weight file, or of a folder's sharded index, mapped from disk where the format allows.

    Accepts .safetensors, .pth, .pt, .bin, .ckpt (optionally under a "state_dict", "model" or "module" key) and a
    *.index.json beside its shards. Raises ValueError for anything else.
    """
    if path.is_dir():
        indexes = sorted(path.glob("*.index.json"))
        if not indexes:
            raise ValueError(f"{path} holds no *.index.json; name the weight file itself")
        path = indexes[0]
    if path.name.endswith(".index.json"):
        shards = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        return {name: tensor for shard in shards for name, tensor in read_tensors(path.parent / shard).items()}
    if not path.is_file():
        raise ValueError(f"weight file {path} does not exist")
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix not in (".pth", ".pt", ".bin", ".ckpt"):
        raise ValueError(f"{path} is no weight file: expected .safetensors, .pth, .pt, .bin or .ckpt")
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    for wrapper in ("state_dict", "model", "module"):
        if isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    return {name.removeprefix("module."): tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


@contextlib.contextmanager
def no_memory() -> Iterator[None]:
    """Parameters made inside live on the meta device; buffers (rotary frequencies, tables) are real.

    Modules built so are filled by `put`, so loading holds one copy of the weights.
    """
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def put(module: nn.Module, state: Mapping[str, Tensor], what: str, dtype: torch.dtype | None = None) -> None:
    """Make `state` the parameters and persistent buffers of `module`, without a copy where no cast is needed.

    what: names the source in errors. Raises ValueError that lists missing keys, unexpected keys and wrong shapes.
    """
    wanted = module.state_dict()
    missing = sorted(wanted.keys() - state.keys())
    unexpected = sorted(state.keys() - wanted.keys())
    shapes = [
        f"{name}: file {tuple(state[name].shape)}, model {tuple(wanted[name].shape)}"
        for name in wanted.keys() & state.keys()
        if state[name].shape != wanted[name].shape
    ]
    if missing or unexpected or shapes:
        report = "".join(
            f"\n  {len(names)} {kind}: {', '.join(sorted(names)[:8])}{' ...' if len(names) > 8 else ''}"
            for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
            if names
        )
        raise ValueError(f"{what} does not fit the configured model; check model.weights and the sizes.{report}")
    cast = {n: t.to(dtype) if dtype and t.is_floating_point() else t for n, t in state.items()}
    module.load_state_dict(cast, strict=True, assign=True)
