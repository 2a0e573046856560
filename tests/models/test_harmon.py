"""Harmon's adapter beyond the golden data: sizes, sequences, losses, learning, sampling, kernels, bad input."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.checkpoint import checkpoint

from reca import objective
from reca.config.recipe import ObjectiveConfig
from reca.config.recipe_files import load_recipe
from reca.data.batch import Batch
from reca.data.loader import open_loader
from reca.data.tasks import Turn
from reca.models.base import ROLES
from reca.models.harmon import Adapter, Config, loss, prompt, sampling
from reca.models.harmon.config import AutoencoderSizes
from reca.models.harmon.masking import Masking, masked_counts
from reca.rng import CounterRNG
from reca.trainer import Trainer

WORDS = "a red blue square circle describe what is this the picture ? with care".split()
TEXTS = {
    "reca": ["describe the picture.", "what is this?", "describe this with care", "a picture"],
    "t2i": ["a red square", "a blue circle with care", "a square", ""],
    "i2t": [
        [Turn("what is this?", "a red square")],
        [Turn("what is this?", "a circle"), Turn("describe the picture.", "a red circle with care.")],
        [Turn("this?", "a square.")],
        [Turn("describe", "a blue square")],
    ],
}
KL16 = {"codec": "kl16", "autoencoder": AutoencoderSizes(32, [1, 1, 2], 1, latent_channels=4)}


def tiny() -> Config:
    """The tiny recipe's model with the mask ratios and the dropout of the published one, and smaller."""
    model = load_recipe("harmon_tiny").model
    mar = replace(model.mar, buffers=4, head_width=64, mask_ratio_min=0.7, dropout=0.1)
    return replace(model, mar=mar, autoencoder=AutoencoderSizes(patch=4, latent_channels=24, scale=0.5), words=[])


def config(**changes) -> Config:
    return replace(tiny(), words=WORDS, **changes)


def built(**changes) -> Adapter:
    """A model whose diffusion head says something: as it starts, it is zero."""
    model = Adapter.load(config(**changes))
    generator = torch.Generator().manual_seed(1)
    for name, p in model.mar.diffloss.named_parameters():
        if "adaLN" in name or "final" in name:
            p.data = torch.randn(p.shape, generator=generator) * 0.1
    return model


@pytest.fixture(scope="module", params=[False, True], ids=["own rates", "parity"])
def model(request):
    return built(parity=request.param).eval()


def images(n: int, size: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator))


def batch(model, task: str, rows=(0, 1, 2, 3)) -> Batch:
    views = model.views(task)
    gen, und = (view and [images(4, view.size)[row] for row in rows] for view in (views.gen, views.und))
    return Batch(task, torch.tensor(rows) + 7, [TEXTS[task][row] for row in rows], gen=gen, und=und)


# sequences


class QwenTokenizer:
    """Qwen2.5's ids of what Harmon's prompts are made of; any other character is a token of its own."""

    KNOWN = {  # noqa: RUF012
        "<|im_start|>": 151644, "<|im_end|>": 151645, "\n\n": 271, "\n": 198, "assistant": 77091, "user": 872,
        "Generate": 31115, " an": 458, " image": 2168, ".": 13,
    }  # fmt: skip

    def convert_tokens_to_ids(self, token: str) -> int:
        return self.KNOWN[token]

    def __call__(self, text: str, add_special_tokens: bool, split_special_tokens: bool):
        ids = []
        while text:
            token = next((t for t in self.KNOWN if text.startswith(t) and t[:2] != "<|"), text[0])
            ids.append(self.KNOWN.get(token, ord(token[0])))
            text = text[len(token) :]
        return type("Encoding", (), {"input_ids": ids})


START, END = [151644, 872], [151645, 198, 151644, 77091, 198]
NULL = [31115, 458, 2168, 13]


