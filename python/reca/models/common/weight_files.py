"""Read weight files, initialise modules at random or on the meta device, and assign state dicts."""

import contextlib
import logging
import re
import warnings
import zipfile
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from reca.errors import first_line
from reca.io.files import AGAIN, HEAD, damage, is_safetensors, lost_links, parse_json, pickle_damage, read_json, size_of
from reca.io.paths import is_dir, is_file
from reca.models.common import deferred_weights

log = logging.getLogger("reca")
M = TypeVar("M", bound=nn.Module)

SUFFIXES = {".safetensors": "safetensors", **dict.fromkeys((".pth", ".pt", ".bin", ".ckpt"), "torch")}
INDEX = ".index.json"
# keys under which trainers save the trained weights, and their moving average
PLAIN = ("state_dict", "model", "module", "model_state_dict", "weights", "params", "net", "checkpoint")
EMA = ("ema", "ema_state_dict", "state_dict_ema", "model_ema", "ema_model", "params_ema")
# name components that module wrappers add: DataParallel and DDP, torch.compile, FSDP, activation checkpointing, Fabric
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
_SHARD = re.compile(r"(.+?)[-_.](\d+)-of-(\d+)\.(safetensors|pth|pt|bin|ckpt)")


def read_tensors(path: Path, ignore: Container[str] = ()) -> dict[str, Tensor]:
    """Read all tensors of a weight file, of an index and its shards, or of a folder; memory-mapped if possible.

    Accepts .safetensors, .pth, .pt, .bin and .ckpt; code in them is never run. Wrapper keys such as "state_dict" or
    "model", and wrapper prefixes such as module.x or _orig_mod.x, are removed. If a file has EMA weights only, these
    are returned and a log message says so. ignore: names of files in a folder that are not read.
    Raises ValueError with file, size, cause and remedy.
    """
    if is_dir(path):
        found = weight_file(path, ignore)
        return _bare(_shards(path), path) if found == path else read_tensors(found)
    return _bare(_index(path) if path.name.endswith(INDEX) else _file(path), path)


def weight_file(folder: Path, ignore: Container[str] = ()) -> Path:
    """Return what to read from a folder: its index, its only weight file, or the folder itself if it holds shards.

    Safetensors take precedence over other formats. Raises ValueError if there is no weight file or more than one.
    """
    names = sorted(path.name for path in folder.iterdir() if is_file(path) and path.name not in ignore)
    for suffixes in ((".safetensors",), tuple(suffix for suffix in SUFFIXES if suffix != ".safetensors")):
        indices = [name for name in names if name.endswith(tuple(f"{suffix}{INDEX}" for suffix in suffixes))]
        files = [name for name in names if name.endswith(suffixes)]
        single = [name for name in files if not _SHARD.fullmatch(name) and not _is_variant(name, names)]
        found = indices or single
        if len(found) > 1:
            raise ValueError(f"{folder} contains several weight files ({', '.join(found)}); name the one to read")
        if found or files:
            return folder / found[0] if found else folder
    raise ValueError(f"{folder} contains no weight file ({', '.join(SUFFIXES)} or *{INDEX}); name it or another "
                     f"folder{lost_links(folder)}")  # fmt: skip


def _is_variant(name: str, names: Sequence[str]) -> bool:
    """Tell whether a file such as model.fp16.safetensors is a variant of a model.safetensors among `names`."""
    stem, _, suffix = name.rpartition(".")
    return f"{stem.rpartition('.')[0]}.{suffix}" in names


def _named(path: Path) -> str:
    return f"{path} ({size_of(path)})"


def _file(path: Path) -> dict[str, Tensor]:
    if not is_file(path):
        raise ValueError(f"weight file {path} does not exist")
    _check_kind(path)
    state = _safetensors(path) if path.suffix == ".safetensors" else _torch(path)
    tensors = {name: t for name, t in state.items() if isinstance(name, str) and isinstance(t, Tensor)}
    if not tensors:
        keys = ", ".join(map(str, list(state)[:5])) or "none"
        raise ValueError(f"{_named(path)} contains no tensors by name, only {keys}; save `model.state_dict()` instead")
    return tensors


