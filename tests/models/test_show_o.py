"""Show-o's adapter beyond the golden data: sizes, batching, sampling, bad input."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.activations import ACT2FN
from transformers.models.phi.modeling_phi import PhiMLP

from reca.config.recipe_files import load_recipe
from reca.data.batch import Batch
from reca.data.tasks import Turn
from reca.data.transforms import make_view
from reca.models.common.planned import CachedPrompts
from reca.models.common.text import encode
from reca.models.common.tiny_tokenizer import word_tokenizer
from reca.models.show_o import Adapter, Config, loss, prompt, sampling
from reca.models.show_o.conditioner import conditioner
from reca.models.show_o.config import MagvitSizes, PhiSizes
from reca.models.show_o.modules import Magvit, phi_config
from reca.rng import CounterRNG
from tests.models.contract import TEXTS

WORDS = "a red blue square circle describe what is this the picture ? . drawn with care".split()
VARIANTS = {
    "clip": {},
    "parity": {"parity": True},
    "vq": {"understanding": "vq", "hv_down_scale": 1},
    "blur": {"understanding": "vq", "hv_down_scale": 2, "hv_resize_back": True},
    "codes as h_v": {"hv_source": "vq", "hv_down_scale": 1},
}


def tiny() -> Config:
    """The tiny recipe's model with other budgets, and everything else by default."""
    keys = {"max_text_tokens": 24, "max_prompt_tokens": 24, "max_reca_tokens": 64, "clip_norm": "null", "words": "[]"}
    recipe = load_recipe("show_o_tiny", [f"model.{key}={value}" for key, value in keys.items()])
    return replace(recipe.model, phi=replace(recipe.model.phi, max_position_embeddings=128))


def config(**changes) -> Config:
    return replace(tiny(), words=WORDS, **changes)


@pytest.fixture(scope="module", params=VARIANTS)
def model(request):
    return Adapter.load(config(**VARIANTS[request.param]))


def images(n: int, size: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator))


def batch(model, task: str, rows: list[int] = (0, 1, 2, 3)) -> Batch:
    views = model.views(task)
    gen, und = (view and [images(4, view.size)[row] for row in rows] for view in (views.gen, views.und))
    return Batch(task, torch.tensor(rows) + 7, [TEXTS[task][row] for row in rows], gen=gen, und=und)


# sizes


class PublishedTokenizer:
    """The size of Phi-1.5's vocabulary with Show-o's tokens, and nothing else of it."""

    def __init__(self, text_tokens: int = 50295):
        words = [f"word {i}" for i in range(text_tokens)]
        words[50256] = prompt.END_OF_TEXT
        self.ids = {word: i for i, word in enumerate([*words, *prompt.SPECIAL_TOKENS])}

    def get_vocab(self):
        return self.ids

    def __len__(self):
        return len(self.ids)


@pytest.mark.parametrize("clip", [True, False])
def test_published_sizes(clip):
    with torch.device("meta"):
        model = Adapter(Config(understanding="clip" if clip else "vq"), PublishedTokenizer())
    v = model.vocabulary
    assert (v.pad, v.soi, v.eoi, v.t2i, v.mmu, v.offset, v.mask) == (50295, 50296, 50297, 50300, 50301, 50305, 58497)
    language = model.showo.state_dict(prefix="showo.")
    assert len(language) == 437
    assert sum(p.numel() for p in model.showo.parameters()) == 1_448_176_770
    assert language["showo.lm_head.bias"].shape == (58498,)
    assert language["showo.model.layers.23.self_attn.k_layernorm.bias"].shape == (64,)
    assert model.image_tokens == 1024
    assert sum(t.numel() for t in model.codec.state_dict().values()) == 95_493_513
    assert hasattr(model, "clip") == clip
    if clip:
        bridge = model.mm_projector.state_dict(prefix="mm_projector.")
        assert set(bridge) == {f"mm_projector.{i}.{task}" for i in (0, 2) for task in ("weight", "bias")}
        assert sum(t.numel() for t in bridge.values()) == 6_295_552
        assert conditioner(model, "i2t").tokens() == 576
        assert conditioner(model, "i2t").conversation_budget(28) == 996


def test_magvit_keys():
    with torch.device("meta"):
        names = Magvit(MagvitSizes()).state_dict()
    assert names["quantize.embedding"].shape == (8192, 13)
    assert names["quantize.power_vals"].dtype == torch.int64
    assert names["encoder.down.1.block.0.nin_shortcut.weight"].shape == (256, 128, 1, 1)
    assert "encoder.down.3.downsample.conv.weight" in names and "encoder.down.4.downsample.conv.weight" not in names
    assert "decoder.up.1.upsample.conv.weight" in names and "decoder.up.0.upsample.conv.weight" not in names
    assert names["decoder.up.4.upsample.conv.weight"].shape == (512, 512, 3, 3)


