"""Parquet objects: the schema from the last bytes, and the table from all of them."""

import io

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.storage.objects import read_bytes, read_end

FOOTER = 1 << 16  # last bytes of a file, which hold its schema unless it has very many columns


def read_schema(url: str) -> pa.Schema:
    """The schema of the table at a URL. Raises pa.ArrowInvalid if that is no Parquet."""
    try:
        return pq.read_schema(io.BytesIO(read_end(url, FOOTER)))
    except pa.ArrowInvalid:
        return pq.read_schema(io.BytesIO(read_bytes(url)))


def parse_table(data: bytes, columns: list[str] | None = None, verify: bool = False) -> pa.Table:
    """The table in a Parquet object; the columns that are named, by default all. With `verify`, checksums of pages are checked.

    `pq.read_table` reads through a dataset. A thread of it may release the bytes only while Python exits, and that aborts the
    process.
    """
    with pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=verify) as file:
        return file.read(columns, use_threads=False)
