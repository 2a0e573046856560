"""Which members of a tar make a sample, and which tars are refused."""

import gzip
import os
import subprocess
import tarfile

import pytest

from reca.data.errors import BadSample, DataError
from reca.data.order import make_order
from reca.data.sample import digest
from reca.data.sources import index_files, patterns
from reca.data.sources.factory import open_source
from reca.data.sources.skipped import Skipped
from tests.data.files import image_bytes, tar

DARK, LIGHT = image_bytes((1, 1, 1)), image_bytes((250, 250, 250))


def opened(path, task="reca"):
    return open_source(str(path), task)


def keys(path, task="reca"):
    source = opened(path, task)
    return [source.key(i) for i in range(len(source))]


def test_pairs_adjacent_members_of_one_key(tmp_path):
    path = tar(
        tmp_path / "s.tar",
        ("d/a.txt", b"one"),
        ("d/a.JPG", DARK),
        ("d/a.json", b"{}"),
        ("e/a.png", LIGHT),
        ("e/a.txt", b"two"),
    )
    source = opened(path, "t2i")
    assert [source[i] for i in range(2)] == [("s.tar/d/a.JPG", DARK, "one"), ("s.tar/e/a.png", LIGHT, "two")]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a.jpg", "a.txt", "b.jpg", "b.txt", "a.png", "a.txt"], "a.png does not follow a.jpg, which has the same key"),
        (["a.jpg", "b.jpg", "a.txt", "b.txt"], "a.txt does not follow a.jpg"),
        (["a.jpg", "a.jpg"], "a.jpg and a.jpg are both the .jpg of sample 'a'"),
        (["a.jpg", "a.JPG"], "a.jpg and a.JPG are both the .jpg"),
        (["./a.jpg", "a.txt", "a.txt"], "a.txt and a.txt are both the .txt"),
        (["a.jpg", "a.png"], "a.jpg and a.png are both the image of sample 'a'"),
        (["v1.5.jpg", "v1.5.png"], "v1.5.jpg and v1.5.png are both the image of sample 'v1.5'"),
        (["a.jpg", "b.jpg", "a.seg.png"], "a.seg.png does not follow a.jpg"),
        (["d/a.jpg", "b.jpg", "d/a.jpg"], "d/a.jpg does not follow d/a.jpg"),
    ],
)  # fmt: skip
def test_what_is_not_clear_is_an_error(tmp_path, names, words):
    path = tar(tmp_path / "s.tar", *((name, DARK) for name in names))
    with pytest.raises(DataError, match=rf"s.tar: {words}"):
        opened(path)


def test_images_with_dots_in_their_names_are_samples(tmp_path):
    names = ["v1.5_a.jpg", "v1.5_b.jpg", "ok.jpg", "v1.6_a.jpg", "IMG.2020.01.02.jpg"]
    assert keys(tar(tmp_path / "s.tar", *((name, DARK) for name in names))) == [f"s.tar/{name}" for name in names]
    members = [("v1.5_a.jpg", DARK), ("v1.5_a.txt", b"one"), ("v1.5_b.txt", b"two"), ("v1.5_b.jpg", LIGHT)]
    source = opened(tar(tmp_path / "t.tar", *members), "t2i")
    assert [source[i][1:] for i in range(2)] == [(DARK, "one"), (LIGHT, "two")]


def test_parts_that_are_not_read_are_counted(tmp_path, caplog):
    path = tar(
        tmp_path / "s.tar", ("a.jpg", DARK), ("a.seg.png", b""), ("b.heic", b""), ("b.txt", b"b"), ("c.jpg", DARK)
    )
    source = opened(path)
    assert len(source) == 2
    assert source.skipped.counts == {"further images of a sample": 1, "images in unsupported formats": 1}
    assert f"(the first: {path}: a.seg.png)" in caplog.text
    with pytest.raises(DataError, match=r"no images in .*1 images in unsupported formats .*b\.heic"):
        opened(tar(tmp_path / "t.tar", ("b.heic", b"")))


def test_hidden_members_and_folders_are_no_images(tmp_path):
    names = ["._a.jpg", "a.jpg", "__MACOSX/._a.jpg", ".git/b.jpg", "./c.jpg", "README"]
    source = opened(tar(tmp_path / "s.tar", *((name, DARK) for name in names), ("d.jpg", (tarfile.DIRTYPE, ""))))
    assert [source.key(i) for i in range(len(source))] == ["s.tar/a.jpg", "s.tar/c.jpg"]
    assert source.skipped.counts == {"hidden files": 3}


