import copy
import time

import pytest
import torch
from open_clip.model import CLIP, CustomTextCLIP
from scipy.stats import spearmanr
from torch import nn
from torch.func import grad, hessian, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.flop_counter import FlopCounterMode

from ecif import towers
from ecif.forward.mode import (
    Logits,
    choose,
    clip_logits,
    flatten,
    gauss_newton_product,
    largest_eigenvalue,
    loss_gradient,
    scores,
    solve,
    split,
)
from ecif.heads import Heads, embed
from ecif.heads.curvature import gauss_newton_product as heads_product
from ecif.heads.influence import score as heads_score
from ecif.losses import Clip, Dcl, SigLip, SoftInfoNCE
from ecif.losses.contrastive import batch_loss
from ecif.solve import krylov
from tests.ecif import test_leave_one_out as convex
from tests.support.problems import slow_loss, without
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


def randn(*shape, seed=2):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def two_layers(parameters, batch):
    v = torch.tanh(batch[0] @ parameters["image_in"]) @ parameters["image_out"]
    u = torch.tanh(batch[1] @ parameters["text_in"]) @ parameters["text_out"]
    return u / u.norm(dim=1, keepdim=True), v / v.norm(dim=1, keepdim=True)


# Two towers of two layers: a problem whose matrices can be written out.
perceptrons = Logits(two_layers, lambda parameters, u, v: parameters["logit_scale"].exp() * u @ v.T)

SHAPES = {"image_in": (5, 4), "image_out": (4, 3), "logit_scale": (), "text_in": (6, 4), "text_out": (4, 3)}
PERCEPTRONS = {name: randn(*shape, seed=i) for i, (name, shape) in enumerate(SHAPES.items())}
LATENT = randn(30, 3, seed=20)
IMAGES, TEXTS = LATENT @ randn(3, 5, seed=21), LATENT @ randn(3, 6, seed=22) + 0.5 * randn(30, 6, seed=23)
BATCHES = [(IMAGES[rows], TEXTS[rows]) for rows in torch.arange(18).split(6)]
TARGETS = [[(IMAGES[18:24], TEXTS[18:24])], [(IMAGES[24:], TEXTS[24:]), (IMAGES[18:22], TEXTS[18:22])]]


def of(function, parameters, batch):
    """The logits as a function of one flat vector, for autograd."""
    return lambda w: function(split(parameters, w), batch)


def slow_pair(s, n, kind):
    """(Pos_n, Neg_n) from the definition."""
    positive = s[n].logsumexp(0) + s[:, n].logsumexp(0) - 2 * s[n, n]
    others = torch.arange(len(s)) != n
    taylor = s.softmax(1)[others, n].sum() + s.softmax(0)[n, others].sum()
    return positive, taylor if kind == "taylor" else batch_loss(s) - batch_loss(without(s, n)) - positive


def pair_gradients(function, parameters, batch, kind):
    """Every pair's two gradients [B, P] by an autograd loop."""
    w = flatten(parameters).requires_grad_()
    s = of(function, parameters, batch)(w)
    parts = [slow_pair(s, n, kind) for n in range(len(s))]
    return [torch.stack([torch.autograd.grad(p, w, retain_graph=True)[0] for p in part]) for part in zip(*parts, strict=True)]


def explicit_gauss_newton(function, parameters, batches):
    total = 0
    for batch in batches:
        f = of(function, parameters, batch)
        s = f(flatten(parameters))
        with sdpa_kernel(SDPBackend.MATH):
            jacobian = jacrev(f)(flatten(parameters)).reshape(s.numel(), -1)
        total = total + jacobian.T @ hessian(slow_loss)(s).reshape(s.numel(), s.numel()) @ jacobian
    return total


def product(directions):
    return gauss_newton_product(perceptrons, PERCEPTRONS, BATCHES, directions)


def target_gradients():
    return torch.stack([loss_gradient(perceptrons, PERCEPTRONS, target) for target in TARGETS])


# The method, against matrices written out


