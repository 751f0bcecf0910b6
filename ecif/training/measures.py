"""How good a trained model is on pairs that it never saw."""

from typing import Any

import torch
from torch import Tensor

from ecif.evaluation import loss_at_best_temperature
from ecif.training.augment import normalised
from ecif.training.train import Images

AT_ONCE = 256  # pairs in the model
RECALLS = (1, 5)


@torch.no_grad()
def measure(model: Any, test: Images) -> dict[str, float]:
    """Measure a model on a test set, as one batch. The model is left in evaluation mode.

    Args:
        model: as `build` makes it, on any device.
        test: N pairs.

    Returns:
        `loss`: contrastive loss at the best temperature, nats. `image_to_text_r1`, `image_to_text_r5`, `text_to_image_r1`,
        `text_to_image_r5`: retrieval recall, 0 to 1; a candidate with the caption of the pair is no wrong answer.
        `zero_shot`: the share of the images that are nearest to their own among the distinct captions; only if some
        caption is there more than once, for else it is `image_to_text_r1`.
    """
    model.eval()
    device = next(model.parameters()).device
    rows = torch.arange(len(test.tokens)).split(AT_ONCE)
    v = torch.cat([model.encode_image(normalised(test.unit(at, device)), normalize=True).cpu() for at in rows])
    u = torch.cat([model.encode_text(test.tokens[at].to(device).long(), normalize=True).cpu() for at in rows])
    distinct, caption = test.tokens.unique(dim=0, return_inverse=True)
    similarity = model.logit_scale.exp().cpu() * u @ v.T
    found = {"loss": loss_at_best_temperature(similarity)}
    for name, matrix in (("image_to_text", similarity.T), ("text_to_image", similarity)):
        found |= {f"{name}_r{k}": recall(matrix, caption, k) for k in RECALLS}
    if len(distinct) < len(caption):
        first = torch.stack([(caption == i).nonzero()[0, 0] for i in range(len(distinct))])
        found["zero_shot"] = (similarity[first].argmax(0) == caption).double().mean().item()
    return found


def recall(similarity: Tensor, caption: Tensor, k: int) -> float:
    """R@k of searches with the rows of a matrix.

    Args:
        similarity: [N, N] of query n and candidate m.
        caption: [N] int, equal where two pairs have the same caption. Such a candidate is no wrong answer.
        k: how many candidates are looked at.

    Returns:
        0 to 1. A partner with the same similarity as a wrong candidate is ranked behind it.
    """
    wrong = caption[:, None] != caption
    return ((wrong & (similarity >= similarity.diagonal()[:, None])).sum(1) < k).double().mean().item()
