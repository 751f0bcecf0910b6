"""Copies in a whole run: they share a fold, columns count them, exact ones are said, and too many are refused."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from ecif.copies import Copies
from pipeline.errors import RunError
from pipeline.run import run
from pipeline.run_folder import tensors
from tests.support.run_folders import violations
from tests.support.tars import read_tar, write_tar

COPIED = 6  # pairs of the second shard that get the image of the first pair of the first one, and one caption for all


@pytest.fixture(scope="module")
def shards(corpus):
    return [read_tar(corpus / "corpus" / f"0000{i}.tar") for i in range(3)]


def replaced(members: list[tuple[str, bytes]], suffix: str, by: bytes, count: int) -> list[tuple[str, bytes]]:
    """A shard whose first pairs have another image or caption."""
    names = [name for name, _ in members if name.endswith(suffix)][:count]
    return [(name, by if name in names else data) for name, data in members]


@pytest.fixture(scope="module")
def copied(shards, configure, local_ray, tmp_path_factory):
    """A finished run of a corpus with placeholder images and boilerplate: its outcome, and the bytes of the placeholder."""
    folder = tmp_path_factory.mktemp("copied")
    placeholder = next(data for name, data in shards[0] if name.endswith(".webp"))
    second = replaced(replaced(shards[1], ".webp", placeholder, COPIED), ".txt", b"an image that could not be loaded", COPIED)
    for name, members in (("00000", shards[0]), ("00001", second), ("00002", shards[2])):
        write_tar(folder / "corpus" / f"{name}.tar", members)
    return run(configure(folder / "run", corpus={"shards": str(folder / "corpus")})), placeholder


def test_placeholder_images_and_boilerplate_captions_show_and_share_a_fold(copied):
    table = copied[0].scores()
    image, caption, fold = (table[name].to_numpy() for name in ("image_copies", "caption_copies", "fold"))
    rows = [0, *range(36, 36 + COPIED)]
    assert (image[rows] >= COPIED).all()
    assert np.isin(fold[rows], fold[0]).all()
    assert (caption[rows[1:]] >= COPIED - 1).all()
    assert not violations(copied[0].finished.folder)


def test_the_folds_are_those_of_the_groups(copied):
    finished = copied[0].finished
    known = tensors.load(finished.checkpoints[0].artifacts(finished.folder).url("copies"), Copies)
    assert len(known.group) == 108  # the sample is the whole corpus
    rows = known.fold[known.group]
    assert known.fold.equal(rows)
    assert sorted(known.fold.tolist()) == sorted(finished.scores(["fold"])["fold"].to_pylist())


def test_exact_copies_are_said_and_recorded(copied):
    outcome, placeholder = copied
    table = outcome.scores(["image_hash", "key"])
    digest = hashlib.blake2b(placeholder, digest_size=16).hexdigest()
    assert table["image_hash"].to_pylist().count(digest) == 1 + COPIED
    facts = json.loads(Path(outcome.finished.folder, "run.json").read_text())
    key = table["key"][0].as_py()
    assert facts["exact_copies"] == {"pairs": 108, "repeated": 1 + COPIED, "example": f"00000 {key}"}
    (said,) = outcome.finished.exact_copies.said()
    assert said == f"7 of 108 pairs have an image that other pairs have too, byte for byte, such as 00000 {key}"


def test_a_corpus_of_one_image_is_refused_in_one_line(shards, configure, local_ray, tmp_path):
    placeholder = next(data for name, data in shards[0] if name.endswith(".webp"))
    write_tar(tmp_path / "corpus" / "0.tar", replaced(shards[0], ".webp", placeholder, 36))
    with pytest.raises(RunError, match="the images of the 36 sampled pairs are copies of 1: 3 folds need at least 3 different"):
        run(configure(tmp_path / "run", corpus={"shards": str(tmp_path / "corpus")}))
