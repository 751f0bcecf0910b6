"""What passes between the driver, the readers and the actors arrives as it was sent."""

import numpy as np
import pyarrow as pa
import pytest

from pipeline import storage
from pipeline.corpus.pairs import Pair, Quarantined
from pipeline.run_folder.tables import Accounting
from pipeline.sections import Reading
from pipeline.stages.embed.rows import Busy, Embedded, Part, Refused, ToRead

SOURCE = storage.Object("s3://bucket/é/00000.tar", 2**40, "etag", 1.5)
COUNTS = {"members": 8, "in_pairs": 6, "ignored": 2, "pairs": 3, "embedded": 0}
DONE = Accounting(
    "a/00000", 2**40, "etag", "00", **COUNTS, quarantined={"bad_json": 1}, parts=1, broken=None, sidecar=["x", "y"]
)
REFUSED = [
    Refused("read", Quarantined(1, "k \\é", "", "bad_json", 'says "no"')),
    Refused("embed", Quarantined(2, "", "u", "bad_json", "")),
]


def pairs(count: int, label: int | None) -> list[Pair]:
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(count, 4, 5, 3), dtype=np.uint8)
    return [
        Pair(2 * i, f"d/{i}", f"{i:032x}", f"a caption\n漢字 {i}", pixels, f"{i + 7:032x}", label)
        for i, pixels in enumerate(images)
    ]


@pytest.mark.parametrize("uids", [None, storage.Object("s3://bucket/00000.parquet", 7, "etag")])
@pytest.mark.parametrize("classes", [[], ["a cat", "a dog"]])
def test_what_is_to_be_read(uids, classes):
    asked = ToRead(1, "a/00000", SOURCE, Reading("laion", "first", "last_dot"), classes, uids)
    assert ToRead.from_row(asked.to_row()) == asked
    assert asked.to_row()["size"] == SOURCE.size


@pytest.mark.parametrize(("count", "label"), [(3, None), (1, 7), (0, None)])
@pytest.mark.parametrize("accounting", [None, DONE])
@pytest.mark.parametrize("length", [None, 77])
def test_a_part(count, label, accounting, length):
    tokens = None if length is None else np.arange(count * length, dtype=np.int32).reshape(count, length)
    sent = Part(0, "a/00000", 2, 1234, pairs(count, label), REFUSED, label is not None, accounting, tokens, 0.5)
    row = sent.to_row()
    found = Part.from_row(row)
    plain = {"pairs": [], "pixels": None, "tokens": None}
    assert found._replace(**plain) == sent._replace(**plain)
    assert found.tokens is None if length is None else np.array_equal(found.tokens, tokens)
    assert len(found.pixels) == count
    for one, other in zip(found.pairs, sent.pairs, strict=True):
        assert np.array_equal(one.pixels, other.pixels)
        assert {k: v for k, v in vars(one).items() if k != "pixels"} == {k: v for k, v in vars(other).items() if k != "pixels"}
    assert {type(value) for value in row.values()} <= {bytes, str, int}, "nothing that Ray Data would have to find a type for"


@pytest.mark.parametrize("accounting", [None, DONE])
def test_an_embedded_part(accounting):
    sent = Embedded(1, "a/00000", 1234, 5, Busy(0.25, 0.5, 0.0, 2.0), REFUSED, accounting)
    assert Embedded.from_row(sent.to_row()) == sent


def test_an_actor_gets_pixels_and_tokens_without_a_copy():
    tokens = np.arange(3 * 7, dtype=np.int32).reshape(3, 7)
    sent = Part(0, "a/00000", 2, 1234, pairs(3, None), [], False, None, tokens)
    table = pa.table({name: [value] for name, value in sent.to_row().items()})
    found = Part.from_table(table)
    assert np.array_equal(found.tokens, tokens)
    for name, array in (("pixels", found.pixels), ("tokens", found.tokens)):
        stored = table[name].chunk(0).buffers()[2]
        assert stored.address <= array.__array_interface__["data"][0] < stored.address + stored.size
    assert all(np.shares_memory(pair.pixels, found.pixels) for pair in found.pairs)
