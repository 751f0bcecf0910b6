"""What the scores are worth: filter by each of them, train on what is left, test on pairs that no stage saw."""

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray
import torch
from numpy.typing import NDArray

from ecif.evaluation import auroc, calibrated_loss, linear_datamodeling_score, precision_at, retrieval_recall
from ecif.fit import fit, reshuffled
from ecif.heads import Heads
from pipeline import storage
from pipeline.cluster import Resources, device, session
from pipeline.config import Config, Pairs
from pipeline.dataset import Dataset
from pipeline.embed import embed
from pipeline.fit import Refit, as_features, refit_all
from pipeline.inputs import as_dataset, load_inputs
from pipeline.losses import loss_of
from pipeline.progress import Stage
from pipeline.run import load_run
from pipeline.sample import draw, read_all, read_uids
from pipeline.select import LOW_IS_GOOD, read_scores, select
from pipeline.shards import find, permutation
from pipeline.solve import read_directions, removals
from pipeline.targets import Target, group_losses, read_targets, target_loss

SEEDS = 3
LDS_REFITS = 24


class Trial(NamedTuple):
    """One training on a part of the corpus."""

    keep: NDArray[np.int64]  # rows of the corpus
    seed: int


class Sets(NamedTuple):
    """Features that trials train and test on."""

    corpus: tuple[NDArray[np.float16], NDArray[np.float16]]
    target: Target
    test: tuple[NDArray[np.float16], NDArray[np.float16]]


def judge(run: str, test: Pairs, swapped: set[str]) -> dict[str, Any]:
    """Judge a finished run whose misaligned pairs are known.

    Every rule drops as many pairs as were swapped; heads are then trained from the model's own on what is left, for the same
    number of steps each. The linear datamodeling score comes from refits other than those that chose the damping.

    Args:
        run: folder of a finished run.
        test: pairs that no stage of the run saw; their features go to the run's folder.
        swapped: uids of the misaligned pairs. Nothing but this function sees them.

    Returns:
        {"rules": rows of the table, "scores": AUROC and precision a column, "lds": a target}.
    """
    facts = load_run(run)
    config = Config(**facts["config"])
    found = find(test.shards, "test.shards")
    model, corpus, targets = load_inputs(config)
    held_out = as_dataset(storage.join(run, "test"), test, found, config, model)
    with session(config.workers) as resources:
        embed([held_out], config.model, config.embed, model.preprocess, resources)
        asked = read_targets(targets, config)
        sets = Sets(read_all(corpus), asked[0], read_all(held_out))
        uids = read_uids(corpus)
        table = read_scores(run)
        rules = {name: _rows(kept, uids) for name, kept in _rules(table, swapped, next(iter(targets))).items()}
        rows = _train_and_test(model.heads, sets, rules, config, resources)
        lds = _lds(run, facts, model.heads, corpus, asked, config, resources)
    gain = rows[0]["test_loss"] - rows[1]["test_loss"]
    for row in rows:
        row["share_of_oracle_gain"] = (rows[0]["test_loss"] - row["test_loss"]) / gain
    return {"rules": rows, "scores": _detection(table, swapped), "lds": lds, "swapped": len(swapped), "pairs": len(uids)}


def _rules(table: pa.Table, swapped: set[str], target: str) -> dict[str, list[str]]:
    """What each rule keeps: uids."""
    uids = table["uid"].to_pylist()
    kept = 1 - len(swapped) / len(uids)
    return {
        "everything": uids,
        "oracle: exactly the swapped": [uid for uid in uids if uid not in swapped],
        "random": [uids[i] for i in permutation(len(uids), "random rule")[: round(kept * len(uids))]],
        "CLIP score": select(table, "clip_score", kept),
        "held-out loss": select(table, "held_out_loss", kept),
        "influence": select(table, f"influence_{target}", kept),
        "misalignment (fused)": select(table, "misalignment", kept),
    }


