"""Dispatch tables and documents: made from result files, equal to what is committed."""

import itertools
import json
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import dispatch as tables
from benchmarks import docs
from benchmarks.__main__ import OPS
from benchmarks.plot import plot
from benchmarks.rows import BACKWARD, BOTH, FORWARD, RESULTS, Row, files, read, write
from reca_kernels import backend_report, dispatch, native
from reca_kernels.attention import order


def timed(provider, ms, numel, *, spread=0.05, op="flow_matching", dtype="bfloat16", timing="events", **options):
    return Row(
        *(op, options.pop("shape", f"n{numel}"), provider, options.pop("mode", BOTH), dtype, timing, numel, ms),
        **{
            **{"ms_p20": ms * (1 - spread), "ms_p80": ms * (1 + spread), "gb_per_s": 2.0, "percent_copy": 50.0},
            **{"peak_mb": 8.0, "relative_error": 0.001, "device": "NVIDIA Fake 80GB", "driver": "580", "threads": 1},
            **{
                "torch": "2.11",
                "triton": "3.6",
                "commit": "abc",
                "date": "2026-01-02",
                "command": "python -m benchmarks",
            },
            **options,
        },
    )


def made(folder, rows):
    write(folder / "nvidia_fake_80gb.csv", rows)
    return {(e["op"], e["device"], e["dtype"]): e for e in tables.table(folder)["entries"]}


def test_the_committed_table_is_made_of_the_committed_results():
    assert dispatch.TABLE.read_text() == tables.text()


@pytest.mark.parametrize("page", docs.pages(), ids=lambda page: page.name)
def test_the_committed_figures_are_those_of_the_results(page):
    assert page.read_text() == docs.filled(page), f"{page.name} is out of date: python -m benchmarks.docs"


def test_the_committed_order_of_attention_is_made_of_the_committed_results():
    assert order.TABLE.read_text() == tables.order_text()


def test_the_order_of_attention_is_by_time_over_all_layouts(tmp_path):
    def row(impl, shape, ms):
        return timed(f"ours: {impl}", ms, 1, op="attention", shape=shape)

    rows = [
        *(row("fa4", "show_o_512", 1.0), row("fa3", "show_o_512", 1.2), row("varlen", "show_o_512", 3.0)),
        *(row("fa4", "bagel", 9.0), row("fa3", "bagel", 4.0), row("varlen", "bagel", 8.0), row("cudnn", "bagel", 1.0)),
        row("sdpa", "size 24 rows", 0.1),
    ]
    rows += [timed("eager as upstream", 0.5, 1, op="attention", shape="bagel")]
    write(tmp_path / "nvidia_fake_80gb.csv", rows)
    (entry,) = tables.attention_order(tmp_path)["devices"]
    assert (entry["device"], entry["order"]) == ("NVIDIA Fake 80GB", ["fa3", "fa4", "varlen"])
    assert entry["ms"]["bagel, bfloat16"] == {"fa4": 9.0, "fa3": 4.0, "varlen": 8.0, "cudnn": 1.0}
    assert entry["date"] == "2026-01-02" and entry["torch"] == "2.11"


def test_every_entry_says_how_it_was_made():
    for entry in json.loads(dispatch.TABLE.read_text())["entries"]:
        assert all(entry[name] for name in ("measured_on", "command", "date", "torch", "commit", "ms", "rules"))
        assert entry["op"] in dispatch.OPS and entry["device"] in dispatch.ORDER and hasattr(torch, entry["dtype"])
        limits = [(rule["min_numel"], rule["max_numel"]) for rule in entry["rules"]]
        assert limits[0][0] == 0 and limits[-1][1] is None  # every size is covered once
        assert all(above == below for (_, above), (below, _) in itertools.pairwise(limits))


def test_sizes_are_split_between_measured_winners(tmp_path):
    rows = [
        *(timed("ours: cuda", 1.0, 100), timed("ours: triton", 0.5, 100)),
        *(timed("ours: cuda", 1.0, 10_000), timed("ours: triton", 2.0, 10_000)),
    ]
    entry = made(tmp_path, rows)["flow_matching", "cuda", "bfloat16"]
    assert entry["rules"] == [
        {"backend": "triton", "min_numel": 0, "max_numel": 1000},
        {"backend": "cuda", "min_numel": 1000, "max_numel": None},
    ]
    assert entry["measured_on"] == "NVIDIA Fake 80GB" and entry["ms"][100] == {
        "cuda": 1.0,
        "triton": 0.5,
    }


def test_the_order_stays_unless_another_is_clearly_faster(tmp_path):
    rows = [timed("ours: cuda", 1.0, 100), timed("ours: triton", 0.95, 100)]  # within the spread
    assert [r["backend"] for r in made(tmp_path, rows)["flow_matching", "cuda", "bfloat16"]["rules"]] == ["cuda"]


