"""What the data path costs: stage `embed` beside a bare loop without Ray.

Ratios, measured in turns (A B A B) in one run: `pytest tests/benchmarks/test_data_path.py -m benchmark -s`. Parts that were
decoded while the pool of actors started cost `embed` nothing here: its ratio is too good by up to the share that decoding has.
Meaningless on a machine that others use: the more processes, the more of its cores.
"""

import io
import statistics
from pathlib import Path

import pytest
from PIL import Image

from jobs.demo import model as demo
from pipeline import storage
from pipeline.config import Config
from pipeline.inputs import load_inputs
from pipeline.stages.embed.stage import embed
from pipeline.workers.cluster import Resources, session
from tests.benchmarks.support.bare_loop import BareLoop, Took
from tests.benchmarks.support.processes import Watch
from tests.support.tars import write_tar

pytestmark = pytest.mark.benchmark
EMBEDDED = Path(demo.__file__).parent / "corpus"
SHARDS, PAIRS, PART = 8, 64, 32
ROUNDS = 3
ENOUGH = 0.9


@pytest.fixture(scope="module")
def resources():
    with session(None) as found:
        yield found


@pytest.fixture(scope="module")
def lit(tmp_path_factory) -> str:
    """The demo's model."""
    return demo.build_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def bare(lit, resources):
    """As many processes as the pipeline has actors."""
    loop = BareLoop(lit, resources.workers)
    yield loop
    loop.close()


def as_they_are(image: bytes) -> tuple[str, bytes]:
    return "webp", image


def as_photos(image: bytes) -> tuple[str, bytes]:
    """JPEG of the size that img2dataset mostly writes."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(image)).convert("RGB").resize((384, 384)).save(buffer, "JPEG", quality=95)
    return "jpg", buffer.getvalue()


def corpus(folder: Path, encode) -> list[Path]:
    """Shards of real pairs, their images encoded anew."""
    import tarfile

    with tarfile.open(EMBEDDED / "corpus" / "00000.tar") as one, tarfile.open(EMBEDDED / "corpus" / "00001.tar") as two:
        members = [(m.name, tar.extractfile(m).read()) for tar in (one, two) for m in tar]
    pairs = [dict((name.partition(".")[::2][1], data) for name, data in members[i : i + 3]) for i in range(0, len(members), 3)]
    shards = []
    for s in range(SHARDS):
        some = []
        for i, pair in enumerate(pairs[s * PAIRS : (s + 1) * PAIRS]):
            suffix, data = encode(pair["webp"])
            some += [(f"{i:05d}.{suffix}", data), (f"{i:05d}.txt", pair["txt"]), (f"{i:05d}.json", pair["json"])]
        shards.append(write_tar(folder / f"{s:05d}.tar", some))
    return shards


def pipeline(run: Path, shards: Path, model: str, resources: Resources) -> Took:
    """Stage `embed` at steady state: without the parts that the pool begins and ends with, one an actor."""
    config = Config.model_validate(
        {
            "run": str(run),
            "corpus": {"shards": str(shards)},
            "model": {"name": model},
            "targets": {"clean": {"shards": str(EMBEDDED / "target")}},
            "embed": {"part_size": PART},
        }
    )
    inputs = load_inputs(config)
    with Watch(memory=False) as watch:
        embed([inputs.corpus], config.model, config.embed, inputs.model.preprocess, resources)
    written = sorted(item.modified for item in storage.listing(inputs.corpus.features_folder(""), ".parquet"))
    assert len(written) == SHARDS * PAIRS // PART
    first, last = written[resources.workers - 1], written[-resources.workers]
    parts = len(written) - 2 * resources.workers + 1
    return Took(parts * PART, last - first, watch.cpu_at(last) - watch.cpu_at(first))


@pytest.mark.parametrize("encode", [as_they_are, as_photos])
def test_embed_beside_a_bare_loop(tmp_path, encode, lit, resources, bare):
    shards = corpus(tmp_path / "corpus", encode)
    size = sum(path.stat().st_size for path in shards) / SHARDS / PAIRS
    print(f"\n{SHARDS * PAIRS} pairs of {size / 1000:.1f} kB, EfficientNet-Lite0 at 128 px and MiniLM-L6, on the CPU;")
    print(f"{resources.workers} processes with the model, a thread each; in turns")
    ways = {
        "embed": lambda i: pipeline(tmp_path / f"run{i}", tmp_path / "corpus", lit, resources),
        "bare loop": lambda _: bare(shards, decoded=False),
        "bare loop, decoded before": lambda _: bare(shards, decoded=True),
    }
    took: dict[str, list[Took]] = {name: [] for name in ways}
    for i in range(ROUNDS):
        for name, work in ways.items():
            took[name].append(work(i))
            print(
                f"{name:<26} {took[name][-1].rate:6.1f} pairs/s, {1e3 * took[name][-1].cost:5.1f} ms of CPU a pair", flush=True
            )
    print("medians: embed's pairs/s over the other's, the other's CPU a pair over embed's")
    for name in list(ways)[1:]:
        turns = list(zip(took["embed"], took[name], strict=True))
        rate, cost = (
            statistics.median(of) for of in ([a.rate / b.rate for a, b in turns], [b.cost / a.cost for a, b in turns])
        )
        print(f"{name:<26} {rate:.2f} {cost:.2f}", flush=True)
        assert rate >= ENOUGH