def _rows(kept: list[str], uids: list[str]) -> NDArray[np.int64]:
    wanted = set(kept)
    return np.array([i for i, uid in enumerate(uids) if uid in wanted])


def _train_and_test(
    start: Heads, sets: Sets, rules: dict[str, NDArray[np.int64]], config: Config, resources: Resources
) -> list[dict[str, Any]]:
    """Mean and spread over the seeds of every measure, a row a rule."""
    trials = [Trial(keep, seed) for keep in rules.values() for seed in range(SEEDS)]
    run: Any = ray.remote(**resources.actor, max_retries=2, max_calls=0)(_trial)
    shared = ray.put((start, sets, config))
    pending = [run.remote(shared, trial) for trial in trials]
    with Stage("judge", len(trials)) as progress:
        measured = []
        for result in pending:
            measured.append(ray.get(result))
            progress.advance(1)
    rows = []
    for i, name in enumerate(rules):
        of_rule = measured[i * SEEDS : (i + 1) * SEEDS]
        row: dict[str, Any] = {"rule": name, "kept": len(rules[name])}
        for key in of_rule[0]:
            values = [m[key] for m in of_rule]
            row |= {key: float(np.mean(values)), f"{key}_std": float(np.std(values))}
        rows.append(row)
    return rows


def _trial(shared: tuple[Heads, Sets, Config], trial: Trial) -> dict[str, float]:
    start, sets, config = shared
    to = device()
    corpus, test = ([as_features(m, to) for m in pair] for pair in (sets.corpus, sets.test))
    keep = torch.from_numpy(trial.keep).to(to)
    heads = fit(
        start.to(to),
        corpus[0][keep],
        corpus[1][keep],
        reshuffled(len(keep), config.batch_size, max(1, len(corpus[0]) // config.batch_size)),
        batch_size=config.batch_size,
        epochs=config.fit.epochs,
        learning_rate=config.fit.learning_rate,
        seed=trial.seed,
        loss=loss_of(config),
    )[-1]
    return {
        "test_loss": calibrated_loss(heads, test[0], test[1]),
        "test_r1": retrieval_recall(heads, test[0], test[1], 1),
        "test_r5": retrieval_recall(heads, test[0], test[1], 5),
        "target_loss": target_loss(heads, sets.target, config),
    }


def _lds(
    run: str,
    facts: dict[str, Any],
    start: Heads,
    corpus: Dataset,
    targets: list[Target],
    config: Config,
    resources: Resources,
) -> dict[str, Any]:
    """Per target: agreement of single-model influence with refits that had no part in choosing the damping."""
    sample = draw(corpus, config)
    removed = removals(len(sample.fold), LDS_REFITS, config, "judge")
    with Stage("lds", LDS_REFITS) as progress:
        refitted = refit_all(start, sample, [Refit(~r, config.seed) for r in removed], config, resources, progress)
    influence = read_directions(storage.join(run, "directions", f"{facts['directions']}.safetensors")).calibration
    out = {}
    for target in targets:
        losses = torch.stack([group_losses(heads, target, config) for heads in refitted])
        mine, influence = influence[: losses.shape[1]], influence[losses.shape[1] :]
        whole = linear_datamodeling_score(mine.sum(0, keepdim=True), torch.from_numpy(removed), losses.sum(1, keepdim=True))
        parts = linear_datamodeling_score(mine, torch.from_numpy(removed), losses)
        out[target.name] = {"lds": whole, "lds_of_target_parts": parts, "parts": losses.shape[1], "refits": LDS_REFITS}
    return out


def _detection(table: pa.Table, swapped: set[str]) -> dict[str, dict[str, float]]:
    """How well each column finds the swapped pairs."""
    bad = torch.tensor([uid in swapped for uid in table["uid"].to_pylist()])
    found = {}
    for column in table.column_names[6:]:
        values = torch.from_numpy(table[column].to_numpy())
        badness = values if column in LOW_IS_GOOD else -values
        found[column] = {"auroc": auroc(badness, bad), "precision": precision_at(badness, bad, len(swapped))}
    return found
