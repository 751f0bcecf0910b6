"""`embed.precision: auto` is decided once in a run folder, and said where another machine would decide otherwise."""

import sys

import pytest

from pipeline.config import Config
from pipeline.inputs import as_dataset, made_by
from pipeline.run_folder.started import start
from pipeline.stages.embed import precision
from pipeline.stages.embed.precision import begun_in, in_precision, settle
from pipeline.workers.cluster import Resources

CPUS = Resources(2, {"num_cpus": 0.75}, {"num_cpus": 0.25})
GPUS = Resources(2, {"num_gpus": 1, "num_cpus": 0}, {"num_cpus": 1})


@pytest.fixture
def configure(tmp_path):
    def config(**embed) -> Config:
        base = {"corpus": {"shards": "a"}, "model": {"name": "m"}, "targets": {"t": {"shards": "b"}}}
        return Config.model_validate(base | {"run": str(tmp_path), "embed": embed})

    return config


@pytest.fixture
def bf16_gpus(monkeypatch):
    asked = precision._best
    monkeypatch.setattr(precision, "_best", lambda resources: "bf16" if resources is GPUS else asked(resources))


def test_a_run_goes_on_in_the_precision_that_it_was_begun_in(configure, bf16_gpus, capsys):
    auto = configure()
    assert begun_in(auto) is None
    assert (settle(auto, CPUS), settle(auto, GPUS)) == ("fp32", "bf16")
    start(in_precision(auto, "bf16"), [])
    assert (settle(auto, CPUS), begun_in(auto)) == ("bf16", "bf16")
    said = "features were begun in bf16 and go on in it; auto would be fp32 here: embed.precision: fp32 embeds everything anew"
    assert capsys.readouterr().err.splitlines() == [said]
    assert settle(auto, GPUS) == "bf16"
    assert capsys.readouterr().err == ""


def test_what_is_asked_for_is_done_on_any_machine(configure, bf16_gpus):
    start(in_precision(configure(), "bf16"), [])
    fixed = configure(precision="fp16")
    assert [settle(fixed, resources) for resources in (CPUS, GPUS)] == ["fp16", "fp16"]
    assert in_precision(fixed, "bf16") == fixed


def test_features_are_named_by_the_precision_and_the_resizing(configure):
    class Model:
        fingerprint = "model"

    def name(config: Config) -> str:
        return as_dataset("run", config.corpus, [], made_by(Model(), config)).fingerprint

    kinds = [configure(precision=p, resize=r) for p in ("bf16", "fp16", "fp32") for r in ("exact", "fast")]
    assert len({name(config) for config in kinds}) == 6
    assert name(in_precision(configure(), "bf16")) == name(configure(precision="bf16"))


@pytest.mark.parametrize(
    ("prints", "best"),
    [("8.0\n9.0", "bf16"), ("7.5", "fp16"), ("7.5\n8.0", None), ("", None), ("[N/A]", None), (None, None)],
    ids=["Ampere and Hopper", "Turing", "both", "no GPU", "unknown", "no such tool"],
)
def test_a_machine_with_one_kind_of_gpus_says_so_without_a_process_on_one(tmp_path, monkeypatch, prints, best):
    monkeypatch.setenv("PATH", str(tmp_path))
    if prints is not None:
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!{sys.executable}\nprint({prints!r})\n")
        tool.chmod(0o755)
    assert precision._told_by_the_driver() == best
