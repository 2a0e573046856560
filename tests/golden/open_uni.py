"""What the tests of the two OpenUni formats share: the model with the published tensors, recorded rng, tolerances."""

import re
from types import SimpleNamespace

import torch
from torch import Tensor

from reca.models.common.qwen2 import Qwen2Sizes
from reca.models.common.weight_files import assign_state_dict
from reca.models.open_uni import Adapter, Config, modules, prompt, weights
from reca.models.open_uni.config import AutoencoderSizes, ConnectorSizes, SanaSizes, VisionSizes
from reca.rng import CounterRNG, RandomStream
from tests.golden.conftest import Golden

ACTIVATION = {"atol": 2e-5, "rtol": 1e-4}  # cases.json
GRADIENT = 5e-4  # relative, of a tensor or its norm


class ByteTokenizer:
    """The toy tokenizer of the golden data: UTF-8 bytes, and special tokens behind them."""

    def __init__(self, specials: dict[str, int]):
        self.specials = specials
        self.pattern = re.compile("(" + "|".join(map(re.escape, specials)) + ")")

    @classmethod
    def of(cls, golden: Golden) -> "ByteTokenizer":
        c = golden.config
        return cls(c.get("special_token_ids") or {name: 256 + i for i, name in enumerate(c["tokenizer"]["specials"])})

    def convert_tokens_to_ids(self, token: str) -> int:
        return self.specials[token]

    def __call__(self, text: str, add_special_tokens: bool, split_special_tokens: bool) -> SimpleNamespace:
        parts = [text] if split_special_tokens else self.pattern.split(text)
        return SimpleNamespace(
            input_ids=[i for p in parts for i in ([self.specials[p]] if p in self.specials else p.encode())]
        )

    def whole(self, text: str) -> list[int]:
        """Ids of a recorded text with its control tokens."""
        return self(text, False, split_special_tokens=False).input_ids


def expanded(model: Adapter, asked: prompt.Prompt) -> list[int]:
    """The ids of a prompt as the release has them: a token for every row of h_v."""
    ids, slot, _ = asked
    if slot is None:
        return ids
    context = model.tokenizer.convert_tokens_to_ids(prompt.CONTEXT)
    return [*ids[:slot], *[context] * modules.hv_tokens(model.config), *ids[slot:]]


def release_src(model: Adapter, layout: prompt.Layout) -> Tensor:
    """Ids of a layout as the release has them, int64 [B, L]."""
    context = model.tokenizer.convert_tokens_to_ids(prompt.CONTEXT)
    return torch.where(layout.src < 0, context, layout.src).long()


def laid_out(model: Adapter, prompts: list[prompt.Prompt], side: str) -> tuple[prompt.Layout, Tensor]:
    """The layout of prompts and its mask, bool [B, L]."""
    layout = prompt.layout(prompts, modules.hv_tokens(model.config), side)
    places, lengths = torch.arange(layout.src.shape[1]), torch.tensor(layout.lengths)[:, None]
    return layout, places < lengths if side == "right" else places >= layout.src.shape[1] - lengths


def build(golden: Golden) -> Adapter:
    model = Adapter(_config(golden.config), ByteTokenizer.of(golden))
    assign_state_dict(
        model.mllm, weights.mllm_native({n: t for n, t in golden.weights.items() if n.startswith("lmm.")}), "golden"
    )
    assign_state_dict(model.codec, golden.part("vae."), "golden")
    trained = {n: t for n, t in golden.weights.items() if n.startswith(weights.TRAINED)}
    weights.assign_published(model, trained, "golden")
    return model.eval()


def _config(c: dict) -> Config:
    vision = c.get("vit") or c["vision"]

    def sizes(cls, source: dict, **names: str):
        keys = cls.__dataclass_fields__
        return cls(**{key: source[names.get(key, key)] for key in keys if names.get(key, key) in source})

    return Config(
        vision=sizes(VisionSizes, vision),
        language=sizes(Qwen2Sizes, c["llm"]),
        connector=sizes(ConnectorSizes, c["connector"]),
        sana=sizes(SanaSizes, c["sana"]),
        autoencoder=sizes(
            AutoencoderSizes,
            c["vae"],
            block_types="encoder_block_types",
            block_out_channels="encoder_block_out_channels",
            encoder_layers="encoder_layers_per_block",
            decoder_layers="decoder_layers_per_block",
        ),
        queries=c["num_queries"],
        image_size=c["image_size"],
        understanding_size=c["vit_input_size"],
    )


class Recorded(CounterRNG):
    """Noise and uniform numbers of golden data in place of counter-based ones."""

    def __init__(self, noise: Tensor, u: Tensor, drop: Tensor | None = None):
        super().__init__(0)
        self.given, self.tables = noise, {RandomStream.TIMESTEP: u, RandomStream.CONDITION_DROP: drop}

    def noise(self, purpose: RandomStream, sample_ids: Tensor) -> Tensor:
        return self.given[sample_ids]

    def uniform(self, purpose: RandomStream, sample_ids: Tensor, n: int = 1) -> Tensor:
        return self.tables[purpose][sample_ids, None]


class Record:
    """What the stages of a model receive and return, under the names that they have in the model."""

    def __init__(self, model: Adapter):
        self.seen: dict[str, list] = {}
        stages = {"language": model.mllm.model.language_model, "connector": model.connector, "dit": model.transformer}
        self.hooks = [
            stage.register_forward_hook(
                lambda _, args, kwargs, out, name=name: self.seen.setdefault(name, []).append((args, kwargs, out)),
                with_kwargs=True,
            )
            for name, stage in stages.items()
        ]

    def __enter__(self) -> "Record":
        return self

    def __exit__(self, *_) -> None:
        for hook in self.hooks:
            hook.remove()


def close(ours: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(ours, wanted.to(ours.dtype), **ACTIVATION)


def same_stages(record: Record, mask: Tensor, wanted: dict[str, Tensor]) -> None:
    """One run of `condition` against the release's, which runs prompt and queries in one pass.

    mask: ours, [B, L]. wanted: inputs_embeds [B, L + Q, H], llm_mask and position_ids [B, L + Q], query_hidden and
    connector_out [B, Q, H]. Padding embeds nothing that counts, so it is not compared.
    """
    (_, prefix, _), (_, queries, hidden) = record.seen["language"]
    seen = mask.new_ones(len(mask), queries["inputs_embeds"].shape[1])
    assert torch.equal(torch.cat((mask, seen), dim=1), wanted["llm_mask"])
    embeds = torch.cat((prefix["inputs_embeds"], queries["inputs_embeds"].detach()), dim=1)
    real = wanted["llm_mask"]
    close(embeds[real], wanted["inputs_embeds"][real])
    positions = torch.cat((prefix["position_ids"], queries["position_ids"]), dim=1)
    assert torch.equal(positions[real], wanted["position_ids"][real])
    close(hidden.last_hidden_state.detach(), wanted["query_hidden"])
    if "connector_out" in wanted:
        close(record.seen["connector"][0][2].last_hidden_state.detach(), wanted["connector_out"])


def wrong_norms(model: Adapter, wanted: dict[str, float], zero: list[str]) -> dict[str, tuple[float, float]]:
    """Trained parameters whose gradient norm is not the wanted one."""
    ours = {n: float(p.grad.norm()) for n, p in model.named_parameters() if p.grad is not None}
    return {n: (ours[n], w) for n, w in wanted.items() if n not in zero and abs(ours[n] - w) > GRADIENT * w}
