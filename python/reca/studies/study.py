"""The format of a study: question, findings of the paper, variants, and the claims that are tested."""

from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import reduce
from operator import or_
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

from reca.models import UMMS
from reca.options.fields import RecipeError
from reca.options.names import hint, nearest
from reca.options.values import Scalar, convert, read_yaml
from reca.studies.task import Asked

CATALOG = Path(__file__).parent / "catalog"
BEFORE = "before"  # the variant without post-training
PRETRAINED = "pretrained"  # pre-training on a toy dataset; `pretrained:key=value` applies to it and to all variants
LOSS = "loss"  # measure of every variant that is trained
SETTINGS = ("toy", "published")
EXPECTED = ("higher", "lower", "equal", "not_lower", "not_higher")
Texts = tuple[str, ...]


class StudyError(ValueError):
    """A study that cannot be run as asked."""


@dataclass(frozen=True)
class Finding:
    """A published finding and its source."""

    says: str
    source: str


@dataclass(frozen=True)
class Variant:
    """A variant: one way to post-train.

    about       description
    overrides   recipe overrides in every setting
    toy         further overrides on toy datasets: a list, or a list per dataset or model, without which it is omitted
    published   the same for published weights
    after       variant whose result it continues from; null: the pre-trained model
    pretrained  modification of the pre-trained model, a key of toy.MODIFICATIONS
    longer      factor on the number of steps
    rate        factor on the learning rate
    """

    name: str
    about: str
    overrides: Texts = ()
    toy: Texts | Mapping[str, Texts | None] | None = ()
    published: Texts | Mapping[str, Texts | None] | None = ()
    after: str | None = None
    pretrained: str | None = None
    longer: int = 1
    rate: float = 1.0

    def keys(self, asked: Asked) -> tuple[str, ...] | None:
        """Return the overrides for a model; None if the model has no such variant."""
        own = getattr(self, asked.setting)
        if isinstance(own, Mapping):
            own = own.get(asked.dataset, own.get(asked.umm))
        return None if own is None else (*self.overrides, *own)


@dataclass(frozen=True)
class Claim:
    """A comparison of two variants that the paper predicts.

    measure        name of a measure; a mapping if it depends on the setting
    variant, than  names of the variants; the difference `variant` - `than` is judged
    expect         higher or lower; equal, not_lower or not_higher, each within a margin of `margin` points
    """

    says: str
    measure: str | Mapping[str, str]
    variant: str
    than: str
    expect: str = "higher"
    margin: float = 0.0

    def measured(self, setting: str) -> str | None:
        """Return the measure for a setting; None if the claim cannot be tested there."""
        return self.measure.get(setting) if isinstance(self.measure, Mapping) else self.measure


@dataclass(frozen=True)
class Study:
    """A study.

    umms, datasets  supported models and toy datasets; empty: all
    toy             remark on the toy datasets
    open            open questions
    """

    name: str
    question: str
    paper: tuple[Finding, ...]
    variants: tuple[Variant, ...]
    claims: tuple[Claim, ...]
    umms: Texts = ()
    datasets: Texts = ()
    toy: str | None = None
    open: Texts = ()

    def of(self, asked: Asked) -> tuple[dict[str, tuple[Variant, tuple[str, ...]]], dict[str, str]]:
        """Return the variants of a model with their overrides, and the reasons why it lacks others.

        Raises StudyError for a model or toy dataset that the study does not support.
        """
        umm = asked.umm
        if self.umms and umm not in self.umms:
            raise StudyError(f"the study {self.name} does not support {umm}, only {', '.join(self.umms)}")
        if self.datasets and asked.setting == "toy" and asked.dataset not in self.datasets:
            raise StudyError(
                f"the study {self.name} does not support the toy dataset {asked.dataset!r}: choose --dataset "
                f"{'|'.join(self.datasets)}"
            )
        have: dict[str, tuple[Variant, tuple[str, ...]]] = {}
        omitted: dict[str, str] = {}
        for variant in self.variants:
            keys = variant.keys(asked)
            if keys is None:
                where = f" on the toy dataset {asked.dataset!r}" if asked.setting == "toy" else ""
                omitted[variant.name] = f"{umm} has no such variant{where}"
            elif variant.after in omitted:
                omitted[variant.name] = f"it continues from {variant.after}"
            else:
                have[variant.name] = variant, keys
        return have, omitted


def study_names() -> list[str]:
    return sorted(path.stem for path in CATALOG.glob("*.yaml"))


