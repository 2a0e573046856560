"""What the tests of BAGEL's format share: the published folder, recorded rng, and where our rows stand in a pack."""

import json
import re
from collections.abc import Sequence
from dataclasses import fields
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from reca.data.transforms import make_view
from reca.data.views import View
from reca.models.bagel import Adapter, Config, prompt
from reca.models.bagel.config import AutoencoderSizes, VisionSizes
from reca.models.bagel.transformer import GEN, UND
from reca.models.common.qwen2 import Qwen2Sizes
from reca.models.common.tiny_tokenizer import word_tokenizer
from reca.rng import CounterRNG, RandomStream
from tests.golden.conftest import Golden

ACTIVATION = {"atol": 1e-4, "rtol": 0}  # cases.json
LOSS = 1e-5  # relative, of a loss or of a gradient's norm
ZERO = re.compile(r"vit_model.*self_attn\.k_proj\.bias")  # gradients that are zero by mathematics
ZERO_ABSOLUTE = 1e-6
SPECIALS = ("bos_token_id", "eos_token_id", "start_of_image", "end_of_image")  # as prompt.SPECIAL_TOKENS


def write_folder(golden: Golden, folder: Path) -> Path:
    """The tensors as a published folder. The texts of golden data are numbers: token k is the word `k`."""
    c = golden.config
    save_file(golden.weights, folder / "ema.safetensors")
    save_file(golden.tensors("ae"), folder / "ae.safetensors")
    for name in ("llm_config", "vit_config"):
        (folder / f"{name}.json").write_text(json.dumps(c[name]))
    names = {c["special_tokens"][key]: name for key, name in zip(SPECIALS, prompt.SPECIAL_TOKENS, strict=True)}
    words = [names.get(i, str(i)) for i in range(1, c["llm_config"]["vocab_size"])]  # 0 is the unknown word
    word_tokenizer(words, prompt.SPECIAL_TOKENS).save_pretrained(folder)
    return folder


def config(golden: Golden, folder: Path) -> Config:
    c = golden.config
    vae, look, image = c["vae"], c["vit_transform"], c["vae_transform"]

    def sizes(cls, source: dict):
        return cls(**{f.name: source[f.name] for f in fields(cls)})

    return Config(
        weights=str(folder),
        language=sizes(Qwen2Sizes, c["llm_config"]),
        vision=sizes(VisionSizes, c["vit_config"]),
        autoencoder=AutoencoderSizes(
            block_out_channels=[vae["ch"] * m for m in vae["ch_mult"]],
            layers_per_block=vae["num_res_blocks"],
            latent_channels=vae["z_channels"],
            scaling_factor=vae["scale_factor"],
            shift_factor=vae["shift_factor"],
        ),
        latent_patch_size=c["latent_patch_size"],
        max_latent_size=c["max_latent_size"],
        image_size=image["max_image_size"],
        image_min_size=image["min_image_size"],
        understanding_size=look["max_image_size"],
        answer_size=look["max_image_size"],
        answer_min_size=look["min_image_size"],
        edit_size=look["max_image_size"],
        edit_min_size=look["min_image_size"],
    )


def view(transform: dict, max_pixels: int | None = None) -> View:
    names = {"size": "max_image_size", "min_size": "min_image_size", "stride": "image_stride"}
    return View(fit="bound", max_pixels=max_pixels, **{ours: transform[theirs] for ours, theirs in names.items()})


def seen(golden: Golden, model: Adapter, order: Sequence[int]) -> list[Tensor]:
    """SigLIP's rows of the raw images with these numbers."""
    images = [Image.fromarray(golden.data[f"pre.image_u8.{i}"].numpy()) for i in order]
    return model.encode_understanding([make_view(image, view(golden.config["vit_transform"])) for image in images])


class Recorded(CounterRNG):
    """Numbers of golden data in place of counter-based ones."""

    def __init__(self, gaussians: list[float], posterior: list[Tensor], noise: Tensor, drop: list[float]):
        super().__init__(0)
        self.gaussians, self.posterior, self.given, self.drop = gaussians, posterior, noise, drop

    def noise(self, purpose: RandomStream, sample_ids: Tensor) -> Tensor:
        assert purpose == RandomStream.NOISE
        return self.given

    def normal(self, purpose: RandomStream, sample_ids: Tensor, n: int = 1) -> Tensor:
        if purpose == RandomStream.POSTERIOR:
            return torch.stack([self.posterior[i].flatten() for i in sample_ids.tolist()])
        assert purpose == RandomStream.TIMESTEP
        return torch.tensor(self.gaussians)[sample_ids][:, None]

    def uniform(self, purpose: RandomStream, sample_ids: Tensor, n: int = 1) -> Tensor:
        assert purpose == RandomStream.CONDITION_DROP
        return torch.tensor(self.drop)[sample_ids][:, None]


def crop(image: Tensor, size: Sequence[int], patch: int) -> Tensor:
    """The upper left corner of [C, H, W] that `size` tokens cover."""
    return image[:, : size[0] * patch, : size[1] * patch]


