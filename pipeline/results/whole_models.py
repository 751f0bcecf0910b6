"""Whole models as the judge: small CLIP models, every parameter trained on what each rule keeps, tested on unseen pairs.

Each training leaves one JSON object, named after everything that it is a function of. A second call reads what is there.
"""

import hashlib
import json
from typing import Any, NamedTuple

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor

from ecif.training import SMALL, Images, Recipe, build, measure, train
from pipeline import storage
from pipeline.errors import UserError
from pipeline.run_folder.artifacts import fingerprint
from pipeline.run_folder.tables import json_bytes
from pipeline.stages.fit.stage import as_tensor
from pipeline.workers.cluster import Resources, device, session
from pipeline.workers.progress import Stage

VERSION = 1  # raise it when the same training would give other numbers


class Pairs(NamedTuple):
    """N decoded pairs."""

    pixels: NDArray[np.uint8]  # [N, 3, S, S]
    tokens: NDArray[np.int32]  # [N, L] the captions

    @property
    def content(self) -> str:
        """A hash of all of them."""
        return _hash(self.pixels) + _hash(self.tokens)

    def tensors(self) -> Images:
        """The pairs as tensors over the same memory."""
        return Images(as_tensor(self.pixels), as_tensor(self.tokens))


class Rule(NamedTuple):
    """A way to choose pairs."""

    name: str
    counts: NDArray[np.int32]  # [N] how often a pair is drawn in an epoch; 0 drops it
    is_oracle: bool = False  # whether it drops exactly what is wrong: the other rules' gains are shares of its gain


class Trainings(NamedTuple):
    """How each rule is judged."""

    architecture: dict[str, Any] = SMALL  # see `ecif.training.build`
    recipe: Recipe = Recipe()
    seeds: int = 3
    weights: dict[str, Tensor] | None = None  # a state dict to fine-tune; None trains from scratch

    def fingerprint(self) -> str:
        """A name of everything that a training depends on, beside the pairs, the rule and the seed."""
        weights = {name: _hash_of_tensor(value) for name, value in sorted((self.weights or {}).items())}
        return fingerprint(VERSION, self.architecture, self.recipe._asdict(), weights)


class _Job(NamedTuple):
    url: str  # of the result
    counts: NDArray[np.int32]
    seed: int


def judge_whole(
    folder: str, corpus: Pairs, test: Pairs, rules: list[Rule], how: Trainings | None = None, workers: int | None = None
) -> list[dict[str, Any]]:
    """Train small models on what each rule keeps, and test them. Every training takes the same number of steps.

    Trainings are tasks of Ray, each on one core or GPU. A call that was killed has lost those in progress and no other.

    Args:
        folder: for the results, `<folder>/whole_models/<name>.json`. Rules that keep the same pairs share them.
        corpus: what is chosen from.
        test: pairs that no rule was chosen by.
        rules: the first one is what the others' gains are measured from.
        how: architecture, recipe, number of seeds.
        workers: how many trainings go on at once; None means one for each GPU, or for each core if there is no GPU.

    Returns:
        A row for each rule: `rule`, `kept` (distinct pairs), `drawn` (pairs in an epoch), mean and standard deviation over the
        seeds of each measure of `ecif.training.measure` (`loss`, `loss_std`, ...), and if there is an oracle
        `share_of_oracle_gain` in loss.

    Raises:
        UserError: a rule is of another number of pairs, or keeps none.
    """
    how = how or Trainings()
    for rule in rules:
        if len(rule.counts) != len(corpus.pixels):
            raise UserError(f"rule {rule.name!r} is of {len(rule.counts)} pairs, the corpus has {len(corpus.pixels)}")
        if not (rule.counts > 0).any() or (rule.counts < 0).any():
            raise UserError(f"rule {rule.name!r} keeps no pair, or has a count below 0")
    common = fingerprint(how.fingerprint(), corpus.content, test.content)
    jobs = [[_job(folder, common, rule, seed) for seed in range(how.seeds)] for rule in rules]
    results = _trained([job for of_rule in jobs for job in of_rule], (corpus, test, how), workers)
    rows = [_row(rule, [results[job.url] for job in of_rule]) for rule, of_rule in zip(rules, jobs, strict=True)]
    for rule, best in zip(rules, rows, strict=True):
        if rule.is_oracle:
            gain = rows[0]["loss"] - best["loss"]
            for row in rows:
                row["share_of_oracle_gain"] = (rows[0]["loss"] - row["loss"]) / gain if gain else 0.0
    return rows


def _job(folder: str, common: str, rule: Rule, seed: int) -> _Job:
    counts = np.ascontiguousarray(rule.counts, np.int32)
    name = fingerprint(common, _hash(counts), seed)
    return _Job(storage.join(folder, "whole_models", f"{name}.json"), counts, seed)


def _trained(jobs: list[_Job], shared: tuple[Pairs, Pairs, Trainings], workers: int | None) -> dict[str, dict[str, Any]]:
    """The result of every job by its URL. Jobs without a result are run."""
    found = {job.url: result for job in jobs if (result := _read(job.url)) is not None}
    missing = {job.url: job for job in jobs if job.url not in found}
    if missing:
        with session(workers) as resources, Stage("train", len(jobs), len(jobs) - len(missing)) as progress:
            _run(list(missing.values()), shared, resources, progress)
        found |= {url: json.loads(storage.read_bytes(url)) for url in missing}
    return found


def _read(url: str) -> dict[str, Any] | None:
    try:
        result: dict[str, Any] = json.loads(storage.read_bytes(url))
    except FileNotFoundError:
        return None
    return result


def _run(jobs: list[_Job], shared: tuple[Pairs, Pairs, Trainings], resources: Resources, progress: Stage) -> None:
    """Run jobs in parallel, and write the result of each as soon as it is there."""
    run: Any = ray.remote(**resources.actor, max_retries=2, max_calls=0)(_train)
    given, waiting, left = ray.put(shared), dict[Any, _Job](), list(reversed(jobs))
    while left or waiting:
        while left and len(waiting) < resources.workers:
            job = left.pop()
            waiting[run.remote(given, job.counts, job.seed)] = job
        (ready,), _ = ray.wait(list(waiting))
        storage.write_bytes(waiting.pop(ready).url, json_bytes(ray.get(ready)))
        progress.advance(1)


def _train(shared: tuple[Pairs, Pairs, Trainings], counts: NDArray[np.int32], seed: int) -> dict[str, Any]:
    """One training, on a worker."""
    corpus, test, how = shared
    model = build(how.architecture, seed, how.weights).to(device())
    losses = train(model, corpus.tensors(), as_tensor(counts), how.recipe, seed)
    facts = {"seed": seed, "steps": len(losses), "train_loss": float(np.mean(losses[-10:])), "device": device().type}
    return facts | {"measures": measure(model, test.tensors())}


def _row(rule: Rule, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and spread over the seeds."""
    row: dict[str, Any] = {"rule": rule.name, "kept": int((rule.counts > 0).sum()), "drawn": int(rule.counts.sum())}
    for name in results[0]["measures"]:
        values = [result["measures"][name] for result in results]
        row |= {name: float(np.mean(values)), f"{name}_std": float(np.std(values))}
    return row


def _hash_of_tensor(tensor: Tensor) -> str:
    """Of its bytes: numpy has no bfloat16."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return f"{tuple(tensor.shape)} {tensor.dtype} {_hash(flat.view(torch.uint8).numpy())}"


def _hash(array: NDArray[Any]) -> str:
    digest = hashlib.sha256(repr((array.shape, array.dtype.str)).encode())
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
