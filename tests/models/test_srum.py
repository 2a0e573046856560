"""SRUM: scored images as data, the loss against its formula, and what a short training does to good and bad regions."""

import itertools
import json

import pytest
import torch
from PIL import Image

import reca
from reca.data.cache import FeatureCache
from reca.data.config import DataConfig
from reca.data.errors import DataError
from reca.data.loader import open_loader
from reca.data.sources.factory import open_source
from reca.data.tasks import Scored, ScoredBox
from reca.data.views import View, Views
from reca.models.common.scored_flow import scored_flow_loss, token_rewards
from reca.options.fields import RecipeError
from reca.rng import CounterRNG, RandomStream
from reca_kernels.flow_matching.reference import noise_of, tokens
from tests.data.files import fill, image_bytes
from tests.models.contract import batch, load


def scored(box, mark, caption="a red square", **more):
    return {"image": "a.png", "caption": caption, "boxes": [{"box": list(box), "score": mark}], **more}


def write(root, *rows):
    """A file of rows beside the images a.png and b.png, 40 x 20 pixels. Its path."""
    fill(root, {"a.png": image_bytes(size=(40, 20)), "b.png": image_bytes((1, 2, 3), size=(40, 20))})
    path = root / "scored.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# data


def test_rows_of_scored_images(tmp_path):
    rows = [
        scored((10, 5, 60, 15), 0.5, score=0, background=-1, target="b.png"),
        scored((-3, 0, 20, 20), -1),
        {"image": "b.png", "caption": " a ", "boxes": []},
    ]
    source = open_source(str(write(tmp_path, *rows)), "srum")
    assert len(source) == 3 and source.key(2) == "b.png#3" and source[0].image == (tmp_path / "a.png").read_bytes()
    assert source[0].text == Scored(
        "a red square", (ScoredBox(0.25, 0.25, 1, 0.75, 0.25),), -0.5, (tmp_path / "b.png").read_bytes()
    )
    assert source[1].text == Scored("a red square", (ScoredBox(0, 0, 0.5, 1, -1),))
    assert source[2].text == Scored("a", ())
    assert source.size(0) == source.size(1) + source.size(2)
    assert source.identity() != open_source(str(write(tmp_path, *rows[1:])), "srum").identity()


def test_boxes_are_in_pixels_of_the_image_as_it_is_shown(tmp_path):
    path = write(tmp_path, scored((0, 0, 10, 40), 1))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown as 20 x 40
    Image.open(tmp_path / "a.png").save(tmp_path / "a.png", exif=exif)
    assert open_source(str(path), "srum")[0].text.boxes[0][:4] == (0, 0, 0.5, 1)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("text", "are not JSON objects"),
        ({"image": "../a.png"}, "have an image outside data.image_root"),
        ({"image": "a.png"}, "have no caption"),
        ({"image": "a.png", "caption": "a"}, "have no list of boxes"),
        ({"image": "a.png", "caption": "a", "boxes": [[1, 2, 3, 4]]}, 'have a box that is not {"box": '),
        (scored((1, 2, 3), 1), "have a box that is not four numbers"),
        (scored((1, 2, "3", 4), 1), "have a box that is not four numbers"),
        (scored((0, 0, 10**400, 4), 1), "have a box that is not four numbers"),
        (scored((5, 2, 5, 4), 1), "have a box whose right is not greater than its left"),
        (scored((1, 2, 3, 4), 1.5), "have a score of a box that is not a number from -1 to 1"),
        (scored((1, 2, 3, 4), True), "have a score of a box that is not a number from -1 to 1"),
        (scored((1, 2, 3, 4), 1, score="good"), "have a score that is not a number from -1 to 1"),
        (scored((1, 2, 3, 4), 1, background=float("nan")), "have a background that is not a number from -1 to 1"),
        (scored((1, 2, 3, 4), 1, target="/etc/b.png"), "have an image outside data.image_root"),
    ],
)
def test_rows_that_are_left_out(tmp_path, row, reason):
    source = open_source(str(write(tmp_path, scored((0, 0, 1, 1), 1), row)), "srum")
    assert len(source) == 1 and next(iter(source.skipped.counts)).startswith(f"rows that {reason}")
    with pytest.raises(DataError, match="scored.jsonl has no scored image: 1 rows that have"):
        open_source(str(write(tmp_path, {"image": None})), "srum")


def test_what_is_no_file_of_scored_images(tmp_path):
    for name, fault in (("x.json", "does not exist"), ("", "is not a file")):
        with pytest.raises(DataError, match=f"{fault}; set data.scored to a .json or .jsonl file"):
            open_source(str(tmp_path / name), "srum")


