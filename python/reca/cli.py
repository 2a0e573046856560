"""The `reca` command."""

import argparse
import io
import logging
import os
import re
import runpy
import shlex
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

MOST_GPUS = 2**20


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand.

    Returns the exit code, one of reca/exits.py.
    """
    _set_up_output()
    options = _parse(arguments)
    from reca import distributed, exits

    try:
        code = options.run(options) or exits.DONE
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        code = exits.code_of(error)
        _report(error)
    distributed.exit_process(code)
    return code


def _report(error: BaseException) -> None:
    """Print an error: its message where it is an expected one, else the traceback."""
    from reca import distributed, exits
    from reca.errors import print_once

    if isinstance(error, SystemExit | distributed.PeerFailed):
        return
    if isinstance(error, KeyboardInterrupt):
        print_once("reca: stopped")
    elif exits.expected(error) is None:
        print_once("".join(traceback.format_exception(error)))
    else:
        print_once(f"reca: {error}")


def _set_up_output() -> None:
    """Log lines with their level. On many ranks, rank 0 logs progress, and every warning is printed once."""
    from reca.errors import OncePerMessage

    rank = int(os.environ.get("RANK", 0))
    where = f"[rank {rank}] " if rank else ""
    logging.basicConfig(format=f"{where}%(levelname)s %(message)s", level=logging.ERROR if rank else logging.WARNING)
    logging.getLogger("reca").setLevel(logging.WARNING if rank else logging.INFO)
    if "RANK" in os.environ:
        logging.getLogger("reca").addFilter(OncePerMessage())
    if rank:
        warnings.simplefilter("ignore")  # of libraries; rank 0 has the same
    for stream in (sys.stdout, sys.stderr):  # a file name need not be UTF-8, nor the terminal
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the arguments, with overrides on either side of options: argparse itself takes them in one place only."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    more = [text for text in rest if hasattr(options, "overrides") and not text.startswith("-")]
    if unknown := [text for text in rest if text not in more]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if more:
        options.overrides += more
    return options


def _parser() -> argparse.ArgumentParser:
    from reca.catalog import DATASETS
    from reca.models import UMMS

    parser = argparse.ArgumentParser(prog="reca", description="Reconstruction alignment of unified multimodal models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run, help: str, **options) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help, **options)
        sub.set_defaults(run=run)
        return sub

    def takes_recipe(sub: argparse.ArgumentParser, or_run: bool = False) -> None:
        sub.add_argument(
            "recipe", type=_path_text, help="recipe name or .yaml file" + (", or the folder of a run" if or_run else "")
        )
        sub.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to change")

    train = command("train", _train, "Train a recipe, or continue its run.")
    takes_recipe(train)
    train.add_argument(
        "--explain", action="store_true", help="print every key with its value and documentation, and exit"
    )

    status = command("status", _status, "Print the status of a run.")
    status.add_argument("folder", type=_path, help="the folder of a run")

    check = command("check", _check, "Report parameters, FLOPs and memory of a recipe, without loading weights.")
    takes_recipe(check)
    check.add_argument("--gpus", type=int, default=1, help="GPUs of the run")
    check.add_argument(
        "--node", type=int, default=8, help="GPUs per node; by default these share one copy of the weights"
    )

    generate = command("generate", _generate, "Generate images from text.")
    takes_recipe(generate, or_run=True)
    generate.add_argument("--prompt", action="append", required=True, help="text of an image; may be given again")
    _takes_sampling(generate)

    edit = command("edit", _edit, "Edit an image by an instruction.")
    takes_recipe(edit, or_run=True)
    edit.add_argument("--image", type=_path, required=True)
    edit.add_argument("--instruction", required=True)
    _takes_sampling(edit)

    answer = command("answer", _answer, "Answer a question about an image.")
    takes_recipe(answer, or_run=True)
    answer.add_argument("--image", type=_path, required=True)
    answer.add_argument("--question", required=True)

    export = command("export", _export, "Export weights in the format that the public inference code reads.")
    takes_recipe(export, or_run=True)
    export.add_argument("--out", type=_path, required=True, help="folder to write")

    demo = command(
        "demo", _demo, "Run the demo on a CPU: pre-train a tiny model, post-train it in several ways, compare."
    )
    demo.add_argument("--umm", default="show_o", help=f"which model: {', '.join(UMMS)}")
    demo.add_argument("--seeds", type=int, default=1, help="number of seeds, from 0")
    demo.add_argument(
        "--out", type=_path, help="folder of the report; demo_out, for another UMM than show_o demo_out/UMM"
    )
    demo.add_argument(
        "--scale", type=float, default=1.0, help="fraction of steps and prompts; below 1 only to see that it runs"
    )

    get = commands.add_parser("get", help="Get published weights or datasets from the Hugging Face hub.")
    what = get.add_subparsers(required=True, metavar="WHAT")
    weights = what.add_parser("weights", help="the files that a recipe, or a model, is made of")
    weights.add_argument("name", type=_path_text, help="a recipe, a model (all its recipes), or a hub id: owner/name")
    weights.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to change")
    data = what.add_parser("data", help="a dataset that the releases train on")
    data.add_argument("name", help=f"{', '.join(DATASETS)}, or a hub id: owner/name")
    for sub, run in ((weights, _get_weights), (data, _get_data)):
        sub.add_argument("--to", type=_path, help="folder to put them in; by default the cache of the hub")
        sub.add_argument("--dry-run", action="store_true", help="print the list only")
        sub.set_defaults(run=run)

    _add_data(commands)
    command("doctor", _doctor, "Report what this machine has and which kernels will run.")
    # No prefix: all that follows, --help too, belongs to the benchmarks.
    bench = command("bench", _bench, "Time the kernels, as `python -m benchmarks`.", prefix_chars="\0", add_help=False)
    bench.add_argument("arguments", nargs="*")
    return parser


def _add_data(commands) -> None:
    """Add `reca data check` and `reca data view`."""
    from reca.data.batch import TASKS

    data = commands.add_parser("data", help="Look at training data.", description="Look at training data.")
    inside = data.add_subparsers(required=True, metavar="COMMAND")
    for name, run, text in (
        (
            "check",
            _data_check,
            "Read every sample: counts, bad ones, sizes, duplicates, texts. Exits 1 if any is bad.",
        ),
        ("view", _data_view, "Write an HTML page of samples as a model gets them: both views, and texts."),
    ):
        sub = inside.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        sub.add_argument("spec", type=_path_text, help="what data.images takes, or a recipe whose data it is")
        sub.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys, such as data.columns.caption")
        sub.add_argument("--task", choices=TASKS, help="what the data is for; reca, or all of a recipe")
        if name == "view":
            sub.add_argument("--recipe", help="recipe whose model's views are shown; show_o_512")
            sub.add_argument("--count", type=int, default=48, help="samples to show")
            sub.add_argument("--out", type=_path, default=Path("data_view"), help="folder of the pages")


def _path_text(text: str) -> str:
    from reca.paths import expand_home

    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty")
    try:
        return expand_home(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _path(text: str) -> Path:
    return Path(_path_text(text))


def _takes_sampling(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--seed", type=int, default=0, help="seed of the first image; the next ones count up")
    sub.add_argument(
        "--sampling", action="append", default=[], metavar="key=value", help="sampling options of the model"
    )
    sub.add_argument("--out", type=_path, default=Path("."), help="folder for the PNG files")


def _train(options: argparse.Namespace) -> None:
    from reca import api, distributed
    from reca.config import explain, load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    if options.explain:
        if int(os.environ.get("RANK", 0)) == 0:
            print(explain(recipe))
        return
    run = api.train(recipe)
    if not distributed.is_main_process():
        return
    draw = f"Draw with: reca generate {shlex.quote(recipe.run_dir)} --prompt 'a yellow broccoli'"
    if run.new_steps:
        print(f"{run.steps} steps done. {draw}")
    else:
        print(
            f"{recipe.run_dir} has {run.steps} steps already and train.steps={recipe.train.steps}: nothing to do. "
            f"Give a larger train.steps, or another run_dir. {draw}"
        )


def _status(options: argparse.Namespace) -> int:
    """Print status.json as it is now. Returns the exit code the run ended with; 0 while it runs."""
    from reca.status import Status

    status = Status.read(options.folder)
    print(status.describe())
    return status.exit_code or 0


def _check(options: argparse.Namespace) -> None:
    from reca.check import report
    from reca.config import load_recipe

    if max(options.gpus, options.node) > MOST_GPUS:
        raise ValueError(f"--gpus and --node must be at most {MOST_GPUS}, got {options.gpus} and {options.node}")
    print(report(load_recipe(options.recipe, options.overrides), options.gpus, options.node))


def _data_check(options: argparse.Namespace) -> int:
    from reca import data_commands

    return data_commands.check(*data_commands.open_spec(options.spec, options.task, None, options.overrides))


def _data_view(options: argparse.Namespace) -> None:
    from reca import data_commands

    opened = data_commands.open_spec(options.spec, options.task, options.recipe, options.overrides)
    print(*data_commands.view(*opened, options.count, options.out), sep="\n")


def _adapter(options: argparse.Namespace, ability: str) -> Any:
    """Return the adapter class of a recipe. Raises RecipeError if it lacks the ability."""
    from reca.api import recipe_of
    from reca.config import RecipeError
    from reca.models import UMMS, umm_package

    umm = recipe_of(options.recipe, options.overrides).umm
    adapter = umm_package(umm).Adapter
    if ability not in adapter.abilities:
        able = [name for name in UMMS if ability in umm_package(name).Adapter.abilities]
        raise RecipeError(f"{umm} cannot {ability}; recipes of {' and '.join(able)} can")
    return adapter


def _model(options: argparse.Namespace):
    from reca.api import load

    return load(options.recipe, options.overrides)


def _generate(options: argparse.Namespace) -> None:
    from reca.models.common.inference import warn_of_unknown_words

    seeds = [options.seed + i for i in range(len(options.prompt))]
    sampling = _sampling(options, _adapter(options, "generate").generate, seeds, options.prompt)
    model = _model(options)
    warn_of_unknown_words(model.tokenizer, options.prompt)
    _write(model.generate(options.prompt, seeds, **sampling), options, seeds, options.prompt)


def _edit(options: argparse.Namespace) -> None:
    from reca.models.common.inference import warn_of_unknown_words

    seeds, instructions = [options.seed], [options.instruction]
    sampling = _sampling(options, _adapter(options, "edit").edit, seeds, instructions)
    image = _read(options.image)
    model = _model(options)
    warn_of_unknown_words(model.tokenizer, instructions)
    _write(model.edit([image], instructions, seeds, **sampling), options, seeds, instructions)


def _answer(options: argparse.Namespace) -> None:
    from reca.models.common.inference import warn_of_unknown_words

    _adapter(options, "answer")
    _reject_empty([options.question])
    image = _read(options.image)
    model = _model(options)
    warn_of_unknown_words(model.tokenizer, [options.question])
    print(model.answer([image], [options.question])[0])


def _export(options: argparse.Namespace) -> None:
    from reca.api import recipe_of
    from reca.folders import ensure_writable

    recipe_of(options.recipe, options.overrides)
    ensure_writable(options.out, "--out")
    written = _model(options).export(options.out)
    print(f"wrote {', '.join(dict.fromkeys(name.split('/')[0] for name in written))} to {options.out}")


def _get_weights(options: argparse.Namespace) -> None:
    from reca.downloads import get, weights_of

    get(weights_of(options.name, options.overrides), options.to, options.dry_run)


def _get_data(options: argparse.Namespace) -> None:
    from reca.downloads import data_of, get

    get(data_of(options.name), options.to, options.dry_run)


def _demo(options: argparse.Namespace) -> None:
    from reca.toy_world.experiment import demo

    if not 0 < options.scale <= 1 or options.seeds < 1:
        raise ValueError(
            f"--scale must lie in (0, 1] and --seeds be at least 1, got {options.scale:g} and {options.seeds}"
        )
    usual = Path("demo_out") if options.umm == "show_o" else Path("demo_out") / options.umm
    demo(options.umm, options.seeds, options.out or usual, options.scale)


def _doctor(options: argparse.Namespace) -> None:
    from reca.doctor import report

    print(report())


def _bench(options: argparse.Namespace) -> int:
    root = Path(__file__).parents[2]
    if not (root / "benchmarks" / "__main__.py").exists():
        raise ValueError("the benchmarks are in the source tree, not in the installed package: run `make bench` there")
    sys.path.insert(0, str(root))
    sys.argv = ["benchmarks", *options.arguments]
    runpy.run_module("benchmarks", run_name="__main__")
    return 0


def _sampling(options: argparse.Namespace, method, seeds: list[int], texts: list[str]) -> dict:
    """Parse --sampling into keyword arguments of `method`, and check all other arguments before anything is loaded."""
    from reca.folders import ensure_writable
    from reca.models.common.inference import check_pairs
    from reca.sampling_options import check_sampling_options
    from reca.values import guess

    _reject_empty(texts)
    check_pairs(seeds=seeds)
    given = {}
    for text in options.sampling:
        key, equals, value = text.partition("=")
        if not equals or not value.strip():
            raise ValueError(
                f"--sampling {text!r} has no {'value' if equals else repr('=')}; write --sampling key=value"
            )
        given[key] = guess(value, f"--sampling {key}")
    given = check_sampling_options(method, given)
    ensure_writable(options.out, "--out")
    return given


def _reject_empty(texts: list[str]) -> None:
    if not all(text.strip() for text in texts):
        raise ValueError("the text is empty; write what to draw, to change or to answer")


def _read(path: Path):
    from reca.data.pixels import read_image

    return read_image(path)


def _write(images: list, options: argparse.Namespace, seeds: list[int], texts: list[str]) -> None:
    from reca.image_grid import make_grid

    for i, (image, seed, text) in enumerate(zip(images, seeds, texts, strict=True)):
        words = re.sub(r"\W+", "-", text).strip("-")[:40]
        path = options.out / f"{i:03d}_seed{seed}_{words}.png"
        try:
            make_grid([image]).save(path)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise OSError(
                f"{path} cannot be written ({error.strerror or error}); give another folder as --out"
            ) from error
        print(path)


if __name__ == "__main__":
    sys.exit(main())
