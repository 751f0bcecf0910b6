"""Forward mode as a stage: the heads' closed form where only the heads are chosen, and the promises of a run."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ecif.heads import Heads, embed
from ecif.heads.curvature import gauss_newton_product, loss_gradient
from ecif.heads.influence import score
from pipeline.corpus.batches import batches_of
from pipeline.errors import UserError
from pipeline.inputs import load_inputs
from pipeline.run import run
from pipeline.run_folder.finished import open_run
from pipeline.stages.fit.sample import read_all
from pipeline.stages.solve.targets import read_target
from tests.support.run_folders import COLUMNS, objects, violations

HEADS = {"mode": "forward", "parameters": ["visual.proj", "text_projection"], "damping": 0.1, "tolerance": 1e-5}


@pytest.fixture(scope="module")
def forward(tmp_path_factory, finished, configure):
    """The finished run gone on in forward mode, for the projections alone: its configuration and outcome."""
    folder = tmp_path_factory.mktemp("forward") / "run"
    shutil.copytree(finished[0].run, folder)
    config = configure(folder, scoring=HEADS)
    return config, run(config)


def closed_form(config):
    """Influence [pairs] of the model's own heads from `ecif.heads.influence`, with explicit matrices, in the table's order."""
    inputs = load_inputs(config)
    weights = load_file(f"{config.model.name.removeprefix('local-dir:')}/open_clip_model.safetensors")
    heads = Heads(weights["visual.proj"].double(), weights["text_projection"].double(), inputs.model.heads.logit_scale)

    def pairs(dataset):
        images, texts = (torch.from_numpy(m.astype(np.float64)) for m in read_all(dataset))
        return embed(heads, images, texts)

    corpus, clean = pairs(inputs.corpus), pairs(inputs.targets["clean"])
    batches, first = [], 0
    for shard in inputs.corpus.shards:
        batches += [first + rows for rows in batches_of(config).of(shard.name, 36)]
        first += 36
    rows = read_target("clean", inputs.targets["clean"]).question(config).batches
    gradient = loss_gradient(heads, [clean.take(r) for r in rows])
    curvature = gauss_newton_product(heads, corpus, batches, torch.eye(heads.size, dtype=torch.float64))
    damping = config.scoring.damping * torch.linalg.eigvalsh(curvature)[-1]
    direction = torch.linalg.solve(curvature + damping * torch.eye(heads.size), gradient)
    return score(heads, corpus, batches, direction[None])


def test_with_only_the_projections_chosen_it_is_the_closed_form_of_the_heads(forward):
    config, outcome = forward
    assert violations(Path(config.run)) == []
    table, truth = outcome.scores(), closed_form(config)
    assert table.column_names == COLUMNS
    # Features in half precision, weights and sums in single: what is left of the digits.
    for column, expected in (("positive", truth.positive[0]), ("negative", truth.negative[0])):
        ours = table[f"influence_{column}_clean"].to_numpy()
        assert np.abs(ours - expected.numpy()).max() < 0.01 * expected.abs().max()
        assert np.corrcoef(ours, expected)[0, 1] > 0.9999
    facts = outcome.finished.checkpoints[0].targets["clean"]["forward"]
    assert (facts["damping"], facts["parameters"], facts["sample"]) == (0.1, 64 * 16 + 48 * 16, 108)
    assert facts["residual"] <= 1e-5


def test_what_does_not_follow_from_the_parameters_is_the_heads(finished, forward):
    heads, ours = open_run(finished[0].run).scores(), forward[1].scores()
    for column in (*COLUMNS[:9], "misalignment", "filter_clean"):
        assert heads[column] == ours[column]
    assert heads["influence_clean"] != ours["influence_clean"]
    whole = ours["influence_positive_clean"].to_numpy() + ours["influence_negative_clean"].to_numpy()
    assert np.array_equal(whole, ours["influence_clean"].to_numpy())


def test_any_parameters_fitted_first_give_the_same_bytes_whatever_the_number_of_workers_and_interruptions(
    finished, configure, tmp_path
):
    chosen = {"mode": "forward", "parameters": ["visual.transformer.*", "logit_scale"], "sample": 40, "epochs": 1}
    shutil.copytree(finished[0].run, tmp_path, dirs_exist_ok=True)
    outcome = run(configure(tmp_path, scoring=chosen, workers=2))
    truth = objects(tmp_path, ".parquet", ".safetensors")
    of_target = outcome.finished.checkpoints[0].targets["clean"]
    facts = of_target["forward"]
    assert facts["damping"] == of_target["damping"]
    assert facts["sample"] in range(32, 41)

    new = set(truth) - set(objects(finished[0].run, ".parquet", ".safetensors"))
    assert {name.split("/")[0] for name in new} == {"parameters", "forward_directions", "forward_influence"}
    for name in (name for name in new if "/00001." not in name):
        (tmp_path / name).unlink()
    run(configure(tmp_path, scoring=chosen, workers=1))
    assert objects(tmp_path, ".parquet", ".safetensors") == truth


def test_a_second_call_does_nothing_again(forward):
    config, outcome = forward
    before = objects(config.run, "")
    again = run(config)
    assert (again.scored, again.finished) == (outcome.scored, outcome.finished)
    after = objects(config.run, "")
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert {name for name in changed if not name.startswith("lease/")} <= {"run.json", "started.json"}


def test_a_pattern_without_parameters_is_named_before_anything_starts(configure, tmp_path):
    with pytest.raises(UserError, match=r"scoring.parameters: no parameter matches 'visual.blocks.\*'"):
        run(configure(tmp_path, scoring={"mode": "forward", "parameters": ["visual.blocks.*"]}))
    assert not list(tmp_path.iterdir())


def test_a_configuration_that_makes_no_sense_is_refused(configure, tmp_path):
    with pytest.raises(ValueError, match="mode forward needs parameters"):
        configure(tmp_path, scoring={"mode": "forward"})
    with pytest.raises(ValueError, match="mode heads takes no other key"):
        configure(tmp_path, scoring={"parameters": ["*"]})
    with pytest.raises(ValueError, match="below batch_size 16"):
        configure(tmp_path, scoring={"mode": "forward", "parameters": ["*"], "sample": 8})
    config = configure(tmp_path)
    assert type(config).model_validate(config.model_dump()) == config
