"""A CUDA device simulated on the CPU: python -m tests.driver.simulated_cuda LIBRARY RECIPE...

A `Simulated` tensor says that it is on cuda:0 and keeps its values in a CPU tensor, on which every operator runs. An
operator with tensors of both devices fails as on a GPU, and everything that makes the host wait for a GPU is recorded.
No kernel is tested. LIBRARY is simulated_cuda.cpp, compiled (`build`).

As a program, it trains and samples on the CPU and on the simulated GPU, and prints differences and waits as JSON.
"""

import contextlib
import ctypes
import json
import subprocess
import sys
import sysconfig
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from unittest import mock

if __name__ == "__main__":
    torch_folder = Path(sysconfig.get_paths()["purelib"]) / "torch"
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(torch_folder / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)  # before torch looks for a device

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from reca.config.recipe_files import load_recipe
from reca.models import umm_package
from reca.monitoring.reconstructions import image_batch, reconstruct
from reca.optim import adamw
from reca.trainer import Trainer
from reca_kernels import dispatch
from tests.models import contract

ROOT = Path(__file__).parents[2]
DEVICE = torch.device("cuda", 0)
aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default)
INDEXING = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default)
READ_BY_HOST = (
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.equal.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.repeat_interleave.Tensor,
)
waits: list[str] = []


def build(folder: Path) -> Path:
    """Compile simulated_cuda.cpp against the installed torch. Raises CalledProcessError if that fails."""
    torch_folder, library = Path(torch.__file__).parent, folder / "libsimulated_cuda.so"
    command = ["c++", "-std=c++20", "-w", "-fPIC", "-shared", f"-I{torch_folder}/include", "-o", str(library)]
    command += [str(Path(__file__).with_suffix(".cpp")), f"-L{torch_folder}/lib", "-ltorch_cpu", "-lc10"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return library


class Simulated(Tensor):
    on_host: Tensor

    @staticmethod
    def __new__(cls, values, requires_grad=False):
        made = Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=DEVICE,
            requires_grad=requires_grad,
        )
        made.on_host = values
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        leaves = tree_leaves((args, kwargs))
        _check(func, args, kwargs, [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, cls) and x.ndim])
        on_device = isinstance(args[0], cls) if func is aten.copy_.default else True
        if kwargs.get("device") is not None:
            on_device, kwargs["device"] = torch.device(kwargs["device"]).type == "cuda", torch.device("cpu")
        result = func(*tree_map_only(cls, _values, args), **tree_map_only(cls, _values, kwargs))
        arguments = {id(x.on_host): x for x in leaves if isinstance(x, cls)}  # in-place operators return their argument

        def wrapped(x):
            return arguments[id(x)] if id(x) in arguments else cls(x) if on_device else x

        return tree_map_only(Tensor, wrapped, result)


def _values(x):
    return x.on_host


def _check(func, args, kwargs, host):
    """Raise RuntimeError for tensors of two devices, and record a wait of the host."""
    if func in INDEXING:  # by a CPU tensor it is copied to the device, and by a mask its elements are counted
        if host or any(isinstance(x, Tensor) and x.dtype == torch.bool for x in args[1]):
            _wait(func)
    elif host and func not in COPIES:
        shapes = [tuple(x.shape) for x in host]
        raise RuntimeError(f"Expected all tensors to be on the same device: {func} got CPU tensors of {shapes}")
    to_host = func is aten._to_copy.default and torch.device(kwargs.get("device") or DEVICE).type == "cpu"
    to_host |= func is aten.copy_.default and not isinstance(args[0], Simulated)
    to_device = func is aten.copy_.default and not isinstance(args[1], Simulated) and args[1].numel() and args[1].ndim
    not_blocking = kwargs.get("non_blocking") or (func is aten.copy_.default and len(args) > 2 and args[2])
    if (to_host or to_device) and not not_blocking:
        _wait(func)
    if func in READ_BY_HOST and kwargs.get("output_size") is None:
        _wait(func)


def _wait(what):
    own = [
        f"{Path(frame.filename).relative_to(ROOT)}:{frame.lineno}"
        for frame in traceback.extract_stack()
        if frame.filename.startswith((f"{ROOT}/python", f"{ROOT}/reca_kernels"))
    ]
    waits.append(f"{what} in {' < '.join(own[:-4:-1])}")


