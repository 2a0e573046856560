"""Published weight files and what modules begin with: reading files, random weights, weights of a state dict."""

import contextlib
import json
import logging
import re
import warnings
import zipfile
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from reca.files import AGAIN, HEAD, damage, is_safetensors, read_json, size_of
from reca.models.common import deferred_weights

log = logging.getLogger("reca")


SUFFIXES = {".safetensors": "safetensors", **dict.fromkeys((".pth", ".pt", ".bin", ".ckpt"), "torch")}
INDEX = ".index.json"
# keys under which trainers put what they save: what was trained, and its moving average
PLAIN = ("state_dict", "model", "module", "model_state_dict", "weights", "params", "net", "checkpoint")
EMA = ("ema", "ema_state_dict", "state_dict_ema", "model_ema", "ema_model", "params_ema")
# parts of names that wrappers of modules add: DataParallel and DDP, torch.compile, FSDP, checkpointing, Fabric
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
_SHARD = re.compile(r"(.+?)[-_.](\d+)-of-(\d+)\.(safetensors|pth|pt|bin|ckpt)")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a weight file, an index with its shards or a folder of shards, mapped from disk if possible.

    Accepts .safetensors, .pth, .pt, .bin and .ckpt; no code in them runs. What trainers wrap around a state dict (keys
    such as "state_dict" or "model", names such as module.x or _orig_mod.x) is taken off. A file that holds nothing but
    a moving average (EMA) gives that, and the log says so. Raises ValueError with file, size, cause and what to do.
    """
    read = _folder if path.is_dir() else _index if path.name.endswith(INDEX) else _file
    return _bare(read(path), path)


def weight_file(folder: Path, ignore: Container[str] = ()) -> Path:
    """Find what to read of a folder: an index, the folder if it holds shards, or its only weight file.

    Safetensors go before other formats. Raises ValueError for none and for several.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name not in ignore)
    for suffixes in ((".safetensors",), tuple(suffix for suffix in SUFFIXES if suffix != ".safetensors")):
        indices = [name for name in names if name.endswith(tuple(f"{suffix}{INDEX}" for suffix in suffixes))]
        files = [name for name in names if name.endswith(suffixes)]
        single = [name for name in files if not _SHARD.fullmatch(name) and not _is_variant(name, names)]
        found = indices or single
        if len(found) > 1:
            raise ValueError(f"{folder} holds several weight files ({', '.join(found)}); name the one that is meant")
        if found or files:
            return folder / found[0] if found else folder
    raise ValueError(f"{folder} holds no weight file ({', '.join(SUFFIXES)} or *{INDEX}); name it, or another folder")


def _is_variant(name: str, names: Sequence[str]) -> bool:
    """Tell whether model.fp16.safetensors, say, is a copy of a model.safetensors or of an index beside it."""
    stem, _, suffix = name.rpartition(".")
    plain = f"{stem.rpartition('.')[0]}.{suffix}"
    return plain in names or f"{plain}{INDEX}" in names


def _named(path: Path) -> str:
    return f"{path} ({size_of(path)})"


def _file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"weight file {path} does not exist")
    _check_kind(path)
    state = _safetensors(path) if path.suffix == ".safetensors" else _torch(path)
    tensors = {name: t for name, t in state.items() if isinstance(name, str) and isinstance(t, Tensor)}
    if not tensors:
        keys = ", ".join(map(str, list(state)[:5])) or "none"
        raise ValueError(f"{_named(path)} holds no tensors by name, only {keys}; save `model.state_dict()` instead")
    return tensors


