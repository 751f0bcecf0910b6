"""Judge the scores: filter by each of them, train heads on the pairs that are left, test them on pairs that no stage saw."""

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ecif.columns import Column
from ecif.copies import Copies
from ecif.directions import Directions
from ecif.evaluation import auroc, calibrated_loss, linear_datamodeling_score, precision_at, retrieval_recall
from ecif.fit_choice import FitChoice
from ecif.heads import Heads
from ecif.heads.cross_fit import HowToFit, Refit, removals
from ecif.permutation import permutation
from ecif.sample import Sample
from ecif.targets.question import Question
from pipeline import storage
from pipeline.config import Config
from pipeline.corpus.shards import find
from pipeline.inputs import as_dataset, load_inputs, made_by
from pipeline.results.select import of_table, select
from pipeline.run_folder import tensors
from pipeline.run_folder.columns import columns
from pipeline.run_folder.finished import Finished, open_run
from pipeline.sections import Pairs
from pipeline.stages.embed.stage import embed
from pipeline.stages.fit.sample import read_all, read_sampled, read_uids
from pipeline.stages.fit.stage import as_features, how_to_fit, refitter
from pipeline.stages.solve.targets import read_target
from pipeline.workers.cluster import Resources, session
from pipeline.workers.progress import Stage

BASELINES = ("everything", "oracle: exactly the swapped", "random")  # rules that rank by no column
CHOSEN = "chosen filter"
SEEDS = 3
LDS_REFITS = 24
# Rules whose name is not that of their column.
LABELS = {"clip_score": "CLIP score", "held_out_cosine": "held-out cosine", "held_out_loss": "held-out loss"}


class Rule(NamedTuple):
    """A way to choose pairs."""

    name: str
    column: str  # the column that it ranks by; empty if it ranks by none
    kept: list[str]  # uids


def judge(run: str, test: Pairs, swapped: set[str]) -> dict[str, Any]:
    """Judge a finished run whose misaligned pairs are known.

    A rule that ranks by a column drops as many pairs as were swapped. The filter that the run chose drops as many as it chose.
    Heads are then trained on the pairs that are left. Every training starts from the model's own heads, is done as
    the run chose, and takes the same number of steps. The linear datamodeling score comes from refits other than those that
    chose the damping.

    Args:
        run: folder of a finished run.
        test: pairs that no stage of the run saw. Their features are written to the folder of the run.
        swapped: uids of the misaligned pairs. Nothing but this function sees them.

    Returns:
        {"rules": rows of the table, "scores": AUROC and precision of each column, "lds": the scores of each target,
            "swapped", "pairs": their numbers}.
    """
    finished = open_run(run)
    config, table = finished.config, finished.scores()
    found = find(test.shards, "test.shards")
    model, corpus, clean = load_inputs(config)
    held_out = as_dataset(storage.join(run, "test"), test, found, made_by(model, config))
    with session(config.workers, config.device) as resources:
        embed([held_out], config.model, config.embed, model.preprocess, resources)
        questions = [read_target(name, dataset).question(config) for name, dataset in clean.items()]
        uids = read_uids(corpus)
        images, texts = map(torch.from_numpy, read_all(corpus))
        every = Sample(images, texts, torch.zeros(len(uids), dtype=torch.int16), [len(uids)])
        rules = _rules(finished, table, swapped)
        artifacts = finished.checkpoints[0].artifacts(run)
        choice = tensors.load(artifacts.url("fit_choice"), FitChoice)
        how = how_to_fit(config, model.heads, choice.hyperparameters)
        jobs = [Refit(torch.from_numpy(np.isin(uids, rule.kept)), s, True) for rule in rules for s in range(SEEDS)]
        with Stage("judge", len(jobs)) as progress:
            trained = [path[-1] for path in refitter(resources, how, every, progress)(jobs)]
        test_images, test_texts = (as_features(part, torch.device("cpu")) for part in read_all(held_out))
        rows: list[dict[str, Any]] = [
            {"rule": rule.name, "column": rule.column, "kept": len(rule.kept)}
            | _measures(trained[i * SEEDS : (i + 1) * SEEDS], test_images, test_texts, questions[0])
            for i, rule in enumerate(rules)
        ]
        sample = read_sampled(corpus, config).in_folds(tensors.load(artifacts.url("copies"), Copies))
        lds = _lds(finished, how, sample, questions, resources)
    gain = rows[0]["test_loss"] - rows[1]["test_loss"]
    for row in rows:
        row["share_of_oracle_gain"] = (rows[0]["test_loss"] - row["test_loss"]) / gain if gain else 0.0
    detection = _detection(config, table, swapped)
    return {"rules": rows, "scores": detection, "lds": lds, "swapped": len(swapped), "pairs": len(uids)}


