"""train.fit: what is chosen among predicted peaks, what a run records of it, and the advice when memory is full."""

import itertools
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from reca.config.recipe_files import load_recipe
from reca.estimate import cards, fit, fit_run, memory, out_of_memory
from reca.estimate.held import Held
from reca.estimate.memory import Memory
from reca.options.fields import RecipeError
from reca.processes import own_process
from reca.trainer import Trainer
from tests.driver.toy import ToyAdapter

GIB = 2**30


@pytest.fixture
def peaks(monkeypatch):
    """Peaks by a formula: 2 GiB a sample, or 1 with recomputation; 8 GiB of moments, 4 of weights."""

    def peak_of(recipe, tasks, gpus, node, card):
        size = max(getattr(recipe.objective, task).micro_batch for task in tasks)
        moments = 0 if recipe.optim.offload else 8
        if recipe.optim.moments == "bf16":
            moments //= 2
        activations = size * {False: 2, 4: 1.75, "selective": 1.5, True: 1}[recipe.train.activation_checkpointing]
        copies = 2 if recipe.train.precision == "bf16" and recipe.train.cast_once else 0
        parts = 4, 0, moments, 0, activations + copies
        shard = recipe.parallel.shard or 1
        return Memory(*(int(n * GIB) // (1 if i == 4 else shard) for i, n in enumerate(parts)))

    monkeypatch.setattr(memory, "peak_of", peak_of)


def recipe_of(*keys):
    return load_recipe("show_o_tiny", ["objective.i2t.weight=0", "objective.reca.batch_size=16", *keys])


def chosen(card, *keys, gpus=1):
    return fit.choose(recipe_of(*keys), gpus, 8, card * GIB).keys


MICRO = "objective.reca.micro_batch"


def test_all_samples_at_once_where_they_fit(peaks):
    keys = chosen(64)
    assert keys[MICRO] == 16 and not keys[fit.CHECKPOINTING] and not keys["optim.offload"]


def test_order_of_what_costs_time(peaks):
    """Rows are few here: recomputation costs a third of 16 samples', a pass as much as 1024, the host 32768."""
    assert (chosen(32)[MICRO], chosen(32)[fit.CHECKPOINTING]) == (16, True)  # 12 + 16 and its reserve
    assert (chosen(24)[MICRO], chosen(24)[fit.CHECKPOINTING]) == (8, True)  # 12 + 8
    assert not chosen(24)["optim.offload"]
    assert chosen(8)["optim.offload"]  # 4 + 1


def test_moments_cross_the_bus_as_long_as_the_data_sheets_say(peaks):
    """16 bytes a parameter at PCIe's rate, in rows of 6 FLOPs a parameter: of an A100 and of an H100."""
    rows = [16 * flops / (6 * rate) for flops, rate in ((312e12, 31.5e9), (989e12, 63e9))]
    assert rows[0] < fit.OFFLOAD < rows[1]
    recipe, keys = recipe_of(), {fit.CHECKPOINTING: False, MICRO: 16, "parallel.shard": 2}
    costs = [fit._time(recipe, keys | {"optim.offload": on}, 2, 100) for on in (False, True)]
    assert costs[1] - costs[0] == fit.OFFLOAD / 2


def test_where_rows_are_many_passes_come_before_recomputation(peaks, monkeypatch):
    monkeypatch.setattr(fit, "PASS", 16)
    assert (chosen(32)[MICRO], chosen(32)[fit.CHECKPOINTING]) == (8, False)


def test_the_predicted_peak_and_its_reserve_fit(peaks):
    for card in range(8, 64, 3):
        assert memory.needed(fit.choose(recipe_of(), 1, 8, card * GIB).memory.total) <= card * GIB


def test_results_do_not_change_unless_it_is_allowed(peaks):
    recipe = ("objective.mean=micro_batch", "objective.reca.micro_batch=16")
    assert chosen(24, *recipe)[MICRO] == 16
    with pytest.raises(fit.DoesNotFit, match=r"train.fit_allow=\[micro_batch\]"):
        chosen(12, *recipe)
    assert chosen(12, *recipe, "train.fit_allow=[micro_batch]")[MICRO] < 16
    assert "optim.moments" not in chosen(10)
    assert fit.DoesNotFit is not None and chosen(12, "train.fit_allow=[moments]")[MICRO] >= 1


def test_a_recipe_that_says_how_it_is_sharded_is_followed(peaks):
    assert chosen(32, "parallel.shard=2", gpus=4)["parallel.shard"] == 2
    assert chosen(64, gpus=4)["parallel.shard"] == 1


def test_the_fewest_gpus_are_of_those_that_the_shards_divide(peaks):
    recipe = recipe_of("parallel.shard=4")
    predict = fit.Predictions(recipe)
    assert cards.unchanged(predict, 8, 1) is cards.fitted(recipe, predict, 8, 1) is None  # nothing fits one byte
    assert cards.counts(recipe_of("parallel.shard=5")) == [1, 5, 10, 15, 20, 30, 40, 60]
    assert cards.counts(recipe_of()) == list(cards.COUNTS)


def test_a_fused_backward_pass_stays_the_only_one(peaks):
    """16 samples in one pass, with recomputation and moments on the host, and not 8 twice, which is refused."""
    fused = ["optim.fused_backward=true", "optim.max_grad_norm=null"]
    keys = chosen(24, *fused)
    assert (keys[MICRO], keys["optim.offload"], keys["train.activation_checkpointing"]) == (16, True, True)
    with pytest.raises(fit.DoesNotFit, match=r"micro_batch=16\. .* optim\.fused_backward=false"):
        chosen(20, *fused)
    assert not any(MICRO in keys for keys in out_of_memory.changes(recipe_of(*fused), 1, 1))
    assert any(MICRO in keys for keys in out_of_memory.changes(recipe_of(), 1, 1))


class Formula:
    """Predictions for 300 tokens a sample: 2 GiB a sample of reca and 1 of i2t, less with recomputation."""

    adapter = SimpleNamespace(sequence=lambda: {"text": 100, "image": 200}, repeats_blocks=lambda: False)

    def at_least(self, keys, gpus, node, card):
        return GIB * (4 + 8 * (not keys["optim.offload"])) // keys.get("parallel.shard", 1)

    def __call__(self, keys, gpus, node, card, tasks):
        (task,) = tasks
        size = keys[f"objective.{task}.micro_batch"] * {"reca": 2, "i2t": 1}[task]
        recomputed = {False: 1, "selective": 0.75, True: 0.5}[keys[fit.CHECKPOINTING]]
        copies = 2 if keys.get(fit.CAST_ONCE, True) else 0
        return Memory(self.at_least(keys, gpus, node, card), 0, 0, 0, int(GIB * (size * recomputed + copies)))


@pytest.mark.parametrize("gpus", [1, 6])
@pytest.mark.parametrize("weight", [0, 1])
def test_no_setting_that_fits_is_faster_than_the_choice(gpus, weight):
    """Compare with all settings and sizes, tried one by one."""
    keys = ["train.precision=bf16", f"objective.i2t.weight={weight}", "objective.i2t.batch_size=10"]
    recipe, predict = recipe_of(*keys), Formula()
    tasks = recipe.active_tasks()
    names = [f"objective.{task}.micro_batch" for task in tasks]
    settings = list(fit._settings(recipe, gpus, 4, copies=True))
    found = set()
    for card in range(6, 60, 2):
        at = gpus, 4, card * GIB

        def fits(keys, at=at):
            return all(memory.needed(predict(keys, *at, [task]).total) <= at[-1] for task in tasks)

        every = (
            setting | dict(zip(names, sizes, strict=True))
            for setting in settings
            for sizes in itertools.product(*(fit._sizes(recipe, task, gpus) for task in tasks))
        )
        fastest = min((fit._time(recipe, one, gpus, 300) for one in every if fits(one)), default=None)
        if fastest is None:
            with pytest.raises(fit.DoesNotFit):
                fit.choose(recipe, *at, predict)
            continue
        choice = fit.choose(recipe, *at, predict)
        assert choice.time == fit._time(recipe, choice.keys, gpus, 300) == fastest and fits(choice.keys)
        found.add(fit.describe(choice.keys))
    assert len(found) > 5


def test_refusal_names_the_least_and_what_would_help(peaks):
    with pytest.raises(fit.DoesNotFit, match=r"(?s)does not fit 2 GPUs of 3.00 GiB.*GiB with its reserve.*more GPUs"):
        chosen(3, gpus=2)


@pytest.mark.parametrize("key", ["optim.name=adamw_8bit", "optim.moments=bf16"])
def test_refusal_offers_smaller_moments_only_for_large_ones(peaks, key):
    with pytest.raises(fit.DoesNotFit, match=r"fit_allow=\[moments\]"):
        chosen(3)
    with pytest.raises(fit.DoesNotFit) as error:
        chosen(3, key)
    assert "fit_allow" not in str(error.value)


@pytest.mark.parametrize("card", [4, 6])
def test_refusal_is_of_the_smallest_micro_batches(card):
    """4 GiB hold no weights, and 6 GiB no sample besides them."""
    recipe = recipe_of("objective.i2t.weight=1", "objective.i2t.batch_size=10", "objective.i2t.micro_batch=5")
    with pytest.raises(fit.DoesNotFit, match="reca.micro_batch=1 objective.i2t.micro_batch=1[.]") as error:
        fit.choose(recipe, 1, 4, card * GIB, Formula())
    assert "optim.offload=true" in str(error.value)


def test_a_task_that_the_model_lacks_is_named_before_anything_is_tried():
    with pytest.raises(RecipeError, match="show_o has no srum loss: set objective.srum.weight=0"):
        fit.choose(recipe_of("objective.srum.weight=1"), 1, 8, GIB)


def test_largest_size_that_fits_in_few_predictions():
    asked = []

    def peak(size):
        asked.append(size)
        return max(100 + 3 * size, 7 * size)

    sizes = list(range(1, 97))
    for room in (102, 103, 106, 130, 300, 600, 671, 672):
        asked.clear()
        best = [size for size in sizes if peak(size) <= room]
        asked.clear()
        assert fit.largest_fitting(sizes, peak, room) == (best[-1] if best else None)
        assert len(set(asked)) <= 8


def test_a_run_keeps_what_was_chosen(peaks, tmp_path, caplog):
    caplog.set_level(logging.INFO, "reca")
    (tmp_path / "run").mkdir()
    keys = [f"run_dir={tmp_path / 'run'}", "train.fit=24GiB"]
    first = fit_run.fit_run(recipe_of(*keys), 1, 1, lambda function, *a: function(*a))
    assert first.objective.reca.micro_batch == 8 and "train.fit chose" in caplog.text
    written = json.loads((tmp_path / "run" / fit_run.FILE).read_text())
    assert written["keys"][MICRO] == 8 and "24.00 GiB" in written["why"]

    def never(*arguments):
        raise AssertionError("chosen again")

    for again in (recipe_of(*keys), first):  # by the same command, or by the run's own recipe.yaml
        assert fit_run.fit_run(again, 1, 1, never).objective.reca.micro_batch == 8
    assert fit_run.recorded(recipe_of(*keys)).objective.reca.micro_batch == 8
    caplog.clear()
    more = fit_run.fit_run(recipe_of(keys[0], "train.fit=64GiB"), 1, 1, lambda function, *a: function(*a))
    assert more.objective.reca.micro_batch == 16
    assert "chooses again" in caplog.text and "train.fit 24GiB -> 64GiB" in caplog.text


@pytest.mark.parametrize(
    "content",
    ["[]", "1", "{}", '{"asked": {}}', '{"asked": [], "keys": {}}', '{"asked": {}, "keys": {"a": 1}}', "{"]
    + [json.dumps({"asked": {key: 8}, "keys": {key: value}}) for key, value in [("a", 1), (MICRO, -1), (MICRO, "x")]]
    + [json.dumps({"asked": {MICRO: [8]}, "keys": {MICRO: 8}})],
)
def test_a_record_that_is_not_of_a_choice_is_replaced(peaks, tmp_path, content):
    file = tmp_path / "run" / fit_run.FILE
    file.parent.mkdir()
    file.write_text(content)
    recipe = recipe_of(f"run_dir={file.parent}", "train.fit=24GiB")
    assert fit_run.recorded(recipe) == recipe
    assert fit_run.fit_run(recipe, 1, 1, lambda function, *a: function(*a)).objective.reca.micro_batch == 8
    assert json.loads(file.read_text())["keys"][MICRO] == 8


@pytest.mark.parametrize("change", ["lora.rank=4", "parallel.reduce_every_micro_batch=true"])
def test_what_changes_memory_is_chosen_for_anew(change, peaks, tmp_path, caplog):
    caplog.set_level(logging.INFO, "reca")
    (tmp_path / "run").mkdir()
    keys = [f"run_dir={tmp_path / 'run'}", "train.fit=24GiB"]
    for given in (keys, [*keys, change]):
        fit_run.fit_run(recipe_of(*given), 2, 2, lambda function, *a: function(*a))
    assert f"chooses again, because of changes: {change.partition('=')[0]}" in caplog.text


@pytest.mark.parametrize("from_file", [False, True])
def test_a_key_given_on_resuming_is_followed(from_file, peaks, tmp_path, caplog):
    """By the first command or by the run's own recipe.yaml, which has what was chosen."""
    caplog.set_level(logging.INFO, "reca")
    (tmp_path / "run").mkdir()
    asked = recipe_of(f"run_dir={tmp_path / 'run'}", "train.fit=24GiB")

    def start(recipe):
        return fit_run.fit_run(recipe, 1, 1, lambda function, *a: function(*a))

    chosen = start(asked)
    assert not chosen.optim.offload
    given = fit.with_keys(chosen if from_file else asked, {"optim.offload": True})
    again = start(given)
    assert again.optim.offload and "because of changes: optim.offload False -> True" in caplog.text
    caplog.clear()
    assert start(again if from_file else given).optim.offload and "unchanged since the run began" in caplog.text


def test_choosing_again_keeps_what_alters_the_result(peaks, tmp_path):
    """A GPU of 13 GiB needed moments in bf16. They stay so on larger ones, which would hold them in fp32."""
    (tmp_path / "run").mkdir()
    for card in (13, 64, 32, 13):
        keys = [f"run_dir={tmp_path / 'run'}", f"train.fit={card}GiB", "train.fit_allow=[moments]"]
        recipe = fit_run.fit_run(recipe_of(*keys), 1, 1, lambda function, *a: function(*a))
        assert (recipe.optim.name, recipe.optim.moments) == ("adamw", "bf16")
        assert recipe.train.fit_allow == ["moments"]


def test_choosing_again_changes_no_moments_that_were_not_changed_before(peaks, tmp_path):
    (tmp_path / "run").mkdir()
    keys = [f"run_dir={tmp_path / 'run'}", "train.fit_allow=[moments]"]
    for card, offload in ((64, False), (13, True), (64, False)):  # which alters no result
        recipe = fit_run.fit_run(recipe_of(*keys, f"train.fit={card}GiB"), 1, 1, lambda function, *a: function(*a))
        assert (recipe.optim.name, recipe.optim.moments, recipe.optim.offload) == ("adamw", "fp32", offload)


def test_refusal_on_resuming_names_nothing_that_a_run_may_not_change(peaks, tmp_path):
    (tmp_path / "run").mkdir()
    keys = [f"run_dir={tmp_path / 'run'}", "train.fit_allow=[]"]

    def start(card):
        return fit_run.fit_run(recipe_of(*keys, f"train.fit={card}GiB"), 1, 1, lambda function, *a: function(*a))

    with pytest.raises(fit.DoesNotFit) as new:
        start(3)
    start(64)
    with pytest.raises(fit.DoesNotFit) as resumed:
        start(3)
    helps = [str(error.value).partition("What would help: ")[2] for error in (new, resumed)]
    may_change = [text.partition("in a new run, with another run_dir: ")[0] for text in helps]
    for key in ("train.fit_allow=[moments]", "train.roles"):
        assert key in may_change[0] and key in helps[1] and key not in may_change[1]


def test_a_loss_over_micro_batches_keeps_them(peaks, tmp_path):
    (tmp_path / "run").mkdir()
    keys = [f"run_dir={tmp_path / 'run'}", "objective.mean=micro_batch", "train.fit_allow=[micro_batch]"]
    first = fit_run.fit_run(recipe_of(*keys, "train.fit=24GiB"), 1, 1, lambda function, *a: function(*a))
    more = fit_run.fit_run(recipe_of(*keys, "train.fit=64GiB"), 1, 1, lambda function, *a: function(*a))
    assert more.objective.reca.micro_batch == first.objective.reca.micro_batch == 8


def test_selective_recomputation_comes_before_full(peaks, monkeypatch):
    monkeypatch.setattr(fit, "PASS", 4096)
    keys = chosen(40)  # 12 + 32, 12 + 24 or 12 + 16, and a reserve
    assert (keys[MICRO], keys[fit.CHECKPOINTING], keys["optim.offload"]) == (16, "selective", False)


def test_the_blocks_that_a_recipe_recomputes_are_tried_too(peaks, monkeypatch):
    """One in 4 takes 1 + 1 / 12 of the work: less than all of them, and more than selective."""
    monkeypatch.setattr(fit, "SELECTIVE", 1.1)
    every = f"{fit.CHECKPOINTING}=4"
    assert (chosen(44, every)[MICRO], chosen(44, every)[fit.CHECKPOINTING]) == (16, 4)  # 12 + 28, and a reserve
    assert chosen(44)[fit.CHECKPOINTING] == "selective"
    assert chosen(44, every, "train.fit_allow=[micro_batch]", "train.micro_batch=auto")[fit.CHECKPOINTING] == 4


def test_weights_are_cast_in_every_pass_only_where_their_copies_do_not_fit(peaks):
    bf16 = ("train.precision=bf16", "objective.mean=micro_batch", f"{MICRO}=8")  # 4 + 8 + 8, and copies of 2 GiB
    assert chosen(25, *bf16).get(fit.CAST_ONCE) is None and chosen(25, *bf16)[fit.CHECKPOINTING] is True
    assert (chosen(23, *bf16)[fit.CAST_ONCE], chosen(23, *bf16)["optim.offload"]) == (False, False)
    assert chosen(23, *bf16[1:]).get(fit.CAST_ONCE) is None  # in fp32 there are none
    sharded = fit._settings(recipe_of(*bf16, "parallel.shard=2"), 2, 8, copies=True)
    assert not any(fit.CAST_ONCE in keys for keys in sharded)  # FSDP2 casts what it gathers
    assert not any(fit.CAST_ONCE in keys for keys in fit._settings(recipe_of(*bf16), 1, 8, copies=False))
    kept = fit.choose(recipe_of(*bf16, "train.cast_once=false"), 1, 8, 23 * GIB).keys
    assert fit.CAST_ONCE not in kept and kept[fit.CHECKPOINTING] is True


def test_a_number_of_tokens_stays(peaks):
    """The formula knows micro_batch alone, which is no longer chosen and not named."""
    keys = chosen(32, "objective.reca.max_tokens=99", "objective.reca.micro_batch=16")
    assert MICRO not in keys and keys[fit.CHECKPOINTING] is True
    with pytest.raises(fit.DoesNotFit, match="does not fit 1 GPU of .*a smaller objective.reca.max_tokens than 99"):
        chosen(12, "objective.reca.max_tokens=99", "objective.reca.micro_batch=16")
    given = recipe_of("objective.reca.max_tokens=99")
    assert {"objective.reca.max_tokens": 49} in list(out_of_memory.changes(given, 1, 8))


def test_no_setting_is_run_that_cannot_be_chosen(peaks, monkeypatch):
    """Those whose weights and moments are too large, and micro-batches with which a step is no faster than the best."""
    asked, peak_of = [], memory.peak_of

    def watched(recipe, *arguments):
        asked.append((recipe.optim.offload, recipe.train.activation_checkpointing, recipe.objective.reca.micro_batch))
        return peak_of(recipe, *arguments)

    monkeypatch.setattr(memory, "peak_of", watched)
    monkeypatch.setattr(fit, "PASS", 4096)
    predict = fit.Predictions(recipe_of())
    fit.choose(predict.recipe, 1, 8, 40 * GIB, predict)
    assert [size for _, recomputed, size in asked if recomputed == "selective"] == [16]  # 8 are as fast without
    assert not any(recomputed is True for _, recomputed, _ in asked)
    asked.clear()
    fit.choose(predict.recipe, 1, 8, 80 * GIB, predict)
    assert [size for *_, size in asked] == [1, 2, 16]  # again, as chunks of logits depend on a card's memory
    asked.clear()
    fit.choose(predict.recipe, 1, 8, 80 * GIB, predict)
    assert asked == []  # every one was predicted before
    monkeypatch.setattr(
        fit, "held", lambda adapter, recipe, *_: Held(40 * GIB * (not recipe.optim.offload), 0, 0, 0, 0)
    )
    assert fit.choose(recipe_of(), 1, 8, 40 * GIB).keys["optim.offload"] and all(offload for offload, *_ in asked)


@pytest.mark.parametrize(("gpus", "keys"), [(1, ["ema.half_life=9"]), (1, ["optim.offload=true"]), (4, [])])
def test_no_peak_is_below_what_is_held(gpus, keys):
    predict = fit.Predictions(recipe_of("parallel.strategy=fsdp", "objective.reca.batch_size=4", *keys))
    assert predict.at_least({}, gpus, 8, GIB) <= predict({}, gpus, 8, GIB).total


def test_micro_batches_alone(peaks, monkeypatch, tmp_path):
    """As large as the GPU's memory takes, with everything else as it is written."""
    (tmp_path / "run").mkdir()
    properties = type("Properties", (), {"total_memory": 24 * GIB})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    keys = [f"run_dir={tmp_path / 'run'}", "objective.mean=micro_batch", "objective.reca.micro_batch=1"]
    asked = recipe_of(*keys, "train.micro_batch=auto")

    def choose():
        return fit_run.fit_run(asked, 1, 1, lambda function, *a: function(*a))

    recipe = choose()
    assert recipe.objective.reca.micro_batch == 4  # 12 + 8: of 16 samples in 1, 2, 3, 4 ... passes
    assert not recipe.train.activation_checkpointing and not recipe.optim.offload
    properties.total_memory = 80 * GIB
    assert choose().objective.reca.micro_batch == 4  # a mean over micro-batches goes on as it began
    asked.objective.mean = "batch"
    assert choose().objective.reca.micro_batch == 16
    properties.total_memory = 8 * GIB
    with pytest.raises(fit.DoesNotFit, match="train.micro_batch: this recipe .*train.fit=auto, which may also choose"):
        choose()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RecipeError, match="train.micro_batch=auto needs a GPU"):
        choose()


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("train.fit=80", "80GiB"),
        ("train.fit=0GiB", "80GiB"),
        ("train.fit_allow=[lora]", "train.fit_allow='lora' is not one of 'moments', 'micro_batch'"),
    ],
)
def test_what_is_no_card_or_no_change(key, words):
    with pytest.raises(RecipeError, match=words):
        recipe_of(key)


