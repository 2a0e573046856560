"""Which files below a folder are images, in which order, and what is said of the others."""

import errno
import os
from pathlib import Path

import pytest

from reca.data.errors import BadSample, DataError
from reca.data.sources.factory import open_source
from tests.data.files import fill, image_bytes


def keys(root, task="reca"):
    source = open_source(str(root), task)
    return [source.key(i) for i in range(len(source))]


def captions(root):
    source = open_source(str(root), "t2i")
    return [source[i].text for i in range(len(source))]


def test_order_is_by_parts_of_the_path(tmp_path):
    fill(tmp_path, {name: image_bytes() for name in ("b.png", "a/z.png", "a-b/c.png", "a.png", "Z.jpg")})
    assert keys(tmp_path) == ["Z.jpg", "a/z.png", "a-b/c.png", "a.png", "b.png"]


def test_hidden_files_and_copies_of_systems_are_no_images(tmp_path):
    junk = ["._p.png", ".cache/p.png", "__MACOSX/p.png", "d/.ipynb_checkpoints/p.png", "d/@eaDir/p.png", ".DS_Store"]
    fill(tmp_path, {"p.png": image_bytes(), "d/q.png": image_bytes()} | dict.fromkeys(junk, b"junk"))
    source = open_source(str(tmp_path), "reca")
    assert [source.key(i) for i in range(len(source))] == ["d/q.png", "p.png"]
    assert source.skipped.counts == {"hidden files and folders": 5}


def test_a_root_may_lie_in_a_hidden_folder_and_be_named_like_a_tar(tmp_path):
    for name in (".data/photos", "my.target", "shard.tar"):
        assert keys(fill(tmp_path / name, {"a.png": image_bytes()})) == ["a.png"]


def test_linked_folders_are_read_once_and_loops_end(tmp_path):
    other = fill(tmp_path / "other", {"x.png": image_bytes(), "deep/y.png": image_bytes()})
    root = fill(tmp_path / "root", {"z.png": image_bytes(), "real/w.png": image_bytes()})
    for name, target in (
        ("linked", other),
        ("again", other),
        ("loop", root),
        ("real/up", root),
        ("a_link", root / "real"),
    ):
        os.symlink(target, root / name)
    source = open_source(str(root), "reca")
    assert [source.key(i) for i in range(len(source))] == ["again/deep/y.png", "again/x.png", "real/w.png", "z.png"]
    assert source.skipped.counts == {"links to a folder that is already read": 4}


def test_what_is_left_out_is_counted_and_said_once(tmp_path, caplog):
    root = fill(tmp_path, {"a.png": image_bytes(), "b.heic": b"", "c.CR2": b"", "d.tar": b"", "notes.md": b""})
    os.symlink(root / "nowhere", root / "e.png")
    os.mkfifo(root / "f.jpg")
    for _ in range(2):
        assert keys(root) == ["a.png"]
    (line,) = (record.getMessage() for record in caplog.records)
    assert "2 images in unsupported formats (the first: b.heic)" in line
    assert "2 images that are not files, or broken links (the first: e.png)" in line
    assert "1 tar files in a folder of images (the first: d.tar)" in line


def test_folders_that_cannot_be_read_are_said(tmp_path, monkeypatch):
    root, scandir = fill(tmp_path, {"a.png": image_bytes(), "locked/b.png": image_bytes()}), os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    source = open_source(str(root), "reca")
    assert len(source) == 1 and "1 folders that cannot be read (the first: locked, Permission denied)" in str(
        source.skipped
    )


@pytest.mark.parametrize("code", [errno.EMFILE, errno.EIO])
def test_a_folder_is_not_left_out_if_the_machine_fails(tmp_path, monkeypatch, code):
    """Its images would be missing in the data of a run, and on one rank only."""
    root, scandir = fill(tmp_path, {"a.png": image_bytes(), "sub/b.png": image_bytes()}), os.scandir

    def fail(path):
        if str(path).endswith("sub"):
            raise OSError(code, os.strerror(code))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fail)
    with pytest.raises(DataError, match=f"data folder {root}/sub cannot be read: {os.strerror(code)}"):
        open_source(str(root), "reca")


