"""JanusFlow against the public code: h_v, generation encoder and decoder, sequences, losses and gradients, sampling."""

import functools
from dataclasses import replace

import pytest
import torch

from reca.data.tasks import Turn
from reca.models.common.images import to_uint8
from reca.models.janus import prompt as janus_prompt
from reca.models.janus.sampling import continue_text
from reca.models.janusflow import sampling, weights
from reca.rng import CounterRNG
from tests.golden.janus import Tolerances, value
from tests.golden.janusflow import build, image_batch, talk_batch


def matches(config: dict) -> bool:
    return "vision_gen_enc_config" in config.get("published", {})


@pytest.fixture(scope="module")
def loaded(golden):
    return build(golden)


@pytest.fixture
def model(loaded):
    config = loaded.config
    loaded.zero_grad()
    yield loaded
    loaded.config = config


@pytest.fixture(scope="module")
def near(golden):
    return Tolerances(golden)


def mean(term):
    return term.sum / term.weight


# parts


@torch.no_grad()
def test_understanding(golden, model, near):
    data = golden.data
    near.close("features_and_hidden", model.vision_und_enc_model.vision_tower(data["und.pixels"]), data["und.features"])
    near.close("features_and_hidden", model.encode_understanding(data["und.pixels"]), data["und.h_v"])


@torch.no_grad()
def test_autoencoder(golden, model, near):
    data = golden.data
    moments = model.codec.encode(data["vae.pixels"])
    near.close("pixels", moments, torch.cat((data["vae.mean"], data["vae.logvar"]), dim=1))
    near.close("pixels", model.codec.latents(moments), data["vae.latents"])
    near.close("pixels", model.codec.decode(data["sample.z"]), data["sample.pixels"])
    assert torch.equal(to_uint8(data["sample.pixels"], floor=True), data["sample.uint8"])


@torch.no_grad()
def test_generation_encoder_and_decoder(golden, model, near):
    data = golden.data
    features, embedded = model.vision_gen_enc_model(data["flow.zt"], data["flow.t"])
    near.close("features_and_hidden", features, data["gen.encoded"])
    near.close("features_and_hidden", embedded, data["gen.time"])
    rows = data["gen.hidden"].flatten(2).transpose(1, 2)
    decoded = model.vision_gen_dec_model(rows, data["gen.encoded"], data["gen.time"])
    near.close("features_and_hidden", decoded, data["gen.decoded"])


def test_files_and_names_are_those_of_the_public_code(golden, model):
    """What is not written is a default of its classes, or nothing reads it."""
    unread = {"elementwise_affine", "elementwize_affine", "num_extra_tensors"}
    written, published = weights.published_files(model.config)["config.json"], golden.config["published"]
    for part in ("vision_gen_enc_config", "vision_gen_dec_config"):
        wanted = {key: said for key, said in published[part]["params"].items() if key not in unread}
        assert written[part] == published[part] | {"params": wanted}
    assert written["language_config"].items() >= published["language_config"].items()
    names = {name for name in model.state_dict() if not name.startswith("codec.")}
    assert names == golden.weights.keys()


# sequences

CASES = ("t2i", "t2i_drop", "reca", "reca_drop", "reca_system")


def case_of(golden, model, case):
    if case == "reca_system":
        model.config = replace(model.config, reca_system_prompt=model.config.system_prompt)
    return image_batch(golden, case)


def ids_of(model, layout, width: int):
    """The ids of a layout's first columns as the release has them: boi before an image, a placeholder for h_v."""
    src, v = layout.src[:, :width].long(), model.vocabulary
    ids = torch.where(src < 0, v.image, src)
    first = (src < 0) & (src.roll(1, 1) >= 0)
    return torch.where(first, v.boi, ids)


@pytest.mark.parametrize("case", CASES)
def test_ids_and_what_is_seen(golden, model, case):
    """A sample without its condition has the same places, of which bos alone is seen."""
    batch, rng = case_of(golden, model, case)
    layout, data, rows = model.prepare(batch, rng).layout, golden.data, model.image_tokens + 1
    wanted, mask, v = data[f"{case}.ids"], data[f"{case}.mask"], model.vocabulary
    width = wanted.shape[1]
    assert layout.src.shape[1] == width + rows
    seen = torch.zeros_like(mask)
    for row, spans in enumerate(layout.spans()):
        modes = [span.mode != "pad" for span in spans for _ in range(span.length)]
        assert all(modes[width:])
        seen[row] = torch.tensor(modes[:width])
    assert torch.equal(seen, mask)
    ids = torch.where(mask.bool(), ids_of(model, layout, width), v.pad)
    assert torch.equal(ids, torch.where(mask.bool(), wanted, v.pad))
    dropped = torch.tensor(value(golden, f"{case}.dropped"))
    assert torch.equal((layout.src[:, :width] < 0)[~dropped], data[f"{case}.h_v_mask"].bool()[~dropped])