@contextlib.contextmanager
def cuda():
    """Simulate one GPU inside the context."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty.memory_format", _empty, "CUDA")
    library.impl("empty_strided", _empty_strided, "CUDA")
    library.impl("copy_", _copy, "CUDA")
    nothing, stream = lambda *a, **k: None, torch.Stream(DEVICE)
    parts = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": nothing,
        "_exchange_device": lambda *a: 0,
        "_maybe_exchange_device": lambda *a: 0,
        "get_device_capability": lambda *a: (9, 0),
        "get_device_name": lambda *a: "simulated",
        "current_stream": lambda *a: stream,
        "is_current_stream_capturing": lambda: False,
        "synchronize": lambda *a: _wait("synchronize"),
        "set_stream": nothing,
        "_lazy_init": nothing,
    }
    pinning = {"pin_memory": nothing, "unpin_memory": nothing}
    tolist = Tensor.tolist

    def read(x):
        if isinstance(x, Simulated):
            _wait("tolist")
            x = x.detach().on_host
        return tolist(x)

    with (
        mock.patch.multiple(torch.cuda, **parts),
        mock.patch.multiple(adamw, **pinning),
        mock.patch.multiple(Tensor, pin_memory=lambda x, *a: x, record_stream=nothing, tolist=read),
        mock.patch.object(nn.Module, "_apply", _apply),
    ):
        try:
            yield
        finally:
            library._destroy()


def _apply(module: nn.Module, function: Callable, recurse: bool = True) -> nn.Module:
    """Do what Module._apply does, but replace parameters: a CPU tensor cannot become a subclass in place."""
    made: dict[int, nn.Parameter] = {}
    for part in module.modules() if recurse else [module]:
        for name, parameter in part._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(function(parameter.detach()), parameter.requires_grad)
                part._parameters[name] = made[id(parameter)]
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else function(buffer)
    return module


def _empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return Simulated(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format))


def _empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
    return Simulated(torch.empty_strided(size, stride, dtype=dtype))


def _copy(into, source, non_blocking=False):
    """Copy where Python dispatch is disabled, such as in torch.tensor(..., device="cuda")."""
    into, source = (x.on_host if isinstance(x, Simulated) else x for x in (into, source))
    if source.numel() and not non_blocking:
        _wait("torch.tensor")
    into.copy_(source)
    return into


CHANGES = [
    "train.steps=2", "train.compile=false", "log.reconstructions=0", "checkpoint.every=0", "data.workers=0",
    "objective.reca.batch_size=4", "objective.reca.micro_batch=2", "objective.i2t.batch_size=2",
    "optim.offload=true", "ema.half_life=1",
]  # fmt: skip


def same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def outcome(name: str) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """Take two steps, save, generate, reconstruct, edit and answer. Return values, and waits of the host, by phase."""
    found: dict[str, Tensor] = {}
    waited: dict[str, list[str]] = {}

    def record(phase, results):
        waited[phase] = list(waits)
        found.update({f"{phase}: {key}": value.detach().cpu().double() for key, value in results})
        waits.clear()

    with tempfile.TemporaryDirectory() as folder, dispatch.use("reference"):
        recipe = load_recipe(name, [*CHANGES, f"run_dir={folder}"])
        device = DEVICE if torch.cuda.is_available() else torch.device("cpu")
        model = umm_package(recipe.umm).Adapter.load(recipe.model, device)
        trainer = Trainer(recipe, model)
        streams = {task: loader.steps() for task, loader in trainer.loaders.items()}
        record("start", model.named_parameters())
        for step in range(2):
            batches = trainer.next_batches(streams)
            record(f"batch {step}", ())
            metrics = trainer.train_step(batches)
            record(f"step {step}", ((key, torch.tensor(value)) for key, value in metrics.items()))
        record("trained", model.named_parameters())
        assert trainer.save()
        record("saved", ())
        image = torch.arange(3 * 20 * 20).reshape(3, 20, 20).to(torch.uint8)
        batch = image_batch(recipe, model, 2)
        record("read", ())
        for steps in (2, 3):
            quick = contract.quick(recipe.umm, steps) | ({"diffusion_steps": 4} if recipe.umm == "harmon" else {})
            record(f"generated {steps}", enumerate(model.generate(["a red circle", "a circle"], [0, 1], **quick)))
            if "reconstruct" in model.abilities:
                record(f"reconstructed {steps}", enumerate(reconstruct(model, batch, **quick)))
            if "edit" in model.abilities:
                record(f"edited {steps}", enumerate(model.edit([image], ["a circle"], [0], **quick)))
        answers = model.answer([image, image], ["what is this", "a circle"], max_new_tokens=4)
        record("answered", ((answer, torch.ones(1)) for answer in answers))
    return found, waited


if __name__ == "__main__":
    report = {}
    for name in sys.argv[2:]:
        expected, _ = outcome(name)
        with cuda():
            found, waited = outcome(name)
        keys = sorted(expected.keys() | found.keys())
        report[name] = waited | {"differences": [key for key in keys if not same(expected.get(key), found.get(key))]}
    print(json.dumps(report))
