"""Forward mode through open_clip models of every kind of tower."""

import copy

import pytest
import torch
from open_clip.model import CLIP, CustomTextCLIP
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from ecif import towers
from ecif.forward.mode import choose_parameters, clip_logits, flatten, gauss_newton_product, loss_gradient, scores, split
from ecif.heads import Heads, embed
from ecif.heads.curvature import gauss_newton_product as heads_product
from ecif.heads.influence import score as heads_score
from ecif.losses import Clip
from ecif.solve import conjugate_gradient
from tests.support.perceptrons import explicit_gauss_newton, randn, slow_pair, slow_pair_gradients
from tests.support.small_models import TINY

SMALL = TINY | {"text_cfg": TINY["text_cfg"] | {"vocab_size": 90, "layers": 2}}
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "head_width": 32}
TIMM = {"timm_model_name": "tf_efficientnet_lite0", "timm_model_pretrained": False, "timm_pool": "", "image_size": 32}
VARIANTS = {
    "ViT": (CLIP, SMALL),
    "SigLIP's bias": (CLIP, SMALL | {"init_logit_bias": -3.0}),
    "ResNet with BatchNorm and attention pool": (CLIP, SMALL | {"vision_cfg": RESNET}),
    "timm tower with BatchNorm, custom text": (CustomTextCLIP, SMALL | {"vision_cfg": TIMM | {"timm_proj": "linear"}}),
}


def clip(variant="ViT"):
    torch.manual_seed(0)
    kind, config = VARIANTS[variant]
    return kind(**copy.deepcopy(config)).double()