def test_links_are_resolved_or_counted(tmp_path):
    path = tar(
        tmp_path / "s.tar",
        ("d/a.jpg", DARK),
        ("hard.jpg", (tarfile.LNKTYPE, "d/a.jpg")),
        ("d/soft.jpg", (tarfile.SYMTYPE, "./a.jpg")),
        ("ahead.jpg", (tarfile.SYMTYPE, "z.jpg")),
        ("chain.jpg", (tarfile.SYMTYPE, "ahead.jpg")),
        ("loop.jpg", (tarfile.SYMTYPE, "loop.jpg")),
        ("self.jpg", (tarfile.LNKTYPE, "self.jpg")),
        ("outside.jpg", (tarfile.SYMTYPE, "/etc/hostname")),
        ("folder.jpg", (tarfile.SYMTYPE, "d")),
        ("device.jpg", (tarfile.CHRTYPE, "")),
        ("z.jpg", LIGHT),
    )
    source = opened(path)
    assert {source[i].key[6:]: source[i].image for i in range(len(source))} == {
        "d/a.jpg": DARK, "hard.jpg": DARK, "d/soft.jpg": DARK, "ahead.jpg": LIGHT, "chain.jpg": LIGHT, "z.jpg": LIGHT
    }  # fmt: skip
    assert source.skipped.counts == {"image members that are not files, or broken links": 5}


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names(tmp_path, format):
    name = "/".join(["folder" * 8] * 3) + "/a.jpg"
    assert opened(tar(tmp_path / "s.tar", (name, DARK), format=format))[0] == (f"s.tar/{name}", DARK, None)


@pytest.mark.parametrize(
    "options", ["--format=gnu", "--format=pax --sparse-version=1.0", "--format=pax --sparse-version=0.1"]
)
def test_sparse_members(tmp_path, options):
    path, data = tmp_path / "a.bmp", DARK + bytes(2**20) + LIGHT + bytes(2**20)
    with path.open("wb") as file:
        file.write(DARK)
        file.seek(2**20, 1)
        file.write(LIGHT)
        file.truncate(len(data))
    command = ["tar", "--sparse", *options.split(), "-C", str(tmp_path), "-cf", str(tmp_path / "s.tar"), "a.bmp"]
    subprocess.run(command, check=True)
    assert (tmp_path / "s.tar").stat().st_size < 2**18  # the holes are not in it
    assert opened(tmp_path / "s.tar")[0].image == data


def test_a_cut_tar_is_told_wherever_it_was_cut(tmp_path):
    path = tar(tmp_path / "s.tar", *((f"{i}.jpg", DARK) for i in range(4)))
    whole = path.read_bytes()
    members = 4 * 1024  # a header and a block each
    for place in range(1, members, 97):
        path.write_bytes(whole[:place])
        with pytest.raises(DataError, match=f"cut off at byte {place}|not an uncompressed tar"):
            opened(path)
    for place in (512, 1024, 2048, members):  # where nothing but the missing end tells
        path.write_bytes(whole[:place])
        with pytest.raises(DataError, match=f"s.tar is cut off at byte {place}"):
            opened(path)
    path.write_bytes(whole[: members + 512])  # one block of zeros of the two
    assert len(opened(path)) == 4


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_that_is_cut_in_the_header_of_a_long_name_is_cut(tmp_path, format):
    name = "/".join(["folder" * 8] * 3) + "/b.jpg"
    path = tar(tmp_path / "s.tar", ("a.jpg", DARK), (name, DARK), format=format)
    whole = path.read_bytes()
    start, end = 1024, 2560  # three blocks: that the name is long, the name, and the member
    for place in range(start, end + 1, 128):
        path.write_bytes(whole[:place])
        with pytest.raises(DataError, match=f"s.tar is cut off at byte {place}"):
            opened(path)
    path.write_bytes(whole[: start + 1030] + b"?" + whole[start + 1031 :])
    with pytest.raises(DataError, match=f"s.tar is damaged at byte {start}, after a.jpg"):
        opened(path)


