"""What holds for every model: losses, gradients, learning, drawing, answers. `pytest -k bagel` runs one of them.

`--recipe FILE` runs a model outside of reca.models instead.
"""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image

import reca
from reca.config.recipe import TrainConfig
from reca.config.recipe_files import load_recipe
from reca.data.cache import collate
from reca.data.pixels import as_rgb, pixels_of, read_image
from reca.data.tasks import TASKS, Turn
from reca.data.transforms import make_view
from reca.models import UMMS
from reca.models.base import ROLES
from reca.monitoring.monitors import config_warnings
from reca.optim import freeze
from reca.options.sampling import LIMITS, defaults
from reca.rng import CounterRNG
from reca.training.compiled_blocks import compile_blocks
from reca.training.recompute import checkpoint_activations
from reca_kernels import dispatch, native
from tests.models.contract import (
    CASE_TASKS,
    CASES,
    DRAWN_BY_BATCH,
    OPS,
    RECIPES,
    TEXTS,
    VARIANTS,
    batch,
    cached,
    images,
    learnable,
    load,
    loss,
    quick,
    shared,
)

PLAIN = [case for case in CASES if case not in VARIANTS]


@pytest.fixture(params=CASES)
def model(request):
    model = shared(request.param)
    model.zero_grad()
    return model


@pytest.fixture(params=PLAIN)
def plain(request):
    """A model without its variants."""
    model = shared(request.param)
    model.zero_grad()
    return model


# what it says of itself


def test_tokens_of_a_sample_are_the_rows_of_its_sequence(plain):
    """Counted once more in a pass of it alone: packed by expert, or in a row, behind which OpenUni's queries stand."""
    rng, rows = CounterRNG(0), range(4)
    for task in sorted(plain.tasks):
        together = plain.prepare(batch(plain, task), rng)
        counted = []
        for row in rows:
            one = plain.prepare(batch(plain, task, (row,)), rng)
            if plain.name not in UMMS:  # of whose layouts nothing is known
                counted += one.tokens
            elif one.packed:
                layouts = [one.prompt, *([one.image] if one.image else [])]
                counted.append(sum(x.src.numel() + x.latent_positions.numel() for x in layouts))
            else:
                counted.append(getattr(one.layout, "positions", one.layout.src).shape[1])
        assert list(together.tokens) == counted, task
        assert len(set(counted)) > 1 or plain.name not in UMMS, task


