"""BAGEL's adapter beyond the golden data: sizes, batching, learning, sampling, editing, kernels, bad input."""

import functools
import itertools
import json
import math
import weakref
from collections import Counter
from dataclasses import replace

import pytest
import torch
from PIL import Image

from reca import objective
from reca.config.recipe_files import load_recipe
from reca.data.batch import Batch
from reca.data.transforms import make_view
from reca.models.bagel import Adapter, Config, loss, modules, prompt, sampling, transformer, views, weights
from reca.models.bagel.config import AutoencoderSizes
from reca.models.bagel.transformer import GEN, UND, KVCache, PackedPass, rotary_cos_sin
from reca.models.base import ROLES
from reca.models.common.ldm_autoencoder import to_ldm
from reca.models.common.patch_codec import PatchSizes
from reca.optim import freeze, make_optimizer
from reca.rng import CounterRNG, RandomStream
from reca.trainer import Trainer
from reca.training import lora
from tests.models.contract import TEXTS

WORDS = [
    "a",
    "red",
    "blue",
    "square",
    "circle",
    "describe",
    "what",
    "is",
    "this",
    "the",
    "picture",
    "?",
    ".",
    "drawn",
    "with",
    "care",
    "make",
    "it",
]
FLUX = {"codec": "flux", "autoencoder": AutoencoderSizes([32, 32], 1, 4)}
VARIANTS = {
    "pixels": {},
    "flux": FLUX,
    "parity": {"parity": True},
    "vae": {"hv_source": "vae", "understanding_size": 20},
    "shift": {"timestep_shift": 3.0},
}
SIZES = [(20, 20), (20, 20), (12, 20), (20, 8)]


def config(**changes) -> Config:
    """The tiny recipe's model with image tokens of 2 x 2 latents, as the published one has, and the words here."""
    model = replace(load_recipe("bagel_tiny").model, patches=PatchSizes(2, 12), latent_patch_size=2, words=WORDS)
    return replace(model, **changes)


@functools.cache
def built(variant: str = "pixels") -> Adapter:
    """The model of a variant with what RECA trains; a test that changes it makes its own."""
    model = Adapter.load(config(**VARIANTS[variant]))
    freeze(model, None)
    return model.eval()


@pytest.fixture(params=VARIANTS)
def model(request):
    return built(request.param)


@pytest.fixture
def plain():
    model = built()
    model.zero_grad()
    return model


def images(sizes, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in sizes]


def batch(model, task: str, rows=(0, 1, 2, 3)) -> Batch:
    """Samples of different sizes as the views make them."""
    shown = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images(SIZES)]
    views = model.views(task)
    gen, und = (view and [make_view(shown[row], view) for row in rows] for view in (views.gen, views.und))
    return Batch(task, torch.tensor(rows) + 7, [TEXTS[task][row] for row in rows], gen=gen, und=und)


def count(module) -> int:
    return sum(p.numel() for p in module.parameters())


# sizes


class PublishedTokenizer:
    def get_vocab(self):
        return dict(zip(prompt.SPECIAL_TOKENS, (151644, 151645, 151652, 151653), strict=True))

    def __len__(self):
        return 151665


@pytest.fixture(scope="module")
def published():
    with torch.device("meta"):
        return Adapter(load_recipe("bagel_7b").model, PublishedTokenizer())


def test_published_sizes(published):
    whole = weights.published_parts(published).state_dict()
    assert len(whole) == 1223
    assert sum(t.numel() for t in whole.values()) == 14_607_260_128
    roles = published.roles()
    sizes = Counter()
    for name, parameter in published.named_parameters():
        sizes[roles[name]] += parameter.numel()
    assert sizes["gen_lm"] == sizes["und_lm"] == 6_525_628_928
    assert sizes["embed"] == 2 * 544_997_376
    assert sizes["und_encoder"] == 402_552_736 and sizes["bridge"] == 16_980_992
    assert sizes["gen_head"] == 13_769_728 + 232_960 + 229_440 and sizes["codec"] == 83_819_683
    tables = [t.pos_embed.numel() for t in (published.latent_pos_embed, published.vit_pos_embed)]
    assert sum(tables) == 32_241_664
    trained = sum(p.numel() for n, p in published.named_parameters() if roles[n] in published.trainable_roles)
    assert round(trained / 1e9, 3) == 6.540