def test_batches_have_a_target_where_a_sample_has_one(tmp_path, monkeypatch):
    rows = [
        scored((0, 0, 20, 20), 1, target="b.png"),
        {"image": "b.png", "caption": "b", "boxes": []},
        scored((50, 0, 60, 20), 1, caption="its box is outside"),
    ]
    config = DataConfig(scored=str(write(tmp_path, *rows)), decoder="pillow", workers=0, max_bad_fraction=0.5)
    views = Views(View(4), None)
    loader = open_loader(config, "srum", views, seed=0, micro_batch=2)
    batches = list(itertools.islice(loader, 6))
    first = next(one for one in batches if len({said.caption for said in one.text}) == 2)
    order = [said.caption for said in first.text]
    assert sorted(order) == ["a red square", "b"] and all(said.target is None for said in first.text)
    pair = order.index("a red square")
    assert first.gen[pair][0, 0, 0] == 200 and first.target[pair][0, 0, 0] == 1
    assert torch.equal(first.gen[1 - pair], first.target[1 - pair])
    assert [reason[:8] for reason in loader.bad_samples.bad.values()] == ["box [50."]
    alone = DataConfig(scored=str(write(tmp_path, rows[1])), decoder="pillow", workers=0)
    assert next(iter(open_loader(alone, "srum", views, seed=0, micro_batch=2))).target is None
    # Features that were kept with a target do not stand for a batch of others that were kept without.
    config.cache = str(tmp_path / "cache")
    loader = open_loader(config, "srum", views, seed=0, micro_batch=2, identity=[])
    own, both = {"x": torch.zeros(1)}, {"x": torch.zeros(1), "target": torch.zeros(1)}
    kept = iter([both, own, both, both])
    monkeypatch.setattr(FeatureCache, "get", lambda self, address: next(kept))
    assert loader._batch(range(2), [loader._read(i) for i in range(2)]).features is None
    assert loader._batch(range(2), [loader._read(i) for i in range(2)]).features.keys() == both.keys()
    Image.new("RGB", (30, 20)).save(tmp_path / "b.png")
    uneven = DataConfig(scored=str(tmp_path / "scored.jsonl"), decoder="pillow", workers=0)
    uneven.scored = str(tmp_path / "two.jsonl")
    (tmp_path / "two.jsonl").write_text(json.dumps(rows[0]))
    with pytest.raises(DataError, match="image and target differ in shape"):
        next(iter(open_loader(uneven, "srum", Views(View(40, "bound"), None), seed=0, micro_batch=1)))


# the loss


def test_tokens_of_a_box():
    said = Scored("", (ScoredBox(0, 0, 0.5, 0.5, -1), ScoredBox(0.25, 0.25, 1, 0.6, 0.5)), 0.1)
    wanted = [[-1, -1, 0.1, 0.1], [-1, 0.5, 0.5, 0.5], [0.1] * 4, [0.1] * 4]
    for boxes in (said.boxes, said.boxes[::-1]):  # the highest score counts, whichever comes first
        assert torch.equal(token_rewards(said._replace(boxes=boxes), 4, 4), torch.tensor(wanted).flatten())
    for edge in (0.0, 0.4, 0.999):  # however small, a box has a token
        small = Scored("", (ScoredBox(edge, edge, edge + 0.001, edge + 0.001, 1),))
        assert token_rewards(small, 3, 5).sum() == 1
    assert torch.equal(token_rewards(Scored("", (ScoredBox(0, 0, 1, 1, -0.5),), 1), 2, 3), torch.full((6,), -0.5))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("second", [False, True])
def test_loss_and_gradient_are_the_formula(monkeypatch, backend, second):
    """Against fp64: noise as the reference draws it, and 2 R (v - a) + 2 c (v - b) by hand."""
    generator = torch.Generator().manual_seed(0)
    shapes, patch = [(2, 4, 6), (2, 2, 2)], 2
    x0, y0 = ([torch.randn(shape, generator=generator) for shape in shapes] for _ in range(2))
    noise = CounterRNG(3).noise(RandomStream.NOISE, torch.tensor([7, 9]))
    eps = torch.cat(noise_of(x0, (noise.seed, noise.sample_ids, noise.stream))).double().view(-1, 8)
    a, b = (eps - torch.cat([tokens(z.double(), patch) for z in images]).view(-1, 8) for images in (x0, y0))
    rewards = 2 * torch.rand(len(eps), 1, generator=generator) - 1
    v = torch.randn(eps.shape, generator=generator, requires_grad=True)
    if backend == "reference":
        monkeypatch.setenv("RECA_BACKEND", "reference")
    found = scored_flow_loss(v, x0, y0 if second else None, noise, rewards, 0.3, patch)
    found.sum().backward()
    held = b if second else a
    wide = v.detach().double()
    wanted = rewards.double() * (wide - a).square() + 0.3 * (wide - held).square()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    gradient = 2 * rewards.double() * (wide - a) + 0.6 * (wide - held)
    torch.testing.assert_close(v.grad.double(), gradient, rtol=1e-5, atol=1e-5)
    if not second:
        same = scored_flow_loss(v, x0, x0, noise, rewards, 0.3, patch)
        torch.testing.assert_close(found, same, rtol=1e-5, atol=1e-5)