def test_prompts_in_qwens_ids():
    """Ids as models' pages give them; in RECA the wrapper's line break merges with the template's own."""
    qwen = QwenTokenizer()
    assert prompt.caption(qwen, None) == ([*START, 198, *NULL, *END], None, None)
    assert prompt.caption(qwen, " X ").ids == [*START, 198, 31115, 458, 2168, ord(":"), ord(" "), ord("X"), *END]
    assert prompt.template(qwen, "X") == ([*START, 271, ord("X"), *END], 3, None)
    assert prompt.template(qwen, None) == ([*START, 198, *NULL, *END], 3, None)
    assert prompt.question(qwen, "X") == ([*START, 198, 198, ord("X"), *END], 3, None)
    ids, slot, labels = prompt.conversation(qwen, [Turn("X", "Y"), Turn("Z", "W")])
    first = [*START, 198, 198, ord("X"), *END]
    second = [198, *START, 198, ord("Z"), *END]
    assert slot == 3 and ids == [*first, ord("Y"), 151645, *second, ord("W"), 151645]
    ignored = [-100] * len(first), [-100] * len(second)
    assert labels == [*ignored[0], ord("Y"), 151645, *ignored[1], ord("W"), 151645]
    with pytest.raises(ValueError, match="at most 128 besides images; shorten it in data.templates: 'XXX"):
        prompt.template(qwen, "X" * 500)
    assert len(prompt.conversation(qwen, [Turn("X" * 2000, "Y")]).ids) == 1472


def test_layout():
    """Visual rows come buffers first and stand buffers last: h_v in the slot, visible tokens at the end."""
    given = [prompt.Prompt([10, 11, 12, 13], 2, [-100, -100, -100, 13]), prompt.Prompt([20, 21], 1)]
    src, labels, rows, lengths = prompt.layout(given, buffers=1, hv_tokens=2, visible_counts=[2, 0])
    visual = lambda *rows: [-1 - r for r in rows]  # noqa: E731
    assert src.tolist() == [
        [10, 11, *visual(1, 2, 0), 12, 13, *visual(4, 5, 3)],
        [20, *visual(7, 8, 6), 21, *visual(9), 0, 0, 0, 0],
    ]
    assert labels.tolist() == [[-100] * 5 + [13] + [-100] * 4, [-100] * 10]
    assert rows.tolist() == [[4, 2, 3, 9, 7, 8], [13, 11, 12, 15, 0, 0]] and lengths == (10, 6)
    alone = prompt.layout(given[:1], buffers=1, hv_tokens=0, visible_counts=[1])
    assert alone.src.tolist() == [[10, 11, 12, 13, *visual(1, 0)]] and alone.rows.tolist() == [[5, 4]]


def test_masking_hides_by_order_and_count():
    order = torch.tensor([[3, 0, 2, 1], [0, 1, 2, 3]])
    masking = Masking.of(order, torch.tensor([3, 2]))
    assert masking.visible.tolist() == [[0, 3], [2, 3]] and masking.real.tolist() == [[True, False], [True, True]]
    assert masking.lengths == [1, 2] and masking.hidden.tolist() == [1, 2, 3, 4, 5]
    equal = Masking.of(order, torch.tensor([4, 4]))
    assert equal.visible.shape == (2, 0) and equal.real is None and equal.hidden.tolist() == list(range(8))


def test_shares_of_hidden_tokens_are_those_of_a_cut_normal_distribution():
    """Mean and percentiles that models' pages state: 0.867; 0.72 and 0.99."""
    uniform = (torch.arange(20000) + 0.5) / 20000
    share = masked_counts(uniform, 1024, 0.7) / 1024
    assert share.mean().item() == pytest.approx(0.867, abs=2e-3)
    assert share.quantile(0.05).item() == pytest.approx(0.72, abs=6e-3)
    assert share.quantile(0.95).item() == pytest.approx(0.99, abs=6e-3)
    assert share.min() >= 0.7 and share.max() <= 1


# losses


def test_one_rate_per_micro_batch_is_parity_alone():
    ids = torch.arange(64)
    for parity in (False, True):
        counts = loss.sample_masked_counts(Adapter.load(config(parity=parity)), ids, 25, CounterRNG(0))
        assert (len(set(counts.tolist())) == 1) == parity


@pytest.mark.parametrize("task", ["reca", "t2i"])
def test_texts_are_dropped_and_the_image_stays(model, task):
    ids = torch.arange(400)
    whole = loss.sample_prompts(model, Batch(task, ids, ["a red square"] * 400), CounterRNG(0))
    make = prompt.template if task == "reca" else prompt.caption
    empty = make(model.tokenizer, None)
    dropped = [row == empty for row in whole]
    assert 20 < sum(dropped) < 65
    assert {row.slot for row in whole} == {3 if task == "reca" else None}
    part = loss.sample_prompts(model, Batch(task, ids[100:200], ["a red square"] * 100), CounterRNG(0))
    assert [row == empty for row in part] == dropped[100:200]
    model.config.text_drop, kept = 0.0, model.config.text_drop
    assert empty not in loss.sample_prompts(model, Batch(task, ids, ["a red square"] * 400), CounterRNG(0))
    model.config.text_drop = kept


