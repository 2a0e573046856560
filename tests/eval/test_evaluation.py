"""The four steps: from prompts to a report, stopped, continued, skipped and fed with what is broken."""

import errno
import json
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import reca
from reca import checkpoint, cli, inference
from reca.checkpoint import CheckpointError
from reca.comparison.build import one_of_each
from reca.comparison.sides import find_sides
from reca.eval import evaluation, files, generate, judge, records, report, targets
from reca.eval.errors import EvaluationError
from reca.eval.judges.base import Judge
from reca.eval.judges.toy import ToyJudge
from reca.eval.settings import open_settings
from reca.eval.suites import open_suite
from reca.eval.suites.geneval import GenEval
from reca.models import UMMS
from reca.runs import folder_lock
from tests.eval.painter import Painter

LIMIT = 42


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def raising(error):
    def raise_it(*_, **__):
        raise error

    return raise_it


@pytest.mark.parametrize("umm", [umm for umm in UMMS if umm != "toy"])
def test_the_whole_chain_on_every_tiny_model(tmp_path, umm, monkeypatch, capsys):
    """What `make tiny` calls: train, evaluate with the base model, compare."""
    monkeypatch.chdir(tmp_path)
    run, small = f"runs/{umm}_tiny", ["train.steps=1", "train.threads=1", "data.workers=0", "log.tensorboard=false"]
    small += [f"objective.{task}.{key}=4" for task in ("reca", "i2t") for key in ("batch_size", "micro_batch")]
    assert cli.main(["train", f"{umm}_tiny", *small]) == 0
    assert cli.main(["eval", "toy", run, "--against", "base", "--limit", "3"]) == 0
    assert cli.main(["compare", "base", run, "--reconstructions", "2"]) == 0
    printed, folder = capsys.readouterr().out, tmp_path / run / "eval/000001/toy"
    found = json.loads((folder / "results.json").read_text())
    assert found["counts"] == {"items": 3, "images": 3, "failed": 0, "missing": 0}
    assert len(found["model"]["weights_sha256"]) == 64 and found["judge"]["exact"] is True
    assert found["model"]["weights_sha256"] != found["against"]["model"]["weights_sha256"]
    assert found["sampling"]["seed"] == 0 and found["images_per_item"] == 1
    assert (
        len(list(folder.rglob("*.png"))) == 3 and "toy dataset shapes: 3 images" in (folder / "report.txt").read_text()
    )
    assert (
        "toy dataset shapes: 0.0 % -> 0.0 %, +0.0 points [" in printed
        and f"{run}/comparison/comparison.html" in printed
    )
    compared = json.loads((tmp_path / run / "comparison/comparison.json").read_text())
    assert compared["suites"][0]["against"]["items"] == 3 and compared["understanding"]["changed"] > 0
    assert len(compared["reconstructions"]["rows"]) == 2
    assert compared["understanding"]["identical"] == (umm in ("open_uni", "bagel"))


def test_before_and_after(painter, capsys):
    assert cli.main(["eval", "toy", str(painter), "--against", "base", "--limit", str(LIMIT)]) == 0
    shown = capsys.readouterr().out
    found = json.loads((painter / "eval/000002/toy/results.json").read_text())
    before = json.loads((painter / "eval/base/toy/results.json").read_text())
    assert found["overall"]["value"] == 1 and before["overall"]["value"] < 0.8
    change = found["against"]["overall"]
    assert change["difference"] == pytest.approx(1 - before["overall"]["value"])
    assert 0 < change["difference_interval"][0] < change["difference"] < change["difference_interval"][1]
    flips = found["against"]["flips"]
    assert len(flips) == sum(row["value"] == 0 for row in before["items"])
    assert all((row["before"], row["after"]) == (0, 1) for row in flips)
    assert found["against"]["identical_settings"] and found["against"]["model"]["trained"] is False
    assert f"against: base of {painter} (" in shown
    assert (
        f"prompts: {len(flips)} gained, 0 lost of 42 in both" in shown
        and "power to detect a change of 1.0, 2.0, 5.0 points" in shown
        and " change +" in shown
        and "points  [+" in shown
    )
    assert shown.strip() == (painter / "eval/000002/toy/report.txt").read_text().strip()