@pytest.mark.parametrize("case", CASES)
def test_images(golden, model, near, case):
    """The recorded samples were run one by one; here they are a batch."""
    data, (batch, rng) = golden.data, case_of(golden, model, case)
    prepared = model.prepare(batch, rng)
    with torch.no_grad():
        rows, *beside = model.image_rows(data["flow.zt"], data["flow.t"])
        hidden = model.hidden(prepared.layout, batch.features.get("h_v"), rows)
        near.close("features_and_hidden", hidden[:, -1], data[f"{case}.last_hidden"])
        near.close("velocity", model.velocity(hidden[:, -model.image_tokens :], *beside), data[f"{case}.velocity"])
        batch.prepared = prepared.asked_by_sample()
        term = model(batch, rng)
    near.close("losses", term.samples[:, 0], data[f"{case}.loss_sample"])
    near.close("losses", mean(term), data[f"{case}.loss"])


def test_conversations(golden, model, near):
    data, batch = golden.data, talk_batch(golden, Turn)
    layout = model.prepare(batch, CounterRNG(0)).layout
    assert torch.equal(ids_of(model, layout, layout.src.shape[1]), data["i2t.ids"])
    assert torch.equal(layout.labels, data["i2t.labels"])
    with torch.no_grad():
        hidden = model.hidden(layout, batch.features["h_v"])[:, :-1][layout.labels[:, 1:] != -100]
        near.close("logits", model.language_model.lm_head(hidden), data["i2t.logits"])
        near.close("losses", mean(model(batch, CounterRNG(0))), data["i2t.loss"])


# gradients, an update


def loss(golden, model, name: str):
    if name == "total":
        return loss(golden, model, "reca") + loss(golden, model, "i2t")
    if name == "i2t":
        return mean(model(talk_batch(golden, Turn), CounterRNG(0)))
    return mean(model(*image_batch(golden, name)))


@pytest.mark.parametrize("name", ["t2i", "reca", "i2t", "total"])
def test_gradients(golden, model, near, name):
    assert set(golden.cases["grad_norms"]) == {"t2i", "reca", "i2t", "total"}
    loss(golden, model, name).backward()
    near.same_norms(model, golden.cases["grad_norms"][name])


def test_update(golden, model, near):
    """One AdamW step; decay on matrices. Everything but SigLIP, its aligner and the autoencoder learns."""
    near.close("losses", loss(golden, model, "total"), golden.data["total.loss"])
    loss(golden, model, "total").backward()
    trained = {n: p for n, p in model.named_parameters() if n.startswith(weights.TRAINED)}
    before = {n: p.detach().clone() for n, p in trained.items()}
    groups = [
        {"params": [p for n, p in trained.items() if model.decays(n, p) == decay], "weight_decay": 0.1 * decay}
        for decay in (True, False)
    ]
    torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-4).step()
    wanted = golden.cases["adamw_step"]["params"]
    assert wanted.keys() == trained.keys()
    try:
        for name, (norm, total) in wanted.items():
            after = trained[name].detach().double()
            assert float(after.norm()) == pytest.approx(norm, rel=near.use["update_norms_relative"]), name
            allowed = near.use["update_sums_per_sqrt_n"] * after.numel() ** 0.5
            assert float(after.sum()) == pytest.approx(total, abs=allowed), name
        with torch.no_grad():
            near.close("losses", loss(golden, model, "total"), golden.data["total.loss_after"])
    finally:
        with torch.no_grad():
            for name, kept in before.items():
                trained[name].copy_(kept)


# sampling


def test_sampling(golden, model, near):
    """The released sampler draws several images of one prompt, with guidance, from recorded noise."""
    data, asked, velocities = golden.data, golden.config["generation"], []
    given = [model.caption(value(golden, "sample.caption"))] * asked["samples"]
    run = functools.partial(sampling.denoise, model, given, None, data["sample.start"], steps=asked["steps"])
    latents = run(guidance=asked["cfg_weight"], on_step=velocities.append)
    near.close("sampled", torch.stack(velocities), data["sample.velocities"])
    near.close("sampled", latents, data["sample.z"])
    assert not torch.allclose(run(guidance=1.0), latents, atol=0.1)


def test_answers(golden, model):
    data, config, v = golden.data, model.config, model.vocabulary
    asked = [model.with_image(text, config.system_prompt) for text in value(golden, "ask.questions")]
    layout = janus_prompt.layout(asked, v)
    assert torch.equal(ids_of(model, layout, layout.src.shape[1]), data["ask.ids"])
    wanted = data["ask.answer"]
    ours = continue_text(model, layout, data["und.h_v"][: len(asked)], wanted.shape[1])
    for row, own in zip(wanted.tolist(), ours.tolist(), strict=True):
        end = row.index(v.eos) + 1 if v.eos in row else len(row)
        assert own[:end] == row[:end]
