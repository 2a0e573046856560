"""OpenUni's adapter beyond the golden data: sizes, files, batching, learning, sampling, kernels, bad input."""

import copy
import shutil
from contextlib import nullcontext
from dataclasses import fields, replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from reca import objective
from reca.config.recipe import ObjectiveConfig
from reca.config.recipe_files import load_recipe
from reca.data.batch import Batch
from reca.data.tasks import Turn
from reca.data.transforms import make_view
from reca.models.common import planned
from reca.models.common.images import fit_to_view
from reca.models.common.qwen2 import Qwen2Sizes
from reca.models.common.tiny_tokenizer import word_tokenizer
from reca.models.open_uni import Adapter, Config, loss, modules, prompt, weights
from reca.models.open_uni.config import AutoencoderSizes, ConnectorSizes, SanaSizes
from reca.optim import freeze
from reca.precision import KeepDouble
from reca.rng import CounterRNG

WORDS = "user assistant Generate an image Keep the as it is : . \n a red blue square describe this".split(" ")
TEXTS = {
    "reca": ["describe this", "describe the image as it is .", "a red square", "image"],
    "t2i": ["a red square", "a blue square", "a square", "a"],
    "i2t": [[Turn("describe this", "a red square")], [Turn("is this a square", "a"), Turn("describe", "it is blue")]]
    * 2,
}


def config(**changes) -> Config:
    """The tiny recipe's model with a DC-AE, as the published one has, and the words here."""
    sizes = AutoencoderSizes(8, 8, ["ResBlock", "EfficientViTBlock"], [8, 16], [1, 1], [1, 1])
    model = replace(load_recipe("open_uni_tiny").model, codec="dc_ae", autoencoder=sizes, words=WORDS)
    return replace(model, **changes)


@pytest.fixture(scope="module")
def model():
    return Adapter.load(config())