def _check_kind(path: Path) -> None:
    """Raise ValueError for a file that is not a weight file, or whose format differs from its suffix."""
    if cause := damage(path):
        raise ValueError(f"{path} {cause}")
    with path.open("rb") as file:
        head = file.read(HEAD)
    tensors = is_safetensors(head)  # before torch: the length at its start may equal torch's magic bytes
    found = "safetensors" if tensors else "torch" if head.startswith((b"PK", b"\x80")) else None
    wanted = SUFFIXES.get(path.suffix)
    if wanted is None and found is None:
        raise ValueError(f"{_named(path)} is not a weight file: expected {', '.join(SUFFIXES)}; name the file itself")
    if found is None:
        raise ValueError(f"{_named(path)} is not a {wanted} file: its first bytes are {head[:8].hex(' ')}; {AGAIN}")
    if found != wanted:
        suffix = ".safetensors" if found == "safetensors" else ".pth"
        stem = path.stem.removesuffix(".pth")  # of model.pth.tar
        raise ValueError(f"{_named(path)} is a {found} file under another suffix; rename it to {stem}{suffix}")
    if tensors:
        _check_header(path, int.from_bytes(head[:8], "little"))


def _check_header(path: Path, length: int) -> None:
    """Raise ValueError for a safetensors file with a damaged header, or one shorter than its header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(8)
        header = file.read(length) if length <= size - 8 else b""
    try:
        entries = [entry for name, entry in parse_json(header).items() if name != "__metadata__"] if header else []
        wanted = 8 + length + max((int(entry["data_offsets"][1]) for entry in entries), default=0) if header else None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{_named(path)} has a damaged safetensors header; {AGAIN}") from error
    if wanted is None or size < wanted:
        promised = f"{wanted} bytes" if wanted else f"a header of {length} bytes"
        raise ValueError(f"{_named(path)} is cut off: it declares {promised} and has {size}; {AGAIN}")


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(f"{_named(path)} is a damaged safetensors file ({first_line(error):.200}); {AGAIN}") from error


def _torch(path: Path) -> Mapping[Any, Any]:
    """Read the state dict of a torch.save file, without wrapper keys."""
    state = _loaded(path)
    if not isinstance(state, Mapping):
        what = f"a {type(state).__name__}" + (f" of {len(state)}" if isinstance(state, list | tuple) else "")
        raise ValueError(f"{_named(path)} contains {what}, not tensors by name; save `model.state_dict()` instead")
    return _unwrapped(state, path)


def _loaded(path: Path) -> Any:
    """Read a torch.save file. Files written before torch 1.6 are not zip archives and cannot be memory-mapped."""
    mapped = zipfile.is_zipfile(path)
    with path.open("rb") as file:
        cut = not mapped and file.read(2) == b"PK"
    if cut:
        raise ValueError(f"{_named(path)} is cut off: the end of its zip archive is missing; {AGAIN}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # unreadable files raise ValueError below
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch, pickle, zipfile and struct each raise their own types
        text = str(error)
        if mapped and (fault := pickle_damage(path)):  # before names in it, which may be damaged too
            raise ValueError(f"{_named(path)} is a damaged torch.save file ({fault}); {AGAIN}") from error
        if "TorchScript" in text or "torchscript" in text:
            raise ValueError(f"{_named(path)} is a TorchScript archive, which is code; save `model.state_dict()` "
                             "instead") from error  # fmt: skip
        if code := re.search(r"GLOBAL ([\w.]+)|[Uu]nsupported (?:class|callable) (\S+)|instantiate (\S+)", text):
            name = next(filter(None, code.groups()))
            raise ValueError(
                f"{_named(path)} contains Python objects besides tensors ({name}), or is damaged; it is not read, as "
                f"unpickling them can run code; save its state dict alone where it was made, or {AGAIN}"
            ) from error
        what = "is not a torch.save file, or a damaged one"
        inner = re.search(r"WeightsUnpickler error:\s*(.+?)(\. |\.?$)", text, re.M)  # between advice to trust the file
        raise ValueError(f"{_named(path)} {what} ({inner[1] if inner else first_line(error):.200}); {AGAIN}") from error


def _unwrapped(state: Mapping[Any, Any], path: Path) -> Mapping[Any, Any]:
    while True:
        inner = {key: value for key, value in state.items() if isinstance(value, Mapping) and _holds_tensors(value)}
        plain, averaged = ([key for key in keys if key in inner] for keys in (PLAIN, EMA))
        bare = not any(isinstance(value, Tensor) for value in state.values())
        if plain:
            if averaged:
                log.info(
                    "%s: reading the weights under %r; its EMA under %r is ignored", path.name, plain[0], averaged[0]
                )
            state = inner[plain[0]]
        elif averaged or (bare and len(inner) == 1):
            (key,) = averaged[:1] or inner
            if "ema" in str(key).lower():
                log.info("%s contains EMA weights only (under %r): reading these", path.name, key)
            state = inner[key]
        elif bare and len(inner) > 1:
            keys = ", ".join(map(str, inner))
            raise ValueError(f"{_named(path)} contains several state dicts ({keys}); save the one to load on its own")
        else:
            return state


def _holds_tensors(state: Mapping[Any, Any]) -> bool:
    if any(isinstance(value, Tensor) for value in state.values()):
        return True
    return any(isinstance(state.get(key), Mapping) and _holds_tensors(state[key]) for key in (*PLAIN, *EMA))


def _bare(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Remove wrapper components from tensor names."""
    for prefix in (f"{key}." for key in EMA):
        if all(name.startswith(prefix) for name in tensors):
            log.info("%s contains EMA weights only (names under %r): reading these", path.name, prefix)
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    if "n_averaged" in tensors and all(n.startswith("module.") for n in tensors if n != "n_averaged"):
        log.info("%s contains averaged weights only (torch's AveragedModel): reading these", path.name)
        tensors = {name: tensor for name, tensor in tensors.items() if name != "n_averaged"}
    found: dict[str, str] = {}
    for name in tensors:
        *parts, last = name.split(".")
        bare = ".".join([*(part for part in parts if part not in WRAPPERS), last])
        if bare in found:
            raise ValueError(f"{_named(path)} contains {bare} twice, as {found[bare]} and as {name}; keep one of them")
        found[bare] = name
    return {bare: tensors[name] for bare, name in found.items()}


