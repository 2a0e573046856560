"""Values of recipes: what a text means is decided by the type of its key, never by how the text looks."""

import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from reca.config.recipe_files import absolute_paths, explain, load_recipe, recipe_names, save_recipe
from reca.options.fields import RecipeError
from reca.options.values import SWITCHES, override_text

# Texts that YAML, OmegaConf or Python would take for something else.
TEXTS = [
    *"0010 no on off yes true 12:30 1:02:03 1e3 1e5 1.10 007 0x1f 0o17 1_000 .inf nan none nil Nothing *.tar &a !x a=b "
    "{000..003}.tar {a [a a] a,b a: ?a -a -5 --a @a `a %a |a >a a:b 2024-01-01 ??? \\n y n << = # #1 é 写 😀".split(),
    "/photos #1",
    "a: b",
    "it's",
    'say "so"',
    "'tis",
    " a ",
    "a\tb",
    "a\nb",
    "\ufeffa",
    "\x85",
    "\u2028",
    "[a, b]x",
    "~a b",
]
# The same, were it not that a path may not begin with the home of nobody, nor name a variable.
WORDS = [*TEXTS, "~x", "$HOME/x", "${umm}", "${oc.env:HOME}", "\\${a}", "a${b", "''"]


def show_o(*overrides):
    return load_recipe("show_o_tiny", list(overrides))


def in_file(tmp_path, text, *overrides):
    path = tmp_path / "r.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_recipe(path, list(overrides))


@pytest.mark.parametrize("text", [text for text in TEXTS if not text.startswith("~") and text not in SWITCHES])
def test_a_path_takes_the_text_as_it_is(text):
    assert show_o(f"run_dir={text}").run_dir == text
    assert show_o(f"data.images={text}").data.images == text


@pytest.mark.parametrize("word", ["false", "No", "off", "none", "true", "YES", "on", "0", "1"])
def test_a_switch_is_no_path_and_no_optional_text(word, tmp_path):
    """data.cache=false would cache in a folder of that name. In quotes, and from a string of Python, it is a name."""
    for key in ("data.cache", "data.images", "model.weights", "eval.judge", "log.wandb", "data.columns.image"):
        with pytest.raises(RecipeError, match=f"{key}={word} in the overrides: expected a .*; write null for none, or"):
            show_o(f"{key}={word}")
        by_key = "{".join(f"{part}: " for part in key.split(".")) + word + "}" * key.count(".")
        with pytest.raises(RecipeError, match=f"{key}={word} in .*r.yaml: expected a"):
            in_file(tmp_path, by_key)
    with pytest.raises(RecipeError, match="data.cache=false in the overrides: expected a path"):
        load_recipe("show_o_tiny", {"data": {"cache": False}})
    if not word.isdigit():
        with pytest.raises(RecipeError, match=f"run_dir={word} in the overrides: expected a path; write '\"{word}\"'"):
            show_o(f"run_dir={word}")
    for given in ([f"data.cache='{word}'", f'run_dir="{word}"'], {"data.cache": word, "run_dir": Path(word)}):
        recipe = load_recipe("show_o_tiny", given)
        assert (recipe.data.cache, recipe.run_dir) == (word, word)
    save_recipe(recipe, tmp_path / "r.yaml")
    assert load_recipe(tmp_path / "r.yaml").data.cache == word


def test_a_run_folder_may_be_a_number():
    assert show_o("run_dir=1").run_dir == "1"


@pytest.mark.parametrize("text", WORDS[:-1])
def test_a_sentence_takes_the_text_as_it_is(text):
    assert show_o(f"model.system_prompt={text}").model.system_prompt == text


@pytest.mark.parametrize("text", [t for t in WORDS[:-1] if "," not in t and t == t.strip() and "\n" not in t])
def test_an_item_of_a_list_takes_the_text_as_it_is(text):
    assert show_o(f"log.prompts=[a cat, {text}]").log.prompts == ["a cat", text]