def test_auto_without_a_gpu_and_a_model_that_was_given(recipe, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RecipeError, match="train.fit=80GiB"):
        fit_run._asked(recipe_of("train.fit=auto"), 1, 1)
    with pytest.raises(RecipeError, match="called with another"):
        Trainer(recipe("train.fit=80GiB"), ToyAdapter())


def test_knobs_that_help_most(peaks):
    """Of 4 + 8 + 2 * 16 = 44 GiB."""
    now, best = out_of_memory.knobs(recipe_of(f"{MICRO}=16"), 1, 8, 80 * GIB)
    assert now == 44 * GIB
    helpful = {knob.text: knob.bytes // GIB for knob in best}
    assert helpful == {f"{fit.CHECKPOINTING}=true": 28, f"{MICRO}=8": 28, "optim.offload=true": 36}


class Full(ToyAdapter):
    def loss(self, *arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize(
    "keys", [["name=apex"], ["name=adamw_8bit"], ["moments=bf16"], ["fused_backward=true", "max_grad_norm=null"]]
)
def test_a_recipe_accepts_every_knob_that_is_named_to_it(keys):
    keys = [f"optim.{key}" for key in keys]
    found = [fit.describe(change).split(" ") for change in out_of_memory.changes(recipe_of(*keys), 2, 2)]
    assert len(found) > 2 and all(recipe_of(*keys, *knob) for knob in found)


def test_full_memory_names_knobs_and_leaves_a_snapshot(recipe, peaks, monkeypatch):
    monkeypatch.setattr(own_process, "call", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(memory, "own_card", lambda: 80 * GIB)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda file: Path(file).write_text("snapshot"))
    trainer = Trainer(recipe("objective.reca.micro_batch=4"), Full())
    with monkeypatch.context() as patched:
        patched.setattr(out_of_memory.torch.cuda, "is_available", lambda: True)
        with pytest.raises(RecipeError) as error, out_of_memory.explained(lambda: trainer.recipe):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    said = str(error.value)
    assert "objective.reca.micro_batch=2: 16.00 GiB" in said and "peak of this recipe is 20.00 GiB" in said
    assert "out_of_memory_rank0.pickle" in said
    assert (trainer.run_dir / "out_of_memory_rank0.pickle").read_text() == "snapshot"
    with pytest.raises(RecipeError, match="out of memory .*Tried to allocate"):
        trainer.run()


def test_full_memory_without_a_prediction_has_advice(monkeypatch):
    def broken(*arguments):
        raise OSError("no process")

    monkeypatch.setattr(own_process, "call", broken)
    assert "train.activation_checkpointing=true" in out_of_memory.advice(recipe_of())


def test_history_is_recorded_where_it_is_asked_for(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **options: calls.append(options))
    out_of_memory.record_history(recipe_of())
    assert not calls
    out_of_memory.record_history(recipe_of("log.memory_snapshot=true"))
    assert calls == [{"max_entries": out_of_memory.EVENTS, "stacks": "python"}]
