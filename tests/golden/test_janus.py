"""Janus-Pro against the public code: pixels, h_v, codes, sequences, losses and gradients, an update, sampling."""

import json
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from reca.data.batch import Batch
from reca.data.tasks import Turn
from reca.data.transforms import make_view
from reca.models.common.images import to_uint8
from reca.models.janus import prompt, sampling, weights
from reca.rng import CounterRNG
from tests.golden.janus import Tolerances, build, ids_of, image_batch, mask_of, value
from tests.golden.pillow import LEVELS


def matches(config: dict) -> bool:
    return "gen_vision_config" in config.get("published", {})


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
def tolerances(golden):
    return Tolerances(golden)


def mean(term):
    return term.sum / term.weight


# pixels, h_v, codes


def test_pixels_to_understand(golden, model, tolerances):
    view = model.views("i2t").und
    for number, wanted in enumerate(golden.data["und.resized"]):
        image = Image.fromarray(golden.data[f"und.image_{number}"].numpy())
        found = make_view(image, view)
        assert (found.int() - wanted.int()).abs().max() <= LEVELS, number
        tolerances.close("features_and_hidden", wanted / 127.5 - 1, golden.data["und.pixel_values"][number])


def test_a_square_image_is_the_same_on_both_sides(golden, model):
    image = Image.fromarray(golden.data[f"und.image_{len(golden.data['und.resized']) - 1}"].numpy())
    assert torch.equal(make_view(image, model.views("reca").gen), golden.data["und.resized"][-1])
    assert model.views("reca").und is None
    codes = model.gen_vision_model.encode(golden.data["und.pixel_values"][-1:])
    assert torch.equal(codes, golden.data["reca_same.codes"])


@pytest.mark.parametrize("pixels, features, h_v", [
    ("pixel_values", "features", "h_v"), ("random_pixels", "random_features", "random_h_v")
])  # fmt: skip
def test_understanding(golden, model, tolerances, pixels, features, h_v):
    given = golden.data[f"und.{pixels}"]
    with torch.no_grad():
        tolerances.close("features_and_hidden", model.vision_model.vision_tower(given), golden.data[f"und.{features}"])
    tolerances.close("features_and_hidden", model.encode_understanding(given), golden.data[f"und.{h_v}"])