def gradients(model, sample) -> dict[str, torch.Tensor]:
    model.zero_grad()
    term = model(sample, CounterRNG(0))
    term.sum.backward()
    return {"loss": term.sum.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_the_gradient_through_h_v_is_scaled():
    model = built().eval()
    sample = batch(model, "i2t")
    small = gradients(model, sample)
    model.config.hv_grad_scale = 1.0
    full = gradients(model, sample)
    assert torch.equal(small["loss"], full["loss"])
    for name in ("mar.encoder_blocks.0.attn.qkv.weight", "mar.fake_latent", "proj_in.0.weight"):
        torch.testing.assert_close(small[name], 0.1 * full[name], rtol=1e-4, atol=1e-7)
    for name in ("llm.model.layers.0.mlp.up_proj.weight", "llm.model.embed_tokens.weight"):
        assert torch.equal(small[name], full[name])


def test_understanding_may_see_fewer_or_blurred_pixels():
    same = Adapter.load(config())
    assert same.views("reca").und is None
    features = same.encode(batch(same, "reca"))
    assert features["h_v"] is features["latents"]
    small = Adapter.load(config(understanding_size=12, hv_blur=3)).eval()
    und = small.views("reca").und
    assert (und.size, und.fit, und.blur) == (12, "stretch", 3)
    features = small.encode(batch(small, "reca"))
    assert features["latents"].shape[1:3] == (5, 5) and features["h_v"].shape[1:3] == (3, 3)
    term = small(batch(small, "reca"), CounterRNG(0))
    assert torch.isfinite(term.sum) and small.config_warnings() == []
    [said] = Adapter.load(config(understanding_size=40)).config_warnings()
    assert "40 pixels, more than the 20" in said


def test_other_patches_and_widths():
    mar = replace(tiny().mar, patch_size=2, base_grid=3, decoder_width=32, decoder_heads=2)
    whole = AutoencoderSizes(patch=4, latent_channels=48)
    model = Adapter.load(config(mar=mar, image_size=24, autoencoder=whole)).eval()
    sample = batch(model, "reca")
    latents = model.encode(sample)["latents"]
    assert latents.shape == (4, 3, 3, 192)
    torch.testing.assert_close(model.pixels(latents), torch.stack(sample.gen) / 127.5 - 1, rtol=0, atol=1e-5)
    assert torch.isfinite(model(sample, CounterRNG(0)).sum)
    assert model.generate(["a"], [0], steps=2, diffusion_steps=2)[0].shape == (3, 24, 24)


# dropout


def test_dropout_is_a_function_of_seed_and_samples():
    model = built()
    sample = batch(model, "reca")
    state = torch.get_rng_state()
    first = model(sample, CounterRNG(0)).sum
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1000)
    assert torch.equal(model(sample, CounterRNG(0)).sum, first)
    assert model.eval()(sample, CounterRNG(0)).sum != first
    cached = replace(sample, sample_ids=sample.sample_ids + 100)
    assert model.train()(cached, CounterRNG(0)).sum != model.eval()(cached, CounterRNG(0)).sum


def test_recomputed_layers_drop_what_they_dropped():
    results = []
    for recompute in (False, True):
        model = built()
        if recompute:
            for block in model.blocks():
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        results.append(gradients(model, batch(model, "reca")))
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-5, atol=1e-6, msg=name)


