"""Download files of suites that are not shipped, from the benchmarks' own repositories: `reca get suite`.

Every file is verified against the git hash in GitHub's list of the commit's files.
"""

import fnmatch
import http.client
import os
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from tqdm import tqdm

from reca import units
from reca.catalog import SUITES, SuiteFiles
from reca.data.errors import DataError
from reca.io.files import git_hash, parse_json
from reca.io.folders import ensure_writable, write_atomically
from reca.io.paths import is_file
from reca.options.fields import RecipeError
from reca.options.names import hint

API, FILES = "https://api.github.com", "https://raw.githubusercontent.com"
FOLDER = Path("benchmarks")
TIMEOUT, TRIES, AT_ONCE = 60, 3, 8  # seconds per request, attempts, concurrent downloads


class File(NamedTuple):
    """A file of a commit. digest: its git hash."""

    path: str
    size: int
    digest: str


def get(suite: str, to: Path | None = None, dry_run: bool = False) -> Path:
    """Download the missing files of a suite. Print and return the value for `--data`.

    to: parent of the suite's folder; ./benchmarks by default. dry_run: print only.
    Raises RecipeError if the suite has no files on GitHub; DataError if GitHub cannot be reached or lacks them, or if a
    file's hash differs. Downloaded files are kept.
    """
    if suite not in SUITES:
        raise RecipeError(
            f"there are no files to download for {suite!r}; there are for {', '.join(SUITES)}{hint(suite, SUITES)}"
        )
    source, folder = SUITES[suite], (to or FOLDER) / suite
    commit, files = list_files(source)
    missing = [file for file in files if not _is_here(folder / file.path, file)]
    print(
        f"{source.repository} at {commit[:12]}: {units.size(sum(file.size for file in files))} in {len(files)} files, "
        f"licence: {source.licence or 'none named'}; {units.size(sum(file.size for file in missing))} to fetch"
    )
    paths = [folder / file.path for file in files]
    data = paths[0] if len(paths) == 1 else Path(os.path.commonpath([path.parent for path in paths]))
    if not dry_run:
        ensure_writable(folder, "--to")
        with ThreadPoolExecutor(AT_ONCE) as pool, tqdm(total=len(missing), unit="file", disable=None) as bar:
            try:
                for _ in pool.map(lambda file: _bring(source, commit, file, folder), missing):
                    bar.update()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # the others would fail in the same way
                raise
    if source.note:
        print(source.note)
    print(f"--data {data}")
    return data


def list_files(source: SuiteFiles) -> tuple[str, list[File]]:
    """Return the commit of the source's revision and the files that match its patterns, both from GitHub's API."""
    place = f"{API}/repos/{source.repository}"
    commit = _json(source, f"{place}/commits/{source.revision}", "sha")
    tree = _json(source, f"{place}/git/trees/{commit}?recursive=1", "tree")
    files = [
        File(one["path"], int(one.get("size", 0)), one["sha"])
        for one in tree
        if one.get("type") == "blob" and any(fnmatch.fnmatchcase(one["path"], pattern) for pattern in source.files)
    ]
    if not files:
        raise DataError(f"{source.repository} at {commit} has no {' or '.join(source.files)}. {_by_hand(source)}")
    return str(commit), files


def _bring(source: SuiteFiles, commit: str, file: File, folder: Path) -> None:
    content = _read(source, f"{FILES}/{source.repository}/{commit}/{quote(file.path)}")
    if git_hash(content) != file.digest or content.startswith(b"version https://git-lfs"):
        raise DataError(f"{file.path} of {source.repository}: the download has another git hash. {_by_hand(source)}")
    path = folder / file.path
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content, sync=False)


def _is_here(path: Path, file: File) -> bool:
    return is_file(path) and path.stat().st_size == file.size and git_hash(path.read_bytes()) == file.digest


def _json(source: SuiteFiles, url: str, key: str) -> Any:
    """Fetch JSON from GitHub's API and return the value of a key."""
    content = _read(source, url)
    try:
        return parse_json(content)[key]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{url} did not answer in the format of GitHub's API. {_by_hand(source)}") from error


def _read(source: SuiteFiles, url: str) -> bytes:
    """Fetch a URL. Raises DataError after the last attempt, or at once for errors that a retry cannot fix."""
    for number in range(TRIES):
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
                return answer.read()
        except urllib.error.HTTPError as refusal:
            reason = f"HTTP {refusal.code}"
            if refusal.code in (403, 429):
                reason += ": GitHub allows 60 requests an hour; run the same command later to continue"
            if refusal.code < 500:
                break
        except (OSError, http.client.HTTPException) as failure:  # URLError and TimeoutError are OSErrors
            reason = str(getattr(failure, "reason", failure)) or type(failure).__name__
        if number + 1 < TRIES:
            time.sleep(2.0**number)
    raise DataError(f"{url} cannot be fetched ({reason}). Downloaded files are kept. {_by_hand(source)}")


def _by_hand(source: SuiteFiles) -> str:
    wanted = " and ".join(source.files)
    return f"Manual download: `git clone https://github.com/{source.repository}`, then pass its {wanted} as --data"
