"""`reca export --card` and `--push`: the card of a run, and its upload to a stand-in of the hub."""

import json
import os
import re
import shutil
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import HfApi, constants

import reca
from reca import catalog, cli
from reca.comparison import build
from reca.comparison.sides import find_sides
from reca.config.recipe_files import load_recipe
from reca.eval.errors import EvaluationError
from reca.eval.targets import describe, target
from reca.publishing import card, push
from tests.driver.hub_server import TOKEN, Hub, Repository, point_to, serve

KEYS = {
    "train.steps": 2, "train.threads": 1, "log.every": 1, "log.prompts": ["a red [circle]"], "log.sample_every": 1,
    "log.tensorboard": False, "data.workers": 0, "objective.reca.batch_size": 8, "objective.reca.micro_batch": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of OpenUni, evaluated as its base is."""
    folder = tmp_path_factory.mktemp("run") / "photos"
    reca.train(load_recipe("open_uni_tiny", {"run_dir": str(folder)} | KEYS))
    reca.evaluate("toy", folder, against="base", limit=2, sampling={"steps": 1})
    return folder


def metadata(folder):
    return next(yaml.safe_load_all((folder / "README.md").read_text()))


# ---- the card ----


def test_the_card_of_a_run(run, tmp_path, capsys):
    assert cli.main(["export", str(run), "--out", str(tmp_path / "out"), "--card"]) == 0
    printed = capsys.readouterr().out
    assert "README.md" in printed and "against the model before training: Understanding is bit-identical: " in printed
    text, found = (tmp_path / "out/README.md").read_text(), metadata(tmp_path / "out")
    results = json.loads((run / "eval/000002/toy/results.json").read_text())
    after, before = results["overall"]["value"], results["against"]["overall"]["value"]
    assert f"| {before * 100:.1f} % | {after * 100:.1f} % [" in text
    assert "after 2 steps" in text and "weight 1, 8 samples per step, 16 in total, from " in text
    assert "Understanding is bit-identical" in text and "open_uni.pth" in text
    assert "![Samples at step 2: a red (circle)](images/samples.png)" in text
    assert (tmp_path / "out/images/samples.png").read_bytes() == (run / "samples/000002.png").read_bytes()
    assert (run / "reconstructions.png").is_file() and os.listdir(tmp_path / "out/images") == ["samples.png"]
    assert "Reconstructions" not in text and "The model was trained from random weights. Set the licence" in text
    assert found["library_name"] == "reca" and "license" not in found and "base_model" not in found
    assert found["pipeline_tag"] == "any-to-any" and {"reca", "open_uni", "arxiv:2509.07295"} <= set(found["tags"])
    (metric,) = found["model-index"][0]["results"][0]["metrics"]
    assert metric["value"] == pytest.approx(100 * after) and len(metric["args"]["interval_95"]) == 2
    assert str(run) not in text and "toy_datasets" not in text  # nothing of the machine, no name of data


def test_the_run_goes_on_while_it_is_exported(run, tmp_path):
    """What is said of weights is said of the checkpoint that they are of."""
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    model = reca.load(copy)
    shutil.copytree(copy / "checkpoints/000002", copy / "checkpoints/000005")
    state = copy / "checkpoints/000005/state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"step": 5, "samples": {"reca": 40}}))
    shutil.copyfile(copy / "samples/000001.png", copy / "samples/000005.png")
    card.write(copy, reca.api.recipe_of(copy), model, False, tmp_path, "name")
    text = (tmp_path / "README.md").read_text()
    assert "after 2 steps" in text and "16 in total" in text and "Samples at step 2" in text
    assert "model-index" in metadata(tmp_path)  # the scores of step 2
    assert describe(model, target(copy, (), "toy", None))["step"] == 2


def test_a_run_whose_newest_checkpoint_is_damaged(run, tmp_path, capsys):
    """The one before it is exported, described and compared with the base model."""
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    shutil.copytree(copy / "checkpoints/000002", copy / "checkpoints/000005")
    for file in (copy / "checkpoints/000005/weights").iterdir():
        os.truncate(file, 100)
    assert cli.main(["export", str(copy), "--out", str(tmp_path / "out"), "--card"]) == 0
    assert "against the model before training: Understanding is bit-identical: " in capsys.readouterr().out
    assert "Understanding is bit-identical" in (tmp_path / "out/README.md").read_text()
    assert "model-index" in metadata(tmp_path / "out")


def test_results_of_other_weights_are_left_out(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    path = copy / "eval/000002/toy/results.json"
    found = json.loads(path.read_text())
    found["model"]["weights_sha256"] = "0" * 64
    path.write_text(json.dumps(found))
    assert cli.main(["export", str(copy), "--out", str(tmp_path / "out"), "--card"]) == 0
    text = (tmp_path / "out/README.md").read_text()
    assert "These weights have not been evaluated" in text and "are omitted: " in text
    assert "model-index" not in metadata(tmp_path / "out")


def test_a_score_is_of_the_weights_beside_it(run, tmp_path):
    """Whatever other evaluation of the same suite lies in the run, as that of its EMA."""
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    own = json.loads((copy / "eval/000002/toy/results.json").read_text())
    for name in ("a", "toy_ema"):
        other = own | {
            "overall": own["overall"] | {"value": 0.25},
            "model": own["model"] | {"weights_sha256": "0" * 64},
        }
        (copy / "eval/000002" / name).mkdir()
        (copy / "eval/000002" / name / "results.json").write_text(json.dumps(other))
    sides = find_sides("base", str(copy))
    (score,), _, left_out = card._scores(*sides, own["model"]["weights_sha256"])
    assert score["overall"] == own["overall"] and score["against"]["overall"] == own["against"]["overall"]
    assert left_out == [own["protocol"]]
    (score,), *_ = card._scores(*sides, "0" * 64)
    assert score["overall"]["value"] == 0.25


def test_a_change_that_is_not_of_training_alone(run, tmp_path):
    """The base was drawn with other sampling options than the run."""
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    path = copy / "eval/base/toy/results.json"
    found = json.loads(path.read_text())
    found["sampling"]["steps"] = 2
    path.write_text(json.dumps(found))
    weights = json.loads((run / "eval/000002/toy/results.json").read_text())["model"]["weights_sha256"]
    for source, said in ((run, False), (copy, True)):
        (score,), *_ = card._scores(*find_sides("base", str(source)), weights)
        assert card._row(score)["change"].endswith("], with different sampling") == said


def test_scores_of_other_prompts_are_shown_without_a_change(run, tmp_path, capsys):
    """Those of `reca eval --limit` with two numbers can have no prompt in common."""
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    path = copy / "eval/base/toy/results.json"
    found = json.loads(path.read_text())
    for row in found["items"]:
        row["item"] += "0"
    path.write_text(json.dumps(found))
    assert cli.main(["export", str(copy), "--out", str(tmp_path / "out"), "--card"]) == 0
    text = (tmp_path / "out/README.md").read_text()
    assert "other prompts, source images or questions, so these scores are not compared: toy dataset shapes.\n" in text
    assert re.search(r"\| toy dataset shapes \|  \| [\d.]+ % \[.*\] \|  \| 2 prompts", text) and str(copy) not in text
    assert cli.main(["compare", "base", str(copy), "--out", str(tmp_path / "page"), "--reconstructions", "0"]) == 0
    assert "eval/000002/toy is not compared, because " in capsys.readouterr().out
    with pytest.raises(EvaluationError, match="no results to compare: .*has no prompts of this evaluation"):
        build.compare(str(copy / "eval/base/toy"), str(copy / "eval/000002/toy"))


def test_keys_of_a_card_can_be_given_again():
    recipe = load_recipe("show_o_tiny", ["optim.max_grad_norm=null"])
    keys = card._keys(recipe)
    assert {"optim.max_grad_norm=null", "train.roles=[shared_lm, embed]", 'model.system_prompt=""'} <= set(keys)
    assert load_recipe("show_o_tiny", keys) == recipe


def test_a_judge_is_named_without_its_place():
    keys = ["eval.every=10", "eval.suite=wise", "eval.judge=endpoint:http://gpu17.corp:8000/v1"]
    keys += ["eval.judge_options=[model=/home/me/models/Qwen3-VL]", "eval.seed=3"]
    shown = [key for key in card._keys(load_recipe("show_o_tiny", keys)) if key.startswith("eval.")]
    assert shown == ["eval.every=10", "eval.seed=3", "eval.suite=wise"]
    score = {"protocol": "WISE", "overall": {"value": 0.5, "interval": [0.4, 0.6], "unit": "fraction"}}
    score |= {"counts": {"items": 3}, "images_per_item": 1, "against": None}
    for name, said in (
        ("local:/home/me/models/Qwen3-VL", "local:Qwen3-VL"),
        ("endpoint:models/Qwen3-VL/", "endpoint:Qwen3-VL"),
        ("owlv2:/home/me/owlv2+clip-vit-large-patch14", "owlv2:owlv2+clip-vit-large-patch14"),
        ("toy", "toy"),
    ):
        for exact, more in ((None, ""), (True, ""), (False, " (approximate)")):
            row = card._row(score | {"judge": {"name": name, "exact": exact}})
            assert row["measured"] == f"3 prompts x 1, judge {said}{more}"


def test_a_card_names_the_lora_that_was_merged():
    state = {"step": 3, "fingerprint": {}, "samples": {}}
    for rank, said in ((0, None), (8, "rank 8, merged into the weights")):
        assert card._training(state, load_recipe("show_o_tiny", [f"lora.rank={rank}"])).get("LoRA") == said


def test_a_card_that_somebody_wrote_stays(tmp_path):
    export = ["export", "show_o_tiny", "--out", str(tmp_path), "--card"]
    assert cli.main(export) == 0
    made = tmp_path / "README.md"
    assert "without post-training" in made.read_text() and "## Results" not in made.read_text()
    for again in (export, export[:-1]):  # without --card, the card would be that of the export before
        made.write_text(made.read_text() + "more\n")
        assert cli.main(again) == 0 and "more" not in made.read_text()
    made.write_text("my own\n")
    assert cli.main(export) == 0 and made.read_text() == "my own\n"


def test_base_model_and_terms(tmp_path):
    def base(umm, source):
        return card.base_model(load_recipe(umm, {"model.weights": str(source)}))

    assert base("harmon_1_5b", "wusize/harmon/harmon_1.5b.pth") == ("wusize/harmon", "harmon_1.5b.pth")
    (tmp_path / "harmon").mkdir()
    (tmp_path / "harmon/a.pth").touch()
    assert base("harmon_1_5b", tmp_path / "harmon/a.pth") == ("wusize/harmon", "a.pth")
    (tmp_path / "BAGEL-7B-MoT").mkdir()
    assert base("bagel_7b", tmp_path / "BAGEL-7B-MoT") == ("ByteDance-Seed/BAGEL-7B-MoT", "")
    assert base("bagel_7b", tmp_path) is None and card.base_model(load_recipe("bagel_tiny")) is None
    recipe = load_recipe("harmon_1_5b")
    header = card._metadata("x", recipe, card.base_model(recipe), []).to_dict()
    assert header["license"] == "other" and header["license_name"] == "s-lab-license-1.0"
    assert header["base_model"] == "wusize/harmon"
    assert all(catalog.hub_licence(facts.licence) for facts in catalog.WEIGHTS.values() if facts.licence)


# ---- the upload ----


@pytest.fixture
def hub(monkeypatch, tmp_path):
    hub = Hub({})
    server, address = serve(hub)
    point_to(monkeypatch, address, tmp_path / "cache")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the stand-in has the LFS protocol
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def upload(tmp_path, capfd):
    """`reca export --push`: its exit code and all it printed. The token is in none of it."""

    def call(*more, repository="me/model"):
        code = cli.main(["export", "show_o_tiny", "--out", str(tmp_path / "out"), "--push", repository, *more])
        printed = "".join(capfd.readouterr())
        assert TOKEN not in printed
        return code, printed

    return call


def exported(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_export_arrives(hub, upload, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")  # no file of the export
    code, printed = upload()
    assert code == 0 and re.search(
        r"MiB in \d+ files to me/model, which will be created as private; .* MiB to upload", printed
    )
    assert re.search(r"^http://127.0.0.1:\d+/me/model$", printed, re.MULTILINE)
    there = hub.repositories["models/me/model"]
    mine = {name: content for name, content in exported(tmp_path / "out").items() if name != "notes.txt"}
    assert there.files == mine | {".gitattributes": b""} and there.private
    assert mine.keys() > {"README.md", "config.json", "pytorch_model.safetensors"}
    taken = hub.taken
    code, printed = upload()
    assert code == 0 and "which exists; 0 bytes to upload" in printed and hub.taken == taken


# ---- hf_xet, which huggingface_hub takes wherever it is installed ----


@pytest.fixture
def by_xet(hub, monkeypatch):
    """Let huggingface_hub take hf_xet, of whose store there is no stand-in: what it does is `by_xet.upload`."""
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.xet_status, by_lfs = 200, HfApi.upload_folder
    found = SimpleNamespace(calls=0, upload=by_lfs)

    def upload_folder(api, **given):
        if constants.HF_HUB_DISABLE_XET:
            return by_lfs(api, **given)
        found.calls += 1
        return found.upload(api, **given)

    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return found


def test_a_hub_without_xet_is_uploaded_to_by_lfs(hub, upload, by_xet):
    hub.xet_status = 404
    code, printed = upload()
    assert code == 0 and by_xet.calls == 0 and hub.taken > 0 and "hf_xet" not in printed
    assert [path for path in hub.paths() if "xet" in path] == ["api/models/me/model/xet-write-token/main"]
    assert "pytorch_model.safetensors" in hub.repositories["models/me/model"].files
    assert not constants.HF_HUB_DISABLE_XET


def test_a_hub_with_xet_is_uploaded_to_by_hf_xet(hub, upload, by_xet, tmp_path):
    def store(api, **_):
        hub.repositories["models/me/model"].files |= exported(tmp_path / "out")

    by_xet.upload = store
    assert upload()[0] == 0 and by_xet.calls == 1 and hub.taken == 0


def test_a_store_of_xet_that_cannot_be_reached(hub, upload, by_xet):
    def unreachable(api, **_):
        raise ConnectionError(f"error sending request, token {TOKEN}")

    by_xet.upload = unreachable
    code, printed = upload()
    assert code == 0 and "hf_xet failed (ConnectionError); uploading by LFS" in printed and hub.taken > 0


def test_what_a_hub_with_xet_refuses_is_not_tried_by_lfs(hub, upload, by_xet):
    def refused(api, **_):
        response = SimpleNamespace(status_code=403)
        raise type("Refused", (OSError,), {"response": response})(TOKEN)

    by_xet.upload = refused
    code, printed = upload()
    assert code == 4 and "the token has no write access" in printed and "by LFS" not in printed and hub.taken == 0


def test_public_and_update(hub, upload):
    assert upload("--public")[0] == 0 and not hub.repositories["models/me/model"].private
    hub.repositories["models/me/model"].files["config.json"] = b"{}"
    code, printed = upload()
    assert code == 4 and "already has other files (config.json); pass --update" in printed
    assert hub.repositories["models/me/model"].files["config.json"] == b"{}"
    assert upload("--update")[0] == 0 and hub.repositories["models/me/model"].files["config.json"] != b"{}"


def test_a_repository_of_something_else(hub, upload):
    hub.repositories["models/me/model"] = Repository({f"{i}.gguf": b"x" for i in range(5)})
    code, printed = upload()
    assert code == 4 and "(0.gguf, 1.gguf, 2.gguf and 2 more)" in printed and hub.taken == 0
    assert upload("--update")[0] == 0 and hub.repositories["models/me/model"].files["0.gguf"] == b"x"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token": None}, "there is no token; run `hf auth login`, or set HF_TOKEN"),
        ({"token": "hf_other"}, "the token is invalid"),
        ({"role": "read"}, "the token 'laptop' is read-only"),
        ({"user": "you"}, "you can write to you, group, not me"),
        ({"address": "http://127.0.0.1:9"}, "the hub cannot be reached (ConnectError)"),
        ({"offline": True}, "the hub is disabled (HF_HUB_OFFLINE)"),
    ],
)
def test_what_is_wrong_is_found_before_weights_are_read(hub, upload, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr("reca.commands.inference._model", lambda options: pytest.fail("weights were read"))
    if "token" in change:
        monkeypatch.delenv("HF_TOKEN")
        if change["token"]:
            monkeypatch.setenv("HF_TOKEN", change["token"])
    hub.role, hub.user = change.get("role", hub.role), change.get("user", hub.user)
    if "address" in change:
        point_to(monkeypatch, change["address"], tmp_path / "cache")
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    if "offline" in change:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, printed = upload()
    assert code == 4 and message in printed and "me/model" in printed


@pytest.mark.parametrize("name", ["model", "me/", "/model", "me/a/b", "me/a model"])
def test_names_that_are_none(upload, name):
    code, printed = upload(repository=name)
    assert code == 4 and "pass OWNER/NAME" in printed


def test_options_without_push(tmp_path, capsys):
    assert cli.main(["export", "show_o_tiny", "--out", str(tmp_path), "--public"]) == 3
    assert "need --push" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["repos/create", "preupload", "objects/batch", "/commit/"])
def test_a_token_that_may_not_write_there(hub, upload, tmp_path, part):
    hub.forbids = part
    code, printed = upload()
    assert (
        code == 4 and "the token has no write access" in printed and f"`hf upload me/model {tmp_path}/out`" in printed
    )
    hub.forbids = ""
    assert upload()[0] == 0 and "README.md" in hub.repositories["models/me/model"].files


def test_an_upload_that_breaks_off_goes_on(hub, upload, tmp_path):
    """Every try of one large file ends half way: the command fails, and the next one uploads the rest alone."""
    hub.drops = 10**6
    code, printed = upload()
    assert code == 4 and "the hub cannot be reached" in printed and "repeat the command to continue" in printed
    kept = exported(tmp_path / "out")
    assert hub.repositories["models/me/model"].files == {".gitattributes": b""}  # no half commit
    hub.drops, hub.forbids = 0, "/commit/"
    assert upload()[0] == 4  # the large files have arrived
    hub.forbids, hub.taken = "", 0
    assert upload()[0] == 0 and hub.taken == 0
    assert kept.items() <= hub.repositories["models/me/model"].files.items()


def test_a_header_that_the_hub_refuses(hub, upload, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/README.md").write_text("---\nlicense: mine\n---\n")
    hub.faults = ['"license" must be one of a list']
    code, printed = upload()
    assert code == 4 and 'README.md: Invalid metadata in README.md. - "license" must be one of' in printed
    assert "models/me/model" in hub.repositories and hub.taken == 0


def test_a_hub_that_lost_a_file(hub, upload, monkeypatch):
    monkeypatch.setattr(push, "_contents", lambda api, repository: None)
    code, printed = upload()
    assert code == 4 and "me/model lacks README.md, " in printed


def test_a_hub_that_has_another_file_under_the_name(hub, upload, monkeypatch):
    contents = push._contents

    def damaged(api, repository):
        there = contents(api, repository)
        return there and there | {"README.md": "0" * 64}

    monkeypatch.setattr(push, "_contents", damaged)
    code, printed = upload()
    assert code == 4 and "me/model lacks README.md after the upload" in printed
