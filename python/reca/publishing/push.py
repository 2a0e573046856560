"""The upload of an export to the Hugging Face hub: `reca export --push`.

The token is the one that huggingface_hub finds (`hf auth login`, or HF_TOKEN). It is never printed: messages are made
here, and not of the library's own.
"""

import contextlib
import glob
import hashlib
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from reca import exits, units
from reca.files import sha256
from reca.models.common.hub import cause_of, with_causes

SHOWN = 3  # files that a message names
OF_THE_HUB = (".gitattributes",)  # that every repository has


class PushError(ValueError):
    """The hub does not take the export. The export itself is whole; the message says what to do."""

    exit_code = exits.DATA


def check(repository: str) -> None:
    """Find out before weights are read whether this user may write to a repository.

    Raises PushError where the name is none, no token is there, or the hub cannot be reached or would refuse it.
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
        raise PushError(f"--push {repository!r} is no name of a repository: give OWNER/NAME, such as me/show-o-reca")
    try:
        user = HfApi().whoami()
    except Exception as error:  # of the libraries below the hub's, too
        raise PushError(f"nothing can be uploaded to {repository}: {_cause(error)}") from error
    token = user.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        raise PushError(
            f"nothing can be uploaded to {repository}: the token {token.get('displayName')!r} may only read; make one "
            "that may write (huggingface.co/settings/tokens), then `hf auth login`"
        )
    owners = [user["name"], *(group["name"] for group in user.get("orgs", ()))]
    if owner not in owners:
        raise PushError(f"nothing can be uploaded to {repository}: you can write to {', '.join(owners)}, not {owner}")


def push(folder: Path, names: Sequence[str], repository: str, public: bool = False, update: bool = False) -> str:
    """Upload files of a folder, and check that the hub has them. Returns the repository's URL.

    names: of the files, relative to the folder. public: of a repository that is made now; others stay as they are.
    update: commit on top of a repository that has other files, or the same ones with other contents.

    What was uploaded before is not uploaded again. Raises PushError for what the hub does not take, and where a
    repository has other contents and `update` is not set.
    """
    from huggingface_hub import HfApi

    api, names = HfApi(), sorted(set(names))
    sizes = {name: (folder / name).stat().st_size for name in names}
    again = (
        f"{folder} is whole, and what was uploaded is kept; the same command goes on, or, without another export, "
        f"`hf upload {repository} {folder}`"
    )
    try:
        there = _contents(api, repository)
        same = [name for name in names if there and _is(folder / name, there.get(name))]
        other = [name for name in there or () if name not in same and name not in OF_THE_HUB]
        if other and not update:
            more = f" and {len(other) - SHOWN} more" if len(other) > SHOWN else ""
            raise PushError(
                f"{repository} holds other files already ({', '.join(other[:SHOWN])}{more}); give --update to commit "
                f"on top of them (its history keeps them), or another name. {folder} is whole, nothing was uploaded"
            )
        state = "is there" if there is not None else f"will be made, {'public' if public else 'private'}"
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
    except Exception as error:  # of the libraries below the hub's, too
        raise PushError(f"the upload to {repository} failed: {_cause(error)}. {again}") from error
    if missing := [name for name in names if not _is(folder / name, there.get(name))]:
        raise PushError(f"{repository} lacks {', '.join(missing[:SHOWN])} after the upload. {again}")
    return str(address)


def _upload(api: Any, folder: Path, names: Sequence[str], repository: str) -> None:
    """Upload files by hf_xet, where it is installed and the hub offers its protocol, else by LFS.

    huggingface_hub decides by what is installed alone. A mirror, or a hub of one's own, that has LFS only would fail
    after minutes of new tries, and so would a network that lets the hub through and the store behind hf_xet not.
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
                raise  # the hub has answered: LFS would be answered alike
            print(f"hf_xet failed ({type(error).__name__}); uploading by LFS", flush=True)
    with _without_xet():
        upload()


def _offers_xet(api: Any, repository: str) -> bool:
    """Ask the hub for a token to its store of hf_xet, as hf_xet does; only whether there is one is of interest."""
    from huggingface_hub.utils import build_hf_headers, get_session

    url = f"{api.endpoint}/api/models/{repository}/xet-write-token/main"
    return get_session().get(url, headers=build_hf_headers()).status_code not in (404, 405, 501)


@contextlib.contextmanager
def _without_xet() -> Iterator[None]:
    """Do inside of the context what HF_HUB_DISABLE_XET=1 does."""
    from huggingface_hub import constants

    before = constants.HF_HUB_DISABLE_XET
    constants.HF_HUB_DISABLE_XET = True
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = before


def _contents(api: Any, repository: str) -> dict[str, str] | None:
    """List the files of a repository with their digests; None where there is no such repository."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.repo_info(repository, files_metadata=True)
    except RepositoryNotFoundError:
        return None
    return {one.rfilename: one.lfs.sha256 if one.lfs else one.blob_id for one in info.siblings}


def _is(path: Path, digest: str | None) -> bool:
    """Compare a file with the digest that the hub gives of one: the SHA-256 of a large file, git's of a small one."""
    if digest is None:
        return False
    if len(digest) == hashlib.sha256().digest_size * 2:
        return sha256(path) == digest
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == digest


def _status_of(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _status(error: BaseException) -> int | None:
    """Find the HTTP status that an error, or one of its causes, tells."""
    return next((status for one in with_causes(error) if (status := _status_of(one)) is not None), None)


def _cause(error: Exception) -> str:
    """Say what went wrong and what to do about it, without a word of the request."""
    from huggingface_hub.errors import LocalTokenNotFoundError

    for one in with_causes(error):
        if isinstance(one, LocalTokenNotFoundError):
            return "there is no token; `hf auth login`, or set HF_TOKEN"
        if isinstance(one, ValueError) and "metadata in README.md" in str(one):
            return "the hub finds fault with the lines between --- at the top of README.md: " + " ".join(
                str(one).split()
            )
        status = _status_of(one)
        if status == 401:
            return "the hub does not know the token; `hf auth login` with a new one (HF_TOKEN goes before it)"
        if status == 403:
            return "the token may not write there; give it the right to (huggingface.co/settings/tokens)"
        if status == 413:
            return "the hub finds it too large for this account (status 413)"
    return f"the hub {cause_of(error)}"
