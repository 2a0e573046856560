"""What the tests of Harmon share: the model with the published tensors, recorded rng, tolerances."""

import torch
from torch import Tensor

from reca.models.common.ldm_autoencoder import to_diffusers
from reca.models.common.qwen2 import Qwen2Sizes
from reca.models.common.weight_files import assign_state_dict
from reca.models.harmon import Adapter, Config, weights
from reca.models.harmon.config import AutoencoderSizes, MarSizes
from reca.models.harmon.masking import WIDTH
from reca.models.harmon.modules import EPS
from reca.models.harmon.prompt import Prompt
from reca.models.harmon.sampling import SamplerNoise
from reca.rng import CounterRNG, RandomStream
from tests.golden.conftest import Golden

# cases.json: max|a - b| / max|b| of a re-run with another attention, and of a second implementation
STAGE, GENERATION = 1e-5, 4e-5
SLOT = -200  # stands for the image in recorded ids


def build(golden: Golden) -> Adapter:
    config = _config(golden.config)
    model = Adapter(config, None)
    levels = len(config.autoencoder.multipliers)
    assign_state_dict(model.codec, to_diffusers(golden.part("vae."), levels), "golden")
    weights.assign_published(model, {n: t for n, t in golden.weights.items() if not n.startswith("vae.")}, "golden")
    return model.eval()


def _config(c: dict) -> Config:
    llm, mar, vae = c["llm"], c["mar"], c["vae"]
    assert llm["tie_word_embeddings"] and mar["layer_norm_eps"] == EPS and not vae["attn_resolutions_decoder"]
    return Config(
        language=Qwen2Sizes(**{key: llm[key] for key in Qwen2Sizes.__dataclass_fields__}),
        mar=MarSizes(
            width=mar["encoder_embed_dim"],
            encoder_depth=mar["encoder_depth"],
            decoder_depth=mar["decoder_depth"],
            heads=mar["encoder_num_heads"],
            decoder_width=mar["decoder_embed_dim"],
            decoder_heads=mar["decoder_num_heads"],
            patch_size=mar["patch_size"],
            mlp_ratio=mar["mlp_ratio"],
            base_grid=mar["img_size"] // mar["vae_stride"] // mar["patch_size"],
            buffers=mar["buffer_size"],
            head_depth=mar["diffloss_d"],
            head_width=mar["diffloss_w"],
            classes=mar["class_num"],
            mask_ratio_min=mar["mask_ratio_min"],
            repeats=mar["diffusion_batch_mul"],
            dropout=mar["proj_dropout"],
        ),
        autoencoder=AutoencoderSizes(
            channels=vae["ch"],
            multipliers=vae["ch_mult"],
            blocks=vae["num_res_blocks"],
            latent_channels=vae["z_channels"],
            scale=c["vae_scale"],
        ),
        image_size=c["image"]["H"],
        hv_grad_scale=c["grad_scale"],
    )


class Recorded(CounterRNG):
    """The noise, timesteps, orders and mask of one recorded case in place of counter-based rng.

    Noise and timesteps are recorded for every token (repeat slowest); a row's number says which one is meant.
    """

    def __init__(self, golden: Golden, case: str):
        super().__init__(0)
        part = {name: golden.data[f"{case}.{name}"] for name in ("t", "noise", "orders", "mask")}
        batch, size = part["mask"].shape
        by_sample = lambda x: x.unflatten(0, (-1, batch, size)).transpose(0, 1).flatten(0, 2)  # noqa: E731
        self.t, self.given = by_sample(part["t"]), by_sample(part["noise"])
        # argsort of these is every token's rank in its order, and the share below hides as many as the mask does
        orders = part["orders"].float() / size
        share = (part["mask"].sum(1).double() - 0.5) / size
        least = (golden.config["mar"]["mask_ratio_min"] - 1) / WIDTH
        low = torch.special.ndtr(torch.tensor(least, dtype=torch.float64))
        rate = (torch.special.ndtr((share - 1) / WIDTH) - low) / (0.5 - low)
        self.tables = {RandomStream.MASK_ORDER: orders, RandomStream.MASK_RATE: rate[:, None]}

    def noise(self, purpose: RandomStream, sample_ids: Tensor) -> Tensor:
        return self.given[sample_ids]

    def uniform(self, purpose: RandomStream, sample_ids: Tensor, n: int = 1) -> Tensor:
        if purpose == RandomStream.TIMESTEP:
            return (self.t[sample_ids, None] + 0.5) / 1000
        return self.tables[purpose]


def branches(golden: Golden) -> int:
    """Rows of the recorded sampling per image: with guidance an unconditional one too."""
    return 1 if golden.config["generation"]["cfg"] == 1 else 2


class RecordedChance(SamplerNoise):
    """The orders and noise of the recorded sampling, of the images alone: the unconditional half copies them."""

    def __init__(self, golden: Golden):
        self.data, self.branches = golden.data, branches(golden)
        self.images = len(golden.data["gen.orders"]) // self.branches

    def order(self, size: int) -> Tensor:
        return self.data["gen.orders"][: self.images]

    def start(self, step: int, n: int, channels: int) -> Tensor:
        return self.data[f"gen.{step}.noise_init"].view(self.images, n, channels)

    def noise(self, step: int, inner: int, n: int, channels: int) -> Tensor:
        steps = self.data[f"gen.{step}.noise_steps"]  # the first belongs to the largest t
        return steps[len(steps) - 1 - inner].view(self.branches, self.images, n, channels)[0]


class Spy:
    """Arguments and results of the stages that are methods of the model, not modules."""

    def __init__(self, monkeypatch, model: Adapter):
        self.seen: dict[str, list] = {"encode": [], "decode": [], "language": [], "head": []}
        for name in ("encode", "decode"):
            self._watch(monkeypatch, model.mar, name, name)
        self._watch(monkeypatch, model.llm.model, "forward", "language")
        self._watch(monkeypatch, model.mar.diffloss.net, "forward", "head")

    def _watch(self, monkeypatch, owner, method: str, name: str) -> None:
        inner = getattr(owner, method)

        def watched(*args, **kwargs):
            # A copy: sampling goes on to write into its tokens.
            before = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
            out = inner(*args, **kwargs)
            self.seen[name].append((before, kwargs, out))
            return out

        monkeypatch.setattr(owner, method, watched)


def prompts(golden: Golden, case: str) -> list[Prompt]:
    """The recorded ids without padding."""
    found = []
    for row, real in zip(golden.data[f"{case}.input_ids"], golden.data[f"{case}.attention_mask"].bool(), strict=True):
        ids = row[real].tolist()
        slot = ids.index(SLOT) if SLOT in ids else None
        found.append(Prompt([i for i in ids if i != SLOT], slot))
    return found


def close(ours: Tensor, wanted: Tensor, tolerance: float = STAGE) -> None:
    """max|a - b| / max|b|, as cases.json compares."""
    assert ours.shape == wanted.shape, (ours.shape, wanted.shape)
    error = float((ours.detach() - wanted).abs().max() / wanted.abs().max())
    assert error <= tolerance, error