def test_damaged_and_strange_tars(tmp_path):
    path = tar(tmp_path / "s.tar", ("a.jpg", DARK), ("b.jpg", DARK))
    whole = path.read_bytes()
    cases = {
        "is damaged at byte 1024, after a.jpg": whole[:1030] + b"?" + whole[1031:],
        "Tars cannot be concatenated by cat": whole + whole,
        "ends at byte 2048, after b.jpg, but the file has": whole + bytes(2**21),
        "it is compressed by gzip; unpack it first": gzip.compress(whole),
        "it is a Git LFS pointer and not the file itself": b"version https://git-lfs.github.com/spec/v1\noid sha256\n",
        "it is empty: its download": b"",
        "it is a zip archive; unpack it first": b"PK\3\4" + bytes(600),
        "it is a web page": b"<!DOCTYPE html>",
        "no images in": bytes(10240),
    }
    for words, data in cases.items():
        path.write_bytes(data)
        with pytest.raises(DataError, match=rf"s\.tar.*{words}|{words}.*s\.tar"):
            opened(path)


def test_a_negative_size_ends_the_reading(tmp_path):
    """tarfile of Python 3.11 goes back by it and reads the same header for ever; that of 3.14 refuses it."""
    info = tarfile.TarInfo("a.jpg")
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 11 + b"\x00"  # -256 in base 256
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "s.tar").write_bytes(bytes(512) * 0 + bytes(header) + bytes(2048))
    with pytest.raises(DataError, match=r"s\.tar is (damaged at byte 0|not an uncompressed tar: invalid offset)"):
        opened(tmp_path / "s.tar")


def test_every_number_of_a_range_must_exist(tmp_path):
    for number in ("000", "002", "005"):
        tar(tmp_path / f"a-{number}.tar", (f"{number}.jpg", DARK))
    with pytest.raises(DataError, match=r"3 of the range are missing: .*a-001.tar, .*a-003.tar, .*a-004.tar"):
        opened(tmp_path / "a-{000..005}.tar")
    with pytest.raises(DataError, match="empty; write the smaller number first"):
        opened(tmp_path / "a-{005..000}.tar")
    with pytest.raises(DataError, match="expands to more than 1000000 names"):
        opened(tmp_path / "a-{000..999999999}.tar")
    assert len(opened(tmp_path / "a-*.tar")) == 3
    (tmp_path / "a-001.tar").mkdir()
    with pytest.raises(DataError, match="a-001.tar is not a file"):
        opened(tmp_path / "a-{000..002}.tar")


def test_globs_of_folders_below_each_other(tmp_path):
    """`**` stands for any number of folders, none too."""
    for name in ("2.tar", "a/0.tar", "b/c/1.tar"):
        tar(tmp_path / name, ("a.jpg", DARK))
    assert keys(tmp_path / "**/*.tar") == ["2.tar/a.jpg", "a/0.tar/a.jpg", "b/c/1.tar/a.jpg"]


def test_files_that_are_linked_match_a_glob_once(tmp_path, caplog):
    """Their samples would be several times as frequent as others, and `**` ends only where folders are read once."""
    for name in ("a/0.tar", "v1/1.tar", ".b/2.tar"):
        tar(tmp_path / name, ("a.jpg", DARK))
    for link, target in (("latest", "v1"), ("v1/up", ".."), ("v1/top.tar", "1.tar")):
        os.symlink(target, tmp_path / link)
    assert sorted(patterns._matches(f"{tmp_path}/**/*.tar", Skipped())) == [
        f"{tmp_path}/{name}" for name in ("a/0.tar", "v1/1.tar", "v1/top.tar")
    ]
    assert keys(tmp_path / "**/*.tar") == keys(tmp_path / "*/*.tar") == ["a/0.tar/a.jpg", "v1/1.tar/a.jpg"]
    assert f"{tmp_path}/*/*.tar: skipped 3 links to files that match, too (the first: {tmp_path}/latest/1.tar)" in (
        caplog.text
    )
    assert len(keys(tmp_path / "latest/*.tar")) == len(keys(tmp_path / "**/up/v1/1.tar")) == 1


def test_ranges_of_folders_and_names_with_brackets(tmp_path):
    for a in range(2):
        for b in (8, 9, 10):
            tar(tmp_path / f"part{a}/x [{b}].tar", ("a.jpg", DARK))
    assert keys(tmp_path / "part{0..1}/x [{8..10}].tar") == [
        f"part{a}/x [{b}].tar/a.jpg" for a in range(2) for b in (8, 9, 10)
    ]
    assert len(keys(tmp_path / "part0/x [9].tar")) == 1


