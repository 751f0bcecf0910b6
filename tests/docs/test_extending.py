"""The code of docs/extending.md does what the page says, as it stands there."""

import importlib
import json
import shlex
import sys

import numpy as np
import pytest
import torch
import yaml
from ray import cloudpickle

import ecif
from ecif.columns import PairScore, held_out_values
from ecif.heads import embed, logits
from ecif.heads.fit import fixed_batches
from pipeline.config import Config
from pipeline.results.export import export
from pipeline.run_folder.columns import columns
from tests.support.exports import COPIES, SELECTED, caption, make_corpus, write_selected
from tests.support.finished import Run, write_run
from tests.support.markdown import blocks
from tests.support.problems import fit_one, held_out_pairs, random_features, random_heads

PAGE = "docs/extending.md"
FEW = {"batch_size": 12, "folds": 2, "epochs": 2, "checkpoints": 1, "refits": 4, "repeats": 1, "iterations": 4, "filter": False}


@pytest.fixture(scope="module", autouse=True)
def my_package(tmp_path_factory):
    """The blocks of the page as the modules of a package that can be imported."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "my_package").mkdir()
    for block in blocks(PAGE, "python"):
        path = block.splitlines()[0].removeprefix("# ")
        (folder / path).write_text(block)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setattr(PairScore, "kinds", dict(PairScore.kinds))  # what the page registers stays here
        yield importlib.import_module("my_package")
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_package"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def export_run(tmp_path_factory, local_ray) -> Run:
    """A finished run of the corpus that exports are tested on."""
    folder = tmp_path_factory.mktemp("export")
    return write_run(folder / "run", str(make_corpus(folder / "corpus")))


def own(path: str):
    """A class of the page."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def features(pairs: int, seed: int = 1):
    return [(part / part.norm(dim=1, keepdim=True)).float() for part in random_features(pairs, seed)]


HEADS = random_heads()._replace(image=random_heads().image.float(), text=random_heads().text.float())


def attribute(target=None, **settings):
    images, texts = features(36)
    return ecif.attribute(
        images,
        texts,
        {"clean": target or ecif.Contrastive(*features(12, 2))},
        heads=HEADS,
        settings=ecif.Settings(**FEW | settings),
    )


def test_the_loss_can_be_fitted_and_gives_other_influence_than_clip_s():
    loss = own("my_package.margin:AdditiveMargin")()
    images, texts = features(36)
    how = {"batch_size": 12, "epochs": 8, "learning_rate": 1e-2, "seed": 0}
    fitted = fit_one(HEADS, images, texts, fixed_batches(list(torch.arange(36).split(12))), **how, loss=loss)[-1]
    before, after = (loss.batch_loss(logits(heads, embed(heads, images, texts))) for heads in (HEADS, fitted))
    assert after < before
    target = ecif.Contrastive(*features(12, 2), loss=loss)
    assert not torch.allclose(attribute(target, loss=loss)["influence_clean"], attribute()["influence_clean"])


def test_the_column_says_how_far_a_caption_is_from_the_others():
    score = own("my_package.caption_novelty:CaptionNovelty")
    pairs = held_out_pairs()
    values, bank = held_out_values(score(), pairs, []), pairs.bank
    for n in range(len(values)):
        text = pairs.texts[n] - bank.text_centre
        others = [bank.texts[m].to(text) for m in range(len(bank.fold)) if bank.fold[m] != pairs.fold[n]]
        assert torch.isclose(values[n], 1 - max((text / text.norm()) @ other for other in others))
    assert "caption_novelty" in attribute(columns=["my_package.caption_novelty:CaptionNovelty"])


def test_the_target_asks_for_the_image_of_a_caption_alone():
    search = own("my_package.image_search:ImageSearch")(*features(12, 2))
    assert attribute(search)["influence_clean"].isfinite().all()
    similarity = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    loss = search.batch_loss(similarity, torch.arange(5))
    assert torch.isclose(loss, 5 * torch.nn.functional.cross_entropy(similarity, torch.arange(5)))


def test_the_writer_writes_every_kept_caption(my_package, tmp_path, export_run):
    module = importlib.import_module("my_package.captions")
    cloudpickle.register_pickle_by_value(module)  # the workers of the test were started before the package was written
    try:
        command = shlex.split(blocks(PAGE, "bash")[0])
        writer = command[command.index("--format") + 1]
        done = export(export_run.folder, write_selected(export_run, tmp_path, SELECTED), str(tmp_path / "out"), writer)
    finally:
        cloudpickle.unregister_pickle_by_value(module)
    assert done.pairs == SELECTED.total()
    for shard, copies in COPIES.items():
        lines = (tmp_path / "out" / f"{shard}.jsonl").read_text().splitlines()
        expected = [{"uid": export_run.uids[shard, key], "caption": caption(shard, key)} for key, _ in copies]
        assert [json.loads(line) for line in lines] == expected


@pytest.mark.parametrize("block", blocks(PAGE, "yaml"))
def test_a_configuration_takes_what_the_page_puts_into_it(block):
    clean = {"clean": {"shards": "clean"}}
    base = {"run": "run", "corpus": {"shards": "corpus"}, "model": {"name": "ViT-B-32"}, "targets": clean}
    config = Config.model_validate(base | yaml.safe_load(block))
    assert "my_package" in str(config.model_dump())
    assert np.unique([column.name for column in columns(config)]).size == len(columns(config))