def places(samples: Sequence[Sequence[prompt.Item]]) -> dict[tuple[str, str], list[int]]:
    """Where the rows of our two passes (prefix, image), per expert, stand in the release's packed sequence."""
    found, at = {(when, expert): [] for when in ("prefix", "picture") for expert in (UND, GEN)}, 0
    for items in samples:
        for item in items:
            when = "picture" if isinstance(item, prompt.NoisyImage) else "prefix"
            if isinstance(item, prompt.Text):
                found[when, UND] += range(at, at + len(item.ids))
                at += len(item.ids)
            elif isinstance(item, prompt.VitImage):
                n = item.height * item.width + 2
                found[when, UND] += range(at, at + n)
                at += n
            elif not isinstance(item, prompt.DroppedImage):
                n = item.height * item.width
                found[when, UND] += [at, at + n + 1]
                found[when, GEN] += range(at + 1, at + n + 1)
                at += n + 2
    return found


def passes(samples: Sequence[Sequence[prompt.Item]]) -> dict[str, list[list[prompt.Item]]]:
    """What the prefix pass reads of every sample, and what the pass of the noisy images does."""
    noisy = [[item for item in items if isinstance(item, prompt.NoisyImage)] for items in samples]
    return {
        "prefix": [[i for i in items if not isinstance(i, prompt.NoisyImage)] for items in samples],
        "picture": noisy,
    }


class Packed:
    """Our two passes over `samples` in the order of the release's packed sequence."""

    def __init__(self, model: Adapter, samples: Sequence[Sequence[prompt.Item]]):
        self.where, cursors = places(samples), [0] * len(samples)
        self.length = sum(map(len, self.where.values()))
        self.layouts = {}
        for name, items in passes(samples).items():
            self.layouts[name] = model.layout(items, cursors)
            cursors = self.layouts[name].next_positions

    def join(self, rows: dict[tuple[str, str], Tensor]) -> Tensor:
        """Rows by (pass, expert) as one packed tensor."""
        first = next(iter(rows.values()))
        whole = torch.full((self.length, *first.shape[1:]), -1, dtype=first.dtype)
        for key, value in rows.items():
            whole[self.where[key]] = value.detach()
        return whole

    def und(self, field: str) -> Tensor:
        return self.join({(name, UND): getattr(layout, field) for name, layout in self.layouts.items()})

    def gen(self, field: str) -> Tensor:
        return self.join({(name, GEN): getattr(layout, field) for name, layout in self.layouts.items()})

    def positions(self) -> Tensor:
        return self.join({(name, e): layout.positions[e] for name, layout in self.layouts.items() for e in (UND, GEN)})

    def allowed(self) -> list[Tensor]:
        """Who sees whom, bool [L, L] per sample, by the splits."""
        samples = len(self.layouts["prefix"].next_positions)
        pairs = torch.zeros(self.length, self.length, dtype=torch.bool)
        kept: list[list[int]] = [[] for _ in range(samples)]
        mine: list[list[int]] = [[] for _ in range(samples)]
        for name, layout in self.layouts.items():
            und, gen = iter(self.where[name, UND]), iter(self.where[name, GEN])
            for split in layout.splits:
                own = sorted([*islice(und, split.und), *islice(gen, split.gen)])
                mine[split.sample] += own
                for i, query in enumerate(own):
                    pairs[query, kept[split.sample] + (own[: i + 1] if split.mode == "causal" else own)] = True
                if split.mode != "noise":
                    kept[split.sample] += own
        return [pairs[sorted(rows)][:, sorted(rows)] for rows in mine]


class Record:
    """Outputs of the layers and of the whole transformer, and its input, per pass: name -> [{expert: rows}]."""

    def __init__(self, model: Adapter):
        transformer = model.language_model.model
        self.seen: dict[str, list[dict[str, Tensor]]] = {"input": [], "hidden": []}
        self.hooks = [
            transformer.register_forward_pre_hook(lambda _, args: self.seen["input"].append(args[0])),
            transformer.register_forward_hook(lambda _, args, out: self.seen["hidden"].append(out[0])),
        ]
        for i, layer in enumerate(transformer.layers):
            self.seen[f"layer {i}"] = []
            hook = lambda _, args, out, i=i: self.seen[f"layer {i}"].append(out[0])  # noqa: E731
            self.hooks.append(layer.register_forward_hook(hook))

    def __enter__(self) -> "Record":
        return self

    def __exit__(self, *_) -> None:
        for hook in self.hooks:
            hook.remove()

    def packed(self, name: str, packed: Packed) -> Tensor:
        prefix, image = self.seen[name]
        rows = {("prefix", e): r for e, r in prefix.items()} | {("picture", e): r for e, r in image.items()}
        return packed.join(rows)


def close(ours: Tensor, wanted: Tensor, more: float = 0.0) -> None:
    tolerance = ACTIVATION | {"atol": ACTIVATION["atol"] + more}
    torch.testing.assert_close(ours.detach().to(wanted.dtype), wanted, **tolerance)


def same_loss(ours: Tensor, wanted: Tensor) -> None:
    ours, wanted = float(ours.detach()), float(wanted)
    assert abs(ours - wanted) <= LOSS * abs(wanted), (ours, wanted)


def wrong_norms(model: Adapter, wanted: dict[str, float | None]) -> dict[str, tuple[float, float]]:
    """Parameters whose gradient norm is not the wanted one; none at all, as of the fixed tables, counts as zero."""
    wanted = {n: norm or 0.0 for n, norm in wanted.items()}
    ours = dict.fromkeys(wanted, 0.0)
    ours |= {n: float(p.grad.norm()) for n, p in model.named_parameters() if p.grad is not None and n in wanted}
    return {
        n: (ours[n], norm)
        for n, norm in wanted.items()
        if abs(ours[n] - norm) > (ZERO_ABSOLUTE if ZERO.match(n) else LOSS * norm)
    }