def test_results_count_what_they_are_of():
    suite, by = open_suite("t2i_compbench"), {"name": "x"}
    items = [item for item in suite.items() if item.tag in ("color", "shape") and item.metadata["number"] < 2]
    values = {"color/0000": (1.0, 0.5), "color/0001": (0.25, 0.25), "shape/0000": (0.5,)}
    said = [records.Record(item, k, None, by, value) for item, row in values.items() for k, value in enumerate(row)]
    said += [records.Record(*key, None, by, error="refused") for key in (("shape/0000", 1), ("shape/0001", 0))]
    found = report.results(suite, items, {}, said, by, {}, missing=3)
    assert found["counts"] == {"items": 3, "images": 5, "failed": 2, "missing": 3} and found["images_per_item"] == 2
    assert {tag: [row[name] for name in ("value", "items", "images")] for tag, row in found["tags"].items()} == {
        "color": [0.5, 2, 4], "shape": [0.5, 1, 1],
    }  # fmt: skip
    assert [(row["item"], row["k"], row["error"]) for row in found["failed"]] == [
        ("shape/0000", 1, "refused"), ("shape/0001", 0, "refused"),
    ]  # fmt: skip
    assert "2 images failed and 3 are missing; the scores exclude them" in report.text(found)


@pytest.mark.parametrize(("unit", "point"), [("fraction", 0.01), ("percent", 1), ("points", 0.5)])
def test_power_is_told_for_changes_of_one_two_and_five_percent(unit, point):
    """Of all that there is, or of the score where a benchmark has points: of 50, 0.5, 1 and 2.5."""
    judged, suite = {"name": "x"}, open_suite("t2i_compbench")
    items = suite.items()[:8]
    sides = [
        report.results(
            suite, items, {}, [records.Record(i.id, 0, None, judged, v * n) for n, i in enumerate(items)], judged, {}
        )
        for v in (100 / 7, 1.0)
    ]
    for side in sides:
        side["overall"]["unit"] = unit
    table = report.compare(*sides, "before")["power"]
    assert sorted({row["difference"] for row in table}) == pytest.approx([point, 2 * point, 5 * point])


def test_against_an_evaluation_that_was_made_before(painter, tmp_path):
    """Its results are taken as they are, also from a folder that cannot be written; only common prompts count."""
    reca.evaluate("toy", painter, against="base", limit=21)
    kept = tmp_path / "kept"
    kept.mkdir()
    text = (painter / "eval/base/toy/results.json").read_text()
    (kept / "results.json").write_text(text)
    kept.chmod(0o555)
    found = reca.evaluate("toy", painter, against=kept, limit=42, out=tmp_path / "out")
    assert found["against"]["items"] == 21 and len(found["items"]) == 42
    change = found["against"]["overall"]
    assert change["value"] == pytest.approx(json.loads(text)["overall"]["value"])
    assert change["difference"] == pytest.approx(1 - change["value"])
    kept.chmod(0o755)
    more = reca.evaluate("toy", painter, against="base", limit=42)["against"]["overall"]["value"]
    found = reca.evaluate("toy", painter, against=painter / "eval/base/toy", limit=21, out=tmp_path / "out")
    change = found["against"]["overall"]
    assert found["against"]["items"] == 21 and change["value"] == pytest.approx(1 - change["difference"]) != more
    for content, message in (
        ("{", "expected results of format 1"),
        (text.replace('"toy dataset shapes"', '"x"'), "different suites"),
    ):
        (kept / "results.json").write_text(content)
        with pytest.raises(EvaluationError, match=message):
            reca.evaluate("toy", painter, against=kept, limit=42, out=tmp_path / "out")


def test_one_model_with_two_settings_can_differ(painter, tmp_path):
    """That its images are all right with both says little of other prompts; with the same ones it is no surprise."""
    reca.evaluate("toy", painter, limit=LIMIT)
    for seed in (0, 1):
        given = {"against": painter / "eval/000002/toy", "out": tmp_path / str(seed)}
        change = reca.evaluate("toy", painter, limit=LIMIT, seed=seed, **given)["against"]
        assert change["identical_settings"] == (seed == 0)
        low, high = change["overall"]["difference_interval"]
        # LIMIT prompts of one tag would reach so far; some of these tags have few prompts and a larger weight.
        assert -low == pytest.approx(high) and (high == 0 if seed == 0 else 1 - 0.025 ** (1 / LIMIT) <= high < 0.2)


