"""Upload of an export to the Hugging Face hub: `reca export --push`.

huggingface_hub provides the token (`hf auth login`, or HF_TOKEN). It is never printed: messages are composed here
rather than taken from the library.
"""

import contextlib
import glob
import hashlib
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from reca import exits, units
from reca.io.files import git_hash, sha256
from reca.models.common.hub import cause_of, with_causes

OF_THE_HUB = (".gitattributes",)  # files that the hub adds to every repository


class PushError(ValueError):
    """The export could not be uploaded. The local export is complete; the message says what to do."""

    exit_code = exits.DATA


def check(repository: str) -> None:
    """Check before weights are loaded whether this user may write to a repository.

    Raises PushError if the name is invalid, there is no token, the hub cannot be reached, or it would deny the upload.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    owner, slash, name = repository.partition("/")
    try:
        validate_repo_id(repository)
    except HFValidationError:
        name = ""
    if not (owner and slash and name):
        raise PushError(f"--push {repository!r} is not a repository name: pass OWNER/NAME, such as me/show-o-reca")
    try:
        user = HfApi().whoami()
    except Exception as error:  # huggingface_hub's own errors and those of its HTTP library
        raise PushError(f"nothing can be uploaded to {repository}: {_cause(error)}") from error
    token = user.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        raise PushError(
            f"nothing can be uploaded to {repository}: the token {token.get('displayName')!r} is read-only; create one "
            "with write access (huggingface.co/settings/tokens), then run `hf auth login`"
        )
    owners = [user["name"], *(group["name"] for group in user.get("orgs", ()))]
    if owner not in owners:
        raise PushError(f"nothing can be uploaded to {repository}: you can write to {', '.join(owners)}, not {owner}")


def push(folder: Path, names: Sequence[str], repository: str, public: bool = False, update: bool = False) -> str:
    """Upload files of a folder and verify that the hub has them. Return the repository's URL.

    names: file names, relative to the folder. public: visibility of a new repository; existing ones are unchanged.
    update: allow a commit to a repository that has other files, or the same ones with other contents.

    Files that are already uploaded are skipped. Raises PushError if the upload fails, and if the repository has other
    contents and `update` is not set.
    """
    from huggingface_hub import HfApi

    api, names = HfApi(), sorted(set(names))
    sizes = {name: (folder / name).stat().st_size for name in names}
    again = (
        f"{folder} is complete, and uploaded files are kept; repeat the command to continue, or run "
        f"`hf upload {repository} {folder}` to upload without exporting again"
    )
    try:
        there = _contents(api, repository)
        same = [name for name in names if there and _is(folder / name, there.get(name))]
        other = [name for name in there or () if name not in same and name not in OF_THE_HUB]
        if other and not update:
            raise PushError(
                f"{repository} already has other files ({units.some(other)}); pass --update to commit on "
                f"top of them (its history keeps them), or another name. {folder} is complete, nothing was uploaded"
            )
        state = "exists" if there is not None else f"will be created as {'public' if public else 'private'}"
        left = sum(size for name, size in sizes.items() if name not in same)
        print(
            f"{units.size(sum(sizes.values()))} in {len(names)} files to {repository}, which {state}; "
            f"{units.size(left)} to upload",
            flush=True,
        )
        address = api.create_repo(repository, private=not public, exist_ok=True)
        if len(same) < len(names):
            _upload(api, folder, names, repository)
        there = _contents(api, repository) or {}
    except PushError:
        raise
    except Exception as error:  # huggingface_hub's own errors and those of its HTTP library
        raise PushError(f"the upload to {repository} failed: {_cause(error)}. {again}") from error
    if missing := [name for name in names if not _is(folder / name, there.get(name))]:
        raise PushError(f"{repository} lacks {units.some(missing)} after the upload. {again}")
    return str(address)


def _upload(api: Any, folder: Path, names: Sequence[str], repository: str) -> None:
    """Upload files by hf_xet if it is installed and the hub supports it, otherwise by LFS.

    huggingface_hub only checks whether hf_xet is installed. It would fail after minutes of retries with a mirror or
    private hub that supports LFS only, and in a network that blocks the storage servers of hf_xet but not the hub.
    """
    from huggingface_hub import constants

    def upload() -> None:
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=[glob.escape(name) for name in names],
            commit_message="Upload by reca export",
        )

    if constants.HF_HUB_DISABLE_XET or find_spec("hf_xet") is None:
        return upload()
    if _offers_xet(api, repository):
        try:
            return upload()
        except Exception as error:
            if _status(error) is not None or isinstance(error, ValueError):
                raise  # the hub has answered, and would answer LFS alike
            print(f"hf_xet failed ({type(error).__name__}); uploading by LFS instead", flush=True)
    with _without_xet():
        upload()


def _offers_xet(api: Any, repository: str) -> bool:
    """Tell whether the hub supports hf_xet, by requesting an upload token as hf_xet does."""
    from huggingface_hub.utils import build_hf_headers, get_session

    url = f"{api.endpoint}/api/models/{repository}/xet-write-token/main"
    return get_session().get(url, headers=build_hf_headers()).status_code not in (404, 405, 501)


@contextlib.contextmanager
def _without_xet() -> Iterator[None]:
    """Disable hf_xet inside the context, like HF_HUB_DISABLE_XET=1."""
    from huggingface_hub import constants

    before = constants.HF_HUB_DISABLE_XET
    constants.HF_HUB_DISABLE_XET = True
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = before


def _contents(api: Any, repository: str) -> dict[str, str] | None:
    """Return the digests of a repository's files by name; None if the repository does not exist."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.repo_info(repository, files_metadata=True)
    except RepositoryNotFoundError:
        return None
    return {one.rfilename: one.lfs.sha256 if one.lfs else one.blob_id for one in info.siblings}


def _is(path: Path, digest: str | None) -> bool:
    """Tell whether a file matches the hub's digest: SHA-256 of an LFS file, git's blob hash of any other."""
    if digest is None:
        return False
    if len(digest) == hashlib.sha256().digest_size * 2:
        return sha256(path) == digest
    return git_hash(path.read_bytes()) == digest


def _status_of(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _status(error: BaseException) -> int | None:
    """Return the HTTP status of an error or of one of its causes; None if there is none."""
    return next((status for one in with_causes(error) if (status := _status_of(one)) is not None), None)


def _cause(error: Exception) -> str:
    """Describe what went wrong and what to do, without quoting the request."""
    from huggingface_hub.errors import LocalTokenNotFoundError

    for one in with_causes(error):
        if isinstance(one, LocalTokenNotFoundError):
            return "there is no token; run `hf auth login`, or set HF_TOKEN"
        if isinstance(one, ValueError) and "metadata in README.md" in str(one):
            return "the hub rejects the metadata between --- at the top of README.md: " + " ".join(str(one).split())
        status = _status_of(one)
        if status == 401:
            return "the token is invalid; run `hf auth login` with a new one (HF_TOKEN takes precedence)"
        if status == 403:
            return "the token has no write access; grant it (huggingface.co/settings/tokens)"
        if status == 413:
            return "it exceeds the storage limit of this account (status 413)"
    return f"the hub {cause_of(error)}"