def test_numbers_of_numpy_and_paths_are_values_of_overrides():
    given = {
        "optim.lr": np.float64(1e-7),
        "optim.betas": [np.float32(0.5), np.float64(0.25)],
        "train.steps": np.int64(3),
        "train.deterministic": np.bool_(True),
        "run_dir": Path("a"),
        "data.images": [Path("a.tar"), {"source": Path("b"), "weight": np.float32(2)}],
        "data.captions": [Path("a.tar")],
    }
    recipe = load_recipe("show_o_tiny", given)
    assert (recipe.optim.lr, recipe.optim.betas, recipe.train.steps) == (1e-7, [0.5, 0.25], 3)
    assert recipe.train.deterministic is True and recipe.run_dir == "a"
    assert recipe.data.images == [{"source": "a.tar", "weight": 1.0}, {"source": "b", "weight": 2.0}]
    assert recipe.data.captions == [{"source": "a.tar", "weight": 1.0}]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ('"10:13"', "10:13"),
        ("'it''s'", "it's"),
        (r'"a\nb\u00e9\x41\U0001F600\"\\"', 'a\nbéA😀"\\'),
        ('"null"', "null"),
        ("''", ""),
        ('"a" and "b"', '"a" and "b"'),
        ('"', '"'),
    ],
)
def test_quotes_around_all_of_a_text_are_taken_off(written, meant):
    assert show_o(f"model.system_prompt={written}").model.system_prompt == meant


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("[]", []),
        ("[a,b , c]", ["a", "b", "c"]),
        ("[a,]", ["a"]),
        ("['a, b', \"c\\n\", d]", ["a, b", "c\n", "d"]),
        ("[*embed*, #1, 12:30, {a]", ["*embed*", "#1", "12:30", "{a"]),
    ],
)
def test_lists_of_the_command_line(written, meant):
    assert show_o(f"train.frozen={written}").train.frozen == meant


@pytest.mark.parametrize("word", ["null", "Null", "NULL", "None", "~"])
def test_null_is_null_everywhere(word, tmp_path):
    recipe = show_o(f"data.cache={word}", f"optim.max_grad_norm={word}", f"train.threads={word}", f"train.roles={word}")
    assert (recipe.data.cache, recipe.optim.max_grad_norm, recipe.train.threads, recipe.train.roles) == (None,) * 4
    assert show_o(f"model.prompt_gradient={word}", f"model.hv_source={word}").model.hv_source is None
    assert in_file(tmp_path, f"optim: {{max_grad_norm: {word}}}").optim.max_grad_norm is None
    assert in_file(tmp_path, f'model: {{system_prompt: "{word}"}}').model.system_prompt == word
    for key in ("run_dir", "train.steps", "optim.lr", "train.frozen", "train.deterministic", "model.system_prompt"):
        with pytest.raises(RecipeError, match=f"{key} in the overrides cannot be null"):
            show_o(f"{key}={word}")
    with pytest.raises(RecipeError, match="train.frozen\\[1\\] in the overrides cannot be null"):
        show_o(f"train.frozen=[a, {word}]")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.images", [["a"]]), ("data.images", [("a",)]), ("data.images", {"a"}),
        ("data.images", [{"source": ["a"]}]), ("train.roles", [{"a": {}}]), ("run_dir", b"a"),
        ("train.frozen", np.array(["a"])),
    ],
)  # fmt: skip
def test_lists_in_lists_are_no_texts(key, value):
    with pytest.raises(RecipeError, match=rf"{key}=.* in the overrides has .* where a text or a number is expected"):
        load_recipe("show_o_tiny", {key: value})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.system_prompt=", "has no value; write model.system_prompt='\"\"' for an empty text"),
        ("run_dir=", "run_dir= has no value; write one after the =$"),
        ("data.cache= ", "data.cache= has no value; write data.cache=null for none$"),
        ("train.steps=", "train.steps= has no value; write one after the ="),
        ('run_dir=""', "run_dir in the overrides is empty; write a path"),
        ("run_dir=~nobody_of_this_name/x", "there is no such user"),
        ("run_dir=$HOME/x", "variables are not expanded"),
        ("run_dir=runs/$USER/x", "variables are not expanded"),
        ("run_dir=runs/${train.seed}", "variables are not expanded"),
        ("run_dir=a\0b", "without NUL"),
        ("model.system_prompt=\udcff", "is not UTF-8"),
        (r'run_dir="\q"', "invalid escape in double quotes"),
        ("train.frozen=[a,,b]", "an item is empty"),
        ("train.frozen=a", "train.frozen='a' in the overrides: expected a list"),
        ("optim.betas.0=0.5", "optim.betas has no sub-keys"),
        ("optim.betas[0]=0.5", "optim.betas has no sub-keys"),
        ("run_dir.x=1", "run_dir has no sub-keys"),
        (".=1", "unknown key"),
        ("optim..lr=1", "unknown key"),
        ("objective={reca: {weight: 2}", "objective in the overrides is not YAML"),
        ("objective=[reca]", "objective in the overrides is a group of keys"),
    ],
)
def test_what_is_no_text_is_named(override, message):
    with pytest.raises(RecipeError, match=message) as caught:
        show_o(override)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["1.5", "3.0", "1e3", "true", "0x10", "0o10", "12:30", "ten", "--1", "1__0", "1_00", "٣", "1 0"]
)
def test_a_whole_number_is_one(text):
    with pytest.raises(RecipeError, match="expected a whole number"):
        show_o(f"train.steps={text}")


