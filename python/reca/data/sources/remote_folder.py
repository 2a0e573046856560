"""Images below a folder at a URL, such as s3://bucket/photos."""

from collections import defaultdict
from collections.abc import Sequence

from reca.data.errors import DataError
from reca.data.sample import IMAGE_SUFFIXES, checked_size, hidden, suffix_of
from reca.data.sources.folder import ImageFolder
from reca.data.sources.remote import RemotePath, read_range, read_whole, reason_of
from reca.data.sources.skipped import Skipped


class RemoteFolder(ImageFolder):
    """A folder at a URL, listed once when it is opened. Sizes that the server does not list count as 0."""

    def __init__(self, root: RemotePath, task: str):
        self.root, skipped = root, Skipped()
        self.sizes, files = list_remote(root, skipped)
        whole = root.path.rstrip("/")
        if whole in self.sizes and suffix_of(whole) in IMAGE_SUFFIXES:
            raise DataError(f"{root} is a single file; name its folder")
        super().__init__(root, task, files, skipped)
        root.note(root.listed(self.names[0]), root.listed(self.names[-1]))
        if root.fs.async_impl:  # others, such as that of hf://, take a file's size from the listing for each read
            root.fs.invalidate_cache()  # s3fs keeps 1.2 kB per file

    def read(self, name: str, limit: int, what: str) -> bytes:
        if (size := self.sizes[name]) is not None:
            return read_range(self.root.listed(name), 0, checked_size(size, limit, what))
        return read_whole(self.root.listed(name), limit, what)

    def total_size(self, names: Sequence[str]) -> int:
        return sum(self.sizes[name] or 0 for name in names)


def list_remote(root: RemotePath, skipped: Skipped) -> tuple[dict[str, int | None], dict[str, list[str]]]:
    """List the files below a folder, by paths relative to it, or by the whole path of a single file.

    Returns the sizes of all of them, None where the server lists none, and suffix -> those that are not hidden.
    """
    try:
        found = root.ask(root.fs.find, root.path, detail=True)
    except OSError as error:
        raise DataError(f"data folder {root} cannot be listed: {reason_of(error, root)}") from error
    if not found:
        raise DataError(f"data folder {root} does not exist, or is empty")
    start = f"{root.path.rstrip('/')}/"
    sizes = {name.removeprefix(start): info.get("size") for name, info in found.items()}
    files = defaultdict(list)
    for name in sizes:
        suffix = suffix_of(name)
        if not any(map(hidden, name.split("/"))):
            files[suffix].append(name)
        elif suffix in IMAGE_SUFFIXES:
            skipped.add("hidden files and folders", name)
    return sizes, files