def test_image_tokenizer(golden, model, tolerances):
    data, codec = golden.data, model.gen_vision_model
    z = codec.z(data["vq.pixels"])
    tolerances.close("features_and_hidden", z, data["vq.z"])
    assert torch.equal(codec.encode(data["vq.pixels"]), data["vq.codes"])
    grid = data["vq.z"].shape[2:]
    tolerances.close("features_and_hidden", codec.quantize.entries(data["vq.codes"], *grid), data["vq.quantised"])
    decoded = codec.decode(data["vq.codes"])
    tolerances.close("pixels", decoded, data["vq.decoded"])
    assert torch.equal(to_uint8(data["vq.decoded"], floor=True).permute(0, 2, 3, 1), data["vq.decoded_uint8"])
    height, width = (side // codec.factor for side in data["vq.rect_decoded"].shape[2:])
    tolerances.close("pixels", codec.decode(data["vq.rect_codes"], (height, width)), data["vq.rect_decoded"])


def test_codes_without_length_one_are_other_ones(golden, model):
    """What transformers' class would find on these weights: the codebook's rows have other lengths than 1."""
    data, rows = golden.data, model.gen_vision_model.quantize.embedding.weight
    z = data["vq.z"].flatten(2).transpose(1, 2)
    assert torch.equal(torch.cdist(z, rows.detach()[None]).argmin(-1), data["vq.codes_unnormalised"])
    assert not torch.equal(data["vq.codes_unnormalised"], data["vq.codes"])


def test_embeddings_of_codes(golden, model, tolerances):
    codes = golden.data["vq.codes"]
    with torch.no_grad():
        tolerances.close("features_and_hidden", model.gen_embed(codes), golden.data["gen.embed"])
        tolerances.close("features_and_hidden", model.embed_codes(codes), golden.data["gen.aligned"])


# sequences

IMAGE_CASES = ("t2i", "t2i_drop", "reca", "reca_drop", "reca_system", "reca_same")


def image_case(golden, model, case):
    if case == "reca_system":
        model.config = replace(model.config, reca_system_prompt=model.config.system_prompt)
    return image_batch(golden, model, case)


@pytest.mark.parametrize("case", ["t2i", "reca", "reca_system"])
def test_prompt_texts(golden, model, case):
    """Control tokens are put in by id; the recorded texts have them as words."""
    batch, rng = image_case(golden, model, case)
    layout, v = model.prepare(batch, rng).layout, model.vocabulary
    for row, length, text in zip(layout.src, layout.lengths, value(golden, f"{case}.prompts"), strict=True):
        own = row[len(row) - length : len(row) - model.image_tokens + 1]
        own = own[(own >= 0) | (own == -1)].tolist() if case == "t2i" else _one_placeholder(own, v)
        assert own == [v.bos, *model.tokenizer.whole(text)]


def _one_placeholder(row, v):
    """boi h_v eoi is one placeholder in the text."""
    ids = torch.where(row < 0, v.image, row.long()).tolist()
    first, last = ids.index(v.image) - 1, len(ids) - ids[::-1].index(v.image)
    assert ids[first] == v.boi and ids[last] == v.eoi
    return [*ids[:first], v.image, *ids[last + 1 :]]


@pytest.mark.parametrize("case", IMAGE_CASES)
def test_ids_of_images(golden, model, case):
    batch, rng = image_case(golden, model, case)
    layout, data = model.prepare(batch, rng).layout, golden.data
    wanted = data[f"{case}.prompt_ids"]
    width = wanted.shape[1]
    assert layout.src.shape[1] == width + model.image_tokens - 1
    assert torch.equal(ids_of(model, layout, width), wanted)
    if f"{case}.prompt_mask" in data:
        assert torch.equal(mask_of(layout)[:, :width], data[f"{case}.prompt_mask"])
    if f"{case}.h_v_mask" in data:
        assert torch.equal(layout.src[:, :width] < 0, data[f"{case}.h_v_mask"].bool())


@pytest.mark.parametrize("case", IMAGE_CASES)
def test_images(golden, model, tolerances, case):
    """Input embeddings, hidden states, logits and losses, as far as the case has them."""
    data, (batch, rng) = golden.data, image_case(golden, model, case)
    layout, codes = model.prepare(batch, rng).layout, batch.features["codes"]
    with torch.no_grad():
        visual = batch.features.get("h_v"), model.embed_codes(codes[:, :-1])
        if f"{case}.input_embeds" in data:
            own = mask_of(layout).bool()
            tolerances.close(
                "features_and_hidden", model.embed(layout.src, *visual)[own], data[f"{case}.input_embeds"][:, :-1][own]
            )
        hidden = model.hidden(layout, *visual)[:, -model.image_tokens :]
        if f"{case}.hidden" in data:
            tolerances.close("features_and_hidden", hidden, data[f"{case}.hidden"])
        logits = model.gen_head(hidden)
        if f"{case}.logits" in data:
            tolerances.close("logits", logits, data[f"{case}.logits"])
        each = F.cross_entropy(logits.transpose(1, 2), codes, reduction="none").sum(1)
    count = model.image_tokens
    allowed = tolerances.use["losses"]
    torch.testing.assert_close(each / count, data[f"{case}.loss_per_sample"] / count, rtol=0, atol=allowed)
    term = model(batch, rng)
    assert float(term.weight) == codes.numel() == model.prepare(batch, rng).weight
    tolerances.close("losses", mean(term), data[f"{case}.loss_mean"])
    torch.testing.assert_close(term.sum.detach() / codes.numel(), data[f"{case}.loss_sum"] / codes.numel(), rtol=0,
                               atol=allowed)  # fmt: skip


def i2t_batch(golden) -> Batch:
    pairs = zip(value(golden, "i2t.questions"), value(golden, "i2t.answers"), strict=True)
    turns = [[Turn(*pair)] for pair in pairs]
    return Batch("i2t", torch.arange(len(turns)), turns, features={"h_v": golden.data["und.h_v"][: len(turns)]})


def test_conversations(golden, model, tolerances):
    data, batch = golden.data, i2t_batch(golden)
    assert value(golden, "i2t.texts")[0].startswith(model.config.system_prompt)
    layout = model.prepare(batch, CounterRNG(0)).layout
    assert torch.equal(ids_of(model, layout, layout.src.shape[1]), data["i2t.input_ids"])
    assert torch.equal(mask_of(layout), data["i2t.attention_mask"])
    assert torch.equal(layout.src < 0, data["i2t.h_v_mask"].bool())
    assert torch.equal(layout.labels, data["i2t.labels"])
    with torch.no_grad():
        hidden = model.hidden(layout, batch.features["h_v"])[:, :-1][layout.labels[:, 1:] != -100]
        tolerances.close("logits", model.language_model.lm_head(hidden), data["i2t.answer_logits"])
    term = model(batch, CounterRNG(0))
    assert float(term.weight) == len(data["i2t.answer_logits"])
    tolerances.close("losses", mean(term), data["i2t.loss_mean"])
    tolerances.close("losses", term.sum / term.weight, data["i2t.loss_sum"] / term.weight)


# gradients, an update


def seen(golden, model, batch):
    """The batch with its h_v in the graph."""
    pixels = golden.data["und.pixel_values"][: len(batch)]
    h_v = model.aligner(model.vision_model.vision_tower(pixels))
    return replace(batch, features=batch.features | {"h_v": h_v})


def losses(golden, model, name: str):
    i2t = mean(model(seen(golden, model, i2t_batch(golden)) if "full graph" in name else i2t_batch(golden),
                     CounterRNG(0)))  # fmt: skip
    if name.startswith("i2t"):
        return i2t
    batch, rng = image_batch(golden, model, "t2i" if name.startswith("t2i") else "reca")
    image = mean(model(seen(golden, model, batch) if "full graph" in name else batch, rng))
    return image + i2t if name.startswith("total") else image


NORMS = (
    "t2i",
    "reca (understanding encoder and aligner frozen)",
    "reca full graph (encoder and aligner in the graph)",
    "i2t (full graph)",
    "i2t (understanding encoder and aligner frozen)",
    "total (reca + i2t, understanding encoder and aligner frozen)",
)


def test_every_recorded_gradient_is_compared(golden):
    assert set(golden.cases["grad_norms"]) == set(NORMS)


@pytest.mark.parametrize("name", NORMS)
def test_gradients(golden, model, tolerances, name):
    losses(golden, model, name).backward()
    tolerances.same_norms(model, golden.cases["grad_norms"][name])
    for parameter in golden.cases["zero_gradients"][name]:
        gradient = model.get_parameter(parameter).grad
        assert gradient is None or not gradient.any(), parameter


def test_update(golden, model, tolerances):
    """One AdamW step; decay on matrices. Everything but SigLIP, aligner and image tokenizer learns."""
    total = losses(golden, model, NORMS[-1])
    tolerances.close("losses", total, golden.data["total.loss"])
    total.backward()
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
        for name, (norm, sums) in wanted.items():
            after = trained[name].detach().double()
            assert float(after.norm()) == pytest.approx(norm, rel=tolerances.use["update_norms_relative"]), name
            allowed = tolerances.use["update_sums_per_sqrt_n"] * after.numel() ** 0.5
            assert float(after.sum()) == pytest.approx(sums, abs=allowed), name
        with torch.no_grad():
            tolerances.close("losses", losses(golden, model, NORMS[-1]), golden.data["total.loss_after"])
    finally:
        with torch.no_grad():
            for name, kept in before.items():
                trained[name].copy_(kept)


# sampling


class Replayed(sampling.SamplerNoise):
    """The recorded draws of a case."""

    def __init__(self, golden, case: str):
        self.data, self.case = golden.data, case

    def code(self, step, probabilities):
        if self.case == "gen_multinomial":
            return (probabilities / self.data["gen_multinomial.noise"][step]).argmax(-1)
        return sampling.inverse_cdf(probabilities, self.data["gen_uniform.u"][step])


@pytest.mark.parametrize("case", ["gen_greedy", "gen_multinomial", "gen_uniform"])
def test_sampling(golden, model, tolerances, case):
    """The released sampler draws several images of one prompt."""
    data, asked, guided, logits = golden.data, golden.config["generation"], [], []
    hook = model.gen_head.register_forward_hook(lambda _module, _args, out: logits.append(out))
    text = re.fullmatch(r"(?s)<\|User\|>:(.*)<\|Assistant\|>:<begin_of_image>", value(golden, "gen.prompt"))[1]
    ids = [*prompt.caption(model.tokens, text, model.vocabulary), model.vocabulary.boi]
    assert ids == data["gen.prompt_ids"].tolist()
    try:
        codes = sampling.sample_codes(
            model,
            [ids] * asked["samples"],
            Replayed(golden, case),
            guidance=asked["cfg_weight"],
            temperature=0 if case == "gen_greedy" else asked["temperature"],
            on_step=guided.append,
        )
    finally:
        hook.remove()
    assert codes.shape[1] == asked["steps"]
    assert torch.equal(codes, data[f"{case}.codes"])
    tolerances.close("pixels", model.gen_vision_model.decode(codes), data[f"{case}.pixels"])
    if case == "gen_greedy":
        rows = torch.stack(logits[0].chunk(2), 1).flatten(0, 1)  # the release interleaves the branches
        tolerances.close("logits", rows, data["gen_greedy.step0_logits"])
        first = torch.stack(guided[: len(data["gen_greedy.guided_logits"])])[:, 0]
        tolerances.close("guided_logits", first, data["gen_greedy.guided_logits"])


def test_answers(golden, model):
    data, config, v = golden.data, model.config, model.vocabulary
    asked = [
        prompt.with_image(model.tokens, text, v, model.hv_tokens, config.system_prompt)
        for text in value(golden, "i2t.questions")
    ]
    layout = prompt.layout(asked, v)
    assert torch.equal(ids_of(model, layout, layout.src.shape[1]), data["i2t_ask.input_ids"])
    assert torch.equal(mask_of(layout), data["i2t_ask.attention_mask"])
    wanted = data["i2t_ask.answer"]
    ours = sampling.continue_text(model, layout, data["und.h_v"][: len(asked)], wanted.shape[1])
    for row, own in zip(wanted.tolist(), ours.tolist(), strict=True):
        end = row.index(v.eos) + 1 if v.eos in row else len(row)
        assert own[:end] == row[:end]


# the two published layouts


def test_names_of_the_other_layout(golden, model):
    keys = json.loads((golden.folder / "keymap.json").read_text())["keys"]
    assert keys.keys() == model.state_dict().keys() == golden.weights.keys()
    for name, entry in keys.items():
        assert weights.transformers_names(name) == entry["transformers"], name


def test_the_other_layout_and_back(golden, model):
    state = model.state_dict()
    back = weights.from_transformers(weights.to_transformers(state), state)
    assert back.keys() == state.keys()
    rows = F.normalize(state[weights.CODEBOOK], dim=-1)
    for name, tensor in back.items():
        if weights.DROPPED.fullmatch(name):
            assert not tensor.any()
        else:
            assert torch.equal(tensor, rows if name == weights.CODEBOOK else state[name]), name
