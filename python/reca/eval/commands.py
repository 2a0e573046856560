"""`reca eval`."""

import argparse

from reca.arguments import OR_RUN, Listed, path_text, takes_overrides, takes_pairs
from reca.eval.suites import SUITES
from reca.options.sampling import read_pairs


def add(sub: argparse.ArgumentParser) -> None:
    """Add the options of `reca eval`."""
    sub.add_argument("suite", help=f"{', '.join(SUITES)}; toy?dataset=emoji&seed=1: the toy dataset emoji, seed 1")
    sub.add_argument("recipe", type=path_text, help=OR_RUN)
    takes_overrides(sub)
    sub.add_argument(
        "--against", metavar="RUN|base", help="compare with: base, a run, a recipe, or an evaluation folder"
    )
    sub.add_argument(
        "--judge",
        metavar="NAME[:ARGUMENT]",
        help="judge of the images: mask2former:FILE, grounding_dino:MODEL, owlv2:MODEL, endpoint:URL, local:MODEL or "
        "recorded:FILE (default: that of a toy dataset; others need one)",
    )
    takes_pairs(sub, "--judge-option", "option of the judge")
    sub.add_argument(
        "--steps",
        type=Listed(_steps),
        default="generate,judge,score,report",
        metavar="STEP[,STEP...]",
        help="steps to run, of generate, judge, score and report, separated by commas (default: all)",
    )
    sub.add_argument("--images", type=path_text, metavar="DIR", help="existing images, in the benchmark's own layout")
    sub.add_argument("--records", type=path_text, metavar="FILE", help="existing records or a result file")
    sub.add_argument("--data", type=path_text, metavar="PATH", help="files of a benchmark that are not shipped")
    sub.add_argument("--out", type=path_text, metavar="DIR", help="output folder (default: RUN/eval/STEP/SUITE)")
    sub.add_argument(
        "--images-per-item", type=int, metavar="N", help="images per prompt (default: that of the benchmark)"
    )
    sub.add_argument(
        "--limit", type=int, metavar="N", help="number of items, spread evenly over the suite (default: all)"
    )
    sub.add_argument("--partial", action="store_true", help="score the available images although some are missing")
    sub.add_argument(
        "--seed",
        type=int,
        metavar="N",
        default=0,
        help="base seed, from which every image's seed is derived (default: %(default)s)",
    )
    takes_pairs(sub, "--sampling", "sampling option of the model")


def _steps(text: str) -> list[str]:
    steps = [step.strip() for step in text.split(",")]
    if not all(steps):
        raise argparse.ArgumentTypeError(
            f"{text!r} has an empty item; expected steps separated by commas alone, such as judge,score"
        )
    return steps


def run(options: argparse.Namespace) -> None:
    """Run the evaluation and print the report."""
    from reca import api, distributed
    from reca.eval import report

    suite, source = (str(name).partition("?")[0] in SUITES for name in (options.suite, options.recipe))
    if source and not suite:
        raise ValueError(f"the suite stands before the model: reca eval {options.recipe} {options.suite}")
    found = api.evaluate(
        options.suite,
        options.recipe,
        options.overrides,
        against=options.against,
        judge=options.judge,
        judge_options=read_pairs(options.judge_option, "--judge-option"),
        steps=options.steps,
        images=options.images,
        records=options.records,
        data=options.data,
        out=options.out,
        images_per_item=options.images_per_item,
        limit=options.limit,
        sampling=read_pairs(options.sampling, "--sampling"),
        seed=options.seed,
        partial=options.partial,
        ema=options.ema,
    )
    if found is not None and "report" in options.steps:
        print(report.text(found))
    distributed.shut_down()
