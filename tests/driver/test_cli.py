import contextlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from reca.cli import main
from reca.commands import general
from reca.data.sources.skipped import log_once


def test_explain_prints_every_key(capsys):
    assert main(["train", "show_o_tiny", "--explain"]) == 0
    out = capsys.readouterr().out
    assert "objective.reca.weight=1.0" in out and "optim.lr=" in out


def test_recipe_mistake_is_exit_3_and_one_sentence(capsys):
    assert main(["train", "show_o_tiny", "optim.lrr=1"]) == 3
    assert "did you mean optim.lr" in capsys.readouterr().err


def test_a_misspelled_recipe_names_the_nearest(capsys):
    assert main(["train", "show_o_tyny"]) == 3
    assert "no recipe 'show_o_tyny': did you mean show_o_tiny? Give a .yaml file, or one of" in capsys.readouterr().err
    assert main(["train", "elsewhere"]) == 3
    assert "no recipe 'elsewhere': give a .yaml file, or one of bagel_7b" in capsys.readouterr().err


def test_missing_images_are_exit_4(capsys, tmp_path):
    assert main(["train", "show_o_tiny", f"data.images={tmp_path}/nowhere", f"run_dir={tmp_path}/run"]) == 4
    assert "nowhere" in capsys.readouterr().err


def test_doctor_names_backends_and_the_right_apex(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "masked_cross_entropy" in out and "apex" in out and "iB free" in out


def test_doctor_imports_apex(capsys, tmp_path, monkeypatch):
    """Extensions that were built for another torch are found, and cannot be imported. Training says the same."""
    (tmp_path / "apex/optimizers").mkdir(parents=True)
    (tmp_path / "apex/__init__.py").touch()
    (tmp_path / "apex/optimizers/__init__.py").write_text("class FusedAdam: ...")
    (tmp_path / "amp_C.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("apex", "apex.optimizers", "amp_C"):  # what is imported here is not left to other tests
        monkeypatch.setitem(sys.modules, name, None)
        del sys.modules[name]
    assert main(["doctor"]) == 0
    assert "cannot be imported (undefined symbol: _ZN3c10)" in capsys.readouterr().out
    (tmp_path / "amp_C.py").write_text("")
    assert main(["doctor"]) == 0
    assert "NVIDIA apex with CUDA extensions" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], [], ["status", "."], ["study", "--help"], ["train"], ["nothing"]]
)
def test_help_status_and_usage_errors_need_no_torch(arguments):
    """They answer in half a second; importing torch and transformers takes five."""
    script = (
        "import sys\nfrom reca.cli import main\ntry:\n    main(sys.argv[1:])\nfinally:\n"
        "    print('loaded', *sorted({'torch', 'transformers', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "loaded", done.stderr


def test_a_rank_that_is_empty_is_none(monkeypatch, caplog, capsys):
    """As `export RANK=$SLURM_PROCID` makes it outside of a job."""
    monkeypatch.setenv("RANK", "")
    assert main(["status", "nowhere"]) == 3
    assert main(["train", "show_o_tiny", "--explain"]) == 0 and "train.steps" in capsys.readouterr().out
    log_once(logging.WARNING, "of rank 0")
    assert "of rank 0" in caplog.text


def test_usage_error_is_exit_2(capsys):
    """What it names as missing is what the command needs: overrides may be left out."""
    with pytest.raises(SystemExit) as stop:
        main(["train"])
    assert stop.value.code == 2 and capsys.readouterr().err.endswith("are required: recipe\n")


def test_without_a_command_the_commands_are_listed(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2 and "Train a recipe, or resume its run." in capsys.readouterr().err


TINY = ["train.steps=1", "objective.reca.batch_size=2", "objective.reca.micro_batch=2", "objective.i2t.weight=0"]
TINY += ["log.reconstructions=0"]


@pytest.mark.parametrize("name", ["show_o_tiny", "harmon_tiny"])
def test_what_a_model_cannot_do_is_said_before_it_is_built(name, capsys, tmp_path):
    image = str(tmp_path / "none.png")
    assert main(["edit", name, "--image", image, "--instruction", "draw it red"]) == 3
    assert f"{name[:-5]} cannot edit; recipes of bagel and open_uni can" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["show_o_tiny", "--gpus", "1", "train.precision=bf16", "--gpus-per-node", "2", "train.steps=7"],
        ["--gpus", "1", "show_o_tiny", "train.precision=bf16", "train.steps=7", "--gpus-per-node", "2"],
        ["show_o_tiny", "train.precision=bf16", "--gpus-per-node", "2", "--gpus", "1", "train.steps=7"],
        ["--gpus-per-node", "2", "--gpus", "1", "show_o_tiny", "train.precision=bf16", "train.steps=7"],
    ],
)
def test_overrides_stand_on_either_side_of_options(arguments, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(
        "reca.estimate.check.report", lambda recipe, gpus, node, card: seen.append((recipe, gpus, node))
    )
    assert main(["check", *arguments]) == 0
    ((recipe, gpus, node),) = seen
    assert (recipe.train.precision, recipe.train.steps, gpus, node) == ("bf16", 7, 1, 2)


def test_no_number_of_gpus_makes_check_run_away(capsys):
    assert main(["check", "show_o_tiny", "--gpus", "9" * 20]) == 3
    assert "must be at most 1048576" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "check", "generate", "edit", "answer", "export"])