def _check_kind(path: Path) -> None:
    """Raise ValueError for a file that is no weight file, or one of another format than its name says."""
    if cause := damage(path):
        raise ValueError(f"{path} {cause}")
    with path.open("rb") as file:
        head = file.read(HEAD)
    tensors = is_safetensors(head)  # first: the length it begins with may look like anything
    found = "safetensors" if tensors else "torch" if head.startswith((b"PK", b"\x80")) else None
    wanted = SUFFIXES.get(path.suffix)
    if wanted is None and found is None:
        raise ValueError(f"{_named(path)} is no weight file: expected {', '.join(SUFFIXES)}; name the file itself")
    if found is None:
        raise ValueError(f"{_named(path)} holds no {wanted} file: its first bytes are {head[:8].hex(' ')}; {AGAIN}")
    if found != wanted:
        suffix = ".safetensors" if found == "safetensors" else ".pth"
        stem = path.stem.removesuffix(".pth")  # of model.pth.tar
        raise ValueError(f"{_named(path)} holds a {found} file under another suffix; rename it to {stem}{suffix}")
    if tensors:
        _check_header(path, int.from_bytes(head[:8], "little"))


def _check_header(path: Path, length: int) -> None:
    """Raise ValueError for a safetensors file that is shorter or longer than its header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(8)
        header = file.read(length) if length <= size - 8 else b""
    try:
        entries = [entry for name, entry in json.loads(header).items() if name != "__metadata__"] if header else []
        wanted = 8 + length + max((int(entry["data_offsets"][1]) for entry in entries), default=0) if header else None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{_named(path)} has a damaged header of safetensors; {AGAIN}") from error
    if wanted is None or size < wanted:
        promised = f"{wanted} bytes" if wanted else f"a header of {length} bytes"
        raise ValueError(f"{_named(path)} is cut off: it promises {promised} and has {size}; {AGAIN}")


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(f"{_named(path)} is a damaged safetensors file ({_first_line(error)}); {AGAIN}") from error


def _torch(path: Path) -> Mapping[Any, Any]:
    """Read the state dict of a file of torch.save, without what trainers wrap around it."""
    state = _loaded(path)
    if not isinstance(state, Mapping):
        what = f"a {type(state).__name__}" + (f" of {len(state)}" if isinstance(state, list | tuple) else "")
        raise ValueError(f"{_named(path)} holds {what} and no tensors by name; save `model.state_dict()` instead")
    return _unwrapped(state, path)


def _loaded(path: Path) -> Any:
    """Read what torch.save has written. Files of torch before 1.6 are no zip archives and cannot be mapped."""
    mapped = zipfile.is_zipfile(path)
    with path.open("rb") as file:
        cut = not mapped and file.read(2) == b"PK"
    if cut:
        raise ValueError(f"{_named(path)} is cut off: the end of its zip archive is missing; {AGAIN}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd files, which end in a sentence here
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch, pickle, zipfile and struct each have their own
        text = str(error)
        if "TorchScript" in text or "torchscript" in text:
            raise ValueError(f"{_named(path)} is a TorchScript archive, which is code; save `model.state_dict()` "
                             "instead") from error  # fmt: skip
        if code := re.search(r"GLOBAL ([\w.]+)|[Uu]nsupported (?:class|callable) (\S+)|instantiate (\S+)", text):
            name = next(filter(None, code.groups()))
            raise ValueError(
                f"{_named(path)} holds Python objects beside tensors ({name}), and to read them could run any code, so "
                "it is not read; where you trust it, save its state dict alone, best as .safetensors"
            ) from error
        what = "is a damaged file of torch.save, or none"
        raise ValueError(f"{_named(path)} {what} ({_first_line(error)}); {AGAIN}") from error


def _unwrapped(state: Mapping[Any, Any], path: Path) -> Mapping[Any, Any]:
    while True:
        inner = {key: value for key, value in state.items() if isinstance(value, Mapping) and _holds_tensors(value)}
        plain, averaged = ([key for key in keys if key in inner] for keys in (PLAIN, EMA))
        bare = not any(isinstance(value, Tensor) for value in state.values())
        if plain:
            if averaged:
                log.info("%s: weights under %r are taken, its EMA under %r is not", path.name, plain[0], averaged[0])
            state = inner[plain[0]]
        elif averaged or (bare and len(inner) == 1):
            (key,) = averaged[:1] or inner
            if "ema" in str(key).lower():
                log.info("%s holds EMA weights alone (under %r): these are taken", path.name, key)
            state = inner[key]
        elif bare and len(inner) > 1:
            keys = ", ".join(map(str, inner))
            raise ValueError(f"{_named(path)} holds several state dicts ({keys}); save the one that is meant by itself")
        else:
            return state


def _holds_tensors(state: Mapping[Any, Any]) -> bool:
    if any(isinstance(value, Tensor) for value in state.values()):
        return True
    return any(isinstance(state.get(key), Mapping) and _holds_tensors(state[key]) for key in (*PLAIN, *EMA))


def _bare(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Give tensors the names that they have in the model itself."""
    for prefix in (f"{key}." for key in EMA):
        if all(name.startswith(prefix) for name in tensors):
            log.info("%s holds EMA weights alone (names under %r): these are taken", path.name, prefix)
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    if "n_averaged" in tensors and all(n.startswith("module.") for n in tensors if n != "n_averaged"):
        log.info("%s holds averaged weights alone (torch's AveragedModel): these are taken", path.name)
        tensors = {name: tensor for name, tensor in tensors.items() if name != "n_averaged"}
    found: dict[str, str] = {}
    for name in tensors:
        *parts, last = name.split(".")
        bare = ".".join([*(part for part in parts if part not in WRAPPERS), last])
        if bare in found:
            raise ValueError(f"{_named(path)} holds {bare} twice, as {found[bare]} and as {name}; save one of them")
        found[bare] = name
    return {bare: tensors[name] for bare, name in found.items()}


