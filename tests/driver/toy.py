"""The smallest adapter that has everything the driver asks for: a linear denoiser of pixels."""

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from reca.config.recipe import Recipe
from reca.data.batch import Batch
from reca.data.views import View, Views
from reca.models.base import Adapter, LossTerm, Prepared
from reca.rng import RandomStream
from reca.trainer import Trainer

SIDE = 4


@dataclass
class ToyConfig:
    weights: str | None = None


@dataclass(frozen=True)
class ToyPrepared(Prepared):
    sample_ids: torch.Tensor  # int64 [B]
    packed = True

    @property
    def tokens(self) -> list[int]:
        return [1 + i % 3 for i in self.sample_ids.tolist()]


class ToyAdapter(Adapter):
    name = "toy"
    tasks = frozenset({"reca", "t2i"})
    trainable_roles = frozenset({"gen_head"})
    condition_keys = ("h_v",)

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        n = 3 * SIDE * SIDE

        def linear() -> nn.Linear:
            layer = nn.Linear(n, n, dtype=dtype)
            with torch.no_grad():
                layer.weight.copy_(torch.randn(n, n, generator=generator, dtype=dtype) * 0.1)
                layer.bias.zero_()
            return layer

        self.tower, self.layers = linear(), nn.ModuleList([linear(), linear()])
        self.seen: list[int] = []

    def views(self, task: str) -> Views:
        return Views(gen=View(SIDE), und=None)

    def encode(self, batch: Batch) -> dict:
        pixels = torch.stack(batch.gen).flatten(1).to(self.tower.weight.dtype) / 127.5 - 1
        with torch.no_grad():
            return {"target": pixels, "h_v": self.tower(pixels)}

    def prepare(self, batch: Batch, rng) -> ToyPrepared:
        weight = float(sum(1 + int(i) % 3 for i in batch.host_ids))
        return ToyPrepared(batch.task, rng.seed, weight, batch.sample_ids)

    def loss(self, prepared: ToyPrepared, features: dict, rng) -> LossTerm:
        self.seen += prepared.sample_ids.tolist()
        target = features["target"]
        noise = rng.normal(RandomStream.NOISE, prepared.sample_ids, target.shape[1]).to(target)
        x = noise + (features["h_v"] if prepared.task == "reca" else 0)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        weights = 1 + prepared.sample_ids % 3  # samples count differently, as packed tokens do
        rows = (x - target).square().mean(1)
        samples = torch.stack((rows.detach() * weights, weights), 1) if prepared.by_sample else None
        return LossTerm((rows * weights).sum(), weights.sum().float(), samples)

    def generate(self, prompts, seeds, **sampling):
        return [torch.full((3, SIDE, SIDE), seed % 256, dtype=torch.uint8) for seed in seeds]

    def roles(self) -> dict[str, str]:
        return {name: "und_encoder" if name.startswith("tower") else "gen_head" for name, _ in self.named_parameters()}

    def blocks(self):
        return list(self.layers)


def write_images(folder: Path, count: int = 24) -> Path:
    """Small PNG files of random blocks, with captions beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(7)
    for i in range(count):
        pixels = torch.randint(0, 256, (SIDE, SIDE, 3), generator=generator, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).resize((4 * SIDE, 4 * SIDE)).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(f"image {i}")
    return folder


def write_recipe(folder: Path, images: Path) -> Path:
    """A recipe for the toy adapter over a folder of images: 8 samples a step, 6 steps."""
    path = folder / "toy.yaml"
    path.write_text(
        f"umm: show_o\nrun_dir: {folder / 'run'}\n"
        f"data: {{images: {images}, captions: {images}, workers: 0, decoder: pillow}}\n"
        "objective: {reca: {weight: 1.0, batch_size: 8, micro_batch: 2}}\n"
        "optim: {lr: 0.01}\n"
        "train: {steps: 6}\n"
        "log: {every: 1, tensorboard: false}\n"
    )
    return path


def weights(adapter: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in adapter.named_parameters()}


def run_toy(recipe: Recipe, **kwargs) -> Trainer:
    """The trainer of a run of the toy that has ended."""
    trainer = Trainer(recipe, ToyAdapter(**kwargs))
    trainer.run()
    return trainer
