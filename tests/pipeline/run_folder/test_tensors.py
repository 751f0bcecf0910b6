"""Named tuples of tensors come back as they were, and equal ones are equal bytes."""

from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load as load_tensors
from torch import Tensor

from ecif.heads import Heads
from ecif.heads.cross_fit import FittedHeads
from ecif.projected.projection import Projection, random_projection
from pipeline import storage
from pipeline.run_folder import tensors


class Inner(NamedTuple):
    weights: Tensor
    rate: float


class Outer(NamedTuple):
    values: Tensor
    inner: Inner
    many: list[Inner]
    nested: list[list[Tensor]]
    size: int
    name: str
    on: bool
    rank: tuple[int, int] | list[int]
    nothing: float | None
    numbers: list[float]
    facts: dict[str, Any]
    empty: list[Inner]


def make(seed: int = 0) -> Outer:
    g = torch.Generator().manual_seed(seed)
    inner = [Inner(torch.randn(3, generator=g), i / 7) for i in range(12)]  # more than nine: names do not sort like numbers
    nested = [[torch.tensor(10 * i + j) for j in range(2)] for i in range(3)]
    facts = {"filter": {"keep": 0.8, "tried": [1, 2]}, "lds": None}
    values = torch.randn(4, 2, generator=g, dtype=torch.float64)
    return Outer(values, inner[0], inner, nested, 7, "a é", True, [16, 8], None, [0.1, 1e-30], facts, [])


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.fixture
def url(tmp_path) -> str:
    return str(tmp_path / "folder" / "object.safetensors")


def test_what_is_saved_is_loaded(url):
    value = make()
    tensors.save(url, value)
    found = tensors.load(url, Outer)
    assert same(found, value)
    assert isinstance(found.many[11], Inner)


def test_heads_of_a_fit_come_back_with_their_switches(url):
    heads = [Heads(torch.randn(5, 3), torch.randn(4, 3), 20.0 + i, train_logit_scale=i == 1) for i in range(5)]
    fitted = FittedHeads(heads[:1], [heads[1:3], heads[3:]])
    tensors.save(url, fitted)
    assert same(tensors.load(url, FittedHeads), fitted)


def test_a_projection_is_the_same_after_it_was_stored(url):
    heads = Heads(torch.randn(5, 3), torch.randn(4, 3), 2.0)
    projection = random_projection(heads, (3, 2), (4, 3), seed=0)
    tensors.save(url, projection)
    assert same(tensors.load(url, Projection), projection)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.int16, torch.int64, torch.bool])
def test_every_dtype_keeps_its_values(url, dtype):
    values = torch.arange(6).view(2, 3).to(dtype)
    tensors.save(url, Inner(values, 0.0))
    assert same(tensors.load(url, Inner).weights, values)


def test_views_of_one_tensor_are_saved_each_by_itself(url):
    whole = torch.arange(12.0).view(3, 4)
    nested = [[whole[0], whole[:, 1]], [whole.T]]
    tensors.save(url, make()._replace(nested=nested))
    assert same(tensors.load(url, Outer).nested, nested)


def test_the_same_value_gives_the_same_bytes(tmp_path):
    urls = [str(tmp_path / name) for name in "abc"]
    for url, seed in zip(urls, (0, 0, 1), strict=True):
        tensors.save(url, make(seed))
    one, two, other = map(storage.read_bytes, urls)
    assert one == two != other


def test_bytes_do_not_depend_on_the_order_of_a_dictionary(tmp_path):
    urls = [str(tmp_path / name) for name in "ab"]
    for url, names in zip(urls, ("abc", "cab"), strict=True):
        tensors.save(url, make()._replace(facts=dict.fromkeys(names, 1)))
    assert storage.read_bytes(urls[0]) == storage.read_bytes(urls[1])


def test_any_tool_can_read_the_tensors_by_the_names_of_their_fields(url):
    tensors.save(url, make())
    data = storage.read_bytes(url)
    found = load_tensors(data)
    assert torch.equal(found["many.11.weights"], make().many[11].weights)
    by_name, facts = tensors.parse(data)
    assert by_name.keys() == found.keys()
    assert (facts["size"], facts["many.3.rate"], facts["many.length"]) == (7, 3 / 7, 12)


def test_an_object_is_made_once(url):
    made = []

    def make_inner() -> Inner:
        made.append(1)
        return Inner(torch.tensor([float(len(made))]), 0.5)

    first, second = (tensors.once(url, Inner, make_inner) for _ in range(2))
    assert len(made) == 1
    assert same(first, second)
    assert same(tensors.load(url, Inner), first)


def test_a_thing_that_can_not_be_made_leaves_nothing(url):
    def fail() -> Inner:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        tensors.once(url, Inner, fail)
    assert not storage.exists(url)
    with pytest.raises(FileNotFoundError):
        tensors.load(url, Inner)
