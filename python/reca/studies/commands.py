"""`reca study`."""

import argparse
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reca import exits
from reca.arguments import Listed, as_path, takes_overrides, takes_pairs
from reca.models import UMMS
from reca.options.sampling import read_pairs
from reca.studies.study import StudyError, load_study, study_names

LIST = "list"


def add(sub: argparse.ArgumentParser) -> None:
    """Add the options of `reca study`."""
    sub.allow_abbrev = False  # SLURM scripts repeat the command line without --slurm and --report
    sub.add_argument("name", help=f"{', '.join(study_names())}, or a .yaml file in their format; list describes them")
    takes_overrides(sub, "recipe keys to override, in all variants or in one", "[VARIANT:]key=value")
    sub.add_argument(
        "--umm",
        default="show_o",
        choices=UMMS,
        metavar="MODEL",
        help=f"model for a toy dataset: {', '.join(UMMS)} (default: show_o)",
    )
    sub.add_argument("--dataset", metavar="NAME", default="shapes", help="toy dataset (default: shapes)")
    sub.add_argument(
        "--recipe", metavar="RECIPE", help="run at real size: a recipe with published weights, data as overrides"
    )
    sub.add_argument(
        "--seeds",
        type=Listed(_seeds),
        metavar="N|LIST",
        default=(0,),
        help="number of seeds, counted from 0, or a list such as 0,1,5, where '5,' is seed 5 alone (default: seed 0)",
    )
    sub.add_argument(
        "--out",
        type=as_path,
        metavar="DIR",
        default=Path("studies"),
        help="folder of all studies, which share common variants (default: %(default)s)",
    )
    sub.add_argument(
        "--suite", metavar="SUITE", action="append", default=[], help="with --recipe: evaluation suite; may be repeated"
    )
    for name, metavar, text in (
        ("--data", "SUITE=PATH", "files of a suite that are not shipped; may be repeated"),
        ("--judge", "SUITE=NAME[:ARGUMENT]", "judge of a suite, see reca eval; may be repeated"),
    ):
        sub.add_argument(name, action="append", default=[], metavar=metavar, help=text)
    takes_pairs(sub, "--judge-option", "option of all judges")
    takes_pairs(sub, "--sampling", "sampling option of the model")
    sub.add_argument("--limit", type=int, metavar="N", help="number of items of a suite (default: all)")
    sub.add_argument(
        "--images-per-prompt",
        type=int,
        metavar="N",
        default=1,
        help="images per prompt of a toy dataset (default: 1)",
    )
    sub.add_argument(
        "--jobs", type=int, metavar="N", help="variants to run in parallel (default: number of GPUs, or else cores)"
    )
    sub.add_argument(
        "--scale",
        type=float,
        metavar="SHARE",
        default=1.0,
        help="fraction of a toy dataset's steps and prompts; below 1 only for a quick test (default: 1.0)",
    )
    sub.add_argument("--slurm", action="store_true", help="run nothing: write scripts that submit job arrays")
    sub.add_argument("--task", metavar="SEED/VARIANT", help="run only this variant, as those scripts do")
    sub.add_argument("--report", action="store_true", help="run nothing: write the report of existing results")


def run(options: argparse.Namespace) -> int:
    """Run the unfinished tasks of a study. Print the results and the path of the page. Return 1 if a task failed."""
    if options.name == LIST:
        for name in study_names():
            print(f"{name:<11} {load_study(name).question}")
        return 0
    from reca.io.folders import ensure_writable
    from reca.studies import report, runner, slurm
    from reca.studies.check import check
    from reca.studies.plan import plan
    from reca.studies.work import done

    study, asked = load_study(options.name), _asked(options)
    ensure_writable(options.out, "--out")
    command = ["reca", *(word for word in sys.argv[1:] if word not in ("--slurm", "--report"))]
    if options.task:
        print(f"{options.task}: {runner.line(runner.run_one(study, asked, options.task))}")
        return 0
    out = report.folder(study, asked)
    if options.slurm:
        tasks, _ = plan(study, asked)
        check([task for task in tasks if done(task) is None], here=False)
        print(f"submit with: {slurm.write(tasks, command, out, options.recipe is not None, study.name)}")
        return 0
    if options.report:
        found = runner.report_of(study, asked, shlex.join(command))
    else:
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(exits.INTERRUPTED))
        try:
            found = runner.run(study, asked, _slots(options), shlex.join(command))
        finally:
            signal.signal(signal.SIGTERM, before)
    print(report.text(found))
    print((out / "study.html").resolve())
    return int(any("failed" in r for variant in found["variants"] for r in variant["results"].values()))


