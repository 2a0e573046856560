"""Registry of judges. Only the judge that the user names is called; a toy dataset uses its own by default."""

import inspect
import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from reca.eval.errors import OptionError
from reca.eval.judges.base import Judge
from reca.eval.suites import Item, Suite
from reca.options.names import hint, option
from reca.options.sampling import check_sampling_options

# name -> (module, class, argument after the colon, description)
JUDGES: dict[str, tuple[str, str, str, str]] = {
    "toy": ("toy", "ToyJudge", "", "the toy datasets' own detector"),
    "mask2former": ("detectors", "Mask2FormerJudge", "FILE", "GenEval's own detector and colour classifier"),
    "grounding_dino": ("detectors", "GroundingDinoJudge", "MODEL", "an approximate detector for GenEval"),
    "owlv2": ("detectors", "Owlv2Judge", "MODEL", "an approximate detector for GenEval"),
    "endpoint": ("endpoint", "EndpointJudge", "URL", "a vision-language model behind an OpenAI-compatible endpoint"),
    "local": ("local_vlm", "LocalVlmJudge", "MODEL", "a vision-language model in transformers"),
    "recorded": ("recorded", "RecordedJudge", "FILE", "previously recorded answers"),
}
KINDS = {
    "detector": ("mask2former", "grounding_dino", "owlv2"),
    "vlm": ("endpoint", "local"),
    "toy": ("toy",),
}


def check_judge(spec: str | None, options: Mapping[str, Any], suite: Suite) -> tuple[str, str, dict[str, Any]]:
    """Return (name, argument, options) of the judge NAME or NAME:ARGUMENT for a suite, without loading anything.

    options: keyword arguments of its class.
    Raises EvaluationError if the suite needs a judge and none is named, or if a file does not exist; ValueError if the
    judge does not support the suite, or if its argument or options are invalid.
    """
    if spec is None and suite.judge_kind == "toy":
        spec = "toy"
    if spec is None:
        raise OptionError(f"{suite.name} needs a judge: set {option('judge')} to one of {_list(suite)}.{_exact(suite)}")
    name, _, argument = spec.partition(":")
    if name not in JUDGES or (name != "recorded" and name not in KINDS[suite.judge_kind]):
        raise ValueError(
            f"{option('judge', name)} does not support {suite.name}; use one of {_list(suite)}.{_exact(suite)}"
            f"{hint(name, [*KINDS[suite.judge_kind], 'recorded'])}"
        )
    wanted = JUDGES[name][2]
    if bool(argument) != bool(wanted):
        raise ValueError(f"{option('judge', spec)}: expected {name}{':' + wanted if wanted else ''}")
    judge, argument = _class(name), os.path.expanduser(argument)
    given = check_sampling_options(judge, options, "judge option")
    judge.check(argument, **given)
    return name, argument, given


def open_judge(
    spec: str | None, options: Mapping[str, Any], suite: Suite, items: Sequence[Item], device: torch.device | str
) -> Judge:
    """Open a judge; see `check_judge`."""
    name, argument, given = check_judge(spec, options, suite)
    judge = _class(name)
    if name == "recorded":
        return judge(Path(argument), suite, items)
    if "device" in inspect.signature(judge).parameters:
        opened = judge(argument, device, **given)
        opened.exact = opened.exact or (name == "local" and Path(argument).name in suite.exact_models)
        return opened
    return judge(argument, **given) if argument else judge(**given)


def _class(name: str) -> Any:
    module, kind, *_ = JUDGES[name]
    return getattr(import_module(f"reca.eval.judges.{module}"), kind)


def _list(suite: Suite) -> str:
    names = (*KINDS[suite.judge_kind], "recorded")
    return ", ".join(f"{n}{':' + JUDGES[n][2] if JUDGES[n][2] else ''} ({JUDGES[n][3]})" for n in names)


def _exact(suite: Suite) -> str:
    return f" Published numbers come from {suite.exact_judge}." if suite.exact_judge else ""