def test_every_command_takes_overrides_behind_its_options(command, tmp_path, capsys):
    options = {
        "train": ["--explain"],
        "check": ["--gpus", "1"],
        "generate": ["--prompt", "a red circle"],
        "edit": ["--image", "none.png", "--instruction", "x"],
        "answer": ["--image", "none.png", "--question", "x"],
        "export": ["--out", str(tmp_path)],
    }
    assert main([command, "bagel_tiny", *options[command], "optim.lrr=1"]) == 3
    assert "did you mean optim.lr" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["doctor", "a=b"], ["train", "show_o_tiny", "--nothing"], ["demo", "optim.lr=1"]]
)
def test_arguments_that_mean_nothing_are_exit_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and "unrecognized arguments" in capsys.readouterr().err


def test_home_expands_in_paths_of_options(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    drawn = ["--prompt", "a red circle", "--sampling", "steps=1", "--out", "~/images"]
    assert main(["generate", "show_o_tiny", *drawn]) == 0
    assert len(list((tmp_path / "images").iterdir())) == 1
    with pytest.raises(SystemExit):
        main(["generate", "show_o_tiny", "--prompt", "a", "--out", "~no_such_user/x"])
    assert "there is no such user" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["generate", "show_o_tiny", "--prompt", "a", "--out", " "])
    assert "argument --out: it is empty" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["nosuchrun", "a=b", "runs/gone"])
def test_a_run_that_is_not_there(name, capsys):
    assert main(["generate", name, "--prompt", "a red circle"]) == 3
    error = capsys.readouterr().err
    assert f"'{name}' is not a run folder, and there is no recipe" in error and error.count("\n") == 1


@pytest.mark.parametrize("name", ["bagel", "open_uni"])
def test_a_loss_that_trains_nothing_is_exit_3(name, capsys, tmp_path):
    small = [f"objective.{task}.{key}=2" for task in ("reca", "i2t") for key in ("batch_size", "micro_batch")]
    assert main(["train", f"{name}_tiny", "objective.i2t.weight=1", *small, f"run_dir={tmp_path}/run"]) == 3
    error = capsys.readouterr().err
    assert f"the i2t loss of {name} depends on no trained parameter" in error
    assert "set objective.i2t.weight=0, or add another role to train.roles" in error


def test_a_run_that_trains_nothing_is_exit_3(capsys, tmp_path):
    assert main(["train", "show_o_tiny", *TINY, "train.frozen=[*]", f"run_dir={tmp_path}/run"]) == 3
    assert "nothing is trained" in capsys.readouterr().err