def test_roles_cover_all_parameters(model):
    roles = model.roles()
    assert roles.keys() == {name for name, _ in model.named_parameters()}
    assert set(roles.values()) <= set(ROLES)
    trained = {roles[name] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == model.trainable_roles & set(roles.values())


def test_what_reca_trains_is_there(plain):
    assert plain.trainable_roles <= set(plain.roles().values())


def test_a_tiny_model_is_small(plain):
    assert 2e5 < sum(p.numel() for p in plain.parameters()) < 1e6


def test_blocks_are_parts_of_the_model_and_each_comes_once(model):
    blocks, modules = model.blocks(), set(model.modules())
    assert len(blocks) > 1 and len(set(blocks)) == len(blocks) and modules >= set(blocks)
    assert not any(inner in set(blocks) for block in blocks for inner in list(block.modules())[1:])


def test_decay_is_a_property_of_matrices(model):
    assert not any(model.decays(name, p) for name, p in model.named_parameters() if name.endswith(".bias"))


def test_views_have_what_a_task_needs(model):
    for task in model.tasks:
        views = model.views(task)
        assert (views.gen is None) == (task == "i2t")
        assert views.und is not None or task != "i2t"
        assert views.und is None or task != "t2i"
    assert model.tasks <= set(TASKS) and "reca" in model.tasks


def test_a_tiny_recipe_warns_of_nothing(plain):
    assert plain.config_warnings() == []


# losses


@pytest.mark.parametrize(("model", "task"), CASE_TASKS, indirect=["model"])
def test_the_weight_of_a_loss_is_known_before(model, task):
    sample = batch(model, task)
    term = model(sample, CounterRNG(3))
    assert float(term.weight) == float(model.prepare(sample, CounterRNG(3)).weight) > 0
    assert math.isfinite(float(term.sum.detach())) and not term.weight.requires_grad


@pytest.mark.parametrize(("case", "task"), [pair for pair in CASE_TASKS if pair[0] not in DRAWN_BY_BATCH])
def test_a_batch_is_the_sum_of_its_samples(case, task):
    """Texts of different lengths, images of different shapes, texts that are dropped: padding must not matter."""
    model = shared(case)
    together = model(batch(model, task), CounterRNG(3))
    alone = [model(batch(model, task, [row]), CounterRNG(3)) for row in range(4)]
    torch.testing.assert_close(together.sum, sum(term.sum for term in alone), rtol=1e-5, atol=1e-4)
    assert float(together.weight) == sum(float(term.weight) for term in alone)


@pytest.mark.parametrize(("case", "task"), [pair for pair in CASE_TASKS if pair[0] not in DRAWN_BY_BATCH])
def test_the_loss_by_sample_is_that_of_each_alone(case, task):
    model, sample = shared(case), batch(shared(case), task)
    plain = model(sample, CounterRNG(3))
    sample.prepared = model.prepare(sample, CounterRNG(3)).asked_by_sample()
    asked = model(sample, CounterRNG(3))
    assert plain.samples is None and torch.equal(asked.sum, plain.sum) and torch.equal(asked.weight, plain.weight)
    alone = [model(batch(model, task, [row]), CounterRNG(3)) for row in range(4)]
    wanted = torch.stack([torch.stack((term.sum.detach(), term.weight)) for term in alone])
    torch.testing.assert_close(asked.samples, wanted, rtol=1e-5, atol=1e-4)
    assert not asked.samples.requires_grad


@pytest.mark.parametrize(("model", "task"), CASE_TASKS, indirect=["model"])
@pytest.mark.parametrize("rows", [(0, 1, 2), (0, 1)])
def test_cached_features_give_the_same_loss(model, task, rows):
    sample = batch(model, task, rows)
    features = model.encode(sample)
    assert not any(tensor.requires_grad for value in features.values() for tensor in value)
    kept = collate([{name: value[i] for name, value in features.items()} for i in range(len(rows))])
    wanted, found = model(sample, CounterRNG(1)), model(cached(sample, kept), CounterRNG(1))
    assert torch.equal(found.sum, wanted.sum) and torch.equal(found.weight, wanted.weight)


def test_the_host_prepares_without_the_model(model):
    """Threads of the loader call it while a step runs: it draws by address, and touches no parameter."""
    sample, kept = batch(model, "reca"), [p.data for p in model.parameters()]
    state = torch.get_rng_state()
    try:
        for p in model.parameters():
            p.data = torch.full_like(p.data, torch.nan)
        prepared = model.prepare(sample, CounterRNG(3))
    finally:
        for p, data in zip(model.parameters(), kept, strict=True):
            p.data = data
    assert torch.equal(torch.get_rng_state(), state)
    wanted = model(sample, CounterRNG(3)).sum
    sample.prepared = prepared
    assert torch.equal(model(sample, CounterRNG(3)).sum, wanted)


def test_draws_are_a_function_of_seed_and_samples(model):
    sample, state = batch(model, "reca"), torch.get_rng_state()
    first = model(sample, CounterRNG(0)).sum
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(100)
    assert torch.equal(model(sample, CounterRNG(0)).sum, first)
    # A model that draws nothing but what it drops has seeds that agree, and one of others may draw nothing at all.
    losses = [model(sample, CounterRNG(seed)).sum for seed in range(1, 9)]
    assert model.name not in UMMS or any(not torch.equal(other, first) for other in losses)


def test_condition_of_another_image_changes_the_loss(model):
    sample = batch(model, "reca")
    assert model(sample, CounterRNG(1), "other").sum != model(sample, CounterRNG(1)).sum


def test_the_loss_by_sample_under_another_image(model):
    """Images of other sizes have h_v of other lengths, so that a layout is made again."""
    sample = batch(model, "reca")
    sample.prepared = model.prepare(sample, CounterRNG(3)).asked_by_sample()
    found = model(sample, CounterRNG(3), "other")
    torch.testing.assert_close(found.samples[:, 0].sum(), found.sum.detach(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("model", "task"), CASE_TASKS, indirect=["model"])
def test_gradients_reach_what_is_trained_and_nothing_else(model, task):
    term = model(batch(model, task), CounterRNG(0))
    if not term.sum.requires_grad:
        assert task == "i2t" and not model.trainable_roles & {"shared_lm", "und_lm"}
        return
    term.sum.backward()
    roles = model.roles()
    reached = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert reached and {roles[name] for name in reached} <= set(model.trainable_roles)
    assert all(gradient.isfinite().all() for gradient in reached.values())
    if task == "reca":
        assert any(bool(gradient.any()) for gradient in reached.values())


@pytest.mark.parametrize("name", PLAIN)
def test_an_encoder_cannot_be_trained_and_that_is_said(name):
    model = load(name)
    roles, recipe = model.roles(), load_recipe(RECIPES[name])
    for role in sorted((model.encoder_roles or set()) & set(roles.values())):
        trained = freeze(model, [*model.trainable_roles, role])
        for task in sorted(model.tasks & {"reca", "i2t"}):
            term = model(batch(model, task), CounterRNG(0))
            if term.sum.requires_grad:
                term.sum.backward()
        assert all(p.grad is None for n, p in model.named_parameters() if roles[n] == role)
        said = [text for text in config_warnings(recipe, model, trained) if "will not change" in text]
        assert len(said) == 1 and f"includes {role}, " in said[0]
    assert not any("will not change" in text for text in config_warnings(recipe, model, freeze(model, None)))


def test_autocast_stays_near(model):
    sample = batch(model, "reca")
    with torch.autocast("cpu", torch.bfloat16):
        term = model(sample, CounterRNG(0))
    assert term.sum.dtype == torch.float32
    torch.testing.assert_close(term.sum, model(sample, CounterRNG(0)).sum, rtol=2e-2, atol=0)


def test_codecs_are_exact_under_autocast(model):
    sample = batch(model, "reca")
    wanted = model.encode(sample)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.encode(sample)
    for key in wanted.keys() - model.condition_keys:
        for a, b in zip(found[key], wanted[key], strict=True):
            assert torch.equal(a, b) and a.dtype == b.dtype


def gradients(model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss(model, batch(model, "reca")).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("around", [True, 2, "selective", "compiled"])
def test_recomputed_and_compiled_blocks_give_the_same_gradient(name, around):
    model = load(name)
    wanted = gradients(model)
    if around == "compiled":
        compile_blocks(model, "aot_eager")
    else:
        checkpoint_activations(model, TrainConfig(activation_checkpointing=around))
        again = [isinstance(block.forward, functools.partial) for block in model.blocks()]
        assert again == [(i + 1) % 2 == 0 or around != 2 for i in range(len(again))]
    found = gradients(model)
    torch._dynamo.reset()
    assert found.keys() == wanted.keys()
    for key, gradient in wanted.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.skipif(native.module is None, reason=str(native.missing))
def test_the_kernels_of_this_project_run(plain, monkeypatch):
    ran, load_op = {}, dispatch.load

    def recorded(backend, op):
        ran.setdefault(task, set()).add((backend, op))
        return load_op(backend, op)

    monkeypatch.setattr(dispatch, "load", recorded)
    for task in plain.tasks:
        term = plain(batch(plain, task), CounterRNG(0))
        if term.sum.requires_grad:
            term.sum.backward()
    assert {backend for pairs in ran.values() for backend, _ in pairs} <= {"cpu"}
    if plain.name not in OPS:
        return
    for task in plain.tasks - {"i2t"}:
        assert {op for _, op in ran[task]} == OPS[plain.name], task
    assert {("cpu", "template_concat"), ("cpu", "masked_linear_cross_entropy")} <= ran["i2t"]


# learning


@pytest.mark.parametrize(("name", "task"), [pair for pair in CASE_TASKS if pair[0] in PLAIN])
def test_it_learns_and_what_is_frozen_stays(name, task):
    model = load(name)
    learnable(model, task)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    before = {key: tensor.detach().clone() for key, tensor in tensors.items()}
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    optimizer, sample, losses = torch.optim.AdamW(trained.values(), lr=3e-3), batch(model, task), []
    while not losses or losses[-1] >= 0.5 * losses[0]:
        assert len(losses) < 50, losses
        term = loss(model, sample)
        term.backward()
        losses.append(float(term.detach()))
        optimizer.step()
        optimizer.zero_grad()
    changed = {key for key, tensor in tensors.items() if not torch.equal(tensor, before[key])}
    assert changed and changed <= trained.keys()
    roles = model.roles()
    if {roles[key] for key in trained} == model.trainable_roles:
        assert task != "reca" or {roles[key] for key in changed} == model.trainable_roles


@pytest.mark.parametrize("name", PLAIN)
def test_a_taught_answer_is_given(name):
    model = load(name)
    if "answer" not in model.abilities:
        pytest.skip(f"{name} cannot answer")
    learnable(model, "i2t")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    sizes = [(18, 18)] * 2
    sample = batch(model, "i2t", (0, 1), sizes)
    sample.text = [[Turn("what is this", answer)] for answer in ("a red square", "a blue circle")]
    for _ in range(60):
        loss(model, sample).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model.answer(images(sizes), ["what is this"] * 2, 8) == ["a red square", "a blue circle"]


def test_a_continued_run_makes_the_same_bits(plain, tmp_path):
    given = {"data.workers": 0, "train.threads": 1, "log.tensorboard": False}
    given |= {f"objective.{task}.{key}": n for task in TEXTS for key, n in (("batch_size", 4), ("micro_batch", 2))}

    def run(folder: str, steps: int) -> dict[str, torch.Tensor]:
        reca.train(RECIPES[plain.name], given | {"run_dir": tmp_path / folder, "train.steps": steps})
        return reca.load(tmp_path / folder).state_dict()

    whole = run("whole", 4)
    run("halves", 2)
    torch.rand(7)
    halves = run("halves", 4)
    assert all(torch.equal(tensor, halves[name]) for name, tensor in whole.items())


# drawing, editing, answering

PROMPTS, SEEDS = ["a red square", "a blue circle drawn with care", "a red square"], [5, 5, 6]


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    return int((a.int() - b.int()).abs().max()) <= 1


@pytest.mark.parametrize("name", PLAIN)
def test_inference_is_in_eval_mode_and_without_attention_that_plans_each_shape(name):
    """Dropout (Harmon's own, LoRA's) must not act; cuDNN plans 0.4 to 1 s per new shape."""
    model, seen = load(name).train(), []
    for block in model.blocks():
        block.register_forward_pre_hook(
            lambda block, _: seen.append((block.training, torch.backends.cuda.cudnn_sdp_enabled()))
        )
    before = torch.backends.cuda.cudnn_sdp_enabled()
    model.generate(["a red square"], [0], **quick(name, 2))
    if "answer" in model.abilities:
        model.answer(images()[:1], ["what is this"], 1)
    if "reconstruct" in model.abilities:
        model.reconstruct(batch(model, "reca", [0]), [0], **quick(name, 2))
    if "edit" in model.abilities:
        model.edit(images()[:1], ["a"], [0], steps=2)
    assert set(seen) == {(False, False)}
    assert all(module.training for module in model.modules()) and torch.backends.cuda.cudnn_sdp_enabled() == before


def test_an_image_depends_on_its_prompt_and_seed_only(model):
    options = quick(model.name)
    together = model.generate(PROMPTS, SEEDS, **options)
    alone = [model.generate([text], [seed], **options)[0] for text, seed in zip(PROMPTS, SEEDS, strict=True)]
    parts = {"batch": 2} if "batch" in defaults(model.generate) else {}
    halves = model.generate(PROMPTS, SEEDS, **options, **parts)
    size = model.views("t2i").gen.size
    for one, other, third in zip(together, alone, halves, strict=True):
        assert one.shape == (3, size, size) and one.dtype == torch.uint8
        assert near(one, other) and near(one, third)
    assert not near(together[0], together[1]) and not near(together[0], together[2])
    assert all(
        torch.equal(one, same) for one, same in zip(together, model.generate(PROMPTS, SEEDS, **options), strict=True)
    )


def test_a_reconstruction_depends_on_its_own_image_and_seed(model):
    if "reconstruct" not in model.abilities:
        pytest.skip(f"{model.name} cannot reconstruct")
    options, given = quick(model.name), batch(model, "reca", (0, 1, 0), [(20, 20)] * 2)
    given.text, seeds = [TEXTS["reca"][0]] * 3, [5, 5, 6]
    together = model.reconstruct(given, seeds, **options)
    alone = []
    for row, (image, seed) in enumerate(zip((0, 1, 0), seeds, strict=True)):
        one = batch(model, "reca", (image,), [(20, 20)] * 2)
        one.text = given.text[:1]
        alone += model.reconstruct(one, [seed], **options)
        assert together[row].shape == given.gen[row].shape and together[row].dtype == torch.uint8
        assert near(together[row], alone[row])
    assert not near(together[0], together[2])


@pytest.mark.parametrize("name", [n for n in PLAIN if n in ("show_o", "janus", "open_uni")])  # others take longer
def test_a_reconstruction_comes_near_its_image_once_it_is_trained(name):
    model = load(name)
    learnable(model, "reca")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    flat = [torch.full((3, 20, 20), level, dtype=torch.uint8) for level in (20, 235)]
    views, sizes = model.views("reca"), [(20, 20)] * 2
    given = batch(model, "reca", (0, 1), sizes)
    images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in flat]
    given.gen = [make_view(one, views.gen) for one in images]
    given.und = views.und and [make_view(one, views.und) for one in images]
    for seed in range(60):
        loss(model, given, seed).backward()
        optimizer.step()
        optimizer.zero_grad()
    means = [image.float().mean() for image in model.reconstruct(given, [1, 2], **quick(name, 8))]
    assert means[0] + 25 < means[1], means


def test_what_cannot_be_drawn(plain):
    assert plain.generate([], []) == []
    shown = torch.zeros(2, 3, 20, 20, dtype=torch.uint8)
    if "answer" in plain.abilities:
        assert plain.answer([], []) == []
        assert len(plain.answer(shown, ["what is this"] * 2, 2)) == 2
    if "edit" in plain.abilities:
        assert plain.edit([], [], []) == [] and len(plain.edit(shown, ["a", "b"], [0, 1], steps=2)) == 2
    with pytest.raises(ValueError, match="1 prompts, 2 seeds; expected the same number of each"):
        plain.generate(["a"], [1, 2])
    wrong = {"steps": 0} if "steps" in defaults(plain.generate) else {"temperature": -1.0}
    with pytest.raises(ValueError, match=next(f"{key}={n:g}" for key, n in wrong.items())):
        plain.generate(["a"], [0], **wrong)
    with pytest.raises(ValueError, match="seed -1 is outside"):
        plain.generate(["a"], [-1])
    with pytest.raises(TypeError, match=r"prompts='a red circle' must be a list; write prompts=\['a red circle'\]"):
        plain.generate("a red circle", range(12))
    with pytest.raises(TypeError, match=r"seeds=0 must be a list; write seeds=\[0\]"):
        plain.generate(["a red circle"], 0)
    for prompts in (iter(["a"]), {"a": 0}, {"a"}, None):
        with pytest.raises(TypeError, match=f"prompts must be a list, got {type(prompts).__name__}"):
            plain.generate(prompts, [0])
    for seed in (True, 1.0, "0", torch.tensor(1.0)):
        with pytest.raises(TypeError, match="seeds must be integers, got"):
            plain.generate(["a"], [seed])
    with pytest.raises(TypeError, match="generate: missing a required argument: 'seeds'; .* are prompts, seeds"):
        plain.generate(["a"])
    options = ".*".join(f"{name}=" for name in defaults(plain.generate))
    with pytest.raises(TypeError, match=f"generate: got an unexpected keyword argument 'cfg'; .* seeds, {options}"):
        plain.generate(["a"], [0], cfg=3)


def test_seeds_of_numpy_and_torch(plain, recwarn):
    """A tensor of seeds was taken with a warning by torch."""
    options = quick(plain.name, 2)
    (expected,) = plain.generate(["a"], [3], **options)
    for seeds in (np.array([3]), torch.tensor([3]), range(3, 4), (3,)):
        assert torch.equal(plain.generate(["a"], seeds, **options)[0], expected)
    assert not [str(warning.message) for warning in recwarn if "tensor" in str(warning.message)]


def test_limits_of_sampling_options(plain):
    """From Python, too: a negative `batch` would make no image and no error."""
    asked = {name: set(defaults(getattr(plain, name))) & set(LIMITS) for name in plain.abilities & {"generate", "edit"}}
    for name, limited in asked.items():
        lists = ([images()[0]], ["a"], [0]) if name == "edit" else (["a"], [0])
        for option, below in itertools.product(limited, (1, 2)):
            least = LIMITS[option][0]
            with pytest.raises(ValueError, match=f"{option}={least - below}: expected at least {least}"):
                getattr(plain, name)(*lists, **{option: least - below})
    if "answer" not in plain.abilities:
        return
    for wrong in ({"max_new_tokens": 0}, {"max_new_tokens": -1}):
        with pytest.raises(ValueError, match="max_new_tokens=.*: expected at least 1"):
            plain.answer([images()[0]], ["a"], **wrong)
    with pytest.raises(ValueError, match="0 images, 1 questions"):
        plain.answer([], ["a"])


def test_what_is_no_image(plain):
    """A PIL image, floats, channels behind height and width, and images without pixels."""
    of_pil = Image.new("RGB", (20, 20))
    wrong = [torch.zeros(3, 20, 20), *(torch.zeros(size, dtype=torch.uint8) for size in ((20, 20, 3), (3, 0, 20)))]
    wrong.append(torch.zeros(3, 20, 20, dtype=torch.uint8, device="meta"))
    found = [f"torch.{one}" for one in (r"float32 \[3, 20, 20\]", r"uint8 \[20, 20, 3\]", r"uint8 \[3, 0, 20\]")]
    named = ["Image", *(f"{one} on cpu" for one in found), r"torch.uint8 \[3, 20, 20\] on meta"]
    for image, got in zip([of_pil, *wrong], named, strict=True):
        if "answer" in plain.abilities:
            message = rf"must be a uint8 tensor \[3, H, W\], got {got}; .*read_image.*as_rgb"
            with pytest.raises(TypeError, match=message):
                plain.answer([image], ["what is this"])
        if "edit" in plain.abilities:
            with pytest.raises(TypeError, match=rf"must be a uint8 tensor \[3, H, W\], got {got}; "):
                plain.edit([image], ["a red square"], [0], steps=3)
    if "reconstruct" in plain.abilities:
        with pytest.raises(TypeError, match="reconstruct: expected a reca.data.batch.Batch, got list; .*image_batch"):
            plain.reconstruct([of_pil], [0])
        with pytest.raises(ValueError, match="reconstruct: expected a batch of the task reca, got t2i"):
            plain.reconstruct(batch(plain, "t2i", [0]), [0])
    if "i2t" in plain.tasks:  # the first image None was taken for the one already encoded
        with pytest.raises(TypeError, match="got NoneType"):
            plain.log_likelihood([None], ["a"], ["b"])


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "I;16", "CMYK"])
def test_images_that_a_message_says_how_to_convert(tmp_path, mode):
    """By the two functions that `fit_to_view` names; a path may be a text."""
    image, path = Image.new(mode, (4, 3)), tmp_path / "image.tif"
    image.save(path)
    read = read_image(str(path))
    assert read.shape == (3, 3, 4) and torch.equal(read, pixels_of(as_rgb(image)))


