"""A CUDA device simulated in the host's memory: python -m tests.driver.simulated_cuda LIBRARY BACKENDS RECIPE...

LIBRARY is simulated_cuda.cpp, compiled (`build`): its tensors are on cuda:0, and every operator runs on the CPU. An
operator with tensors of both devices fails as on a GPU, and everything that makes the host wait for a GPU is recorded.
BACKENDS run the ops there, joined by commas: reference, triton in its interpreter (TRITON_INTERPRET=1), or cuda, by the
emulator of tests/kernels.

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
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

if __name__ == "__main__":
    torch_folder = Path(sysconfig.get_paths()["purelib"]) / "torch"
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(torch_folder / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)  # before torch looks for a device

import torch
from torch import Tensor

from reca.config.recipe_files import load_recipe
from reca.models import umm_package
from reca.monitoring.reconstructions import image_batch, reconstruct
from reca.optim import adamw
from reca.trainer import Trainer
from reca_kernels import dispatch, native
from tests import compiled
from tests.kernels import emulated
from tests.models import contract

ROOT = Path(__file__).parents[2]
DEVICE = torch.device("cuda", 0)
waits: list[str] = []


def build() -> Path:
    """Compile simulated_cuda.cpp against the installed torch. Raises CalledProcessError if that fails."""
    torch_folder, source = Path(torch.__file__).parent, Path(__file__).with_suffix(".cpp")
    command = ["c++", "-std=c++20", "-w", "-fPIC", "-shared", f"-I{torch_folder}/include", str(source)]
    command += [f"-L{torch_folder}/lib", "-ltorch_cpu", "-lc10"]

    def compile_to(library: Path) -> None:
        subprocess.run([*command, "-o", str(library)], check=True, capture_output=True, text=True)

    parts = [source, *command, torch.__version__, compiled.version("c++")]
    return compiled.once("libsimulated_cuda.so", parts, compile_to)


def _wait(what: str) -> None:
    own = [
        f"{Path(frame.filename).relative_to(ROOT)}:{frame.lineno}"
        for frame in traceback.extract_stack()
        if frame.filename.startswith((f"{ROOT}/python", f"{ROOT}/reca_kernels"))
    ]
    waits.append(f"{what} in {' < '.join(own[:-4:-1])}")


@contextlib.contextmanager
def cuda() -> Iterator[None]:
    """Simulate one GPU inside the context."""
    recorded = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(lambda name: _wait(name.decode().removeprefix("aten::")))
    library.on_wait(recorded)

    def nothing(*_args, **_kwargs):
        pass

    stream = torch.Stream(DEVICE)
    parts = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": nothing,
        "_exchange_device": lambda *a: 0,
        "_maybe_exchange_device": lambda *a: 0,
        "get_device_capability": lambda *a: (9, 0),
        "get_device_name": lambda *a: "simulated",
        "get_device_properties": lambda *a: SimpleNamespace(total_memory=2**37, multi_processor_count=132),
        "current_stream": lambda *a: stream,
        "is_current_stream_capturing": lambda: False,
        "synchronize": lambda *a: _wait("synchronize"),
        "set_stream": nothing,
        "_lazy_init": nothing,
    }
    with (
        mock.patch.multiple(torch.cuda, **parts),
        mock.patch.multiple(adamw, pin_memory=nothing, unpin_memory=nothing),
        mock.patch.object(Tensor, "pin_memory", lambda x, *a: x),
    ):
        try:
            yield
        finally:
            library.on_wait(None)


@contextlib.contextmanager
def emulated_kernels() -> Iterator[None]:
    """Run the CUDA C++ kernels by their emulator on the device, and the CPU's on the host."""
    emulator, own, launch = emulated.build(), native.module, native.launch

    class Both:
        def __getattr__(self, name):
            def launcher(*given):
                on_device = given and isinstance(given[-1], native.Launch) and not given[-1].on_host
                return getattr(emulator if on_device else own, name)(*given)

            found = getattr(emulator, name)
            return launcher if callable(found) else found

    def launched(tensor: Tensor) -> native.Launch:
        return native.Launch(0, 0, 0) if tensor.is_cuda else launch(tensor)

    with mock.patch.multiple(native, module=Both(), launch=launched, cuda_runs_on=lambda capability: True):
        yield


def interpret_in_place() -> None:
    """Have Triton's interpreter use the tensors' own memory. In copies, distances between tensors would change."""
    from triton.runtime.interpreter import GridExecutor

    GridExecutor._init_args_hst = lambda self, args, kwargs: (list(args), kwargs)
    GridExecutor._restore_args_dev = lambda self, *args: None


CHANGES = [
    "train.steps=2", "train.compile=false", "log.reconstructions=0", "checkpoint.every=0", "data.workers=0",
    "objective.reca.batch_size=4", "objective.reca.micro_batch=2", "objective.i2t.batch_size=2",
    "optim.offload=true", "ema.half_life=1",
]  # fmt: skip


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Compare two results. Pixels may be one level apart, where rounding differs."""
    if a is None or b is None:
        return False
    rtol, atol = (0, 1) if a.dtype == torch.uint8 else (1e-4, 1e-5)
    return torch.allclose(a.double(), b.double(), rtol=rtol, atol=atol)


def outcome(name: str, backend: str) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """Take two steps, save, generate, reconstruct, edit and answer. Return values, and waits of the host, by phase."""
    found: dict[str, Tensor] = {}
    waited: dict[str, list[str]] = {}

    def record(phase, results):
        waited[phase] = list(waits)
        found.update({f"{phase}: {key}": value.detach().cpu().clone() for key, value in results})
        waits.clear()

    with tempfile.TemporaryDirectory() as folder, dispatch.use(backend):
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
    report, backends, recipes = {}, sys.argv[2].split(","), sys.argv[3:]
    if "triton" in backends:
        interpret_in_place()
    on_host = {name: outcome(name, "reference")[0] for name in recipes}
    for backend in backends:
        with cuda(), emulated_kernels() if backend == "cuda" else contextlib.nullcontext():
            for name, expected in on_host.items():
                found, waited = outcome(name, backend)
                keys = sorted(expected.keys() | found.keys())
                different = [key for key in keys if not same(expected.get(key), found.get(key))]
                report[f"{name} {backend}"] = waited | {"differences": different}
    print(json.dumps(report))
