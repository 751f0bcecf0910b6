"""A uid is 32 hex digits, in whatever spelling; anything else is replaced, and counted."""

import uuid

import numpy as np
import pyarrow as pa
import pytest

from pipeline.corpus.uids import UidCounter, Uids, pack, pack_column, repeats, uid_of, unpack

UUID = uuid.UUID("0123456789abcdef0123456789abcdef")
MADE_UP = "611af6d833e57864f39588ec99d1ae4a"


@pytest.mark.parametrize(
    "given",
    [UUID.hex, UUID.hex.upper(), str(UUID), str(UUID).upper(), f"{{{UUID}}}", UUID.urn, f"urn:uuid:{UUID.hex}", f" {UUID}\n"],
)
def test_every_spelling_of_32_digits_is_one_uid(given):
    assert uid_of("00000", "0", given) == (UUID.hex, None)


@pytest.mark.parametrize(
    "given", [UUID.hex[:-1], UUID.hex + "0", "x" * 32, f"{{{UUID}", f"{UUID}}}", "1-2", 7, 1.5, True, [UUID.hex]]
)
def test_anything_else_is_replaced_by_a_hash_of_shard_and_key(given):
    assert uid_of("00000", "0", given) == (MADE_UP, str(given))


@pytest.mark.parametrize("given", [None, "", "  "])
def test_what_is_not_there_too(given):
    assert uid_of("00000", "0", given) == (MADE_UP, "")
    assert uid_of("00000", "1", given).text != MADE_UP


UIDS = ["f" * 32, "0" * 32, "0" * 31 + "1", "1" + "0" * 31, "0" * 16 + "f" * 16]


def test_packed_uids_are_sorted_as_their_digits_are():
    assert unpack(pack(UIDS)) == UIDS
    assert unpack(np.sort(pack(UIDS))) == sorted(UIDS)
    assert unpack(pack([])) == []


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_a_column_is_packed_as_its_strings_are(kind):
    column = pa.chunked_array([pa.array(UIDS, kind), pa.array([], kind), pa.array(UIDS * 3, kind).slice(3, 8)])
    assert (pack_column(column) == pack(column.to_pylist())).all()
    assert len(pack_column(pa.chunked_array([], kind))) == 0


@pytest.mark.parametrize("uid", ["f" * 31, "f" * 33, "g" * 32, "é" * 16, None])
def test_what_is_no_uid_is_not_packed(uid):
    with pytest.raises((ValueError, pa.ArrowInvalid)):
        pack_column(pa.chunked_array([[UIDS[0], uid]], pa.string()))


def test_repeats():
    assert unpack(repeats(pack([*UIDS, UIDS[1], UIDS[0], UIDS[1]]))) == sorted([UIDS[0]] * 2 + [UIDS[1]] * 3)
    assert len(repeats(pack(UIDS))) == len(repeats(pack([]))) == len(repeats(pack(UIDS[:1]))) == 0


def test_what_is_said():
    assert Uids(pairs=7).said() == []
    said = Uids(7, 1, 2, "'7' (00000, 0)", 4, "f" * 32).said()
    assert [line.partition(" pairs ")[0] for line in said] == ["2 of 7", "1 of 7", "4 of 7"]
    assert "such as '7' (00000, 0):" in said[0]
    assert f"such as {'f' * 32}:" in said[2]


def test_the_example_of_a_replaced_uid_can_be_printed():
    counter = UidCounter("00000")
    for key, replaced in (("0", None), ("\udcff", "\ud800"), ("1", ""), ("2", "7")):
        counter.add(key, replaced)
    assert (counter.without, counter.other) == (1, 2)
    assert counter.example.encode() == rb"'\ud800' (00000, \udcff)"
