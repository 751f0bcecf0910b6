"""What `embed` accepted is decoded again, exactly that, batch by batch."""

import io
from pathlib import Path

import numpy as np
import pytest

from pipeline import storage
from pipeline.config import Config
from pipeline.corpus.images import Resize
from pipeline.corpus.pairs import Pair, ReadingRules, read_pair
from pipeline.corpus.shards import find
from pipeline.corpus.tar import Contents, read_groups
from pipeline.errors import RunError
from pipeline.sections import Reading
from pipeline.stages.forward.decode import Members, decode
from tests.support.reading import read_shard
from tests.support.tars import image, pair, write_tar

PREPROCESS = {"size": (32, 32), "mode": "RGB", "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}
PREPROCESS |= {"resize_mode": "shortest", "fill_color": 0}


@pytest.fixture
def config(tmp_path):
    target = {"clean": {"shards": "nowhere"}}
    return Config(run=str(tmp_path / "run"), corpus={"shards": "x"}, model={"name": "local-dir:x"}, targets=target)


def read(path: Path, config) -> list[Pair]:
    """The pairs that `embed`'s reader accepts."""
    resize, file = Resize(PREPROCESS), io.BytesIO(path.read_bytes())
    rules = ReadingRules(path.stem, Reading(), config.embed, resize)
    everything = [read_pair(file, group, rules) for group in read_groups(file, Contents())]
    return [p for p in everything if isinstance(p, Pair)]


def shards(folder: Path, config) -> tuple[list[Members], dict[str, list[Pair]]]:
    """Two shards with pairs that are quarantined between good ones, the second of them cut off."""
    broken = [("b.png", b"no image"), ("b.txt", b"x"), ("c.png", image()), ("c.txt", b" ")]
    write_tar(folder / "0.tar", [*pair("a", "first"), *broken, *pair("d", "last"), *pair("e"), *pair("f")])
    cut = write_tar(folder / "1.tar", [*pair("g"), *pair("h"), *pair("i")])
    cut.write_bytes(cut.read_bytes()[: 2 * 3 * 1024 + 600])  # within the third pair's image
    found = find(str(folder))
    pairs = {s.name: read(Path(s.source.url), config) for s in found}
    assert len(pairs["1"]) == 2
    return [Members(s, np.array([p.index for p in pairs[s.name]]), [p.uid for p in pairs[s.name]]) for s in found], pairs


@pytest.mark.parametrize("remote", [False, True])
def test_batches_of_several_shards_are_the_accepted_pairs_in_the_order_asked(tmp_path, config, remote):
    (first, second), pairs = shards(tmp_path / "tars", config)
    assert first.position.tolist() == [0, 3, 4, 5]
    if remote:  # any other file system: a local copy is made
        places = {m.shard.name: f"memory://decode/{m.shard.name}.tar" for m in (first, second)}
        for member in (first, second):
            storage.write_bytes(places[member.shard.name], storage.read_bytes(member.shard.source.url))
        first, second = (m._replace(shard=s) for m, s in zip((first, second), find("memory://decode"), strict=True))
    batches = [first.take(np.array([2, 0])), first.take(np.array([1, 3])), second]
    decoded = list(decode(batches, Reading(), config, PREPROCESS))
    wanted = [[pairs["0"][i] for i in (2, 0)], [pairs["0"][i] for i in (1, 3)], pairs["1"]]
    assert [d.captions for d in decoded] == [[p.caption for p in w] for w in wanted]
    for found, truth in zip(decoded, wanted, strict=True):
        assert np.array_equal(found.pixels, np.stack([p.pixels.transpose(2, 0, 1) for p in truth]))


def test_a_pair_that_is_not_what_was_embedded_ends_the_run(tmp_path, config):
    (first, second), _ = shards(tmp_path, config)
    for wrong in (
        second._replace(position=second.position + 7),  # no such pair
        first._replace(position=np.array([0, 1, 4, 5])),  # a quarantined one
        first._replace(uid=[*first.uid[:3], "0" * 32]),  # another one
    ):
        with pytest.raises(RunError, match="the shard has changed"):
            list(decode([wrong], Reading(), config, PREPROCESS))
    with pytest.raises(OSError, match="bytes"):
        list(
            decode(
                [first._replace(shard=first.shard._replace(source=first.shard.source._replace(size=1)))],
                Reading(),
                config,
                PREPROCESS,
            )
        )


@pytest.mark.parametrize("reading", [Reading(key="last_dot"), Reading(pick="first"), Reading(pick="all")])
def test_pairs_are_told_apart_as_embed_does_it(tmp_path, config, reading):
    members = [m for i in range(4) for m in pair(f"scan.{i}", f"one of {i}\ntwo of {i}")]
    if reading.key == "first_dot":
        members = [(name.replace("scan.", ""), data) for name, data in members]
    url = str(write_tar(tmp_path / "0.tar", sorted(members, key=lambda member: member[0][-3:])))
    (shard,) = find(url)
    known = read_shard(url, shard="0", **reading._asdict()).pairs
    assert len(known) == (8 if reading.pick == "all" else 4)
    wanted = [known[i] for i in (3, 0, 2)]
    batch = Members(shard, np.array([p[0] for p in wanted]), [p[2] for p in wanted])
    (decoded,) = decode([batch], reading, config, PREPROCESS)
    assert decoded.captions == [p[3] for p in wanted]
