"""The prompts of a zero-shot target are the lines of its files, whichever editor wrote them."""

import codecs

import pytest

from pipeline.sections import Target
from pipeline.stages.embed.prompts import read_prompts


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_byte_order_mark_is_no_part_of_a_class(tmp_path, mark, end):
    (tmp_path / "classes").write_bytes(mark + end.join([b"cat", b"dog", b""]))
    (tmp_path / "templates").write_bytes(mark + b"a {c}" + end)
    target = Target(shards="x", loss="zero_shot", classes=str(tmp_path / "classes"), templates=str(tmp_path / "templates"))
    assert read_prompts(target, "targets.a") == [["a cat"], ["a dog"]]
