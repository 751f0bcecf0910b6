"""Tables keep what is put in, and equal tables are equal bytes."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.config import Config
from pipeline.corpus.pairs import Pair, Quarantined
from pipeline.run_folder import tables
from pipeline.run_folder.columns import IDENTITY, columns
from pipeline.storage.parquet import FOOTER

BLANK = np.empty((3, 0, 0), np.uint8)


def part(start: int, count: int) -> tuple[list[Pair], np.ndarray, np.ndarray]:
    """Some pairs, their image features [N, 4] and text features [N, 3]."""
    rng = np.random.default_rng(start)
    pairs = [Pair(2 * i, f"d/{i}é", f"{i:032x}", "a caption", BLANK, f"{i + 7:032x}") for i in range(start, start + count)]
    return pairs, rng.normal(size=(count, 4)).astype(np.float16), rng.normal(size=(count, 3)).astype(np.float16)


@pytest.mark.parametrize("counts", [(5,), (4, 4, 1), (3, 0, 2), (0,), (0, 0)])
def test_features_come_back_as_they_were(tmp_path, counts):
    parts = [part(10 * i, count) for i, count in enumerate(counts)]
    for i, content in enumerate(parts):
        storage.write_bytes(str(tmp_path / tables.part_name(i)), tables.parquet_bytes(tables.features_table(*content)))
    features = tables.read_features(str(tmp_path), len(parts))
    pairs = [pair for content in parts for pair in content[0]]
    assert features.position.tolist() == [pair.index for pair in pairs]
    assert (features.key, features.uid) == ([pair.key for pair in pairs], [pair.uid for pair in pairs])
    assert features.image_hash == [pair.image_hash for pair in pairs]
    for read, column in ((features.images, 1), (features.texts, 2)):
        written = np.concatenate([content[column] for content in parts])
        assert read.dtype == np.float16
        assert np.array_equal(read, written)


def test_a_part_that_is_missing_is_an_error(tmp_path):
    storage.write_bytes(str(tmp_path / tables.part_name(0)), tables.parquet_bytes(tables.features_table(*part(0, 2))))
    with pytest.raises(FileNotFoundError):
        tables.read_features(str(tmp_path), 2)


def test_the_same_table_gives_the_same_bytes():
    one, two = (tables.parquet_bytes(tables.features_table(*part(0, 7))) for _ in range(2))
    assert one == two
    assert one != tables.parquet_bytes(tables.features_table(*part(1, 7)))


def test_vectors_are_stored_as_they_are_and_identities_compressed():
    pairs, *_ = part(0, 256)
    rng = np.random.default_rng(0)
    vectors = [rng.normal(size=(256, width)).astype(np.float16) for width in (768, 512)]
    data = tables.parquet_bytes(tables.features_table(pairs, *vectors))
    assert len(data) < 1.03 * sum(matrix.nbytes for matrix in vectors)
    group = pq.read_metadata(io.BytesIO(data)).row_group(0)
    stored = {(c := group.column(i)).path_in_schema.partition(".")[0]: c for i in range(group.num_columns)}
    assert {name: column.compression for name, column in stored.items() if "features" in name} == {
        "image_features": "UNCOMPRESSED",
        "text_features": "UNCOMPRESSED",
    }
    assert {column.compression for name, column in stored.items() if "features" not in name} == {"ZSTD"}
    assert not any("DICTIONARY" in coding for name in ("image_features", "text_features") for coding in stored[name].encodings)
    assert data.count(vectors[0].tobytes()) == 1  # any reader of Parquet finds the numbers


def test_a_changed_byte_of_a_vector_is_found():
    pairs, *_ = part(0, 256)
    vectors = np.random.default_rng(0).normal(size=(256, 64)).astype(np.float16)
    data = tables.parquet_bytes(tables.features_table(pairs, vectors, vectors))
    at = data.index(vectors.tobytes()) + 1000
    with pytest.raises(OSError, match="checksum"):
        storage.parse_table(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], verify=True)


def test_json_is_the_same_bytes_whatever_the_order():
    assert tables.json_bytes({"b": 1, "a": [1, 2]}) == tables.json_bytes({"a": [1, 2], "b": 1})
    assert tables.json_bytes({}).endswith(b"\n")


def test_quarantine_has_one_schema_with_and_without_rows():
    rows = [("read", Quarantined(3, "d/3", "0" * 32, "bad_json", "why")), ("embed", Quarantined(4, "", "", "bad_json", ""))]
    for content in (rows, []):
        table = pq.read_table(io.BytesIO(tables.parquet_bytes(tables.quarantine_table("a/00000", content))))
        assert table.schema == tables.QUARANTINE
        assert len(table) == len(content)
    assert tables.quarantine_table("a/00000", rows).to_pylist()[0] == {
        "shard": "a/00000",
        "index": 3,
        "key": "d/3",
        "uid": "0" * 32,
        "stage": "read",
        "reason": "bad_json",
        "detail": "why",
    }


def identity(count: int, with_fold: bool = True) -> dict[str, pa.Array]:
    pairs = part(0, count)
    features = tables.Features(
        np.arange(count, dtype=np.int32),
        list("abcdefgh"[:count]),
        [p.uid for p in pairs[0]],
        [p.image_hash for p in pairs[0]],
        *pairs[1:],
    )
    batch, fold = np.arange(count, dtype=np.int32) // 2, np.arange(count, dtype=np.int16) % 3
    return tables.identity("a/0", features, batch, fold if with_fold else None)


def test_scores_are_float32_beside_the_identity():
    table = tables.scores_table(identity(3), {"clip_score": np.array([0.5, 0.25, 1], np.float32)})
    assert table.schema == pa.schema(
        [
            ("shard", pa.string()),
            ("index", pa.int32()),
            ("key", pa.string()),
            ("uid", pa.string()),
            ("image_hash", pa.string()),
            ("batch", pa.int32()),
            ("fold", pa.int16()),
            ("clip_score", pa.float32()),
        ]
    )
    assert table.slice(2).to_pylist() == [
        {"shard": "a/0", "index": 2, "key": "c", "uid": f"{2:032x}", "image_hash": f"{9:032x}"}
        | {"batch": 1, "fold": 2, "clip_score": 1.0}
    ]


CONFIG = Config.model_validate(
    {"run": "run", "corpus": {"shards": "x"}, "model": {"name": "x"}}
    | {"targets": {"a": {"shards": "x"}, "b": {"shards": "x", "loss": "retrieval_margin"}}}
    | {"score": {"columns": ["negclip_loss", "normsim_2"]}}
)


def test_a_table_on_storage_says_what_its_columns_mean_and_which_run_it_is_of(tmp_path):
    found = columns(CONFIG)
    scores = {column.name: np.zeros(3, np.float32) for column in found}
    plain = tables.scores_table(identity(3), scores).append_column("sidecar_width", pa.array([1, 2, 3]))
    url = str(tmp_path / "a.parquet")
    storage.write_bytes(url, tables.parquet_bytes(tables.described(plain, found, "the run", "the shard")))
    table = tables.read_table(url)
    said = {field.name: {k.decode(): v.decode() for k, v in (field.metadata or {}).items()} for field in table.schema}
    assert list(said) == [*IDENTITY, *scores, "sidecar_width"]
    for column in found:
        assert said[column.name] == {"says": column.says, "unit": column.unit, "good": column.good}
        assert tables.good_end(table.schema.field(column.name)) == column.good
    for name, says in IDENTITY.items():
        assert said[name] == {"says": says}
    assert said["sidecar_width"] == {}
    assert tables.good_end(table.schema.field("sidecar_width")) == "high"
    assert tables.run_of(table.schema) == tables.read_run(url) == ("the run", "the shard")
    assert table.to_pydict() == plain.to_pydict(), "values are left as they are"


def test_the_run_of_a_table_with_a_long_footer_is_read_too(tmp_path):
    many = {f"column_{i:05d}": np.zeros(1, np.float32) for i in range(2000)}
    url = str(tmp_path / "a.parquet")
    table = tables.described(tables.scores_table(identity(1), many), [], "the run", "the shard")
    storage.write_bytes(url, data := tables.parquet_bytes(table))
    assert len(data) > 2 * FOOTER
    assert tables.read_run(url) == ("the run", "the shard")


@pytest.mark.parametrize("data", [b"", b"no table", b"PAR1 is not one either PAR1"])
def test_what_is_no_table_is_of_no_run(tmp_path, data):
    storage.write_bytes(str(tmp_path / "a.parquet"), data)
    assert tables.read_run(str(tmp_path / "a.parquet")) == ("", "")


def test_gradients_of_any_size_come_back_to_eleven_bits_of_their_largest_number(tmp_path):
    size = 10.0 ** np.array([-30, -7, 0, 5, 30])  # fp16 alone holds the third
    parts = [np.random.default_rng(i).normal(size=(5, 6)).astype(np.float32) * size[:, None].astype(np.float32) for i in (0, 1)]
    parts[1][2] = 0
    halves = [tables.HalfPrecision.empty(5, 6), tables.HalfPrecision.empty(5, 6)]
    for half, part in zip(halves, parts, strict=True):
        for rows in (np.array([3, 0]), np.array([1, 2, 4])):
            half.put(rows, part[rows])
    url = str(tmp_path / "a.parquet")
    storage.write_bytes(url, tables.parquet_bytes(tables.index_table(identity(5, with_fold=False), *halves)))
    table = tables.read_table(url)
    assert table.column_names[:5] == tables.INDEXED
    for read, part in zip(tables.read_gradients(table), parts, strict=True):
        assert (np.abs(read - part) <= 2.0**-11 * np.abs(part).max(1, keepdims=True)).all()
