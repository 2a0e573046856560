"""Registry of suites, one file per benchmark."""

from pathlib import Path
from urllib.parse import parse_qsl

from reca.eval.suites.base import Item, Key, Score, Suite, Value
from reca.eval.suites.dpg import Dpg
from reca.eval.suites.gedit import GEdit
from reca.eval.suites.geneval import GenEval, GenEvalLong
from reca.eval.suites.geneval2 import GenEval2
from reca.eval.suites.imgedit import ImgEdit
from reca.eval.suites.mme import Mme
from reca.eval.suites.pope import Pope
from reca.eval.suites.t2i_compbench import T2ICompBench
from reca.eval.suites.toy import DEFAULT, Toy
from reca.eval.suites.wise import Wise, WiseLegacy
from reca.options.names import hint, nearest
from reca.toy_datasets.dataset import PACKAGES

__all__ = ["SUITES", "Item", "Key", "Score", "Suite", "Value", "open_suite"]

SUITES: dict[str, type[Suite]] = {
    suite.name: suite
    for suite in (
        Toy, GenEval, GenEvalLong, GenEval2, Dpg, T2ICompBench, Wise, WiseLegacy, ImgEdit, GEdit, Mme, Pope,
    )
}  # fmt: skip


def open_suite(name: str, data: Path | None = None) -> Suite:
    """Open a suite by name; "toy?dataset=emoji&seed=1" is the toy dataset emoji with seed 1.

    data: the user's file or folder of the benchmark. Raises ValueError for an unknown name or invalid options.
    """
    base, _, query = name.partition("?")
    if base not in SUITES:
        near = nearest(base, SUITES)
        way = f"did you mean {near}? The" if near else "the"
        raise ValueError(f"there is no suite {base!r}; {way} suites are {', '.join(SUITES)}")
    if not query:
        return SUITES[base](data)
    try:
        given = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=True))
        dataset, seed = given.pop("dataset", DEFAULT), int(given.pop("seed", 0))
        if base == Toy.name and not given and seed >= 0 and dataset in PACKAGES:
            return Toy(data, dataset, seed)
    except ValueError:
        pass
    raise ValueError(
        f"suite {name!r}: only the toy datasets have options, such as toy?dataset=emoji&seed=1; the datasets are "
        f"{', '.join(PACKAGES)}{hint(dict(parse_qsl(query)).get('dataset'), PACKAGES)}"
    )
