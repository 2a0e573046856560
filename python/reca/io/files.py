"""Identify files by their first bytes, hash them, and explain what to do about unusable ones."""

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reca import units
from reca.errors import first_line
from reca.io.paths import exists

HEAD = 1 << 10  # bytes that identify a file
CHUNK = 8 << 20  # bytes that are read at once
DOWNLOADS = (".incomplete", ".part", ".partial", ".crdownload", ".download", ".aria2", ".tmp")
AGAIN = "fetch it again"

# first bytes -> what the file is
_ARCHIVES = {
    b"\x1f\x8b": "compressed by gzip",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"7z\xbc\xaf": "a 7-Zip archive",
    b"Rar!": "a RAR archive",
}
_ZIP = b"PK\x03\x04"  # also the format of torch.save
# first bytes -> what the file is, what to give instead
_NO_WEIGHTS = {
    b"\x89HDF": ("an HDF5 file of Keras or TensorFlow", "the PyTorch or safetensors file"),
    b"GGUF": ("a GGUF file of llama.cpp", "the PyTorch or safetensors file"),
    b"\x93NUMPY": ("a NumPy array", "the PyTorch or safetensors file"),
    b"\x89PNG": ("an image", "the file of the weights"),
    b"\xff\xd8\xff": ("an image", "the file of the weights"),
    b"%PDF": ("a PDF", "the file of the weights"),
}


def is_safetensors(head: bytes) -> bool:
    """Tell whether a file that begins with `head` is safetensors: 8 bytes of header length below 100 MB, then JSON."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 100_000_000


def size_of(path: Path) -> str:
    """Format the size of a file, such as 132 bytes or 5.82 GiB."""
    return units.size(path.stat().st_size)


def sha256(path: Path) -> str:
    """Hash the contents of a file, as hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def git_hash(content: bytes) -> str:
    """Return the SHA-1 that git gives a file with this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def placeholder(head: bytes) -> str | None:
    """Describe the placeholder that a file with these first bytes is, and what to do; None if it is none.

    For example "is a Git LFS pointer and not the file itself; run `git lfs pull` …".
    """
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return f"is empty: its download or copy did not finish; {AGAIN}"
    if head.startswith((b"version https://git-lfs", b"version http://git-media", b"# xet version")):
        return (
            "is a Git LFS pointer and not the file itself; run `git lfs pull` in its repository, or get it with "
            "`hf download`"
        )
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml", b"<body", b"<error")) and b"<svg" not in text:
        return f"is a web page (an error or login page, saved instead of the file); {AGAIN}"
    if not head.strip(b"\0"):
        return f"begins with only zeros: its download or copy did not finish; {AGAIN}"
    return None


def packed(head: bytes, zipped: bool = True) -> str | None:
    """Describe a file that has to be unpacked first, like `placeholder`. zipped: include zip archives."""
    what = next((what for magic, what in _ARCHIVES.items() if head.startswith(magic)), None)
    if zipped and head.startswith(_ZIP):
        what = "a zip archive"
    return what and f"is {what}; unpack it first"


def damage(path: Path) -> str | None:
    """Describe what is wrong with a file that should contain weights or JSON, with its size; None if nothing is."""
    with path.open("rb") as file:
        head = file.read(HEAD)
    cause = None if is_safetensors(head) else placeholder(head) or packed(head, zipped=False) or _foreign(head)
    if cause is None and path.suffix in DOWNLOADS:
        cause = f"is a download that has not finished; {AGAIN}"
    return cause and f"({size_of(path)}) {cause}"


def _foreign(head: bytes) -> str | None:
    found = (f"is {what}; give {instead}" for magic, (what, instead) in _NO_WEIGHTS.items() if head.startswith(magic))
    return next(found, None)


def pickle_damage(path: Path) -> str:
    """Describe a damaged directory or pickle of a torch.save archive, by its checksum; empty if both are sound."""
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith("data.pkl"):
                    archive.read(name)
    except OSError:
        raise
    except Exception as error:  # zipfile and struct raise many types for damaged archives
        return first_line(error)
    return ""


def lost_links(folder: Path) -> str:
    """Describe the links of a folder whose targets are missing, as the end of a message; empty if there is none.

    A folder of the hub's cache that was copied without its blobs has only such links.
    """
    lost = sorted(path.name for path in folder.iterdir() if not exists(path))
    return f"; the targets of its links are missing ({', '.join(lost[:3])}): copy it with `cp -rL`" if lost else ""


def parse_json(data: bytes | str, parse_constant: Callable[[str], Any] | None = None) -> Any:
    """Parse JSON. Raises ValueError, also for JSON that is nested too deeply to be parsed.

    parse_constant: as in json.loads.
    """
    try:
        return json.loads(data, parse_constant=parse_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises ValueError with file, size and cause if there is none."""
    try:
        content = parse_json(path.read_bytes())
    except ValueError as error:
        cause = damage(path) or f"({size_of(path)}) is not JSON ({error}); {AGAIN}"
        raise ValueError(f"{path} {cause}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} ({size_of(path)}) contains a JSON {type(content).__name__}, not an object; {AGAIN}")
    return content