def test_published_names(published):
    names = {name: tuple(t.shape) for name, t in weights.published_parts(published).state_dict().items()}
    d, f, k, v = 3584, 18944, 512, 152064
    wanted = {
        "language_model.model.embed_tokens.weight": (v, d),
        "language_model.lm_head.weight": (v, d),
        "language_model.model.norm.weight": (d,),
        "language_model.model.norm_moe_gen.weight": (d,),
        "time_embedder.mlp.0.weight": (d, 256),
        "time_embedder.mlp.0.bias": (d,),
        "time_embedder.mlp.2.weight": (d, d),
        "time_embedder.mlp.2.bias": (d,),
        "vae2llm.weight": (d, 64),
        "vae2llm.bias": (d,),
        "llm2vae.weight": (64, d),
        "llm2vae.bias": (64,),
        "latent_pos_embed.pos_embed": (4096, d),
        "vit_pos_embed.pos_embed": (4900, d),
        "connector.fc1.weight": (d, 1152),
        "connector.fc1.bias": (d,),
        "connector.fc2.weight": (d, d),
        "connector.fc2.bias": (d,),
    }
    for layer in range(28):
        at = f"language_model.model.layers.{layer}."
        for e in ("", "_moe_gen"):
            for p, rows in (("q", d), ("k", k), ("v", k)):
                wanted |= {f"{at}self_attn.{p}_proj{e}.weight": (rows, d), f"{at}self_attn.{p}_proj{e}.bias": (rows,)}
            wanted |= {f"{at}self_attn.o_proj{e}.weight": (d, d)}
            wanted |= {f"{at}self_attn.{p}_norm{e}.weight": (128,) for p in "qk"}
            wanted |= {f"{at}mlp{e}.{p}_proj.weight": (f, d) for p in ("gate", "up")}
            wanted |= {f"{at}mlp{e}.down_proj.weight": (d, f)}
            wanted |= {f"{at}{p}_layernorm{e}.weight": (d,) for p in ("input", "post_attention")}
    at = "vit_model.vision_model."
    wanted |= {
        f"{at}embeddings.patch_embedding.weight": (1152, 588),
        f"{at}embeddings.patch_embedding.bias": (1152,),
        f"{at}embeddings.position_embedding.weight": (4900, 1152),
        f"{at}post_layernorm.weight": (1152,),
        f"{at}post_layernorm.bias": (1152,),
    }
    for layer in range(26):
        for part, shape in (
            *((f"self_attn.{p}_proj", (1152, 1152)) for p in ("q", "k", "v", "out")),
            ("mlp.fc1", (4304, 1152)),
            ("mlp.fc2", (1152, 4304)),
            ("layer_norm1", (1152,)),
            ("layer_norm2", (1152,)),
        ):
            wanted[f"{at}encoder.layers.{layer}.{part}.weight"] = shape
            wanted[f"{at}encoder.layers.{layer}.{part}.bias"] = shape[:1]
    assert names == wanted


def test_published_codec(published):
    state = to_ldm(published.codec.autoencoder.state_dict(), 4)
    assert len(state) == 244 and sum(t.numel() for t in state.values()) == 83_819_683
    shapes = {name: tuple(t.shape) for name, t in state.items()}
    assert shapes["encoder.mid.attn_1.q.weight"] == shapes["decoder.mid.attn_1.proj_out.weight"] == (512, 512, 1, 1)
    assert shapes["encoder.down.1.block.0.nin_shortcut.weight"] == (256, 128, 1, 1)
    assert shapes["encoder.conv_out.weight"] == (32, 512, 3, 3)
    assert shapes["decoder.up.0.block.2.conv2.weight"] == (128, 128, 3, 3)
    assert shapes["decoder.up.3.upsample.conv.weight"] == (512, 512, 3, 3)
    assert {"encoder.down.0.downsample.conv.bias", "decoder.norm_out.weight"} <= shapes.keys()
    assert not {n for n in shapes if n.startswith(("encoder.down.3.downsample", "decoder.up.0.upsample"))}


def test_published_views(published):
    reca = published.views("reca")
    square = Image.new("RGB", (2048, 1536))
    assert make_view(square, reca.gen).shape == (3, 768, 1024) and make_view(square, reca.und).shape == (3, 168, 224)
    assert published.token_side == 16
    talk, edit = published.views("i2t").und, views.edit_views(published)
    assert (talk.size, talk.min_size, talk.stride, talk.max_pixels) == (980, 378, 14, 2_007_040)
    assert (edit.und.size, edit.und.min_size, edit.gen) == (980, 224, reca.gen)


