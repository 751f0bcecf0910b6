"""The columns of a run are one list: in the order of the table, with what each means."""

import pytest
from pydantic import ValidationError

from ecif.columns import Column, NegClipLoss
from pipeline.config import Config
from pipeline.run_folder.columns import IDENTITY, columns, evidence_scores, requested_columns
from tests.support.own_scores import ImageNorm, NearTarget, SameLength

OWN = "tests.support.own_scores"
BASE = {"run": "run", "corpus": {"shards": "x"}, "model": {"name": "x"}}
TARGETS = {"b": {"shards": "x", "loss": "retrieval_margin"}, "a": {"shards": "x"}}


def configure(*asked: str, **settings) -> Config:
    score = {"columns": list(asked)} | settings.pop("score", {})
    return Config.model_validate(BASE | {"targets": TARGETS, "score": score} | settings)


def listed(config: Config) -> list[str]:
    return [column.name for column in columns(config)]


def influence(target: str) -> list[str]:
    kinds = ("influence_positive", "influence_negative", "influence", "agreement", "near")
    return [f"{kind}_{target}" for kind in kinds]


SCORES = ["clip_score", "held_out_cosine", "held_out_loss", "agreement"]
COPIES = ["image_copies", "caption_copies"]
EVERY_RUN = [*SCORES, *COPIES, *influence("a"), *influence("b"), "misalignment", "filter_a", "filter_b"]


def test_the_columns_of_every_run_are_in_the_order_of_the_table():
    assert listed(configure()) == EVERY_RUN
    assert listed(configure(filter=None)) == EVERY_RUN[:-2]


def test_what_is_requested_comes_last_in_its_order_and_one_a_target_where_it_is_of_a_target():
    found = listed(configure("normsim_2", "negclip_loss", "lemon"))
    assert found == [*EVERY_RUN, "normsim_2_a", "normsim_2_b", "negclip_loss", "lemon"]


def test_leverage_is_there_with_the_second_order():
    config = configure("gsc", targets={"a": {"shards": "x"}}, score={"order": 2})
    assert listed(config) == [*SCORES, *COPIES, *influence("a"), "misalignment", "filter_a", "leverage", "gsc"]


@pytest.mark.parametrize("asked", [("gsc", "gsc"), ("clip_score", "gsc", "held_out_loss")])
def test_a_column_is_there_once_however_often_it_is_asked_for(asked):
    assert listed(configure(*asked)) == [*EVERY_RUN, "gsc"]


def test_scores_that_are_evidence_come_after_those_of_every_run():
    config = configure("gsc", f"{OWN}:SameLength")
    assert [score.name for score in evidence_scores(config)] == [*SCORES, "same_length"]
    assert [column.name for column in requested_columns(config)] == ["gsc"]
    assert listed(config) == [*SCORES, "same_length", *EVERY_RUN[len(SCORES) :], "gsc"]


def test_a_score_of_ones_own_is_a_column_by_its_path_or_by_its_name():
    by_path, by_name = configure(f"{OWN}:ImageNorm", f"{OWN}:NearTarget"), configure("image_norm", "near_target")
    assert by_path == by_name
    assert by_name.score.columns == [f"{OWN}:ImageNorm", f"{OWN}:NearTarget"], "workers know the names of ecif only"
    found = [(column.name, column.score, column.target) for column in requested_columns(by_path)]
    assert found == [("image_norm", ImageNorm, ""), ("near_target_a", NearTarget, "a"), ("near_target_b", NearTarget, "b")]
    assert columns(by_path)[-3:] == [Column.of(ImageNorm), Column.of(NearTarget, "a"), Column.of(NearTarget, "b")]
    assert SameLength not in {column.score for column in requested_columns(configure(f"{OWN}:SameLength"))}


def test_scores_of_ecif_keep_their_short_name():
    config = configure("ecif.columns.negclip_loss:NegClipLoss")
    assert config.score.columns == ["negclip_loss"]
    assert requested_columns(config)[0].score is NegClipLoss


@pytest.mark.parametrize("wrong", ["no_such_score", f"{OWN}:Nothing", "tests.support.own_kinds:AdditiveMargin"])
def test_what_is_no_score_is_refused_before_anything_starts(wrong):
    with pytest.raises(ValidationError):
        configure(wrong)


def test_which_end_of_a_column_is_good():
    good = {column.name: column.good for column in columns(configure("gsc", "gradient_norm"))}
    assert {name for name, end in good.items() if end == "low"} == {"held_out_loss", *COPIES, "misalignment", "gradient_norm"}


def test_influence_is_in_the_unit_of_its_target():
    units = {column.name: column.unit for column in columns(configure())}
    assert (units["influence_a"], units["influence_b"]) == ("nats", "cosine")


def test_no_column_has_the_name_of_another_or_of_what_says_which_pair_it_is():
    found = listed(configure("negclip_loss", "normsim_2", "normsim_inf", "lemon", "gsc", "gradient_norm"))
    assert len({*found, *IDENTITY}) == len(found) + len(IDENTITY)