# losses


def test_a_conversation_without_room_for_its_answer_has_no_weight():
    model = Adapter.load(config(max_text_tokens=6, understanding="vq", hv_down_scale=1))
    sample = Batch("i2t", torch.tensor([0]), [[Turn("what is this picture?", "a square")]], und=images(1, 20))
    term = model(sample, CounterRNG(0))
    assert term.weight == 0 and term.sum == 0 and model.prepare(sample, CounterRNG(0)).weight == 0
    term.sum.backward()


def test_conversation_text():
    tokenizer = word_tokenizer([*WORDS, *prompt.WORDS], [prompt.END_OF_TEXT, *prompt.SPECIAL_TOKENS])
    v = prompt.Vocabulary.of(tokenizer, 4)
    tokens = lambda text: encode(tokenizer, text)  # noqa: E731
    turns = [Turn("what is this?", "a square"), Turn("describe", "red.")]
    ids, labels = prompt.conversation(tokens, turns, v)
    assert tokenizer.decode(ids) == (
        "USER : what is this ? ASSISTANT : a square <|endoftext|> USER : describe ASSISTANT : red . <|endoftext|>"
    )
    assert tokenizer.decode([i for i in labels if i >= 0]) == "a square <|endoftext|> red . <|endoftext|>"
    assert [i for i, label in zip(ids, labels, strict=True) if label >= 0] == [i for i in labels if i >= 0]


@pytest.mark.parametrize("number", [14, 40])
def test_a_tokenizer_whose_ids_have_gaps_is_refused(tmp_path, number):
    """Show-o's tokens get the ids behind the number of other tokens, and image codes those behind."""
    word_tokenizer(["a", "square", *prompt.WORDS], [prompt.END_OF_TEXT]).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["vocab"]["square"] = number
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"18 tokens, with 1[78] ids up to {max(number, 17)}; Show-o's image codes"):
        Adapter.load(config(tokenizer=str(tmp_path)))


def test_captions_are_dropped_at_the_configured_rate(monkeypatch):
    model = Adapter.load(config(caption_drop=1.0))
    sample = batch(model, "t2i")
    empty = replace(sample, text=[""] * 4)
    assert torch.equal(model(sample, CounterRNG(0)).sum, model(empty, CounterRNG(0)).sum)
    model.config = replace(model.config, caption_drop=0.0)
    assert not torch.equal(model(sample, CounterRNG(0)).sum, model(empty, CounterRNG(0)).sum)


def test_padding_that_is_left_out_changes_no_number(monkeypatch):
    net = Adapter.load(config())
    v = net.vocabulary
    samples = [prompt.t2i(net.tokens("a red square " * n), v, 24, net.image_tokens) for n in (1, 5, 2)]
    layout = prompt.layout(samples, v)
    filled = layout.places()
    assert len(filled) == sum(run.length for runs in layout.runs for run in runs if run.mode != "pad")
    assert torch.equal(layout.src.flatten()[filled] != v.pad, torch.ones(len(filled), dtype=torch.bool))

    def run() -> list[torch.Tensor]:
        net.zero_grad()
        hidden = net.hidden(layout)
        rows = hidden.flatten(0, 1)[filled]
        rows.square().sum().backward()
        assert hidden.shape[:2] == layout.src.shape
        return [rows.detach(), *(p.grad for p in net.showo.model.layers.parameters())]

    packed = run()
    monkeypatch.setattr(prompt.Layout, "places", lambda layout: None)
    for ours, padded in zip(packed, run(), strict=True):
        torch.testing.assert_close(ours, padded, rtol=2e-4, atol=2e-5)


def test_which_parameters_the_prompt_of_reca_teaches():
    for given, reached in (({}, True), ({"parity": True}, False), ({"parity": True, "prompt_gradient": True}, True)):
        model = Adapter.load(config(**given))
        term = model(batch(model, "reca"), CounterRNG(0))
        term.sum.backward()
        assert (model.mm_projector[0].weight.grad is not None) == reached
        assert (model.showo.model.embed_tokens.weight.grad is not None) == reached
        assert model.showo.lm_head.weight.grad is not None
        assert all(p.grad is None for n, p in model.named_parameters() if model.roles()[n] in ("codec", "und_encoder"))


def test_clip_norms_differ():
    model = Adapter.load(config())
    pixels = torch.stack(images(1, 20)).float() / 127.5 - 1
    clip = conditioner(model, "reca").reca_pixels(pixels)
    model.config = replace(model.config, clip_norm="upstream")
    upstream = conditioner(model, "reca").reca_pixels(pixels)
    assert clip.shape == upstream.shape == (1, 3, 18, 18)
    assert upstream.abs().max() <= 1 < clip.abs().max()