def test_a_folder_without_images_says_what_it_holds(tmp_path):
    with pytest.raises(DataError, match=r"has no images .*only 2 x \.tar: name its tars as FOLDER/\*\.tar"):
        open_source(str(fill(tmp_path, {"0.tar": b"", "1.tar": b""})), "reca")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.png", image_bytes(), r"a\.png is a single file; name its folder"),
        ("a.zip", b"PK\3\4" + bytes(30), r"a\.zip is a zip archive; unpack it first"),
        ("a.bin", b"PAR1" + bytes(30), r"a\.bin is a parquet file with another suffix; rename it to a\.parquet"),
        ("a.png", b"", r"a\.png is empty"),
        ("a.csv", b"a,b", r"a\.csv is a file of an unsupported format; name a folder of images, \.tar or"),
        ("a.tar", b"PAR1" + bytes(30), r"a\.tar is not an uncompressed tar"),
    ],
)
def test_a_file_in_the_place_of_a_folder(tmp_path, name, content, words):
    fill(tmp_path, {name: content})
    with pytest.raises(DataError, match=words):
        open_source(str(tmp_path / name), "reca")


@pytest.mark.parametrize("spec", ["{a,b}.tar", "a.tar,b.tar", "a.tar::b.tar", "pipe:cat a.tar"])
def test_other_ways_to_name_several_files(tmp_path, spec):
    with pytest.raises(
        DataError, match=r"no tar file matches .*are not supported\. Write several files as a list of sources"
    ):
        open_source(spec, "reca")


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\xef\xbb\xbfa cat\r\n", "a cat"),
        ("zwei Wörter\rzwei Zeilen".encode("utf-16"), "zwei Wörter\nzwei Zeilen"),
        (b"\xfe\xff" + "猫".encode("utf-16-be"), "猫"),
        ("a cat".encode("utf-32"), "a cat"),
    ],
)
def test_byte_order_marks_are_no_part_of_a_caption(tmp_path, data, text):
    assert captions(fill(tmp_path, {"a.png": image_bytes(), "a.txt": data})) == [text]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("\u200b\ufeff\u202e".encode(), "the caption is empty except for invisible characters"),
        (b"cat\x92s", "caption: the text is not UTF-8 .byte 0x92 at 3"),
        (b"\xff\xfea", "not UTF-16-LE"),
        ("a cat".encode("utf-16-le"), "NUL characters"),
        (b" \n\xef\xbb\xbf"[:2], "the caption is empty"),
        (b"\xef\xbb\xbf\r\n", "the caption is empty"),
        (b"a" * (2**20 + 1), "the caption has 1048577 bytes"),
    ],
)
def test_captions_that_are_none_are_bad_samples(tmp_path, data, reason):
    with pytest.raises(BadSample, match=reason):
        captions(fill(tmp_path, {"a.png": image_bytes(), "a.txt": data}))


def test_captions_are_found_whatever_the_case_of_their_suffix(tmp_path):
    assert captions(fill(tmp_path, {"A.JPG": image_bytes(), "A.TXT": b"x"})) == ["x"]


def test_captions_of_which_it_is_not_clear_whose_they_are(tmp_path):
    fill(tmp_path / "two", {"a.png": image_bytes(), "a.txt": b"x", "a.TXT": b"y"})
    with pytest.raises(DataError, match="a.TXT and a.txt are captions of one name"):
        open_source(str(tmp_path / "two"), "t2i")
    fill(tmp_path / "one", {"a.png": image_bytes(), "a.jpg": image_bytes(), "a.txt": b"x"})
    with pytest.raises(DataError, match="a.jpg and a.png have the same caption file, a.txt"):
        open_source(str(tmp_path / "one"), "t2i")
    assert keys(tmp_path / "one") == ["a.jpg", "a.png"]


