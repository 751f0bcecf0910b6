"""Score pairs whose features you already have: tensors in, columns out, without Ray and without files.

    python docs/examples/attribute_features.py

The features here are made up: 400 pairs of 50 concepts. One caption in ten belongs to another image. With your own data,
`images` and `texts` are the unit-norm outputs of the model's two trunks, before the final projections. `heads` are those
projections: `ecif.load("ViT-B-32", "/models/vit_b_32.safetensors", "laion2b_s34b_b79k").heads`.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

import ecif
from ecif.evaluation import auroc

CONCEPTS, D_IMAGE, D_TEXT, WIDTH = 50, 48, 32, 24


class World:
    """Concepts, and how they look in the features of images and captions."""

    def __init__(self, seed: int):
        self.random = torch.Generator().manual_seed(seed)
        self.concepts = self.normal(CONCEPTS, 16)
        self.to_image, self.to_text = self.normal(16, D_IMAGE), self.normal(16, D_TEXT)

    def normal(self, *shape: int) -> Tensor:
        """Normal random numbers."""
        return torch.randn(*shape, generator=self.random)

    def pairs(self, count: int) -> tuple[Tensor, Tensor]:
        """Unit features [count, D_IMAGE] and [count, D_TEXT]; row n of both shows one concept."""
        shown = self.concepts[torch.randint(CONCEPTS, (count,), generator=self.random)]
        images = shown @ self.to_image + self.normal(count, D_IMAGE)
        texts = shown @ self.to_text + self.normal(count, D_TEXT)
        return normalize(images, dim=1), normalize(texts, dim=1)


def main() -> dict[str, float]:
    """Print how well each column finds the wrong captions; returns the AUROC of each."""
    world = World(seed=0)
    images, texts = world.pairs(400)
    wrong = torch.zeros(400, dtype=torch.bool)
    wrong[:40] = True
    texts[:40] = texts[:40].roll(1, 0)  # each of the first 40 images gets the caption of another one
    clean = ecif.Contrastive(*world.pairs(200))  # the target: pairs that the model should be good at
    heads = ecif.Heads(world.normal(D_IMAGE, WIDTH), world.normal(D_TEXT, WIDTH), logit_scale=10.0)

    few = {"folds": 3, "checkpoints": 1, "refits": 8, "repeats": 1}  # fast
    settings = ecif.Settings(batch_size=100, columns=["gsc"], **few)
    columns = ecif.attribute(images, texts, {"clean": clean}, heads=heads, settings=settings)

    low_is_good = {"held_out_loss", "misalignment"}
    found = {}
    for name, values in columns.items():
        found[name] = auroc(values if name in low_is_good else -values, wrong)
        print(f"{name:26} AUROC {found[name]:.3f}   first pairs {[round(value, 3) for value in values[:3].tolist()]}")
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)  # with matrices as small as these, more threads only wait for each other
    main()
