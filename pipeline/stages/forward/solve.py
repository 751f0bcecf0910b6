"""Forward mode's `solve`: q = (H + damping I)^-1 grad L_T over the chosen parameters, for every target.

Actors hold the decoded pixels of slices of the sample and return Gauss-Newton products. The reducer sums these in fixed order
and takes the conjugate gradient steps.
"""

from typing import Any, NamedTuple

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor

from ecif.forward.mode import gauss_newton_product, loss_gradient
from ecif.solve import conjugate_gradient, largest_eigenvalue
from pipeline import storage
from pipeline.config import Config
from pipeline.errors import RunError
from pipeline.run_folder import tensors
from pipeline.run_folder.dataset import Dataset
from pipeline.sections import Reading
from pipeline.stages.forward.decode import Decoded, Members, accepted
from pipeline.stages.forward.fit import FittedParameters
from pipeline.stages.forward.model import Batches, ForwardModel, sample_batches
from pipeline.stages.solve.stage import Solved
from pipeline.stages.solve.targets import TargetFeatures
from pipeline.workers.progress import Stage
from pipeline.workers.run import Run
from pipeline.workers.slices import SliceActors

LANCZOS_STEPS = 8  # Gauss-Newton products that the largest eigenvalue is estimated with


class ForwardDirection(NamedTuple):
    """The direction of one target, and how it was solved for."""

    direction: Tensor  # [P] over the chosen parameters in the model's order
    damping: float  # in units of the curvature's largest eigenvalue
    largest_eigenvalue: float
    residual: float  # norm, relative to the gradient's
    iterations: int  # products taken
    sample: int  # pairs that the curvature was taken over

    def facts(self) -> dict[str, Any]:
        """Facts about the direction, for run.json."""
        plain = {name: value for name, value in self._asdict().items() if name != "direction"}
        return plain | {"parameters": len(self.direction)}


def read_fitted(run: Run) -> list[Tensor] | None:
    """The parameters that `fit_parameters` wrote; None if the values of the checkpoint are used."""
    if "parameters" not in run.artifacts.names:
        return None
    return tensors.load(run.artifacts.url("parameters"), FittedParameters).values


def solve_forward(
    run: Run, corpus: Dataset, targets: list[TargetFeatures], clean: dict[str, Dataset], heads: Solved
) -> dict[str, dict[str, Any]]:
    """Solve for the direction of every target that has none yet. Returns the facts of each.

    Args:
        run: the run.
        corpus: the curvature is taken over a sample of it.
        targets: how each target's pairs fall into batches.
        clean: the dataset of each target.
        heads: the results of `solve`. Their damping is taken if none is configured.

    Raises:
        RunError: a target's loss does not depend on the chosen parameters.
    """
    urls = {target.name: run.artifacts.url(f"forward_directions/{target.name}") for target in targets}
    missing = [target for target in targets if not storage.exists(urls[target.name])]
    if missing:
        dampings = [run.config.scoring.damping or heads.directions[t.name].calibration.damping for t in missing]
        try:
            for target, found in zip(missing, _solve(run, corpus, missing, clean, dampings), strict=True):
                tensors.save(urls[target.name], found)
        except ValueError as error:
            raise RunError(f"scoring.parameters: {error}") from None
    return {name: tensors.load(url, ForwardDirection).facts() for name, url in urls.items()}


def _solve(
    run: Run, corpus: Dataset, targets: list[TargetFeatures], clean: dict[str, Dataset], dampings: list[float]
) -> list[ForwardDirection]:
    settings, sample, fitted = run.config.scoring, sample_batches(corpus, run.config), read_fitted(run)
    pairs = sum(len(batch.uid) for batch in sample)
    share = pairs / sum(a.embedded for a in corpus.accounting().values())
    with Stage("forward solve", len(targets) * (1 + LANCZOS_STEPS + settings.iterations)) as progress:
        # The gradients come before the actors start: both need the CPUs.
        gradients = torch.from_numpy(np.stack([_gradient_of(run, fitted, t, clean[t.name], progress) for t in targets]))
        with SliceActors(_Slices, (fitted, corpus.reading, run.config), sample, run.resources) as pool:

            def product(vectors: Tensor) -> Tensor:
                """H vectors, [k, P] -> [k, P], summed over the slices in their order."""
                shared = ray.put(vectors.numpy())
                total = np.zeros(vectors.shape, np.float32)
                for part in pool.each("products", shared):
                    total += part
                progress.advance(1)
                return torch.from_numpy(total)

            found = []
            for gradient, damping in zip(gradients, dampings, strict=True):  # one by one: no answer depends on another
                top = largest_eigenvalue(product, gradient[None], LANCZOS_STEPS)
                solution = conjugate_gradient(
                    product, gradient[None], damping * top, tolerance=settings.tolerance, max_iterations=settings.iterations
                )
                direction = solution.directions[0] * share  # H of the corpus is about H of the sample / share
                residual = solution.residual.item()
                found.append(ForwardDirection(direction, damping, top.item(), residual, solution.iterations, pairs))
    return found


def _gradient_of(run: Run, fitted: list[Tensor] | None, target: TargetFeatures, dataset: Dataset, progress: Stage) -> Any:
    """[P] gradient of a target's summed loss, float32."""
    done = dataset.accounting()
    members = [accepted(dataset, shard, done[shard.name].parts) for shard in dataset.shards if done[shard.name].embedded]
    rows = [batch.numpy() for batch in target.question(run.config).batches]
    task: Any = ray.remote(**run.resources.actor, max_retries=2)(_gradient)
    found = ray.get(task.remote(fitted, members, dataset.reading, rows, run.config))
    progress.advance(1)
    return found


def _gradient(fitted: list[Tensor] | None, members: list[Members], reading: Reading, rows: list[Any], config: Config) -> Any:
    model = ForwardModel(config, fitted)
    shards = model.read(members, reading)
    pixels, captions = np.concatenate([s.pixels for s in shards]), [text for s in shards for text in s.captions]
    batches = [Decoded(pixels[r], [captions[i] for i in r]) for r in rows]
    return loss_gradient(model.logits, model.parameters, Batches(model, batches)).cpu().numpy()


class _Slices:
    """Actor: some slices of the sample, decoded once and kept as uint8."""

    def __init__(self, fitted: list[Tensor] | None, reading: Reading, config: Config, slices: list[list[Members]]):
        self.model = ForwardModel(config, fitted)
        self.slices = [self.model.read(batches, reading) for batches in slices]

    def products(self, at: int, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """Gauss-Newton products [k, P] of one slice."""
        model = self.model
        batches = (model.batch(decoded) for decoded in self.slices[at])
        moves = torch.tensor(vectors).to(model.device)
        return gauss_newton_product(model.logits, model.parameters, batches, moves).cpu().numpy()