def load_study(name: str) -> Study:
    """Load a study by name or from a .yaml file. Raises StudyError if it is missing or invalid."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else CATALOG / f"{name}.yaml"
    try:
        return _read(read_yaml(path.read_bytes(), str(path)), path)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        near = nearest(name, study_names())
        way = f"did you mean {near}? Give" if near else "give"
        raise StudyError(f"no study {name!r}: {way} a .yaml file, or one of {', '.join(study_names())}") from error
    except OSError as error:
        raise StudyError(f"study {path} cannot be read ({error.strerror})") from error
    except RecipeError as error:
        raise StudyError(str(error)) from error


def _read(raw: Any, path: Path) -> Study:
    if not isinstance(raw, dict):
        raise StudyError(f"{path} has no keys; a study has {', '.join(f.name for f in fields(Study))}")
    variants = raw.get("variants")
    if not isinstance(variants, dict) or not variants:
        raise StudyError(f"{path}: variants must map names of variants to their settings")
    parts: dict[str, tuple[Any, ...]] = {
        "variants": tuple(
            _make(Variant, entry, f"{path}: variants.{name}", name=name) for name, entry in variants.items()
        )
    }
    for key, kind in (("paper", Finding), ("claims", Claim)):
        entries = [] if raw.get(key) in (None, Scalar("")) else raw[key]
        if not isinstance(entries, list):
            raise StudyError(f"{path}: {key} must be a list")
        parts[key] = tuple(_make(kind, entry, f"{path}: {key}[{i}]") for i, entry in enumerate(entries))
    rest = {key: entry for key, entry in raw.items() if key not in parts}
    study = _make(Study, {"name": Scalar(path.stem)} | rest, str(path), **parts)
    _check(study, path)
    return study


def _make(kind: type, entry: Any, where: str, **made: Any) -> Any:
    """Build a dataclass from a mapping. made: values of further fields."""
    if not isinstance(entry, dict):
        raise StudyError(f"{where}: expected a mapping")
    known = {f.name: f for f in fields(kind) if f.name not in made}
    if unknown := [key for key in entry if key not in known]:
        raise StudyError(f"{where}: unknown key {', '.join(unknown)}; expected {', '.join(known)}")
    if missing := [f.name for f in known.values() if f.default is MISSING and f.name not in entry]:
        raise StudyError(f"{where}: {', '.join(missing)} is missing")
    return kind(**made | {key: _value(raw, known[key].type, key, where) for key, raw in entry.items()})


def _value(raw: Any, wanted: Any, key: str, where: str) -> Any:
    """Convert a value to the type of its field: a string, number or list of strings, or a mapping to these."""
    kinds = get_args(wanted) if get_origin(wanted) in (Union, UnionType) else (wanted,)
    by_name = [kind for kind in kinds if get_origin(kind) is Mapping]
    if by_name and isinstance(raw, dict):
        return {name: _value(part, get_args(by_name[0])[1], f"{key}.{name}", where) for name, part in raw.items()}
    listed = [list[str] if kind == Texts else kind for kind in kinds if kind not in by_name]
    value = convert(raw, reduce(or_, listed), key, where)
    return tuple(value) if isinstance(value, list) else value


def _check(study: Study, path: Path) -> None:
    names = [variant.name for variant in study.variants]
    if not _is_plain(study.name):
        raise StudyError(
            f"{path}: the study name {study.name!r}, which names its folder, must consist of letters, digits, - and _: "
            "rename the file, or write name: NAME in it"
        )
    _check_known(study, path)
    for place, variant in enumerate(study.variants):
        if variant.name in (BEFORE, PRETRAINED):
            raise StudyError(f"{path}: {variant.name!r} is reserved and cannot name a variant")
        if not _is_plain(variant.name):
            raise StudyError(f"{path}: the variant name {variant.name!r} must consist of letters, digits, - and _")
        if variant.longer < 1:
            raise StudyError(f"{path}: longer={variant.longer} of {variant.name} must be at least 1")
        if variant.rate <= 0:
            raise StudyError(f"{path}: rate={variant.rate:g} of {variant.name} must be above 0")
        if variant.after is not None and variant.after not in names[:place]:
            raise StudyError(
                f"{path}: {variant.name} continues from {variant.after}, which must be a variant listed before it"
            )
    for claim in study.claims:
        if claim.expect not in EXPECTED:
            raise StudyError(f"{path}: expect {claim.expect!r} must be one of {', '.join(EXPECTED)}")
        for name in (claim.variant, claim.than):
            if name not in (BEFORE, *names):
                raise StudyError(f"{path}: {claim.says!r} names {name}, which is not a variant")
        if claim.variant == claim.than:
            raise StudyError(f"{path}: {claim.says!r} compares {claim.variant} with itself")
        if claim.margin < 0 or (claim.margin and claim.expect in ("higher", "lower")):
            raise StudyError(
                f"{path}: margin={claim.margin:g} of {claim.says!r} must be at least 0, and is for expect: equal, "
                "not_lower and not_higher"
            )


def _is_plain(name: str) -> bool:
    return name.replace("-", "").replace("_", "").isalnum()


def _check_known(study: Study, path: Path) -> None:
    """Raise StudyError for a model, toy dataset or setting that does not exist. A model may be importable (a.b)."""
    from reca.toy_datasets.dataset import PACKAGES

    named: list[tuple[str, Texts, Collection[str]]]
    named = [("umms", study.umms, UMMS), ("datasets", study.datasets, tuple(PACKAGES))]
    for variant in study.variants:
        for setting, there in (("toy", (*PACKAGES, *UMMS)), ("published", UMMS)):
            if isinstance(own := getattr(variant, setting), Mapping):
                named.append((f"variants.{variant.name}.{setting}", tuple(own), there))
    for i, claim in enumerate(study.claims):
        if isinstance(claim.measure, Mapping):
            named.append((f"claims[{i}].measure", tuple(claim.measure), SETTINGS))
    for key, names, known in named:
        if unknown := [name for name in names if name not in known and (known is SETTINGS or "." not in name)]:
            raise StudyError(
                f"{path}: {key} names {unknown[0]!r}, which is not one of {', '.join(known)}{hint(unknown[0], known)}"
            )
