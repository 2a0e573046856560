"""The `reca` command."""

import argparse
import io
import logging
import sys
import traceback
import warnings
from pathlib import Path

from reca import __version__, exits
from reca.arguments import OR_RUN, Parser, as_path, path_text, takes_overrides, takes_pairs
from reca.commands import general, inference, usage
from reca.commands.examples import about
from reca.launcher import is_launched, number
from reca.options import names
from reca.processes import library_logs


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand.

    Returns the exit code, one of reca/exits.py.
    """
    _set_up_output()
    try:
        options = _parse(arguments)
    except SystemExit:  # of --help or a usage error
        exits.finish_output(exits.DONE)
        raise
    try:
        if sys.flags.optimize > 1:
            raise ValueError("transformers reads docstrings, which -OO and PYTHONOPTIMIZE=2 remove: use -O, or neither")
        with names.written_as(names.flag):
            code = options.run(options) or exits.DONE
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        code = exits.code_of(error)
        _report(error, options.parser.get_default("kept"))
    code = exits.finish_output(code)
    exits.exit_process(code)
    return code


def _report(error: BaseException, kept: str | None = None) -> None:
    """Print an error: the message of an expected one, otherwise the traceback.

    kept: what an interrupted command has written and uses when it is started again; None: nothing.
    """
    from reca.errors import PeerFailed, lost_rank, print_of_other_machine, print_once

    if isinstance(error, SystemExit):
        return
    if isinstance(error, PeerFailed):
        print_of_other_machine(error)
    elif isinstance(error, KeyboardInterrupt):
        print_once(f"reca: stopped; {kept}, and the same command continues" if kept else "reca: stopped")
    elif exits.expected(error) is None:
        cause = f"reca: {lost}" if (lost := lost_rank(error)) else ""
        print_once("".join(traceback.format_exception(error)) + cause)
    else:
        print_once(f"reca: {error}")


def _set_up_output() -> None:
    """Configure logging. Only rank 0 logs progress, and every warning is printed once."""
    from reca.errors import OncePerMessage

    rank = number("RANK", 0)
    where = f"[rank {rank}] " if rank else ""
    logging.basicConfig(format=f"{where}%(levelname)s %(message)s", level=logging.ERROR if rank else logging.WARNING)
    logging.getLogger("reca").setLevel(logging.WARNING if rank else logging.INFO)
    if is_launched():
        logging.getLogger("reca").addFilter(OncePerMessage())
    if rank:
        warnings.simplefilter("ignore")  # of libraries; rank 0 prints the same ones
    library_logs.leave_out_unused()
    for stream in (sys.stdout, sys.stderr):  # a file name need not be UTF-8, nor the terminal
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    exits.outlive_reader()


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the arguments. Overrides may stand before and after options, which argparse alone does not support."""
    parser = _parser()
    if not (sys.argv[1:] if arguments is None else arguments):
        parser.print_help(sys.stderr)
        parser.exit(exits.USAGE)
    options, rest = parser.parse_known_args(arguments)
    more = [text for text in rest if hasattr(options, "overrides") and not text.startswith("-")]
    if more:
        options.overrides += more
    usage.check(options, sys.argv[1:] if arguments is None else arguments, [t for t in rest if t not in more])
    return options


