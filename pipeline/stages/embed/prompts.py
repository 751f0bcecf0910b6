"""The prompts of a zero-shot target: read from its two text files, embedded once by the model's text tower."""

from typing import Any, Literal, NamedTuple

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor

from ecif.towers.precision import Precision, computed_in, prepare
from pipeline import storage
from pipeline.errors import RunError, UserError
from pipeline.run_folder import tensors
from pipeline.run_folder.dataset import Dataset
from pipeline.sections import Embed, Model, Target
from pipeline.stages.embed.forward import FORWARD_BATCH
from pipeline.workers.cluster import Resources, device
from pipeline.workers.model import load

TEMPLATE = "a photo of a {c}."


class PromptFeatures(NamedTuple):
    """The features of a target's prompts, as they are stored."""

    text_features: Tensor  # [C, M, d_t] float16


def read_prompts(target: Target, what: str) -> list[list[str]]:
    """The filled templates of each class, in the order of the files. Empty for a target whose kind reads captions.

    Raises:
        UserError: a file can't be read or has an empty line, there are fewer than two classes, or a template has no place for
            the class.
    """
    files = target.prompts
    if files is None:
        return []
    classes = _lines(files.classes, f"{what}.classes")
    if len(classes) < 2:
        raise UserError(f"{what}.classes: {files.classes} names {len(classes)} classes, there is nothing to tell apart")
    templates = [TEMPLATE] if files.templates is None else _lines(files.templates, f"{what}.templates")
    for i, template in enumerate(templates):
        if "{c}" not in template and "{}" not in template:
            raise UserError(f"{what}.templates: line {i + 1} of {files.templates} has no {{c}}: {template[:80]!r}")
    return [[template.replace("{c}", name).replace("{}", name) for template in templates] for name in classes]


def embed_prompts(datasets: list[Dataset], model: Model, limits: Embed, resources: Resources) -> None:
    """Embed the prompts of every dataset that has some and no features of them yet, in the precision of all features.

    Raises:
        RunError: the model gave NaN or infinity.
    """
    todo = [dataset for dataset in datasets if dataset.prompts and not storage.exists(dataset.prompts_url())]
    embed: Any = ray.remote(**resources.actor, max_retries=2, max_calls=0)(_embed)
    pending = [
        embed.remote(model, limits.precision, [p for templates in dataset.prompts for p in templates]) for dataset in todo
    ]
    for dataset, features in zip(todo, ray.get(pending), strict=True):
        if not np.isfinite(features).all():
            raise RunError(f"{dataset.folder}: the model gave NaN or infinity for a prompt")
        shaped = torch.tensor(features).view(len(dataset.prompts), len(dataset.prompts[0]), -1)
        tensors.save(dataset.prompts_url(), PromptFeatures(shaped))


def read_prompt_features(dataset: Dataset) -> NDArray[np.float16]:
    """[C, M, d_t] unit-norm trunk features of M templates for each of C classes; FileNotFoundError if not embedded yet."""
    return tensors.load(dataset.prompts_url(), PromptFeatures).text_features.numpy()


def _embed(model: Model, precision: Precision | Literal["auto"], prompts: list[str]) -> NDArray[np.float16]:
    to = device()
    tower = load(model)
    size = FORWARD_BATCH[to.type]
    with computed_in(prepare(tower, precision, to), to):
        parts = [tower.text_features(prompts[i : i + size]).half().cpu() for i in range(0, len(prompts), size)]
    return torch.cat(parts).numpy()


def _lines(url: str, what: str) -> list[str]:
    """The lines of a text file. The number of a line is the number of its class, so an empty line is an error."""
    try:
        lines = [line.strip() for line in storage.read_bytes(url).decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise UserError(f"{what}: {url} is not UTF-8") from None
    except Exception as error:  # noqa: BLE001  (each store has errors of its own)
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"{type(error).__name__}: {error}"
        raise UserError(f"{what}: can't read {url}: {' '.join(reason.split())[:300]}") from None
    while lines and not lines[-1]:
        lines.pop()
    if "" in lines:
        raise UserError(f"{what}: line {lines.index('') + 1} of {url} is empty")
    if not lines:
        raise UserError(f"{what}: {url} is empty")
    return lines
