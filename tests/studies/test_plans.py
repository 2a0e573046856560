"""Studies that are planned: those of the catalogue, what a file may say, and what is refused before anything runs."""

import errno
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

from reca import exits
from reca.cli import main
from reca.config.recipe_files import load_recipe
from reca.estimate.meta_model import build_meta
from reca.models import UMMS, umm_package
from reca.optim.trained import freeze
from reca.options.fields import RecipeError
from reca.studies import toy
from reca.studies.check import check
from reca.studies.plan import plan
from reca.studies.study import Claim, StudyError, load_study, study_names
from reca.studies.task import Asked
from tests.studies.conftest import SCALE

PUBLISHED = ("show_o_512", "harmon_1_5b", "open_uni_l_512", "bagel_7b", "janus_pro_1b", "janusflow_1_3b")
CLAIM = "says: x, measure: y, variant: a, than: before"


@pytest.mark.parametrize("name", study_names())
def test_every_study_can_be_planned(name, tmp_path):
    study = load_study(name)
    assert study.paper and study.variants and study.claims
    planned = {}
    for umm in UMMS:
        asked = Asked(umm, (3,), tmp_path, dataset=study.datasets[0] if study.datasets else "shapes")
        if not study.umms or umm in study.umms:
            planned[umm] = plan(study, asked)[0]
        else:
            with pytest.raises(StudyError, match="does not support"):
                plan(study, asked)
    assert "show_o" in planned
    for tasks in planned.values():
        assert {name for task in tasks for name in task.after} <= {task.name for task in tasks}
        assert all("seed=3" in " ".join(task.overrides) for task in tasks if task.kind != "pretrained")
    for recipe in ("show_o_512", "bagel_7b"):
        umm = load_recipe(recipe).umm
        if not study.umms or umm in study.umms:
            assert plan(study, Asked(umm, (0,), tmp_path, recipe))[0]


def test_a_key_of_the_pretrained_model_holds_for_pre_training_and_all_variants(tmp_path):
    """Another image tokenizer is another model, whose pre-training is not shared with that of the usual one."""
    asked, key = {"umm": "show_o", "seeds": (0,), "out": tmp_path}, "model.patches.entries=99"
    usual = {task.name: task for task in plan(load_study("encoder"), Asked(**asked))[0]}
    tasks, _ = plan(load_study("encoder"), Asked(**asked, of_variant={"pretrained": (key,)}))
    assert {task.folder for task in tasks}.isdisjoint(task.folder for task in usual.values())
    for task in tasks:
        made = load_recipe(task.recipe, task.of_pretraining if task.kind == "pretrained" else task.overrides)
        assert made.model.patches.entries == 99, task.name
        assert usual[task.name].of_pretraining == ()
    with pytest.raises(StudyError, match="'pretrained' is no variant"):
        plan(load_study("main"), Asked(**asked, recipe="show_o_512", of_variant={"pretrained": (key,)}))


def test_tasks_wait_for_what_they_start_from_and_for_others_in_their_folder(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "question: a\nvariants: {a: {about: b}, same: {about: b}, other: {about: c, overrides: [optim.lr=1]},\n"
        "  then: {about: d, after: a}, swapped: {about: e, pretrained: red_is_blue}}"
    )
    tasks = {task.variant: task for task in plan(load_study(str(path)), Asked("show_o", (3,), tmp_path))[0][1:]}
    after = {name: task.after for name, task in tasks.items()}
    first, swapped = "3/pretrained", "3/pretrained-red_is_blue"
    assert after == {
        "pretrained-red_is_blue": (first,), "a": (first,), "same": (first, "3/a"), "other": (first,), "then": ("3/a",),
        "swapped": (swapped,), "before": (first,),
    }  # fmt: skip
    assert tasks["same"].folder == tasks["a"].folder != tasks["other"].folder
    assert str(tasks["pretrained-red_is_blue"].folder) in " ".join(tasks["swapped"].overrides)


def test_a_folder_of_studies_that_is_moved_holds_the_same_tasks(tmp_path):
    def found(out):
        tasks = plan(load_study("limits"), Asked("open_uni", (0,), out, dataset="emoji"))[0]
        return [task.result.relative_to(out) for task in tasks]

    assert found(tmp_path / "a") == found(tmp_path / "b")