# learning


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Photographs that scikit-image carries."""
    skimage = pytest.importorskip("skimage")
    folder = tmp_path_factory.mktemp("photographs")
    for name in ("astronaut", "coffee", "chelsea", "rocket"):
        Image.fromarray(getattr(skimage.data, name)()).save(folder / f"{name}.png")
    return folder


def recipe(photographs, run_dir, *overrides):
    own = [f"data.images={photographs}", f"run_dir={run_dir}", "data.templates=null", "data.workers=0"]
    own += ["objective.i2t.weight=0", "objective.reca.batch_size=8", "objective.reca.micro_batch=8"]
    own += ["optim.lr=2e-3", "optim.schedule=constant", "train.threads=1", "train.frozen=[]", "log.tensorboard=false"]
    return load_recipe("harmon_tiny", [*own, *overrides])


def test_reca_learns_real_images_and_moves_what_it_may(photographs, tmp_path):
    r = recipe(photographs, tmp_path, "train.steps=50", "log.every=1")
    r.model.codec, r.model.autoencoder = "kl16", replace(KL16["autoencoder"], scale=1.0)
    trainer = Trainer(r, Adapter.load(r.model))
    before = {n: t.clone() for n, t in trainer.adapter.state_dict().items()}
    trainer.run()
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    curve = [json.loads(line)["reca/loss"] for line in lines if "reca/loss" in line]
    assert len(curve) == 50 and sum(curve[-10:]) < 0.8 * sum(curve[:10])
    after = trainer.adapter.state_dict()
    stays = {n for n, t in before.items() if torch.equal(t, after[n])}
    assert stays == {n for n in before if n.startswith("codec.") or n == "mar.class_emb.weight"}


def test_a_continued_run_makes_the_same_bits(photographs, tmp_path):
    """With dropout, two tasks of loss, and a stop in between."""

    def run(folder, steps):
        i2t = ["objective.i2t.weight=1", "objective.i2t.batch_size=4", "objective.i2t.micro_batch=2"]
        r = recipe(photographs, folder, f"train.steps={steps}", "model.parity=true", "model.mar.dropout=0.1", *i2t)
        return {n: p.detach() for n, p in _ran(Trainer(r)).adapter.named_parameters()}

    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "halves", 2)
    torch.rand(7)
    for name, value in run(tmp_path / "halves", 4).items():
        assert torch.equal(value, whole[name]), name


def _ran(trainer: Trainer) -> Trainer:
    trainer.run()
    return trainer


def test_accumulation_does_not_change_the_gradient(photographs, tmp_path):
    """Dropout aside, whose draws belong to micro-batches."""
    r, grads = recipe(photographs, tmp_path), []
    for micro_batch in (8, 2):
        model = built().eval()
        stream = iter(open_loader(r.data, "reca", model.views("reca"), seed=0, micro_batch=micro_batch))
        batches = [next(stream) for _ in range(8 // micro_batch)]
        objective.backward(model, {"reca": batches}, ObjectiveConfig(), 0, torch.autocast("cpu", enabled=False))
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, value in grads[0].items():
        torch.testing.assert_close(grads[1][name], value, rtol=1e-3, atol=1e-6, msg=name)


# what runs


def test_the_head_sees_hidden_rows_only_and_nothing_is_repeated(model, monkeypatch):
    seen, head = {}, model.mar.diffloss.net
    for name in ("diffusion_add_noise", "diffusion_loss"):
        inner = getattr(loss, name)

        def watched(*args, name=name, inner=inner, **kwargs):
            seen[name] = (args, kwargs)
            return inner(*args, **kwargs)

        monkeypatch.setattr(loss, name, watched)
    hooks = [
        part.register_forward_hook(lambda _, args, out, name=name: seen.update({name: args[0]}))
        for name, part in (("cond_embed", head.cond_embed), ("input_proj", head.input_proj))
    ]
    sample = batch(model, "reca")
    term = model(sample, CounterRNG(0))
    for hook in hooks:
        hook.remove()
    hidden, repeats = int(term.weight) // 4, model.config.mar.repeats
    assert len(seen["input_proj"]) == repeats * hidden < repeats * 4 * 25
    assert len(seen["cond_embed"]) == hidden
    for name, place in (("diffusion_add_noise", 0), ("diffusion_loss", 1)):
        args, kwargs = seen[name]
        assert args[place].shape == (4 * 25, 24) and len(kwargs["rows"]) == repeats * hidden


def test_no_mask_has_two_sides(model, monkeypatch):
    """The language model gets none; MAR's encoder marks padding per key, and only where numbers of tokens differ."""
    masks, inner = [], F.scaled_dot_product_attention

    def watched(*args, **kwargs):
        masks.append(kwargs.get("attn_mask"))
        return inner(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    for task in TEXTS:
        model(batch(model, task), CounterRNG(0))
    shapes = {tuple(mask.shape) for mask in masks if mask is not None}
    assert len(masks) > 10 and all(shape[1:3] == (1, 1) for shape in shapes)
    assert not (model.config.parity and shapes)


@pytest.mark.gpu
@pytest.mark.parametrize("task", TEXTS)
def test_a_gpu_agrees_with_the_cpu(task):
    one, other = built().eval(), built().eval().cuda()
    sample = batch(one, task)
    expected, got = gradients(one, sample), gradients(other, sample.to(torch.device("cuda")))
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name].cpu(), value, rtol=1e-3, atol=1e-4 * float(value.abs().max()), msg=name)


