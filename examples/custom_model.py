"""A custom model: everything that the driver requires of one. A recipe names its module, `umm: examples.custom_model`.

    reca train my_recipe.yaml        # or reca.train("my_recipe.yaml"), see tests/test_contributing.py

The "UMM" is a denoiser of small images. Its understanding encoder is a frozen linear map, its text is the bytes of the
caption, and its native loss is flow matching.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from reca.data.batch import Batch
from reca.data.views import View, Views
from reca.models import base
from reca.models.common import by_sample
from reca.models.common.exporting import export_to
from reca.models.common.images import to_unit
from reca.options.fields import HUB, config_field, count, pixels
from reca.rng import CounterRNG, RandomStream

FILE = "denoiser.safetensors"


@dataclass
class Config:
    weights: Optional[str] = config_field(None, "folder of an export; null: random", path=HUB)
    image_size: int = pixels(8, "side of an image")
    width: int = count(64, "channels of the hidden layers")
    seed: int = config_field(0, "seed of a random initialisation", least=0)


@dataclass(frozen=True)
class Prepared(base.Prepared):
    sample_ids: Tensor  # int64 [B]
    t: Tensor  # fp32 [B, 1], noise levels
    text: Tensor  # fp32 [B, 256], counts of bytes

    @property
    def tokens(self) -> list[int]:
        return [2] * len(self.sample_ids)  # h_v and the image


class Adapter(base.Adapter):
    name = "denoiser"
    tasks = frozenset({"reca", "t2i"})
    trainable_roles = frozenset({"gen_head", "bridge"})
    condition_keys = ("h_v",)

    def __init__(self, config: Config):
        super().__init__()
        numbers, width = 3 * config.image_size**2, config.width
        self.config = config
        self.encoder = nn.Linear(numbers, width)
        self.text = nn.Linear(256, width)
        self.enter = nn.Linear(numbers + 1, width)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(2))
        self.leave = nn.Linear(width, numbers)

    # files

    @classmethod
    def load(cls, config: Config, device: torch.device | str = "cpu") -> "Adapter":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = cls(config)
        if config.weights:
            model.load_state_dict(load_file(Path(config.weights) / FILE))
        return model.to(device)

    @classmethod
    def build_meta(cls, config: Config, tokenizer: None = None) -> "Adapter":
        return cls(config)

    def export(self, folder: Path) -> list[str]:
        with export_to(folder) as out:
            out.tensors(FILE, self.state_dict())
            return out.done()

    def sequence(self) -> dict[str, int]:
        return {"h_v": 1, "image": 1}

    # image -> views -> prepare, encode -> loss

    def views(self, task: str) -> Views:
        return Views(gen=View(self.config.image_size), und=None)

    def prepare(self, batch: Batch, rng: CounterRNG) -> Prepared:
        t = rng.uniform(RandomStream.TIMESTEP, batch.host_ids)
        text = torch.stack([_bytes(text) for text in batch.text])
        return Prepared(batch.task, rng.seed, float(len(batch)), batch.host_ids, t, text)

    @torch.no_grad()
    def encode(self, batch: Batch) -> dict[str, Tensor]:
        target = to_unit(batch.gen).flatten(1)
        return {"target": target, "h_v": self.encoder(target)}

    def loss(self, prepared: Prepared, features: dict[str, Any], rng: CounterRNG) -> base.LossTerm:
        target, t = features["target"], prepared.t
        noise = rng.normal(RandomStream.NOISE, prepared.sample_ids, target.shape[1])
        condition = self.text(prepared.text) + (features["h_v"] if prepared.task == "reca" else 0)
        velocity = self.velocity((1 - t) * target + t * noise, t, condition)
        error = (velocity - (noise - target)).float().square().mean(1)
        samples = by_sample.table(error, torch.ones_like(error)) if prepared.by_sample else None
        return base.LossTerm.of(error.sum(), prepared, samples)

    def velocity(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        hidden = self.enter(torch.cat([x, t], dim=1)) + condition
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return self.leave(hidden)

    # text -> image

    @torch.no_grad()
    def generate(self, prompts: list[str], seeds: list[int], *, steps: int = 8) -> list[Tensor]:
        device, size = self.leave.weight.device, self.config.image_size
        condition = self.text(torch.stack([_bytes(text) for text in prompts]).to(device))
        ids = torch.tensor(seeds, device=device)
        x = CounterRNG(0).normal(RandomStream.NOISE, ids, self.leave.out_features)
        for step in range(steps, 0, -1):
            x = x - self.velocity(x, torch.full((len(x), 1), step / steps, device=device), condition) / steps
        return list((127.5 * x + 128).clamp(0, 255).byte().view(-1, 3, size, size))

    # parameters

    def roles(self) -> dict[str, str]:
        role = {"encoder": "und_encoder", "text": "bridge"}
        return {name: role.get(name.split(".")[0], "gen_head") for name, _ in self.named_parameters()}

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)


def _bytes(text: str) -> Tensor:
    return torch.bincount(torch.tensor(list(text.encode()), dtype=torch.int64), minlength=256).float()