# losses


@pytest.mark.parametrize("task", TEXTS)
def test_weight_is_what_loss_returns(model, task):
    sample = batch(model, task)
    term = model(sample, CounterRNG(3))
    assert float(term.weight) == float(model.prepare(sample, CounterRNG(3)).weight) > 0
    assert math.isfinite(float(term.sum.detach()))
    if task != "i2t":
        assert float(term.weight) == sum(i.shape[1] * i.shape[2] for i in sample.gen) / model.token_side**2


def test_templates_are_dropped_for_a_tenth_and_h_v_never(plain, monkeypatch):
    ids = torch.arange(400)
    rows = torch.zeros(400, 3, 3, 64)
    given = Batch("reca", ids, ["describe this"] * 400, features={"h_v": rows, "moments": torch.zeros(400, 2, 5, 5)})
    samples = loss.prepare(plain, given, CounterRNG(0)).items
    assert [items[0] for items in samples] == [prompt.VitImage(3, 3)] * 400
    assert 20 < sum(len(items) == 1 for items in samples) < 65
    captions = loss.prepare(plain, replace(given, task="t2i", text=["a red square"] * 400), CounterRNG(0)).items
    assert 20 < sum(items == [] for items in captions) < 65
    monkeypatch.setattr(plain, "config", replace(plain.config, caption_drop=0.0))
    assert loss.prepare(plain, given, CounterRNG(0)).items == samples
    captions = loss.prepare(plain, replace(given, task="t2i", text=["a red square"] * 400), CounterRNG(0)).items
    assert all(captions)


@pytest.mark.parametrize("task", ["reca", "t2i"])
def test_a_batch_without_any_text(task):
    model = Adapter.load(config(template_drop=1.0, caption_drop=1.0))
    freeze(model, None)
    sample = batch(model, task)
    term = model(sample, CounterRNG(0))
    term.sum.backward()
    changed = replace(sample, text=["what", "is", "this", "?"])
    assert torch.equal(model(changed, CounterRNG(0)).sum, term.sum)


def test_dropped_images_keep_their_position_and_dropped_texts_do_not(plain):
    text, look, noisy = prompt.Text([1, 2, 3]), prompt.VitImage(1, 2), prompt.NoisyImage(1, 1)
    layout = plain.layout([[look, text, noisy], [prompt.DroppedImage(), text, noisy], [noisy]])
    assert layout.positions[UND].tolist() == [0, 0, 0, 0, 1, 2, 3, 4, 4, 1, 2, 3, 4, 4, 0, 0]
    assert layout.positions[GEN].tolist() == [4, 4, 0] and layout.next_positions == [5, 5, 1]


def test_noise_levels(plain):
    ids = torch.arange(2000)
    level = loss.noise_level(plain, CounterRNG(0), ids)
    plain.config.timestep_shift = 3.0
    moved = loss.noise_level(plain, CounterRNG(0), ids)
    plain.config.timestep_shift = 1.0
    assert abs(float(level.logit().mean())) < 0.1 and abs(float(level.logit().std()) - 1) < 0.1
    torch.testing.assert_close(moved.logit(), level.logit() + math.log(3.0), rtol=0, atol=1e-4)


def test_parity_rounds_to_bf16(monkeypatch):
    given, kernel = {}, loss.flow_matching_add_noise

    def recorded(x0, t, noise, **options):
        given["dtypes"], given["t"] = {image.dtype for image in x0}, t
        return kernel(x0, t, noise, **options)

    monkeypatch.setattr(loss, "flow_matching_add_noise", recorded)
    for name, dtype in (("pixels", torch.float32), ("parity", torch.bfloat16)):
        built(name)(batch(built(name), "reca"), CounterRNG(0))
        assert given["dtypes"] == {dtype}
        assert torch.equal(given["t"], given["t"].to(dtype).float())


def test_the_posterior_is_drawn_for_every_sample(plain):
    flux = built("flux")
    moments = flux.encode(batch(flux, "t2i", [0, 0]))["moments"]
    assert torch.equal(moments[0], moments[1])
    first, second = loss.sample_posterior(flux, moments, CounterRNG(0), torch.tensor([1, 2]))
    mean, log_variance = moments[0].chunk(2)
    noise = CounterRNG(0).normal(RandomStream.POSTERIOR, torch.tensor([1]), mean.numel()).view_as(mean)
    expected = 0.3611 * (mean + (0.5 * log_variance).exp() * noise - 0.1159)
    torch.testing.assert_close(first, expected)
    assert not torch.equal(first, second)