def test_clocks_are_not_mixed(tmp_path):
    """A graph of one backend says nothing against another that could not be captured."""
    rows = [
        *(timed("ours: cuda", 1.0, 100, timing="graph"), timed("ours: cuda", 9.0, 100)),
        timed("ours: triton", 5.0, 100),
    ]
    assert [r["backend"] for r in made(tmp_path, rows)["flow_matching", "cuda", "bfloat16"]["rules"]] == ["triton"]


def test_graphs_decide_where_both_clocks_were_used(tmp_path):
    rows = [
        *(timed("ours: cuda", 1.0, 100, timing="graph"), timed("ours: triton", 3.0, 100, timing="graph")),
        *(timed("ours: cuda", 9.0, 100), timed("ours: triton", 5.0, 100)),
    ]
    assert [r["backend"] for r in made(tmp_path, rows)["flow_matching", "cuda", "bfloat16"]["rules"]] == ["cuda"]


@pytest.mark.parametrize(("large", "expected"), [(0.5, ["reference"]), (2.0, ["cuda"])])
def test_the_definition_takes_all_sizes_or_none(tmp_path, large, expected):
    rows = [
        *(timed("ours: cuda", 1.0, 100), timed("ours: reference", 0.1, 100)),
        *(timed("ours: cuda", 1.0, 10_000), timed("ours: reference", large, 10_000)),
        timed("ours: cuda", 1.0, 1_000_000),  # where only the kernel was timed
    ]
    assert [r["backend"] for r in made(tmp_path, rows)["flow_matching", "cuda", "bfloat16"]["rules"]] == expected


def test_rows_are_kept_when_writing_them_again_is_interrupted(tmp_path):
    path, rows = tmp_path / "cpu.csv", [timed("eager", 1.0, 1)]
    write(path, rows)
    with pytest.raises(TypeError):
        write(path, [None, *rows])
    assert read(path) == rows and files(tmp_path) == [path]


def test_what_did_not_run_decides_nothing(tmp_path):
    refused = Row("flow_matching", "n100", "ours: triton", BOTH, "bfloat16", note="it does not implement flow_matching")
    assert made(tmp_path, [refused]) == {}
    rows = [
        refused,
        timed("ours: cuda", 1.0, 100),
        timed("eager", 0.1, 100),
        timed("ours: triton", 0.1, 100, mode=FORWARD),
    ]
    assert [r["backend"] for r in made(tmp_path, rows)["flow_matching", "cuda", "bfloat16"]["rules"]] == ["cuda"]


def test_measured_rules_come_before_the_order(tmp_path, monkeypatch):
    rows = [
        *(timed("ours: cpu", 1.0, 100, dtype="float32"), timed("ours: reference", 2.0, 100, dtype="float32")),
        *(timed("ours: cpu", 1.0, 100), timed("ours: reference", 0.5, 100)),
    ]
    write(tmp_path / "cpu.csv", rows)
    (tmp_path / "table.json").write_text(tables.text(tmp_path))
    measured = dispatch.read_table(tmp_path / "table.json")
    rules = dispatch._rules(measured["flow_matching", "cpu"], "cpu")
    assert [rule.backend for rule in rules] == ["reference", "cpu", "cpu"]  # bf16, fp32, and what was not measured
    monkeypatch.setitem(dispatch.RULES, ("flow_matching", "cpu"), rules)
    dispatch._decide.cache_clear()
    kernel = dispatch.choose("flow_matching", torch.zeros(5, dtype=torch.float16))
    assert dispatch.choose("flow_matching", torch.zeros(5, dtype=torch.bfloat16)) == "reference"
    assert dispatch.choose("flow_matching", torch.zeros(5)) == kernel  # "cpu", or "reference" without the module
    dispatch._decide.cache_clear()


def test_a_compiled_graph_takes_the_rule_of_large_tensors(monkeypatch):
    rules = (dispatch.Rule("reference", max_numel=10), dispatch.Rule("cpu"))
    monkeypatch.setitem(dispatch.RULES, ("philox", "cpu"), rules)
    usable = dispatch.unusable("philox", "cpu", "cpu") is None
    assert dispatch._by_table("philox", "cpu", None, torch.float32, None) == ("cpu" if usable else "reference")
    assert dispatch._by_table("philox", "cpu", None, torch.float32, 9) == "reference"


