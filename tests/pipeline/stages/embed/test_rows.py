"""What passes between the driver, the readers and the actors arrives as it was sent."""

import numpy as np
import pytest

from pipeline import storage
from pipeline.corpus.pairs import Pair, Quarantined
from pipeline.run_folder.tables import Accounting
from pipeline.sections import Reading
from pipeline.stages.embed.rows import Embedded, Part, Refused, ToRead

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
    images = rng.integers(256, size=(count, 3, 4, 5), dtype=np.uint8)
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
def test_a_part(count, label, accounting):
    sent = Part(0, "a/00000", 2, 1234, pairs(count, label), REFUSED, label is not None, accounting)
    row = sent.to_row()
    found = Part.from_row(row)
    assert found._replace(pairs=[]) == sent._replace(pairs=[])
    for one, other in zip(found.pairs, sent.pairs, strict=True):
        assert np.array_equal(one.pixels, other.pixels)
        assert {k: v for k, v in vars(one).items() if k != "pixels"} == {k: v for k, v in vars(other).items() if k != "pixels"}
    assert {type(value) for value in row.values()} <= {bytes, str, int}, "nothing that Ray Data would have to find a type for"


@pytest.mark.parametrize("accounting", [None, DONE])
def test_an_embedded_part(accounting):
    sent = Embedded(1, "a/00000", 1234, 5, 0.25, REFUSED, accounting)
    assert Embedded.from_row(sent.to_row()) == sent
