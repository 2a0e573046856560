"""Two gloo ranks of which one fails: launch_failing.py FOLDER; what came of every case is printed as JSON.

The ranks are forks of this process, so that everything is imported once.
"""

import json
import logging
import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.distributed.tensor import DTensor

from reca import checkpoint, distributed, exits, precompute, preflight
from reca import trainer as driver
from reca.checkpoint import listing, reading, writing
from reca.config.recipe_files import load_recipe
from reca.data.loader import Loader
from reca.models import umm_package
from reca.models.common import deferred_weights
from reca.monitoring.log import RunLog
from reca.monitoring.reporting import RunReport
from reca.processes import hang
from reca.runs import folder, lineage
from reca.runs.folder import RunFolder
from reca.runs.status import Status
from reca.trainer import Trainer
from reca.training import lora, parallelize
from tests.driver.forks import exit_codes, fork_ranks
from tests.driver.toy import ToyAdapter, write_images, write_recipe

FOLDER = Path(sys.argv[1])
FULL = OSError(28, "No space left on device")


def trainer(name: str, *overrides: str) -> Trainer:
    keys = [
        f"run_dir={FOLDER / name}",
        "train.steps=4",
        "checkpoint.every=2",
        "parallel.timeout_minutes=1",
        *overrides,
    ]
    return Trainer(load_recipe(FOLDER / "toy.yaml", keys), ToyAdapter(), progress=lambda step: None)


def failing(function, when, rank: int = 1) -> object:
    """The function, which raises on one rank where `when(its arguments)` holds."""

    def wrapped(*args, **options):
        if distributed.rank() == rank and when(*args):
            raise FULL
        return function(*args, **options)

    return wrapped


def full_once(name: str) -> None:
    """Rank 1 cannot write its share of the first checkpoint."""
    job = trainer(name)
    writing._checksums = failing(writing._checksums, lambda partial: partial.name.startswith("000002"))
    job.run()


def full_at_the_end(name: str) -> None:
    job = trainer(name)
    writer = writing.HuggingFaceStorageWriter
    writer.write_data = failing(writer.write_data, lambda own, *_: "000004" in str(own.path))
    job.run()


def beside(name: str) -> None:
    """Steps go on on both ranks while rank 1 cannot write; then the checkpoint is of the step it names."""
    job, steps_on = trainer(name), threading.Event()

    def waiting(*args):
        assert steps_on.wait(60)
        return checksums(*args)

    def progress(step: int) -> None:
        if step == 2:
            saved.update({n: to_local(p).clone() for n, p in job.adapter.named_parameters()})
        if step == 4:
            assert not checkpoint.list_complete(FOLDER / name)
            steps_on.set()

    checksums, saved = writing._checksums, {}
    if distributed.rank() == 1:
        writing._checksums = waiting
    job.progress = progress
    job.run()
    distributed.barrier()
    checkpoint.load(FOLDER / name / "checkpoints/000002", job.adapter)
    assert all(torch.equal(to_local(p), saved[n]) for n, p in job.adapter.named_parameters())


def to_local(parameter: torch.Tensor) -> torch.Tensor:
    """Return this rank's part; frozen parameters are whole where ranks hold replicas."""
    parameter = parameter.detach()
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def full_beside(name: str) -> None:
    """Rank 1 cannot write the first checkpoint, which is noticed when training is two steps on."""
    job, steps_on = trainer(name), threading.Event()

    def full(partial):
        assert steps_on.wait(60)
        return partial.name.startswith("000002")

    writing._checksums = failing(writing._checksums, full)
    job.progress = lambda step: steps_on.set() if step == 4 else None
    job.run()


def killed_beside(name: str) -> None:
    """Both ranks are killed while they write the second checkpoint."""

    def killed(partial, *_):
        if partial.name.startswith("000004"):
            os.kill(os.getpid(), signal.SIGKILL)
        return checksums(partial)

    checksums, writing._checksums = writing._checksums, killed
    trainer(name, "train.steps=6").run()


def killed_at_the_end(name: str) -> None:
    """Rank 1 alone is killed while both write the last checkpoint."""

    def killed(partial, *_):
        if distributed.rank() == 1 and partial.name.startswith("000004"):
            os.kill(os.getpid(), signal.SIGKILL)
        return checksums(partial)

    checksums, writing._checksums = writing._checksums, killed
    trainer(name).run()


def without(holder, attribute: str, rank: int = 1):
    """Return the case in which one rank fails in a function that no other rank waits for."""

    def case(name: str) -> None:
        setattr(holder, attribute, failing(getattr(holder, attribute), lambda *_: True, rank))
        trainer(name, "ema.half_life=2").run()

    case.__name__ = f"no_{holder.__name__.rpartition('.')[2]}.{attribute}"
    return case


