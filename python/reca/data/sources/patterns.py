"""Expansion of file patterns: a path, a glob, or a numbered range that must be complete."""

import glob
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

from reca.data.errors import DataError
from reca.data.read_ahead import read_ahead, read_many
from reca.data.sources import remote
from reca.data.sources.folder import UNREADABLE, walk
from reca.data.sources.remote import REQUESTS, AnyPath, RemotePath
from reca.data.sources.skipped import Skipped, log_once
from reca.io.paths import is_file

MAX_SHARDS = 1_000_000
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
ANY_FOLDERS = re.compile(r"(?<![^/])\*\*/+")


def expand(spec: str, kind: str = "tar") -> list[AnyPath]:
    """Return the paths that a path, a glob or {000..009} ranges stand for. Raises DataError if one is missing.

    kind: file type, for messages.
    """
    if remote.is_address(spec):
        return _all_there(spec, kind, *remote.find(_ranges(spec)))
    paths: dict[Path, None] = {}  # in order, each once
    missing, skipped = [], Skipped()
    names = [spec] if os.path.exists(spec) else _ranges(spec)
    for name, exists in zip(names, read_many(os.path.exists, names), strict=True):
        found = [name] if exists else _each_once(spec, sorted(_matches(name, skipped)))
        paths |= dict.fromkeys(map(Path, found))
        if not found:
            missing.append(name)
    skipped.only(UNREADABLE).warn(spec)
    return _all_there(spec, kind, list(paths), missing)


def _matches(pattern: str, skipped: Skipped) -> list[str]:
    """Return the names that match a pattern. `**` stands for any folders that are not hidden.

    Each of them is read once. `glob` follows links in circles, and with two of them its time doubles at every turn.
    """
    deep = ANY_FOLDERS.search(pattern)
    if deep is None:
        return glob.glob(pattern)
    start, rest = pattern[: deep.start()], pattern[deep.end() :]
    roots = filter(os.path.isdir, glob.glob(start) if start else ["."])
    folders = (os.path.join(root, folder) for root in roots for folder, _ in walk(Path(root), skipped))
    return [name for folder in folders for name in _matches(os.path.join(glob.escape(folder), rest), skipped)]


def _each_once(spec: str, names: list[str]) -> list[str]:
    """Return the names without those that are links, or in linked folders, to a file that another one names."""
    kept: dict[str, str] = {}
    for name, file in zip(names, read_many(os.path.realpath, names), strict=True):
        if file not in kept or file == os.path.abspath(name):
            kept[file] = name
    once = set(kept.values())
    if links := [name for name in names if name not in once]:
        log_once(
            logging.WARNING, f"{spec}: skipped {len(links)} links to files that match, too (the first: {links[0]})"
        )
    return [name for name in names if name in once]


def _all_there(spec: str, kind: str, paths: Sequence[AnyPath], missing: list[str]) -> list[AnyPath]:
    """Return the paths. Raises DataError if there are none, some are missing, or one is not a file."""
    if not paths:
        hint = ""
        if remote.lists_by_links(spec) and glob.has_magic(spec):
            hint = (
                ": globs need a page of links to the files, and this web server has none there. Write a range, "
                f"such as {{000..099}}.{kind}, or a single URL"
            )
        elif "," in spec or "::" in spec or spec.startswith("pipe:"):
            hint = (
                ": brace alternatives, names joined by commas or ::, and pipe: commands are not supported. Write "
                f"several files as a list of sources, '[{{source: a.{kind}}}, {{source: b.{kind}}}]'"
            )
        raise DataError(f"no {kind} file matches {spec!r}{hint}")
    if missing:
        raise DataError(
            f"{spec}: {len(missing)} of the range are missing: {some(missing)}. Download them, or name a range of "
            "existing files"
        )
    for path, regular in zip(paths, read_ahead(is_file, paths, REQUESTS), strict=True):
        if not regular:
            raise DataError(f"{path} is not a file; expected {spec!r} to name {kind} files")
    return list(paths)


def relative_names(paths: Sequence[AnyPath]) -> list[str]:
    """Return the names of files relative to their deepest common folder."""
    full = [path.path if isinstance(path, RemotePath) else os.path.abspath(path) for path in paths]
    common = os.path.commonpath([os.path.dirname(name) for name in full])
    return [os.path.relpath(name, common) if common else name for name in full]


def _ranges(spec: str) -> list[str]:
    """Return the names that the ranges in `spec` expand to."""
    names = [""]
    end = 0
    for match in RANGE.finditer(spec):
        first, last = match.groups()
        numbers = range(int(first), int(last) + 1)
        if not numbers:
            raise DataError(f"{spec}: the range {match[0]} is empty; write the smaller number first")
        if len(names) * len(numbers) > MAX_SHARDS:
            raise DataError(f"{spec}: {match[0]} expands to more than {MAX_SHARDS} names")
        between = spec[end : match.start()]
        names = [f"{name}{between}{str(n).zfill(len(first))}" for name in names for n in numbers]
        end = match.end()
    return [name + spec[end:] for name in names]


def some(paths: Sequence[AnyPath | str]) -> str:
    """Return the first five names, and the total number if there are more."""
    shown = ", ".join(map(str, paths[:5]))
    return shown if len(paths) <= 5 else f"{shown}, … ({len(paths)})"
