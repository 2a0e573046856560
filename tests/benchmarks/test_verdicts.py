"""The table that a day with a GPU ends with: ours, the best rival, the share of the ceiling, the target met or not."""

from benchmarks import rows, verdicts
from benchmarks.rows import BOTH, CEILING, Row
from benchmarks.step.rows import StepRow
from benchmarks.step.rows import write as write_steps

ABOUT = dict(device="NVIDIA Fake 80GB", driver="580", threads=1, torch="2", date="2026-01-02", commit="abc")


def timed(provider, ms, percent, op="masked_cross_entropy", **options):
    given = dict(ms_p50=ms, ms_p20=ms, ms_p80=ms, percent_copy=percent, timing="events")
    return Row(op, "show_o_512", provider, BOTH, "bfloat16", **given | ABOUT | options)


def step(form, seconds, **options):
    numbers = dict(
        images=10, seconds_p20=seconds, seconds_p80=seconds, flops=4e14, useful_flops=3e14, gemm=1e15, copy=4e12
    )
    return StepRow("show_o", "real", form, seconds_p50=seconds, peak_gib=30.0, **numbers | ABOUT | options)


def test_every_case_is_one_line_beside_its_target(tmp_path):
    rows.write(
        tmp_path / "nvidia_fake_80gb.csv",
        [
            Row(CEILING, "copy", "torch", "forward", "float32", gb_per_s=3e3, **ABOUT),
            timed("ours: cuda", 1.0, 85.0),
            timed("ours: triton", 1.2, 70.0),
            timed("eager", 9.0, 9.0),
            timed("quack", 1.05, 80.0),
            timed("ours: cuda", 1.0, 40.0, op="philox"),
        ],
    )
    write_steps(tmp_path / "step" / "nvidia_fake_80gb.csv", [step("ours", 0.5), step("release", 1.1)])
    entropy, noise, whole = verdicts.verdicts("cuda", tmp_path)
    assert entropy[:3] == ("masked_cross_entropy, show_o_512, bfloat16", "1 ms", "quack 1.05 ms")
    assert (entropy.ratio, entropy.share, entropy.target, entropy.met) == (1.05, 0.85, "80 % and 1.1 x", "no")
    assert (noise.rival, noise.ratio, noise.target, noise.met) == ("none ran", None, "", "")
    assert whole.what == "step of show_o, real" and whole.rival == "release 1.1 s" and whole.met == "yes"
    assert (round(whole.ratio, 6), whole.share) == (2.2, 0.6)
    lines = verdicts.table("cuda", tmp_path).splitlines()
    assert len(lines) == 4 and lines[0].split()[-2:] == ["target", "met"]
    assert lines[3].split() == "step of show_o, real 0.5 s release 1.1 s 2.20 x 60 % 55 % and 2 x yes".split()
    assert verdicts.verdicts("cpu", tmp_path) == []


def test_the_products_of_an_op_are_no_rival(tmp_path):
    op = dict(op="masked_linear_cross_entropy", percent_gemm=88.0)
    rows.write(
        tmp_path / "nvidia_fake_80gb.csv",
        [
            timed("ours: cuda", 1.0, 5.0, **op),
            timed(rows.ALONE, 0.96, 5.0, **op),
            timed("quack", 1.01, 5.0, **op),
            timed("ours: cuda", 1.0, 83.0, op="row_gradients"),
        ],
    )
    linear, between = verdicts.verdicts("cuda", tmp_path)
    assert (linear.rival, linear.ratio, linear.share, linear.alone) == ("quack 1.01 ms", 1.01, 0.88, 0.96)
    assert (linear.target, linear.met) == ("85 % and 1 x and 0.95 of products", "yes")
    assert (between.share, between.target, between.met) == (0.83, "82 %", "yes")