@pytest.mark.parametrize("text", ["010", "-07", "00", "0_010"])
def test_a_leading_zero_changes_no_number(text):
    for key in ("train.steps", "optim.lr"):
        with pytest.raises(RecipeError, match="without leading zeros|a whole number|a number"):
            show_o(f"{key}={text}")


def test_numbers():
    assert show_o("train.steps=+12_000").train.steps == 12000
    for text, value in {
        "1e-5": 1e-5,
        "1E-5": 1e-5,
        "1": 1.0,
        ".5": 0.5,
        "5.": 5.0,
        "1_000.5": 1000.5,
        "0": 0.0,
        "+1": 1,
    }.items():
        assert show_o(f"optim.lr={text}").optim.lr == value and type(show_o(f"optim.lr={text}").optim.lr) is float
    for text in (
        ".inf",
        "inf",
        "-.inf",
        "nan",
        "NaN",
        ".nan",
        "1e999",
        "1e-999",
        "1,5",
        "12:30",
        "true",
        "fast",
        "1e",
        ".",
    ):
        with pytest.raises(RecipeError, match="optim.lr"):
            show_o(f"optim.lr={text}")
    with pytest.raises(RecipeError, match="fits 64 bits"):
        show_o("train.seed=" + "9" * 5000)
    with pytest.raises(RecipeError, match="at most 9223372036854775807"):
        show_o("train.seed=9223372036854775808")


def test_truths():
    for text, value in {"true": True, "False": False, "YES": True, "off": False, "1": True, "0": False}.items():
        assert show_o(f"log.tensorboard={text}").log.tensorboard is value
    for text in ("2", "tRUE", "1.0", "[]", "y"):
        with pytest.raises(RecipeError, match="expected true or false"):
            show_o(f"log.tensorboard={text}")


def test_files_are_read_by_the_types_of_the_keys(tmp_path):
    recipe = in_file(
        tmp_path,
        "run_dir: 0010\nlog: {profile: 10:13, prompts: [no, 12:30, on, 1e3, 007, '']}\noptim: {lr: 1e-5}\n"
        "data: {images: 'no', captions: !!str 01, cache: }\nmodel: {system_prompt: 'null'}\ntrain: {steps: '10'}\n",
    )
    assert (recipe.run_dir, recipe.log.profile, recipe.optim.lr) == ("0010", "10:13", 1e-5)
    assert recipe.log.prompts == ["no", "12:30", "on", "1e3", "007", ""]
    assert (recipe.data.images, recipe.data.captions, recipe.data.cache) == ("no", "01", None)
    assert (recipe.model.system_prompt, recipe.train.steps) == ("null", 10)


