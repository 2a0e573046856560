"""benchmarks.data: every loader makes the same views, and the page is made of the result files."""

from dataclasses import replace

import pytest

from benchmarks import docs
from benchmarks.data import rows, waiting, waiting_rows
from benchmarks.data.__main__ import measure, show
from benchmarks.data.loaders import Way, ways
from benchmarks.data.photos import jpeg, write
from benchmarks.devices import Cpu
from benchmarks.runner import facts


def test_the_committed_page_is_that_of_the_results():
    assert rows.PAGE.read_text() == docs.filled(rows.PAGE), "out of date: python -m benchmarks.docs"


def test_loaders_make_as_many_views_of_the_asked_sizes(tmp_path):
    files = write(tmp_path, 40, 16)
    assert files[0] == jpeg(0, 40) and len(set(files)) == 16
    able = {name: way for name, way in ways(tmp_path, files, 32, 24, "cpu").items() if isinstance(way, Way)}
    assert {"ours: Pillow", "ours: loader", "Pillow"} <= set(able)
    for name, way in able.items():
        made = list(way.run())
        for views, side in zip(zip(*made, strict=True), (32, 24), strict=True):
            shapes = [tuple(view.shape) for batch in views for view in batch]
            assert shapes == [(3, side, side)] * 16, name


@pytest.fixture(scope="module")
def measured():
    about = facts(Cpu(), 1, "python -m benchmarks.data") | {"versions": "Pillow 13", "clock": "CPU"}
    about.pop("triton")
    return measure(40, 16, 2, "cpu", about)


def test_a_measured_row(measured):
    found = {row.by: row for row in measured}
    ours = found["ours: Pillow"]
    assert ours.ms_p20 <= ours.ms_p50 <= ours.ms_p80 and ours.cpu_ms == ours.ms_p50 > 0
    assert (ours.largest_off, ours.off_by_more) == (0, 0.0)  # Pillow's bits
    assert found["ours: DALI GPU"].ms_p50 == "" and found["ours: DALI GPU"].note
    assert "images/s" in show(ours) and found["ours: DALI GPU"].note in show(found["ours: DALI GPU"])


def test_files_and_page(tmp_path, measured):
    for row in measured:
        row.note = row.note or ""
    results, path = tmp_path / "data", tmp_path / "page.md"
    rows.write(results / "cpu.csv", measured)
    assert rows.read(results / "cpu.csv") == measured
    path.write_text("# Title\n<!-- measured: data -->\nof yesterday\n<!-- /measured -->\nafter\n")
    page = docs.filled(path, tmp_path)
    assert page.startswith("# Title\n") and page.endswith("<!-- /measured -->\nafter\n") and "yesterday" not in page
    path.write_text(page)
    assert "| 40 px | **ours: Pillow** |" in page and rows.NO_GPU in page and docs.filled(path, tmp_path) == page
    rows.write(results / "nvidia_fake.csv", [replace(row, device="NVIDIA Fake", clock="wall") for row in measured])
    both = docs.filled(path, tmp_path)
    assert "**GPU.** NVIDIA Fake" in both and rows.NO_GPU not in both


def test_a_run_is_timed_as_it_waits_for_images(tmp_path):
    decode, step, waited = waiting.measure(64, 1, 2)
    assert step == pytest.approx(1.25 * waiting.IMAGES * decode) and 0 <= waited < 1
    where = dict(device="A CPU", torch="2", commit="abc", date="2026-11-27", command="the command")
    assert "Not measured yet; run `python -m benchmarks.data.waiting`" in waiting_rows.section(tmp_path)
    waiting_rows.write(tmp_path / "cpu.csv", [waiting_rows.Row(512, 2, 2.5, 15.63, 60, 0.0131, **where)])
    assert "| 512 px | 2 | 2.5 | 15.6 | 60 | **1.3 %** | 2 % |" in waiting_rows.section(tmp_path)