def test_it_learns_photographs_and_what_is_frozen_stays(tmp_path):
    from skimage import data

    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("astronaut", "coffee", "chelsea"):
        Image.fromarray(getattr(data, name)()).save(folder / f"{name}.png")
    changes = {
        "data.images": folder, "data.workers": 0, "objective.reca.batch_size": 12, "objective.reca.micro_batch": 12,
        "train.steps": 50, "train.threads": 1, "log.every": 1, "run_dir": tmp_path / "run",
    }  # fmt: skip
    recipe = load_recipe("bagel_tiny", [f"{key}={value}" for key, value in changes.items()])
    trainer = Trainer(recipe, progress=lambda _: None)
    before = {n: t.clone() for n, t in trainer.adapter.state_dict().items()}
    trainer.run()
    lines = map(json.loads, (tmp_path / "run/log.jsonl").read_text().splitlines())
    curve = [line["loss"] for line in lines if "loss" in line]
    assert sum(curve[-5:]) < 0.8 * sum(curve[:5])

    model = trainer.adapter
    roles = model.roles()
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert {roles[n] for n in changed} == {"gen_lm", "gen_head"}
    assert changed == {n for n, role in roles.items() if role in model.trainable_roles}
    with_state = {id(p) for p in trainer.optimizer.state}
    assert with_state == {id(p) for n, p in model.named_parameters() if roles[n] in model.trainable_roles}


def test_passes_of_so_many_tokens_make_the_same_step(tmp_path):
    """Images of 25 to 100 tokens, of which the largest with their prompt are longer than a pass: they are alone."""
    for i, size in enumerate([(40, 40), (20, 20), (40, 20), (20, 30), (40, 36), (20, 20), (24, 40), (20, 20)]):
        Image.new("RGB", size, (25 * i, 90, 200 - 20 * i)).save(tmp_path / f"{i}.png")

    def step(*keys):
        changes = ["model.image_size=40", "model.max_latent_size=10", "objective.reca.batch_size=8", "data.workers=0"]
        given = [f"data.images={tmp_path}", "train.precision=fp64", *changes, *keys]
        recipe = load_recipe("bagel_tiny", [*given, f"run_dir={tmp_path / 'run'}"])
        trainer = Trainer(recipe, progress=lambda _: None)
        trainer.folder.close()
        batches = trainer.next_batches({"reca": trainer.loaders["reca"].steps()})
        trainer.adapter.zero_grad()
        sums = objective.backward(trainer.adapter, batches, recipe.objective, 0, trainer.autocast)
        gradients = {name: p.grad.clone() for name, p in trainer.adapter.named_parameters() if p.grad is not None}
        return [list(batch.prepared.tokens) for batch in batches["reca"]], gradients, sums["reca"]

    passes, found, sums = step("objective.reca.max_tokens=110")
    (whole,), wanted, same = step("objective.reca.micro_batch=8")
    assert [tokens for one in passes for tokens in one] == whole
    assert all(sum(one) <= 110 or len(one) == 1 for one in passes) and max(map(sum, passes)) > 110
    assert all(sum(one) + after[0] > 110 for one, after in itertools.pairwise(passes)) and len(passes) < 8
    torch.testing.assert_close(sums, same, rtol=1e-12, atol=0)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-13, msg=name)


def test_optimizer_decays_nothing(plain):
    recipe = load_recipe("bagel_7b")
    groups = make_optimizer(plain, recipe.optim).param_groups
    assert [group["weight_decay"] for group in groups] == [0.0]
    assert groups[0]["eps"] == 1e-15


# speed by construction


def test_understanding_runs_without_a_graph(plain):
    """Of two passes the first keeps nothing, and in the second only latents do."""
    graphs = []
    hooks = [
        layer.register_forward_hook(lambda _, args, out: graphs.append({e: x.requires_grad for e, x in out[0].items()}))
        for layer in plain.blocks()
    ]
    plain(batch(plain, "reca"), CounterRNG(0))
    for hook in hooks:
        hook.remove()
    n = len(plain.blocks())
    assert graphs == [{UND: False}] * n + [{UND: False, GEN: True}] * n


