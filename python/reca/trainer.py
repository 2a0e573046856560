"""The training loop: batches -> loss -> gradient -> optimizer step, until the run finishes, stops or fails."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from reca import checkpoint, distributed, exits, inference, objective, preflight
from reca.config.recipe import Recipe, TaskConfig
from reca.config.recipe_files import absolute_paths, save_recipe
from reca.data.batch import Batch
from reca.data.loader import Loader, open_loader
from reca.errors import CollapseError, NotSavedError
from reca.estimate import fit_run, out_of_memory
from reca.hardware.host_memory import FreedMemory
from reca.io.folders import CHECKPOINTS, RUN, ensure_writable
from reca.models import umm_package
from reca.models.base import Adapter
from reca.monitoring.diagnostics import Diagnostics, drift_tasks
from reca.monitoring.evaluations import Evaluations
from reca.monitoring.log import RunLog, due
from reca.monitoring.monitors import Monitor
from reca.monitoring.profiling import profiler_of
from reca.monitoring.reporting import RunReport
from reca.optim import FusedBackward, gradient_norm, lr_at, make_optimizer, set_lr
from reca.precision import autocast, cast, outside_of_autocast, training_kernels, usual_defaults
from reca.precompute import features_identity
from reca.processes import hang
from reca.processes.interruption import Interruption
from reca.runs import lineage
from reca.runs.folder import RunFolder
from reca.training import compiled_blocks, half_weights, lora
from reca.training.determinism import deterministic
from reca.training.ema import EMA
from reca.training.finite_weights import check_finite
from reca.training.lora import choose_trained
from reca.training.parallelize import load, parallelize
from reca.training.skipped_steps import SkippedSteps

log = logging.getLogger("reca")


class Trainer:
    """A training run of a recipe, resumed from the latest valid checkpoint in its run folder, if any.

    adapter: a model to train instead of the recipe's. To resume a run, it must have the same initial weights.
    progress: called with the number of completed steps, instead of console output.

    Errors in the recipe, data, memory or disk are raised before weights are loaded. The run folder is locked until the
    run or the process ends; its status.json has the state of the run and the reason of a failure.
    """

    def __init__(self, recipe: Recipe, adapter: Adapter | None = None, progress: Callable[[int], None] | None = None):
        self.recipe, self.run_dir, self.progress = recipe, Path(recipe.run_dir), progress
        if recipe.train.threads:
            torch.set_num_threads(recipe.train.threads)
        hang.record_collectives(self.run_dir)
        self.device = distributed.initialize(recipe.parallel.timeout_minutes)
        self.freed = FreedMemory()
        if self.device.type == "cpu":
            self.freed.keep()
        self.tasks, self.model_tasks = recipe.active_tasks(), (adapter or umm_package(recipe.umm).Adapter).tasks
        with distributed.fail_together():
            if distributed.rank() == 0:
                ensure_writable(self.run_dir, "run_dir", RUN)
                ensure_writable(self.run_dir / "checkpoints", "folder", CHECKPOINTS)
        self.folder = RunFolder(self.run_dir, recipe.train.steps)
        self.keep = checkpoint.Keep(recipe.checkpoint.keep, recipe.checkpoint.keep_every)
        self.writer = checkpoint.BackgroundWriter(self.run_dir, self.keep, self.folder.is_lost)
        self.interruption = Interruption()
        with self.around():
            self._set_up(adapter)

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        """Enter the contexts that apply to each phase of the run, and record in the status how it ends."""
        with (
            torch.inference_mode(False),  # a notebook may have disabled gradients
            torch.enable_grad(),
            usual_defaults(),
            outside_of_autocast(),
            self.folder,
            self.interruption.handle_signals(),
            out_of_memory.explained(lambda: self.recipe),
            compiled_blocks.disk_errors(),
            deterministic(self.recipe.train.deterministic),
            training_kernels(self.recipe.train.precision, self.device),
        ):
            yield

    def _set_up(self, adapter: Adapter | None) -> None:
        lineage.reject_other_ranks(self.recipe)
        with distributed.fail_together():
            if distributed.rank() == 0:
                self.folder.reject_lost_checkpoints()
                checkpoint.remove_partial(self.run_dir)
                hang.clean(self.run_dir)
            self.folder.record_checkpoint(checkpoint.latest(self.run_dir))
            out_of_memory.record_history(self.recipe)
        self.recipe = recipe = fit_run.fit_on_ranks(self.recipe, adapter is None, self.folder.write_accepted)
        newest = checkpoint.latest_valid(self.run_dir)
        with distributed.fail_together():
            state = None if newest is None else checkpoint.read_state(newest, of_run=True)
        self.step = self.saved = 0 if state is None else state["step"]
        self.schedule_end = lineage.schedule_end(recipe, state)
        self.folder.record_checkpoint(newest)
        drift = [task for task in drift_tasks(recipe, self.model_tasks) if task not in self.tasks]
        self.sources, self.fingerprint = preflight.check_on_ranks(recipe, [*self.tasks, *drift], adapter, state)

        self.own_model = adapter is None
        with distributed.fail_together():  # a node may lack a file, and rank 0 alone may have values
            self.adapter, deferred = (adapter, False) if adapter is not None else load(recipe, self.device)
            cast(self.adapter, recipe.train.precision)
            self.roles = choose_trained(self.adapter, recipe)
        parallelize(self.adapter, recipe, self.device, deferred)
        if deferred and recipe.lora.rank:
            with distributed.fail_together():  # each rank checks its own rows
                lora.reset(self.adapter, recipe.train.seed)
        if state is None:
            parent = lineage.load_parent(self.adapter, recipe)
            self.fingerprint |= {"train.init_from": parent} if parent else {}
        else:
            parent = state["fingerprint"].get("train.init_from")
            self.adapter.inherited = frozenset(state["inherited"])
        with distributed.fail_together():
            check_finite(self.adapter)
            self.optimizer = make_optimizer(self.adapter, recipe.optim, recipe.train.seed)
            self.fused_backward = FusedBackward(self.optimizer) if recipe.optim.fused_backward else None
            self.autocast = autocast(recipe.train.precision, self.device)
            self.skipped, self.monitor = SkippedSteps(self.run_dir, recipe.train), Monitor()

        with distributed.fail_together():  # no rank may write a final status before rank 0 has accepted the start
            self.folder.accept()
        if newest is not None:
            checkpoint.load(newest, self.adapter, self.optimizer)
        with distributed.fail_together():
            if state is not None:
                self.skipped.load_state(state["skipped"])
                self.monitor.load_state(state["monitor"])
            if state is not None and distributed.rank() == 0:
                log.info("resuming %s from step %d", self.run_dir, self.step)
                for difference in lineage.resume_warnings(recipe, state, distributed.world_size()):
                    log.warning(difference)
            self.ema = EMA(self.adapter, recipe.ema.half_life) if recipe.ema.half_life else None
        if self.ema and newest is not None and state is not None and self.ema.continues(state):
            checkpoint.load_ema(newest, self.ema.averages)
            self.ema.updates = state["ema"]["updates"]
        with distributed.fail_together():  # all read files
            self.features = features_identity(recipe, self.adapter, parent) if recipe.data.cache else None
            self.loaders = {task: self._loader(task) for task in self.tasks}
            self.diagnostics = Diagnostics(recipe, self.adapter, self.sources, self.loaders, self.device, self.autocast)
        self.evaluations = Evaluations(recipe, self.adapter, self.sources, self.device, self.autocast)
        self.evaluations.resume(self.run_dir, self.step)
        self.alarms: list[str] = []  # alarms that stop the run
        with distributed.fail_together():
            if distributed.rank() == 0:
                checkpoint.rename_damaged(self.run_dir, newest)
        self.interruption.deferred = True  # from here on, signals are handled at the end of a step, on all ranks alike
        distributed.barrier()

    def run(self) -> Path:
        """Train up to `train.steps` and return the run folder.

        Raises SystemExit(75) after saving on SIGTERM, SIGUSR1, SIGHUP or Ctrl-C; NotSavedError if the last checkpoint
        cannot be written; NonFiniteError after more than train.max_skips non-finite steps in a row; CollapseError on an
        alarm with eval.stop_on_alarm.
        """
        with self.around():
            with hang.HangWatch(self.run_dir, min(self.recipe.log.hang_seconds, 30 * self._step_timeout)) as watch:
                try:
                    self._run(watch)
                finally:
                    watch.enter(self.step, "saving")
                    self._record(self.writer.wait())
                watch.enter(self.step, "waiting for all ranks")
                distributed.barrier()
            self.folder.write_status("finished", exits.DONE)
            self.folder.close()
        return self.run_dir

    @property
    def _step_timeout(self) -> int:
        """Return the timeout of a step's collectives in minutes."""
        return min(self.recipe.parallel.timeout_minutes, self.recipe.parallel.step_timeout_minutes)

    def _run(self, watch: hang.HangWatch) -> None:
        recipe, streams = self.recipe, {task: loader.steps() for task, loader in self.loaders.items()}
        with contextlib.ExitStack() as running:
            with distributed.fail_together():
                if distributed.rank() == 0:
                    save_recipe(absolute_paths(recipe), self.run_dir / "recipe.yaml")
                record = RunLog(recipe, self.run_dir, self.step, shown=self.progress is None)
                given = recipe, self.adapter, self.roles, self.loaders, self.device, record, self.progress
                report = running.enter_context(RunReport(*given, self.own_model, self.monitor))
                for loader in self.loaders.values():
                    running.callback(loader.close)  # which writes the rest of the feature cache
                running.callback(lambda: watch.enter(self.step, "closing of loaders"))
                report.begin(self.step)
            watch.enter(self.step, "drawing reconstructions")
            report.before_training(self.step, self.diagnostics)
            if not self.evaluations.begun:
                self._evaluate(report, watch)
            first = self.step
            with distributed.fail_together():
                if profiler := profiler_of(recipe.log.profile, self.step, recipe.train.steps, self.run_dir):
                    running.enter_context(profiler)
            while self.step < recipe.train.steps:
                watch.enter(self.step + 1, "loading of batches")
                started = time.perf_counter()
                batches = self.next_batches(streams)
                data_wait = time.perf_counter() - started
                watch.enter(self.step + 1, "training")
                report.count_flops(batches)
                started = time.perf_counter()
                metrics = self.train_step(batches)
                self.freed.after_step(self.step)
                seconds = data_wait + time.perf_counter() - started
                if self.step == first + 1:
                    distributed.set_timeout(self._step_timeout, self.device)
                watch.enter(self.step, "measuring and sampling")
                metrics |= self.diagnostics.measure(self.step, batches)
                report.step(self.step, metrics, seconds, data_wait)
                report.sample(self.step, self.diagnostics)
                self._evaluate(report, watch)
                if profiler:
                    profiler.step()
                watch.enter(self.step, "saving")
                self._save_or_stop()
            watch.enter(self.step, "drawing reconstructions")
            report.after_training(self.step, self.diagnostics)
            with distributed.fail_together():
                running.close()

    def _evaluate(self, report: RunReport, watch: hang.HangWatch) -> None:
        """Evaluate the model if an evaluation is due."""
        if not self.evaluations.due(self.step):
            return
        if inference.shares_weights(self.adapter) and self._checkpoint_due():
            watch.enter(self.step, "saving")  # first, because running out of memory ends a run with sharded weights
            self.saved = self.step if self.save() else self.saved
        watch.enter(self.step, "evaluating")
        found = self.evaluations.run(self.step)
        report.evaluation(self.step, found)
        self.folder.record_alarms(found.active)
        self.alarms = found.active if self.recipe.eval.stop_on_alarm else []

    def _save_or_stop(self) -> None:
        """Write a checkpoint if one is due.

        Raises SystemExit(75) after a signal and CollapseError after an alarm, both after saving; OSError as `save`.
        """
        self._record(self.writer.collect())
        last = self.step == self.recipe.train.steps
        asked, gone = self.interruption.requested, distributed.rank() == 0 and self.folder.is_lost()
        stop, lost = map(bool, distributed.max_over_ranks([int(asked), int(gone)]))
        if lost:
            self.folder.reject_lost()
        if self._checkpoint_due(ends=stop or bool(self.alarms)):
            if last or stop or self.alarms:
                self._save_last()
            else:
                self.save(self.recipe.checkpoint.async_save)
        if stop and not last:
            if distributed.rank() == 0:
                again = "" if self.progress else "; the same command continues the run"  # the demo starts over
                log.warning("interrupted at step %d%s", self.step, again)
            raise SystemExit(exits.INTERRUPTED)
        if self.alarms and not last:
            more = f" See {self.run_dir}/status.json for {len(self.alarms) - 1} more." if len(self.alarms) > 1 else ""
            raise CollapseError(
                f"stopped at step {self.step} by an alarm: {self.alarms[0]}.{more} The step is saved; "
                "eval.stop_on_alarm=false continues from there"
            )

    def _checkpoint_due(self, ends: bool = False) -> bool:
        """Tell whether a checkpoint of this step is due and not yet written. ends: the run ends at this step."""
        ends = ends or self.step == self.recipe.train.steps
        return self.saved != self.step and (ends or due(self.step, self.recipe.checkpoint.every))

    def next_batches(self, streams: Mapping[str, Iterator[list[Batch]]]) -> dict[str, list[Batch]]:
        """Take the micro-batches of a step from every task's stream: the same number on all ranks, for FSDP2."""
        batches = {task: [batch.to(self.device) for batch in next(streams[task])] for task in self.tasks}
        if any(self._task(task).max_tokens is not None for task in self.tasks):
            counts = distributed.max_over_ranks([len(batches[task]) for task in self.tasks])
            for task, count in zip(self.tasks, counts, strict=True):
                batches[task] += [batches[task][-1].uncounted()] * (count - len(batches[task]))
        return batches

    def train_step(self, batches: dict[str, list[Batch]]) -> dict[str, float]:
        """Run one optimizer step on this rank's micro-batches, by task; the update may be skipped (SkippedSteps).

        Return the step's metrics under their names in log.jsonl.
        Raises NonFiniteError after more than train.max_skips non-finite steps in a row.
        """
        self.adapter.train()
        lr = lr_at(self.step, self.schedule_end, self.recipe.optim)
        set_lr(self.optimizer, lr)
        logged = due(self.step + 1, self.recipe.log.every) or self.step + 1 == self.recipe.train.steps
        labels = {task: loader.labels for task, loader in self.loaders.items()} if logged else None
        given = self.recipe.objective, self.recipe.train.seed, self.autocast
        passes, cast_once = sum(map(len, batches.values())), self.recipe.train.cast_once
        updates = self.fused_backward.steps() if self.fused_backward else contextlib.nullcontext()
        with half_weights.held(self.adapter, self.autocast, passes, cast_once), updates:
            sums = objective.backward(self.adapter, batches, *given, labels)
        if self.fused_backward:
            norm = self.fused_backward.finish_step()
        else:
            norm = gradient_norm(self.adapter, self.recipe.optim.max_grad_norm)
        # Read the losses here, where the host has just synchronised for the norm: after the optimizer's kernels are
        # launched, it would wait for them, too.
        metrics = objective.means(sums, self.tasks)
        if self.skipped.accepts(norm):
            self.optimizer.step()  # no-op after a fused backward pass, which has freed the gradients
            if self.ema:
                self.ema.update()
        self.optimizer.zero_grad()

        metrics["loss"] = sum(self._task(task).weight * metrics[f"{task}/loss"] for task in self.tasks)
        self.skipped.record(self.step + 1, norm, batches, {task: metrics[f"{task}/loss"] for task in self.tasks})
        self.step += 1
        metrics |= {"grad_norm": norm, "lr": lr, "skipped_steps": float(self.skipped.total)}
        return metrics

    def save(self, in_background: bool = False) -> Path | None:
        """Write a checkpoint and return its folder; None, with an error in the log, if it cannot be written.

        in_background: return as soon as it is copied to host memory, with the folder of an earlier checkpoint that has
        completed in the meantime, or None.
        Raises OSError if the run folder was moved or removed.
        """
        self.folder.reject_lost()
        state = {
            "step": self.step,
            "samples": {task: self._position(task) for task in self.tasks},
            "schedule_end": self.schedule_end,
            "ranks": distributed.world_size(),
            "inherited": sorted(self.adapter.inherited),
            "skipped": self.skipped.state(),
            "monitor": self.monitor.state(),
            "ema": self.ema and self.ema.state(),
            "recipe": asdict(absolute_paths(self.recipe)),
            "fingerprint": self.fingerprint,
        }
        averages = self.ema.averages if self.ema else None
        taken = checkpoint.snapshot(state, self.adapter, self.optimizer, averages)
        if in_background:
            return self._record(self.writer.start(taken))
        self._record(self.writer.wait())
        return self._record(checkpoint.write(self.run_dir, taken, self.keep, self.folder.is_lost))

    def _record(self, saved: Path | None) -> Path | None:
        if saved is not None:
            self.folder.record_checkpoint(saved)
        return saved

    def _save_last(self) -> None:
        if self.save() is None:
            kept = self.folder.status
            there = f"the newest one is of step {kept.step}" if kept.checkpoint else "there is no earlier one"
            with distributed.fail_together(distributed.gloo_group()):  # raises its own error if a rank is gone
                raise NotSavedError(
                    f"step {self.step} is done, but its checkpoint could NOT be written to {self.run_dir}; {there}. "
                    "Once it can be written, the same command repeats the steps since then"
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
            max_tokens=self._task(task).max_tokens,
            neighbours=task == "reca" and self.recipe.objective.condition == "other",
            start=self._position(task),
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            bad_samples=self.run_dir / f"bad_{task}.jsonl",
            prepare=self.adapter.prepare,
            identity=self.features,
            spare=None if self.features is None else preflight.space_for_checkpoints(self.recipe, self.adapter),
        )
