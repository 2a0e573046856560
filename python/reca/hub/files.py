"""Files of a hub repository: list them, find those that are on this machine, and fetch the rest."""

import fcntl
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from reca.data.errors import DataError
from reca.io.files import sha256
from reca.io.paths import is_file

# Smaller files are left to huggingface_hub, which fetches several at once, but does not resume interrupted ones.
RESUMED = 2**30
# Larger files are available only through the hub's own protocol (hf_xet).
LARGEST = 50_000_000_000


@dataclass(frozen=True)
class HubFile:
    """One file of a repository."""

    name: str
    size: int
    digest: str  # its name in the cache: the SHA-256 of a large file, git's hash of a small one
    large: bool  # whether digest is a SHA-256


@dataclass(frozen=True)
class Listing:
    """The requested files of a repository."""

    repository: str
    kind: str
    commit: str
    files: list[HubFile]
    licence: str | None
    gated: bool


def list_files(repository: str, kind: str, file: str, patterns: list[str] | None) -> Listing:
    """Query the hub for the requested files, their sizes, and the licence and gating of the repository.

    Raises errors of huggingface_hub if the hub cannot be reached or refuses access, and DataError if no file matches.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import filter_repo_objects

    info: Any = HfApi().repo_info(repository, repo_type=kind, files_metadata=True)
    names = filter_repo_objects((one.rfilename for one in info.siblings), allow_patterns=[file] if file else patterns)
    wanted = set(names)
    files = [
        HubFile(
            one.rfilename,
            one.size or 0,
            one.lfs.sha256 if one.lfs else one.blob_id,
            one.lfs is not None,
        )
        for one in info.siblings
        if one.rfilename in wanted
    ]
    if not files:
        what = file or f"file that matches {', '.join(patterns or ['*'])}"
        raise DataError(f"{repository} has no {what}; see its page on the hub, and name another file")
    licence = info.card_data.get("license") if info.card_data else None
    if isinstance(licence, list):
        licence = ", ".join(licence)
    return Listing(repository, kind, info.sha, files, licence, bool(info.gated))


def check_access(listing: Listing) -> None:
    """Check that this user may download a gated repository. Raises the errors of huggingface_hub."""
    from huggingface_hub import HfApi

    if listing.gated:
        HfApi().auth_check(listing.repository, repo_type=listing.kind)


def local_folder(listing: Listing | None, to: Path | None = None) -> Path:
    """Return the folder for a repository's files, below `to` or in the cache; for None, the cache itself."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    if listing is None:
        return Path(constants.HF_HUB_CACHE)
    if to is not None:
        return to / listing.repository.split("/")[1]
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=listing.repository, repo_type=listing.kind)


def _place(listing: Listing, file: HubFile, to: Path | None) -> Path:
    """Return the path of a file's content when it is complete."""
    folder = local_folder(listing, to)
    return folder / file.name if to is not None else folder / "blobs" / file.digest


def _part(place: Path) -> Path:
    return place.with_name(f"{place.name}.incomplete")


def missing_bytes(listing: Listing, to: Path | None) -> int:
    """Count the bytes that are still to be fetched, without those of partial downloads."""
    count = 0
    for file in listing.files:
        place = _place(listing, file, to)
        if is_file(place) and place.stat().st_size == file.size:
            continue
        part = _part(place)
        count += file.size - (min(part.stat().st_size, file.size) if is_file(part) else 0)
    return count


def bring(listing: Listing, file: str, patterns: list[str] | None, to: Path | None) -> Path:
    """Fetch the missing files, and return the folder of the files.

    Large files are fetched first, each into a partial file that the next call resumes. huggingface_hub then finds them
    in place, fetches the small ones and completes the folder or the cache.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    for one in listing.files:
        if one.large and RESUMED <= one.size <= LARGEST:
            _fetch(listing, one, _place(listing, one, to))
    repository, kind = listing.repository, listing.kind
    folder = None if to is None else local_folder(listing, to)
    if file:
        path = Path(hf_hub_download(repository, file, repo_type=kind, local_dir=folder))
        return path.parents[len(Path(file).parts) - 1]
    return Path(snapshot_download(repository, repo_type=kind, local_dir=folder, allow_patterns=patterns))


def _fetch(listing: Listing, file: HubFile, place: Path) -> None:
    """Fetch one large file to its place, resuming an earlier call.

    Raises DataError if another process is fetching it, or if its SHA-256 is not the one that the hub announced.
    """
    if is_file(place) and place.stat().st_size == file.size:
        return
    part = _part(place)
    part.parent.mkdir(parents=True, exist_ok=True)
    with part.open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"{part} is being fetched by another process; wait for it") from error
        except OSError:  # a file system without locks
            pass
        with part.open("r+b") as out:
            _transfer(listing, file, out)
        if sha256(part) != file.digest:
            part.unlink()
            raise DataError(
                f"{file.name} of {listing.repository} has another SHA-256 than the hub announces; repeat the command "
                "to fetch it again"
            )
        part.replace(place)


def _transfer(listing: Listing, file: HubFile, out: BinaryIO) -> None:
    from urllib.parse import urlparse

    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(listing.repository, file.name, repo_type=listing.kind, revision=listing.commit)
    if out.seek(0, 2) > file.size:
        out.truncate(0)
    while True:
        location = get_hf_file_metadata(url).location  # a signed URL, which expires
        headers = build_hf_headers()
        if urlparse(location).netloc != urlparse(url).netloc:
            headers.pop("authorization", None)  # the storage of large files needs only the signature
        here = out.seek(0, 2)
        try:
            return http_get(
                location, out, resume_size=here, headers=headers, expected_size=file.size, displayed_filename=file.name
            )
        except HfHubHTTPError:
            if out.seek(0, 2) == here:
                raise  # nothing was received, so the cause is not an expired URL