def test_trained_understanding_gets_its_gradient():
    model = Adapter.load(config())
    freeze(model, ["gen_lm", "gen_head", "und_lm", "bridge"])
    model(batch(model, "reca"), CounterRNG(0)).sum.backward()
    for name in ("connector.fc1.weight", "language_model.model.layers.0.self_attn.k_proj.weight"):
        assert bool(model.get_parameter(name).grad.any()), name
    freeze(model, ["gen_lm"])
    model.zero_grad()
    model(batch(model, "reca"), CounterRNG(0)).sum.backward()
    assert model.connector.fc1.weight.grad is None


def test_a_prompt_requires_a_gradient_for_its_own_parameters_only():
    model = Adapter.load(config())
    lora.choose_trained(model, load_recipe("bagel_tiny", ["lora.rank=2", "train.roles=[gen_lm, und_lm]"]))
    model.requires_grad_(False)
    assert not model.prompt_requires_grad()
    for name, role in model.roles().items():
        parameter = model.get_parameter(name).requires_grad_(True)
        assert model.prompt_requires_grad() == (role in ("und_encoder", "bridge", "und_lm", "embed")), name
        parameter.requires_grad_(False)


def test_answers_learn_where_the_understanding_expert_does():
    """reca.objective refuses a loss that asks for no gradient."""
    model = Adapter.load(config()).train()
    freeze(model, None)
    assert not model(batch(model, "i2t"), CounterRNG(0)).sum.requires_grad
    freeze(model, ["und_lm"])
    model(batch(model, "i2t"), CounterRNG(0)).sum.backward()


def test_a_prompt_of_latents_learns_through_the_generation_expert():
    vae = built("vae")
    vae.zero_grad()
    vae(batch(vae, "reca"), CounterRNG(0)).sum.backward()
    assert bool(vae.vae2llm.weight.grad.any())
    assert vae.language_model.model.layers[0].self_attn.k_proj.weight.grad is None


def test_one_time_embedding_per_image(plain):
    rows = []
    hook = plain.time_embedder.register_forward_hook(lambda _, args, out: rows.append(len(out)))
    plain(batch(plain, "reca"), CounterRNG(0))
    plain.generate(["a", "a red"], [0, 1], steps=3)
    hook.remove()
    assert rows == [4, 1, 1]


def test_a_pass_is_one_attention_call_per_layer(plain, monkeypatch):
    """Samples of one shape are one batch of it, others are packed."""
    calls, attention = [], transformer.attention

    def recorded(q, k, v, plan, **options):
        calls.append((q.shape[:-2], k.shape[:-2]))
        return attention(q, k, v, plan, **options)

    monkeypatch.setattr(transformer, "attention", recorded)
    layers, same = len(plain.blocks()), [[prompt.Text([1, 2])]] * 3
    _, cache = plain.prefill(prompt.Prompt(same))
    assert calls == [((3, 2), (3, 2))] * layers
    calls.clear()
    plain.prefill(prompt.Prompt([[prompt.Text([1] * n)] for n in (1, 2, 3)]), cache)
    assert calls == [((6,), (12,))] * layers


