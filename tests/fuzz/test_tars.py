"""Tars of any members, cut and damaged: every image is a sample or counted, or the tar is refused."""

import io
import posixpath
import tarfile
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reca.data.errors import BadSample, DataError
from reca.data.sample import IMAGE_SUFFIXES
from reca.data.sources.tars import Tars
from tests.fuzz.bounds import counted, fewer
from tests.fuzz.mutate import mutate, mutations

FORMATS = st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
FOLDERS = st.sampled_from(["", "./", "d/", "d/e.f/", "__MACOSX/", ".x/", "/", "../", "long" * 40 + "/"])
STEMS = st.sampled_from(["a", "b", "v1.5_a", "v1.5_b", "v1", "a.seg", ".a", "._a", "ä", "", "a b", "long" * 30])
SUFFIXES = st.sampled_from([".jpg", ".JPG", ".png", ".txt", ".json", ".heic", ".jpg.png", "", ".", ".txt.jpg"])
TYPES = st.sampled_from([tarfile.REGTYPE] * 12 + [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
NAMES = st.builds(lambda *parts: "".join(parts) or "x", FOLDERS, STEMS, SUFFIXES)
MEMBERS = st.lists(st.tuples(NAMES, TYPES, NAMES), max_size=8)


@pytest.fixture(scope="module")
def path():
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "s.tar"


def packed(members, format=tarfile.USTAR_FORMAT):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as out:
        for number, (name, task, target) in enumerate(members):
            info = tarfile.TarInfo(name)
            info.type, data = task, f"{number} {name}".encode() * (number + 1)
            if task in (tarfile.LNKTYPE, tarfile.SYMTYPE):
                info.linkname = target
            elif task == tarfile.REGTYPE:
                info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def stem(name):
    return posixpath.splitext(name)[0]


@fewer(0.25)
@given(members=MEMBERS, format=FORMATS, task=st.sampled_from(["reca", "t2i"]))
def test_every_image_is_a_sample_or_counted(path, members, format, task):
    try:
        path.write_bytes(packed(members, format))
    except ValueError:  # a name that is too long for the format
        return
    files = {}
    for number, (name, type, _) in enumerate(members):
        if type == tarfile.REGTYPE:
            files[posixpath.normpath(name).lstrip("/")] = f"{number} {name}".encode() * (number + 1)
    with counted("tars of any members"):
        try:
            source = Tars([path], task)
        except DataError as error:
            assert str(path) in str(error)
            return
        images = [
            name
            for name, type, _ in members
            if type != tarfile.DIRTYPE and posixpath.splitext(name)[1].lower() in IMAGE_SUFFIXES
        ]
        other = [name for name, type, _ in members if type != tarfile.DIRTYPE and name.endswith(".heic")]
        used = [source[i] for i in range(len(source))]
        assert len(images) <= len(used) + sum(source.skipped.counts.values()) <= len(images) + len(other)
        for sample in used:
            name = sample.key.removeprefix("s.tar/")
            if name in files:  # links have the content of another
                assert sample.image == files[name]
            texts = [data for text, data in files.items() if text.lower().endswith(".txt") and stem(text) == stem(name)]
            if task == "t2i" and texts:
                assert sample.text.encode() in texts


SAMPLES = [(f"{c}.{suffix}", tarfile.REGTYPE, "") for c in "abcd" for suffix in ("jpg", "txt")]
WHOLE = packed(SAMPLES)


def contents(path):
    """What each sample holds; an exception where it cannot be read."""
    source, found = Tars([path], "t2i"), []
    for index in range(len(source)):
        try:
            found.append(source[index])
        except BadSample as error:
            found.append(error)
    return found


@fewer(0.25)
@given(place=st.integers(0, len(WHOLE) - 1))
def test_cut_tars_are_refused_or_whole(path, place):
    path.write_bytes(WHOLE)
    whole = contents(path)
    path.write_bytes(WHOLE[:place])
    with counted("cut tars"):
        try:
            assert contents(path) == whole
        except DataError as error:
            assert str(path) in str(error)


@fewer(0.25)
@given(place=st.integers(0, len(WHOLE) - 1), bit=st.integers(0, 7))
def test_a_flipped_bit_loses_no_sample(path, place, bit):
    data = bytearray(WHOLE)
    data[place] ^= 1 << bit
    path.write_bytes(data)
    with counted("tars with a flipped bit"):
        try:
            assert len(contents(path)) == 4
        except DataError as error:
            assert str(path) in str(error)


@fewer(0.25)
@given(members=MEMBERS, format=FORMATS, changes=mutations())
def test_damaged_tars_are_read_or_refused(path, members, format, changes):
    try:
        path.write_bytes(mutate(packed(members, format), changes))
    except ValueError:
        return
    with counted("damaged tars"):
        try:
            contents(path)
        except DataError as error:
            assert str(path) in str(error)
