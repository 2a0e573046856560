"""The keys of a recipe, as documented dataclasses with bounds (reca/options/fields.py). recipe_files.py reads them."""

import re
from dataclasses import dataclass
from typing import Any, Literal, Optional

from reca import units
from reca.data.config import DataConfig
from reca.data.tasks import TASKS
from reca.eval.config import EvalConfig
from reca.models import UMMS
from reca.options.fields import LOCAL, RecipeError, config_field, format_value, share

FIT_CHANGES = ("moments", "micro_batch")  # what train.fit may be allowed to change
MAX_STEPS = 10**9  # limit of steps in a run: sample numbers have 56 bits


@dataclass
class TaskConfig:
    weight: float = config_field(
        0.0, "weight (lambda) of this loss in the total; a task of weight 0 is not computed", least=0
    )
    batch_size: int = config_field(
        8, "global batch size: samples of this task in one step, over all ranks and micro-batches", least=1, most=2**24
    )
    micro_batch: int = config_field(
        8,
        "largest number of samples in one forward pass on one rank; batches are split evenly below it",
        least=1,
        most=2**24,
    )
    max_tokens: Optional[int] = config_field(
        None,
        "largest number of tokens in one forward pass on one rank, instead of micro_batch: as many samples as fit, in "
        "order, including padding; a longer sample is a micro-batch by itself; null = use micro_batch",
        least=1,
    )


@dataclass
class ObjectiveConfig:
    reca: TaskConfig = config_field(lambda: TaskConfig(weight=1.0), "reconstruction from h_v (the RECA loss)")
    i2t: TaskConfig = config_field(TaskConfig, "image to text; 1 where understanding and generation share weights")
    t2i: TaskConfig = config_field(TaskConfig, "caption to image: supervised fine-tuning (SFT)")
    srum: TaskConfig = config_field(
        TaskConfig, "caption to image, weighted by scores of image regions (SRUM, arXiv 2510.12784)"
    )
    condition: str = config_field(
        "own", "whose h_v conditions the reconstruction: own, or other (control)", ("own", "other")
    )
    mean: str = config_field(
        "batch",
        "averaging of the loss: over the whole batch, or over each micro-batch separately (as the releases do), "
        "weighted by its fraction of the batch's samples",
        ("batch", "micro_batch"),
    )

    def check(self, prefix: str) -> None:
        if self.condition == "other" and self.reca.batch_size < 2:
            raise RecipeError(
                f"{prefix}condition=other takes h_v from another sample: set {prefix}reca.batch_size to 2 or more"
            )
        for task in TASKS if self.mean == "micro_batch" else ():
            if (most := getattr(self, task).max_tokens) is not None:
                raise RecipeError(
                    f"{prefix}{task}.max_tokens={most} needs {prefix}mean=batch: with mean=micro_batch the loss is set "
                    "by which samples share a micro-batch, and with max_tokens that depends on their lengths"
                )


@dataclass
class OptimConfig:
    name: str = config_field(
        "adamw",
        "adamw; adamw_8bit, with blockwise-quantized 8-bit moments; or apex for NVIDIA apex's FusedAdam",
        ("adamw", "adamw_8bit", "apex"),
    )
    moments: str = config_field(
        "fp32", "type of AdamW's moments between steps; bf16 rounds them stochastically", ("fp32", "bf16")
    )
    offload: bool = config_field(
        False, "keep the moments in host memory and stream them through the GPU; the result is bit-identical"
    )
    fused_backward: bool = config_field(
        False,
        "update each parameter in the backward pass as soon as its gradient is complete, and free the gradient; needs "
        "one micro-batch per step and max_grad_norm=null",
    )
    lr: float = config_field(1e-5, "peak learning rate", least=0)
    betas: list[float] = config_field(lambda: [0.9, 0.95], "AdamW betas", least=0, below=1)
    eps: float = config_field(1e-8, "AdamW epsilon", above=0)
    weight_decay: float = config_field(
        0.0, "decoupled weight decay, on the parameters that the adapter's decays() selects", least=0
    )
    max_grad_norm: Optional[float] = config_field(1.0, "global gradient norm to clip to; null does not clip", above=0)
    schedule: str = config_field("constant", "learning rate schedule after warm-up", ("constant", "cosine", "linear"))
    warmup_steps: int = config_field(0, "steps of linear warm-up", least=0, most=MAX_STEPS)
    decay_steps: Optional[int] = config_field(
        None, "step at which the schedule ends; null = train.steps", least=1, most=MAX_STEPS
    )
    stable_fraction: float = share(
        0.0, "linear and cosine: fraction of the steps at peak learning rate before the decay"
    )
    min_lr_ratio: float = share(0.0, "final learning rate as a fraction of the peak")

    def check(self, prefix: str) -> None:
        if len(self.betas) != 2:
            raise RecipeError(f"{prefix}betas={format_value(self.betas)} must be two numbers from 0 to below 1")
        if self.name == "apex":
            for key in ("moments", "offload", "fused_backward"):
                if getattr(self, key) not in ("fp32", False):
                    raise RecipeError(
                        f"{prefix}{key}={format_value(getattr(self, key))} needs {prefix}name=adamw; apex's FusedAdam "
                        "keeps fp32 moments on the GPU"
                    )
        if self.name == "adamw_8bit" and self.moments != "fp32":
            raise RecipeError(
                f"{prefix}moments={self.moments} is for {prefix}name=adamw: adamw_8bit has 8-bit moments, and fp32 "
                f"moments for small parameters. Leave {prefix}moments=fp32"
            )
        if self.fused_backward and self.max_grad_norm is not None:
            raise RecipeError(
                f"{prefix}fused_backward=true updates parameters before the norm of all gradients is known, so it "
                f"cannot clip: set {prefix}max_grad_norm=null, or {prefix}fused_backward=false"
            )


