"""What is special about Janus-Pro: two published layouts, its tokenizer, dropped conditions, sampling code by code."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import JanusForConditionalGeneration, PreTrainedTokenizerFast

from reca.config.recipe_files import load_recipe
from reca.data.batch import Batch
from reca.data.tasks import Turn
from reca.data.transforms import make_view
from reca.data.views import View
from reca.models.common.text import encode
from reca.models.janus import Adapter, prompt, sampling, weights
from reca.models.janus.published import check_config
from reca.rng import CounterRNG
from tests.golden import janus as golden_janus
from tests.golden.conftest import DATA, Golden
from tests.models.config_files import LANGUAGE, change_size
from tests.models.contract import batch, images, load, shared


def byte_tokenizer(special: dict[str, int]) -> PreTrainedTokenizerFast:
    """The golden data's toy tokenizer as files of the published kind: byte-level, id = byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves
    rest = [byte for byte in range(256) if byte not in plain]
    vocabulary = {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(rest)} | special
    core = Tokenizer(models.BPE(vocabulary, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=prompt.BOS, eos_token=prompt.EOS, pad_token=prompt.PAD
    )


@pytest.fixture(scope="module")
def golden():
    return Golden(DATA / "janus")


@pytest.fixture(scope="module")
def published(golden):
    """The golden weights in a model whose tokenizer has files."""
    model = Adapter(golden_janus.config_of(golden.config), byte_tokenizer(golden.config["special_ids"]))
    weights.assign_published(model, golden.weights, "golden")
    return model.eval()


@pytest.fixture(scope="module")
def exports(published, tmp_path_factory):
    """An export in each of the layouts."""
    made, before = {}, published.config
    for layout in ("deepseek", "transformers"):
        published.config, made[layout] = replace(before, export_layout=layout), tmp_path_factory.mktemp(layout)
        published.export(made[layout])
    published.config = before
    return made


@pytest.fixture(params=["deepseek", "transformers"])
def folder(request, exports):
    return exports[request.param]


def loaded(published, folder, **changes):
    return Adapter.load(replace(published.config, weights=str(folder), **changes)).eval()


# files


def test_both_layouts_are_read(published, folder, exports):
    again = loaded(published, folder)
    for name, tensor in published.state_dict().items():
        found = again.state_dict()[name]
        changed = name == weights.CODEBOOK or weights.DROPPED.fullmatch(name)
        if folder == exports["deepseek"] or not changed:
            assert torch.equal(found, tensor), name
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(again.gen_vision_model.encode(pixels), published.gen_vision_model.encode(pixels))
    said = "a cat <|User|> é"
    assert again.tokens(said) == published.tokens(said) == list(said.encode())


def test_the_file_is_deepseeks(golden, exports):
    folder = exports["deepseek"]
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    assert state.keys() == golden.weights.keys()
    assert all(torch.equal(tensor, golden.weights[name]) for name, tensor in state.items())
    written, public = json.loads((folder / "config.json").read_text()), golden.config["published"]
    for part in ("aligner_config", "gen_aligner_config", "gen_head_config"):
        assert written[part] == public[part]
    for key, value in public["language_config"].items():
        assert written["language_config"][key] == value
    assert written["vision_config"]["params"].items() >= {"image_size": 16, "select_layer": -1}.items()


@torch.no_grad()
def test_transformers_own_class_reads_the_other_and_agrees(golden, published, exports):
    """Its VQ encoder compares rows as they are stored, and its lm_head may be tied: the export sees to both."""
    theirs, report = JanusForConditionalGeneration.from_pretrained(exports["transformers"], output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs, data = theirs.eval(), golden.data
    near = {"rtol": 0, "atol": 2e-5}
    features = theirs.model.get_image_features(data["und.pixel_values"]).pooler_output
    torch.testing.assert_close(features.view_as(data["und.h_v"]), data["und.h_v"], **near)
    codes = theirs.model.vqmodel.encode(data["vq.pixels"]).image_tokens
    assert torch.equal(codes.view_as(data["vq.codes"]), data["vq.codes"])
    ids = data["gen.prompt_ids"][None]
    drawn = theirs.generate(ids, attention_mask=torch.ones_like(ids), generation_mode="image", do_sample=False,
                            temperature=None, top_k=None, max_length=128)  # fmt: skip
    assert torch.equal(drawn, data["gen_greedy.codes"][:1])
    table = theirs.get_input_embeddings().weight
    assert not torch.equal(table, theirs.lm_head.weight)
    assert theirs.generation_config.top_k == 0 and theirs.config.image_token_id == published.vocabulary.image


def test_what_does_not_fit_is_refused(published, folder, tmp_path):
    name = next(path.name for path in folder.iterdir() if path.name in ("pytorch_model.bin", "model.safetensors"))
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    native = name == "model.safetensors"
    state = load_file(folder / name) if native else torch.load(folder / name, weights_only=True)
    gone = next(name for name in state if "mlp.fc2" in name)
    state.pop(gone)
    state["model.strange.weight" if native else "strange.weight"] = torch.zeros(2)
    save_file(state, tmp_path / name) if native else torch.save(state, tmp_path / name)
    with pytest.raises(ValueError, match=r"1 missing: vision_model\S+fc2(.|\n)*1 unexpected: (model\.)?strange"):
        loaded(published, tmp_path)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    sizes = replace(published.config.language, num_hidden_layers=3)
    with pytest.raises(
        ValueError, match=r"num_hidden_layers is 2, but the recipe makes it 3 \(model.language.num_hidden"
    ):
        loaded(published, tmp_path, language=sizes)


VISION = ("hidden_size", "num_attention_heads", "num_hidden_layers", "patch_size", "image_size")
VQ = ("num_embeddings", "embed_dim", "base_channels", "channel_multiplier", "num_res_blocks", "latent_channels",
      "image_token_embed_dim")  # fmt: skip
SIZES = {
    "deepseek": [f"language_config.{key}" for key in LANGUAGE]
    + ["vision_config.params.image_size", "aligner_config.params.input_dim", "gen_head_config.params.image_token_embed"]
    + [f"gen_vision_config.params.{key}" for key in ("image_token_size", "n_embed")],
    "transformers": [f"text_config.{key}" for key in LANGUAGE]
    + [f"vision_config.{key}" for key in VISION]
    + [f"vq_config.{key}" for key in VQ],
}


@pytest.mark.parametrize(("layout", "place"), [(layout, place) for layout, places in SIZES.items() for place in places])
def test_every_size_of_a_published_file_is_compared_with_the_recipe(published, exports, tmp_path, layout, place):
    """Some would load: heads and epsilons have no tensor."""
    change_size(exports[layout], place, tmp_path)
    with pytest.raises(ValueError, match=rf"config.json does not fit the recipe: {place} is .* \(model\.\w+"):
        check_config(tmp_path, published.config)


def test_a_tokenizer_is_wanted_with_all_control_tokens(published, folder, tmp_path, golden):
    with pytest.raises(ValueError, match="contains no tokenizer.json; set model.tokenizer, such as"):
        loaded(published, folder, tokenizer=str(tmp_path))
    older = {name: i for name, i in golden.config["special_ids"].items() if name not in (prompt.USER, prompt.ASSISTANT)}
    byte_tokenizer(older).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the tokenizer lacks <\|User\|>, <\|Assistant\|>; Janus-Pro needs"):
        loaded(published, folder, tokenizer=str(tmp_path))


def test_the_published_tokenizer_is_taken_as_it_is(golden, tmp_path):
    """Its files name Llama's class, which reads blanks by rules of its own."""
    byte_tokenizer(golden.config["special_ids"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "LlamaTokenizerFast"}))
    config = replace(load_recipe("janus_tiny").model, tokenizer=str(tmp_path))
    config.language.vocab_size = golden.config["tokenizer"]["vocab_size"]
    read = weights.load_tokenizer(config)
    for text in (": a red cat\n\n", "a  b", " x"):
        assert encode(read, text) == list(text.encode()) and read.decode(encode(read, text)) == text


def test_transformers_has_no_names_for_toy_datasets(tmp_path):
    model = Adapter.load(load_recipe("janus_tiny", ["model.export_layout=transformers"]).model)
    with pytest.raises(ValueError, match="model.codec=patches .* set model.export_layout=deepseek"):
        model.export(tmp_path)
    assert not list(tmp_path.iterdir())


def test_types(published, folder):
    model = loaded(published, folder, dtype="bf16")
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.bfloat16 if name.startswith(weights.TRAINED) else torch.float32), name
    term = model(batch_of(model, "reca"), CounterRNG(0))
    assert term.sum.dtype == torch.float32 and term.sum.isfinite()