@pytest.mark.parametrize("kind", ["exact", "taylor"])
def test_influence_is_every_pairs_gradient_through_the_explicit_inverse_curvature(kind):
    matrix = explicit_gauss_newton(perceptrons, PERCEPTRONS, BATCHES)
    solution = solve(product, target_gradients(), damping=0.5, tolerance=1e-10, max_iterations=500)
    losses = [lambda w, t=t: sum(slow_loss(of(perceptrons, PERCEPTRONS, b)(w)) for b in t) for t in TARGETS]
    truth = torch.stack([grad(loss)(flatten(PERCEPTRONS)) for loss in losses])
    inverse = torch.linalg.inv(matrix + 0.5 * torch.eye(len(matrix), dtype=torch.float64))
    for batch in BATCHES:
        for ours, gradients in zip(
            scores(perceptrons, PERCEPTRONS, batch, solution.directions, Clip(kind)),
            pair_gradients(perceptrons, PERCEPTRONS, batch, kind),
            strict=True,
        ):
            assert torch.allclose(ours, truth @ inverse @ gradients.T, rtol=1e-7)


def test_gradient_and_gauss_newton_products_against_the_explicit_ones():
    matrix = explicit_gauss_newton(perceptrons, PERCEPTRONS, BATCHES)
    assert torch.allclose(product(torch.eye(len(matrix), dtype=torch.float64)), matrix)
    truth = grad(lambda w: sum(slow_loss(of(perceptrons, PERCEPTRONS, b)(w)) for b in BATCHES))(flatten(PERCEPTRONS))
    assert torch.allclose(loss_gradient(perceptrons, PERCEPTRONS, BATCHES), truth)


def test_influence_predicts_what_training_again_without_the_pair_does():
    bilinear = Logits(lambda parameters, batch: (batch[1] @ parameters["w"], batch[0]), lambda parameters, u, v: u @ v.T)
    pairs = lambda rows: (convex.IMAGES[rows], convex.TEXTS[rows])  # noqa: E731
    sample = [pairs(rows) for rows in convex.BATCHES]
    w = convex.train(convex.BATCHES, torch.zeros(convex.D_TEXT * convex.D_IMAGE, dtype=torch.float64))
    parameters = {"w": w.view(convex.D_TEXT, convex.D_IMAGE)}
    gradient = loss_gradient(bilinear, parameters, [pairs(convex.CLEAN)])[None]
    solution = solve(lambda v: gauss_newton_product(bilinear, parameters, sample, v), gradient, convex.DAMPING)
    before, predicted, truth = batch_loss(convex.logits(w, convex.CLEAN)), [], []
    for i, rows in enumerate(convex.BATCHES):
        positive, negative = scores(bilinear, parameters, pairs(rows), solution.directions)
        predicted.append((positive + negative)[0])
        for n in range(len(rows)):
            less = [*convex.BATCHES[:i], rows[torch.arange(len(rows)) != n], *convex.BATCHES[i + 1 :]]
            truth.append(batch_loss(convex.logits(convex.train(less, w), convex.CLEAN)) - before)
    predicted, truth = torch.cat(predicted), torch.stack(truth)
    assert spearmanr(predicted, truth)[0] > 0.85
    clear = truth.abs() > 0.2 * truth.abs().max()
    assert clear.sum() > 5
    assert (predicted.sign() == truth.sign())[clear].double().mean() >= 0.9


# The solver


def test_it_stops_at_the_stated_residual_and_says_how_far_it_came():
    gradients = target_gradients()
    for tolerance in (1e-1, 1e-4):
        solution = solve(product, gradients, 0.3, tolerance=tolerance)
        left = gradients - product(solution.directions) - 0.3 * solution.directions
        assert torch.allclose(solution.residual, left.norm(dim=1) / gradients.norm(dim=1), rtol=1e-6)
        assert (solution.residual <= tolerance).all()
    short = solve(product, gradients, 0.3, tolerance=1e-4, max_iterations=2)
    assert short.iterations == 2 < solution.iterations
    assert (short.residual > 1e-4).any()


def test_a_system_is_solved_alike_alone_and_beside_others_and_as_krylov_solves_it():
    gradients = torch.cat([target_gradients(), torch.eye(1, 69, dtype=torch.float64)])
    together = solve(product, gradients, 1.0, tolerance=1e-9)
    alone = torch.cat([solve(product, g[None], 1.0, tolerance=1e-9).directions for g in gradients])
    assert torch.allclose(together.directions, alone)
    others, _ = krylov(product, gradients, 69).solve(torch.ones(3))
    assert torch.allclose(together.directions, others, rtol=1e-6, atol=1e-9)


def test_wrong_calls_of_the_solver_are_errors():
    once = iter(BATCHES)
    with pytest.raises(ValueError, match="not a generator"):
        solve(lambda v: gauss_newton_product(perceptrons, PERCEPTRONS, once, v), target_gradients(), 1.0)
    with pytest.raises(ValueError, match="above 0"):
        solve(product, target_gradients(), 0.0)
    for bad in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="zero or not finite"):
            solve(product, target_gradients() * bad, 1.0)