@dataclass
class TrainConfig:
    steps: int = config_field(1000, "optimizer steps of the whole run", least=1, most=MAX_STEPS)
    seed: int = config_field(0, "seed of all random numbers of the run", least=0)
    init_from: Optional[str] = config_field(
        None,
        "run folder of the same model, or a checkpoint of one (RUN/checkpoints/STEP), whose trained weights this run "
        "starts from (for example SFT, then RECA)",
        path=LOCAL,
    )
    roles: Optional[list[str]] = config_field(
        None, "parameter roles to train; null = the model's default, the paper's choice where there is one"
    )
    frozen: list[str] = config_field(
        list, "name patterns of parameters that stay frozen although their role is trained"
    )
    precision: str = config_field(
        "fp32",
        "compute dtype of the forward pass; weights and accumulators stay fp32. fp64 (for tests) applies to all",
        ("fp32", "bf16", "fp64"),
    )
    float8: bool = config_field(
        False,
        "compute the blocks' linear layers in FP8, by torchao; needs precision=bf16 and an Ada, Hopper or newer GPU",
    )
    activation_checkpointing: bool | int | Literal["selective"] = config_field(
        False,
        "recompute the activations of transformer blocks in the backward pass; a number N: of every N-th block; "
        "selective: of all blocks, but keep the outputs of matmuls and attention",
        least=2,
    )
    cast_once: bool = config_field(
        True,
        "precision=bf16: cast the blocks' weights once per step and keep the copies, 2 bytes per weight, for all its "
        "micro-batches; false: cast each block whenever it runs, slower, but with less memory if activation "
        "checkpointing is on; the result is bit-identical",
    )
    fit: Optional[str] = config_field(
        None,
        "GPU memory, such as 80GiB, or auto for that of the GPU: choose micro_batch, activation_checkpointing, "
        "cast_once, parallel.shard and optim.offload so that the predicted peak fits; null keeps the recipe's values",
    )
    fit_allow: list[str] = config_field(
        list,
        "settings that train.fit may change although they alter the result: moments (bf16 or 8 bits), micro_batch (if "
        "objective.mean=micro_batch averages over it)",
        FIT_CHANGES,
    )
    micro_batch: Optional[str] = config_field(
        None,
        "auto: the largest micro-batches predicted to fit the GPU's memory, instead of the objective's micro_batch, "
        "also if objective.mean=micro_batch averages over them; null keeps the recipe's",
        (None, "auto"),
    )
    compile: Optional[bool] = config_field(
        None, "torch.compile the transformer blocks and encoders; null: on GPUs with Triton, unless train.deterministic"
    )
    max_skips: int = config_field(
        3, "consecutive steps with a non-finite loss or gradient before the run stops", least=0
    )
    skip_spikes: Optional[float] = config_field(
        None,
        "skip a step whose gradient norm lies more than this many standard deviations above the mean of the last "
        "train.spike_window steps; 6 is a good first value, null skips none",
        above=0,
    )
    spike_window: int = config_field(
        200,
        "number of previous gradient norms for train.skip_spikes, which is active once half of them are recorded",
        least=4,
        most=10**4,
    )
    deterministic: bool = config_field(
        False, "bit-identical runs on the same machine: only deterministic algorithms, which may be slower"
    )
    threads: Optional[int] = config_field(None, "CPU threads; null keeps torch's default", least=1, most=2**12)

    def check(self, prefix: str) -> None:
        if self.float8 and self.precision != "bf16":
            raise RecipeError(
                f"{prefix}float8=true rounds what is computed in bf16: set {prefix}precision=bf16, not {self.precision}"
            )
        if self.fit not in (None, "auto"):
            try:
                units.parse_size(self.fit)
            except ValueError as error:
                raise RecipeError(f"{prefix}fit: {error}, or auto for the memory of the GPU") from error