@pytest.mark.gpu
def test_a_gpu_draws_answers_and_keeps_its_generator():
    model = built().cuda()
    state, sample = torch.cuda.get_rng_state(), batch(model, "reca").to(torch.device("cuda"))
    assert torch.equal(model(sample, CounterRNG(0)).sum, model(sample, CounterRNG(0)).sum)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert model.generate(["a red square"], [0], **SAMPLING)[0].shape == (3, 20, 20)
    assert isinstance(model.answer(images(1, 20), ["what is this?"], 3)[0], str)


# sampling


SAMPLING = {"steps": 4, "diffusion_steps": 5}


def latents_of(model, prompts, seeds, **options) -> torch.Tensor:
    """What `generate` decodes: pixels of an untrained head are black or white, which would hide differences."""
    kept, decode = [], model.pixels
    model.pixels = lambda latents: (kept.append(latents), decode(latents))[1]
    images = model.generate(prompts, seeds, **SAMPLING | options)
    del model.pixels
    latents = torch.cat(kept)
    _, m, n, _ = latents.shape
    assert len(images) == len(latents)
    assert all(image.dtype == torch.uint8 and image.shape == (3, 4 * m, 4 * n) for image in images)
    return latents


def test_a_image_depends_on_its_prompt_and_seed_only(model):
    prompts, seeds = ["a red square", "a blue circle with care", "a red square"], [5, 5, 6]
    together = latents_of(model, prompts, seeds)
    alone = torch.cat([latents_of(model, [text], [seed]) for text, seed in zip(prompts, seeds, strict=True)])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-4 * float(together.abs().max()))
    halves = latents_of(model, prompts, seeds, batch=2)
    torch.testing.assert_close(halves, together, rtol=1e-4, atol=1e-4 * float(together.abs().max()))
    far = 1e-3 * together.abs().max()
    assert (together[0] - together[2]).abs().max() > far and (together[0] - together[1]).abs().max() > far


@pytest.mark.parametrize("with_image", [True, False])
@torch.no_grad()
def test_the_cache_gives_what_a_whole_pass_gives(model, with_image):
    given = batch(model, "reca", rows=(0, 1, 2))
    prompts = [prompt.template(model.tokenizer, text) for text in ("draw", "please draw this picture", "what is this")]
    if not with_image:
        prompts = [prompt.Prompt(row.ids) for row in prompts]
    features = model.encode(given)
    grid, buffers = tuple(features["latents"].shape[1:3]), model.config.mar.buffers
    h_v = model.mar.encode(features["h_v"]) if with_image else None
    after_prompts = sampling.cached_prompts(model, prompts, h_v)
    for visible in (torch.tensor([[0, 4], [1, 3], [2, 7]]), torch.empty(3, 0, dtype=torch.int64)):
        counts = [visible.shape[1]] * 3
        layout = prompt.layout(prompts, buffers, h_v.shape[1] - buffers if with_image else 0, counts)
        encoded = model.mar.encode(features["latents"], visible)
        want = model.condition(layout, encoded, Masking(visible, None, counts), grid, h_v)
        got = sampling.condition(model, after_prompts, encoded, visible, grid)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_sampling_options(model):
    def drawn(**options):
        return latents_of(model, ["a red square"], [1], **options)

    base = drawn()
    assert torch.equal(drawn(guidance=3.0, guidance_schedule="constant", temperature=1.0), base)
    others = {"guidance": 1, "guidance_schedule": "linear", "temperature": 0.0, "steps": 5, "diffusion_steps": 4}
    others["clip_sample_range"] = 0.1
    for name, value in others.items():
        assert (drawn(**{name: value}) - base).abs().max() > 1e-4 * base.abs().max(), name
    assert drawn(clip_sample_range=0.1).abs().max() <= 0.1 < base.abs().max()
    assert drawn(steps=100).shape == base.shape == (1, 5, 5, 24)  # more steps than tokens
    assert drawn(height=12, width=32).shape == (1, 3, 8, 24)
    assert model.generate([], []) == []