def test_a_change_between_two_kinds_of_model_is_not_called_one_of_training(painter, tmp_path):
    reca.evaluate("toy", painter, limit=LIMIT)
    kept = shutil.copytree(painter / "eval/000002/toy", tmp_path / "kept")
    said = {}
    for umm, sampling in (("show_o", {}), ("bagel", {}), ("bagel", {"steps": 9})):
        results = json.loads((kept / "results.json").read_text())
        results["model"]["umm"] = umm
        results["sampling"] |= sampling
        (kept / "results.json").write_text(json.dumps(results))
        found = reca.evaluate("toy", painter, against=kept, limit=LIMIT)
        said[(umm, *sampling)] = report.text(found)
    assert "different models" not in said[("show_o",)]
    for key, also in ((("bagel",), ""), (("bagel", "steps"), " and also differ in sampling")):
        assert f"the two are different models (bagel and show_o){also}: the change is not one of training" in said[key]


def test_nothing_is_done_twice(painter, monkeypatch):
    first = reca.evaluate("toy", painter, limit=LIMIT)
    monkeypatch.setattr(targets.Target, "load", None)
    monkeypatch.setattr(ToyJudge, "shows", None)
    assert reca.evaluate("toy", painter, limit=LIMIT) == first
    assert reca.evaluate("toy", painter, limit=LIMIT, steps=["score"]) == first
    assert reca.evaluate("toy", painter, steps=["report"]) == first


def test_the_model_gets_the_sampling_options_that_its_results_name(painter, monkeypatch):
    given, draw = [], Painter.generate

    def generate(self, texts, seeds, **options):
        given.append(options)
        return draw(self, texts, seeds)

    monkeypatch.setattr(Painter, "generate", generate)
    named = reca.evaluate("toy", painter, limit=2, sampling={"steps": 3})["sampling"]
    assert given == [{name: value for name, value in named.items() if name != "seed"}] and given[0]["steps"] == 3