def test_a_damping_of_each_systems_own():
    gradients = target_gradients()
    together = solve(product, gradients, torch.tensor([0.3, 30.0]), tolerance=1e-9)
    alone = [solve(product, g[None], d, tolerance=1e-9).directions for g, d in zip(gradients, (0.3, 30.0), strict=True)]
    assert torch.allclose(together.directions, torch.cat(alone))


def test_the_largest_eigenvalue_is_the_explicit_matrixs():
    top = torch.linalg.eigvalsh(explicit_gauss_newton(perceptrons, PERCEPTRONS, BATCHES))[-1]
    assert torch.allclose(largest_eigenvalue(product, target_gradients()), top, rtol=0.03)
    assert torch.allclose(largest_eigenvalue(product, target_gradients(), 60), top, rtol=1e-9)  # past exhaustion


# open_clip models


def test_projection_through_a_whole_clip_is_every_pairs_gradient_dotted_with_the_direction():
    model, batch = clip(), clip_batch(5)
    function, parameters = clip_logits(model), choose(model, ["*"])
    assert {"visual.class_embedding", "visual.positional_embedding", "logit_scale"} <= set(parameters)
    assert "transformer.resblocks.0.attn.in_proj_weight" in parameters
    directions = randn(2, flatten(parameters).numel())
    for kind in ("exact", "taylor"):
        for ours, gradients in zip(
            scores(function, parameters, batch, directions, Clip(kind)),
            pair_gradients(function, parameters, batch, kind),
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
    function, parameters = clip_logits(model), choose(model, ["*"])
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
        assert torch.allclose(clip_logits(model)(choose(model, patterns), batch), scale * u @ v.T + bias)


def test_gauss_newton_of_a_whole_clip_is_symmetric_and_positive():
    model, batches = clip(), [clip_batch(5), clip_batch(3, seed=4)]
    function, parameters = clip_logits(model), choose(model, ["*"])
    directions = randn(3, flatten(parameters).numel())
    form = gauss_newton_product(function, parameters, batches, directions) @ directions.T
    assert torch.allclose(form, form.T, rtol=1e-9)
    assert torch.linalg.eigvalsh(form).min() > 0
    parts = [gauss_newton_product(function, parameters, [b], directions) @ directions.T for b in batches]
    assert torch.allclose(form, sum(parts))


@pytest.mark.parametrize("chunk", [1, 2, 7])
def test_a_batch_that_goes_through_the_towers_in_pieces_gives_the_same(chunk):
    model, batch = clip(), clip_batch(7)
    parameters = choose(model, ["*"])
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
    function, parameters = clip_logits(model), choose(model, patterns)
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

    function, parameters = clip_logits(model.double()), choose(model, ["visual.proj", "text_projection"])
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
    truth = heads_product(heads, [pairs], directions)
    assert (torch.cat([image, text], dim=1) - truth).norm() < 1e-4 * truth.norm()


def load_weights(name):
    from safetensors.torch import load_file

    return load_file(f"{name.removeprefix('local-dir:')}/open_clip_model.safetensors")


def test_single_precision_stays_close():
    model, (pixels, tokens) = clip(), clip_batch(5)
    direction = randn(1, flatten(choose(model, ["*"])).numel())
    truth = scores(clip_logits(model), choose(model, ["*"]), (pixels, tokens), direction)
    model = model.float()
    single = scores(clip_logits(model), choose(model, ["*"]), (pixels.float(), tokens), direction.float())
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
    function, adapters = clip_logits(model), choose(model, ["*lora*"])
    assert [tuple(p.shape) for p in adapters.values()] == [(2, 64), (256, 2)]
    direction = randn(1, flatten(adapters).numel())
    a, b = adapters.values()
    da, db = split(adapters, direction[0]).values()
    weight = choose(model, ["visual.transformer.resblocks.0.mlp.c_fc.*.original"])
    through_the_weight = scores(function, weight, batch, (db @ a + b @ da).reshape(1, -1))
    for ours, truth in zip(scores(function, adapters, batch, direction), through_the_weight, strict=True):
        assert torch.allclose(ours, truth)
    solution = solve(
        lambda v: gauss_newton_product(function, adapters, [batch], v), loss_gradient(function, adapters, [batch])[None], 1.0
    )
    assert (solution.residual <= 1e-3).all()


def test_names_choose_parameters_in_the_models_order_and_a_pattern_without_any_is_an_error():
    model = clip()
    last = choose(model, ["visual.transformer.resblocks.0.*", "transformer.resblocks.1.*"])
    assert all("resblocks" in name for name in last)
    order = [name for name, _ in model.named_parameters()]
    assert list(choose(model, ["visual.*", "logit_scale"])) == [
        n for n in order if n.startswith("visual.") or n == "logit_scale"
    ]
    assert set(choose(model, ["*"])) == set(order)
    assert choose(model, ["visual.proj"])["visual.proj"].data_ptr() == model.visual.proj.data_ptr()
    with pytest.raises(ValueError, match=r"no parameter matches 'visual.transformer.resblocks.7"):
        choose(model, ["*", "visual.transformer.resblocks.7.*"])
    with pytest.raises(ValueError, match="at least one pattern"):
        choose(model, [])
    model.quantised = nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="parameter quantised is int8"):
        choose(model, ["*"])