def test_roles_and_decay():
    model = Adapter.load(config(codec="magvitv2", magvit=MagvitSizes(32, [1, 1, 1], [1] * 3, [1, 1, 1], [1] * 3, 4)))
    roles = model.roles()
    assert set(roles) == {name for name, _ in model.named_parameters()}
    assert set(roles.values()) == {"shared_lm", "embed", "bridge", "und_encoder", "codec"}
    gain = "showo.model.layers.0.input_layernorm.weight"
    parameters = dict(model.named_parameters())
    assert not model.decays(gain, parameters[gain])
    model.config = replace(model.config, parity=True)
    assert model.decays(gain, parameters[gain])
    assert not model.decays("showo.lm_head.bias", parameters["showo.lm_head.bias"])
    assert len(model.blocks()) == 3


@pytest.mark.parametrize(
    "given, said",
    [
        ({"understanding": "vq", "hv_down_scale": 1}, ["full resolution"]),
        ({"understanding": "vq", "hv_down_scale": 2, "hv_resize_back": True}, []),
        ({"understanding": "vq", "hv_down_scale": 2, "hv_resize_back": True, "max_text_tokens": 80}, ["extrapolated"]),
        ({}, []),
    ],
)
def test_hazards(given, said):
    found = Adapter.load(config(**given)).config_warnings()
    assert len(found) == len(said) and all(text in warning for text, warning in zip(said, found, strict=True))


# inference


SAMPLING = {"steps": 6, "guidance": 2.0}


def test_sampling_options(model):
    text, seed = ["a red square"], [1]
    assert len(model.generate(text, seed, steps=1, guidance=0.0)) == 1
    with pytest.raises(ValueError, match="steps=0"):
        model.generate(text, seed, steps=0)
    with pytest.raises(ValueError, match="1 prompts, 2 seeds"):
        model.generate(text, [1, 2])
    assert model.generate([], []) == []


def test_the_prompt_runs_once(model):
    """And every step the image, with soi and eoi."""
    seen, n = [], model.image_tokens + 2
    hook = model.blocks()[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2].numel()))
    try:
        model.generate(["a red square"], [1], **SAMPLING)
        model.reconstruct(batch(model, "reca", (0,)), [1], steps=3)
    finally:
        hook.remove()
    generated, rebuilt = seen[: SAMPLING["steps"] + 1], seen[SAMPLING["steps"] + 1 :]
    assert generated[1:] == [2 * n] * SAMPLING["steps"] and rebuilt[1:] == [n] * 3


def test_logits_behind_cached_prompts_are_those_of_the_whole_sequence(model):
    """Of samples of different lengths, with h_v and without."""
    v, n, head = model.vocabulary, model.image_tokens, model.showo.lm_head
    given = batch(model, "reca", (0, 1))
    h_v = model.encode(given)["h_v"]
    texts = [model.tokens(text) for text in ("a red square", "a square")]
    t2i = [prompt.t2i(text, v, model.config.max_prompt_tokens, n) for text in texts]
    codes = torch.randint(0, v.codes + 1, (2, n), generator=torch.Generator().manual_seed(0))
    for samples, seen in ((loss.reca_samples(model, ["a red", "what is this"]), h_v), (t2i, None)):
        whole = prompt.layout(samples, v)
        asked, image = prompt.split_image(whole, n)
        with torch.no_grad():
            hidden = model.hidden(prompt.put_image(whole, codes + v.offset), seen)[:, prompt.image_rows(n)]
            prompts = CachedPrompts(model.showo.model, model.embed(asked.src, seen), asked.position_ids, asked.runs)
            found = model.code_logits(prompts, image, codes)
        torch.testing.assert_close(found, head(hidden)[..., v.offset : v.mask], rtol=1e-5, atol=1e-5)


