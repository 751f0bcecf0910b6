"""What is odd about a shard as a whole is one line that says what mends it; an ordinary shard has none."""

import pytest

from tests.support.reading import Reading, read_shard
from tests.support.tars import header, image, tar_bytes

PIXELS = image()


@pytest.fixture
def shard(tmp_path):
    """Writes a shard and reads it."""

    def read(members, **options) -> Reading:
        (tmp_path / "0.tar").write_bytes(tar_bytes(members))
        return read_shard(str(tmp_path / "0.tar"), **options)

    return read


def members(*keys: str, caption: str = "a caption", suffix: str = "txt") -> list[tuple[str, bytes]]:
    return [m for key in keys for m in ((f"{key}.jpg", PIXELS), (f"{key}.{suffix}", caption.encode()))]


@pytest.mark.parametrize(
    "ordinary",
    [
        [],
        members("0", "1"),
        [header("v1.0", b"5"), *members("v1.0/0"), ("v1.0/0.seg.png", PIXELS), *members("v1.0/1")],
        [*members("0"), *((f"._0.{i}", b"x") for i in range(9)), (".DS_Store", b"x")],
        [*members("0", "1"), *members("2", caption="two\nlines"), ("3.jpg", PIXELS)],
    ],
)
def test_an_ordinary_shard_has_no_remark(shard, ordinary):
    assert shard(ordinary).accounting.remarks is None


DOTS = members("photo", "photo.1", "photo.2", "scan.0", "scan.1")


def test_keys_with_dots(shard):
    found = shard(DOTS)
    assert (found.accounting.pairs, found.accounting.swallowed) == (2, 8)
    assert "8 members are swallowed" in found.accounting.remarks["dots"]
    assert "photo.1; key: last_dot" in found.accounting.remarks["dots"]
    mended = shard(DOTS, key="last_dot")
    assert [p[1] for p in mended.pairs] == ["photo", "photo.1", "photo.2", "scan.0", "scan.1"]
    assert (mended.accounting.swallowed, mended.accounting.remarks) == (0, None)


def test_members_that_are_not_neighbours(shard):
    found = shard(sorted(members("0", "1", "2"), key=lambda member: member[0][-3:]))
    assert [p[1] for p in found.pairs] == ["0", "1", "2"]
    assert found.accounting.remarks.keys() == {"scattered"}
    assert found.accounting.remarks["scattered"].startswith("3 members are not next to others of their key; they are read here")


def test_captions_elsewhere(shard):
    found = shard(members("0", "1", suffix="caption.txt"))
    assert found.accounting.remarks == {
        "no caption": "2 of 2 pairs have no caption, such as 0: no .txt; there are .caption.txt, .jpg"
    }
    assert len(shard(members("0", "1", suffix="caption.txt"), caption="caption.txt").pairs) == 2


def test_a_folder_for_each_pair(shard):
    found = shard([(f"{i}/{name}", data) for i in range(3) for name, data in (("image.jpg", PIXELS), ("caption.txt", b"a"))])
    assert found.accounting.remarks == {
        "no caption": "3 of 6 pairs have no caption, such as 0/image: no .txt; there are .jpg",
        "no image": "3 of 6 pairs have no image, such as 0/caption: members: ['txt']",
    }


def test_texts_of_several_lines(shard):
    five = members("0", "1", caption="one\ntwo\nthree")
    assert "pick: first} or pick: all" in shard(five).accounting.remarks["lines"]
    assert shard(five, pick="first").accounting.remarks is None
    found = shard(five, pick="all")
    assert [p[1::2] for p in found.pairs] == [
        [f"{key}{number}", text] for key in "01" for number, text in zip(("", ".1", ".2"), ("one", "two", "three"), strict=True)
    ]
    assert (found.accounting.pairs, found.accounting.in_pairs, found.accounting.remarks) == (6, 4, None)
    assert len({p[2] for p in found.pairs}) == 2  # captions of an image have its uid


@pytest.mark.parametrize(("successes", "lost"), [(2, 0), (5, 3)])
def test_what_img2dataset_counted_are_images(shard, tmp_path, successes, lost):
    (tmp_path / "0_stats.json").write_text(f'{{"successes": {successes}}}')
    accounting = shard(members("0", "1", caption="one\ntwo\nthree"), pick="all").accounting
    assert (accounting.pairs, accounting.successes, accounting.lost) == (6, successes + 4, lost)


def test_members_that_are_in_no_pair(shard):
    found = shard([("image", PIXELS), ("text", b"a"), (".0.jpg", PIXELS), *members("1")])
    assert found.accounting.remarks["ignored"].startswith("3 of 5 members are ignored, such as image: ")


def test_names_are_shown_on_one_line(shard):
    found = shard(members("a\nb\x1b[31m.1", "a\nb\x1b[31m.2"))
    assert all(line.isprintable() for line in found.accounting.remarks.values())
