"""Losses by source in the log: `reca/loss@SOURCE` of a mixture."""

import pytest
import torch

from reca.config.recipe_files import load_recipe
from reca.data.bad_samples import BadSamples
from reca.data.sources.mixture import labels
from reca.io import jsonl
from tests.driver.toy import ToyAdapter, run_toy, write_images, write_recipe


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["/data/photos", "hf:owner/set?split=train", "s3://b/shards/{000..009}.tar"], ["photos", "set", "shards"]),
        (["/a/x", "/b/x/", "/c/y"], ["x#0", "x#1", "y"]),
        (["package.module:FUNCTION?seed=0", "*.tar", "/"], ["FUNCTION", "*.tar", "/"]),
    ],
)
def test_labels_are_short_and_differ(names, short):
    assert labels(names) == short


@pytest.mark.parametrize("micro_batch", [2, 8])
def test_losses_by_source_add_up(tmp_path, micro_batch, monkeypatch):
    sources = [write_images(tmp_path / name, 6) for name in ("one", "two", "rare")]
    mixture = f"[{{source: {sources[0]}}}, {{source: {sources[1]}, weight: 2}}, {{source: {sources[2]}, weight: 0.01}}]"
    keys = [f"data.images={mixture}", f"objective.reca.micro_batch={micro_batch}", "log.every=2", "train.steps=5"]
    seen = []
    forward = ToyAdapter.forward

    def kept(self, batch, rng, condition="own"):
        term = forward(self, batch, rng, condition)
        seen.append((batch.sources, term.samples))
        return term

    monkeypatch.setattr(ToyAdapter, "forward", kept)
    run_toy(load_recipe(write_recipe(tmp_path, sources[0]), keys))
    lines = jsonl.read(tmp_path / "run" / "log.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 5]
    each = 8 // micro_batch
    for line in lines:
        step = seen[(line["step"] - 1) * each : line["step"] * each]
        numbers, table = [n for numbers, _ in step for n in numbers], torch.cat([samples for _, samples in step])
        assert float(table[:, 1].sum()) == line["reca/weight"]
        for number, name in enumerate(("one", "two", "rare")):
            mine = table[[n == number for n in numbers]].sum(0)
            if float(mine[1]):
                assert line[f"reca/loss@{name}"] == pytest.approx(float(mine[0] / mine[1]), rel=1e-6)
            else:
                assert f"reca/loss@{name}" not in line
        assert {"reca/loss@one", "reca/loss@two"} <= line.keys()
    assert all(samples is None for _, samples in seen[:each])  # of a step that is not logged


def test_a_model_without_losses_by_sample_has_none_by_source(tmp_path, monkeypatch):
    forward = ToyAdapter.forward
    monkeypatch.setattr(ToyAdapter, "forward", lambda *given: forward(*given)._replace(samples=None))
    sources = [write_images(tmp_path / name, 6) for name in ("one", "two")]
    keys = {"data.images": [{"source": str(source)} for source in sources], "train.steps": 1}
    run_toy(load_recipe(write_recipe(tmp_path, sources[0]), keys))
    (line,) = jsonl.read(tmp_path / "run" / "log.jsonl")
    assert line["reca/loss"] > 0 and not any("@" in name for name in line)


def test_one_source_has_no_losses_by_source(tmp_path):
    run_toy(load_recipe(write_recipe(tmp_path, write_images(tmp_path / "images"))))
    assert not any("@" in name for line in jsonl.read(tmp_path / "run" / "log.jsonl") for name in line)


def test_bad_samples_are_counted_in_logged_steps_only(tmp_path, monkeypatch):
    """Counting reads the list that all ranks share."""
    images, counts, count = write_images(tmp_path / "images"), [], BadSamples.count
    (images / "broken.png").write_bytes(b"junk")
    monkeypatch.setattr(BadSamples, "count", lambda bad: counts.append(1) or count(bad))
    keys = {"log.every": 3, "train.steps": 7, "data.max_bad_fraction": 0.5}
    run_toy(load_recipe(write_recipe(tmp_path, images), keys))
    lines = jsonl.read(tmp_path / "run" / "log.jsonl")
    assert [(line["step"], line["reca/bad_samples"]) for line in lines] == [(3, 1), (6, 1), (7, 1)]
    assert len(counts) == 1 + len(lines)  # once at the start
