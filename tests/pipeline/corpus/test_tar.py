"""A tar is read to its end, member by member, or said to be broken."""

import io
import random
import tarfile

import pytest

from pipeline.corpus.tar import BLOCK, Contents, Group, read_groups, read_member
from tests.support.tars import header, image, pair, tar_bytes


def read(data: bytes, file: type[io.BytesIO] = io.BytesIO) -> tuple[list[Group], Contents]:
    contents = Contents()
    return list(read_groups(file(data), contents)), contents


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
    assert contents == Contents(members=9, ignored=6)


@pytest.mark.parametrize(
    ("names", "repeated"),
    [
        (["0.jpg", "0.txt", "0.jpg"], [True]),
        (["0.jpg", "0.JPG"], [True]),
        (["0.jpg", "1.jpg", "0.txt"], [False, False, True]),
        (["0.jpg", "d/0.jpg"], [False, False]),
        (["0.jpg", "0.jpeg"], [False]),
    ],
)
def test_repeated_keys_and_suffixes_are_flagged(names, repeated):
    found, contents = read(tar_bytes([(name, b"") for name in names]))
    assert [group.repeated for group in found] == repeated
    assert contents.members == len(names)


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
    assert "recursion" in contents.broken


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
