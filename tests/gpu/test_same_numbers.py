"""Every function of the method gives in float32, on a GPU, what it gives on a CPU in float64, within stated bounds."""

import pytest
import torch
from torch import Tensor

from ecif.columns.agreement import agreement_with, agreement_with_target
from ecif.columns.bank import build_bank
from ecif.columns.contract import HeldOutPairs
from ecif.columns.held_out_loss import HeldOutLoss
from ecif.columns.influence import held_out_influence
from ecif.heads import Heads, embed, standardised
from ecif.heads.curvature import gauss_newton_product
from ecif.heads.fit import Course, fit, fixed_batches
from ecif.losses import Clip, Dcl, Loss, SigLip, SoftInfoNCE
from ecif.solve import krylov

PAIRS, BATCH, D_IMAGE, D_TEXT, WIDTH = 1024, 128, 96, 64, 48
LOSSES = [Clip(), Clip("taylor"), SigLip(), Dcl(), SoftInfoNCE()]


def close(found: Tensor, truth: Tensor, bound: float) -> bool:
    """Whether the error is a small share of the truth, all numbers together."""
    return (found.cpu().double() - truth).norm().item() < bound * truth.norm().item()


def problem() -> tuple[Heads, Tensor, Tensor, list[Tensor], Tensor]:
    """Heads at a trained model's scale, unit features of pairs that belong together, batches of several sizes, directions."""
    g = torch.Generator().manual_seed(0)
    shared = torch.randn(PAIRS, 24, generator=g, dtype=torch.float64)
    sides = [shared @ torch.randn(24, d, generator=g, dtype=torch.float64) for d in (D_IMAGE, D_TEXT)]
    images, texts = (side + torch.randn(side.shape, generator=g, dtype=torch.float64) for side in sides)
    images, texts = (side / side.norm(dim=1, keepdim=True) for side in (images, texts))
    image, text = (torch.randn(d, WIDTH, generator=g, dtype=torch.float64) for d in (D_IMAGE, D_TEXT))
    heads = Heads(image, text, 100.0)
    heads = heads._replace(
        image=heads.image / heads.image.norm() * WIDTH**0.5, text=heads.text / heads.text.norm() * WIDTH**0.5
    )
    order = torch.randperm(PAIRS, generator=g)
    batches = [*order[:512].split(BATCH), *order[512:].split([100, 156, 128, 128])]
    return heads, images, texts, batches, torch.randn(3, heads.size, generator=g, dtype=torch.float64)


def single(heads: Heads, device: torch.device) -> Heads:
    return heads._replace(image=heads.image.float().to(device), text=heads.text.float().to(device))


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_influence_and_held_out_loss(to, loss: Loss):
    heads, images, texts, batches, directions = problem()
    fold, bank = (
        torch.arange(PAIRS) % 2,
        build_bank(images[:64].float(), texts[:64].float(), torch.zeros(64), single(heads, "cpu")),
    )
    pairs = HeldOutPairs(images, texts, fold, batches, heads, [heads], loss, bank)
    truth = held_out_influence(pairs, [[heads], [heads]], [directions[:1, None].expand(2, 1, -1), directions[1:, None]])
    there = single(heads, to)
    moved = [part.float().to(to) for part in (images, texts)]
    on_gpu = HeldOutPairs(*moved, fold.to(to), [rows.to(to) for rows in batches], there, [there], loss, bank.to(to))
    ways = [d.float().to(to) for d in (directions[:1, None].expand(2, 1, -1), directions[1:, None])]
    assert close(held_out_influence(on_gpu, [[there], [there]], ways), truth, 1e-4)
    assert close(HeldOutLoss().values(on_gpu), HeldOutLoss().values(pairs), 1e-5)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_curvature(to, loss: Loss):
    heads, images, texts, batches, directions = problem()
    truth = gauss_newton_product(heads, embed(heads, images, texts), batches, directions, loss)
    there = single(heads, to)
    pairs = embed(there, images.float().to(to), texts.float().to(to))
    assert close(gauss_newton_product(there, pairs, batches, directions.float().to(to), loss), truth, 1e-4)


def test_directions(to):
    heads, images, texts, batches, directions = problem()
    there, pairs = single(heads, to), embed(heads, images, texts)
    on_gpu = embed(there, images.float().to(to), texts.float().to(to))
    spaces = krylov(lambda v: gauss_newton_product(heads, pairs, batches, v), directions, 12)
    found = krylov(lambda v: gauss_newton_product(there, on_gpu, batches, v), directions.float().to(to), 12)
    damping = 0.1 * spaces.largest_eigenvalue()
    assert close(found.solve(damping)[0], spaces.solve(damping)[0], 1e-3)


def test_agreement(to):
    heads, images, texts, *_ = problem()
    fold = torch.arange(PAIRS) % 5
    bank = build_bank(images.float(), texts.float(), fold, single(heads, torch.device("cpu")))
    truth = agreement_with(bank, images, texts, fold), agreement_with_target(bank, images, texts, [-1, 2])
    moved = [part.float().to(to) for part in (images, texts)]
    assert close(agreement_with(bank.to(to), *moved, fold.to(to)), truth[0], 1e-4)
    assert close(agreement_with_target(bank.to(to), *moved, [-1, 2]), truth[1], 1e-4)


@pytest.mark.parametrize("loss", [Clip(), SigLip()], ids=lambda loss: type(loss).__name__)
def test_fit(to, loss: Loss):
    heads, images, texts, batches, _ = problem()
    start = standardised(single(heads._replace(logit_scale=15.0), torch.device("cpu")))

    generator = torch.Generator().manual_seed(5)
    shrunken = [[rows[torch.rand(len(rows), generator=generator) < 0.7] for rows in batches] for _ in range(3)]
    courses = [Course(fixed_batches(of), seed, seed / 10) for seed, of in enumerate(shrunken)]

    def fitted(on: torch.device, of: list[Course]) -> list[Heads]:
        how = {"batch_size": BATCH, "epochs": 3, "learning_rate": 1e-3, "loss": loss}
        return [path[-1] for path in fit(start.to(on), images.float().to(on), texts.float().to(on), of, **how)]

    together = fitted(to, courses)
    alone = [heads for course in courses for heads in fitted(torch.device("cpu"), [course])]
    for ours, truth in zip(together, alone, strict=True):
        assert close(ours.image, truth.image.double(), 1e-3)
        assert close(ours.text, truth.text.double(), 1e-3)


def test_the_same_bytes_again(to):
    """Two computations of one shard give the same bytes, so that a resumed run does."""
    heads, images, texts, batches, directions = problem()
    there = single(heads, to)
    pairs = HeldOutPairs(
        images.float().to(to), texts.float().to(to), torch.zeros(PAIRS, device=to), batches * 3, there, [there], Clip(), None
    )
    ways = [directions.float().to(to)[:1, None]]
    first, second = (held_out_influence(pairs, [[there]], ways) for _ in range(2))
    assert torch.equal(first, second)
