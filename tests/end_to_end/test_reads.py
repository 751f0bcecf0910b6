"""A stage reads no key of the configuration that the names of its objects do not depend on."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pipeline.inputs import load_inputs
from pipeline.run_folder.artifacts import KINDS
from pipeline.run_folder.contents import find_artifacts
from pipeline.stages.embed.stage import embed
from pipeline.stages.filter import choose_filters
from pipeline.stages.fit.copies import group_sample
from pipeline.stages.fit.stage import choose_how_to_fit, fit_heads, how_to_fit
from pipeline.stages.forward.fit import fit_parameters
from pipeline.stages.forward.score import score_forward
from pipeline.stages.forward.solve import solve_forward
from pipeline.stages.index import index
from pipeline.stages.publish import Publication, publish
from pipeline.stages.score import score
from pipeline.stages.solve.second_order import prepare
from pipeline.stages.solve.stage import solve
from pipeline.stages.solve.targets import read_target
from pipeline.workers.run import Run

# What stands behind the contents that names are made of. Where a run goes, and how many workers it has, changes no byte.
BEHIND = {
    "batches": {"batching", "batch_size", "seed"},
    "sample": {"batching", "batch_size", "seed", "fit.sample"},
    "forward_sample": {"batching", "batch_size", "seed", "scoring.sample"},
    "target": {"targets"},
    "question": {"targets", "solve.target_batch", "seed", "loss"},
    "corpus": set[str](),
    "corpus_size": set[str](),
}
NO_MATTER = {"run", "workers", "targets"}  # the targets' names are part of every key
ASKED = {"score.columns", "score.order", "scoring.mode"}  # say which objects there are, and so what is made of which
MODEL = {f"model.{key}" for key in ("name", "checkpoint", "sha256", "pretrained_cfg", "preprocess")}
FEATURES = MODEL | {"embed", "corpus"}  # how pairs are read: part of every content


class Recorder:
    """A configuration that writes down which keys are read of it, in whatever process."""

    def __init__(self, section: BaseModel, log: Path, prefix: str = ""):
        self.__dict__.update(section=section, log=log, prefix=prefix)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = getattr(self.__dict__["section"], name)
        key = f"{self.__dict__['prefix']}{name}"
        if isinstance(value, BaseModel) and key in ("fit", "solve", "score", "filter", "index", "scoring", "model"):
            return Recorder(value, self.__dict__["log"], f"{key}.")
        with self.__dict__["log"].open("a") as file:
            file.write(f"{key}\n")
        return value

    def __reduce__(self) -> tuple[Any, ...]:
        return Recorder, (self.__dict__["section"], self.__dict__["log"], self.__dict__["prefix"])


def allowed(kinds: list[str]) -> set[str]:
    """The keys that objects of these kinds depend on, through what they are made of too."""
    keys, todo = set[str](), list(kinds)
    while todo:
        name = todo.pop()
        if name in BEHIND:
            keys |= BEHIND[name]
        else:
            keys |= set(KINDS[name].reads)
            todo += KINDS[name].made_of
    return keys | NO_MATTER | ASKED | FEATURES


STAGES = ["fit", "solve", "order 2", "filter", "score", "forward fit", "forward solve", "forward score", "publish", "index"]


def test_a_stage_reads_what_its_names_depend_on_and_nothing_else(local_ray, configure, tmp_path):
    config = configure(
        tmp_path / "run",
        score={"repeats": 2, "order": 2, "order_rank": [3, 2], "columns": ["gsc", "normsim_2"]},
        index={"rank": [4, 4]},
        scoring={"mode": "forward", "parameters": ["visual.proj"], "sample": 32, "iterations": 3, "epochs": 1},
    )
    model, corpus, clean = load_inputs(config)
    embed([corpus, *clean.values()], config.model, config.embed, model.preprocess, local_ray)
    artifacts = find_artifacts(config, corpus, clean)
    logs = {stage: tmp_path / stage for stage in STAGES}
    by = {stage: Run(Recorder(config, log), local_ray, artifacts) for stage, log in logs.items()}

    sample = group_sample(by["fit"], corpus)
    targets = [read_target(name, dataset) for name, dataset in clean.items()]
    choice = choose_how_to_fit(by["fit"], model.heads, sample)
    how = how_to_fit(by["fit"].config, model.heads, choice.hyperparameters)
    fitted = fit_heads(by["fit"], how, sample)
    solved = solve(by["solve"], how, fitted, sample, targets)
    prepare(by["order 2"], fitted, sample, targets, solved)
    choose_filters(by["filter"], by["filter"].config.filter, how, sample, targets, solved)
    score(by["score"], model.heads, corpus, clean)
    fit_parameters(by["forward fit"], corpus)
    solve_forward(by["forward solve"], corpus, targets, clean, solved)
    score_forward(by["forward score"], corpus)
    publish(Publication(by["publish"].config, [artifacts], corpus.sidecars), corpus, local_ray)
    index(by["index"], by["index"].config.index, corpus, fitted, sample)

    assert {what.stage for what in KINDS.values() if what.stage != "embed" and what.asked(config)} == set(STAGES)
    unknown = {}
    for stage, log in logs.items():
        known = allowed([kind for kind, what in KINDS.items() if what.stage == stage])
        read = set(log.read_text().split())
        unknown[stage] = {key for key in read if not any(_within(key, k) or _within(k, key) for k in known)}
    assert unknown == {stage: set() for stage in STAGES}


def _within(key: str, section: str) -> bool:
    return key == section or key.startswith(f"{section}.")
