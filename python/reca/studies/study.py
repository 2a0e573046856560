"""A study as data: what is asked, what the paper says, the arms, and the claims that its figures are held against."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from reca import exits
from reca.studies.task import Asked

CATALOG = Path(__file__).parent / "catalog"
BEFORE = "before"  # the arm that is not trained
START = "start"  # the embedded world's pre-training; `start:key=value` holds for it and for every arm
SETTINGS = ("world", "published")
EXPECTED = ("higher", "lower", "equal", "not_lower", "not_higher")


class StudyError(ValueError):
    """A study that cannot be run as asked."""

    exit_code = exits.USAGE


@dataclass(frozen=True)
class Said:
    """One thing that was found elsewhere, and where."""

    says: str
    source: str


@dataclass(frozen=True)
class Arm:
    """One way to post-train.

    about      a sentence
    overrides  recipe keys, everywhere
    world      more of them in an embedded world: a list, or one for each world or model, which others then have not
    published  the same at real size
    after      the arm whose result it goes on from; null: the start of the study
    start      variant of the embedded world's start, see world.VARIANTS
    longer     times as many steps as the others make
    rate       times their learning rate
    """

    name: str
    about: str
    overrides: tuple[str, ...] = ()
    world: Any = ()
    published: Any = ()
    after: str | None = None
    start: str | None = None
    longer: int = 1
    rate: float = 1.0

    def keys(self, asked: Asked) -> tuple[str, ...] | None:
        """Return the overrides of a model; None if the model has no such arm."""
        own = getattr(self, asked.setting)
        if isinstance(own, Mapping):
            own = own.get(asked.world, own.get(asked.umm))
        return None if own is None else (*self.overrides, *own)


@dataclass(frozen=True)
class Claim:
    """What the paper lets expect of two arms.

    measure  the name of a measure; by setting, if they differ
    arm, than  the two arms: `arm` minus `than` is judged
    expect   higher or lower; equal, not_lower or not_higher, each by at most `margin` points
    """

    says: str
    measure: Any
    arm: str
    than: str
    expect: str = "higher"
    margin: float = 0.0

    def measured(self, setting: str) -> str | None:
        """Name what is measured in a setting; None: nothing there can tell."""
        return self.measure.get(setting) if isinstance(self.measure, Mapping) else self.measure


@dataclass(frozen=True)
class Study:
    """A study.

    umms, worlds  the models and embedded worlds it can be run with; none named: all
    open          what nobody has shown yet
    """

    name: str
    question: str
    paper: tuple[Said, ...]
    arms: tuple[Arm, ...]
    claims: tuple[Claim, ...]
    umms: tuple[str, ...] = ()
    worlds: tuple[str, ...] = ()
    world: str | None = None
    open: tuple[str, ...] = field(default=())

    def of(self, asked: Asked) -> tuple[dict[str, tuple[Arm, tuple[str, ...]]], dict[str, str]]:
        """Return the arms of a model with their overrides, and why it has not the others.

        Raises StudyError for a model or a world that the study is not for.
        """
        umm = asked.umm
        if self.umms and umm not in self.umms:
            raise StudyError(f"the study {self.name} is of {', '.join(self.umms)}: {umm} has not what it varies")
        if self.worlds and asked.setting == "world" and asked.world not in self.worlds:
            raise StudyError(
                f"the study {self.name} is not of the world {asked.world!r}: --world {'|'.join(self.worlds)}"
            )
        have: dict[str, tuple[Arm, tuple[str, ...]]] = {}
        omitted: dict[str, str] = {}
        for arm in self.arms:
            keys = arm.keys(asked)
            if keys is None:
                where = f" in the world {asked.world!r}" if asked.setting == "world" else ""
                omitted[arm.name] = f"{umm} has no such arm{where}"
            elif arm.after in omitted:
                omitted[arm.name] = f"it goes on from {arm.after}"
            else:
                have[arm.name] = arm, keys
        return have, omitted


def study_names() -> list[str]:
    return sorted(path.stem for path in CATALOG.glob("*.yaml"))


def load_study(name: str) -> Study:
    """Read a study by name, or from a .yaml file. Raises StudyError for one that is not there or not as expected."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else CATALOG / f"{name}.yaml"
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StudyError(f"no study {name!r}: give a .yaml file, or one of {', '.join(study_names())}") from error
    except (yaml.YAMLError, UnicodeError) as error:
        raise StudyError(f"{path} is not YAML: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(raw, dict):
        raise StudyError(f"{path} holds no keys; a study has {', '.join(f.name for f in fields(Study))}")
    made = {"name": path.stem, **raw}
    for key, kind in (("paper", Said), ("claims", Claim)):
        made[key] = tuple(_make(kind, entry, f"{path}: {key}") for entry in made.get(key) or ())
    arms = made.get("arms")
    if not isinstance(arms, dict) or not arms:
        raise StudyError(f"{path}: arms must map names to what they change, got {arms!r}")
    made["arms"] = tuple(_make(Arm, {"name": key, **(entry or {})}, f"{path}: arms") for key, entry in arms.items())
    study = _make(Study, made, str(path))
    _check(study, path)
    return study


def _make(kind: type, entry: Any, where: str) -> Any:
    """Make a dataclass of a mapping, whose lists become tuples."""
    if not isinstance(entry, dict):
        raise StudyError(f"{where}: expected a mapping, got {entry!r}")
    known = {f.name: f for f in fields(kind)}
    if unknown := [key for key in entry if key not in known]:
        raise StudyError(f"{where}: unknown key {', '.join(map(str, unknown))}; there are {', '.join(known)}")
    needed = [n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in needed if entry.get(name) is None]:
        raise StudyError(f"{where}: {', '.join(missing)} is missing")
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()})


def _check(study: Study, path: Path) -> None:
    names = [arm.name for arm in study.arms]
    for place, arm in enumerate(study.arms):
        if arm.name in (BEFORE, START):
            raise StudyError(f"{path}: an arm cannot have the name {arm.name!r}, which every study has")
        if not arm.name.replace("-", "").replace("_", "").isalnum():
            raise StudyError(f"{path}: the name of the arm {arm.name!r} must be letters, digits, - and _")
        if type(arm.longer) is not int or arm.longer < 1:
            raise StudyError(f"{path}: longer={arm.longer!r} of {arm.name} must be a whole number, at least 1")
        if type(arm.rate) not in (int, float) or not 0 < arm.rate < math.inf:
            raise StudyError(f"{path}: rate={arm.rate!r} of {arm.name} must be a number above 0")
        if arm.after is not None and arm.after not in names[:place]:
            raise StudyError(f"{path}: {arm.name} goes on from {arm.after}, which must be an arm before it")
    for claim in study.claims:
        if claim.expect not in EXPECTED:
            raise StudyError(f"{path}: expect {claim.expect!r} must be one of {', '.join(EXPECTED)}")
        for name in (claim.arm, claim.than):
            if name not in (BEFORE, *names):
                raise StudyError(f"{path}: {claim.says!r} speaks of {name}, which is no arm")
