"""The page of `reca compare`, its JSON, and what it says of understanding; the page also in a browser."""

import errno
import html
import io
import json
import re
import shutil
import subprocess

import pytest
import torch
from PIL import Image

import reca
from reca import checkpoint, cli
from reca.comparison import curves, page, triplets
from reca.comparison.build import compare, write
from reca.comparison.triplets import draw
from reca.config.recipe_files import load_recipe, save_recipe
from reca.data.errors import DataError
from reca.data.sources.factory import open_source
from reca.eval import targets
from reca.eval.errors import EvaluationError
from reca.models import UMMS, umm_package
from tests.driver.toy import write_images

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
browser = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


@pytest.fixture
def compared(painter):
    """A run whose base misses 40 % of the images, evaluated and compared."""
    reca.evaluate("toy", painter, against="base", limit=42)
    assert cli.main(["compare", "base", str(painter)]) == 0
    return painter / "comparison"


def test_scores_and_flips(compared, capsys):
    found = json.loads((compared / "comparison.json").read_text())
    (suite,) = found["suites"]
    assert suite["against"]["overall"]["difference"] == pytest.approx(1 - suite["against"]["overall"]["value"])
    page = (compared / "comparison.html").read_text()
    flips = suite["against"]["flips"]
    assert page.count('<button type="button" class="flip"') == len(flips) > 5
    for flip in flips:
        assert f'alt="before: {html.escape(flip["prompt"])}"' in page
    assert "Better: the interval is above zero" in page and "Lost: 0 prompts" in page
    assert found["before"]["kind"] == "base" and found["after"]["kind"] == "run"


def test_a_flip_is_shown_by_the_images_that_changed():
    def side(*values):
        return {"1": {k: page.Shown(value, None, f"{value}") for k, value in enumerate(values)}}

    for after, before, reasons in (
        ((1, 1, 0), (1, 0, 0), ["0", "1"]),
        ((1, 0, 0), (1, 1, 0), ["1", "0"]),
        ((0.4, 0.9), (0.3, 0.1), ["0.1", "0.9"]),
    ):
        row = {"item": "1", "tag": "t", "prompt": "p", "before": sum(before), "after": sum(after)}
        assert page._flip(row, [side(*after), side(*before)], "fraction")["reasons"] == reasons
    assert page._flip(row, [side(1), {}], "fraction")["images"] == [None, None]