def test_a_run_is_found_from_another_folder(tmp_path, monkeypatch, capsys):
    """init_from is kept as an absolute path; the sources, too, mean the same to the run that starts from it."""
    monkeypatch.chdir(tmp_path)
    assert main(["train", "show_o_tiny", *TINY, "run_dir=first"]) == 0
    assert main(["train", "show_o_tiny", *TINY, "run_dir=second", "train.init_from=first"]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    drawn = ["--prompt", "a red circle", "--sampling", "steps=1"]
    assert main(["generate", "../second", *drawn]) == 0
    monkeypatch.chdir(tmp_path)
    assert main(["train", "show_o_tiny", *TINY, "run_dir=second", "train.init_from=first"]) == 0  # goes on


@pytest.mark.parametrize(
    ("arguments", "usage", "said"),
    [
        (["train", "show_o_tiny", "--train.steps=4"], "train", "keys are written without dashes, as train.steps=VALUE"),
        (["status", "run", "--json"], "status", "unrecognized arguments: --json"),
        (["get", "suite", "dpg", "--json"], "get suite", "unrecognized arguments: --json"),
        (["eval", "toy", "run", "--steps", "generate", "judge"], "eval", "by commas: --steps generate,judge"),
        (
            ["eval", "--steps=generate", "judge", "toy", "run"],
            "eval",
            "unrecognized arguments: run; --steps takes one l",
        ),
        (
            ["eval", "toy", "run", "--steps", "judge,", "score"],
            "eval",
            "'judge,' has an empty item; expected steps sep",
        ),
        (["study", "seen", "--seeds", "3,", "1", "2"], "study", "by commas: --seeds 3,1,2"),
        (["study", "seen", "--suite", "toy", "pope"], "study", "arguments: pope; write --suite before each value"),
        (["generate", "r", "--prompt", "a red", "ring"], "generate", "write --prompt before each value, and quotes ar"),
        (["answer", "r", "--image", "i", "--question", "Is", "it?"], "answer", "needs quotes: --question 'Is it?'"),
        (["data", "view", "r", "--count", "3", "4"], "data view", "unrecognized arguments: 4; --count takes one value"),
        (["status", "run", "--field", "step", "state"], "status", "arguments: state; --field takes one value"),
        (["train", "r", "harmon_tiny"], "train", "arguments: harmon_tiny; recipe keys are overridden as key=value"),
        (["train", "r", "train.steps", "5"], "train", "write train.steps=VALUE, without spaces"),
        (["train", "r", "train.frozen=[a,", "b]"], "train", "needs quotes: write 'train.frozen=[a, b]'"),
        (["train", "r", "eval.sampling=[a=1,", "b=2,", "c=3]", "x=1"], "train", "'eval.sampling=[a=1, b=2, c=3]'"),
        (["status", "run", "--field", "stat"], "status", "'time'); did you mean state?"),
        (["generate", "r", "--prompt", "x", "--smapling", "a=1"], "generate", "did you mean --sampling?"),
        (["get", "sute", "dpg"], "get", "'suite'); did you mean suite?"),
        (["compare", "base", "run", "x"], "compare", "unrecognized arguments: x\n"),
    ],
)
def test_an_unknown_option_shows_the_usage_of_its_command(arguments, usage, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith(f"usage: reca {usage} ") and said in error


def open_dev_full():
    """Open a file that takes no byte, as on a full disk. Return its descriptor."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    return os.open("/dev/full", os.O_WRONLY)


@pytest.mark.parametrize(("more", "code"), [([], 0), (["data.images=/nowhere"], 4)])
def test_output_on_a_full_disk_ends_nothing(more, code, monkeypatch, tmp_path):
    """As where a batch job's output is beside its runs. The exit code stays that of the run."""
    run = tmp_path / "run"
    full = os.fdopen(open_dev_full(), "w", buffering=1)  # it cannot be closed
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", full)
        patch.setattr(sys, "stdout", full)
        assert main(["train", "show_o_tiny", *TINY, "log.every=1", f"run_dir={run}", *more]) == code
    assert json.loads((run / "status.json").read_text())["exit_code"] == code
    if code == 0:
        full.flush()  # as the interpreter does at its end: where that fails it exits with 120
    with contextlib.suppress(OSError):
        full.close()


@pytest.mark.parametrize("arguments", [["study", "list"], ["status", "--help"]])
@pytest.mark.parametrize("reader", ["full disk", "ended"])
def test_output_that_cannot_be_written_has_an_exit_code_of_ours(arguments, reader):
    if reader == "full disk":
        out = open_dev_full()
    else:
        unread, out = os.pipe()
        os.close(unread)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "reca", *arguments]
    done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(out)
    if reader == "full disk":
        assert done.stderr == "reca: the output is lost (No space left on device)\n"
        assert done.returncode == (0 if "--help" in arguments else 4)
    else:
        assert (done.returncode, done.stderr) == (0, "")


def test_the_command_to_go_on_with_can_be_entered_as_it_is(capsys):
    """A folder that begins with a dash would be read as an option."""
    for run_dir, named in {"-x": "./-x", "a b": "'a b'", "runs/-x": "runs/-x"}.items():
        recipe = SimpleNamespace(run_dir=run_dir, umm="show_o")
        general._tell(recipe, SimpleNamespace(new_steps=1, steps=1, folder=Path(run_dir)))
        assert capsys.readouterr().out.startswith(f"1 step done. Generate with: reca generate {named} --prompt ")


def test_a_reader_that_ends_does_not_end_the_command(monkeypatch, tmp_path):
    """Where each line is written at once, as with PYTHONUNBUFFERED in containers, later work would be lost."""
    unread, out = os.pipe()
    os.close(unread)
    with monkeypatch.context() as patch, open(out, "w", buffering=1) as stream:

        def report():
            print("first")
            (tmp_path / "later").touch()
            return "last"

        patch.setattr(sys, "stdout", stream)
        patch.setattr("reca.commands.doctor.report", report)
        assert main(["doctor"]) == 0
    assert (tmp_path / "later").exists()


def test_python_without_docstrings_is_one_sentence():
    """Transformers ended with "No `Args` or `Parameters` section is found in the docstring of ..."."""
    command = [sys.executable, "-OO", "-m", "reca", "check", "show_o_tiny"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "")
    assert (
        done.stderr
        == "reca: transformers reads docstrings, which -OO and PYTHONOPTIMIZE=2 remove: use -O, or neither\n"
    )


def test_what_nobody_foresaw_keeps_its_traceback(monkeypatch, capsys):
    monkeypatch.setattr("reca.commands.doctor.report", lambda: 1 / 0)
    assert main(["doctor"]) == 1
    assert "Traceback" in (error := capsys.readouterr().err) and "ZeroDivisionError" in error


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--sampling", "stepz=3"], "no sampling option 'stepz'; did you mean steps"),
        (["--sampling", "steps=many"], "steps=many: expected a whole number"),
        (["--sampling", "steps"], "write --sampling key=value"),
        (["--sampling", "steps="], "has no value"),
        (["--sampling", "steps=010"], "steps=010: expected a whole number"),
        (["--sampling", "steps=[1, 2"], "steps=[1, 2: expected a whole number"),
        (["--seed", "-1"], "seed -1 is outside"),
        (["--prompt", " "], "the text is empty"),
    ],
)
def test_mistakes_of_generate_are_exit_3_and_one_sentence(more, words, capsys):
    assert main(["generate", "show_o_tiny", "--prompt", "a red circle", *more]) == 3
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_a_file_as_output_folder_is_exit_4_and_one_sentence(capsys):
    assert main(["generate", "show_o_tiny", "--prompt", "a red circle", "--out", __file__]) == 4
    error = capsys.readouterr().err
    assert "is not a folder; name another" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "override", "words"),
    [
        ("generate", "steps=3", "steps=3 is not a recipe key: write --sampling steps=3 for an option of the model"),
        ("generate", "seed=3", "seed=3 is not a recipe key: write --seed 3, or --sampling seed=3"),
        ("train", "overfit=3", "overfit=3 is not a recipe key: write --overfit 3"),
    ],
)
def test_an_option_written_as_an_override(command, override, words, capsys):
    more = ["--prompt", "a red circle"] if command == "generate" else []
    with pytest.raises(SystemExit) as stop:
        main([command, "show_o_tiny", override, *more])
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_images_are_named_after_their_prompts(capsys, tmp_path):
    options = ["--sampling", "steps=1", "--seed", "4", "--out", str(tmp_path)]
    assert main(["generate", "show_o_tiny", "--prompt", "a red circle", "--prompt", "zebra!", *options]) == 0
    names = ["000_seed4_a-red-circle.png", "001_seed5_zebra.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    # Another model, or a prompt that begins as this one, would have the same name.
    assert main(["generate", "show_o_tiny", "--prompt", "a red circle", *options]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, "002_seed4_a-red-circle.png"]


def test_a_run_dir_that_is_a_file_is_exit_3(capsys):
    assert main(["train", "show_o_tiny", *TINY, f"run_dir={__file__}"]) == 4
    assert "run_dir" in (error := capsys.readouterr().err) and "is not a folder; name another" in error


def test_a_run_of_another_model_is_named_by_its_umm(capsys, tmp_path):
    assert main(["train", "show_o_tiny", *TINY, f"run_dir={tmp_path}"]) == 0
    capsys.readouterr()
    assert main(["train", "bagel_tiny", "train.steps=1", f"run_dir={tmp_path}"]) == 3
    error = capsys.readouterr().err
    assert "(umm 'show_o' -> 'bagel')" in error and "words" not in error


def test_harmon_trains_from_a_cache(tmp_path):
    """Its h_v is made of the image's own latents: one tensor under two names."""
    for run in ("first", "second"):
        assert main(["train", "harmon_tiny", *TINY, f"data.cache={tmp_path}/cache", f"run_dir={tmp_path}/{run}"]) == 0


def test_options_of_bench_are_the_benchmarks_own(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)  # the command replaces it
    assert main(["bench", "--help"]) == 0
    assert "--ops" in capsys.readouterr().out


def test_ctrl_c_has_its_exit_code(monkeypatch, capsys):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("reca.commands.doctor.report", stopped)
    assert main(["doctor"]) == 130 and capsys.readouterr().err == "reca: stopped\n"


@pytest.mark.parametrize(
    ("command", "function", "kept"),
    [
        ("eval toy show_o_tiny", "api.evaluate", "what was generated and judged so far is kept"),
        ("cache show_o_tiny", "precompute.cache_features", "complete shards of features are kept"),
        ("get weights show_o_512", "hub.downloads.get", "the files fetched so far are kept"),
        ("get suite geneval", "eval.suite_files.get", "the files fetched so far are kept"),
    ],
)
def test_ctrl_c_says_what_is_kept(command, function, kept, monkeypatch, capsys):
    """Nobody who reads "stopped" starts an evaluation of hours again to see where it begins."""

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"reca.{function}", stopped)
    assert main(command.split()) == 130
    assert capsys.readouterr().err.endswith(f"reca: stopped; {kept}, and the same command continues\n")
