"""Actors that are lost are replaced, change no answer, and leave their CPUs to the next stage."""

import gc
import os
import signal
import time

import pytest
import ray
import torch
from ray.exceptions import RayActorError

from ecif.slices import halves
from pipeline.workers.slices import MAX_REPLACEMENTS, UNEVEN, Block, SliceActors, blocks, joined


def pool(resources, folder, deaths: int) -> SliceActors:
    """Of actors that add a number; as many calls as `deaths` end their process."""

    class Adds:
        def __init__(self, slices):
            self.slices = slices

        def add(self, at, plus):
            for death in range(deaths):
                try:
                    (folder / str(death)).touch(exist_ok=False)
                except FileExistsError:
                    continue
                os.kill(os.getpid(), signal.SIGKILL)
            return [number + plus for number in self.slices[at]]

        def summed(self, first, count):
            self.add(first, 0)  # may die
            return halves(count, lambda at: torch.tensor(self.slices[first + at]).float().sin().sum()).numpy(), True

    return SliceActors(Adds, (), list(range(100)), resources._replace(workers=2))


def free_cpus() -> float:
    return ray.available_resources().get("CPU", 0.0)


@pytest.mark.parametrize("deaths", [0, 1, 3])
def test_answers_come_in_order_and_are_the_same_whoever_was_lost(local_ray, tmp_path, deaths):
    before = free_cpus()
    gc.disable()  # a collection would hide who is still held
    try:
        with pool(local_ray, tmp_path, deaths) as actors:
            assert [number for answer in actors.each("add", 1000) for number in answer] == list(range(1000, 1100))
            assert len(list(tmp_path.iterdir())) == deaths
        patience = time.monotonic() + 30
        while free_cpus() < before and time.monotonic() < patience:
            time.sleep(0.1)
        assert free_cpus() == before
    finally:
        gc.enable()


def test_terms_add_up_to_the_sum_by_halves(local_ray, tmp_path):
    with pool(local_ray, tmp_path, 0) as actors:
        terms = [torch.tensor(one).float().sin().sum() for one in actors._slices]
        found = {block: torch.tensor(term) for block, term in zip(actors.blocks, ray.get(actors.terms("summed")), strict=True)}
        assert joined(Block(0, len(terms)), found) == halves(len(terms), terms.__getitem__)


def test_a_lost_actor_is_an_error_before_a_term_is_used(local_ray, tmp_path):
    with pool(local_ray, tmp_path, 1) as actors, pytest.raises(RayActorError):
        actors.terms("summed")


@pytest.mark.parametrize("slices", [1, 2, 3, 7, 31, 32])
def test_blocks_are_few_even_and_terms_of_the_sum_by_halves(slices):
    values = torch.rand(slices, generator=torch.Generator().manual_seed(slices))
    for actors in range(1, slices + 1):
        found = blocks(slices, actors)
        assert [n for block in found for n in range(block.first, block.first + block.size)] == list(range(slices))
        most = max(sum(block.size for block in found[i::actors]) for i in range(actors))
        assert most <= UNEVEN * slices / actors + 1
    assert len(blocks(slices, 1)) == 1
    assert [block.size for block in blocks(32, 8)] == [4] * 8
    assert halves(slices, values.__getitem__) == pytest.approx(values.sum().item())


def test_actors_that_are_lost_again_and_again_are_an_error(local_ray, tmp_path):
    with pool(local_ray, tmp_path, 100) as actors, pytest.raises(RayActorError):
        list(actors.each("add", 0))
    assert len(list(tmp_path.iterdir())) > MAX_REPLACEMENTS