@pytest.mark.parametrize("uniform", [True, False])
def test_what_rows_see_and_what_is_kept(uniform):
    """Attention, its gradient and the cache against one mask per sample."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(3, 2, 4)] * 2 if uniform else [(3, 2, 4), (0, 5, 1)]  # cached rows, rows of a text, latents of an image
    splits = [s for i, (_, text, n) in enumerate(sizes) for s in (
        transformer.Split(i, text, 0, "causal"), transformer.Split(i, 2, n, "noise"))]  # fmt: skip
    cached, und, gen = (sum(column) for column in zip(*((c, t + 2, n) for c, t, n in sizes), strict=True))
    made = {
        expert: [torch.randn(rows, heads, 8, generator=generator).requires_grad_() for heads in (4, 2, 2)]
        for expert, rows in ((UND, und), (GEN, gen))
    }
    past = tuple(torch.randn(cached, 2, 8, generator=generator) for _ in range(2))
    cache = KVCache([past], [c for c, _, _ in sizes], [0] * 2)
    rotary = {
        expert: rotary_cos_sin(torch.zeros(len(q), dtype=torch.int64), 8, 1e4) for expert, (q, _, _) in made.items()
    }
    now = PackedPass.plan(splits, cache, rotary, learn=True)
    assert now.uniform == uniform
    out, (keys, values) = now.attend(made, past)

    wanted, kept, at = {UND: [], GEN: []}, [], [0, 0, 0]
    for c, text, n in sizes:
        rows = {UND: slice(at[1], at[1] + text + 2), GEN: slice(at[2], at[2] + n)}
        q, k, v = (torch.cat([made[e][i][rows[e]] for e in (UND, GEN)]) for i in range(3))
        k, v = (torch.cat((old[at[0] : at[0] + c], new)) for old, new in zip(past, (k, v), strict=True))
        sees = torch.ones(len(q), len(k), dtype=torch.bool)
        sees[:text] = sees[:text].tril(c)
        one = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(0, 1) for x in (q, k, v)), attn_mask=sees, enable_gqa=True
        ).transpose(0, 1)
        wanted[UND].append(one[: text + 2])
        wanted[GEN].append(one[text + 2 :])
        kept.append((k[: c + text], v[: c + text]))
        at = [at[0] + c, at[1] + text + 2, at[2] + n]
    for expert in (UND, GEN):
        torch.testing.assert_close(out[expert], torch.cat(wanted[expert]), rtol=1e-5, atol=1e-5)
        upstream = torch.randn(out[expert].shape, generator=generator)
        ours, theirs = (
            torch.autograd.grad(x, made[expert], upstream, retain_graph=True)
            for x in (out[expert], torch.cat(wanted[expert]))
        )
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip((keys, values), zip(*kept, strict=True), strict=True):
        assert torch.equal(ours, torch.cat(theirs))
    assert cache.after([None], splits, [0, 0]).lengths == [c + text for c, text, _ in sizes]


def test_types(tmp_path):
    built().export(tmp_path)
    models = {d: Adapter.load(config(weights=str(tmp_path), dtype=d)) for d in ("fp32", "bf16", "mixed")}
    found = {d: {(modules.role(n), p.dtype) for n, p in m.named_parameters()} for d, m in models.items()}
    fp32, bf16 = torch.float32, torch.bfloat16
    roles = set(models["fp32"].roles().values())
    assert found["fp32"] == {(role, fp32) for role in roles}
    assert found["bf16"] == {(role, fp32 if role == "codec" else bf16) for role in roles}
    kept = Adapter.trainable_roles | {"codec"}
    assert found["mixed"] == {(role, fp32 if role in kept else bf16) for role in roles}
    wanted = float(models["fp32"](batch(models["fp32"], "reca"), CounterRNG(0)).sum.detach())
    for d, model in models.items():
        freeze(model.eval(), None)
        sample = batch(model, "reca")
        for autocast in (False, True):
            with torch.autocast("cpu", bf16, enabled=autocast):
                term = model(sample, CounterRNG(0))
            term.sum.backward()
            assert abs(float(term.sum.detach()) - wanted) < 0.02 * wanted, (d, autocast)
        for task in ("i2t", "t2i"):
            assert math.isfinite(float(model(batch(model, task), CounterRNG(0)).sum.detach()))
        image = images([(20, 20)])
        assert model.generate(["a red square"], [0], steps=2)[0].shape == (3, 20, 20)
        assert model.edit(image, ["a red square"], [0], steps=2)[0].shape == (3, 20, 20)
        assert isinstance(model.answer(image, ["what is this?"], 2)[0], str)


# sampling


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    return int((a.int() - b.int()).abs().max()) <= 1


def test_sizes_of_images(plain):
    assert plain.generate(["a"], [0], steps=2, height=12, width=24)[0].shape == (3, 12, 24)
    with pytest.raises(ValueError, match="multiples of 4, got 13 x 20"):
        plain.generate(["a"], [0], height=13)
    with pytest.raises(ValueError, match="10 x 5 tokens exceeds the 8 x 8 positions.*max_latent_size"):
        plain.generate(["a"], [0], steps=2, height=40)


def test_guidance_acts_inside_its_interval_only(plain):
    forwards = []
    hook = plain.llm2vae.register_forward_hook(lambda _, args, out: forwards.append(len(out) // 25))
    plain.generate(["a red square"], [0], steps=5, interval=(0.6, 1.0))
    plain.generate(["a red square"], [0], steps=3, guidance=1.0)
    plain.edit(images([(20, 20)]), ["a red square"], [0], steps=3)
    plain.edit(images([(20, 20)]), ["a red square"], [0], steps=3, guidance=1.0, image_guidance=2.0)
    plain.edit(images([(20, 20)]), ["a red square"], [0], steps=3, image_guidance=0.5)
    hook.remove()
    assert forwards == [2, 2, 2, 1, 1, 1, 3, 3, 1, 1, 2, 2]  # t = 1, 0.9, 0.75, 0.5, then 0


def test_guidance_formulas():
    generator = torch.Generator().manual_seed(0)
    v, text, image = torch.randn(3, 6, 8, generator=generator)
    first = text + 4 * (v - text)
    second = image + 2 * (first - image)

    def scaled(x, dims):
        factor = v.norm(dim=dims, keepdim=True) / (x.norm(dim=dims, keepdim=True) + 1e-8)
        return x * factor.clamp(min=0.1, max=1)

    for renorm, wanted in (
        ("global", scaled(second, (0, 1))),
        ("channel", scaled(second, -1)),
        ("text_channel", image + 2 * (scaled(first, -1) - image)),
    ):
        torch.testing.assert_close(sampling.guide(v, [text, image], 4, 2, renorm, 0.1, [6]), wanted)
        torch.testing.assert_close(sampling.guide(v, [2 * v], 1.5, 1, renorm, 0.1, [6]), 0.5 * v)  # never made longer
    torch.testing.assert_close(sampling.guide(v, [text], 4, 2, "global", 0.1, [6]), scaled(first, (0, 1)))


@pytest.mark.parametrize("renorm", sampling.RENORMS)
def test_packed_guidance_is_that_of_each_image(renorm):
    generator, lengths = torch.Generator().manual_seed(0), [6, 1, 9]
    v, text, image = (scale * torch.randn(16, 8, generator=generator) for scale in (1.0, 2.0, 0.5))
    together = sampling.guide(v, [text, image], 4, 2, renorm, 0.0, lengths)
    parts = zip(*(x.split(lengths) for x in (v, text, image)), strict=True)
    alone = [sampling.guide(own, others, 4, 2, renorm, 0.0, [len(own)]) for own, *others in parts]
    assert torch.equal(together, torch.cat(alone))


def test_bad_sampling_options(plain):
    for options, words in (
        ({"steps": 1}, "steps=1: the time grid needs at least 2 points"),
        ({"shift": 0.0}, "shift=0 must be above 0; 1 is no shift"),
        ({"shift": -1.0}, "shift=-1 must be above 0"),
        ({"renorm": "local"}, "renorm='local' is not one of global, channel, text_channel"),
    ):
        with pytest.raises(ValueError, match=words):
            plain.generate(["a"], [0], **options)
    with pytest.raises(ValueError, match="2 prompts, 1 seeds"):
        plain.generate(["a", "b"], [0])
    with pytest.raises(ValueError, match="1 images, 2 instructions, 1 seeds"):
        plain.edit(images([(20, 20)]), ["a", "b"], [0])
    with pytest.raises(ValueError, match="1 images, 2 questions"):
        plain.answer(images([(20, 20)]), ["a", "b"])


@pytest.mark.parametrize("variant", ["pixels", "flux"])
def test_editing_sees_image_and_instruction(variant):
    model = built(variant)
    shown = images([(20, 20), (12, 20), (30, 15)])
    texts = ["make it red", "make it a blue circle", "a square"]
    together = model.edit(shown, texts, [0, 1, 2], steps=3)
    assert [p.shape for p in together] == [(3, 20, 20), (3, 12, 20), (3, 20, 8)]
    for i in range(3):
        assert near(model.edit(shown[i : i + 1], texts[i : i + 1], [i], steps=3)[0], together[i])
    assert not near(model.edit([shown[0].flip(2)], texts[:1], [0], steps=3)[0], together[0])
    assert not near(model.edit(shown[:1], texts[1:2], [0], steps=3)[0], together[0])


@pytest.mark.parametrize("task", ["t2i", "i2t"])
def test_no_sample_is_longer_than_the_limit(task, plain, monkeypatch):
    """Texts are truncated, images and their borders never; a caption still ends in eos."""
    monkeypatch.setattr(prompt, "MAX_LENGTH", 60)
    given = batch(plain, task)
    given.text = [[("a " * 99, "red")] if task == "i2t" else "a " * 99, *given.text[1:]]
    prepared = plain.prepare(given, CounterRNG(0))
    assert prepared.tokens[0] == 60 and max(prepared.tokens[1:]) < 60
    text = prepared.items[0][-1]
    assert (text.ids[-1] == plain.vocabulary.eos) == (task != "i2t")


def test_answers_do_not_depend_on_the_batch(plain):
    shown = images([(20, 20), (12, 20), (30, 15)])
    questions = ["what is this?", "describe the picture. what is it?", "this"]
    together = plain.answer(shown, questions, max_new_tokens=5)
    assert together == [plain.answer([p], [q], max_new_tokens=5)[0] for p, q in zip(shown, questions, strict=True)]


@torch.no_grad()
@pytest.mark.parametrize("samples", [1, 3])
def test_cached_answers_are_those_of_the_whole_sequence(samples, plain, monkeypatch):
    """Samples are of uneven length. No step makes an attention plan, and the prompts' cache stays as it is."""
    h_v = plain.encode_understanding(images([(18, 18), (6, 12), (18, 6)][:samples]))
    asked = [plain.text(text) for text in ("what is this?", "describe the picture. what is it?", "this")]
    items = [[prompt.VitImage(*one.shape[:2]), text] for one, text in zip(h_v, asked, strict=False)]
    _, cache = plain.prefill(prompt.Prompt(items, h_v))
    logits: list[torch.Tensor] = []
    with monkeypatch.context() as patch:
        patch.setattr(transformer, "attention_plan", None)
        tokens = sampling.greedy(plain, cache, 4, logits.append)
        assert torch.equal(sampling.greedy(plain, cache, 4), tokens)
    starts = torch.full((samples, 1), plain.vocabulary.bos)
    for number, (seen, text) in enumerate(items):
        reply = torch.cat((starts, tokens), 1)[number, : len(logits)].tolist()
        whole = prompt.Prompt([[seen, prompt.Text(text.ids + reply)]], h_v[number : number + 1])
        wanted = plain.language_model.lm_head(plain.prefill(whole)[0][-len(reply) :])
        torch.testing.assert_close(torch.stack(logits)[:, number], wanted, rtol=1e-4, atol=1e-5)