def test_the_loss_is_exact_in_fp64():
    x0 = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    noise = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    v, rewards = torch.randn_like(x0), 2 * torch.rand(2, 1, 4, 4, dtype=torch.float64) - 1
    found = scored_flow_loss(v, x0, -x0, noise, rewards, 0.25)
    wanted = rewards * (v - (noise - x0)) ** 2 + 0.25 * (v - (noise + x0)) ** 2
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", ["bagel", "open_uni"])
def test_plain_scores_are_the_loss_of_captions(name):
    """With score 1 everywhere, constraint c and no other target, SRUM is 1 + c times text-to-image training."""
    model = load(name, "model.srum_constraint=0.5")
    plain = batch(model, "t2i", sizes=[(20, 20)] * 4)
    praised = batch(model, "srum", sizes=[(20, 20)] * 4)
    praised.text = [Scored(caption, (), 1.0) for caption in plain.text]
    rng = CounterRNG(1)
    torch.testing.assert_close(model(praised, rng).sum, 1.5 * model(plain, rng).sum, rtol=1e-5, atol=1e-5)
    praised.target = praised.gen
    torch.testing.assert_close(model(praised, rng).sum, 1.5 * model(plain, rng).sum, rtol=1e-5, atol=1e-5)
    praised.target = [torch.zeros_like(image) for image in praised.gen]
    assert not torch.isclose(model(praised, rng).sum, 1.5 * model(plain, rng).sum, rtol=1e-2)
    cached = model.encode(praised)
    assert cached.keys() >= {"target"}


@pytest.mark.parametrize("name", ["bagel", "open_uni"])
def test_good_regions_come_nearer_and_bad_ones_go_away(name, monkeypatch):
    model = load(name, "model.srum_constraint=0.1")
    sample = batch(model, "srum", (0, 1), sizes=[(20, 20)] * 2)
    left = ScoredBox(0, 0, 0.5, 1, 1.0)
    sample.text = [Scored("a red square", (left,), -0.5), Scored("a blue circle", (left,), -0.5)]
    errors = []

    def kept(velocity, x0, target, noise, rewards, constraint, patch=1):
        error = scored_flow_loss(velocity, x0, target, noise, torch.zeros_like(rewards), 1.0, patch).detach()
        good = (rewards > 0).expand_as(error)
        errors.append((float(error[good].mean()), float(error[~good].mean())))
        return scored_flow_loss(velocity, x0, target, noise, rewards, constraint, patch)

    monkeypatch.setattr(f"reca.models.{name}.loss.scored_flow_loss", kept)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(20):
        model(sample, CounterRNG(0)).sum.backward()
        optimizer.step()
        optimizer.zero_grad()
    (good, bad), (better, worse) = errors[0], errors[-1]
    assert better < 0.9 * good and worse > 1.1 * bad


def test_a_continued_run_makes_the_same_bits(tmp_path):
    """A row has a target, another has none, and a third batch comes from features on disk."""
    rows = [
        scored((0, 0, 20, 20), 1, target="b.png"),
        {"image": "b.png", "caption": "a blue circle", "boxes": []},
        scored((5, 5, 30, 15), -0.5, score=0.5),
    ]
    path = write(tmp_path, *rows)

    def run(folder, steps, *more):
        keys = ["objective.reca.weight=0", "objective.srum.weight=1", "objective.srum.batch_size=2", *more]
        keys += [f"data.scored={path}", f"run_dir={tmp_path / folder}", f"train.steps={steps}", "data.workers=0"]
        keys += ["objective.srum.micro_batch=2", "train.threads=1", "log.tensorboard=false", "log.every=1"]
        reca.train("bagel_tiny", keys)
        return reca.load(tmp_path / folder).state_dict()

    whole, _, halves = run("whole", 4), run("halves", 2), run("halves", 4)
    assert all(torch.equal(tensor, halves[name]) for name, tensor in whole.items())
    lines = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and all("srum/loss" in line for line in lines)
    cached = run("cached", 4, f"data.cache={tmp_path / 'features'}")
    for name, tensor in whole.items():
        torch.testing.assert_close(tensor, cached[name], rtol=1e-5, atol=1e-6)


def test_models_without_a_flow_have_no_such_task():
    with pytest.raises(RecipeError, match=r"show_o has no srum loss: set objective.srum.weight=0"):
        reca.train("show_o_tiny", ["objective.srum.weight=1", "data.scored=/nowhere"])
