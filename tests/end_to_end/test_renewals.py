"""What nights have learned is learned anew when the policy says so, and over as many nights as that takes."""

import pytest

from ecif.drift import Measure
from jobs.nights import EXIT_CODES
from pipeline.errors import UserError
from pipeline.night import _Night
from pipeline.operate.history import history
from pipeline.operate.verify import verify
from pipeline.run_folder.finished import open_generation, open_run
from pipeline.run_folder.generations import Generations
from pipeline.run_folder.reference import read_pending
from pipeline.workers import deadline
from tests.support.nights import PAIRS, more
from tests.support.run_folders import objects


def test_what_was_learned_is_renewed_as_often_as_is_asked(second):
    policy = {"nightly": {"renew": {"every": 1}}}
    more(second.corpus, "00003", 0)
    assert second.night(**policy).generation.record["reference"]["since"] == 0
    more(second.corpus, "00004", 1)
    done = second.night(**policy)
    assert (done.committed, done.generation.number) == (2, 3)
    assert done.generation.record["reference"]["since"] == 3
    assert {file.run for file in done.generation.files.values()}.isdisjoint(
        file.run for file in Generations(str(second.folder)).at(2).files.values()
    )
    assert len(open_run(str(second.folder)).scores()) == 5 * PAIRS
    assert [*open_generation(str(second.folder), since=1).files] == ["00004"], "scored anew is not new"
    with pytest.raises(UserError, match="generation 3 has no shard that generation 2 does not have"):
        open_generation(str(second.folder), since=2)
    assert second.night(**policy).state == "nothing new"


def test_a_renewal_goes_on_over_nights_and_readers_see_the_generation_before(second, monkeypatch):
    """The deadline passes when everything is learned, before the first shard is scored."""
    before, changed = second.table(), {"seed": 1}
    monkeypatch.setattr(deadline, "passed", lambda: read_pending(str(second.folder)) is not None)
    late = second.night(**changed)
    monkeypatch.undo()
    assert (late.state, late.generation.number) == ("deadline", 0)
    assert second.table() == before
    with pytest.raises(UserError, match="nights have begun to score anew"):
        verify(str(second.folder), print)
    more(second.corpus, "00003", 0)  # which does not change what was learned
    heads = objects(second.folder / "heads", "")
    done = second.night(**changed)
    assert (done.state, done.generation.number) == ("done", 1)
    assert objects(second.folder / "heads", "") == heads
    assert len(open_run(str(second.folder)).scores()) == 4 * PAIRS
    assert read_pending(str(second.folder)) is None


@pytest.mark.slow
@pytest.mark.parametrize("changed", [{"fit": {"folds": 3, "epochs": 2, "sample": 90}}, {"nightly": {"renew": {"every": 1}}}])
def test_what_is_learned_anew_once_is_not_learned_anew_every_night(second, changed):
    """A sample limit is in no name; a renewal may learn the same again."""
    night = second.night(**changed)
    assert night.committed == (1 if "fit" in changed else 0)
    more(second.corpus, "00003", 0)
    second.night(**changed)
    due = second.night(**changed)
    assert due.committed == (0 if "fit" in changed else 1)
    assert second.night(**changed).state == "nothing new"


def test_drift_renews_also_when_the_night_was_killed_before(second, monkeypatch):
    policy = {"nightly": {"renew": {"drift": True}, "drift": {"held_out_loss": 1e-9, "misaligned": 1e-9}}}
    more(second.corpus, "00003", 0)
    monkeypatch.setattr(Measure, "is_beyond", lambda self, bound: True)
    monkeypatch.setattr(_Night, "_learn", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        second.night(**policy)
    monkeypatch.undo()
    done = second.night(**policy)
    assert (done.state, done.committed, done.generation.record["reference"]["since"]) == ("done", 1, 2)
    assert second.night(**policy).state == "nothing new"


def test_a_bound_that_is_passed_is_said_and_is_an_exit_code(second, monkeypatch):
    more(second.corpus, "00003", 0)
    monkeypatch.setattr(Measure, "is_beyond", lambda self, bound: True)
    done = second.night()
    assert (done.state, EXIT_CODES[done.state], done.committed) == ("drift", 12, 1)
    assert "images" in history(str(second.folder))[0][10]