def clip_batch(pairs, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(pairs, 3, 32, 32, generator=g, dtype=torch.float64), torch.randint(1, 89, (pairs, 12), generator=g)


def test_projection_through_a_whole_clip_is_every_pairs_gradient_dotted_with_the_direction():
    model, batch = clip(), clip_batch(5)
    function, parameters = clip_logits(model), choose_parameters(model, ["*"])
    assert {"visual.class_embedding", "visual.positional_embedding", "logit_scale"} <= set(parameters)
    assert "transformer.resblocks.0.attn.in_proj_weight" in parameters
    directions = randn(2, flatten(parameters).numel())
    for kind in ("exact", "taylor"):
        for ours, gradients in zip(
            scores(function, parameters, batch, directions, Clip(kind)),
            slow_pair_gradients(function, parameters, batch, kind),
            strict=True,
        ):
            assert torch.allclose(ours, directions @ gradients.T, rtol=1e-8)


@pytest.mark.parametrize("variant", VARIANTS)
def test_derivatives_of_any_tower_against_finite_differences_and_nothing_in_the_model_moves(variant):
    model, batch, step = clip(variant).train(), clip_batch(4), 1e-7
    with torch.no_grad():
        for p in model.parameters():  # away from zero biases, which put whole channels on the kink of a ReLU
            p += 0.02 * randn(*p.shape)
    before = copy.deepcopy(model.state_dict())
    function, parameters = clip_logits(model), choose_parameters(model, ["*"])
    direction = 0.1 * randn(1, flatten(parameters).numel())

    def moved(t):
        s = function(split(parameters, flatten(parameters) + t * direction[0]), batch)
        return [torch.stack(part) for part in zip(*(slow_pair(s, n, "exact") for n in range(4)), strict=True)]

    with torch.no_grad():
        slopes = [(up - down) / (2 * step) for up, down in zip(moved(step), moved(-step), strict=True)]
    for ours, slope in zip(scores(function, parameters, batch, direction), slopes, strict=True):
        assert torch.allclose(ours[0], slope, rtol=1e-4, atol=1e-5 * slope.abs().max())
    gauss_newton_product(function, parameters, [batch], direction)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_the_logits_are_the_models_own_whatever_is_chosen():
    model, batch = clip("SigLIP's bias"), clip_batch(4)
    v, u, scale, bias = model.eval()(*batch)
    for patterns in (["*"], ["visual.*"], ["logit_bias"]):
        assert torch.allclose(clip_logits(model)(choose_parameters(model, patterns), batch), scale * u @ v.T + bias)


def test_gauss_newton_of_a_whole_clip_is_symmetric_and_positive():
    model, batches = clip(), [clip_batch(5), clip_batch(3, seed=4)]
    function, parameters = clip_logits(model), choose_parameters(model, ["*"])
    directions = randn(3, flatten(parameters).numel())
    form = gauss_newton_product(function, parameters, batches, directions) @ directions.T
    assert torch.allclose(form, form.T, rtol=1e-9)
    assert torch.linalg.eigvalsh(form).min() > 0
    parts = [gauss_newton_product(function, parameters, [b], directions) @ directions.T for b in batches]
    assert torch.allclose(form, sum(parts))


@pytest.mark.parametrize("chunk", [1, 2, 7])
def test_a_batch_that_goes_through_the_towers_in_pieces_gives_the_same(chunk):
    model, batch = clip(), clip_batch(7)
    parameters = choose_parameters(model, ["*"])
    whole, pieces = clip_logits(model), clip_logits(model, chunk)
    directions = 0.1 * randn(2, flatten(parameters).numel())
    for a, b in zip(scores(whole, parameters, batch, directions), scores(pieces, parameters, batch, directions), strict=True):
        assert torch.allclose(a, b)
    assert torch.allclose(loss_gradient(whole, parameters, [batch]), loss_gradient(pieces, parameters, [batch]))
    products = (gauss_newton_product(f, parameters, [batch], directions) for f in (whole, pieces))
    assert torch.allclose(*products)


def test_gauss_newton_of_part_of_a_clip_against_the_explicit_matrix():
    model, batches = clip(), [clip_batch(4), clip_batch(3, seed=4)]
    patterns = [
        "logit_scale",
        "visual.class_embedding",
        "visual.transformer.resblocks.0.ln_1.*",
        "*resblocks.1.attn.in_proj_bias",
    ]
    function, parameters = clip_logits(model), choose_parameters(model, patterns)
    matrix = explicit_gauss_newton(function, parameters, batches)
    directions = randn(4, len(matrix))
    assert torch.allclose(gauss_newton_product(function, parameters, batches, directions), directions @ matrix)


def test_with_only_the_projections_chosen_it_is_the_closed_form_of_the_heads(tiny_model):
    whole = towers.load(tiny_model)
    tokens = whole.tokenizer([f"picture number {i}" for i in range(6)])
    pixels = torch.randint(0, 256, (6, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    features = whole.image_features(pixels).double(), whole.text_features([f"picture number {i}" for i in range(6)]).double()
    model = CLIP(**copy.deepcopy(TINY))
    model.load_state_dict(load_weights(tiny_model))
    heads = Heads(model.visual.proj.detach().double(), model.text_projection.detach().double(), whole.heads.logit_scale)
    pairs = embed(heads, *features)

    function, parameters = clip_logits(model.double()), choose_parameters(model, ["visual.proj", "text_projection"])
    batch = ((pixels.double() / 255 - 0.5) / 0.5, tokens)
    directions = randn(2, heads.size)  # image head first, as the closed forms have it
    image, text = directions.split([heads.image.numel(), heads.text.numel()], dim=1)
    assert list(parameters) == ["text_projection", "visual.proj"]
    swapped = torch.cat([text, image], dim=1)

    closed = heads_score(heads, pairs, [torch.arange(6)], directions)
    positive, negative = scores(function, parameters, batch, swapped)
    assert torch.allclose(positive, closed.positive, rtol=1e-4, atol=1e-5)
    assert torch.allclose(negative, closed.negative, rtol=1e-4, atol=1e-5)
    text, image = gauss_newton_product(function, parameters, [batch], swapped).split([text.shape[1], image.shape[1]], dim=1)
    truth = heads_product(heads, pairs, [torch.arange(len(pairs.u))], directions)
    assert (torch.cat([image, text], dim=1) - truth).norm() < 1e-4 * truth.norm()


def load_weights(name):
    return load_file(f"{name.removeprefix('local-dir:')}/open_clip_model.safetensors")


def test_single_precision_stays_close():
    model, (pixels, tokens) = clip(), clip_batch(5)
    direction = randn(1, flatten(choose_parameters(model, ["*"])).numel())
    truth = scores(clip_logits(model), choose_parameters(model, ["*"]), (pixels, tokens), direction)
    model = model.float()
    single = scores(clip_logits(model), choose_parameters(model, ["*"]), (pixels.float(), tokens), direction.float())
    for a, b in zip(single, truth, strict=True):
        assert (a - b).abs().max() < 1e-4 * b.abs().max()


class LowRank(nn.Module):
    def __init__(self, weight, rank):
        super().__init__()
        self.lora_a = nn.Parameter(0.1 * randn(rank, weight.shape[1]))
        self.lora_b = nn.Parameter(0.1 * randn(weight.shape[0], rank, seed=3))

    def forward(self, weight):
        return weight + self.lora_b @ self.lora_a


def test_lora_adapters_move_the_weights_they_adapt():
    model, batch = clip(), clip_batch(5)
    layer = model.visual.transformer.resblocks[0].mlp.c_fc
    register_parametrization(layer, "weight", LowRank(layer.weight, 2))
    function, adapters = clip_logits(model), choose_parameters(model, ["*lora*"])
    assert [tuple(p.shape) for p in adapters.values()] == [(2, 64), (256, 2)]
    direction = randn(1, flatten(adapters).numel())
    a, b = adapters.values()
    da, db = split(adapters, direction[0]).values()
    weight = choose_parameters(model, ["visual.transformer.resblocks.0.mlp.c_fc.*.original"])
    through_the_weight = scores(function, weight, batch, (db @ a + b @ da).reshape(1, -1))
    for ours, truth in zip(scores(function, adapters, batch, direction), through_the_weight, strict=True):
        assert torch.allclose(ours, truth)
    solution = conjugate_gradient(
        lambda v: gauss_newton_product(function, adapters, [batch], v), loss_gradient(function, adapters, [batch])[None], 1.0
    )
    assert (solution.residual <= 1e-3).all()


def test_names_choose_parameters_in_the_models_order_and_a_pattern_without_any_is_an_error():
    model = clip()
    last = choose_parameters(model, ["visual.transformer.resblocks.0.*", "transformer.resblocks.1.*"])
    assert all("resblocks" in name for name in last)
    order = [name for name, _ in model.named_parameters()]
    assert list(choose_parameters(model, ["visual.*", "logit_scale"])) == [
        n for n in order if n.startswith("visual.") or n == "logit_scale"
    ]
    assert set(choose_parameters(model, ["*"])) == set(order)
    assert choose_parameters(model, ["visual.proj"])["visual.proj"].data_ptr() == model.visual.proj.data_ptr()
    with pytest.raises(ValueError, match=r"no parameter matches 'visual.transformer.resblocks.7"):
        choose_parameters(model, ["*", "visual.transformer.resblocks.7.*"])
    with pytest.raises(ValueError, match="at least one pattern"):
        choose_parameters(model, [])
    model.quantised = nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="parameter quantised is int8"):
        choose_parameters(model, ["*"])
