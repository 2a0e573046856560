"""What the tests of JanusFlow share: the model with the recorded tensors, cases as batches, recorded draws."""

import torch
from torch import Tensor

from reca.data.batch import Batch
from reca.models.janus.config import LlamaSizes
from reca.models.janusflow import Adapter, Config, weights
from reca.models.janusflow.config import AutoencoderSizes, GenerationSizes
from reca.rng import RandomStream
from tests.golden import janus
from tests.golden.conftest import Golden
from tests.golden.janus import value, vision_of
from tests.golden.open_uni import ByteTokenizer


def build(golden: Golden) -> Adapter:
    model = Adapter(config_of(golden.config), ByteTokenizer(golden.config["special_ids"]))
    weights.assign_published(model, golden.weights, golden.tensors("vae"), "golden")
    return model.eval()


def config_of(c: dict) -> Config:
    """The recipe that a folder's config.json describes."""
    published, vae = c["published"], c["vae"]
    encoder, decoder = (published[f"vision_gen_{end}_config"]["params"] for end in ("enc", "dec"))
    language = published["language_config"]
    return Config(
        image_size=c["image_size"],
        language=LlamaSizes(**{key: language[key] for key in LlamaSizes.__dataclass_fields__ if key in language}),
        vision=vision_of(c, c["siglip"]["mlp"]),
        generation=GenerationSizes(
            width=encoder["block_out_channels"][0],
            encoder_blocks=encoder["layers_in_middle"],
            decoder_blocks=decoder["layers_in_middle"],
            norm_eps=encoder["norm_eps"],
        ),
        autoencoder=AutoencoderSizes(**{key: vae[key] for key in AutoencoderSizes.__dataclass_fields__}),
    )


class Recorded(janus.Recorded):
    """The recorded draws of a case: which samples lose their condition, times, noise; the posterior has no spread."""

    def __init__(self, golden: Golden, dropped: list[bool]):
        super().__init__(dropped)
        self.data = golden.data

    def normal(self, purpose: RandomStream, sample_ids: Tensor, n: int = 1) -> Tensor:
        if purpose == RandomStream.TIMESTEP:
            return torch.logit(1 - self.data["flow.t"][sample_ids], eps=None)[:, None]
        assert purpose == RandomStream.POSTERIOR
        return torch.zeros(len(sample_ids), n)

    def noise(self, purpose: RandomStream, sample_ids: Tensor) -> Tensor:
        assert purpose == RandomStream.NOISE
        return self.data["flow.z0"][sample_ids]


def image_batch(golden: Golden, case: str) -> tuple[Batch, Recorded]:
    """A case with an image to generate, as features, and its draws."""
    data, task = golden.data, case.split("_")[0]
    x = data["flow.x"] / golden.config["vae"]["scaling_factor"]
    features = {"moments": torch.cat((x, torch.zeros_like(x)), dim=1)}
    if task == "reca":
        features["h_v"] = data["und.h_v"]
    texts = value(golden, "captions" if task == "t2i" else "templates")
    return Batch(task, torch.arange(len(x)), texts, features=features), Recorded(
        golden, value(golden, f"{case}.dropped")
    )


def talk_batch(golden: Golden, turn: type) -> Batch:
    talks = [[turn(*said) for said in talk] for talk in value(golden, "i2t.turns")]
    return Batch("i2t", torch.arange(len(talks)), talks, features={"h_v": golden.data["und.h_v"]})