def _asked(options: argparse.Namespace) -> Any:
    from reca.config.recipe_files import load_recipe
    from reca.studies import published
    from reca.studies.task import Asked

    if not 0 < options.scale <= 1:
        raise StudyError(f"--scale must lie in (0, 1], got {options.scale:g}")
    if options.recipe and not options.suite:
        raise StudyError("--recipe needs --suite: the evaluation suite of the variants, such as geneval")
    if not options.recipe and (options.suite or options.sampling or options.limit is not None):
        raise StudyError(
            "--suite, --sampling and --limit are for --recipe: a toy dataset has its own prompts and judge"
        )
    if options.recipe and options.images_per_prompt != 1:
        raise StudyError(
            "--images-per-prompt is for toy datasets; with --recipe use --sampling or the options of a suite"
        )
    if options.images_per_prompt < 1:
        raise StudyError(f"--images-per-prompt must be at least 1, got {options.images_per_prompt}")
    if options.recipe and options.scale != 1:
        raise StudyError("--scale is for toy datasets; with --recipe use train.steps=N")
    common, of_variant = [], dict[str, tuple[str, ...]]()
    for text in options.overrides:
        key, equals, _ = text.partition("=")
        variant, colon, _ = key.partition(":")
        if colon and equals:
            of_variant[variant] = (*of_variant.get(variant, ()), text[len(variant) + 1 :])
        else:
            common.append(text)
    evaluations = _evaluations(options)
    if options.recipe:
        published.check(options.recipe, evaluations)
    return Asked(
        umm=load_recipe(options.recipe).umm if options.recipe else options.umm,
        seeds=options.seeds,
        out=options.out,
        recipe=options.recipe,
        dataset=options.dataset,
        common=tuple(common),
        of_variant=of_variant,
        evaluations=evaluations,
        scale=options.scale,
    )


def _evaluations(options: argparse.Namespace) -> Any:
    """Collect the evaluation settings from the options."""
    from reca.studies.task import Evaluations

    common = {
        "judge_options": read_pairs(options.judge_option, "--judge-option"),
        "sampling": read_pairs(options.sampling, "--sampling"),
        "limit": options.limit,
    }
    found: dict[str, dict[str, Any]] = {"": common} if options.recipe else {}
    for name, texts in (("data", options.data), ("judge", options.judge)):
        for text in texts:
            suite, equals, value = text.partition("=")
            if suite not in options.suite or not equals:
                raise StudyError(f"--{name} {text!r} must be SUITE=..., where SUITE is one that --suite names")
            found.setdefault(suite, {})[name] = value
    return Evaluations(tuple(options.suite), found, options.images_per_prompt)


def _slots(options: argparse.Namespace) -> Sequence[str | None]:
    from reca.processes import side_by_side

    slots: Sequence[str | None] = side_by_side.gpus() if options.recipe else ()
    slots = slots or side_by_side.cores()
    if options.jobs is None:
        return slots
    if options.jobs < 1:
        raise StudyError(f"--jobs must be at least 1, got {options.jobs}")
    return slots[: options.jobs] if slots[0] is not None else [None] * options.jobs


def _seeds(text: str) -> tuple[int, ...]:
    try:
        listed = text.removesuffix(",").split(",")
        seeds = tuple(map(int, listed)) if "," in text else tuple(range(int(text)))
    except ValueError:
        seeds = ()
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of seeds, or distinct seeds such as 0,1,5 or 5,")
    return seeds
