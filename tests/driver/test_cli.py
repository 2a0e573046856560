import sys

import pytest

from reca.cli import main


def test_explain_prints_every_key(capsys):
    assert main(["train", "show_o_tiny", "--explain"]) == 0
    out = capsys.readouterr().out
    assert "objective.reca.weight=1.0" in out and "optim.lr=" in out


def test_recipe_mistake_is_exit_3_and_one_sentence(capsys):
    assert main(["train", "show_o_tiny", "optim.lrr=1"]) == 3
    assert "did you mean optim.lr" in capsys.readouterr().err


def test_missing_images_are_exit_4(capsys, tmp_path):
    assert main(["train", "show_o_tiny", f"data.images={tmp_path}/nowhere", f"run_dir={tmp_path}/run"]) == 4
    assert "nowhere" in capsys.readouterr().err


def test_doctor_names_backends_and_the_right_apex(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "masked_cross_entropy" in out and "apex" in out and "GB free" in out


def test_usage_error_is_exit_2():
    with pytest.raises(SystemExit) as stop:
        main(["train"])
    assert stop.value.code == 2


TINY = ["train.updates=1", "objective.reca.per_update=2", "objective.reca.micro_batch=2", "objective.i2t.weight=0"]


@pytest.mark.parametrize("name", ["show_o_tiny", "harmon_tiny"])
def test_what_a_model_cannot_do_is_said_before_it_is_built(name, capsys, tmp_path):
    image = str(tmp_path / "none.png")
    assert main(["edit", name, "--image", image, "--instruction", "draw it red"]) == 3
    assert f"{name[:-5]} cannot edit; recipes of open_uni and bagel can" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--sampling", "stepz=3"], "no sampling option 'stepz'; did you mean steps"),
        (["--sampling", "steps=many"], "steps=many: expected a whole number"),
        (["--sampling", "steps"], "write --sampling key=value"),
        (["--seed", "-1"], "seed -1 lies outside"),
        (["--prompt", " "], "the text is empty"),
        (["--out", __file__], "cannot be written to"),
    ],
)
def test_mistakes_of_generate_are_exit_3_and_one_sentence(more, words, capsys):
    assert main(["generate", "show_o_tiny", "--prompt", "a red circle", *more]) == 3
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_pictures_are_named_after_their_prompts(capsys, tmp_path):
    options = ["--sampling", "steps=1", "--seed", "4", "--out", str(tmp_path)]
    assert main(["generate", "show_o_tiny", "--prompt", "a red circle", "--prompt", "zebra!", *options]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000_seed4_a-red-circle.png", "001_seed5_zebra.png"]


def test_a_run_dir_that_is_a_file_is_exit_3(capsys):
    assert main(["train", "show_o_tiny", *TINY, f"run_dir={__file__}"]) == 3
    assert "run_dir" in (error := capsys.readouterr().err) and "cannot be written to" in error


def test_a_run_of_another_model_is_named_by_its_umm(capsys, tmp_path):
    assert main(["train", "show_o_tiny", *TINY, f"run_dir={tmp_path}"]) == 0
    capsys.readouterr()
    assert main(["train", "bagel_tiny", "train.updates=1", f"run_dir={tmp_path}"]) == 3
    error = capsys.readouterr().err
    assert "(umm 'show_o' -> 'bagel')" in error and "words" not in error


def test_harmon_trains_from_a_cache(tmp_path):
    """Its h_v is made of the picture's own latents: one tensor under two names."""
    for run in ("first", "second"):
        assert main(["train", "harmon_tiny", *TINY, f"data.cache={tmp_path}/cache", f"run_dir={tmp_path}/{run}"]) == 0


def test_options_of_bench_are_the_benchmarks_own(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)  # the command replaces it
    assert main(["bench", "--help"]) == 0
    assert "--ops" in capsys.readouterr().out


def test_ctrl_c_has_its_exit_code(monkeypatch, capsys):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("reca.doctor.report", stopped)
    assert main(["doctor"]) == 130 and capsys.readouterr().err == "reca: stopped\n"