def test_every_codec_has_the_size_and_channels_that_its_sizes_say():
    """The recipe's choices are those of the table; what SANA is built for is what the codec makes of an image."""
    key = next(field for field in fields(Config) if field.name == "codec")
    assert tuple(modules.CODECS) == key.metadata["choices"]
    for name in modules.CODECS:
        made = config(codec=name)
        sizes, codec = modules.codec_sizes(made), modules.codec(made)
        latents = codec.encode(torch.zeros(1, 3, 8, 16))
        latents = latents.latent if name == "dc_ae" else latents
        assert latents.shape == (1, sizes.channels, 8 // sizes.size, 16 // sizes.size), name
        assert modules.transformer(made).config.in_channels == sizes.channels, name


def images(n: int, size: int) -> list[torch.Tensor]:
    return list(
        torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    )


def batch(model, task: str, rows=(0, 1, 2, 3)) -> Batch:
    views = model.views(task)
    gen, und = (view and [images(4, view.size)[row] for row in rows] for view in (views.gen, views.und))
    return Batch(task, torch.tensor(rows) + 7, [TEXTS[task][row] for row in rows], gen=gen, und=und)


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# sizes


class PublishedTokenizer:
    def convert_tokens_to_ids(self, token: str) -> int:
        return 151667


SIZES = {
    "open_uni_l_512": (2_088_957_440, 221_910_528, 3_541_248, 393_216, 1_604_462_752),
    "open_uni_b_512": (938_193_024, 52_364_544, 2_066_688, 229_376, 591_747_872),
}


@pytest.mark.parametrize("recipe", SIZES)
def test_published_sizes(recipe):
    with torch.device("meta"):
        model = Adapter(load_recipe(recipe).model, PublishedTokenizer())
    parts = (
        count(model.mllm),
        count(model.connector),
        count(model.projector),
        model.meta_queries.numel(),
        count(model.transformer),
    )
    assert parts == SIZES[recipe]
    assert count(model.codec) == 312_250_275
    assert model.codec.config.scaling_factor == 0.41407
    names = set(model.state_dict())
    assert {n for n in names if n.startswith("connector.layers.0.")} == {
        f"connector.layers.0.{n}.{task}"
        for n in (
            "layer_norm1",
            "layer_norm2",
            "mlp.fc1",
            "mlp.fc2",
            *(f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")),
        )
        for task in ("weight", "bias")
    }
    assert {"meta_queries", "projector.weight", "transformer.transformer_blocks.0.attn1.to_q.weight"} <= names


def test_sana_1_5_has_query_and_key_norms():
    with torch.device("meta"):
        model = Adapter(Config(sana=SanaSizes(qk_norm="rms_norm_across_heads")), PublishedTokenizer())
    assert count(model.transformer) == 1_604_641_952


# losses


def test_captions_are_dropped_for_some_samples_and_templates_never(model):
    ids = torch.arange(400)
    t2i = loss.sample_prompts(model, Batch("t2i", ids, ["a red square"] * 400), CounterRNG(0))
    empty = prompt.caption(model.tokenizer, None)
    assert 20 < sum(row == empty for row in t2i) < 65
    reca = loss.sample_prompts(model, Batch("reca", ids, ["describe this"] * 400), CounterRNG(0))
    assert all(row == reca[0] for row in reca)


@pytest.mark.parametrize(("share", "dropped"), [(0.0, 0), (1.0, 4)])
def test_the_share_of_dropped_captions_is_a_key(model, monkeypatch, share, dropped):
    monkeypatch.setattr(model, "config", replace(model.config, caption_drop=share))
    prompts = loss.sample_prompts(model, Batch("t2i", torch.arange(4), TEXTS["t2i"]), CounterRNG(0))
    assert sum(made == prompt.caption(model.tokenizer, None) for made in prompts) == dropped


def test_the_prompt_runs_without_a_graph(model):
    """Only the queries' pass may keep activations of the language model."""
    freeze(model, None)
    graphs = []
    hook = model.mllm.model.language_model.register_forward_hook(
        lambda *_, out=None: graphs.append(_[-1].last_hidden_state.requires_grad)
    )
    model(batch(model, "reca"), CounterRNG(0))
    hook.remove()
    assert graphs == [False, True]


def test_parity_adds_noise_at_a_level_of_bf16(model, monkeypatch):
    """The velocity's target and SANA's timestep keep theirs, as in the release."""
    levels, kernel = [], loss.flow_matching_add_noise
    monkeypatch.setattr(loss, "flow_matching_add_noise", lambda x, t, eps: (levels.append(t), kernel(x, t, eps))[1])
    for parity in (False, True):
        monkeypatch.setattr(model, "config", replace(model.config, parity=parity))
        model(batch(model, "t2i"), CounterRNG(0))
    assert torch.equal(levels[1], levels[0].bfloat16().float()) and not torch.equal(*levels)


def test_guidance_is_away_from_no_text_and_in_edits_from_the_same_image(model, monkeypatch):
    kept, pixels = [], model.pixels
    monkeypatch.setattr(model, "pixels", lambda latents: (kept.append(latents), pixels(latents))[1])

    def moved(draw, text: str) -> float:
        for guidance in (1.0, 6.0):
            draw(text, steps=2, guidance=guidance)
        return float((kept[-1] - kept[-2]).abs().max() / kept[-2].abs().max())

    def edited(text: str, **options):
        return model.edit([torch.full((3, 20, 20), 90, dtype=torch.uint8)], [text], [0], **options)

    assert moved(lambda text, **options: model.generate([text], [0], **options), "a red square") > 1e-2
    assert moved(edited, "a red square") > 1e-2 and moved(edited, prompt.KEEP) < 1e-4


def test_the_unconditional_branch_runs_with_guidance_only(model, monkeypatch):
    read, condition = [], model.condition
    monkeypatch.setattr(
        model, "condition", lambda layout, h_v: (read.append(len(layout.src)), condition(layout, h_v))[1]
    )
    for guidance, rows in ((4.5, [2, 1]), (1.0, [2]), (0.0, [2])):  # the request without a caption is read once
        read.clear()
        model.generate(["a red square", "a"], [0, 1], steps=1, guidance=guidance)
        assert read == rows
    read.clear()
    model.reconstruct(batch(model, "reca", (0, 1, 2)), [0, 1, 2], steps=1)
    assert read == [3]


@pytest.mark.parametrize("task", ["reca", "t2i", "i2t"])
def test_a_language_model_that_is_trained_gets_all_of_its_gradient(task):
    """That of the prompt's rows too, and token embeddings: against differences of the loss in fp64."""
    model = Adapter.load(config()).double()
    freeze(model, ["und_lm", "embed", "bridge", "gen_head"])
    generator = torch.Generator().manual_seed(0)
    with KeepDouble():
        given = batch(model, task)
        given = replace(given, features=model.encode(given))
        model(given, CounterRNG(0)).sum.backward()
        for part in ("mllm.model.language_model.layers.", "mllm.model.language_model.embed_tokens."):
            parameters = [p for name, p in model.named_parameters() if name.startswith(part)]
            ways = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
            slope, sums = sum((p.grad * way).sum() for p, way in zip(parameters, ways, strict=True)), []
            for step in (1e-6, -2e-6):
                for p, way in zip(parameters, ways, strict=True):
                    p.data += step * way
                sums.append(model(given, CounterRNG(0)).sum.item())
            assert slope.item() == pytest.approx((sums[0] - sums[1]) / 2e-6, rel=1e-2), part


# sampling


def test_sizes_of_images(model):
    assert model.generate(["a"], [0], steps=1, height=32, width=64)[0].shape == (3, 32, 64)
    with pytest.raises(ValueError, match="multiples of 2, got 33 x 20"):
        model.generate(["a"], [0], steps=1, height=33)


@pytest.mark.parametrize("codec", modules.CODECS)
def test_the_codec_is_fp32_in_both_directions(codec):
    """Whatever autocast says: drawing runs in it where InternVL3 is bf16."""
    model = Adapter.load(config(codec=codec))
    latents = model.latents(torch.stack(images(2, 16)).float() / 127.5 - 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.latents(torch.stack(images(2, 16)).float() / 127.5 - 1), latents)
        inside = model.pixels(latents)
    assert torch.equal(inside, model.pixels(latents)) and inside.dtype == torch.float32


# files


def test_export_and_overlay(model, tmp_path):
    model.export(tmp_path)
    state = torch.load(tmp_path / "open_uni.pth")
    assert {name.split(".")[0] for name in state} == {"connector", "projector", "meta_queries", "transformer"}
    other = Adapter.load(config(seed=1))
    weights.assign_published(other, state, "open_uni.pth")
    for name, tensor in state.items():
        assert torch.equal(other.state_dict()[name], tensor), name
    weights.assign_published(other, {name: tensor.bfloat16() for name, tensor in state.items()}, "half.pth")
    for name, tensor in state.items():  # what learns is kept in fp32 whatever the file holds
        assert other.state_dict()[name].dtype == torch.float32
        assert torch.equal(other.state_dict()[name], tensor.bfloat16().float()), name


def test_partial_files_are_laid_over_each_other_and_reported(model, tmp_path):
    model.export(tmp_path / "whole")
    whole = torch.load(tmp_path / "whole" / "open_uni.pth")
    base = {n: t for n, t in whole.items() if not n.startswith("transformer.")}
    delta = {"meta_queries": whole["meta_queries"] + 1}
    torch.save({"state_dict": base}, tmp_path / "base.pth")
    torch.save(delta, tmp_path / "delta.pth")
    merged, report = weights.overlay([tmp_path / "base.pth", tmp_path / "delta.pth"])
    assert torch.equal(merged["meta_queries"], delta["meta_queries"]) and merged.keys() == base.keys()
    assert (
        "1 tensors of meta_queries" in report[1]
        and "tensors of connector" in report[0]
        and "transformer" not in report[0]
    )
    with pytest.raises(ValueError, match="contains no connector, projector"):
        weights.overlay([tmp_path / "delta.pth"])
    torch.save(base | {"showo.lm_head.weight": torch.zeros(1)}, tmp_path / "foreign.pth")
    with pytest.raises(ValueError, match="not an OpenUni file.*showo.lm_head.weight"):
        weights.overlay([tmp_path / "foreign.pth"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("connector.layers.0.mlp.fc1.bias"), "1 missing: layers.0.mlp.fc1.bias"),
        (lambda s: s.update({"projector.extra": torch.zeros(1)}), "1 unexpected: extra"),
        (lambda s: s.update({"projector.bias": torch.zeros(3)}), r"with another shape: bias: file \(3,\)"),
        (lambda s: s.update({"meta_queries": torch.zeros(2, 64)}), r"meta_queries is \[2, 64\], expected \[8, 64\]"),
    ],
)
def test_files_that_do_not_fit(model, change, words):
    state = {n: t for n, t in model.state_dict().items() if n.startswith(weights.TRAINED)}
    change(state)
    with pytest.raises(ValueError, match=words):
        weights.assign_published(Adapter.load(config()), state, "file.pth")


def test_parts_come_together_or_not_at_all():
    with pytest.raises(ValueError, match="model.overlay needs model.weights, which is null"):
        Adapter.load(config(overlay="reca.pth"))  # without the check, a random model
    with pytest.raises(ValueError, match="model.mllm is null but other parts are given"):
        Adapter.load(config(weights="somewhere.pth"))


def test_original_and_native_names_of_internvl(model):
    native_state = model.mllm.state_dict()
    assert weights.mllm_native(native_state).keys() == native_state.keys()


def test_wrong_head_count_says_so():
    with pytest.raises(ValueError):
        Adapter.load(config(language=Qwen2Sizes(50, 2, 4, 2, 96, 512), connector=ConnectorSizes(2, 3, 96)))


def test_a_blur_reaches_h_v_and_not_the_target():
    plain, blurred = (Adapter.load(config(hv_blur=blur)) for blur in (1, 4))
    image = Image.fromarray(images(1, 64)[0].permute(1, 2, 0).numpy())
    features = []
    for model in (plain, blurred):
        gen, und = (view and [make_view(image, view)] for view in (model.views("reca").gen, model.views("reca").und))
        features.append(model.encode(Batch("reca", torch.tensor([0]), ["look"], gen=gen, und=und)))
    assert torch.equal(features[0]["latents"], features[1]["latents"])
    assert not torch.allclose(features[0]["h_v"], features[1]["h_v"], atol=1e-3)
    assert blurred.views("t2i").und is None and plain.views("reca").und is None


def test_a_random_model_exports_and_loads(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    model.export(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["frozen.safetensors", "open_uni.pth"]
    for source in (tmp_path, tmp_path / "open_uni.pth", f"~/{tmp_path.name}"):
        again = Adapter.load(config(weights=str(source), seed=7))
        assert again.state_dict().keys() == model.state_dict().keys()
        for name, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name


def test_an_export_without_its_file_says_so(model, tmp_path):
    """The frozen parts beside it are not OpenUni's file."""
    model.export(tmp_path)
    (tmp_path / "open_uni.pth").rename(tmp_path / "open_uni.pth.incomplete")
    with pytest.raises(ValueError, match="contains no weight file"):
        Adapter.load(config(weights=str(tmp_path)))


@pytest.mark.parametrize(("key", "size", "unit"), [("image_size", 33, 2), ("understanding_size", 57, 8)])
def test_sizes_that_are_not_whole_tokens(key, size, unit):
    with pytest.raises(ValueError, match=f"model.{key} is {size} pixels; it must be a positive multiple of {unit}"):
        Adapter.load(config(**{key: size}))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A tiny model in the folders of its four parts, as they are published, and the recipe that names them."""
    folder = tmp_path_factory.mktemp("published")
    sizes = AutoencoderSizes(8, 8, ["ResBlock"] * 2, [8, 16], [1, 1], [1, 1])
    given = config(codec="dc_ae", autoencoder=sizes, image_size=16)
    torch.manual_seed(0)
    model = Adapter(given, word_tokenizer(WORDS, prompt.SPECIAL_TOKENS))
    model.transformer.save_pretrained(folder / "dit" / "transformer")
    model.codec.save_pretrained(folder / "vae")
    (folder / "mllm").mkdir()
    save_file(model.mllm.state_dict(), folder / "mllm" / "model.safetensors")
    model.tokenizer.save_pretrained(folder / "mllm")
    trained = {name: t for name, t in model.state_dict().items() if name.startswith(weights.REQUIRED)}
    torch.save(trained, folder / "open_uni.pth")
    parts = {"mllm": str(folder / "mllm"), "dit": str(folder / "dit"), "codec_weights": str(folder / "vae")}
    return model, folder, replace(given, weights=str(folder / "open_uni.pth"), **parts)


def test_a_tokenizer_without_a_control_token_is_refused(published, tmp_path):
    word_tokenizer(WORDS, prompt.SPECIAL_TOKENS[:-1]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"the tokenizer lacks {prompt.CONTEXT}; OpenUni needs"):
        Adapter.load(replace(published[2], tokenizer=str(tmp_path)))


def test_internvl3_in_the_type_of_its_files(published, tmp_path):
    """Its files are in bf16, the trained parts are fp32: all of it runs outside of training's autocast, too."""
    model, folder, given = published
    shutil.copytree(folder / "mllm", tmp_path / "mllm")
    half = {name: tensor.bfloat16() for name, tensor in model.mllm.state_dict().items()}
    save_file(half, tmp_path / "mllm" / "model.safetensors")
    mixed = Adapter.load(replace(given, mllm=str(tmp_path / "mllm")))
    assert (mixed.mllm.dtype, mixed.meta_queries.dtype) == (torch.bfloat16, torch.float32)
    image = torch.randint(0, 256, (3, 24, 20), dtype=torch.uint8)
    batch = Batch("reca", torch.tensor([3]), ["a"], [fit_to_view(image, mixed.views("reca").gen)])
    drawn = [
        *mixed.generate(["a"], [0], steps=2),
        *mixed.edit([image], ["a"], [0], steps=2),
        *mixed.reconstruct(batch, [0], steps=2),
    ]
    assert [tuple(x.shape) for x in drawn] == [(3, 16, 16)] * 3
    with torch.autocast("cpu", torch.bfloat16):  # as an evaluation in training draws
        assert torch.equal(mixed.generate(["a"], [0], steps=2)[0], drawn[0])
    assert len(mixed.answer([image], ["a"], 2)) == 1
    term = mixed(batch, CounterRNG(0))
    (term.sum / term.weight).backward()
    assert mixed.meta_queries.grad.dtype == torch.float32 and mixed.meta_queries.grad.abs().sum() > 0
    whole = model(batch, CounterRNG(0))
    assert (term.sum / term.weight).item() == pytest.approx((whole.sum / whole.weight).item(), rel=0.02)


def test_answers_in_bf16_need_no_autocast(published, monkeypatch):
    """They run InternVL3 alone: logits are the same bits inside of autocast, where likelihoods are computed."""
    mixed, logits, decode = copy.deepcopy(published[0]), [], planned.greedy_tokens
    mixed.mllm.bfloat16()

    def recorded(next_logits, *args):
        return decode(lambda last: logits.append(next_logits(last)) or logits[-1], *args)

    monkeypatch.setattr(planned, "greedy_tokens", recorded)
    image = torch.randint(0, 256, (3, 24, 20), dtype=torch.uint8)
    replies = mixed.answer([image], ["a"], 3)
    count = len(logits)
    with mixed.inference_autocast():
        assert torch.is_autocast_enabled("cpu") and mixed.answer([image], ["a"], 3) == replies
    assert logits[0].dtype == torch.bfloat16 and len(logits) == 2 * count
    assert torch.equal(torch.stack(logits[:count]), torch.stack(logits[count:]))


def test_internvl3_as_transformers_writes_it(published, tmp_path):
    model, folder, given = published
    shutil.copytree(folder / "mllm", tmp_path / "mllm")
    (tmp_path / "mllm" / "model.safetensors").unlink()
    model.mllm.save_pretrained(tmp_path / "mllm")
    again = Adapter.load(replace(given, mllm=str(tmp_path / "mllm")))
    for name, tensor in model.mllm.state_dict().items():
        assert torch.equal(again.mllm.state_dict()[name], tensor), name


def test_a_smaller_image_for_understanding(published):
    """The published table of positions stays as it is, and is interpolated."""
    model, _, given = published
    small = Adapter.load(replace(given, understanding_size=16))
    table = "mllm.model.vision_tower.embeddings.position_embeddings"
    assert torch.equal(small.state_dict()[table], model.state_dict()[table])
    h_v = small.encode_understanding(torch.rand(2, 3, 16, 16) * 2 - 1)
    assert tuple(h_v.shape) == (2, small.sequence()["h_v"], given.language.hidden_size) and h_v.shape[1] == 4


def test_the_four_published_parts(published):
    model, _, given = published
    again = Adapter.load(given)
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert again.transformer.config.num_layers == model.transformer.config.num_layers
    assert not any(p.is_meta for p in [*again.parameters(), *again.buffers()])


def test_a_language_model_that_was_trained_is_exported(published, tmp_path):
    """InternVL3 is published apart, so its file has nothing of what a run has changed."""
    _, _, given = published
    model = Adapter.load(given)
    model.export(tmp_path / "as_published")
    assert not any(name.startswith("lmm.") for name in torch.load(tmp_path / "as_published" / "open_uni.pth"))
    roles = model.roles()
    model.inherited = frozenset(name for name, role in roles.items() if role in ("und_lm", "embed"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += float(name in model.inherited)
    model.export(tmp_path)
    names = torch.load(tmp_path / "open_uni.pth").keys()
    assert {"lmm.language_model.lm_head.weight", "lmm.language_model.model.embed_tokens.weight"} <= names
    again = Adapter.load(replace(given, weights=str(tmp_path))).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again[name], tensor), name


@pytest.mark.parametrize(
    "part", ["mllm/model", "dit/transformer/diffusion_pytorch_model", "vae/diffusion_pytorch_model"]
)
def test_a_published_part_that_is_damaged(published, part):
    _, folder, given = published
    path = folder / f"{part}.safetensors"
    whole = path.read_bytes()
    try:
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
        with pytest.raises(ValueError, match=rf"{path} \(43 bytes\) is a Git LFS pointer"):
            Adapter.load(given)
        state = load_file(path) if path.write_bytes(whole) else {}
        state.pop(next(iter(state)))
        save_file(state, path)
        with pytest.raises(ValueError, match="1 missing"):
            Adapter.load(given)
    finally:
        path.write_bytes(whole)


def test_the_mean_over_the_batch_is_the_release_mean():
    """Every image weighs the same, so how an update is split into micro-batches changes nothing."""
    model = Adapter.load(config())
    freeze(model, None)
    batches = {"reca": [batch(model, "reca", (0, 1, 2)), batch(model, "reca", (3,))]}
    gradients = []
    for mean in ("batch", "micro_batch"):
        model.zero_grad()
        objective.backward(model, batches, ObjectiveConfig(mean=mean), 0, nullcontext())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert gradients[0].any() and torch.equal(*gradients)