def _shards(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of the numbered shards of a folder."""
    shards: dict[tuple[str, str], dict[int, Path]] = {}
    counts = {}
    for path in folder.iterdir():
        if match := _SHARD.fullmatch(path.name):
            shards.setdefault((match[1], match[4]), {})[int(match[2])] = path
            counts[match[1], match[4]] = int(match[3])
    if any(suffix == "safetensors" for _, suffix in shards):  # takes precedence
        shards = {key: files for key, files in shards.items() if key[1] == "safetensors"}
    if len(shards) > 1:
        groups = ", ".join(f"{stem}*.{suffix}" for stem, suffix in sorted(shards))
        raise ValueError(f"{folder} contains shards of several files ({groups}); keep the shards of one")
    ((key, numbered),) = shards.items()
    first = min(numbered)
    if missing := sorted(set(range(first, first + counts[key])) - numbered.keys()):
        raise ValueError(f"{folder} lacks shards {', '.join(map(str, missing))} of {counts[key]}; {AGAIN}")
    return _joined([numbered[number] for number in sorted(numbered)])


def weight_map(index: Path) -> dict[str, str]:
    """Read the map of an index from tensor names to shard files. Raises ValueError if the file is not an index."""
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(shard, str) for shard in where.values()):
        raise ValueError(f"{_named(index)} is not an index of shards: it has no weight_map of names; {AGAIN}")
    return where


def _index(path: Path) -> dict[str, Tensor]:
    """Read all tensors of the shards listed in an index."""
    if not is_file(path):
        raise ValueError(f"weight file {path} does not exist")
    where = weight_map(path)
    shards = sorted(set(where.values()), key=_by_number)
    if outside := [shard for shard in shards if Path(shard).is_absolute() or ".." in Path(shard).parts]:
        raise ValueError(f"{_named(path)} names a shard outside its folder ({outside[0]}); {AGAIN}")
    if missing := [shard for shard in shards if not is_file(path.parent / shard)]:
        raise ValueError(
            f"{_named(path)} names {len(shards)} shards of which {len(missing)} are missing: "
            f"{', '.join(missing[:8])}{' ...' if len(missing) > 8 else ''}; fetch them into {path.parent}"
        )
    state = _joined([path.parent / shard for shard in shards])
    if lost := sorted(where.keys() - state.keys()):
        raise ValueError(
            f"{_named(path)} lists {len(lost)} tensors that its shards lack, the first {lost[0]}; fetch them again"
        )
    return state


def _joined(shards: Iterable[Path]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for shard in shards:
        part = _file(shard)
        if twice := sorted(part.keys() & state.keys()):
            raise ValueError(f"{_named(shard)} contains {twice[0]}, which an earlier shard contains too; {AGAIN}")
        state |= part
    return state


def _by_number(name: str) -> list[tuple[int, str]]:
    """Return a sort key that orders part-2 before part-10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


@contextlib.contextmanager
def init_random(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Initialise modules built in the context on `device` from `seed`; the CPU generator's state is restored.

    While weights are deferred, only rank 0 initialises them; on other ranks parameters stay on the meta device.
    """
    makes = deferred_weights.makes_random()
    with torch.random.fork_rng(devices=[]), torch.device(device), contextlib.nullcontext() if makes else init_on_meta():
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def init_on_meta() -> Iterator[None]:
    """Put parameters created in the context on the meta device; buffers (rotary frequencies, tables) are allocated.

    `assign_state_dict` fills such a module, so that loading needs one copy of the weights.
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
    """Assign `state` to the parameters and persistent buffers of `module`, without a copy unless a cast is needed.

    dtype: dtype of all floating-point parameters, or a function of their names; None keeps the dtypes of the file,
    except that fp64 becomes fp32 and 8-bit floats become bf16. Buffers keep the dtypes of the module. While weights are
    deferred, parameters stay on the meta device and the file's tensors are read after sharding.
    what: the source, for error messages. Raises ValueError that lists missing and unexpected keys and wrong shapes and
    dtypes.
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
                ("with another shape", shapes),
                ("not plain floating-point tensors", types),
            )
            if names
        )
        raise ValueError(f"{what} does not fit the configured model; check model.weights and the sizes.{report}")

    buffers = {name for name, _ in module.named_buffers(remove_duplicate=False)}

    def kept(name: str, tensor: Tensor) -> torch.dtype:
        if not tensor.is_floating_point():
            return tensor.dtype
        if name in buffers:
            return wanted[name].dtype
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


def cast_parameters(module: M, dtype_of: Callable[[str], torch.dtype]) -> M:
    """Cast parameters to types by their names. Returns the module.

    Module.to would also cast buffers, such as rotary frequencies, and cannot cast tensors without memory.
    """
    for name, parameter in module.named_parameters():
        parameter.data = parameter.data.to(dtype_of(name))
    return module


def _is_plain(tensor: Tensor) -> bool:
    """Tell whether a tensor is plain floating point: not integer, quantized, sparse or meta."""
    return tensor.is_floating_point() and tensor.layout == torch.strided and not tensor.is_meta


def _computed(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which weights of a file's dtype are loaded."""
    if dtype.itemsize == 1:
        return torch.bfloat16
    return torch.float32 if dtype == torch.float64 else dtype