def batch_of(model, task, rows=2):
    views = model.views(task)
    text = [[Turn("what", "a")]] * rows if task == "i2t" else ["a cat"] * rows
    black = lambda view: view and [torch.zeros(3, view.size, view.size, dtype=torch.uint8)] * rows  # noqa: E731
    gen, und = black(views.gen), black(views.und)
    return Batch(task, torch.arange(rows), text, gen=gen, und=und)


# pixels


def test_a_thin_image_keeps_a_side(published):
    view = View(16, fit="letterbox", min_size=6, fill=127)
    for size, inner in (((60, 9), (16, 6)), ((9, 60), (6, 16)), ((1, 500), (6, 16)), ((31, 30), (16, 15))):
        made = make_view(Image.new("RGB", size, (255, 0, 0)), view)
        assert made.shape == (3, 16, 16)
        red = (made[0] > 200).nonzero()
        top, left = red.min(0).values.tolist()
        bottom, right = (red.max(0).values + 1).tolist()
        assert (right - left, bottom - top) == inner
        assert (left, top) == ((16 - inner[0]) // 2, (16 - inner[1]) // 2)
    assert make_view(Image.new("RGB", (1, 999)), View(8, fit="letterbox")).shape == (3, 8, 8)


def test_h_v_is_of_the_image_to_generate(published):
    views = published.views("reca")
    assert views.und is None and views.gen == View(16, fit="center_crop")
    published.config = replace(before := published.config, hv_blur=4)
    try:
        assert published.views("reca").und == View(16, fit="center_crop", blur=4)
    finally:
        published.config = before


# sequences


def test_an_empty_caption_leaves_the_colons(published):
    v, tokens = published.vocabulary, published.tokens
    colon = list(b":")
    assert prompt.caption(tokens, " \n", v) == [v.bos, *v.user, *colon, *v.assistant, *colon]
    before, _, asked = prompt.with_image(tokens, "  ", v, 3)
    assert asked.ids == [v.eoi, *b"\n\n", *v.assistant, *colon] and before.ids == [v.bos, *v.user, *b": ", v.boi]


def test_later_turns_and_what_is_learned_of_them(published):
    v = published.vocabulary
    turns = [Turn("what", " a cat "), Turn("why ", "")]
    _, _, said = prompt.conversation(published.tokens, turns, v, 3, "", 500)
    assert said.ids == [
        v.eoi, *b"\nwhat\n\n", *v.assistant, *b": a cat", v.eos, *v.user, *b": why\n\n", *v.assistant, *b":", v.eos,
    ]  # fmt: skip
    learned = [label for label in said.labels if label != -100]
    assert learned == [*b" a cat", v.eos, v.eos]


def test_long_texts_are_cut_to_the_context(published):
    published.config = replace(before := published.config, max_length=170)
    try:
        sample = batch_of(published, "t2i")
        sample.text = ["x" * 900] * 2
        layout = published.prepare(sample, CounterRNG(0)).layout
        assert layout.src.shape[1] == 170
        v, codes = published.vocabulary, published.image_tokens
        assert layout.src[0, -codes - 2 : -codes + 1].tolist() == [*v.assistant, *b":", v.boi]
        talk = batch_of(published, "i2t")
        talk.text = [[Turn("x" * 900, "a")], [Turn("x", "a" * 900)]]
        published.config = replace(published.config, system_prompt="")
        prepared = published.prepare(talk, CounterRNG(0))
        assert prepared.layout.src.shape[1] == 170 and prepared.weight > 0
    finally:
        published.config = before


@pytest.mark.parametrize("umm", ["janus", "janusflow"])
@pytest.mark.parametrize(("task", "least", "system"), [("reca", 43, 4), ("t2i", 31, 0), ("i2t", 19, 4)])
def test_a_context_without_room_for_a_text_is_refused(umm, task, least, system):
    """Frame, h_v and image are never cut, and no sequence is longer than the context, whatever its length.

    least: rows with one token of the text. system: those of a system prompt of two words.
    """
    model = load(umm)
    least += umm == "janusflow" and task != "i2t"  # the time has a row
    sample, config = batch(model, task, (0,)), model.config
    sample.text = [[Turn("", "a " * 90)] if task == "i2t" else "a " * 90]
    v = model.vocabulary
    parts = [[v.bos, *v.user, *model.tokens(":")], [*v.assistant, *model.tokens(":")], model.tokens("a")]
    parts += [] if task == "t2i" else [[v.eoi, *model.tokens("\n")]]
    for extra in range(2, 5) if task == "reca" else range(3):
        model.config = replace(config, max_length=least + extra)
        if task == "reca":  # templates are not cut, and two newlines follow them
            sample.text = ["a " * extra]
            with pytest.raises(ValueError, match=r"shorten it in data\.templates: 'a a"):
                model.prepare(sample, CounterRNG(0))
            sample.text = ["a " * (extra - 1)]
        row = model.prepare(sample, CounterRNG(0)).layout.src[0].tolist()
        assert len(row) == least + extra
        assert all(any(row[i : i + len(part)] == part for i in range(len(row))) for part in parts)
    for length in range(1, least):
        model.config = replace(config, max_length=length)
        with pytest.raises(ValueError, match=rf"model.max_length leaves .* raise it by at least {least - length}"):
            model.prepare(sample, CounterRNG(0))
    model.config = replace(config, max_length=least - 1, system_prompt="see this", reca_system_prompt="see this")
    with pytest.raises(ValueError, match=f"raise it by at least {1 + system}"):
        model.prepare(sample, CounterRNG(0))
    asked = {
        "reca": lambda: model.reconstruct(sample, [0]),
        "t2i": lambda: model.generate(["a"], [0]),
        "i2t": lambda: model.answer(images([(20, 20)]), ["a"], 1),
    }
    with pytest.raises(ValueError, match="model.max_length leaves"):
        asked[task]()


@pytest.mark.parametrize(("task", "key"), [("reca", "reca_drop"), ("t2i", "caption_drop")])
def test_dropped_conditions(published, task, key):
    """About as many as asked, seen but empty, of the same length; and what they were does not matter any more."""
    before = published.config
    v, codes = published.vocabulary, published.image_tokens
    try:
        published.config = replace(before, **{key: 0.25})
        many = batch_of(published, task, 400)
        layout = published.prepare(many, CounterRNG(5)).layout
        gone = (layout.src[:, 1:-codes] == v.pad).all(1)
        assert 70 < int(gone.sum()) < 130 and set(layout.lengths) == {layout.src.shape[1]}
        assert (layout.src[:, 0] == v.bos).all() and (layout.src[:, -codes] == v.boi).all()
        published.config = replace(before, **{key: 1.0})
        features = {"codes": torch.arange(2 * codes).view(2, codes) % 64}
        one, two = ({"h_v": torch.randn(2, published.hv_tokens, 64)} if task == "reca" else {} for _ in range(2))
        sums = [
            published(replace(batch_of(published, task), features=features | h_v, gen=None), CounterRNG(0)).sum
            for h_v in (one, two)
        ]
        assert torch.equal(*sums)
        published.config = replace(before, **{key: 0.0})
        layout = published.prepare(many, CounterRNG(5)).layout
        assert not (layout.src == v.pad).any()
    finally:
        published.config = before


# sampling


@torch.no_grad()
def test_the_cache_gives_what_a_whole_pass_gives():
    """Prompts of different lengths, each code of the likeliest by one pass over everything before it."""
    model = shared("janus")
    v, texts = model.vocabulary, ["a red square", "a"]
    ids = [[*prompt.caption(model.tokens, text, v), v.boi] for text in texts]
    codes = sampling.sample_codes(model, ids, sampling.SamplerNoise(torch.arange(2)), guidance=3.0, temperature=0)
    for row, own in zip(codes, ids, strict=True):
        empty = [v.bos, *[v.pad] * (len(own) - 2), v.boi]
        layout = prompt.layout([[prompt.TextSegment(p), prompt.VisualSegment(len(row) - 1)] for p in (own, empty)], v)
        hidden = model.hidden(layout, model.embed_codes(row[None, :-1]).expand(2, -1, -1))[:, -len(row) :]
        cond, uncond = model.gen_head(hidden)
        assert torch.equal((uncond + 3 * (cond - uncond)).argmax(-1), row)


def test_options_of_the_sampler():
    model = shared("janus")
    draw = lambda **options: model.generate(["a red square"], [3], **options)[0]  # noqa: E731
    assert torch.equal(draw(temperature=0), model.generate(["a red square"], [4], temperature=0)[0])
    assert not torch.equal(draw(), draw(guidance=1.0)) and not torch.equal(draw(), draw(temperature=0.1))


def test_draws_follow_the_probabilities():
    p = torch.tensor([[0.5, 0.0, 0.25, 0.25]])
    found = sampling.inverse_cdf(p.expand(4, -1), torch.tensor([0.0, 0.49, 0.5, 0.9999]))
    assert found.tolist() == [0, 0, 2, 3]
    noise = sampling.SamplerNoise(torch.arange(4000))
    shares = torch.bincount(noise.code(3, p.expand(4000, -1)), minlength=4) / 4000
    torch.testing.assert_close(shares, p[0], rtol=0, atol=0.03)
    assert torch.equal(noise.code(3, p.expand(4000, -1)), noise.code(3, p.expand(4000, -1)))
    assert not torch.equal(noise.code(3, p.expand(4000, -1)), noise.code(4, p.expand(4000, -1)))


def test_codes_do_not_depend_on_the_length_of_a_row(published):
    """Rows of the codebook count at length 1: stored longer, they find and draw the same."""
    pixels, quantizer = torch.rand(2, 3, 16, 16) * 2 - 1, published.gen_vision_model.quantize
    codes = published.gen_vision_model.encode(pixels)
    drawn, rows = published.gen_vision_model.decode(codes), quantizer.embedding.weight.data.clone()
    try:
        quantizer.embedding.weight.data.mul_(torch.rand(len(rows), 1) + 0.5)
        assert torch.equal(published.gen_vision_model.encode(pixels), codes)
        torch.testing.assert_close(published.gen_vision_model.decode(codes), drawn, rtol=0, atol=1e-5)
    finally:
        quantizer.embedding.weight.data.copy_(rows)


def test_the_first_code_is_learned_and_the_last_has_no_row():
    """A trainer that shifts the codes' own rows would never teach the first one."""
    model = shared("janus")
    sample = batch(model, "reca", (0, 1))
    features = model.encode(sample)
    codes, entries = features["codes"], model.gen_vision_model.entries
    term = lambda changed: model(replace(sample, features=features | {"codes": changed}), CounterRNG(1)).sum  # noqa: E731
    first, last = codes.clone(), codes.clone()
    first[:, 0] = (first[:, 0] + 1) % entries
    last[:, -1] = (last[:, -1] + 1) % entries
    assert term(first) != term(codes) and term(last) != term(codes)
    layout = model.prepare(sample, CounterRNG(1)).layout
    with torch.no_grad():
        hidden = model.hidden(layout, features["h_v"], model.embed_codes(codes[:, :-1]))[:, -codes.shape[1] :]
        wanted = F.cross_entropy(model.gen_head(hidden).flatten(0, 1), last.flatten(), reduction="sum")
    torch.testing.assert_close(term(last).detach(), wanted)


def test_images_of_any_size_are_answered():
    model = shared("janus")
    assert len(model.answer(images([(20, 20), (3, 90), (200, 7)]), ["what"] * 3, max_new_tokens=2)) == 3