# In the order of a run. Rank 0 alone writes files.
WITHOUT = (
    without(RunFolder, "reject_lost_checkpoints", rank=0),
    without(hang, "clean", rank=0),
    without(listing, "list_complete"),
    without(preflight, "check", rank=0),
    without(preflight, "open_run_sources"),
    without(driver, "choose_trained"),
    without(parallelize, "checkpoint_activations"),
    without(parallelize, "fully_shard"),
    without(driver, "make_optimizer"),
    without(RunFolder, "accept", rank=0),
    without(driver, "SkippedSteps"),
    without(driver, "EMA"),
    without(driver, "open_loader"),
    without(driver, "Diagnostics"),
    without(driver, "save_recipe", rank=0),
    without(driver, "RunLog"),
    without(RunReport, "begin", rank=0),
    without(driver, "profiler_of"),
    without(Loader, "close"),
    without(RunLog, "close", rank=0),
)


def uncached(holder, attribute: str, rank: int = 1):
    """Return the case in which one rank of `reca cache` fails in a function that no other rank waits for."""

    def case(name: str) -> None:
        setattr(holder, attribute, failing(getattr(holder, attribute), lambda *_: True, rank))
        keys = [f"data.images={FOLDER / 'images'}", f"data.cache={FOLDER / name}", "objective.i2t.weight=0"]
        precompute.cache_features(load_recipe("show_o_tiny", keys))

    case.__name__ = f"uncached_{holder.__name__.rpartition('.')[2]}.{attribute}"
    return case


UNCACHED = (
    uncached(umm_package("show_o").Adapter, "load"),
    uncached(deferred_weights.DeferredWeights, "read_only"),
    uncached(precompute, "check_parent"),
    uncached(precompute, "features_identity"),
    uncached(precompute, "open_loader"),
    uncached(precompute, "fill"),
    uncached(Loader, "close"),
)


def out_of_memory(name: str) -> None:
    """The model does not fit into the memory that rank 1 finds."""
    deferred_weights._give_memory = failing(deferred_weights._give_memory, lambda *_: True)
    keys = [f"run_dir={FOLDER / name}", "parallel.strategy=fsdp", "parallel.timeout_minutes=1"]
    Trainer(load_recipe("show_o_tiny", keys))


def out_of_memory_for_random_weights(name: str) -> None:
    """Rank 1 has no memory to receive a random parameter in."""
    empty = torch.empty
    deferred_weights.torch = SimpleNamespace(**{**vars(torch), "empty": failing(empty, lambda *_: True)})
    keys = [f"run_dir={FOLDER / name}", "parallel.strategy=fsdp", "parallel.timeout_minutes=1"]
    Trainer(load_recipe("show_o_tiny", keys))


def no_stacks(name: str) -> None:
    """The file to which rank 1 would write its stacks is a folder."""
    (FOLDER / name / "hang/rank_1.txt").mkdir(parents=True, exist_ok=True)
    trainer(name).run()


def no_state(name: str) -> None:
    """A run is resumed, and rank 1 cannot read the counters of its checkpoint."""
    trainer(name).run()
    distributed.barrier()
    checkpoint.read_state = failing(checkpoint.read_state, lambda *_: True)
    trainer(name, "train.steps=6").run()


def no_recipe_of_the_parent(name: str) -> None:
    """Rank 1 cannot read the recipe of the run in train.init_from."""
    lineage.load_recipe = failing(lineage.load_recipe, lambda *_: True)
    trainer(name, f"train.init_from={FOLDER / 'bare'}")


def rows_of_zeros(name: str) -> None:
    """Rank 1 alone holds rows of zeros, by whose norms DoRA would divide."""
    whole = driver.parallelize

    def emptied(adapter, *given):
        whole(adapter, *given)
        if distributed.rank() == 1:
            to_local(next(iter(lora.layers(adapter).values())).get_base_layer().weight).zero_()

    driver.parallelize = emptied
    keys = [f"run_dir={FOLDER / name}", "lora.rank=2", "lora.dora=true", "parallel.strategy=fsdp"]
    Trainer(load_recipe("show_o_tiny", [*keys, "parallel.timeout_minutes=1"]))


def damaged(name: str) -> None:
    """The newest checkpoint has another bit; a share of the files is checked by each rank."""
    trainer(name).run()
    path = next((FOLDER / name / "checkpoints/000004/optimizer").glob("shard-00002*"))
    distributed.barrier()
    if distributed.rank() == 0:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    distributed.barrier()
    job = trainer(name)
    assert job.step == 2, job.step
    job.run()


def going_on(name: str, on_rank_1) -> None:
    """A run is continued, in whose way comes what rank 1 does in place of reading its share of the checkpoint."""
    trainer(name).run()
    distributed.barrier()
    if distributed.rank() == 1:
        reading.HuggingFaceStorageReader.read_data = on_rank_1
    trainer(name, "train.steps=6").run()


def killed_reading(name: str) -> None:
    going_on(name, lambda *_: os.kill(os.getpid(), signal.SIGKILL))


def interrupted_reading(name: str) -> None:
    going_on(name, lambda *_: os.kill(os.getpid(), signal.SIGTERM))


def one_cannot_read(name: str) -> None:
    """The disk gives an error, and the checkpoint is sound."""
    going_on(name, raising(OSError(5, "Input/output error")))