def test_shards_of_one_name_have_keys_of_their_own(tmp_path):
    for name in ("a", "b"):
        tar(tmp_path / name / "000.tar", ("x.jpg", DARK))
    assert keys(tmp_path / "*/000.tar") == ["a/000.tar/x.jpg", "b/000.tar/x.jpg"]


def test_identity_is_of_members_and_not_of_the_place(tmp_path):
    one = opened(tar(tmp_path / "here/s.tar", ("a.jpg", DARK))).identity()
    assert opened(tar(tmp_path / "there/s.tar", ("a.jpg", DARK))).identity() == one
    assert opened(tar(tmp_path / "there/s.tar", ("b.jpg", DARK))).identity() != one
    assert opened(tar(tmp_path / "there/s.tar", ("a.jpg", DARK + b"0"))).identity() != one


def test_an_image_without_a_caption_is_an_error_where_captions_are_wanted(tmp_path):
    path = tar(tmp_path / "s.tar", ("a.jpg", DARK), ("a.txt", b"one"), ("b.jpg", DARK))
    with pytest.raises(DataError, match=r"s\.tar: b\.jpg has no \.txt caption"):
        opened(path, "t2i")
    assert len(opened(path)) == 2


@pytest.mark.parametrize("large", [0, 10**9])  # with an index file, and without
def test_the_order_of_samples_stays_that_of_earlier_versions(tmp_path, monkeypatch, large):
    """So that a run begun with one resumes: neither keys, sizes nor positions may change."""
    monkeypatch.setenv("RECA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(index_files, "LARGE", large)
    monkeypatch.setattr(index_files, "SETTLED", 0.0)
    for shard in range(3):
        members = [(f"d/{n}.{suffix}", bytes(n + 1)) for n in range(4) for suffix in ("jpg", "json", "txt")]
        tar(tmp_path / f"{shard}.tar", *members, ("v1.5_ü.png", DARK), ("v1.5_ü.txt", b"x"))
    for task, identity in {"reca": "129dfa0827c39ac6", "t2i": "4ab9e3589b5d6cb1"}.items():
        source = opened(tmp_path / "{0..2}.tar", task)
        order = make_order(source, 5)
        drawn = [source.key(order.index(position)) for position in range(30)]
        assert source.identity()[:16] == identity and digest(drawn)[:16] == "bcd38b0fa5a8eee1"
        assert drawn[:3] == ["1.tar/d/2.jpg", "1.tar/v1.5_ü.png", "2.tar/d/1.jpg"]


def test_captions_that_are_none_are_bad_samples(tmp_path):
    source = opened(
        tar(tmp_path / "s.tar", ("a.jpg", DARK), ("a.txt", b"caf\xe9"), ("b.jpg", DARK), ("b.txt", b" ")), "t2i"
    )
    for index, reason in enumerate(("not UTF-8 .byte 0xe9 at 3", "the caption is empty")):
        with pytest.raises(BadSample, match=reason):
            source[index]


def test_a_tar_that_shrinks_is_a_bad_sample(tmp_path):
    path = tar(tmp_path / "s.tar", ("a.jpg", DARK))
    source = opened(path)
    path.write_bytes(path.read_bytes()[:520])
    with pytest.raises(BadSample, match="shorter than when the run began"):
        source[0]


@pytest.mark.parametrize("names", [("b.jpg", "c.jpg"), ("a.jpg", "bb.jpg"), ("c.jpg", "b.jpg")])
def test_members_of_a_tar_that_was_packed_again_are_not_read_for_others(tmp_path, names):
    """Even of the same sizes, and with the time of the old file: the header before a member's bytes tells."""
    path, new = tar(tmp_path / "s.tar", ("a.jpg", DARK), ("b.jpg", DARK)), bytes(len(DARK))
    source, stamp = opened(path), path.stat()
    tar(path, *((name, new) for name in names))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    for index, name in enumerate(("a.jpg", "b.jpg")):
        if names[index] == name:
            assert source[index].image == new  # the same member
        else:
            with pytest.raises(DataError, match=r"s\.tar has other members than when the run began"):
                source[index]


def test_a_caption_of_another_sample_is_not_read(tmp_path):
    path = tar(tmp_path / "s.tar", ("a.jpg", DARK), ("a.txt", b"one"))
    source = opened(path, "t2i")
    tar(path, ("a.jpg", DARK), ("b.txt", b"two"))
    with pytest.raises(DataError, match="there is another caption at byte 1536"):
        source[0]