@pytest.mark.parametrize(
    ("beside", "said"),
    [
        ({"train/metadata.jsonl": b"", "a.csv": b""}, ". To read those in train/metadata.jsonl, name the folder hf:"),
        ({"metadata.csv": b""}, ". To read those in metadata.csv, name the folder hf:"),
        ({"train/a.caption": b"x"}, ". Rename its 1 .caption files to .txt"),
        ({"captions.jsonl": b""}, "a.txt is missing"),
    ],
)
def test_captions_in_the_form_of_another_trainer(tmp_path, beside, said):
    fill(tmp_path, {"train/a.png": image_bytes(), **beside})
    with pytest.raises(DataError, match="1 of 1 images have no caption; .*train/a.txt is missing") as raised:
        open_source(str(tmp_path), "t2i")
    assert str(raised.value).endswith(f"{said}{tmp_path}" if said.endswith("hf:") else said)
    assert keys(tmp_path) == ["train/a.png"]


def test_no_name_is_not_the_folder_that_one_is_in(tmp_path, monkeypatch):
    monkeypatch.chdir(fill(tmp_path, {"a.png": image_bytes()}))
    for spec in ("", "  "):
        with pytest.raises(DataError, match="is not a path; name the data, or null for none"):
            open_source(spec, "reca")
    assert keys(".") == ["a.png"]


@pytest.mark.parametrize("spec", ["locked/photos", "locked/0.tar", "locked/*.tar", "locked/{0..3}.tar"])
@pytest.mark.parametrize("task", ["reca", "i2t"])
def test_a_folder_above_may_not_be_looked_into(tmp_path, monkeypatch, spec, task):
    def refuse(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "stat", refuse)
    monkeypatch.setattr(Path, "stat", refuse)  # which keeps os.stat in Python 3.10
    with pytest.raises(DataError, match="locked.* cannot be read: Permission denied"):
        open_source(str(tmp_path / spec), task)


@pytest.mark.parametrize("task", ["reca", "i2t"])
def test_a_folder_that_may_not_be_looked_into_is_named_itself(tmp_path, monkeypatch, task):
    stat = os.stat

    def refuse(path, **options):
        if str(path) != str(tmp_path):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **options)

    def refuse_list(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "stat", refuse)
    monkeypatch.setattr(os, "scandir", refuse_list)
    with pytest.raises(DataError, match=f"{tmp_path} cannot be read: Permission denied"):
        open_source(str(tmp_path), task)


def test_files_too_large_for_a_image_are_not_read(tmp_path):
    path = fill(tmp_path, {"a.png": b""}) / "a.png"
    os.truncate(path, 2**28 + 1)
    with pytest.raises(BadSample, match="the image has 268435457 bytes"):
        open_source(str(tmp_path), "reca")[0]


def test_identity_is_of_names_and_sizes_and_not_of_the_place(tmp_path):
    files = {"a.png": image_bytes(), "b.png": image_bytes(), "a.txt": b"one", "b.txt": b"two"}
    one, two = (open_source(str(fill(tmp_path / name, files)), "t2i").identity() for name in ("here", "there"))
    assert one == two and len(one) == 64
    for changed in ({"a.png": image_bytes() + b"0"}, {"a.txt": b"three"}, {"c.png": image_bytes(), "c.txt": b"c"}):
        assert open_source(str(fill(tmp_path / "there", changed)), "t2i").identity() not in (one, two)
        two = open_source(str(tmp_path / "there"), "t2i").identity()


def test_names_that_are_no_text_do_not_matter(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(image_bytes())
    source = open_source(str(tmp_path), "reca")
    assert source[0].image == image_bytes() and len(source.identity()) == 64