@pytest.mark.skipif(native.module is None, reason=str(native.missing))
def test_the_report_says_what_was_measured_and_what_not(monkeypatch):
    entry = {"dtype": "float32", "measured_on": "AMD EPYC", "date": "2026-01-02"}
    monkeypatch.setattr(dispatch, "MEASURED", {("philox", "cpu"): [entry]})
    report = backend_report().splitlines()
    assert any("philox on cpu" in line and "float32 measured on AMD EPYC on 2026-01-02" in line for line in report)
    assert any("flow_matching on cpu" in line and "not measured" in line for line in report)


def test_without_measurements_a_gpu_takes_cuda_then_triton():
    assert [rule.backend for rule in dispatch._rules([], "cuda")] == ["cuda", "triton"]


# ---- documents ----


def page(folder, text, name="flow_matching.md"):
    path = folder / name
    path.write_text(text)
    return path


MARKS = "before\n<!-- measured: flow_matching -->\nold\n<!-- /measured -->\nafter\n"


def test_results_are_kept_where_no_plot_can_be_made(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plot(RESULTS / "cpu.csv") is None
    assert "pip install matplotlib" in capsys.readouterr().out


def test_a_page_without_a_gpu_says_so(tmp_path):
    text = docs.filled(page(tmp_path, MARKS), tmp_path)
    assert text.startswith("before\n<!-- measured: flow_matching -->\n")
    assert text.endswith("<!-- /measured -->\nafter\n")
    assert "Not measured yet on a GPU" in text and "old" not in text


def test_a_page_with_measurements(tmp_path):
    rows = [
        timed("ours: cuda", 0.5, 100, shape="bagel", mode=FORWARD),
        timed("ours: cuda", 0.25, 100, shape="bagel", mode=BACKWARD),
        timed("ours: cuda", 0.75, 100, shape="bagel"),
        timed("eager", 3.0, 100, shape="bagel", relative_error=""),
        Row("flow_matching", "bagel", "ours: triton", BOTH, "bfloat16", note="it does not implement flow_matching"),
        timed("ours: cuda", 9.0, 7, shape="size tiny"),
    ]
    write(tmp_path / "nvidia_fake_80gb.csv", rows)
    text = docs.filled(page(tmp_path, MARKS), tmp_path)
    ours = "0.5 | 0.25 | 0.75 [0.712, 0.788] | 1.00 x | 2 (50 %) | 8.0 | 1.0e-03"
    assert f"| bagel, bf16 | **ours: cuda** | {ours} |" in text
    assert "| bagel, bf16 | eager |  |  | 3 [2.85, 3.15] | 4.00 x | 2 (50 %) | 8.0 | n/a |" in text
    assert "ours: triton: it does not implement flow_matching" in text and "tiny" not in text
    assert "NVIDIA Fake 80GB, torch 2.11, Triton 3.6, driver 580, 2026-01-02, commit abc" in text
    assert "Not measured yet on a GPU" not in text
    assert docs.filled(page(tmp_path, text), tmp_path) == text  # the same again


def test_the_summary_takes_our_fastest_and_the_best_eager(tmp_path):
    rows = [
        *(timed("ours: cuda", 2.0, 100, shape="bagel"), timed("ours: triton", 1.0, 100, shape="bagel", peak_mb=4.0)),
        *(timed("eager as upstream", 5.0, 100, shape="bagel"), timed("eager", 3.0, 100, shape="bagel")),
        timed("torch.compile", 1.5, 100, shape="bagel"),
    ]
    write(tmp_path / "nvidia_fake_80gb.csv", rows)
    text = docs.filled(page(tmp_path, MARKS.replace("flow_matching", "kernels"), "README.md"), tmp_path)
    assert "| flow_matching | bagel, bf16 | 1 | 5.0 x | 3.0 x | 1.5 x | 0.50 |" in text
    assert "one NVIDIA Fake 80GB, torch 2.11 (`python -m benchmarks`)" in text


@pytest.mark.parametrize("shown", [{"op": "row_gradients"}, {"shape": "size 16"}, {"ms_p50": "", "note": "failed"}])
def test_a_device_without_a_row_for_the_summary_is_not_in_it(tmp_path, shown):
    write(tmp_path / "nvidia_fake_80gb.csv", [replace(timed("ours: cuda", 1.0, 16), **shown)])
    assert docs.summary(tmp_path) == docs.NO_GPU + "\n"


def test_a_page_without_a_place_for_figures_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="add lines '<!-- measured: philox -->' and '<!-- /measured -->'"):
        docs.filled(page(tmp_path, "no marks", "philox.md"), tmp_path)


def test_every_op_has_a_page_in_the_index():
    index = (docs.ROOT / "docs" / "kernels.md").read_text()
    for op in OPS:
        if op == "row_gradients":  # a part of an op, on its page
            continue
        assert f"(kernels/{op}.md)" in index and (docs.ROOT / "docs" / "kernels" / f"{op}.md").exists()