# What it costs


def medium_clip():
    torch.manual_seed(0)
    vision = {"image_size": 64, "layers": 4, "width": 256, "patch_size": 8, "head_width": 64}
    text = {"context_length": 32, "vocab_size": 4000, "width": 192, "heads": 3, "layers": 4}
    model = CLIP(embed_dim=128, vision_cfg=vision, text_cfg=text)
    return model, (torch.randn(24, 3, 64, 64), torch.randint(1, 3999, (24, 32)))


LAST = ["visual.transformer.resblocks.3.*", "transformer.resblocks.3.*"]


def test_a_target_costs_three_forward_passes_of_multiply_adds_and_less_for_the_last_blocks():
    model, batch = medium_clip()
    function = clip_logits(model)

    def flops(call):
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops()

    def cost(patterns, targets):
        parameters = choose(model, patterns)
        directions = torch.randn(targets, flatten(parameters).numel())
        return flops(lambda: scores(function, parameters, batch, directions)) / targets

    with sdpa_kernel(SDPBackend.MATH):  # and gradients on: PyTorch does not count fused attention
        forward = flops(lambda: function({}, batch))
    assert cost(["*"], 1) == cost(["*"], 2) < 3.1 * forward
    assert cost(LAST, 1) < 1.6 * forward


@pytest.mark.slow
def test_measured_cost_in_forward_passes(capsys):
    model, batch = medium_clip()
    function = clip_logits(model)

    def seconds(call):
        times = []
        for _ in range(8):
            start = time.process_time()
            call()
            times.append(time.process_time() - start)
        return sorted(times[1:])[3]

    with torch.no_grad():
        forward = seconds(lambda: function({}, batch))
    for name, patterns in {"everything": ["*"], "last blocks": LAST}.items():
        parameters = choose(model, patterns)
        direction = 0.01 * torch.randn(1, flatten(parameters).numel())
        score = seconds(lambda p=parameters, d=direction: scores(function, p, batch, d)) / forward
        gradient = seconds(lambda p=parameters: loss_gradient(function, p, [batch])) / forward
        curved = seconds(lambda p=parameters, d=direction: gauss_newton_product(function, p, [batch], d)) / forward
        with capsys.disabled():
            print(f"\n{name}, in forward passes: score {score:.1f}, gradient {gradient:.1f}, product {curved:.1f}")
        assert score < 5


@pytest.mark.parametrize("loss", [SigLip(), Dcl(), SoftInfoNCE()])
def test_another_loss_against_explicit_gradients_and_matrix(loss):
    batch, w = BATCHES[0], flatten(PERCEPTRONS)
    f = of(perceptrons, PERCEPTRONS, batch)
    assert torch.allclose(loss_gradient(perceptrons, PERCEPTRONS, [batch], loss), grad(lambda v: loss.batch_loss(f(v)))(w))
    directions = randn(2, len(w), seed=30)
    jacobian, s = jacrev(f)(w).reshape(36, -1), f(w)
    curvature = jacrev(loss.cotangent)(s).reshape(36, 36)
    products = gauss_newton_product(perceptrons, PERCEPTRONS, [batch], directions, loss)
    assert torch.allclose(products, directions @ (jacobian.T @ curvature @ jacobian))
    parts = scores(perceptrons, PERCEPTRONS, batch, directions, loss)
    for part, function in zip(parts, (loss.pair_loss, loss.negative_loss), strict=True):
        gradients = jacrev(function)(s).reshape(6, 36) @ jacobian
        assert torch.allclose(part, directions @ gradients.T)