def _folder(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of a folder's index, of its only weight file, or of its numbered shards."""
    found = weight_file(folder)
    if found != folder:
        return read_tensors(found)
    shards: dict[tuple[str, str], dict[int, Path]] = {}
    counts = {}
    for path in folder.iterdir():
        if match := _SHARD.fullmatch(path.name):
            shards.setdefault((match[1], match[4]), {})[int(match[2])] = path
            counts[match[1], match[4]] = int(match[3])
    if any(suffix == "safetensors" for _, suffix in shards):  # go before other formats
        shards = {key: files for key, files in shards.items() if key[1] == "safetensors"}
    if len(shards) > 1:
        groups = ", ".join(f"{stem}*.{suffix}" for stem, suffix in sorted(shards))
        raise ValueError(f"{folder} holds shards of several files ({groups}); leave one in it")
    ((key, numbered),) = shards.items()
    first = min(numbered)
    if missing := sorted(set(range(first, first + counts[key])) - numbered.keys()):
        raise ValueError(f"{folder} lacks shards {', '.join(map(str, missing))} of {counts[key]}; {AGAIN}")
    return _joined([numbered[number] for number in sorted(numbered)])


def weight_map(index: Path) -> dict[str, str]:
    """Read in which file an index says that each tensor is. Raises ValueError for what is no index."""
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(shard, str) for shard in where.values()):
        raise ValueError(f"{_named(index)} is no index of shards: it has no weight_map of names; {AGAIN}")
    return where


def _index(path: Path) -> dict[str, Tensor]:
    """Read the tensors of the shards that an index names."""
    if not path.is_file():
        raise ValueError(f"weight file {path} does not exist")
    where = weight_map(path)
    shards = sorted(set(where.values()), key=_by_number)
    if outside := [shard for shard in shards if Path(shard).is_absolute() or ".." in Path(shard).parts]:
        raise ValueError(f"{_named(path)} names a shard outside its folder ({outside[0]}); {AGAIN}")
    if missing := [shard for shard in shards if not (path.parent / shard).is_file()]:
        raise ValueError(
            f"{_named(path)} names {len(shards)} shards of which {len(missing)} are not beside it: "
            f"{', '.join(missing[:8])}{' ...' if len(missing) > 8 else ''}; fetch them into {path.parent}"
        )
    state = _joined([path.parent / shard for shard in shards])
    if lost := sorted(where.keys() - state.keys()):
        raise ValueError(
            f"{_named(path)} promises {len(lost)} tensors that its shards lack, the first {lost[0]}; fetch them again"
        )
    return state