def test_an_image_depends_on_its_item_alone(painter, monkeypatch, tmp_path):
    """Neither on ranks, nor on the batch, nor on what was there before."""
    suite = open_settings("toy", None, limit=LIMIT).suite
    items = suite.items()[:LIMIT]
    folders = [tmp_path / name for name in ("one", "ranks", "again")]
    for folder in folders:
        folder.mkdir()
    generate.generate_images(Painter(0.4), suite, items, folders[0], 2, {})
    monkeypatch.setattr(generate, "CHUNK", 5)
    for rank in (2, 0, 1):
        monkeypatch.setattr(generate.distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(generate.distributed, "world_size", lambda: 3)
        generate.generate_images(Painter(0.4), suite, items, folders[1], 2, {})
    monkeypatch.undo()
    generate.generate_images(Painter(0.4), suite, items[::3], folders[2], 1, {})
    assert generate.generate_images(Painter(0.4), suite, items, folders[2], 2, {}) == 2 * LIMIT - len(items[::3])
    images = [{p.relative_to(f): p.read_bytes() for p in f.rglob("*.png")} for f in folders]
    assert len(images[0]) == 2 * LIMIT and images[0] == images[1] == images[2]
    assert len(set(images[0].values())) > LIMIT  # the two images of an item differ
    seeds = {generate.image_seed(s, i, k, n) for s in "ab" for i in "cd" for k in (0, 1) for n in (0, 1)}
    assert len(seeds) == 16 and max(seeds) < 2**56


# ---- what goes wrong ----


def test_a_half_written_record(painter):
    first = reca.evaluate("toy", painter, limit=LIMIT)
    path = painter / "eval/000002/toy/records.jsonl"
    whole = path.read_text().splitlines()
    path.write_text("\n".join(whole[:-2]) + "\n" + whole[-2] + "\n" + whole[-1][:30])
    assert reca.evaluate("toy", painter, limit=LIMIT) == first
    good = [line for line in path.read_text().splitlines() if records.parse(line)]
    assert good == whole  # the last one was judged again, on a line of its own
    path.write_text("nonsense\n" + "\n".join(good[3:]) + "\n[1, 2]\n")
    assert reca.evaluate("toy", painter, limit=LIMIT) == first


def test_a_second_evaluation_waits_for_the_judge_of_the_first(painter, monkeypatch, caplog):
    folder = painter / "eval/000002/toy"
    first = reca.evaluate("toy", painter, limit=LIMIT)
    (folder / "records.jsonl").rename(folder / "judged.jsonl")
    other = """if True:
        import pathlib, sys, time
        from reca.runs.folder_lock import alone
        folder = pathlib.Path(sys.argv[1])
        with alone(folder / ".lock", "it"):
            print("judges", flush=True)
            time.sleep(1)
            (folder / "judged.jsonl").rename(folder / "records.jsonl")
    """
    monkeypatch.setattr(folder_lock, "POLL", 0.05)
    monkeypatch.setattr(ToyJudge, "judge", lambda *_: 1 / 0)
    with subprocess.Popen([sys.executable, "-c", other, folder], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "judges\n"
        assert reca.evaluate("toy", painter, limit=LIMIT) == first
    (message,) = [r.getMessage() for r in caplog.records if "in use" in r.getMessage()]
    assert message.startswith(f"{folder} is in use by process {process.pid} on ")


def test_two_threads_do_not_judge_one_folder_at_a_time(painter, monkeypatch, caplog):
    reca.evaluate("toy", painter, limit=LIMIT, steps=["generate"])
    asked, judge = [], ToyJudge.judge
    monkeypatch.setattr(ToyJudge, "judge", lambda *args: time.sleep(0.01) or asked.append(1) or judge(*args))
    with ThreadPoolExecutor() as pool:
        jobs = [pool.submit(reca.evaluate, "toy", painter, limit=LIMIT) for _ in range(3)]
        first, *others = [job.result() for job in jobs]
    assert others == [first] * 2 and len(asked) == LIMIT
    (message, _) = [r.getMessage() for r in caplog.records if "in use" in r.getMessage()]
    assert message.startswith(f"{painter / 'eval/000002/toy'} is in use by another thread of this process")


def test_a_full_disk_loses_nothing(painter, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    real, folder = files.write_atomically, painter / "eval/000002/toy"
    calls = []

    def fills_up(path, *rest, **options):
        calls.append(path)
        return (real if len(calls) < 20 else full)(path, *rest, **options)

    monkeypatch.setattr(files, "write_atomically", fills_up)
    with pytest.raises(EvaluationError, match="cannot be written \\(No space left on device\\). Finished outputs"):
        reca.evaluate("toy", painter, limit=LIMIT)
    monkeypatch.setattr(files, "write_atomically", real)
    made = len(list(folder.rglob("*.png")))
    assert 0 < made < LIMIT

    real_append, count = records.os.write, []

    def torn(handle, data):
        count.append(data)
        return real_append(handle, data if len(count) < 10 else data[:20])

    monkeypatch.setattr(records.os, "write", torn)
    Painter.made = 0
    with pytest.raises(
        EvaluationError, match="records.jsonl cannot be written \\(the disk is full\\). All previous lines"
    ):
        reca.evaluate("toy", painter, limit=LIMIT)
    assert Painter.made == LIMIT - made
    monkeypatch.setattr(records.os, "write", real_append)
    assert len(lines(folder / "records.jsonl")) == 9
    assert reca.evaluate("toy", painter, limit=LIMIT)["counts"]["images"] == LIMIT
    assert len(lines(folder / "records.jsonl")) == LIMIT


def test_space_is_not_the_cause_where_a_folder_has_the_name_of_a_file(painter):
    (painter / "eval/000002/toy/report.txt").mkdir(parents=True)
    with pytest.raises(
        EvaluationError, match=r"report.txt cannot be written \(Is a directory\).* kept: remove the cause"
    ):
        reca.evaluate("toy", painter, limit=1)


def test_a_disk_that_is_full_at_any_file(painter, monkeypatch):
    """Images, what made them, results and report of both sides: the message names the file, the next call goes on."""
    real, left, named = files.write_atomically, 0, set()

    def fills_up(path, *rest, **options):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, *rest, **options)

    monkeypatch.setattr(files, "write_atomically", fills_up)
    for room in range(40):
        left = room
        try:
            reca.evaluate("toy", painter, against="base", limit=1)
            break
        except EvaluationError as error:
            assert "Finished outputs are kept: free disk space, then run the same command again" in str(error)
            named.add(str(error).split(" cannot be written")[0].rpartition("/")[2])
        left = 40
        assert reca.evaluate("toy", painter, against="base", limit=1)["counts"]["images"] == 1
        shutil.rmtree(painter / "eval/base", ignore_errors=True)
        shutil.rmtree(painter / "eval/000002/toy")
    assert named == {"generation.json", "metadata.jsonl", "0000.png", "results.json", "report.txt"}


def test_too_little_room_is_told_before_the_disk_is_full(painter, monkeypatch):
    monkeypatch.setattr(generate, "CHUNK", 4)
    monkeypatch.setattr(generate.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 4000))
    with pytest.raises(EvaluationError, match="remaining images need about .* the disk has only 3.91 KiB left"):
        reca.evaluate("toy", painter, limit=LIMIT)
    assert len(list(painter.rglob("*.png"))) == 4


def test_an_evaluation_draws_the_same_images(painter, monkeypatch, caplog):
    kept = Painter.generate
    whole = reca.evaluate("toy", painter, limit=40, steps=["generate", "judge", "score"])
    images = {p.relative_to(painter): p.read_bytes() for p in painter.rglob("*.png")}

    def generate(self, texts, seeds, **options):
        if len(texts) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return kept(self, texts, seeds, **options)

    monkeypatch.setattr(Painter, "generate", generate)
    found = reca.evaluate("toy", painter, limit=40, out=painter / "again")
    assert {**found, "images": None} == {**whole, "images": None}
    again = {p.relative_to(painter / "again/images"): p.read_bytes() for p in (painter / "again").rglob("*.png")}
    assert again == {path.relative_to("eval/000002/toy/images"): content for path, content in images.items()}
    assert caplog.text.count("memory was full with 32 images at once") == 1
    monkeypatch.setattr(Painter, "generate", raising(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(inference.MemoryFull, match="a single image"):
        reca.evaluate("toy", painter, limit=50)
    assert len(list((painter / "eval/000002/toy").rglob("*.png"))) == 40  # what was made is kept


def test_missing_images_and_another_layout(painter, tmp_path, caplog):
    caplog.set_level("INFO", "reca")
    reca.evaluate("toy", painter, limit=LIMIT, steps=["generate"])
    images = painter / "eval/000002/toy/images"
    assert f"toy: the results of generate are in {images.parent}" in caplog.messages
    shutil.rmtree(images / "00010")
    elsewhere = tmp_path / "elsewhere"
    with pytest.raises(
        EvaluationError, match="1 images of toy are missing: 00010 \\(0\\). Generate them, or set partial=True"
    ):
        reca.evaluate("toy", painter, images=images, out=elsewhere, limit=LIMIT)
    found = reca.evaluate("toy", painter, images=images, out=elsewhere, limit=LIMIT, partial=True)
    assert found["counts"] == {"items": LIMIT - 1, "images": LIMIT - 1, "failed": 0, "missing": 1}
    assert found["model"] is None and "the images were not generated here" in report.text(found)
    for path in list(images.rglob("*.png")):
        path.rename(images / f"{path.parent.parent.name}.png")
    with pytest.raises(EvaluationError, match="contains no images of toy; expected them as ITEM/samples/0000.png"):
        reca.evaluate("toy", painter, images=images, out=tmp_path / "third", limit=LIMIT)
    with pytest.raises(EvaluationError, match="images='.*nowhere' is not a folder"):
        reca.evaluate("toy", painter, images=tmp_path / "nowhere")


def test_a_lost_image_loses_no_other(painter):
    given = {"limit": 3, "images_per_item": 4, "steps": ["score"]}
    reca.evaluate("toy", painter, **given | {"steps": ["generate", "judge", "score"]})
    sorted((painter / "eval/000002/toy/images").rglob("*.png"))[0].unlink()
    with pytest.raises(EvaluationError, match=r"1 images of toy are missing: 00000 \(0\). Generate them"):
        reca.evaluate("toy", painter, **given)
    counts = reca.evaluate("toy", painter, partial=True, **given)["counts"]
    assert (counts["images"], counts["missing"]) == (11, 1)


def test_what_is_generated_is_what_is_judged(painter, tmp_path, monkeypatch):
    """Whatever an evaluation before, of fewer prompts and more images of each, left in the folder."""

    class Blind(Judge):
        name = "blind"

        def detect(self, image, colored, threshold):
            return {}

    monkeypatch.setattr(evaluation, "open_judge", lambda *_: Blind())
    reca.evaluate("geneval", painter, limit=3, images_per_item=2, steps=["generate"])
    found = reca.evaluate("geneval", painter, limit=5, judge="owlv2:x", images_per_item=1)
    wanted = [item.id for item in open_settings("geneval", None, limit=5).items()]
    assert [row["item"] for row in found["items"]] == wanted and found["counts"]["images"] == 5
    images, given = painter / "eval/000002/geneval/images", {"judge": "owlv2:x", "partial": True}
    monkeypatch.setattr(GenEval, "images_per_item", 1)
    assert reca.evaluate("geneval", painter, limit=5, judge="owlv2:x")["counts"]["images"] == 5
    found = reca.evaluate("geneval", painter, images=images, out=tmp_path / "out", **given)
    assert [row["item"] for row in found["items"]] == sorted(path.name for path in images.iterdir())


def test_images_that_were_not_judged_are_not_left_out_in_silence(painter, tmp_path):
    first = reca.evaluate("toy", painter, limit=LIMIT)
    path = painter / "eval/000002/toy/records.jsonl"
    half = path.read_text()[: len(path.read_text()) // 2]  # the judge was killed while it wrote a line
    path.write_text(half)
    elsewhere = {"records": tmp_path / "theirs.jsonl", "out": tmp_path / "out"}
    elsewhere["records"].write_text(half)
    for given in ({"steps": ["score"]}, elsewhere):
        with pytest.raises(EvaluationError, match=r"has no record of \d+ images of toy: .* or set partial=True"):
            reca.evaluate("toy", painter, limit=LIMIT, **given)
        counts = reca.evaluate("toy", painter, limit=LIMIT, partial=True, **given)["counts"]
        assert counts["missing"] + counts["images"] == LIMIT and counts["missing"] > 0
    assert reca.evaluate("toy", painter, limit=LIMIT)["overall"] == first["overall"]  # goes on, nothing is lost


def test_changed_images_are_judged_again(painter):
    reca.evaluate("toy", painter, limit=LIMIT)
    folder = painter / "eval/000002/toy"
    shutil.copy(sorted(folder.rglob("*.png"))[-1], sorted(folder.rglob("*.png"))[1])
    assert reca.evaluate("toy", painter, limit=LIMIT)["counts"]["images"] == LIMIT
    assert len(lines(folder / "records.jsonl")) == LIMIT + 1


def test_images_that_cannot_be_read_are_drawn_again_or_refused(painter, tmp_path, caplog, monkeypatch):
    wanted = reca.evaluate("toy", painter, limit=LIMIT)
    images = painter / "eval/000002/toy/images"
    paths = sorted(images.rglob("*.png"))
    contents = [path.read_bytes() for path in paths]
    broken = [
        contents[0][: len(contents[0]) // 2],
        b"",
        b"\0" * 900,
        b"\xff\xd8\xff\xe0 JPEG",
        b"version https://git-lfs",
        b"x" * 9,
    ]
    for workers in (1, 3):
        monkeypatch.setattr(ToyJudge, "workers", workers)
        for path, content in zip(paths, broken, strict=False):
            path.write_bytes(content)
        out = tmp_path / f"out{workers}"
        with pytest.raises(EvaluationError, match="6 of 42 images cannot be read: .*png is not a readable .*Repl"):
            reca.evaluate("toy", painter, images=images, out=out, limit=LIMIT)
        counts = reca.evaluate("toy", painter, images=images, out=out, limit=LIMIT, partial=True)["counts"]
        assert (counts["images"], counts["missing"], counts["failed"]) == (LIMIT - 6, 6, 0)
        assert "6 of 42 images cannot be read" in caplog.text and len(lines(out / "records.jsonl")) == LIMIT - 6
        made = Painter.made
        assert reca.evaluate("toy", painter, limit=LIMIT) == wanted and Painter.made == made + 6
        assert [path.read_bytes() for path in paths] == contents


def test_a_judge_that_keeps_failing_ends_the_step(painter, monkeypatch):
    def fails(self, image, prompt):
        raise judge.JudgeError("no answer within 60 s")

    monkeypatch.setattr(ToyJudge, "shows", fails)
    with pytest.raises(EvaluationError, match="failed on 5 images in a row; .* no answer within 60 s. All records"):
        reca.evaluate("toy", painter, limit=LIMIT)
    assert len(list(painter.rglob("*.png"))) == LIMIT
    monkeypatch.undo()
    assert reca.evaluate("toy", painter, limit=LIMIT, steps=["judge", "score"])["counts"]["failed"] == 0


def test_a_judge_without_memory_ends_the_step_with_a_sentence(painter, monkeypatch):
    monkeypatch.setattr(ToyJudge, "shows", raising(torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB.")))
    with pytest.raises(inference.MemoryFull, match="out of memory while toy judged .*png .CUDA .* records are kept"):
        reca.evaluate("toy", painter, limit=5)


def test_a_layout_of_one_image_for_every_item_takes_no_more(painter, tmp_path):
    """They would be drawn over one another, and then be missing."""
    data = tmp_path / "wise.json"
    data.write_text(json.dumps([{"prompt_id": 1, "Prompt": "p", "Explanation": "e", "Category": "c"}]))
    given = {"data": data, "judge": "local:none", "steps": ["generate"]}
    with pytest.raises(EvaluationError, match="images_per_item=2: wise has one image per item; set 1"):
        reca.evaluate("wise", painter, images_per_item=2, **given)
    assert Painter.made == 0
    reca.evaluate("wise", painter, images_per_item=1, **given)
    assert Painter.made == 1


def test_images_of_other_weights_or_settings_are_not_mixed(painter, monkeypatch):
    reca.evaluate("toy", painter, limit=5)
    settings = {
        "seed 0 -> 1": {"seed": 1},
        "sampling.steps 18 -> 3": {"sampling": {"steps": 3}},
        "fingerprint.ema False -> True": {"ema": True},
        "fingerprint.model.seed 0 -> 3": {"overrides": ["model.seed=3"]},
    }
    for name, change in settings.items():
        with pytest.raises(EvaluationError, match=f"with other settings \\({name}\\); set another out"):
            reca.evaluate("toy", painter, limit=5, out=painter / "eval/000002/toy", **change)
    trained = Painter(0.0)
    with monkeypatch.context() as patch:
        patch.setattr(targets.Target, "load", lambda *_: trained)
        trained.state = save(painter, 2) | {"step": 4}
        with pytest.raises(EvaluationError, match=r"settings \(fingerprint.checkpoint, step \S+ -> 4\); set"):
            reca.evaluate("toy", painter, limit=5)
    monkeypatch.setattr(targets.Target, "load", lambda *_: Painter(0.2))
    with pytest.raises(EvaluationError, match="with other settings \\(other weights\\)"):
        reca.evaluate("toy", painter, limit=9)
    assert reca.evaluate("toy?seed=1", painter, limit=5, out=painter / "other")["counts"]["images"] == 5


def save(run, step):
    """A checkpoint of a run, without files. Return what it is known by."""
    folder = run / f"checkpoints/{step:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / checkpoint.MARKER).write_text(json.dumps({"step": {"bytes": step, "sha256": ""}}))
    return {"step": step, "digest": checkpoint.digest(folder)}


def test_a_model_that_was_moved_is_the_same_model(painter, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/a.bin").write_bytes(b"weights")
    reca.evaluate("toy", painter, limit=5, overrides=[f"model.weights={tmp_path / 'model'}"])
    (tmp_path / "model").rename(tmp_path / "moved")
    moved = [f"model.weights={tmp_path / 'moved'}"]
    reca.evaluate("toy", painter, limit=5, overrides=moved)
    assert Painter.made == 5
    (tmp_path / "moved/a.bin").write_bytes(b"others")
    with pytest.raises(EvaluationError, match="with other settings \\(fingerprint.model.weights\\)"):
        reca.evaluate("toy", painter, limit=9, overrides=moved)


def test_a_run_stands_for_its_newest_checkpoint(painter, monkeypatch):
    """A run that goes on saves one after the other, also while its model is loaded: each has its own evaluations."""
    states = {save(painter, step)["step"]: save(painter, step) for step in (2, 4)}

    def load_trained(folder, *_):
        save(painter, 6)
        trained = Painter()
        trained.state = states[int(folder.name)]
        return trained

    monkeypatch.undo()
    monkeypatch.chdir(painter.parent)
    monkeypatch.setattr(targets, "load_trained", load_trained)
    found = reca.evaluate("toy", painter, limit=5)
    assert found["model"]["step"] == 4 and (painter / "eval/000004/toy/results.json").is_file()
    states[6] = save(painter, 6)
    for name, made in (("000004", 5), ("000002", 10), ("000006", 15)):
        again = reca.evaluate("toy", painter / "checkpoints" / name, limit=5)
        assert again["model"]["step"] == int(name) and Painter.made == made
    assert reca.evaluate("toy", painter, limit=5)["model"]["step"] == 6 and Painter.made == 15
    before, after = str(painter / "checkpoints/000004"), str(painter)
    assert [side.evaluations for side in find_sides(before, after)] == [
        (painter / f"eval/{step}/toy",) for step in ("000004", "000006")
    ]


def test_the_average_is_evaluated_beside_the_weights(painter):
    for ema, name in ((True, "toy_ema"), (False, "toy")):
        reca.evaluate("toy", painter, limit=1, ema=ema)
        assert (painter / "eval/000002" / name / "results.json").is_file()
    assert Painter.made == 2
    found = [side.results() for side in find_sides("base", str(painter))]
    assert one_of_each(found[1]) == {("toy", "toy dataset shapes"): painter / "eval/000002/toy"}


def test_a_model_is_not_evaluated_against_itself(painter):
    save(painter, 2)
    with pytest.raises(EvaluationError, match="are the same model, or two that .*: compare with another model"):
        reca.evaluate("toy", painter, against=painter / "checkpoints/000002", limit=1)
    assert Painter.made == 0


def test_a_run_without_checkpoints_or_evaluations_is_refused(painter):
    shutil.rmtree(painter / "eval/000002")
    with pytest.raises(CheckpointError, match="run has no complete checkpoint; did the run save one"):
        reca.evaluate("toy", painter, limit=5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"suite": "geneva"}, "there is no suite 'geneva'; did you mean geneval? The suites are toy, geneval, "),
        ({"suite": "nothing"}, "there is no suite 'nothing'; the suites are toy, geneval, "),
        ({"suite": "toy?side=3"}, "only the toy datasets have options, such as toy?dataset=emoji&seed=1"),
        ({"suite": "toy?dataset=moon"}, "the datasets are emoji, shapes"),
        ({"suite": "toy?dataset=emojis"}, "did you mean emoji?"),
        ({"suite": "GenEval"}, "there is no suite 'GenEval'; did you mean geneval?"),
        (
            {"suite": "geneval_long", "judge": "owlv2:x"},
            "geneval_long needs the benchmark's files: data='PATH'. Use Benchmark/geneval/",
        ),
        ({"judge": "endpoint:http://x"}, "judge='endpoint' does not support toy; use one of toy"),
        ({"judge": "toy", "judge_options": {"speed": 2}}, "there is no judge option 'speed'"),
        ({"steps": ["generate", "judgement"]}, "steps 'judgement': unknown; the steps are generate, judge,"),
        ({"steps": ["scores"]}, "; did you mean score?"),
        ({"judge": "toys"}, "; did you mean toy?"),
        ({"steps": "generate"}, "steps='generate' must be a list; write steps=['generate']"),
        ({"images_per_item": 0}, "images_per_item must be at least 1, got 0"),
        ({"sampling": {"stepz": 1}}, "there is no sampling option 'stepz'; did you mean steps?"),
        ({"steps": ["score"]}, "contains no images of toy|contains no records; add the step judge"),
        ({"steps": ["report"]}, "results.json does not exist; add the step score"),
        ({"records": "none.jsonl", "against": "base"}, "none.jsonl does not exist; expected records.jsonl"),
        ({"records": "run/recipe.yaml", "against": "base"}, "recipe.yaml contains no answers about the items of toy"),
        ({"suite": "imgedit", "judge": "local:x"}, "imgedit needs a model that can edit: show_o cannot"),
    ],
)
def test_what_cannot_be_asked(painter, given, message):
    arguments = {"suite": "toy", "source": painter} | given
    with pytest.raises(ValueError) as caught:
        reca.evaluate(**arguments)
    said = str(caught.value)
    assert any(part in said for part in message.split("|")) and said == said.strip(), said
    assert Painter.made == 0 and not list(painter.rglob("*.png"))


def test_the_help_says_how_steps_are_separated(capsys):
    with pytest.raises(SystemExit):
        cli.main(["eval", "--help"])
    assert "[--steps STEP[,STEP...]]" in capsys.readouterr().out


@pytest.mark.parametrize("suite", ["toy", "toy?dataset=emoji"])
def test_the_model_before_the_suite(painter, capsys, suite):
    assert cli.main(["eval", str(painter), suite]) == 3
    assert f"the suite stands before the model: reca eval {suite} {painter}" in capsys.readouterr().err
