"""Uids and images that several pairs have are counted exactly, by the driver or by workers."""

from collections import Counter

import numpy as np
import pytest

from pipeline.run_folder.finished import open_run, write_finished
from pipeline.run_folder.tables import Accounting
from pipeline.stages import repeats
from pipeline.stages.repeats import counted
from tests.support.finished import write_scores

UIDS = [f"{i:032x}" for i in range(4)]
SHARDS = {"00000": {"uid": UIDS[:2], "clip_score": [1, 2]}, "a/00001": {"uid": UIDS[2:], "clip_score": [3, 4]}}


@pytest.fixture(params=["the driver", "one share", "many shares"])
def resources(request, local_ray, monkeypatch):
    """Who sorts."""
    if request.param != "the driver":
        monkeypatch.setattr(repeats, "FEW", 0)
        monkeypatch.setattr(repeats, "OF_A_SHARE", 10**6 if request.param == "one share" else 1)
    return local_ray


def accounting(shard: str, **uids) -> Accounting:
    """Of a shard with two embedded pairs."""
    return Accounting(shard, 1, "", "", 6, 6, 0, 2, 2, {}, 1, None, **uids)


def test_what_is_known_about_uids_is_counted_once_and_recorded(tmp_path, monkeypatch, resources):
    shards = {"00000": {"uid": [UIDS[0], UIDS[1]]}, "a/00001": {"uid": [UIDS[2], UIDS[0]]}}
    run = open_run(write_scores(tmp_path, shards).folder)
    odd = {"without_uid": 1, "other_uid": 1, "other_uid_example": "'7' (a/00001, 0)"}
    done = {"00000": accounting("00000"), "a/00001": accounting("a/00001", **odd)}
    found = counted(run, done, resources)
    assert found.uids == (4, 1, 1, "'7' (a/00001, 0)", 2, UIDS[0])
    write_finished(found)
    assert open_run(str(tmp_path)).uids == found.uids
    monkeypatch.setattr(repeats, "_repeated", None)
    assert counted(run, done, resources).uids == found.uids, "of the same columns"
    with pytest.raises(TypeError):
        counted(run._replace(id="other columns"), done, resources)


def test_exact_copies_of_images_are_counted_over_all_shards_and_recorded(tmp_path, resources):
    hashes = {"00000": [UIDS[3], UIDS[1]], "a/00001": [UIDS[2], UIDS[1]], "b": [UIDS[1], UIDS[2]]}
    shards = {
        shard: {"uid": [f"{3 * i + j:032x}" for j in range(2)], "image_hash": of}
        for i, (shard, of) in enumerate(hashes.items())
    }
    run = open_run(write_scores(tmp_path, shards).folder)
    found = counted(run, {shard: accounting(shard) for shard in shards}, resources)
    assert found.exact_copies == (6, 5, "00000 0001")
    said = "5 of 6 pairs have an image that other pairs have too, byte for byte, such as 00000 0001"
    assert found.exact_copies.said() == [said]
    write_finished(found)
    assert open_run(str(tmp_path)).exact_copies == found.exact_copies


def test_without_exact_copies_nothing_is_said_of_them(tmp_path, resources):
    run = open_run(write_scores(tmp_path, SHARDS).folder)
    assert counted(run, {shard: accounting(shard) for shard in SHARDS}, resources).exact_copies.said() == []


def test_what_is_repeated_is_counted_as_by_hand(tmp_path, resources):
    draw = np.random.default_rng(0)
    shards = {
        f"{s:02d}": {
            name: [f"{n * (2**128 // 40):032x}" for n in draw.integers(0, 40, size=6).tolist()]
            for name in ("uid", "image_hash")
        }
        for s in range(5)
    }
    run = open_run(write_scores(tmp_path, shards).folder)
    done = {shard: accounting(shard)._replace(pairs=6, embedded=6) for shard in shards}
    found = counted(run, done, resources)
    times = {name: Counter(v for of in shards.values() for v in of[name]) for name in ("uid", "image_hash")}
    again = {name: sorted(v for v, n in of.items() if n > 1) for name, of in times.items()}
    assert (found.uids.pairs, found.uids.shared) == (30, again["uid"][0])
    assert found.uids.repeated == sum(times["uid"][v] for v in again["uid"])
    assert found.exact_copies.repeated == sum(times["image_hash"][v] for v in again["image_hash"])
    places = ((s, i) for s, of in shards.items() for i, v in enumerate(of["image_hash"]) if v == again["image_hash"][0])
    shard, row = next(places)
    assert found.exact_copies.example == f"{shard} {row:04d}"
