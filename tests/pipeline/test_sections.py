"""How pairs are read, as a configuration says it and as a run records it."""

import pytest
from pydantic import ValidationError

from pipeline.sections import Corpus, Reading, Target

ALL = {"field": "captions", "pick": "all"}


@pytest.mark.parametrize(
    ("given", "recorded", "reading"),
    [
        ({}, "txt", Reading("txt")),
        ({"caption": "laion"}, "laion", Reading("laion")),
        ({"caption": {"field": "laion"}}, "laion", Reading("laion")),
        ({"caption": ALL, "key": "last_dot"}, ALL, Reading("captions", "all", "last_dot")),
    ],
)
def test_a_caption_is_recorded_as_it_is_written(given, recorded, reading):
    for kind in (Corpus, Target):
        pairs = kind.model_validate({"shards": "x"} | given)
        assert pairs.reading == reading
        dumped = pairs.model_dump(mode="json")
        assert dumped["caption"] == recorded
        assert kind.model_validate(dumped) == pairs


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"caption": 5}, "the name of a field, or"),
        ({"caption": ["a", "b"]}, "the name of a field, or"),
        ({"caption": {"field": "txt", "pick": "last"}}, "'first' or 'all'"),
        ({"caption": {"place": "txt"}}, "Extra inputs are not permitted"),
        ({"caption": ALL, "sidecar": ["similarity"]}, "corpus.sidecar has a row for an image"),
        ({"key": "middle"}, "'first_dot' or 'last_dot'"),
        ({"missing": "ignore"}, "'refuse' or 'skip'"),
    ],
)
def test_what_can_not_be_meant_is_refused(given, said):
    with pytest.raises(ValidationError, match=said):
        Corpus.model_validate({"shards": "x"} | given)


def test_a_labelled_target_reads_no_captions():
    with pytest.raises(ValidationError, match=r"reads <key>\.cls and no captions"):
        Target.model_validate({"shards": "x", "loss": "zero_shot", "classes": "x", "caption": ALL})