def test_answering_keeps_no_logits(plain):
    """They are of the whole vocabulary: 64 replies of 100 tokens from the published model have 3.9 GB in fp32."""
    made: list[weakref.ref] = []
    alive = []

    def remember(module, inputs, logits):
        alive.append(sum(one() is not None for one in made))
        made.append(weakref.ref(logits))

    hook = plain.language_model.lm_head.register_forward_hook(remember)
    plain.answer([torch.zeros(3, 20, 20, dtype=torch.uint8)], ["what is this?"], 6)
    hook.remove()
    assert len(alive) > 2 and max(alive) <= 1


def test_every_parameter_has_a_role(plain):
    roles = plain.roles()
    assert roles.keys() == {n for n, _ in plain.named_parameters()} and set(roles.values()) <= set(ROLES)
    assert roles["language_model.model.norm.weight"] == "und_lm"
    assert roles["language_model.model.norm_moe_gen.weight"] == "gen_lm"
    assert roles["time_embedder.mlp.0.weight"] == roles["vae2llm.bias"] == "gen_head"
    assert not any(plain.decays(n, p) for n, p in plain.named_parameters())


def test_hazards(published):
    assert built().config_warnings() == []
    assert ["copy" in text for text in built("vae").config_warnings()] == [True]
    published.config.understanding_size = 512
    assert "h_v is computed at 512 pixels" in published.config_warnings()[0]
    published.config.understanding_size = 224
    assert published.config_warnings() == []