def _joined(shards: Iterable[Path]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for shard in shards:
        part = _file(shard)
        if twice := sorted(part.keys() & state.keys()):
            raise ValueError(f"{_named(shard)} holds {twice[0]}, which an earlier shard holds too; {AGAIN}")
        state |= part
    return state


def _by_number(name: str) -> list[tuple[int, str]]:
    """Sort part-2 before part-10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


@contextlib.contextmanager
def init_random(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Make parameters inside on `device` from `seed`, and leave the CPU's generator as it was.

    Where weights are deferred, only the first rank makes them.
    """
    makes = deferred_weights.makes_random()
    with torch.random.fork_rng(devices=[]), torch.device(device), contextlib.nullcontext() if makes else init_on_meta():
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def init_on_meta() -> Iterator[None]:
    """Put parameters made inside on the meta device; buffers (rotary frequencies, tables) are real.

    Modules built so are filled by `assign_state_dict`, so loading holds one copy of the weights.
    """
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def assign_state_dict(
    module: nn.Module,
    state: Mapping[str, Tensor],
    what: str,
    dtype: torch.dtype | Callable[[str], torch.dtype] | None = None,
) -> None:
    """Make `state` the parameters and persistent buffers of `module`, without a copy where no cast is needed.

    dtype: of all floating-point numbers, or of each by its name; None keeps those of the file, but fp64 becomes fp32,
    and 8 bits become bf16. Where weights are deferred, they keep their place in the file until they are sharded.
    what: names the source in errors. Raises ValueError that lists missing keys, unexpected keys, and wrong shapes and
    types.
    """
    wanted = module.state_dict()
    missing = sorted(wanted.keys() - state.keys())
    unexpected = sorted(state.keys() - wanted.keys())
    shapes = [
        f"{name}: file {tuple(state[name].shape)}, model {tuple(wanted[name].shape)}"
        for name in wanted.keys() & state.keys()
        if state[name].shape != wanted[name].shape
    ]
    types = [
        f"{name}: file {str(state[name].dtype).removeprefix('torch.')}"
        for name in wanted.keys() & state.keys()
        if wanted[name].is_floating_point() and not _is_plain(state[name])
    ]
    if missing or unexpected or shapes or types:
        report = "".join(
            f"\n  {len(names)} {kind}: {', '.join(sorted(names)[:8])}{' ...' if len(names) > 8 else ''}"
            for kind, names in (
                ("missing", missing),
                ("unexpected", unexpected),
                ("of another shape", shapes),
                ("without plain floating-point numbers", types),
            )
            if names
        )
        raise ValueError(f"{what} does not fit the configured model; check model.weights and the sizes.{report}")

    def kept(name: str, tensor: Tensor) -> torch.dtype:
        if not tensor.is_floating_point():
            return tensor.dtype
        return (dtype(name) if callable(dtype) else dtype) or _computed(tensor.dtype)

    deferred = set()
    if deferred_weights.is_deferring():
        deferred = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    cast = {
        n: torch.empty_like(t, dtype=kept(n, t), device="meta") if n in deferred else t.to(kept(n, t))
        for n, t in state.items()
    }
    module.load_state_dict(cast, strict=True, assign=True)
    if deferred:
        deferred_weights.attach(module, state)


def _is_plain(tensor: Tensor) -> bool:
    """Tell whether it holds plain floating-point numbers: not integers, not quantized, not sparse, not meta."""
    return tensor.is_floating_point() and tensor.layout == torch.strided and not tensor.is_meta


def _computed(dtype: torch.dtype) -> torch.dtype:
    """Return the type that numbers of a file's type are computed in."""
    if dtype.itemsize == 1:
        return torch.bfloat16
    return torch.float32 if dtype == torch.float64 else dtype