@dataclass
class LoraConfig:
    rank: int = config_field(
        0, "rank of LoRA's matrices (Hu et al., arXiv 2106.09685); 0 trains without LoRA", least=0, most=2**14
    )
    alpha: Optional[float] = config_field(
        None, "LoRA's update is multiplied by alpha / rank; null = rank, a factor of 1", above=0
    )
    dropout: float = config_field(0.0, "dropout of the input of LoRA's matrices in training", least=0, below=1)
    dora: bool = config_field(False, "train norms and directions of the rows separately (DoRA, arXiv 2402.09353)")
    targets: list[str] = config_field(
        lambda: ["*"],
        "name patterns of linear layers that get LoRA, among those in blocks that would be trained without LoRA",
        fewest=1,
    )
    base_dtype: Optional[str] = config_field(
        None, "dtype of the frozen base weights of LoRA layers; null = as without LoRA", (None, "bf16")
    )


@dataclass
class ParallelConfig:
    strategy: str = config_field(
        "auto",
        "ddp: replicate the weights on every GPU; fsdp: shard them (FSDP2); auto: ddp if weights, gradients and "
        "moments take at most half of a GPU's memory",
        ("auto", "fsdp", "ddp"),
    )
    shard: Optional[int] = config_field(
        None,
        "ranks that share one copy of the weights with fsdp; null = those of one node, or all if nodes differ in "
        "size. Fewer than all ranks: HSDP, replicas of shards",
        least=1,
        most=2**20,
    )
    reduce_every_micro_batch: bool = config_field(
        False,
        "reduce-scatter gradients after every micro-batch, so that ranks keep only their shard, instead of unsharded "
        "gradients until the last micro-batch of the step; needs more communication",
    )
    timeout_minutes: int = config_field(
        30, "timeout of collectives until the first step ends", least=1, most=60 * 24 * 365
    )
    step_timeout_minutes: int = config_field(
        10, "timeout of collectives after the first step", least=1, most=60 * 24 * 365
    )

    def check(self, prefix: str) -> None:
        if self.strategy == "ddp" and (self.shard or 1) > 1:
            raise RecipeError(
                f"{prefix}strategy=ddp keeps all weights on every rank, but {prefix}shard={self.shard} shards them: "
                f"set {prefix}shard to null, or {prefix}strategy=fsdp"
            )


@dataclass
class CheckpointConfig:
    every: int = config_field(500, "steps between checkpoints; 0 saves only at the end and on SIGTERM", least=0)
    keep: int = config_field(2, "number of latest checkpoints to keep; 0 keeps all", least=0)
    keep_every: int = config_field(
        0, "also keep every checkpoint whose step is a multiple of this, permanently; 0 keeps none beyond keep", least=0
    )
    async_save: bool = config_field(
        True,
        "write checkpoints while training continues, from a copy in host memory; the last one of a run is waited for",
    )

    def check(self, prefix: str) -> None:
        if self.keep_every and (not self.every or self.keep_every % self.every):
            raise RecipeError(
                f"{prefix}keep_every={self.keep_every} must be a multiple of {prefix}every={self.every}: other steps "
                "have no checkpoint"
            )


@dataclass
class EMAConfig:
    half_life: float = config_field(
        0.0,
        "half-life in steps of the fp32 exponential moving average (EMA) of the trained parameters, which is used only "
        "on request (--ema); 0 keeps none",
        least=0,
        most=MAX_STEPS,
    )


