"""Forward mode's `solve`: q = (H + damping I)^-1 grad L_T over the chosen parameters, for every target.

Actors hold the decoded pixels of slices of the sample and return Gauss-Newton products; the reducer sums them in fixed order
and takes the conjugate gradient steps.
"""

from typing import Any, NamedTuple

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor

from ecif.forward.mode import gauss_newton_product
from ecif.solve import conjugate_gradient, largest_eigenvalue
from pipeline.config import Config
from pipeline.errors import RunError
from pipeline.run_folder import tensors as stored
from pipeline.run_folder.dataset import Dataset
from pipeline.stages.forward.decode import Members
from pipeline.stages.forward.model import Model, sample_batches, target_gradients
from pipeline.stages.solve.stage import Directions
from pipeline.stages.solve.targets import Target
from pipeline.workers.cluster import Resources
from pipeline.workers.progress import Stage
from pipeline.workers.slices import SliceActors

LANCZOS_STEPS = 8  # products that the largest eigenvalue takes


class ForwardDirections(NamedTuple):
    """What `score_forward` needs to answer for every pair."""

    directions: Tensor  # [T, P] over the chosen parameters in the model's order
    facts: dict[str, Any]  # per target: damping, largest eigenvalue, residual, products


def read_forward(url: str) -> ForwardDirections:
    """Directions that an earlier call wrote; FileNotFoundError if there are none."""
    tensors, facts = stored.read(url)
    return ForwardDirections(**tensors, facts=facts)


def solve_forward(
    url: str,
    fitted: str | None,
    corpus: Dataset,
    targets: list[Target],
    clean: dict[str, Dataset],
    heads: Directions,
    config: Config,
    resources: Resources,
) -> dict[str, Any]:
    """Solve for every target unless that is done; returns the facts.

    Args:
        url: where the directions go.
        fitted: where the fitted parameters are; None for the checkpoint's.
        corpus: the curvature is taken over a sample of it.
        targets: how each target's pairs fall into batches.
        clean: the targets' datasets.
        heads: whose damping is taken where none is configured.
        config: of the run.
        resources: of the actors.

    Raises:
        RunError: a target's loss does not depend on the chosen parameters.
    """
    try:
        return read_forward(url).facts
    except FileNotFoundError:
        pass
    settings, sample = config.scoring, sample_batches(corpus, config)
    pairs = sum(len(batch.uid) for batch in sample)
    share = pairs / sum(a.embedded for a in corpus.accounting().values())
    with Stage("forward solve", len(targets) + LANCZOS_STEPS + settings.iterations) as progress:
        gradients = target_gradients(
            fitted, targets, clean, config, resources, progress
        )  # before the actors: they take the CPUs
        relative = [settings.damping or heads.facts[target.name]["damping"] for target in targets]
        try:
            with _Pool(fitted, sample, corpus.caption, config, resources, progress) as pool:
                top = largest_eigenvalue(pool.product, gradients, LANCZOS_STEPS)
                damping = torch.tensor(relative, dtype=torch.float64) * top
                solution = conjugate_gradient(
                    pool.product, gradients, damping, tolerance=settings.tolerance, max_iterations=settings.iterations
                )
        except ValueError as error:
            raise RunError(f"scoring.parameters: {error}") from None
        directions = solution.directions * share  # the sample's curvature stands for the whole corpus's
        facts: dict[str, Any] = {
            target.name: {
                "damping": relative[i],
                "largest_eigenvalue": top[i].item(),
                "residual": solution.residual[i].item(),
                "iterations": solution.iterations,
                "parameters": directions.shape[1],
                "sample": pairs,
            }
            for i, target in enumerate(targets)
        }
        stored.write(url, {"directions": directions}, **facts)
    return facts


class _Pool(SliceActors):
    """The actors that hold the sample, seen from the reducer."""

    def __init__(
        self, fitted: str | None, sample: list[Members], caption: str, config: Config, resources: Resources, progress: Stage
    ):
        super().__init__(_Slices, (fitted, caption, config), sample, resources)
        self.progress = progress

    def product(self, vectors: Tensor) -> Tensor:
        """H vectors, [k, P] -> [k, P], summed over the slices in their order."""
        shared = ray.put(vectors.numpy())
        total = np.zeros(vectors.shape, np.float32)
        for part in self.each("products", shared):
            total += part
        self.progress.advance(1)
        return torch.from_numpy(total)


class _Slices:
    """Actor: some slices of the sample, decoded once and kept as uint8."""

    def __init__(self, fitted: str | None, caption: str, config: Config, slices: list[list[Members]]):
        self.model = Model(config, fitted)
        self.slices = [self.model.read(batches, caption) for batches in slices]

    def products(self, at: int, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """Gauss-Newton products [k, P] of one slice."""
        model = self.model
        batches = (model.batch(decoded) for decoded in self.slices[at])
        moves = torch.tensor(vectors).to(model.device)
        return gauss_newton_product(model.logits, model.parameters, batches, moves).cpu().numpy()
