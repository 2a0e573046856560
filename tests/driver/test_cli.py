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