def test_a_blur_reaches_h_v_and_not_the_target():
    models = [Adapter.load(config(hv_blur=blur)) for blur in (1, 3)]
    image = Image.fromarray(images([(64, 64)])[0].permute(1, 2, 0).numpy())
    features = []
    for model in models:
        gen, und = ([make_view(image, view)] for view in (model.views("reca").gen, model.views("reca").und))
        features.append(model.encode(Batch("reca", torch.tensor([0]), ["look"], gen=gen, und=und)))
    assert torch.equal(features[0]["moments"][0], features[1]["moments"][0])
    assert not torch.allclose(features[0]["h_v"][0], features[1]["h_v"][0], atol=1e-3)
    assert models[1].views("i2t").und.blur == 1


def test_rows_of_patches_go_back_and_forth():
    image = torch.randn(5, 6, 4)
    rows = modules.patchify(image, 2)
    assert rows.shape == (6, 20) and torch.equal(rows[0, :5], image[:, 0, 0])
    assert torch.equal(modules.unpatchify(rows, 3, 2, 2), image)
    assert torch.equal(modules.patchify(image[None], 2)[0], rows)


def test_images_are_whole_tokens():
    with pytest.raises(ValueError, match="model.image_size is 21 pixels; it must be a positive multiple of 4"):
        Adapter.load(config(image_size=21))