@dataclass
class LogConfig:
    every: int = config_field(10, "steps between lines of log.jsonl", least=0)
    tensorboard: bool = config_field(True, "write TensorBoard files, if tensorboard is installed")
    wandb: Optional[str] = config_field(
        None,
        "Weights & Biases project to log to, if wandb is installed (WANDB_MODE=offline needs no network); null = none",
    )
    peak_flops: Optional[float] = config_field(
        None,
        "peak FLOP/s of one GPU for MFU; null = its dense bf16 peak, or if that is unknown the measured speed of "
        "a large matrix product. On a CPU there is no MFU without it",
        above=0,
    )
    hang_seconds: float = config_field(
        300.0,
        "if a part of a step takes longer on any rank, all ranks write their stacks and collectives to "
        "run_dir/hang; at most half of parallel.step_timeout_minutes. 0 = never",
        least=0,
        most=60 * 60 * 24 * 365,
    )
    prompts: list[str] = config_field(list, "prompts whose images are saved as a grid PNG during training")
    reconstructions: int = config_field(
        4,
        "number of images saved next to their reconstructions from h_v, before the first step and after the last "
        "(run_dir/reconstructions.png) and every log.sample_every steps: held-out ones (eval.holdout), else of "
        "data.images; 0 = none",
        least=0,
        most=256,
    )
    sample_every: int = config_field(
        0, "steps between image grids of log.prompts and log.reconstructions; 0 generates none", least=0
    )
    gap_every: int = config_field(0, "steps between measurements of the gap (other h_v minus own); 0 = never", least=0)
    drift_every: int = config_field(0, "steps between losses on a fixed captioned batch; 0 = never", least=0)
    memory_snapshot: bool = config_field(
        False,
        "record the Python stack of every GPU allocation, for the snapshot that an out-of-memory error leaves in "
        "run_dir; without it the snapshot has no stacks",
    )
    profile: Optional[str] = config_field(
        None, "first:last step to record with torch.profiler, numbered as in log.jsonl, such as 10:13"
    )

    def check(self, prefix: str) -> None:
        if self.profile is not None:
            match = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", self.profile)
            if not match or int(match[1]) > int(match[2]):
                raise RecipeError(f"{prefix}profile={format_value(self.profile)} must be first:last, such as 10:13")


@dataclass
class Recipe:
    umm: str = config_field("show_o", f"the model: {', '.join(UMMS)}, or your own importable package.module")
    model: Any = config_field(None, "keys of that model, see models/<umm>/config.py")
    data: DataConfig = config_field(DataConfig, "")
    objective: ObjectiveConfig = config_field(ObjectiveConfig, "")
    optim: OptimConfig = config_field(OptimConfig, "")
    train: TrainConfig = config_field(TrainConfig, "")
    lora: LoraConfig = config_field(LoraConfig, "")
    parallel: ParallelConfig = config_field(ParallelConfig, "")
    ema: EMAConfig = config_field(EMAConfig, "")
    checkpoint: CheckpointConfig = config_field(CheckpointConfig, "")
    log: LogConfig = config_field(LogConfig, "")
    eval: EvalConfig = config_field(EvalConfig, "")
    run_dir: str = config_field("runs/reca", "folder of checkpoints and logs; an existing run is resumed", path=LOCAL)

    def active_tasks(self) -> list[str]:
        """List the tasks whose loss has a weight, in the order in which a step runs them."""
        return [task for task in TASKS if getattr(self.objective, task).weight]

    def check(self, prefix: str) -> None:
        if not self.active_tasks():
            raise RecipeError(f"every weight of {prefix}objective is 0: there is nothing to train")
        for task in self.active_tasks():
            if getattr(self.objective, task).max_tokens is not None and self.train.micro_batch == "auto":
                raise RecipeError(
                    f"{prefix}train.micro_batch=auto chooses {prefix}objective.{task}.micro_batch, which "
                    f"{prefix}objective.{task}.max_tokens replaces: set one of the two to null"
                )
        if self.optim.fused_backward and self.train.skip_spikes is not None:
            raise RecipeError(
                f"{prefix}optim.fused_backward=true updates parameters before the norm of all gradients is known, so "
                f"it cannot skip a step because of it: set {prefix}train.skip_spikes=null"
            )
        if self.eval.holdout and self.eval.holdout_from is None and self.data.images is None:
            raise RecipeError(
                f"{prefix}eval.holdout={self.eval.holdout} takes images from {prefix}data.images, which is null; "
                f"name images by {prefix}eval.holdout_from, or set {prefix}eval.holdout=0"
            )
        if self.lora.rank and self.lora.base_dtype and self.train.precision != self.lora.base_dtype:
            raise RecipeError(
                f"{prefix}lora.base_dtype={self.lora.base_dtype} needs {prefix}train.precision={self.lora.base_dtype}; "
                f"it is {self.train.precision}"
            )