def test_the_page_needs_no_other_file(compared):
    page = (compared / "comparison.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page) and "http" not in page


def test_fewer_pairs(compared, painter):
    assert cli.main(["compare", "base", str(painter), "--pairs", "3", "--out", str(painter / "few")]) == 0
    page = (painter / "few" / "comparison.html").read_text()
    assert page.count('<button type="button" class="flip"') == 3 and ", 3 shown" in page


def test_two_evaluations(compared, painter):
    found = compare(str(painter / "eval/000002/toy"), str(painter / "eval/base/toy"))
    assert found["suites"][0]["against"]["overall"]["difference"] < 0
    assert found["understanding"] is None and found["curves"] == [] and found["settings"] == []


def test_an_evaluation_that_was_moved_keeps_its_images(compared, painter, tmp_path):
    for name in ("before", "after"):
        (painter / ("eval/base/toy" if name == "before" else "eval/000002/toy")).rename(tmp_path / name)
        results = tmp_path / name / "results.json"
        prompt = json.loads(results.read_text())["items"][0]["prompt"]
        results.write_text(results.read_text().replace(prompt, r"\ud83d"))  # half of an emoji
    assert cli.main(["compare", str(tmp_path / "before"), str(tmp_path / "after"), "--out", str(tmp_path / "out")]) == 0
    shown = (tmp_path / "out/comparison.html").read_text()
    assert "<img" in shown and "no image" not in shown


def test_a_lost_image_leaves_a_gap(compared, painter):
    shutil.rmtree(painter / "eval/base/toy/images")
    assert cli.main(["compare", "base", str(painter)]) == 0
    page = (painter / "comparison" / "comparison.html").read_text()
    assert "no image before" in page and "no image after" not in page


def test_names_that_stand_for_nothing(painter, tmp_path, capsys):
    assert cli.main(["compare", "base", str(tmp_path)]) != 0
    assert "is not a run folder" in capsys.readouterr().err
    with pytest.raises(EvaluationError, match="neither a run folder .* nor an evaluation folder"):
        compare(str(tmp_path / "nowhere"), str(painter))
    with pytest.raises(EvaluationError, match="both sides are base"):
        compare("base", "base")
    assert "was evaluated" in compare("base", str(painter))["notes"][0]
    (painter / "eval/000002/toy").mkdir(parents=True)
    (painter / "eval/000002/toy/results.json").write_text("{")
    with pytest.raises(EvaluationError, match=r"results.json cannot be read: .* repeat its `reca eval`"):
        compare("base", str(painter))


def test_a_full_disk_keeps_the_page_that_was_there(compared, painter, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = (compared / "comparison.html").read_bytes()
    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    assert cli.main(["compare", "base", str(painter), "--pairs", "1"]) == 4
    assert f"No space left on device: '{compared}/comparison.json'" in capsys.readouterr().err
    assert (compared / "comparison.html").read_bytes() == before


# ---- two real runs ----


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    found = {}
    for name, umm, given in (
        ("first", "open_uni", {}), ("second", "open_uni", {"optim.lr": 1e-2}), ("show_o", "show_o", {}),
    ):  # fmt: skip
        keys = {"run_dir": str(folder / name), "train.steps": 2, "train.threads": 1, "log.every": 1} | given
        found[name] = str(reca.train(load_recipe(f"{umm}_tiny", keys)).folder)
    return found


def test_losses_and_settings_of_two_runs(runs, tmp_path):
    found = compare(runs["first"], runs["second"])
    assert [row["key"] for row in found["settings"]] == ["optim.lr"]
    (curve,) = found["curves"]
    assert curve["name"] == "reca/loss" and len(curve["before"]) == len(curve["after"]) == 2
    page = write(found, tmp_path).read_text()
    assert page.count("<polyline") == 2 and "optim.lr" in page
    assert "understanding is bit-identical" in page.lower()


def test_lines_of_a_log_that_tell_no_step(tmp_path):
    (tmp_path / "log.jsonl").write_text(
        '{"step": 1, "reca/loss": 2.0}\n{"reca/loss": 3.0}\n{"step": "x", "reca/loss": 4.0}\n{"step": 2, "reca/lo'
    )
    assert curves._losses(tmp_path) == {"reca/loss": [[1, 2.0]]}


def test_understanding_of_open_uni_is_bit_identical_and_of_show_o_is_not(runs):
    same = compare("base", runs["first"])["understanding"]
    assert same["identical"] and same["changed"] > 10 and same["tensors"] == []
    other = compare("base", runs["show_o"])["understanding"]
    assert not other["identical"] and any(name.startswith("showo.model.layers") for name in other["tensors"])


def test_equal_bits_are_no_change(runs, tmp_path):
    shutil.copytree(runs["show_o"], tmp_path / "copy")
    copy = compare(runs["show_o"], str(tmp_path / "copy"))
    assert copy["understanding"]["changed"] == 0 and "bit-identical" in copy["understanding"]["text"]
    assert checkpoint.latest(tmp_path / "copy") is not None


def test_models_that_are_different_ones(runs, tmp_path):
    """Also those of one kind that training began with other weights: no checkpoint holds what it did not change."""
    assert compare(runs["first"], runs["show_o"])["understanding"] is None
    for key, value in (("seed", "7"), ("weights", str(tmp_path / "other.pth"))):
        other = tmp_path / key
        shutil.copytree(runs["first"], other)
        recipe = load_recipe(other / "recipe.yaml", {f"model.{key}": value})
        save_recipe(recipe, other / "recipe.yaml")
        assert compare(runs["first"], str(other))["understanding"] is None
        assert compare("base", str(other))["understanding"]["identical"]


def test_a_run_without_a_checkpoint_has_nothing_to_compare_but_its_settings(runs, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copy(f"{runs['first']}/recipe.yaml", tmp_path / name)
    assert compare("base", str(tmp_path / "a"))["understanding"] is None
    assert compare(str(tmp_path / "a"), str(tmp_path / "b"))["understanding"] is None
    for sides in ((tmp_path / "a", runs["first"]), (runs["first"], tmp_path / "a")):
        assert cli.main(["compare", *map(str, sides), "--out", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("umm", [umm for umm in UMMS if umm != "toy"])
def test_answers_use_the_understanding_roles_alone(umm):
    """NaN in every other trained parameter leaves answers as they are, and understanding roles do change them."""
    model = umm_package(umm).Adapter.load(load_recipe(f"{umm}_tiny").model).eval()
    image = torch.arange(3 * 32 * 32, dtype=torch.int64).reshape(3, 32, 32).remainder(251).to(torch.uint8)

    def score():
        return model.log_likelihood([image], ["what is this"], ["a red square"])[0]

    before, roles = score(), model.roles()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if roles[name] not in model.understanding_roles and parameter.is_floating_point():
                parameter.fill_(float("nan"))
    assert score() == before
    for role in sorted(set(roles.values()) & model.understanding_roles & model.trainable_roles):
        own = [parameter for name, parameter in model.named_parameters() if roles[name] == role]
        kept = [parameter.clone() for parameter in own]
        with torch.no_grad():
            for parameter in own:
                parameter.add_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
        assert score() != before, role
        with torch.no_grad():
            for parameter, old in zip(own, kept, strict=True):
                parameter.copy_(old)
    assert score() == before


# ---- reconstructions ----


@pytest.fixture(scope="module")
def drawn(runs, tmp_path_factory):
    """Four images by the base and by a run, and the page that has them."""
    out = tmp_path_factory.mktemp("drawn")
    assert cli.main(["compare", "base", runs["first"], "--reconstructions", "4", "--out", str(out)]) == 0
    return out


def pixels(out, found, name):
    return [(out / row[name]).read_bytes() for row in found["rows"]]


def test_triplets(drawn, runs, tmp_path):
    found = json.loads((drawn / "comparison.json").read_text())["reconstructions"]
    assert found["pictures"] == "training" and len(found["rows"]) == 4
    columns = {name: pixels(drawn, found, name) for name in ("input", "before", "after")}
    assert len(set(columns["input"])) == 4 and columns["before"] != columns["after"]
    source = open_source("reca.toy_datasets.shapes:unlabeled?seed=0", "reca")
    with Image.open(drawn / found["rows"][1]["input"]) as image, Image.open(io.BytesIO(source[1].image)) as wanted:
        assert image.tobytes() == wanted.convert("RGB").tobytes()
    page = (drawn / "comparison.html").read_text()
    assert page.count("reconstructed before: ") == page.count("reconstructed after: ") == 4
    assert not re.search(r'(src|href)="(?!data:)', page) and re.search("<img[^>]*alt=", page)
    same = draw(runs["first"], "base", tmp_path, 4)  # the other way round: equal noise, equal templates
    assert pixels(tmp_path, same, "before") == columns["after"] and pixels(tmp_path, same, "after") == columns["before"]


def test_nothing_is_drawn_twice(drawn, runs, monkeypatch):
    found = json.loads((drawn / "comparison.json").read_text())["reconstructions"]
    monkeypatch.setattr(targets.Target, "load", lambda *_: pytest.fail("a model was loaded"))
    assert draw("base", runs["first"], drawn, 4) == found
    for others in ((runs["second"], runs["first"], drawn, 4), ("base", runs["first"], drawn, 3)):
        with pytest.raises(pytest.fail.Exception):
            draw(*others)


def test_images_of_ones_own_and_two_models(runs, tmp_path):
    write_images(tmp_path / "photos", 2)
    write_images(tmp_path / triplets.FOLDER, 1)  # of somebody else, in a folder that is called alike
    found = draw(runs["first"], runs["show_o"], tmp_path, 8, str(tmp_path / "photos"))
    assert found["pictures"] == "given" and [row["name"] for row in found["rows"]] == ["000.png", "001.png"]
    assert (tmp_path / triplets.FOLDER / "000.png").is_file()
    with pytest.raises(DataError, match="nowhere"):
        draw("base", runs["first"], tmp_path, 4, str(tmp_path / "nowhere"))


def test_an_image_that_cannot_be_read_is_left_out(runs, tmp_path):
    """Its row would show another image under its name."""
    photos = write_images(tmp_path / "photos", 3)
    (photos / "001.png").write_bytes(b"no image")
    found = draw("base", runs["first"], tmp_path / "out", 2, str(photos))
    assert [row["name"] for row in found["rows"]] == ["000.png", "002.png"]
    for name in ("000.png", "002.png"):
        (photos / name).unlink()
    with pytest.raises(DataError, match="no image to reconstruct can be read; last error: 001.png: not an image in"):
        draw("base", runs["first"], tmp_path / "out", 2, str(photos))


def test_what_cannot_be_reconstructed(runs, compared, painter, tmp_path, monkeypatch):
    with pytest.raises(EvaluationError, match="has no weights"):
        draw("base", str(painter), tmp_path)
    assert triplets.usual_count("base", str(painter)) == 0 and triplets.usual_count("base", runs["first"]) == 8
    monkeypatch.setattr(triplets, "QUICK", 1000)  # a large model, and no GPU
    assert triplets.usual_count("base", runs["first"]) == (8 if torch.cuda.is_available() else 0)
    shutil.copytree(runs["first"], tmp_path / "moved")
    recipe = tmp_path / "moved/recipe.yaml"
    recipe.write_text(recipe.read_text().replace("reca.toy_datasets.shapes:unlabeled?seed=0", str(tmp_path / "gone")))
    with pytest.raises(DataError, match=r"cannot be opened .*gone.*; pass others as --images, or disable"):
        draw("base", str(tmp_path / "moved"), tmp_path)
    assert cli.main(["compare", "base", runs["first"], "--reconstructions", "-1"]) != 0


# ---- in a browser ----


def open_page(page, script, *options):
    """Return the document after `script`, which the page runs once it has loaded."""
    tried = page.with_name("tried.html")
    tried.write_text(page.read_text().replace("</body>", f"<script>{script}</script></body>"))
    done = subprocess.run(
        [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", *options,
         "--dump-dom", tried.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout


@browser
def test_a_click_opens_the_pair_and_keys_go_on(compared):
    page = compared / "comparison.html"
    prompts = re.findall(r'<span class="prompt">(.*?)</span>', page.read_text())
    click = 'document.querySelectorAll("button.flip")[1].click();'
    shown = open_page(page, click)
    dialog = shown[shown.index("<dialog") :]
    assert re.match(r"<dialog[^>]* open", dialog) and prompts[1] in dialog and dialog.count("<img") == 2
    key = 'document.querySelector("dialog").dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowLeft"}));'
    before = open_page(page, click + key)
    assert prompts[0] in before[before.index("<dialog") :]
    closed = open_page(page, click + 'document.querySelector("#close").click();')
    assert not re.match(r"<dialog[^>]* open", closed[closed.index("<dialog") :])


@browser
def test_a_click_opens_the_triplet(drawn):
    shown = open_page(drawn / "comparison.html", 'document.querySelectorAll("button.flip")[2].click();')
    dialog = shown[shown.index("<dialog") :]
    assert re.match(r"<dialog[^>]* open", dialog) and dialog.count("<img") == 3 and "image 3: unlabeled/2</p>" in dialog
    captions = re.findall("<figcaption>(.*?)</figcaption>", dialog)
    assert captions == ["input", "before", "after"]


@browser
def test_a_pair_is_seen_from_its_top(drawn):
    """Though the buttons below it have the focus, also where it is higher than the window."""
    script = """document.querySelectorAll("button.flip")[2].click(); const box = document.querySelector("dialog");
      const menu = box.querySelector("menu").getBoundingClientRect();
      document.title = [box.scrollTop, box.scrollHeight > box.clientHeight, menu.bottom <= innerHeight];"""
    shown = open_page(drawn / "comparison.html", script, "--window-size=400,600")
    assert "<title>0,true,true</title>" in shown


@browser
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("page", ["compared", "drawn"])
def test_nothing_sticks_out(page, width, request):
    """However long the paths of runs are."""
    measure = """
      for (const text of document.querySelectorAll("h1, p")) text.append("/" + "x".repeat(200));
      const tables = [...document.querySelectorAll("table.figures")].map(table => table.parentNode);
      const boxes = [document.documentElement, ...tables];
      document.title = boxes.map(box => box.scrollWidth - box.clientWidth).reduce((a, b) => a + b);"""
    shown = open_page(request.getfixturevalue(page) / "comparison.html", measure, f"--window-size={width},900")
    assert "<title>0</title>" in shown