def gone_while_read(name: str) -> None:
    """A file goes after its checksum was compared."""

    def removed(own, *_):
        (Path(own.path).parent / "state.json").unlink()
        raise FileNotFoundError("No such file or directory")

    going_on(name, removed)


def raising(error: Exception):
    def raise_it(*_):
        raise error

    return raise_it


def interrupted(name: str) -> None:
    """A signal to rank 1 alone."""
    job, step = trainer(name), Trainer.train_step

    def signalled(batches):
        if distributed.rank() == 1 and job.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(job, batches)

    job.train_step = signalled
    job.run()


def one_breaks(name: str) -> None:
    job, step = trainer(name), Trainer.train_step

    def broken(batches):
        if distributed.rank() == 1 and job.step == 3:
            raise FULL
        return step(job, batches)

    job.train_step = broken
    job.run()


def moved(name: str) -> None:
    """The run folder is moved in the third step, which rank 0 alone looks for."""
    job = trainer(name)

    def progress(step: int) -> None:
        if step == 3 and distributed.rank() == 0:
            job.run_dir.rename(FOLDER / "elsewhere")

    job.progress = progress
    job.run()


def another_recipe(name: str) -> None:
    """One machine was started with another command. Else its copy of the weights would become another one."""
    trainer(name, f"optim.lr={0.1 * (1 + int(os.environ['RANK']))}", f"data.images={FOLDER / 'images'}/").run()


def other_samples(name: str) -> None:
    """The file server does not show the second machine the last image yet."""
    earlier = FOLDER / f"earlier_{os.environ['RANK']}"
    shutil.copytree(FOLDER / "images", earlier)
    if os.environ["RANK"] == "1":
        max(earlier.glob("*.png")).unlink()
    trainer(name, f"data.images={earlier}").run()


def another_folder(name: str) -> None:
    """run_dir is on a disk of each machine, where the second has had a run of its own."""
    (FOLDER / name).mkdir(exist_ok=True)
    folder.SEEN_AFTER = 0.0
    trainer(name if os.environ["RANK"] == "0" else "beside").run()


def no_folder(name: str) -> None:
    """The same, where it has had none."""
    (FOLDER / name).mkdir(exist_ok=True)
    folder.SEEN_AFTER = 0.0
    trainer(name if os.environ["RANK"] == "0" else "nowhere").run()


def full_in_evaluation(name: str, *overrides: str) -> None:
    """Rank 1 is out of memory within a block, while both evaluate."""
    images = FOLDER / "images"
    job = trainer(name, "eval.every=1", "eval.holdout=4", f"eval.holdout_from={images}", *overrides)
    block = job.adapter.layers[1]

    def full(*_):
        if distributed.rank() == 1 and not job.adapter.training and job.step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    block.register_forward_pre_hook(full)
    job.run()
    distributed.barrier()
    mine = {n: to_local(p).clone() for n, p in job.adapter.named_parameters()}
    checkpoint.load(FOLDER / "bare/checkpoints/000004", job.adapter)
    assert all(torch.equal(to_local(p), mine[n]) for n, p in job.adapter.named_parameters())


def full_in_evaluation_of_shards(name: str) -> None:
    full_in_evaluation(name, "parallel.strategy=fsdp")


def bare(name: str) -> None:
    """A launcher that says nothing of machines, as srun with RANK and WORLD_SIZE exported; here of two machines."""
    del os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"]
    distributed.socket.gethostname = lambda: f"node{os.environ['RANK']}"
    trainer(name).run()
    assert distributed.local_world_size() == 1


CASES = (
    bare,
    beside,
    full_beside,
    killed_beside,
    full_once,
    full_at_the_end,
    killed_at_the_end,
    *WITHOUT,
    *UNCACHED,
    out_of_memory,
    out_of_memory_for_random_weights,
    no_stacks,
    no_state,
    no_recipe_of_the_parent,
    rows_of_zeros,
    damaged,
    interrupted,
    killed_reading,
    interrupted_reading,
    one_cannot_read,
    gone_while_read,
    one_breaks,
    moved,
    another_recipe,
    other_samples,
    another_folder,
    no_folder,
    full_in_evaluation,
    full_in_evaluation_of_shards,
)


def run(case) -> list[int]:
    """Exit codes of both ranks."""

    def outcome(rank: int) -> int:
        try:
            case(case.__name__)
        except BaseException as error:
            print(f"{case.__name__}, rank {rank}: {error!r}", file=sys.stderr)
            return exits.code_of(error)
        return 0

    return exit_codes(fork_ranks(2, outcome))


if __name__ == "__main__":
    torch.set_num_threads(1)
    umm_package("show_o")
    logging.basicConfig(stream=sys.stderr)
    write_recipe(FOLDER, write_images(FOLDER / "images"))
    found = {}
    for case in CASES:
        codes = run(case)
        try:
            status = Status.read(FOLDER / case.__name__)
        except ValueError:
            status = Status("none")
        complete = [path.name for path in checkpoint.list_complete(FOLDER / case.__name__)]
        found[case.__name__] = [codes, status.state, status.exit_code, status.reason, complete]
    print(json.dumps(found))
