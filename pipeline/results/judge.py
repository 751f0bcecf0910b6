"""What the scores are worth: filter by each of them, train on what is left, test on pairs that no stage saw."""

from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from ecif.evaluation import auroc, calibrated_loss, linear_datamodeling_score, precision_at, retrieval_recall
from ecif.heads import Heads
from pipeline import storage
from pipeline.config import Config, Pairs
from pipeline.corpus.batches import permutation
from pipeline.corpus.shards import find
from pipeline.inputs import as_dataset, load_inputs
from pipeline.results.select import LOW_IS_GOOD, read_scores, select
from pipeline.run import load_run
from pipeline.run_folder.dataset import Dataset
from pipeline.stages.embed.stage import embed
from pipeline.stages.fit.sample import Sample, draw, read_all, read_uids
from pipeline.stages.fit.stage import Refit, as_features, refit_all
from pipeline.stages.solve.stage import read_directions, removals
from pipeline.stages.solve.targets import Target, group_losses, read_targets, target_loss
from pipeline.workers.cluster import Resources, session
from pipeline.workers.progress import Stage

SEEDS = 3
LDS_REFITS = 24


def judge(run: str, test: Pairs, swapped: set[str]) -> dict[str, Any]:
    """Judge a finished run whose misaligned pairs are known.

    Every rule drops as many pairs as were swapped, but the chosen filter, where the run has one, as many as it chose; heads are
    then trained from the model's own on what is left, for the same number of steps each. The linear datamodeling score comes
    from refits other than those that chose the damping.

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
        uids = read_uids(corpus)
        every = Sample(*read_all(corpus), np.zeros(len(uids), np.int16), [len(uids)])
        table = read_scores(run)
        chosen = facts["targets"][asked[0].name].get("filter")
        rules = {name: np.isin(uids, kept) for name, kept in _rules(table, swapped, asked[0].name, chosen).items()}
        rows = _train_and_test(model.heads, every, asked[0], read_all(held_out), rules, config, resources)
        lds = _lds(run, facts, model.heads, corpus, asked, config, resources)
    gain = rows[0]["test_loss"] - rows[1]["test_loss"]
    for row in rows:
        row["share_of_oracle_gain"] = (rows[0]["test_loss"] - row["test_loss"]) / gain
    return {"rules": rows, "scores": _detection(table, swapped), "lds": lds, "swapped": len(swapped), "pairs": len(uids)}


def _rules(table: pa.Table, swapped: set[str], target: str, chosen: dict[str, Any] | None) -> dict[str, list[str]]:
    """What each rule keeps: uids."""
    uids = table["uid"].to_pylist()
    kept = 1 - len(swapped) / len(uids)
    rules = {
        "everything": uids,
        "oracle: exactly the swapped": [uid for uid in uids if uid not in swapped],
        "random": [uids[i] for i in permutation(len(uids), "random rule")[: round(kept * len(uids))]],
        "CLIP score": select(table, "clip_score", kept),
        "held-out loss": select(table, "held_out_loss", kept),
        "agreement": select(table, "agreement", kept),
        "influence": select(table, f"influence_{target}", kept),
        "misalignment": select(table, "misalignment", kept),
    }
    return rules | ({"chosen filter": select(table, f"filter_{target}", chosen["keep"])} if chosen else {})


def _train_and_test(
    start: Heads,
    corpus: Sample,
    target: Target,
    test: tuple[NDArray[np.float16], NDArray[np.float16]],
    rules: dict[str, NDArray[np.bool_]],
    config: Config,
    resources: Resources,
) -> list[dict[str, Any]]:
    """Mean and spread over the seeds of every measure, a row a rule."""
    jobs = [Refit(keep, seed, new_batches=True) for keep in rules.values() for seed in range(SEEDS)]
    images, texts = (as_features(part, torch.device("cpu")) for part in test)
    with Stage("judge", len(jobs)) as progress:
        trained = refit_all(start, corpus, jobs, config, resources, progress)
    rows = []
    for i, (name, keep) in enumerate(rules.items()):
        measures = {
            "test_loss": lambda heads: calibrated_loss(heads, images, texts),
            "test_r1": lambda heads: retrieval_recall(heads, images, texts, 1),
            "test_r5": lambda heads: retrieval_recall(heads, images, texts, 5),
            "target_loss": lambda heads: target_loss(heads, target, config),
        }
        row: dict[str, Any] = {"rule": name, "kept": int(keep.sum())}
        for key, measure in measures.items():
            values = [measure(heads) for heads in trained[i * SEEDS : (i + 1) * SEEDS]]
            row |= {key: float(np.mean(values)), f"{key}_std": float(np.std(values))}
        rows.append(row)
    return rows


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
