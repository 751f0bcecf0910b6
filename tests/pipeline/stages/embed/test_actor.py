"""An actor of `embed`: features of a part, written; by several threads at once, in the precision that was asked for."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy.stats import spearmanr

import ecif
from ecif.towers.precision import best_precision, computed_in
from pipeline import storage
from pipeline.corpus.pairs import Pair
from pipeline.run_folder import tables
from pipeline.sections import Model
from pipeline.stages.embed.actor import EmbedPart
from pipeline.stages.embed.forward import Forward
from pipeline.stages.embed.rows import Embedded, Part
from pipeline.stages.embed.usage import THREADS
from pipeline.workers.model import load, tokens

WORDS = ["red", "blue", "round", "square", "cat", "dog", "tree", "house", "river", "stone", "light", "dark"]


@pytest.fixture
def model(tiny_model) -> Model:
    return Model(name=tiny_model)


def part(model: Model, number: int, count: int = 40, with_tokens: bool = True) -> Part:
    """Pairs of blobs of colour, captioned by words."""
    rng = np.random.default_rng(number)
    size = load(model).preprocess["size"]
    height, width = size if isinstance(size, tuple | list) else (size, size)
    pairs = []
    for i in range(count):
        pixels = np.full((height, width, 3), rng.integers(256, size=3), np.uint8)
        pixels[rng.integers(height) :, rng.integers(width) :] = rng.integers(256, size=3)
        caption = " ".join(rng.choice(WORDS, 3))
        pairs.append(Pair(i, f"{i}", f"{number:08d}{i:024d}", caption, pixels, f"{i:032x}"))
    made = tokens(model, [pair.caption for pair in pairs]) if with_tokens else None
    return Part(0, "00000", number, 1, pairs, [], False, None, made)


def table(sent: Part) -> pa.Table:
    return pa.table({name: [value] for name, value in sent.to_row().items()})


def test_parts_that_are_embedded_at_once_are_those_that_are_embedded_one_by_one(tmp_path, model):
    sent = [table(part(model, i, count)) for i, count in enumerate((40, 0, 7, 33, 40, 1))]
    alone = EmbedPart([str(tmp_path / "alone")], model, "fp32")
    rows = [alone(one) for one in sent]
    together = EmbedPart([str(tmp_path / "together")], model, "fp32")
    with ThreadPoolExecutor(THREADS["cuda"]) as pool:
        found = list(pool.map(together, sent))
    for i, (row, other) in enumerate(zip(rows, found, strict=True)):
        one, two = (Embedded.from_row({"facts": r["facts"][0]}) for r in (row, other))
        assert one._replace(busy=None) == two._replace(busy=None)
        name = f"00000/{tables.part_name(i)}"
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "together" / name).read_bytes()


def test_a_part_that_can_t_be_written_fails_and_others_do_not(tmp_path, model, monkeypatch):
    written = storage.write_bytes

    def failing(url, data):
        if url.endswith(tables.part_name(1)):
            raise OSError("No space left on device")
        written(url, data)

    monkeypatch.setattr(storage, "write_bytes", failing)
    actor = EmbedPart([str(tmp_path)], model, "fp32")
    with ThreadPoolExecutor(THREADS["cuda"]) as pool:
        done = [pool.submit(actor, table(part(model, i, 5))) for i in range(4)]
    assert [type(one.exception()) for one in done] == [type(None), OSError, type(None), type(None)]
    assert sorted(path.name for path in (tmp_path / "00000").iterdir()) == [tables.part_name(i) for i in (0, 2, 3)]


def test_tokens_of_a_reader_are_those_of_the_actor(model):
    forward = Forward(model, "fp32")
    made, left = (forward(Part.from_row(part(model, 0, 9, with_tokens).to_row())) for with_tokens in (True, False))
    assert np.array_equal(made.texts, left.texts)
    captions = [pair.caption for pair in part(model, 0, 9).pairs]
    assert np.array_equal(made.texts, load(model).text_features(captions).half().numpy())


def test_half_precision_keeps_features_and_ranks(model):
    """The trunk in bf16 on a CPU: features keep their direction, and every column its order."""
    sent = [Part.from_row(part(model, i, 160).to_row()) for i in range(2)]
    exact, half = ([Forward(model, precision)(one) for one in sent] for precision in ("fp32", "bf16"))
    for one, other in zip(exact, half, strict=True):
        for a, b in ((one.images, other.images), (one.texts, other.texts)):
            assert not np.array_equal(a, b), "it computes in another precision"
            cosine = (a.astype(np.float64) * b).sum(1) / np.linalg.norm(a.astype(np.float64), axis=1)
            assert (cosine / np.linalg.norm(b.astype(np.float64), axis=1)).min() > 0.999
    columns = []
    for corpus, clean in (exact, half):
        x, t, cx, ct = (torch.from_numpy(a).float() for a in (corpus.images, corpus.texts, clean.images, clean.texts))
        heads = load(model).heads
        settings = ecif.Settings(batch_size=32, repeats=1, epochs=2, learning_rate=1e-3, pull=0.1, filter=False)
        columns.append(ecif.attribute(x, t, {"clean": ecif.Contrastive(cx, ct)}, heads=heads, settings=settings))
    assert len(columns[0]) > 8
    for name, values in columns[0].items():
        assert spearmanr(np.asarray(values), np.asarray(columns[1][name])).statistic > 0.99, name


def test_auto_is_the_best_of_the_device(model):
    assert Forward(model, "auto").precision == best_precision(torch.device("cpu")) == "fp32"


def test_a_precision_ends_with_its_body():
    x = torch.ones(2, 2)
    with computed_in("bf16", torch.device("cpu")):
        assert (x @ x).dtype == torch.bfloat16
    with computed_in("fp32", torch.device("cpu")):
        assert (x @ x).dtype == torch.float32
    assert (x @ x).dtype == torch.float32