def test_anchors_and_merges(tmp_path):
    text = (
        "objective:\n  reca: &k {weight: 1, micro_batch: 2}\n  t2i: {<<: *k, weight: 3}\n  i2t: {weight: 5, <<: [*k]}\n"
    )
    objective = in_file(tmp_path, text).objective
    assert (objective.t2i.weight, objective.t2i.micro_batch) == (3, 2)
    assert (objective.i2t.weight, objective.i2t.micro_batch) == (5, 2)


BOMB = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 40))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run_dir: a\nrun_dir: b\n", "duplicate key 'run_dir' at line 2"),
        ("optim: {lr: 1, lr: 2}\n", "duplicate key 'lr'"),
        ("train: {steps: 010}\n", "train.steps='010' in .*r.yaml: expected a number without leading zeros"),
        ("train: {steps: 12:30}\n", "expected a whole number"),
        ("train: {steps: 1.0}\n", "expected a whole number, such as 1"),
        ("optim: {lr: .inf}\n", "expected a finite number"),
        ("optim: {lr: {a: 1}}\n", "optim.lr=a group of keys"),
        ("optim: {betas: [0.9, [1]]}\n", r"optim.betas\[1\]=a list"),
        ("optim: {betas: [0.9, null]}\n", r"optim.betas\[1\] in .* cannot be null"),
        ("run_dir: [a]\n", "run_dir=a list in .*: expected a text; put it in quotes"),
        ("run_dir: ~\n", "run_dir in .* cannot be null"),
        ("run_dir: ${oc.env:HOME}/x\n", "variables are not expanded"),
        ("optim:\n", r"optim in .* is a group of keys; set its keys, as optim: \{sub: value\}"),
        ("umm: show_o\n\toptim: 3\n", r"cannot start any token at line 2, column 1"),
        ("model: null\n", "model in .* is a group of keys"),
        ("1: a\n", "unknown key '1'"),
        ("[a]: b\n", "the key at line 1 is not a text"),
        ("run_dir: !!python/object/apply:os.system [ls]\n", "the tag at line 1 is not supported"),
        ("run_dir: !!binary aaaa\n", "the tag at"),
        ("log: &a {<<: *a}\n", "contains itself"),
        ("log: {<<: 3}\n", "must have a group of keys"),
        ("log: {prompts: &p [*p]}\n", "contains itself"),
        (BOMB, "unknown key 'a0'"),
        ("a: b\n---\nc: d\n", "not YAML"),
        ("[" * 5000, "not YAML"),
        ("", "has no keys"),
        ("- a\n", "has no keys"),
        (b"run_dir: \xff\n", "not YAML"),
        (b"\0", "not YAML"),
        ('run_dir: "\\UFFFFFFFF"\n', "not YAML"),
        ("umm: [a]\n", "umm=a list"),
        ("umm: null\n", "umm in .* cannot be null"),
    ],
)
def test_mistakes_in_a_file_are_one_sentence(tmp_path, text, message):
    with pytest.raises(RecipeError, match=message) as caught:
        in_file(tmp_path, text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


@pytest.mark.parametrize("text", WORDS)
def test_saved_recipes_and_their_explanations_read_back_exactly(text, tmp_path):
    recipe = show_o()
    recipe.model.system_prompt, recipe.log.prompts = text, [text, "", text]
    recipe.optim.lr, recipe.optim.eps, recipe.train.seed = 0.1 + 0.2, math.pi * 1e-30, 2**63 - 1
    save_recipe(recipe, tmp_path / "r.yaml")
    assert asdict(load_recipe(tmp_path / "r.yaml")) == asdict(recipe)
    again = show_o(f"model.system_prompt={override_text(text)}", f"log.prompts={override_text(recipe.log.prompts)}")
    assert (again.model.system_prompt, again.log.prompts) == (text, recipe.log.prompts)


def test_a_name_that_is_not_utf8_reads_back(tmp_path):
    save_recipe(show_o("run_dir=a\udcffb"), tmp_path / "r.yaml")
    assert load_recipe(tmp_path / "r.yaml").run_dir == "a\udcffb"


@pytest.mark.parametrize("name", recipe_names())
def test_every_explained_line_is_an_override(name):
    recipe = load_recipe(name)
    lines = [line.split("  ")[0] for line in explain(recipe).splitlines()]
    assert asdict(load_recipe(name, lines)) == asdict(recipe)


@pytest.mark.parametrize(
    "override",
    [
        "optim.lr=-1", "optim.eps=0", "optim.betas=[1.0, 0.9]", "optim.betas=[0.9, -0.1]", "optim.betas=[]",
        "optim.weight_decay=-1", "optim.max_grad_norm=0", "optim.max_grad_norm=-1", "optim.warmup_steps=-1",
        "optim.decay_steps=0",
        "optim.stable_fraction=1.01", "optim.stable_fraction=-0.1", "optim.min_lr_ratio=1.5", "optim.min_lr_ratio=-0.1",
        "train.steps=0", "train.steps=9999999999", "train.seed=-1", "train.max_skips=-1", "train.threads=0",
        "parallel.strategy=zero", "parallel.step_timeout_minutes=0",
        "parallel.shard=0", "parallel.timeout_minutes=0", "parallel.timeout_minutes=9999999999",
        "checkpoint.every=-1", "checkpoint.keep=-1", "log.every=-1", "log.sample_every=-1", "log.profile=13:10",
        "log.profile=1", "log.profile=", "objective.reca.batch_size=0", "objective.i2t.micro_batch=0",
        "objective.i2t.weight=-1", "data.workers=-1", "data.prefetch=-1", "data.max_bad_fraction=1.1",
        "data.template_count=0", "model.seed=-1", "model.caption_drop=1.1", "model.image_size=0",
        "model.max_text_tokens=0",
        "model.phi.hidden_size=0", "model.phi.layer_norm_eps=0", "model.phi.partial_rotary_factor=1.5",
        "model.phi.hidden_act=softmax", "model.magvit.encoder_blocks=[]", "model.magvit.encoder_blocks=[1, 0]",
        "model.magvit.z_channels=99",
    ],
)  # fmt: skip
def test_numbers_have_bounds(override):
    with pytest.raises(RecipeError, match=override.split("=")[0].replace(".", r"\.")):
        show_o(override)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("open_uni_tiny", ["model.connector.num_attention_heads=7"], "must be a multiple of model.connector.num_att"),
        ("open_uni_tiny", ["model.sana.mlp_ratio=1e30"], "model.sana.mlp_ratio=.* must be at most 1024"),
        ("harmon_tiny", ["model.mar.mlp_ratio=1e-4"], "model.mar.mlp_ratio=0.0001 must be at least 0.1"),
        ("show_o_tiny", ["model.phi.num_attention_heads=7"], "hidden_size=96 must be a multiple of model.phi.num_att"),
        ("show_o_tiny", ["model.clip.hidden_size=1"], "hidden_size=1 must be a multiple"),
        ("show_o_tiny", ["model.phi.partial_rotary_factor=0.3"], "gives 9 rotary channels"),
        ("harmon_tiny", ["model.language.num_key_value_heads=3"], "=4 must be a multiple of model.language.num_key"),
        ("bagel_tiny", ["model.language={hidden_size: 4}"], "gives 1 rotary channels"),
        ("open_uni_tiny", ["model.sana.attention_head_dim=7"], "is 28, and .* is 64"),
        ("bagel_tiny", ["model.vision.patch_size=7"], "vision.image_size=18 must be a multiple"),
        ("bagel_tiny", ["model.vision.image_size=12"], "model.understanding_size=18 must be at most model.vision"),
    ],
)
def test_sizes_of_a_transformer_fit_each_other(name, overrides, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(name, overrides)


def test_every_number_has_a_least_value():
    """A new key is declared with the smallest value that makes sense, or stands here."""
    signed = {"shift_factor"}
    for name in ("show_o_tiny", "harmon_tiny", "open_uni_tiny", "bagel_tiny", "janus_tiny", "janusflow_tiny"):
        from reca.config.recipe_files import walk

        for _, f, key in walk(load_recipe(name)):
            if any(kind in str(f.type) for kind in ("int", "float")) and f.name not in signed:
                assert any(f.metadata.get(bound) is not None for bound in ("least", "above")), key


def test_every_path_key_expands_home(monkeypatch, tmp_path):
    from reca.config.recipe_files import walk

    monkeypatch.setenv("HOME", str(tmp_path))
    count = 0
    for name in ("show_o_tiny", "harmon_tiny", "open_uni_tiny", "bagel_tiny", "janus_tiny", "janusflow_tiny"):
        for _, f, key in walk(load_recipe(name)):
            if f.metadata.get("path"):
                recipe = load_recipe(name, [f"{key}=~/x"])
                group = recipe
                for part in key.split("."):
                    group = getattr(group, part)
                assert group == f"{tmp_path}/x", key
                count += 1
    assert count > 40
    assert in_file(tmp_path, "run_dir: ~/x\n").run_dir == f"{tmp_path}/x"
    assert load_recipe("~/r.yaml").run_dir == f"{tmp_path}/x"


def test_located_recipes_mean_the_same_elsewhere(monkeypatch, tmp_path):
    here = tmp_path / "a[1]"
    (here / "model").mkdir(parents=True)
    monkeypatch.chdir(here)
    recipe = absolute_paths(
        show_o("run_dir=runs/x", "train.init_from=.//before", "data.images=shards/*.tar", "data.captions=photos",
               "data.conversations=reca.toy_datasets.shapes:understood", "model.weights=model",
               "model.codec_weights=owner/name", "data.templates=/t.txt")
    )  # fmt: skip
    assert recipe.run_dir == f"{here}/runs/x" and recipe.train.init_from == f"{here}/before"
    assert recipe.data.images == f"{tmp_path}/a[[]1]/shards/*.tar" and recipe.data.captions == f"{here}/photos"
    assert (recipe.data.conversations, recipe.data.templates, recipe.data.cache) == (
        "reca.toy_datasets.shapes:understood",
        "/t.txt",
        None,
    )
    assert (recipe.model.weights, recipe.model.codec_weights) == (f"{here}/model", "owner/name")
    assert asdict(absolute_paths(recipe)) == asdict(recipe)
    judges = {"mask2former:model": f"mask2former:{here}/model", "owlv2:google/owlv2": "owlv2:google/owlv2",
              "endpoint:http://localhost:8000/v1": "endpoint:http://localhost:8000/v1", "model": "model"}  # fmt: skip
    for given, wanted in judges.items():
        assert absolute_paths(show_o(f"eval.judge={given}")).eval.judge == wanted


@pytest.mark.parametrize("name", ["b[1].tar", "b.tar", "tables.parquet"])
def test_a_name_that_exists_is_no_pattern_below_any_folder(monkeypatch, tmp_path, name):
    """b[1].tar below a[1] was b1.tar, and a folder of that suffix no folder."""
    (tmp_path / "a[1]" / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a[1]")
    assert absolute_paths(show_o(f"data.images={name}")).data.images == f"{tmp_path}/a[1]/{name}"


def test_recipes_that_cannot_be_read(tmp_path):
    (tmp_path / "folder.yaml").mkdir()
    for name in (tmp_path / "folder.yaml", tmp_path / "none.yaml", "x" * 5000, "x" * 5000 + ".yaml", "a\0b", "", "\n"):
        with pytest.raises(RecipeError, match="no recipe|cannot be read") as caught:
            load_recipe(name)
        assert "\n" not in str(caught.value)
