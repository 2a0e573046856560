"""The training loop: batches -> loss -> gradient -> update, until done, interrupted or broken."""

import contextlib
import functools
import json
import logging
import math
import signal
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint as recompute

from reca import checkpoint, distributed, objective, signals, split
from reca.config import KindConfig, Recipe, RecipeError, as_dict, load_recipe, save_recipe
from reca.data.loader import Loader, open_loader
from reca.folders import writable
from reca.log import RunLog
from reca.models import umm
from reca.models.base import Adapter, Batch
from reca.optim import freeze, gradient_norm, lr_at, make_optimizer, set_lr

log = logging.getLogger("reca")

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: saved, start again to go on


class NonFiniteError(RuntimeError):
    """Loss or gradient stayed NaN or infinite."""


class Trainer:
    """One run of one recipe. An existing run directory is continued from its newest checkpoint.

    adapter: a model to train in place of the one `recipe.model` describes (it must come from the same weights when a
    run is continued). progress: called with the number of updates done, in place of a progress bar.
    """

    def __init__(self, recipe: Recipe, adapter: Adapter | None = None, progress: Callable[[int], None] | None = None):
        self.recipe, self.run_dir, self.progress = recipe, Path(recipe.run_dir), progress
        if recipe.train.threads:
            torch.set_num_threads(recipe.train.threads)
        self.device = distributed.start(recipe.parallel)
        self.kinds = recipe.active_kinds()
        self.passes = {kind: split.passes(self._kind(kind), distributed.world()) for kind in self.kinds}
        _reject_changed(recipe, self.run_dir)
        writable(self.run_dir, "run_dir")

        # Sharding takes one block at a time to its device, which then never holds the whole model.
        whole = self.device if distributed.world() == 1 else torch.device("cpu")
        self.adapter = adapter or umm(recipe.umm).Adapter.load(recipe.model, whole)
        inherit(self.adapter, recipe)
        for kind in self.kinds:
            if kind not in self.adapter.kinds:
                raise RecipeError(f"{recipe.umm} has no {kind} loss: set objective.{kind}.weight=0")
        self.roles = freeze(self.adapter, recipe.train.train, recipe.train.frozen)
        if recipe.train.compile:  # before recomputation is wrapped around it: Dynamo would not look into that
            for block in self.adapter.blocks():
                block.forward = torch.compile(block.forward)
        if recipe.train.activation_checkpointing:
            recompute_blocks(self.adapter)
        distributed.shard(self.adapter, recipe.parallel, self.device, recipe.train.precision)
        self.optimizer = make_optimizer(self.adapter, recipe.optim)
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=recipe.train.precision == "bf16")

        self.update, self.skips = 0, 0
        if newest := checkpoint.newest(self.run_dir):
            state = checkpoint.load(newest, self.adapter, self.optimizer)
            self.update = state["update"]
            log.info("continuing %s at update %d", self.run_dir, self.update)
        self.loaders = {kind: self._loader(kind) for kind in self.kinds}
        self.fixed = self._fixed_batches()
        self.interrupted = False

    def run(self) -> Path:
        """Train to `train.updates`.

        Raises SystemExit(75) after saving on SIGTERM, SIGUSR1 or Ctrl-C, NonFiniteError on NaN.
        """
        recipe, speaks = self.recipe, distributed.rank() == 0
        if speaks:
            save_recipe(recipe, self.run_dir / "recipe.yaml")
        record = RunLog(
            self.run_dir, recipe.train.updates, self.update, recipe.log.tensorboard, speaks, bar=self.progress is None
        )
        watch = signals.Signals()
        for hazard in signals.hazards(recipe, self.adapter, self.roles):
            record.warn(self.update, hazard)
        if departures := split.departures(recipe.objective, self.kinds, distributed.world()):
            record.warn(self.update, departures)
        streams = {kind: iter(loader) for kind, loader in self.loaders.items()}
        profiler = self._profiler()
        try:
            with self._listening(), profiler:
                while self.update < recipe.train.updates:
                    began = time.perf_counter()
                    batches = {
                        kind: [next(streams[kind]).to(self.device) for _ in range(self.passes[kind])]
                        for kind in self.kinds
                    }
                    waited = time.perf_counter() - began
                    metrics = self.step(batches)
                    images = sum(self._kind(kind).per_update for kind in self.kinds)
                    metrics |= {"images_per_s": images / (time.perf_counter() - began), "data_wait_s": waited}
                    self._probe(metrics, batches)
                    for warning in watch.check(self.update, metrics, self.kinds):
                        record.warn(self.update, warning)
                    record.progress(metrics["loss"], metrics["images_per_s"])
                    if self.progress:
                        self.progress(self.update)
                    if _due(self.update, recipe.log.every) or self.update == recipe.train.updates:
                        record.record(self.update, metrics)
                    if recipe.log.prompts and _due(self.update, recipe.log.sample_every):
                        record.pictures(self.update, self._samples())
                    if profiler is not _NO_PROFILER:
                        profiler.step()
                    stop = distributed.any_rank(self.interrupted, self.device)
                    if stop or _due(self.update, recipe.checkpoint.every) or self.update == recipe.train.updates:
                        self.save()
                    if stop:
                        log.warning("interrupted at update %d; the same command continues the run", self.update)
                        raise SystemExit(EXIT_INTERRUPTED)
        finally:
            for loader in self.loaders.values():
                loader.close()
            record.close()
        distributed.barrier()
        return self.run_dir

    def step(self, batches: dict[str, list[Batch]]) -> dict[str, float]:
        """One update from this rank's micro-batches, by kind. Skipped, and counted, if it is not finite."""
        self.adapter.train()
        sums = objective.backward(self.adapter, batches, self.recipe.objective, self.recipe.train.seed, self.autocast)
        norm = gradient_norm(self.adapter, self.recipe.optim.clip)
        lr = lr_at(self.update, self.recipe.train.updates, self.recipe.optim)
        if math.isfinite(norm):
            set_lr(self.optimizer, lr)
            self.optimizer.step()
            self.skips = 0
        self.optimizer.zero_grad(set_to_none=True)

        metrics = _means({name: distributed.sum_over_ranks(value) for name, value in sums.items()}, self.kinds)
        metrics["loss"] = sum(self._kind(kind).weight * metrics[f"{kind}/loss"] for kind in self.kinds)
        if not math.isfinite(norm):
            self._skip(batches, metrics)
        self.update += 1
        metrics |= {"grad_norm": norm, "lr": lr}
        metrics |= {f"{kind}/bad_files": float(loader.bad) for kind, loader in self.loaders.items()}
        return metrics

    def save(self) -> Path | None:
        state = {"update": self.update, "samples": {kind: self._position(kind) for kind in self.kinds}}
        return checkpoint.save(self.run_dir, state, self.adapter, self.optimizer, self.recipe.checkpoint.keep)

    def _kind(self, kind: str) -> KindConfig:
        return getattr(self.recipe.objective, kind)

    def _position(self, kind: str) -> int:
        return self.update * self._kind(kind).per_update

    def _loader(self, kind: str) -> Loader:
        return open_loader(
            self.recipe.data,
            kind,
            self.adapter.views(kind),
            seed=self.recipe.train.seed,
            micro_batch=self._kind(kind).micro_batch,
            per_update=self._kind(kind).per_update,
            neighbours=kind == "reca" and self.recipe.objective.condition == "other",
            start=self._position(kind),
            rank=distributed.rank(),
            world=distributed.world(),
            ledger=self.run_dir / f"bad_{kind}.jsonl",
            identity=[self.recipe.umm, self.recipe.train.precision, as_dict(self.recipe)["model"]],
        )

    def _skip(self, batches: dict[str, list[Batch]], metrics: dict[str, float]) -> None:
        self.skips += 1
        dump = {
            "update": self.update,
            "losses": {kind: str(metrics[f"{kind}/loss"]) for kind in self.kinds},
            "sample_ids": {
                kind: [i for batch in list_ if batch.counted for i in batch.sample_ids.tolist()]
                for kind, list_ in batches.items()
            },
        }
        with (self.run_dir / f"non_finite_{distributed.rank()}.jsonl").open("a") as file:
            file.write(json.dumps(dump) + "\n")
        log.warning("update %d skipped: loss or gradient is not finite (%s)", self.update, dump["losses"])
        if self.skips > self.recipe.train.max_skips:
            raise NonFiniteError(
                f"{self.skips} updates in a row were not finite; the parameters are those of the last good update. "
                f"The samples are in {self.run_dir}/non_finite_*.jsonl. Lower optim.lr, or use train.precision=fp32"
            )

    def _probe(self, metrics: dict[str, float], batches: dict[str, list[Batch]]) -> None:
        every, seed = self.recipe.log, self.recipe.train.seed
        if "reca" in batches and _due(self.update, every.gap_every):
            probe = batches["reca"][0]
            if len(probe) == 1 and probe.neighbour is None:
                after = self.loaders["reca"].sample(int(probe.sample_ids[0]) + 1)
                probe = replace(probe, neighbour=after.to(self.device))
            own, other = (objective.evaluate(self.adapter, [probe], seed, self.autocast, c) for c in ("own", "other"))
            metrics["reca/gap"] = other - own
        if _due(self.update, every.drift_every) or (every.drift_every and self.update == 1):
            for kind, batch in self.fixed.items():
                metrics[f"{kind}/drift"] = objective.evaluate(self.adapter, [batch], seed, self.autocast)

    def _fixed_batches(self) -> dict[str, Batch]:
        """The first samples of the captioned sources: the yardsticks of drift."""
        if not self.recipe.log.drift_every:
            return {}
        sources = {"i2t": self.recipe.data.conversations, "t2i": self.recipe.data.captions}
        fixed = {}
        for kind in sources.keys() & self.adapter.kinds:
            if sources[kind]:
                loader = open_loader(
                    self.recipe.data, kind, self.adapter.views(kind), seed=self.recipe.train.seed, micro_batch=8
                )
                fixed[kind] = next(iter(loader)).to(self.device)
                loader.close()
        return fixed

    def _samples(self) -> list[torch.Tensor]:
        self.adapter.eval()
        prompts = self.recipe.log.prompts
        with self.autocast:
            return self.adapter.generate(prompts, list(range(len(prompts))))

    def _profiler(self):
        if not self.recipe.log.profile:
            return _NO_PROFILER
        first, last = map(int, self.recipe.log.profile.split(":"))
        return torch.profiler.profile(
            schedule=torch.profiler.schedule(
                wait=max(0, first - 1), warmup=min(1, first), active=last - first + 1, repeat=1
            ),
            on_trace_ready=lambda p: p.export_chrome_trace(str(self.run_dir / f"trace_rank{distributed.rank()}.json")),
        )

    @contextlib.contextmanager
    def _listening(self):
        """SIGTERM, SIGUSR1 and Ctrl-C raise a flag that is read between updates; a second ends the process at once."""

        def interrupt(number, _frame):
            self.interrupted = True
            signal.signal(number, signal.SIG_DFL)

        before = {
            number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


_NO_PROFILER = contextlib.nullcontext()


def load_trained(run_dir: Path, recipe: Recipe, device: torch.device | str = "cpu") -> Adapter:
    """The model of a run: the weights it started from with its newest checkpoint on top."""
    adapter = umm(recipe.umm).Adapter.load(recipe.model, device)
    inherit(adapter, recipe)
    checkpoint.overlay(run_dir, adapter)
    return adapter.eval()


def inherit(adapter: Adapter, recipe: Recipe) -> None:
    """Put what the runs before this one have trained over the published weights: `train.init_from`, and its own."""
    if recipe.train.init_from is None:
        return
    folder = Path(recipe.train.init_from)
    if not (folder / "recipe.yaml").is_file():
        raise RecipeError(f"train.init_from={folder} is no folder of a run: it has no recipe.yaml")
    before = load_recipe(folder / "recipe.yaml")
    ours, theirs = (_sources(r) for r in (recipe, before))
    if ours != theirs:
        raise RecipeError(
            f"train.init_from={folder} is a run of other published files than this recipe "
            f"({_difference(theirs, ours)}); "
            "both must name the same umm and the same files"
        )
    inherit(adapter, before)
    checkpoint.overlay(folder, adapter)


def _sources(recipe: Recipe) -> dict[str, str]:
    """The files and folders a model comes from: its free-text keys."""
    free = (f.name for f in fields(recipe.model) if not f.metadata.get("choices"))
    values = {name: getattr(recipe.model, name) for name in free}
    return {"umm": recipe.umm} | {name: v for name, v in values.items() if isinstance(v, str)}


def _due(update: int, every: int) -> bool:
    return every > 0 and update % every == 0


def recompute_blocks(adapter: Adapter) -> None:
    """Activation checkpointing: the backward pass runs the repeated layers again and keeps nothing of them."""
    for block in adapter.blocks():
        block.forward = functools.partial(recompute, block.forward, use_reentrant=False)


def _means(sums: dict[str, torch.Tensor], kinds: list[str]) -> dict[str, float]:
    names = list(sums)
    table = torch.stack([sums[name].float() for name in names]).tolist()  # one transfer for all of them
    metrics = {}
    for name, (total, weight) in zip(names, table, strict=True):
        mean = total / weight if weight else 0.0
        if name in kinds:
            metrics |= {f"{name}/loss": mean, f"{name}/weight": weight}
        else:
            metrics[name] = mean
    return metrics


def _reject_changed(recipe: Recipe, run_dir: Path) -> None:
    """A continued run must go on with the recipe it began with; logging and length may change."""
    path = run_dir / "recipe.yaml"
    if checkpoint.newest(run_dir) is None or not path.exists():
        return
    from omegaconf import OmegaConf

    old, new = OmegaConf.to_container(OmegaConf.load(path)), as_dict(recipe)
    for config in (old, new):
        for free in ("log", "checkpoint", "parallel", "run_dir"):
            config.pop(free, None)
        config["train"].pop("updates")
        config["train"].pop("threads")
        config["train"].pop("compile")
        for kind in config["objective"].values():
            if isinstance(kind, dict):
                kind.pop("micro_batch")
    changed = [key for key in new if old.get(key) != new[key]]
    if "umm" in changed:
        changed = ["umm"]  # no other key can be compared
    if changed:
        differences = "; ".join(f"{key}: {_difference(old.get(key), new[key])}" for key in changed)
        raise RecipeError(
            f"{run_dir} holds a run of another recipe ({differences}). Use another run_dir, or undo the change"
        )


def _difference(old, new) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        return ", ".join(f"{k} {old.get(k)!r} -> {new.get(k)!r}" for k in new if old.get(k) != new.get(k))
    return f"{old!r} -> {new!r}"
