"""The training loop: batches -> loss -> gradient -> optimizer step, until done, interrupted or failed."""

import contextlib
import copy
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from reca import checkpoint, distributed, exits, micro_batches, monitors, objective, preflight, runs
from reca.config import Recipe, TaskConfig
from reca.data.batch import Batch
from reca.data.loader import Loader, open_loader
from reca.data.sources import open_sources
from reca.folders import ensure_writable
from reca.interruption import Interruption
from reca.jsonl import JsonLines
from reca.log import RunLog
from reca.models import umm_package
from reca.models.base import Adapter
from reca.optim import freeze, gradient_norm, lr_at, make_optimizer, set_lr
from reca.parallelize import parallelize
from reca.precompute import features_identity
from reca.recipe_files import absolute_paths, as_dict, save_recipe
from reca.status import RunFolder

log = logging.getLogger("reca")


class NonFiniteError(RuntimeError):
    """Loss or gradient stayed NaN or infinite."""

    exit_code = exits.NON_FINITE


class NotSavedError(RuntimeError):
    """A run ended, and its last checkpoint could not be written."""

    exit_code = exits.NOT_SAVED


class Trainer:
    """One run of one recipe. An existing run directory is continued from its latest valid checkpoint.

    adapter: a model to train in place of the one `recipe.model` describes (it must come from the same weights when a
    run is continued). progress: called with the number of steps done, in place of a progress bar.

    What is wrong with recipe, data, memory or disk is raised before the weights are read. While the process lives, the
    folder is locked; its status.json holds the state of the run, and how it ended.
    """

    def __init__(self, recipe: Recipe, adapter: Adapter | None = None, progress: Callable[[int], None] | None = None):
        self.recipe, self.run_dir, self.progress = recipe, Path(recipe.run_dir), progress
        if recipe.train.threads:
            torch.set_num_threads(recipe.train.threads)
        self.device = distributed.initialize(recipe.parallel.timeout_minutes)
        self.tasks, self.model_tasks = recipe.active_tasks(), (adapter or umm_package(recipe.umm).Adapter).tasks
        self.accumulation_steps = {
            task: micro_batches.accumulation_steps(self._task(task), distributed.world_size()) for task in self.tasks
        }
        with distributed.fail_together():
            if distributed.rank() == 0:
                ensure_writable(self.run_dir, "run_dir")
                ensure_writable(self.run_dir / "checkpoints", "folder")
        self.folder = RunFolder(self.run_dir, recipe.train.steps)
        self.interruption = Interruption()
        with self.folder, self.interruption.handle_signals(), preflight.memory_errors():
            self._set_up(adapter)

    def _set_up(self, adapter: Adapter | None) -> None:
        recipe = self.recipe
        if distributed.rank() == 0:
            checkpoint.remove_partial(self.run_dir)
        self.folder.record_checkpoint(checkpoint.latest(self.run_dir))
        newest = checkpoint.latest_valid(self.run_dir, rename_damaged=True)
        state = None if newest is None else checkpoint.read_state(newest)
        self.step = 0 if state is None else state["step"]
        self.schedule_end = runs.schedule_end(recipe, state)
        self.folder.record_checkpoint(newest)
        self.sources = self._check(adapter, state)

        # Sharding takes one block at a time to its device, which then never holds the whole model.
        whole = self.device if distributed.world_size() == 1 else torch.device("cpu")
        self.adapter = adapter or umm_package(recipe.umm).Adapter.load(recipe.model, whole)
        if state is None:
            runs.load_parent(self.adapter, recipe)
        else:
            self.adapter.inherited = frozenset(state["inherited"])
        self.roles = freeze(self.adapter, recipe.train.train, recipe.train.frozen)
        parallelize(self.adapter, recipe, self.device)
        self.optimizer = make_optimizer(self.adapter, recipe.optim)
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=recipe.train.precision == "bf16")

        self.skips = 0
        if newest is not None and state is not None:
            checkpoint.load(newest, self.adapter, self.optimizer)
            if distributed.rank() == 0:
                log.info("continuing %s at step %d", self.run_dir, self.step)
                for difference in runs.resume_warnings(recipe, state, distributed.world_size()):
                    log.warning(difference)
        self.loaders = {task: self._loader(task) for task in self.tasks}
        self.fixed = self._fixed_batches()
        self.interruption.deferred = True  # from here on a signal waits for the end of a step, on every rank
        distributed.barrier()

    def _check(self, adapter: Adapter | None, state: dict[str, Any] | None) -> dict[str, Any]:
        """Check everything that needs no weights, on rank 0 first. Returns the sources of samples by task."""
        recipe = self.recipe
        sources: dict[str, Any] = {}
        tasks = [*self.tasks, *(task for task in self._drift_tasks() if task not in self.tasks)]
        with distributed.fail_together():
            if distributed.rank() == 0:
                sources, templates = preflight.check(
                    recipe,
                    tasks,
                    distributed.world_size(),
                    distributed.local_world_size(),
                    adapter,
                    begins=state is None,
                )
                self.fingerprint = runs.fingerprint(recipe, sources, templates, state)
                if state is not None:
                    runs.reject_changed(recipe, self.run_dir, state, self.fingerprint)
        with distributed.fail_together():
            if distributed.rank() > 0:
                sources = open_sources(recipe.data, tasks, recipe.train.seed)
        return sources

    def run(self) -> Path:
        """Train to `train.steps`.

        Raises SystemExit(75) after saving on SIGTERM, SIGUSR1, SIGHUP or Ctrl-C; NotSavedError when the last checkpoint
        of the run could not be written; NonFiniteError on NaN.
        """
        with self.folder, self.interruption.handle_signals(), preflight.memory_errors():
            self._run()
            distributed.barrier()
            self.folder.write_status("finished", exits.DONE)
            self.folder.close()
        return self.run_dir

    def _run(self) -> None:
        recipe, main_process = self.recipe, distributed.rank() == 0
        if main_process:
            save_recipe(absolute_paths(recipe), self.run_dir / "recipe.yaml")
        record = RunLog(
            self.run_dir, recipe.train.steps, self.step, recipe.log.tensorboard, main_process, bar=self.progress is None
        )
        monitor = monitors.Monitor()
        for text in monitors.config_warnings(recipe, self.adapter, self.roles):
            record.warn(self.step, text)
        if warning := micro_batches.size_warning(recipe.objective, self.tasks, distributed.world_size()):
            record.warn(self.step, warning)
        streams = {task: iter(loader) for task, loader in self.loaders.items()}
        profiler = self._profiler()
        try:
            with profiler:
                while self.step < recipe.train.steps:
                    started = time.perf_counter()
                    batches = {
                        task: [next(streams[task]).to(self.device) for _ in range(self.accumulation_steps[task])]
                        for task in self.tasks
                    }
                    data_wait = time.perf_counter() - started
                    metrics = self.train_step(batches)
                    images = sum(self._task(task).batch_size for task in self.tasks)
                    metrics |= {"images_per_s": images / (time.perf_counter() - started), "data_wait_s": data_wait}
                    self._probe(metrics, batches)
                    for warning in monitor.check(self.step, metrics, self.tasks):
                        record.warn(self.step, warning)
                    record.progress(metrics["loss"], metrics["images_per_s"])
                    if self.progress:
                        self.progress(self.step)
                    last = self.step == recipe.train.steps
                    if _due(self.step, recipe.log.every) or last:
                        metrics |= {f"{t}/loader_images_per_s": self.loaders[t].images_per_s() for t in self.tasks}
                        record.record(self.step, metrics)
                    if recipe.log.prompts and _due(self.step, recipe.log.sample_every):
                        record.sample_images(self.step, self._samples())
                    if profiler is not _NO_PROFILER:
                        profiler.step()
                    stop = distributed.any_rank(self.interruption.requested, self.device)
                    if stop or last:
                        self._save_last()
                    elif _due(self.step, recipe.checkpoint.every):
                        self.save()
                    if stop and not last:
                        if main_process:
                            log.warning("interrupted at step %d; the same command continues the run", self.step)
                        raise SystemExit(exits.INTERRUPTED)
        finally:
            for loader in self.loaders.values():
                loader.close()
            record.close()

    def train_step(self, batches: dict[str, list[Batch]]) -> dict[str, float]:
        """Make one optimizer step from this rank's micro-batches, by task. Skips and counts it if it is not finite.

        Returns the step's metrics by name, as log.jsonl has them.
        Raises NonFiniteError after train.max_skips such steps in a row.
        """
        self.adapter.train()
        sums = objective.backward(self.adapter, batches, self.recipe.objective, self.recipe.train.seed, self.autocast)
        norm = gradient_norm(self.adapter, self.recipe.optim.max_grad_norm)
        lr = lr_at(self.step, self.schedule_end, self.recipe.optim)
        if math.isfinite(norm):
            set_lr(self.optimizer, lr)
            self.optimizer.step()
            self.skips = 0
        self.optimizer.zero_grad(set_to_none=True)

        metrics = _means({name: distributed.sum_over_ranks(value) for name, value in sums.items()}, self.tasks)
        metrics["loss"] = sum(self._task(task).weight * metrics[f"{task}/loss"] for task in self.tasks)
        if not math.isfinite(norm):
            self._skip(batches, metrics)
        self.step += 1
        metrics |= {"grad_norm": norm, "lr": lr}
        metrics |= {f"{task}/bad_samples": float(loader.bad) for task, loader in self.loaders.items()}
        return metrics

    def save(self) -> Path | None:
        """Write a checkpoint and return its folder; None, with an error in the log, if the disk cannot take it."""
        state = {
            "step": self.step,
            "samples": {task: self._position(task) for task in self.tasks},
            "schedule_end": self.schedule_end,
            "ranks": distributed.world_size(),
            "inherited": sorted(self.adapter.inherited),
            "recipe": as_dict(self.recipe),
            "fingerprint": self.fingerprint if distributed.rank() == 0 else None,
        }
        saved = checkpoint.save(self.run_dir, state, self.adapter, self.optimizer, self.recipe.checkpoint.keep)
        if saved is not None:
            self.folder.record_checkpoint(saved)
        return saved

    def _save_last(self) -> None:
        if self.save() is None:
            kept = self.folder.status
            there = f"the newest is of step {kept.step}" if kept.checkpoint else "there is none before it"
            raise NotSavedError(
                f"step {self.step} is done, but its checkpoint could NOT be written to {self.run_dir}; {there}. "
                "Free space there: the same command makes the steps since then again"
            )

    def _task(self, task: str) -> TaskConfig:
        return getattr(self.recipe.objective, task)

    def _position(self, task: str) -> int:
        return self.step * self._task(task).batch_size

    def _loader(self, task: str) -> Loader:
        return open_loader(
            self.recipe.data,
            task,
            self.adapter.views(task),
            source=self.sources[task],
            seed=self.recipe.train.seed,
            micro_batch=self._task(task).micro_batch,
            batch_size=self._task(task).batch_size,
            neighbours=task == "reca" and self.recipe.objective.condition == "other",
            start=self._position(task),
            rank=distributed.rank(),
            world=distributed.world_size(),
            bad_samples=self.run_dir / f"bad_{task}.jsonl",
            prepare=self.adapter.prepare,
            identity=features_identity(self.recipe),
        )

    def _skip(self, batches: dict[str, list[Batch]], metrics: dict[str, float]) -> None:
        self.skips += 1
        dump = {
            "step": self.step,
            "losses": {task: str(metrics[f"{task}/loss"]) for task in self.tasks},
            "sample_ids": {
                task: [i for batch in list_ if batch.counted for i in batch.sample_ids.tolist()]
                for task, list_ in batches.items()
            },
        }
        lines = JsonLines(self.run_dir / f"non_finite_{distributed.rank()}.jsonl")
        lines.write(dump)
        lines.close()
        log.warning("step %d skipped: loss or gradient is not finite (%s)", self.step, dump["losses"])
        if self.skips > self.recipe.train.max_skips:
            raise NonFiniteError(
                f"{self.skips} steps in a row were not finite; the parameters are those of the last good step. "
                f"The samples are in {self.run_dir}/non_finite_*.jsonl. Lower optim.lr, or use train.precision=fp32"
            )

    def _probe(self, metrics: dict[str, float], batches: dict[str, list[Batch]]) -> None:
        every, seed = self.recipe.log, self.recipe.train.seed
        if "reca" in batches and _due(self.step, every.gap_every):
            probe = batches["reca"][0]
            if len(probe) == 1 and probe.neighbour is None:
                after = self.loaders["reca"].sample(int(probe.sample_ids[0]) + 1)
                probe = copy.copy(probe)
                probe.neighbour = after.to(self.device)
            own, other = (objective.evaluate(self.adapter, [probe], seed, self.autocast, c) for c in ("own", "other"))
            metrics["reca/gap"] = other - own
        if _due(self.step, every.drift_every) or (every.drift_every and self.step == 1):
            for task, batch in self.fixed.items():
                metrics[f"{task}/drift"] = objective.evaluate(self.adapter, [batch], seed, self.autocast)

    def _drift_tasks(self) -> list[str]:
        """List the tasks whose loss on fixed samples measures drift."""
        data = self.recipe.data
        there = {"i2t": data.conversations, "t2i": data.captions}
        return [task for task in there if there[task] and task in self.model_tasks and self.recipe.log.drift_every]

    def _fixed_batches(self) -> dict[str, Batch]:
        fixed = {}
        for task in self._drift_tasks():
            views, seed = self.adapter.views(task), self.recipe.train.seed
            source = self.sources[task]
            loader = open_loader(
                self.recipe.data, task, views, seed=seed, micro_batch=8, source=source, prepare=self.adapter.prepare
            )
            fixed[task] = next(iter(loader)).to(self.device)
            loader.close()
        return fixed

    def _samples(self) -> list[torch.Tensor]:
        self.adapter.eval()
        prompts = self.recipe.log.prompts
        with self.autocast:
            return self.adapter.generate(prompts, list(range(len(prompts))))

    def _profiler(self):
        """Record those of the steps of log.profile that are still to be made. The first of a run is step 1."""
        first, last = map(int, (self.recipe.log.profile or "0:0").split(":"))
        if last <= self.step:
            return _NO_PROFILER
        wait = max(0, first - 1 - self.step)
        return torch.profiler.profile(
            schedule=torch.profiler.schedule(
                wait=max(0, wait - 1), warmup=min(1, wait), active=last - self.step - wait, repeat=1
            ),
            on_trace_ready=lambda p: p.export_chrome_trace(str(self.run_dir / f"trace_rank{distributed.rank()}.json")),
        )


_NO_PROFILER = contextlib.nullcontext()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _means(sums: dict[str, torch.Tensor], tasks: list[str]) -> dict[str, float]:
    names = list(sums)
    table = torch.stack([sums[name].float() for name in names]).tolist()  # one transfer for all of them
    metrics: dict[str, float] = {}
    for name, (total, weight) in zip(names, table, strict=True):
        mean = total / weight if weight else 0.0
        if name in tasks:
            metrics |= {f"{name}/loss": mean, f"{name}/weight": weight}
        else:
            metrics[name] = mean
    return metrics