def test_datasets_share_no_variant_whatever_data_is_given(tmp_path):
    """Their pre-trained models and prompts differ, though recipe and data be the same."""
    data = ("data.images=/a", "data.conversations=/b.json", "data.captions=/c")
    datasets = [Asked("show_o", (0,), tmp_path, dataset=name, common=data) for name in ("shapes", "jitter")]
    first, second = ({task.folder for task in plan(load_study("encoder"), asked)[0]} for asked in datasets)
    assert not first & second


@pytest.mark.parametrize("umm", load_study("encoder").umms)
def test_a_swapped_encoder_takes_red_for_blue(umm):
    """It reads an image whose channels changed places nearly as the other read the image; means differ by channel."""
    model = umm_package(umm).Adapter.load(load_recipe(f"{umm}_tiny").model).eval()
    roles, read = model.roles(), []
    for name, layer in model.named_modules():
        if roles.get(f"{name}.weight") == "und_encoder" and isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            layer.register_forward_hook(lambda _layer, _given, output: read.append(output))
            break  # the first layer
    image = torch.randint(0, 256, (3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    model.answer([image], ["what is this"], max_new_tokens=1)
    model.answer([image.flip(0)], ["what is this"], max_new_tokens=1)
    toy.swap_red_and_blue(model)
    model.answer([image.flip(0)], ["what is this"], max_new_tokens=1)
    right, other, swapped = read
    assert (swapped - right).norm() < 0.3 * (other - right).norm()


@pytest.mark.parametrize(
    "text, said",
    [
        ("variants: {}", "variants must map names"),
        ("- 1", "has no keys"),
        ("question: a\npaper: []\nvariants: {a: {}}", "about is missing"),
        ("question: a\nvariants: {a: {about: b, steps: 3}}", "unknown key steps"),
        ("question: a\nvariants: {a: captions}", "variants.a: expected a mapping"),
        ("question: a\nvariants: {a: {about: b, after: c}}", "must be a variant listed before it"),
        ("question: a\nvariants: {a: {about: b, longer: 0.5}}", "variants.a: expected a whole number"),
        ("question: a\nvariants: {a: {about: b, longer: 0}}", "longer=0 of a must be at least 1"),
        ("question: a\nvariants: {a: {about: b, rate: 0}}", "rate=0 of a must be above 0"),
        ("question: a\nvariants: {a: {about: b, rate: half}}", "variants.a: expected a number"),
        ("question: a\nvariants: {a: {about: b, rate: .nan}}", "variants.a: expected a finite number"),
        ("question: a\nvariants: {a: {about: b}, c: {about: d}, a: {about: e}}", "duplicate key 'a'"),
        ("question: a\nvariants: {a: {about: b, overrides: train.steps=3}}", "variants.a: expected a list"),
        ("question: a\nvariants: {a: {about: b, toy: {bagel: train.steps=3}}}", "toy.bagel='train.steps=3'"),
        (
            "question: a\nvariants: {a: {about: b}}\nclaims: [{says: x, measure: y, variant: a, than: a, margin: two}]",
            "margin='two'",
        ),
        ("question: a\nvariants: {a b: {about: b}}", "letters, digits"),
        ("question: a\nvariants: {pretrained: {about: b}}", "'pretrained' is reserved"),
        (
            "question: a\nvariants: {a: {about: b}}\nclaims: [{says: x, measure: y, variant: a, than: z}]",
            "names z, which",
        ),
        (
            "question: a\nvariants: {a: {about: b}}\nclaims: [{says: x, measure: y, variant: a, than: a, expect: x}]",
            "expect",
        ),
        ("question: a\nvariants: {a: {about: b}}\nclaims: {says: x}", "claims must be a list"),
        ("question: a\nvariants: {a: {about: b}}\nclaims: [{says: x, measure: y, variant: a, than: a}]", "with itself"),
        (f"question: a\nvariants: {{a: {{about: b}}}}\nclaims: [{{{CLAIM}, expect: equal, margin: -1}}]", "at least 0"),
        (f"question: a\nvariants: {{a: {{about: b}}}}\nclaims: [{{{CLAIM}, margin: 5}}]", "is for expect: equal"),
        (
            "question: a\nvariants: {a: {about: b}}\nclaims: [{says: x, measure: {toys: y}, variant: a, than: before}]",
            "claims[0].measure names 'toys', which is not one of toy, published",
        ),
        ("question: a\nvariants: {a: {about: b, toy: {shapez: []}}}", "variants.a.toy names 'shapez', which is not"),
        ("question: a\nvariants: {a: {about: b, published: {showo: []}}}", "variants.a.published names 'showo'"),
        ("question: a\nvariants: {a: {about: b}}\numms: [showo]", "umms names 'showo', which is not one of bagel"),
        ("question: a\nvariants: {a: {about: b}}\ndatasets: [shape]", "datasets names 'shape', which is not one of"),
        ("question: a\nvariants: {a: {about: b}}\nname: ../b", "the study name '../b', which names its folder, must"),
        ("question: [", "is not YAML"),
    ],
)
def test_a_study_that_is_none_is_refused(text, said, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(StudyError, match=re.escape(said)):
        load_study(str(path))


@pytest.mark.parametrize(
    "measure, recipe, said",
    [
        ("hold-out", None, "the measure 'hold-out' of 'x' does not exist; there are toy: overall, seen, held-out"),
        ("{toy: held_out}", "show_o_tiny", "the measure 'held_out' of 'x' does not exist; there are toy: overall"),
        ("{toy: seen, published: genevl/counting}", None, "'genevl' of 'x' does not exist; there are published: toy"),
        ("held-out", None, None),
        ("geneval/counting", None, None),
        ("{published: 'toy?dataset=emoji', toy: loss}", None, None),
    ],
)
def test_a_measure_that_no_variant_has_is_refused(measure, recipe, said, tmp_path):
    path = tmp_path / "a.yaml"
    claim = f"{{says: x, measure: {measure}, variant: a, than: before}}"
    path.write_text(f"question: a\nvariants: {{a: {{about: b}}}}\nclaims: [{claim}]")
    asked = Asked("show_o", (0,), tmp_path, recipe)
    if said is None:
        plan(load_study(str(path)), asked)
        return
    with pytest.raises(StudyError, match=re.escape(said)):
        plan(load_study(str(path)), asked)


@pytest.mark.parametrize(
    "override, said",
    [
        ("train.stps=4", "variant a: unknown key 'train.stps' in the overrides; did you mean train.steps?"),
        (
            "data.images={unlabelled}&size=9",
            "variant a: data.images={unlabelled}&size=9: there is no {unlabelled}; the",
        ),
        ("run_dir=b", "run_dir=b in a: a study sets run_dir itself; --out names"),
        ("train.seed=3", "train.seed=3 in a: a study sets train.seed itself; --seeds names"),
    ],
)
def test_an_override_that_a_study_cannot_use_is_refused_with_its_variant(override, said, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(f'question: a\nvariants: {{a: {{about: b, overrides: ["{override}"]}}}}')
    with pytest.raises(ValueError, match=re.escape(said)):
        plan(load_study(str(path)), Asked("show_o", (0,), tmp_path))


def test_a_study_file_that_cannot_be_read_is_not_called_missing(tmp_path, monkeypatch):
    path = tmp_path / "a.yaml"
    with pytest.raises(StudyError, match=r"no study '.*a.yaml': give a .yaml file, or one of blur"):
        load_study(str(path))

    def refused(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(StudyError, match=r"study .*a.yaml cannot be read \(Permission denied\)"):
        load_study(str(path))


def test_names_of_variants_are_texts_however_they_look(tmp_path):
    """YAML takes 64 for a number and no for false."""
    path = tmp_path / "a.yaml"
    claim = "{says: x, measure: y, variant: 64, than: no, expect: equal, margin: 1}"
    path.write_text(
        f"question: a\nvariants: {{64: {{about: b}}, no: {{about: c, after: 64}}}}\nclaims: [{claim}]\npaper:"
    )
    study = load_study(str(path))
    assert [(variant.name, variant.after) for variant in study.variants] == [("64", None), ("no", "64")]
    assert study.claims == (Claim("x", "y", "64", "no", "equal", 1.0),)


def test_a_variant_takes_a_group_of_keys_in_braces(tmp_path):
    path = tmp_path / "a.yaml"
    keys = 'overrides: ["model.patches={size: 4, entries: 99}"], toy: ["data.captions={unlabeled}&size=9"]'
    path.write_text(f"question: a\nvariants: {{a: {{about: b, {keys}}}}}")
    (task,) = (t for t in plan(load_study(str(path)), Asked("show_o", (3,), tmp_path))[0] if t.variant == "a")
    recipe = load_recipe(task.recipe, task.overrides)
    assert recipe.model.patches.entries == 99
    assert recipe.data.captions == "reca.toy_datasets.shapes:unlabeled?seed=3&size=9"


@pytest.mark.parametrize(("pretrained", "recipe"), [("blue_is_red", None), ("red_is_blue", "show_o_tiny")])
def test_a_modification_that_is_not_there_is_refused(pretrained, recipe, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(f"question: a\nvariants: {{a: {{about: b, pretrained: {pretrained}}}}}")
    with pytest.raises(
        StudyError, match=f"pretrained={pretrained} of a: only red_is_blue exists, and only on toy datasets"
    ):
        plan(load_study(str(path)), Asked("show_o", (0,), tmp_path, recipe=recipe))


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["encodr"], "no study 'encodr': did you mean encoder? Give a .yaml file, or one of blur"),
        (["nothing"], "no study 'nothing': give a .yaml file, or one of blur"),
        (["main", "--recipe", "show_o_512"], "--recipe needs --suite"),
        (["main", "--suite", "geneval"], "are for --recipe"),
        (["main", "--recipe", "show_o_512", "--suite", "geneval", "--data", "x"], "--data 'x' must be SUITE=..."),
        (["main", "--recipe", "show_o_512", "--suite", "geneval"], "name the suite: --judge geneval=..."),
        (["main", "--recipe", "show_o_512", "--suite", "gedit", "--judge", "gedit=local:x"], "gedit needs a model"),
        (["main", "--recipe", "show_o_512", "--suite", "toy", "--limit", "0"], "limit must be at least 1, got 0"),
        (["main", "--recipe", "show_o_512", "--suite", "toy", "--sampling", "stepz=1"], "no sampling option 'stepz'"),
        (["main", "--limit", "0"], "are for --recipe"),
        (["main", "--sampling", "steps=3"], "are for --recipe"),
        (["main", "--scale", "3"], "--scale must lie in (0, 1]"),
        (["main", "RECO:optim.lr=1"], "'RECO' is no variant of main with show_o; there are RECA"),
        (["main", "train.seed=1"], "train.seed=1 in the overrides: a study sets train.seed itself"),
        (["main", "RECA:run_dir=a"], "run_dir=a in the overrides: a study sets run_dir itself"),
        (["main", "RECA:steps=3"], "variant RECA: unknown key 'steps' in the overrides"),
        (["main", "--jobs", "0"], "--jobs must be at least 1"),
        (["main", "--task", "7/RECA"], "no task 7/RECA; --task is SEED/VARIANT of seed 0 and pretrained, RECA, before"),
        (["main", "--seeds", "3,5,", "--task", "4/RECA"], "SEED/VARIANT of seeds 3, 5 and pretrained, RECA, before"),
        (["main", "--seeds", "5,", "--task", "4/RECA"], "SEED/VARIANT of seed 5 and pretrained, RECA, before"),
        (["main", "--images-per-prompt", "0"], "--images-per-prompt must be at least 1"),
        (
            ["main", "--recipe", "x", "--suite", "geneval", "--images-per-prompt", "2"],
            "--images-per-prompt is for toy datasets",
        ),
        (["blur", "--umm", "bagel"], "the study blur does not support bagel, only show_o"),
        (["limits"], "the toy dataset 'shapes': choose --dataset emoji|emoji-places|emoji-varied"),
        (["main", "--dataset", "sea"], "there is no toy dataset 'sea'"),
        (["main", "--dataset", "emoji", "--umm", "bagel"], "there is no demo of 'bagel' on the toy dataset 'emoji'"),
    ],
)
def test_what_cannot_be_run_is_said(arguments, said, tmp_path, capsys):
    assert main(["study", *arguments, "--out", str(tmp_path)]) in (exits.RECIPE, exits.DATA)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "override, said",
    [
        ('SFT:train.frozen=["*nothing*"]', "variant SFT: train.frozen: no parameter matches '*nothing*'"),
        ('SFT-RECA:train.roles=["lora"]', "variant SFT-RECA: train.roles names 'lora', which is not a role"),
        ("RECA:objective.srum.weight=1", "variant RECA: show_o has no srum loss"),
        ("RECA:lora.rank=2 lora.targets=[nothing]", "variant RECA: lora.targets: no trained linear layer matches"),
        (
            "SFT:optim.fused_backward=true SFT:optim.max_grad_norm=null SFT:objective.t2i.micro_batch=1",
            "variant SFT: optim.fused_backward=true needs one backward pass per step",
        ),
        ("SFT:train.activation_checkpointing=99", "variant SFT: train.activation_checkpointing=99 recomputes"),
        ("SFT:data.template_count=1000", "variant SFT: data.template_count=1000, but there are 8 templates"),
        ("SFT:eval.every=1 SFT:eval.suite=nothing", "variant SFT: eval.suite='nothing'"),
        ("SFT:model.image_size=33", "variant SFT: model.image_size is 33 pixels"),
        (
            "RECA:model.patches.entries=99",
            "variant RECA: codec.codebook has the shape (99, 48), but (145, 48) in the pre-trained model",
        ),
        (
            "before:model.patches.entries=99",
            "variant before: codec.codebook has the shape (99, 48), but (145, 48) in the pre-trained model",
        ),
        ("--slurm SFT:train.frozen=[nothing]", "variant SFT: train.frozen: no parameter matches 'nothing'"),
        ("SFT:data.captions=nowhere/*.tar", "variant SFT: "),
        ("RECA:train.init_from=nowhere", "variant RECA: train.init_from=nowhere is not a run folder"),
    ],
)
def test_a_recipe_that_a_variant_cannot_run_is_refused_before_anything_runs(
    override, said, study, tmp_path, in_this_process, capsys
):
    out = tmp_path / "out"
    assert main(["study", study, "--out", str(out), *SCALE, *override.split(" ")]) in (exits.RECIPE, exits.DATA)
    assert said in capsys.readouterr().err
    assert in_this_process == [] and list(out.iterdir()) == []


@pytest.mark.parametrize("umm", UMMS)
def test_the_variants_of_the_catalogue_can_run(umm, tmp_path):
    check(plan(load_study("main"), Asked(umm, (0,), tmp_path))[0], here=True)


def test_variants_of_missing_parents_are_refused(study, tmp_path):
    asked = Asked("show_o", (0,), tmp_path, "show_o_tiny", of_variant={"SFT": (f"model.weights={tmp_path}/none",)})
    with pytest.raises(RecipeError, match=r"variant SFT: model.weights=.*none does not exist"):
        check(plan(load_study(study), asked)[0], here=True)


@pytest.mark.parametrize("recipe", [*(f"{umm}_tiny" for umm in UMMS), "show_o_emoji_tiny", *PUBLISHED])
def test_whatever_a_variant_freezes_would_be_trained_without_it(recipe, tmp_path):
    """A pattern of frozen parameters alone changes nothing, so that the variant would be RECA under another name."""
    umm = load_recipe(recipe).umm
    dataset = "emoji" if "emoji" in recipe else "shapes"
    asked = Asked(umm, (0,), tmp_path, recipe if recipe in PUBLISHED else None, dataset)
    studies = [study for study in map(load_study, study_names()) if not study.umms or umm in study.umms]
    if asked.recipe is None:
        studies = [study for study in studies if not study.datasets or dataset in study.datasets]
    variants = [keys for study in studies for _, keys in study.of(asked)[0].values()]
    frozen = {
        tuple(key for key in keys if key.startswith("train.")) for keys in variants if "train.frozen" in str(keys)
    }
    assert frozen
    model = build_meta(load_recipe(recipe))[0]
    for keys in frozen:
        made = load_recipe(recipe, keys)
        freeze(model, made.train.roles)
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        for pattern in made.train.frozen:
            assert any(fnmatch(name, pattern) for name in trained), pattern
