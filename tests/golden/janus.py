"""What the tests of Janus-Pro share: the model with the published tensors, cases as batches, recorded draws."""

import torch
from torch import Tensor

from reca.data.batch import Batch
from reca.models.janus import Adapter, Config, prompt, weights
from reca.models.janus.config import LlamaSizes, VisionSizes, VqSizes
from reca.rng import CounterRNG, RandomStream
from tests.golden.conftest import Golden
from tests.golden.open_uni import ByteTokenizer


def build(golden: Golden) -> Adapter:
    model = Adapter(config_of(golden.config), ByteTokenizer(golden.config["special_ids"]))
    weights.assign_published(model, golden.weights, "golden")
    return model.eval()


def config_of(c: dict) -> Config:
    """The recipe that a folder's config.json describes."""
    published, vq = c["published"], c["vq"]
    language = published["language_config"] | c["language"]
    return Config(
        image_size=c["image_size"],
        language=LlamaSizes(**{key: language[key] for key in LlamaSizes.__dataclass_fields__}),
        vision=vision_of(c, int(c["siglip"]["width"] * c["siglip"]["mlp_ratio"])),
        vq=VqSizes(
            channels=vq["ch"],
            multipliers=list(vq["ch_mult"]),
            blocks=vq["num_res_blocks"],
            z_channels=vq["z_channels"],
            entries=vq["codebook_size"],
            code_channels=vq["codebook_embed_dim"],
        ),
        head_width=published["gen_head_config"]["params"]["image_token_embed"],
    )


def vision_of(c: dict, hidden: int) -> VisionSizes:
    siglip, processor = c["siglip"], c["processor"]
    return VisionSizes(
        hidden_size=siglip["width"],
        num_hidden_layers=siglip["layers"],
        num_attention_heads=siglip["heads"],
        intermediate_size=hidden,
        image_size=processor["image_size"],
        patch_size=siglip["patch_size"],
        min_side=processor["min_size"],
    )


class Tolerances:
    """What a folder's cases.json allows in fp32 with other kernels."""

    def __init__(self, golden: Golden):
        self.use = golden.cases["tolerance"]["use"]

    def close(self, kind: str, ours: Tensor, wanted: Tensor) -> None:
        torch.testing.assert_close(ours.detach(), wanted.to(ours.dtype), rtol=0, atol=self.use[kind])

    def same_norms(self, model: Adapter, wanted: dict[str, float]) -> None:
        """The gradient norm of every parameter; what has no gradient has norm 0. JanusFlow's codec is not recorded."""
        ours = {n: 0.0 if p.grad is None else float(p.grad.norm()) for n, p in model.named_parameters()}
        ours = {name: norm for name, norm in ours.items() if not name.startswith("codec.")}
        assert ours.keys() == wanted.keys()
        relative = self.use["gradient_norms_relative"]
        scale = max(wanted.values())  # of a gradient that is zero in theory, rounding is left
        wrong = {n: (ours[n], w) for n, w in wanted.items() if abs(ours[n] - w) > relative * w + 1e-7 * scale}
        assert not wrong, wrong


class Recorded(CounterRNG):
    """Chooses which samples lose their condition."""

    def __init__(self, dropped: list[bool]):
        super().__init__(0)
        self.dropped = torch.tensor([[0.0 if gone else 1.0] for gone in dropped])

    def uniform(self, purpose: RandomStream, sample_ids: Tensor, n: int = 1) -> Tensor:
        assert purpose == RandomStream.CONDITION_DROP and n == 1
        return self.dropped[sample_ids]


def value(golden: Golden, name: str):
    return golden.cases["tensors"][name]["value"]


def dropped(golden: Golden, case: str, v: prompt.Vocabulary) -> list[bool]:
    """Per sample, whether a case has it without its condition."""
    found = []
    rows = golden.data[f"{case}.prompt_ids"]
    masks = golden.data.get(f"{case}.prompt_mask", torch.ones_like(rows))  # a single sample has no padding
    for ids, mask in zip(rows, masks, strict=True):
        inner = ids[mask.bool()][1:-1]
        found.append(bool((inner == v.pad).all()))
    return found


def image_batch(golden: Golden, model: Adapter, case: str) -> tuple[Batch, Recorded]:
    """A case with an image to generate, as features, and the draws that make its conditions."""
    data, task = golden.data, "t2i" if case.startswith("t2i") else "reca"
    rows = len(data[f"{case}.prompt_ids"])
    same = case == "reca_same"
    features = {"codes": data["reca_same.codes"] if same else data["vq.codes"][:rows]}
    if task == "reca":
        features["h_v"] = data["und.h_v"][-1:] if same else data["und.h_v"][:rows]
    texts = value(golden, "t2i.texts" if task == "t2i" else "reca.templates")[:rows]
    return Batch(task, torch.arange(rows), texts, features=features), Recorded(dropped(golden, case, model.vocabulary))


def ids_of(model: Adapter, layout: prompt.Layout, width: int) -> Tensor:
    """The ids of a layout's first `width` columns as the release has them: a placeholder for every row of h_v."""
    src = layout.src[:, :width].long()
    return torch.where(src < 0, model.vocabulary.image, src)


def mask_of(layout: prompt.Layout) -> Tensor:
    """1 where a token is, int64 [B, L]."""
    first = layout.src.shape[1] - torch.tensor(layout.lengths)[:, None]
    return (torch.arange(layout.src.shape[1]) >= first).long()