def _parser() -> argparse.ArgumentParser:
    from reca.catalog import DATASETS, SUITES
    from reca.models import UMMS
    from reca.runs.status import FIELDS

    parser = Parser(prog="reca", description="Reconstruction alignment of unified multimodal models.")
    parser.add_argument("--version", action="version", version=f"reca {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run, help: str, **options) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(name, **about(name, help), **options)
        sub.set_defaults(run=run, parser=sub)
        return sub

    def takes_recipe(sub: argparse.ArgumentParser, or_run: bool = False) -> None:
        sub.add_argument("recipe", type=path_text, help=OR_RUN if or_run else "recipe name or .yaml file")
        takes_overrides(sub)

    def takes_ema(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--ema",
            action="store_true",
            help="use the run's moving average of the weights (ema.half_life). Off by default, because it lags: "
            "with the release's decay of 0.9999 it still consists of 90 %% starting weights after 1000 steps",
        )

    train = command("train", general.train, "Train a recipe, or resume its run.")
    takes_recipe(train)
    train.add_argument(
        "--explain", action="store_true", help="print every key with its value and documentation, and exit"
    )
    train.add_argument(
        "--overfit",
        type=int,
        metavar="N",
        help="dry run: overfit one batch in N steps, or report why that fails. The run folder is not changed",
    )
    train.add_argument(
        "--overfit-to",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="fraction of the initial loss that the dry run must reach (default: %(default)s)",
    )

    status = command("status", general.status, "Print the status of a run.")
    status.add_argument("folder", type=as_path, help="run folder")
    status.add_argument(
        "--field",
        choices=FIELDS,
        metavar="NAME",
        help=f"print only this value, for scripts; the exit code is then 0. One of {', '.join(FIELDS)}",
    )

    check = command("check", general.check, "Report parameters, FLOPs and memory of a recipe, without loading weights.")
    takes_recipe(check)
    check.add_argument("--gpus", type=int, metavar="N", default=1, help="number of GPUs (default: %(default)s)")
    check.add_argument(
        "--gpus-per-node",
        type=int,
        metavar="N",
        default=8,
        help="GPUs per node; with fsdp they share one copy of the weights by default (default: %(default)s)",
    )
    check.add_argument(
        "--gpu-memory",
        type=_bytes,
        metavar="SIZE",
        help="memory of a GPU, such as 80GiB: also report what fits and how many GPUs are needed; takes minutes",
    )

    generate = command("generate", inference.generate, "Generate images from text.")
    takes_recipe(generate, or_run=True)
    takes_ema(generate)
    generate.add_argument(
        "--prompt", action="append", metavar="TEXT", required=True, help="text prompt; may be repeated"
    )
    _takes_sampling(generate)

    edit = command("edit", inference.edit, "Edit an image following an instruction.")
    takes_recipe(edit, or_run=True)
    takes_ema(edit)
    edit.add_argument("--image", type=as_path, metavar="FILE", required=True, help="image file to edit")
    edit.add_argument("--instruction", metavar="TEXT", required=True, help="what to change in the image")
    _takes_sampling(edit)

    answer = command("answer", inference.answer, "Answer a question about an image.")
    takes_recipe(answer, or_run=True)
    takes_ema(answer)
    answer.add_argument("--image", type=as_path, metavar="FILE", required=True, help="image file to ask about")
    answer.add_argument("--question", metavar="TEXT", required=True, help="question about the image")

    best = command(
        "best-of",
        inference.best_of,
        "Generate several images per prompt and keep the one that the model itself scores highest.",
    )
    best.add_argument("recipe", type=path_text, help=OR_RUN)
    best.add_argument("prompts", type=as_path, help="text file with one prompt per line")
    takes_overrides(best)
    takes_ema(best)
    best.add_argument("--candidates", type=int, metavar="N", default=4, help="images per prompt (default: %(default)s)")
    best.add_argument(
        "--question",
        metavar="TEXT",
        help="question to which the prompt is scored as the answer (default: 'Describe this image.')",
    )
    _takes_sampling(best, folder_required=True)
    best.set_defaults(kept="the prompts done so far are kept")

    export = command("export", inference.export, "Export weights in the format of the model's public inference code.")
    takes_recipe(export, or_run=True)
    takes_ema(export)
    export.add_argument("--out", type=as_path, metavar="DIR", required=True, help="output folder")
    export.add_argument("--card", action="store_true", help="write a model card (README.md) next to the weights")
    export.add_argument("--push", metavar="OWNER/NAME", help="upload the export, with a card, to the Hugging Face Hub")
    export.add_argument("--public", action="store_true", help="make the repository public; a new one is private")
    export.add_argument("--update", action="store_true", help="upload to a repository that already contains files")

    from reca.comparison import commands as compare_commands
    from reca.eval import commands as eval_commands

    evaluation = command("eval", eval_commands.run, "Evaluate a model on a benchmark, and compare it with another.")
    eval_commands.add(evaluation)
    takes_ema(evaluation)
    evaluation.set_defaults(kept="what was generated and judged so far is kept")

    comparison = command(
        "compare", compare_commands.run, "Compare two models: scores, images, losses and settings, in one HTML page."
    )
    compare_commands.add(comparison)

    serve = command(
        "serve", general.serve, "Serve a web UI to generate, edit and answer, with two models side by side."
    )
    takes_recipe(serve, or_run=True)
    takes_ema(serve)
    serve.add_argument("--against", metavar="RUN|base", help="second model: base, a run or a recipe")
    serve.add_argument(
        "--host",
        metavar="ADDRESS",
        default="127.0.0.1",
        help="address to listen on (default: %(default)s, this machine only)",
    )
    serve.add_argument("--port", type=int, metavar="N", default=7860, help="port to listen on (default: %(default)s)")

    demo = command(
        "demo", general.demo, "Run the demo on a CPU: pre-train a tiny model, post-train it in several ways, compare."
    )
    demo.add_argument(
        "--umm", metavar="MODEL", default="show_o", help=f"model: {', '.join(UMMS)} (default: %(default)s)"
    )
    demo.add_argument(
        "--dataset", metavar="NAME", help="toy dataset: emoji or shapes (default: emoji, if the model has a demo on it)"
    )
    demo.add_argument(
        "--seeds", type=int, metavar="N", default=1, help="number of seeds, from 0 (default: %(default)s)"
    )
    demo.add_argument(
        "--out",
        type=as_path,
        metavar="DIR",
        help="output folder (default: demo_out for show_o on emoji, otherwise demo_out/DATASET/UMM)",
    )
    demo.add_argument(
        "--scale",
        type=float,
        metavar="SHARE",
        default=1.0,
        help="fraction of steps and prompts; below 1 only for a quick test (default: %(default)s)",
    )

    from reca.studies import commands as study_commands

    study = command(
        "study", study_commands.run, "Run an experiment of the paper: train its variants and compare with the paper."
    )
    study_commands.add(study)
    study.set_defaults(kept="finished tasks and saved checkpoints are kept")

    files = "Get published weights, datasets, or the files of an evaluation suite."
    get = subparsers.add_parser("get", **about("get", files))
    what = get.add_subparsers(required=True, metavar="WHAT")
    weights = what.add_parser(
        "weights", **about("get weights", "Get the published files that a recipe, or all recipes of a model, need.")
    )
    weights.add_argument("name", type=path_text, help="a recipe, a model (all its recipes), or a hub id: owner/name")
    takes_overrides(weights)
    data = what.add_parser("data", **about("get data", "Get a dataset that the releases train on."))
    data.add_argument("name", help=f"{', '.join(DATASETS)}, or a hub id: owner/name")
    kept = "the files fetched so far are kept"
    for sub, run in ((weights, general.get_weights), (data, general.get_data)):
        sub.add_argument(
            "--to", type=as_path, metavar="DIR", help="destination folder (default: the Hugging Face cache)"
        )
        sub.add_argument("--dry-run", action="store_true", help="only print the list")
        sub.set_defaults(run=run, parser=sub, kept=kept)
    suite = what.add_parser(
        "suite", **about("get suite", "Get the files of an evaluation suite, from its repository on GitHub.")
    )
    suite.add_argument("name", help=", ".join(SUITES))
    suite.add_argument("--to", type=as_path, metavar="DIR", help="destination folder (default: ./benchmarks)")
    suite.add_argument("--dry-run", action="store_true", help="only print the list")
    suite.set_defaults(run=general.get_suite, parser=suite, kept=kept)

    _add_data(subparsers)
    cache = command("cache", general.cache, "Compute the features of all images before training, in data.cache.")
    takes_recipe(cache)
    cache.set_defaults(kept="complete shards of features are kept")
    command("doctor", general.doctor, "Report this machine's hardware and software and which kernels will run.")
    # No prefix, so that all arguments, including --help, are passed to the benchmarks.
    bench = command(
        "bench", general.bench, "Time the kernels, as `python -m benchmarks`.", prefix_chars="\0", add_help=False
    )
    bench.add_argument("arguments", nargs="*")
    return parser


def _add_data(subparsers) -> None:
    """Add `reca data check` and `reca data view`."""
    from reca.data.tasks import TASKS

    data = subparsers.add_parser("data", **about("data", "Inspect training data."))
    inside = data.add_subparsers(required=True, metavar="COMMAND")
    for name, run, text in (
        (
            "check",
            general.data_check,
            "Read every sample: report counts, bad samples, sizes, duplicates, texts. Exits with 1 if any is bad.",
        ),
        ("view", general.data_view, "Write an HTML page of samples as a model gets them: both views, and texts."),
    ):
        sub = inside.add_parser(name, **about(f"data {name}", text))
        sub.set_defaults(run=run, parser=sub)
        sub.add_argument("spec", type=path_text, help="data in any form of data.images, or a recipe")
        takes_overrides(sub, "recipe keys, such as data.columns.caption")
        sub.add_argument(
            "--task", choices=TASKS, help="task of the data (default: reca, or all active tasks of a recipe)"
        )
        if name == "view":
            sub.add_argument("--recipe", metavar="RECIPE", help="recipe whose views are shown (default: show_o_512)")
            sub.add_argument(
                "--count", type=int, metavar="N", default=48, help="samples to show (default: %(default)s)"
            )
            sub.add_argument(
                "--out",
                type=as_path,
                metavar="DIR",
                default=Path("data_view"),
                help="output folder (default: %(default)s)",
            )


def _bytes(text: str) -> int:
    from reca.units import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _takes_sampling(sub: argparse.ArgumentParser, folder_required: bool = False) -> None:
    sub.add_argument(
        "--seed",
        type=int,
        metavar="N",
        default=0,
        help="seed of the first image, incremented for each further one (default: %(default)s)",
    )
    takes_pairs(sub, "--sampling", "sampling option of the model")
    folder = {"required": True} if folder_required else {"default": Path(".")}
    text = "folder for the PNG files" + ("" if folder_required else " (default: the working directory)")
    sub.add_argument("--out", type=as_path, metavar="DIR", help=text, **folder)


if __name__ == "__main__":
    sys.exit(main())