def test_noise_on_the_certainty_fades(model, monkeypatch):
    """Step k of S multiplies what is left of the temperature by 1 - k / S, as the release does."""
    n, v, noise, seen = model.image_tokens, model.vocabulary, sampling.SamplerNoise(torch.tensor([3])), []
    logits = torch.randn(1, n, v.codes, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(model, "code_logits", lambda _, __, codes: (seen.append(codes[0] == v.codes), logits)[1])
    sampling.sample_codes(model, [[]], noise, steps=4, guidance=0.0, temperature=2.0)
    probabilities, left = logits.softmax(-1), 2.0
    for step, (unknown, again) in enumerate(itertools.pairwise(seen)):
        left *= 1 - (step + 1) / 4
        drawn = noise.codes(step, probabilities)
        certainty = probabilities.gather(2, drawn[..., None])[0, :, 0].log() + left * noise.gumbel(step, n)[0]
        assert 0 < again.sum() < unknown.sum() and unknown[again].all()
        assert certainty[again].max() < certainty[unknown & ~again].min()


def test_long_prompts_are_cut(model):
    text = " ".join(["square"] * 200)
    assert torch.equal(model.generate([text], [0], **SAMPLING)[0], model.generate([text + " red"], [0], **SAMPLING)[0])


@pytest.mark.parametrize(
    "given, said",
    [
        ({"image_size": 22}, "model.image_size is 22 pixels; it must be a positive multiple of 4"),
        (
            {"understanding": "vq", "hv_down_scale": 2},
            "model.hv_down_scale is 10 pixels; it must be a positive multiple of 4",
        ),
        ({"clip": replace(tiny().clip, image_size=20)}, "model.clip.image_size is 20 pixels"),
    ],
)
def test_sizes_that_do_not_divide(given, said):
    with pytest.raises(ValueError, match=said):
        Adapter.load(config(**given))


def test_the_scale_of_codes_matters_only_where_h_v_is_codes():
    """Conversations read codes at full size, so an image size that hv_down_scale does not divide is no fault there."""
    Adapter.load(config(understanding="vq", hv_source="efficientnet", hv_down_scale=8))
    with pytest.raises(ValueError, match="model.hv_down_scale is 2.5 pixels"):
        Adapter.load(config(understanding="efficientnet", hv_source="vq", hv_down_scale=8))


def test_templates_and_conversations_without_room():
    model = Adapter.load(config(max_reca_tokens=12))
    made = batch(model, "reca")
    with pytest.raises(ValueError, match=r"a template has \d+ tokens; model.max_reca_tokens=12 leaves room for 7"):
        model(made, CounterRNG(0))
    model.check_templates(["a"])
    with pytest.raises(ValueError, match=f"a template has .*: '{made.text[0]}'"):
        model.check_templates(["a", made.text[0]])
    model = Adapter.load(config(clip=replace(tiny().clip, image_size=60)))
    with pytest.raises(ValueError, match="model.max_text_tokens=24 leaves -51 tokens for a conversation"):
        model(batch(model, "i2t"), CounterRNG(0))


def test_a_blur_reaches_h_v_and_not_the_target():
    plain, blurred = (Adapter.load(config(hv_blur=blur)) for blur in (1, 4))
    image = Image.fromarray(images(1, 64)[0].permute(1, 2, 0).numpy())
    features = []
    for model in (plain, blurred):
        gen, und = (view and [make_view(image, view)] for view in (model.views("reca").gen, model.views("reca").und))
        features.append(model.encode(Batch("reca", torch.tensor([0]), ["look"], gen=gen, und=und)))
    assert torch.equal(features[0]["codes"], features[1]["codes"])
    assert not torch.allclose(features[0]["h_v"], features[1]["h_v"], atol=1e-3)
    assert blurred.views("t2i").und is None and plain.views("reca").und is None


@pytest.mark.parametrize("variant", ["clip", "vq"])
def test_crops_are_those_of_the_released_trainer(variant):
    """It crops by torchvision, but what CLIP sees of a conversation by CLIP's processor."""
    model = Adapter.load(config(**VARIANTS[variant]))
    assert model.views("t2i").gen.fit == "center_crop"
    assert model.views("i2t").und.fit == {"clip": "clip_crop", "vq": "center_crop"}[variant]


# ---- activations ----


class Launches(TorchDispatchMode):
    """Counts operators that are no views, each a kernel on a GPU, and the bytes that they read and write."""

    def __init__(self):
        super().__init__()
        self.count = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.count += 1
            self.bytes += sum(x.nbytes for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor))
        return out


def test_gelu_is_one_kernel_and_the_same_function():
    """Against transformers' formula: fp32 to its last bits, bf16 to the bit of the formula in fp32, rounded."""
    published = Config().phi.hidden_act
    act, formula = PhiMLP(phi_config(PhiSizes(8, 1, 1, 8), 8)).activation_fn, ACT2FN[published]
    assert published == "gelu_new"
    x = torch.linspace(-8, 8, 20001)
    true = formula(x.double())
    wrong = (act(x).double() - true).abs().max()
    assert wrong <= (formula(x).double() - true).abs().max() < 5e-7
    half, slopes = x.bfloat16(), []
    far = act(half).view(torch.int16).int() - formula(half.float()).bfloat16().view(torch.int16).int()
    assert (far[half.abs() < 4] == 0).all()
    for function in (act, formula):
        leaf = x.clone().requires_grad_()
        function(leaf).sum().backward()
        slopes.append(leaf.grad)
    torch.testing.assert_close(*slopes, rtol=0, atol=5e-6)
    with Launches() as seen:
        leaf = half.clone().requires_grad_()
        act(leaf).backward(half)
    assert seen.count == 3 and seen.bytes == 7 * half.nbytes  # a copy; forward; backward