def test_linear_guidance_grows_with_the_share_that_is_drawn(model, monkeypatch):
    scales, sizes, denoise = [], [], sampling.denoise

    def observed(head, z, noise, step, guidance, *more):
        scales.append(guidance)
        sizes.append(z.shape[2])
        return denoise(head, z, noise, step, guidance, *more)

    monkeypatch.setattr(sampling, "denoise", observed)
    latents_of(model, ["a red square"], [1], guidance=3.0, guidance_schedule="linear")
    assert len(scales) == 4 and scales == pytest.approx([1 + 2 * sum(sizes[: i + 1]) / 25 for i in range(4)])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps=0"),
        ({"guidance_schedule": "cosine"}, "guidance_schedule='cosine' constant or linear"),
        ({"height": 22}, "multiples of 4, got 22 x 20"),
        ({"diffusion_steps": 1001}, "keeps 1 to 1000 steps, got 1001"),
        ({"clip_sample_range": 0.0}, "clip_sample_range=0.0 must be above 0"),
    ],
)
def test_options_out_of_range(model, options, words):
    with pytest.raises(ValueError, match=words):
        model.generate(["a"], [0], **SAMPLING | options)


def test_inference_is_without_dropout_in_training_mode_too():
    model = built()
    drawn = latents_of(model, ["a red square"], [3])
    assert model.training and torch.equal(latents_of(model.eval(), ["a red square"], [3]), drawn)


def test_answers_do_not_depend_on_the_batch(model):
    questions = ["what is this?", "describe the picture with care.", "what is a?"]
    shown = [images(1, 20)[0], images(1, 60, 1)[0][:, :20], images(1, 30, 2)[0]]
    together = model.answer(shown, questions, 6)
    alone = [model.answer([p], [q], 6)[0] for p, q in zip(shown, questions, strict=True)]
    assert together == alone
    assert model.answer(shown * 17, questions * 17, 6) == alone * 17  # more of one length than a batch holds


# the driver's questions


def test_roles_decay_and_blocks(model):
    roles = model.roles()
    assert roles.keys() == {n for n, _ in model.named_parameters()} and set(roles.values()) <= set(ROLES)
    assert {r for n, r in roles.items() if n.startswith("mar.diffloss")} == {"gen_head"}
    assert roles["mar.fake_latent"] == roles["mar.z_proj.weight"] == "shared_encoder"
    assert roles["mar.mask_token"] == roles["mar.diffusion_pos_embed_learned"] == "gen_head"
    assert roles["llm.model.embed_tokens.weight"] == "embed" and roles["proj_out.0.weight"] == "bridge"
    parameters = dict(model.named_parameters())
    decays = lambda name: model.decays(name, parameters[name])  # noqa: E731
    assert decays("mar.fake_latent") and decays("mar.mask_token") and decays("llm.model.embed_tokens.weight")
    assert not decays("mar.diffloss.net.input_proj.weight") and not decays("llm.model.norm.weight")
    assert not decays("proj_in.0.bias") and len(model.blocks()) == 2 + 2 + 2 + 2
    assert set(Adapter.load(config(**KL16)).roles().values()) == {*model.trainable_roles, "codec"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_size": 22}, "model.image_size is 22 pixels; it must be a positive multiple of 4"),
        ({"understanding_size": 10}, "model.understanding_size is 10 pixels"),
        ({"mar": replace(tiny().mar, heads=5)}, "a width of 48 is not a multiple of the number of heads, 5"),
        ({"autoencoder": AutoencoderSizes(patch=2, latent_channels=16)}, "2 x 2 pixels have 1 to 12"),
        ({"language": replace(tiny().language, vocab_size=8)}, r"ids up to \d+, but model.language.vocab_size=8"),
    ],
)
def test_sizes_that_do_not_fit(changes, words):
    with pytest.raises(ValueError, match=words):
        Adapter.load(config(**changes))
