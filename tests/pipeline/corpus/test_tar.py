"""A tar is read to its end, member by member, or said to be broken."""

import io
import random
import tarfile

import pytest

from pipeline.corpus import tar
from pipeline.corpus.tar import BLOCK, Contents, Group, read_groups, read_member
from tests.support.tars import header, image, pair, tar_bytes


def read(data: bytes, file: type[io.BytesIO] = io.BytesIO, key_rule: str = "first_dot") -> tuple[list[Group], Contents]:
    contents = Contents()
    return list(read_groups(file(data), contents, key_rule)), contents


def shape(found: list[Group]) -> list[tuple[str, list[str]]]:
    return [(group.key, list(group.members)) for group in found]


def end_of(data: bytes) -> int:
    """Where the two zero blocks end that make a tar whole."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        tar.getmembers()
        return tar.offset + 2 * BLOCK


SMALL = tar_bytes([member for key in ("a/0", "a/1", "b/0") for member in pair(key, caption="x" * 700)])
CUTS = sorted({*range(0, end_of(SMALL), BLOCK), *random.Random(0).sample(range(end_of(SMALL)), 60), end_of(SMALL) - 1})


def patched(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def with_size(data: bytes, start: int, size: int) -> bytes:
    """The size in a header replaced, its checksum right."""
    large = size.to_bytes(12, "big", signed=True) if size < 0 else b"\x80" + (size % 2**88).to_bytes(11, "big")
    field = b"%011o\0" % size if 0 <= size < 8**11 else large
    block = bytearray(patched(data[start : start + BLOCK], 124, field))
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return patched(data, start, bytes(block))


def second_header(data: bytes) -> int:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return tar.getmembers()[1].offset


def test_the_key_is_the_path_up_to_the_first_dot_of_the_file_name():
    names = ["v1.5/a.jpg", "v1.5/a.txt", "v1.5/a.seg.png", "b/a.jpg", "a.JPG", "a.Txt"]
    found, contents = read(tar_bytes([(name, b"") for name in names]))
    assert shape(found) == [("v1.5/a", ["jpg", "txt", "seg.png"]), ("b/a", ["jpg"]), ("a", ["jpg", "txt"])]
    assert [group.index for group in found] == [0, 1, 2]
    assert contents == Contents(members=6)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_format_gives_the_same_bytes(format):
    members = [*pair("d" * 60 + "/" + "k" * 30), *pair("é/0")]
    data = tar_bytes(members, format)
    found, contents = read(data)
    assert contents == Contents(members=6)
    headers = [member for group in found for member in group.members.values()]
    assert [(m.name, read_member(io.BytesIO(data), m)) for m in headers] == members


def test_names_longer_than_a_header_are_kept():
    name = "/".join(["folder" * 10] * 5) + "/key"
    found, contents = read(tar_bytes(pair(name)))
    assert shape(found) == [(name, ["png", "txt", "json"])]
    assert contents == Contents(members=3)


def test_members_that_belong_to_no_pair_are_counted():
    others = [header("d", tarfile.DIRTYPE), header("d/0.jpg", tarfile.SYMTYPE), header("d/1.txt", tarfile.LNKTYPE)]
    others += [header("d/2.jpg", tarfile.FIFOTYPE), ("README", b"no suffix"), (".hidden.jpg", b"no name before the dot")]
    found, contents = read(tar_bytes([*others, *pair("d/0")]))
    assert shape(found) == [("d/0", ["png", "txt", "json"])]
    assert contents == Contents(members=9, ignored=6, strays=2, stray="README")


@pytest.mark.parametrize(
    ("names", "repeated"),
    [
        (["0.jpg", "0.txt", "0.jpg"], [True]),
        (["0.jpg", "0.JPG"], [True]),
        (["0.jpg", "0.txt", "1.jpg", "0.jpg", "0.txt"], [False, False, True]),
        (["0.jpg", "0.txt", "1.jpg", "0.TXT"], [False, False, True]),
        (["0.jpg", "d/0.jpg"], [False, False]),
        (["0.jpg", "0.jpeg"], [False]),
    ],
)
def test_repeated_keys_and_suffixes_are_flagged(names, repeated):
    found, contents = read(tar_bytes([(name, b"") for name in names]))
    assert [group.repeated for group in found] == repeated
    assert contents.members == len(names)


def names_of(found: list[Group]) -> list[tuple[str, list[str]]]:
    return [(group.key, sorted(group.members)) for group in found]


ORDERS = {
    "by suffix": lambda names: sorted(names, key=lambda name: name.rpartition(".")[2]),
    "backwards": lambda names: names[::-1],
    "shuffled": lambda names: random.Random(0).sample(names, len(names)),
}


@pytest.mark.parametrize("order", ORDERS)
def test_members_of_a_key_are_put_together_wherever_they_are(order):
    names = [f"{i:03d}.{suffix}" for i in range(50) for suffix in ("jpg", "json", "txt")]
    found, contents = read(tar_bytes([(name, b"") for name in ORDERS[order](names)]))
    assert sorted(names_of(found)) == [(f"{i:03d}", ["jpg", "json", "txt"]) for i in range(50)]
    assert [group.index for group in found] == list(range(50))
    assert not any(group.repeated for group in found)
    assert contents.members == 150
    assert bool(contents.scattered) == (order != "backwards")
    starts = [group.start for group in found]
    assert starts == sorted(starts)


def test_a_tar_that_is_written_twice_in_any_order_has_each_key_twice():
    names = ["0.jpg", "1.jpg", "0.txt", "1.txt"] * 2
    found = read(tar_bytes([(name, b"") for name in names]))[0]
    assert names_of(found) == [(key, ["jpg", "txt"]) for key in "0101"]
    assert [group.repeated for group in found] == [False, False, True, True]


@pytest.mark.parametrize("window", [1, 2, 3, 4, 7, 100])
def test_neighbours_stay_together_however_few_headers_are_held(monkeypatch, window):
    data = tar_bytes([(f"{i}.{suffix}", b"") for i in range(20) for suffix in ("jpg", "txt", "json")])
    whole = read(data)
    monkeypatch.setattr(tar, "WINDOW", window)
    assert read(data) == whole


def test_what_is_too_far_apart_is_counted_and_never_a_second_pair(monkeypatch):
    monkeypatch.setattr(tar, "WINDOW", 10)
    names = [f"{i}.{suffix}" for suffix in ("jpg", "txt") for i in range(12)]
    found, contents = read(tar_bytes([(name, b"") for name in names]))
    assert contents.members == sum(group.count for group in found) == 24
    assert contents.apart == sum(group.repeated for group in found) > 0


def test_only_the_group_at_which_a_scattered_tar_breaks_off_is_in_doubt():
    data = tar_bytes([(f"{i}.{suffix}", b"x" * 600) for suffix in ("jpg", "txt") for i in range(3)])
    with tarfile.open(fileobj=io.BytesIO(data)) as whole:
        cut = whole.getmembers()[4].offset_data + 100
    found, contents = read(data[:cut])
    assert [bool(group.broken) for group in found] == [False, True, False]
    assert contents.broken == found[1].broken


def test_at_the_last_dot_a_key_may_have_dots():
    names = ["v1.0/img.v2.jpg", "v1.0/img.v2.TXT", "v1.0/img.jpg", "v1.0/img.txt", "a..jpg", "b.tar/c.txt"]
    others = ["._img.jpg", "__MACOSX/._img.jpg", ".DS_Store", ".jpg", "d/.txt", "README"]
    found, contents = read(tar_bytes([(name, b"") for name in names + others]), key_rule="last_dot")
    assert names_of(found) == [
        ("v1.0/img.v2", ["jpg", "txt"]),
        ("v1.0/img", ["jpg", "txt"]),
        ("a.", ["jpg"]),
        ("b.tar/c", ["txt"]),
    ]
    assert (contents.members, contents.ignored, contents.swallowed) == (12, 6, 0)


@pytest.mark.parametrize(
    ("names", "swallowed", "example"),
    [
        (["photo.jpg", "photo.txt", "photo.1.jpg", "photo.1.txt", "photo.1.json"], 3, "photo.1"),
        ([f"d/scan.{i:04d}.{suffix}" for i in range(5) for suffix in ("PNG", "json")], 10, "d/scan.0000"),
        (["img.v2.jpg", "img.v2.cls"], 2, "img.v2"),
        (["a.jpg", "a.txt", "a.seg.png", "a.caption.txt", "a.0.txt", "a.depth.npy", "v1.0/b.jpg", "v1.0/b.txt"], 0, ""),
    ],
)
def test_pairs_that_the_first_dot_puts_under_another_key_are_counted(names, swallowed, example):
    contents = read(tar_bytes([(name, b"") for name in names]))[1]
    assert (contents.swallowed, contents.swallowed_key) == (swallowed, example)


@pytest.mark.parametrize("cut", CUTS)
def test_a_tar_that_is_cut_off_is_never_taken_for_whole(cut):
    found, contents = read(SMALL[:cut])
    assert contents.broken
    assert contents.members == sum(len(group.members) for group in found)
    assert shape(found)[:-1] == shape(read(SMALL)[0])[: max(0, len(found) - 1)]  # only the last can be in doubt


@pytest.mark.parametrize("extra", [0, BLOCK, len(SMALL) - end_of(SMALL), 1 << 20])
def test_two_zero_blocks_and_more_zeros_are_an_end(extra):
    found, contents = read(SMALL[: end_of(SMALL)] + bytes(extra))
    assert contents == Contents(members=9)
    assert len(found) == 3


@pytest.mark.parametrize("rest", [SMALL, b"\n", bytes(3 << 20) + b"x"])
def test_what_follows_the_end_is_not_dropped_in_silence(rest):
    assert "after its end" in read(SMALL + rest)[1].broken


def test_a_hole_of_zeros_is_not_an_end():
    hole = patched(SMALL, second_header(SMALL), bytes(4 * BLOCK))  # what a download with gaps leaves on disk
    found, contents = read(hole)
    assert contents.broken
    assert shape(found) == [("a/0", ["png"])]


@pytest.mark.parametrize("at", [0, 100, 124, 148, 257])
def test_a_damaged_header_is_not_an_end(at):
    found, contents = read(patched(SMALL, second_header(SMALL) + at, b"\xc3"))
    assert contents.broken
    assert shape(found) == [("a/0", ["png"])]


@pytest.mark.parametrize("size", [-512, -1024, -(2**40), 8**11 - 1])
def test_a_header_with_an_impossible_size_ends_the_reading(size):
    class Impatient(io.BytesIO):
        reads = 0

        def read(self, *args):
            self.reads += 1
            assert self.reads < 1000, "reading in circles"
            return super().read(*args)

    found, contents = read(with_size(SMALL, second_header(SMALL), size), Impatient)
    assert contents.broken
    assert len(found) == 1


def test_a_size_that_no_file_system_can_seek_to_ends_the_reading(tmp_path):
    (tmp_path / "0.tar").write_bytes(with_size(SMALL, second_header(SMALL), 2**62))
    contents = Contents()
    with open(tmp_path / "0.tar", "rb") as file:
        found = list(read_groups(file, contents))
    assert contents.broken == "unexpected end of data"
    assert shape(found) == [("a/0", ["png", "txt"])]


def extension(kind: bytes, data: bytes, size: int | None = None) -> bytes:
    """A header that belongs to the next one, as long names have; `size` may be a lie."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = kind, len(data)
    block = info.tobuf(tarfile.GNU_FORMAT)
    return with_size(block, 0, size if size is not None else len(data)) + data + bytes(-len(data) % BLOCK)


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
@pytest.mark.parametrize("size", [2**34, 2**62])
def test_an_extension_header_that_is_too_large_is_not_read(kind, size):
    found, contents = read(extension(kind, b"x", size) + SMALL)
    assert not found
    assert f"an extension header of {size + -size % BLOCK} bytes" in contents.broken


def test_extension_headers_of_extension_headers_end_the_reading():
    found, contents = read(extension(tarfile.GNUTYPE_LONGNAME, b"x\0") * 2000 + SMALL)
    assert not found
    assert "extension headers of extension headers" in contents.broken


@pytest.mark.parametrize("data", [b"", b"x", b"<html>Access Denied</html>" * 100, image(size=(64, 64)), bytes(BLOCK)])
def test_what_is_no_tar_is_broken(data):
    found, contents = read(data)
    assert not found
    assert contents.broken


def test_a_tar_without_pairs_is_whole():
    assert read(tar_bytes([])) == ([], Contents())
    assert read(tar_bytes([header("d", tarfile.DIRTYPE)])) == ([], Contents(members=1, ignored=1))


def test_a_member_that_the_file_does_not_hold_is_an_error():
    (group,) = read(tar_bytes(pair("0")))[0]
    with pytest.raises(EOFError, match=r"0\.txt: 3 bytes of 9"):
        read_member(io.BytesIO(tar_bytes(pair("0"))[: group.members["txt"].offset_data + 3]), group.members["txt"])
