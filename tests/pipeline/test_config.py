"""What a configuration means where it leaves something open, and what it refuses."""

import pytest
from pydantic import ValidationError

from pipeline.config import Config
from pipeline.sections import Filter

NEEDED = {"run": "run", "corpus": {"shards": "a"}, "model": {"name": "m"}, "targets": {"t": {"shards": "b"}}}


@pytest.mark.parametrize(
    ("batch", "told", "repeats"), [(16, None, 4), (256, None, 4), (1000, None, 1), (4096, None, 1), (4096, 3, 3)]
)
def test_large_batches_are_repeated_less_unless_told(batch, told, repeats):
    assert Config.model_validate(NEEDED | {"batch_size": batch, "score": {"repeats": told}}).repeats == repeats


@pytest.mark.parametrize(
    "wrong", [{"weights": []}, {"weights": [1.5]}, {"keep": [0.0]}, {"keep": [1.0]}, {"keep": []}, {"seeds": 0}]
)
def test_candidates_of_a_filter_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValidationError):
        Filter.model_validate(wrong)


@pytest.mark.parametrize(("dampings", "refits"), [([0.01, 0.1], 16), ([0.01], 0)])
def test_where_there_is_one_damping_nothing_is_refitted_to_choose_it(dampings, refits):
    assert Config.model_validate(NEEDED | {"solve": {"dampings": dampings}}).solve.calibration_refits == refits