def test_answers_do_not_depend_on_the_batch(model):
    if "answer" not in model.abilities:
        pytest.skip(f"{model.name} cannot answer")
    shown, questions = images([(20, 20), (12, 20), (30, 15)]), ["what is this", "describe the picture", "this"]
    together = model.answer(shown, questions, max_new_tokens=5)
    assert all(isinstance(text, str) for text in together)
    assert together == [model.answer([p], [q], max_new_tokens=5)[0] for p, q in zip(shown, questions, strict=True)]
    with pytest.raises(ValueError, match="3 images, 1 questions; expected the same number of each"):
        model.answer(shown, questions[:1])


def test_editing_sees_image_and_instruction(model):
    shown, texts, seeds = (
        images([(20, 20), (12, 20), (30, 15)]),
        ["a red square", "a blue circle", "a square"],
        [0, 1, 2],
    )
    if "edit" not in model.abilities:
        with pytest.raises(NotImplementedError, match=f"{model.name} cannot edit images"):
            model.edit(shown, texts, seeds)
        return
    together = model.edit(shown, texts, seeds, steps=3, batch=2)
    assert all(image.dtype == torch.uint8 and image.shape[0] == 3 for image in together)
    alone = [model.edit([p], [text], [seed], steps=3)[0] for p, text, seed in zip(shown, texts, seeds, strict=True)]
    assert all(near(one, other) for one, other in zip(alone, together, strict=True))
    for other, text, seed in (
        (shown[0].flip(2), texts[0], 0),
        (shown[0], texts[1], 0),
        (shown[0], texts[0], 1),
    ):
        assert not torch.equal(model.edit([other], [text], [seed], steps=3)[0], alone[0])
    with pytest.raises(ValueError, match="3 images, 2 instructions, 1 seeds; expected the same number of each"):
        model.edit(shown, texts[:2], [0])
