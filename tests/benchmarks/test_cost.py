"""What influence costs beside the forward pass that made the features: ratios, measured in one run on one thread.

make bench
"""

import open_clip
import pytest
import torch

from ecif.columns.agreement import agreement_with
from ecif.columns.bank import build_bank
from ecif.heads import Heads, embed, standardised
from ecif.heads.influence import score
from ecif.projected.curvature import damped, gauss_newton
from ecif.projected.gradients import pair_gradients, project_batch
from ecif.projected.projection import random_projection
from ecif.projected.sampled import sampled_gauss_newton
from ecif.projected.second_order import correction
from ecif.system import BANK
from tests.benchmarks.support.timing import seconds

pytestmark = [pytest.mark.benchmark, pytest.mark.usefixtures("one_thread")]
D_IMAGE, D_TEXT, WIDTH = 768, 512, 512  # ViT-B/32
RANK = (32, 32)


@pytest.fixture(scope="module")
def forward_pass(one_thread):
    """Seconds a pair of ViT-B/32's two towers. Its weights do not matter for the time."""
    model = open_clip.create_model("ViT-B-32").eval()
    images, tokens = torch.randn(8, 3, 224, 224), open_clip.get_tokenizer("ViT-B-32")(["a photo"] * 8)
    with torch.inference_mode():
        return seconds(lambda: (model.encode_image(images), model.encode_text(tokens))) / 8


def problem(pairs):
    g = torch.Generator().manual_seed(0)
    images, texts = torch.randn(pairs, D_IMAGE, generator=g), torch.randn(pairs, D_TEXT, generator=g)
    start = Heads(torch.randn(D_IMAGE, WIDTH, generator=g), torch.randn(D_TEXT, WIDTH, generator=g), 50.0)
    return standardised(start), images, texts


@pytest.mark.parametrize("batch", [256, 1024, 4096])
def test_score_is_at_most_three_percent_of_the_forward_pass(batch, forward_pass):
    heads, images, texts = problem(batch)
    direction, rows = torch.randn(1, heads.size), [torch.arange(batch)]
    cost = seconds(lambda: score(heads, embed(heads, images, texts), rows, direction)) / batch
    print(f"\nscore, batch {batch}: {1e3 * cost:.2f} ms a pair, {cost / forward_pass:.2%} of the forward pass")
    assert cost < 0.03 * forward_pass


def test_agreement_is_at_most_three_percent_of_the_forward_pass(forward_pass):
    heads, images, texts = problem(BANK)
    fold = torch.arange(BANK) % 5
    bank, some = build_bank(images, texts, fold, heads), slice(0, 1024)
    cost = seconds(lambda: agreement_with(bank, images[some], texts[some], fold[some])) / 1024
    print(f"\nagreement with {BANK} pairs: {1e3 * cost:.2f} ms a pair, {cost / forward_pass:.2%} of the forward pass")
    assert cost < 0.03 * forward_pass


@pytest.mark.parametrize("batch", [256, 1024, 4096])
def test_index_is_at_most_three_percent_of_the_forward_pass(batch, forward_pass):
    heads, images, texts = problem(batch)
    projection = random_projection(heads, RANK, RANK, seed=0)
    curvatures = {"exact": gauss_newton, "sampled": lambda projected: sampled_gauss_newton(projected, "benchmark")}
    for name, curvature in curvatures.items():

        def index(curvature=curvature):
            projected = project_batch(heads, embed(heads, images, texts), projection)
            return pair_gradients(projected), curvature(projected)

        cost = seconds(index, 1) / batch
        print(
            f"\nindex, batch {batch}, {projection.size} numbers a part, {name} curvature: {1e3 * cost:.2f} ms a pair, "
            f"{cost / forward_pass:.2%} of the forward pass"
        )
        assert cost < 0.03 * forward_pass


@pytest.mark.parametrize("batch", [256, 1024, 4096])
def test_second_order_in_a_projected_space(batch, forward_pass):
    heads, images, texts = problem(batch)
    projection, some = random_projection(heads, (16, 16), (16, 16), seed=0), torch.arange(64)
    projected = project_batch(heads, embed(heads, images, texts), projection)
    curvature = gauss_newton(projected)
    solver, query = damped(curvature, 100.0), torch.ones(projection.size)
    parts = [part[some] for part in pair_gradients(projected)]
    both = lambda: correction(projected, *parts, solver.solve, query, curvature, held_out=True, pairs=some)  # noqa: E731
    gradients = seconds(lambda: pair_gradients(project_batch(heads, embed(heads, images, texts), projection)), 1) / batch
    cost = seconds(both, 1) / len(some)
    print(
        f"\nsecond order, batch {batch}, {projection.size} numbers: {1e3 * cost:.2f} ms a pair and target, "
        f"{cost / forward_pass:.2%} of the forward pass, and {1e3 * gradients:.2f} ms a pair and fold for the gradients"
    )
    assert batch > 1024 or cost + gradients < 0.03 * forward_pass