def _rules(run: Finished, table: pa.Table, swapped: set[str]) -> list[Rule]:
    """One rule for every column that ranks pairs, and the rules that these are compared with."""
    uids = table["uid"].to_pylist()
    share = 1 - len(swapped) / len(uids)
    shuffled = [uids[i] for i in permutation(len(uids), "random rule").tolist()]
    kept = [uids, [uid for uid in uids if uid not in swapped], shuffled[: round(share * len(uids))]]
    rules = [Rule(name, "", of_rule) for name, of_rule in zip(BASELINES, kept, strict=True)]
    rules += [Rule(name, column, _best(table, column, share)) for name, column in rankings(run.config).items()]
    target = next(iter(run.config.targets))
    chosen = run.checkpoints[0].targets[target].get("filter")
    if chosen:
        rules.append(Rule(CHOSEN, f"filter_{target}", _best(table, f"filter_{target}", chosen["keep"])))
    return rules


def _best(table: pa.Table, by: str, keep: float) -> list[str]:
    """The uids of the pairs that are selected."""
    return table["uid"].filter(pa.array(select(of_table(table), by, keep).kept)).to_pylist()


def rankings(config: Config) -> dict[str, str]:
    """The rules that rank by one column: the name of each, and its column."""
    target = next(iter(config.targets))
    labels = LABELS | {f"agreement_{target}": "agreement with the target"}
    ranking = (column.name for column in columns(config) if _ranks(column, target))
    return {labels.get(name, name.removesuffix(f"_{target}")): name for name in ranking}


def _ranks(column: Column, target: str) -> bool:
    """Whether a column is judged as a filter. Those that say nothing of how good a pair is, and other targets', are not."""
    others = ("influence_positive_", "influence_negative_", "near_", "filter_", "leverage", "image_copies", "caption_copies")
    of_targets = ("influence_", "agreement_")
    mine = tuple(of + target for of in of_targets)
    return not column.name.startswith(others) and (not column.name.startswith(of_targets) or column.name in mine)


def _measures(trained: list[Heads], images: Tensor, texts: Tensor, question: Question) -> dict[str, float]:
    """Mean and spread over the seeds of every measure."""
    measures = {
        "test_loss": lambda heads: calibrated_loss(heads, images, texts),
        "test_r1": lambda heads: retrieval_recall(heads, images, texts, 1),
        "test_r5": lambda heads: retrieval_recall(heads, images, texts, 5),
        "target_loss": question.mean_loss,
    }
    row: dict[str, float] = {}
    for key, measure in measures.items():
        values = [measure(heads) for heads in trained]
        row |= {key: float(np.mean(values)), f"{key}_std": float(np.std(values))}
    return row


def _lds(
    run: Finished, how: HowToFit, sample: Sample, questions: list[Question], resources: Resources
) -> dict[str, dict[str, float]]:
    """For each target, how well single-model influence agrees with refits that had no part in the choice of the damping."""
    config, artifacts = run.config, run.checkpoints[0].artifacts(run.folder)
    removed = removals(len(sample.fold), LDS_REFITS, "judge", config.seed)
    with Stage("lds", LDS_REFITS) as progress:
        refit = refitter(resources, how, sample, progress)
        refitted = [path[-1] for path in refit([Refit(~without, config.seed) for without in removed])]
    out = {}
    for question in questions:
        losses = torch.stack([question.group_losses(heads) for heads in refitted])
        influence = tensors.load(artifacts.url(f"directions/{question.name}"), Directions).groups
        whole = linear_datamodeling_score(influence.sum(0, keepdim=True), removed, losses.sum(1, keepdim=True))
        parts = linear_datamodeling_score(influence, removed, losses)
        found = {"lds": whole, "lds_of_target_parts": parts, "parts": losses.shape[1], "refits": LDS_REFITS}
        out[question.name] = found
    return out


def _detection(config: Config, table: pa.Table, swapped: set[str]) -> dict[str, dict[str, float]]:
    """How well each column finds the swapped pairs."""
    bad = torch.tensor([uid in swapped for uid in table["uid"].to_pylist()])
    found = {}
    for column in columns(config):
        values = torch.tensor(table[column.name].to_numpy())
        badness = values if column.good == "low" else -values
        found[column.name] = {"auroc": auroc(badness, bad), "precision": precision_at(badness, bad, len(swapped))}
    return found
