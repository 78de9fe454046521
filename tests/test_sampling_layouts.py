"""Groups stay whole and ranks agree in every layout of trainers that draw groups, split by Accelerate's own code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from selector.sampling import AdaptiveSampler, Groups, RewardSignal, SelectionSampler
from selector.selection import Selection


@dataclass(frozen=True)
class Layout:
    """How a run draws and splits its samples, in the terms of TRL's and transformers' settings."""

    samples: int
    world: int
    per_device: int
    steps_per_generation: int
    num_generations: int
    num_iterations: int
    epoch: int
    adaptive: bool

    @property
    def prompts(self) -> int:
        """Unique prompts of one generation over all ranks."""
        return self.world * self.per_device * self.steps_per_generation // self.num_generations

    @property
    def groups(self) -> Groups:
        return Groups(self.num_generations, self.prompts, self.num_iterations * self.steps_per_generation)


def layouts(count: int) -> Iterator[Layout]:
    """Different layouts that TRL accepts: a generation's completions must be whole groups."""
    rng = np.random.default_rng(0)
    seen: set[Layout] = set()
    while len(seen) < count:
        world, per_device, per_generation, iterations = (int(i) for i in rng.integers(1, (5, 5, 4, 4)))
        completions = world * per_device * per_generation
        generations = int(rng.choice([size for size in range(1, completions + 1) if completions % size == 0]))
        samples = int(rng.integers(1, 4 * completions // generations + 2))
        epoch, adaptive = (int(i) for i in rng.integers(0, (3, 2)))
        layout = Layout(samples, world, per_device, per_generation, generations, iterations, epoch, bool(adaptive))
        if layout not in seen:
            seen.add(layout)
            yield layout


def sampler_of(layout: Layout, names: np.ndarray) -> SelectionSampler:
    n = layout.samples
    picked = Selection(
        ids=names[:n], rows=np.arange(n), weights=np.ones(n), scores=np.arange(n, dtype=float), n_tokens=np.ones(n, dtype=np.int64),
        reasons=names[:n],
    )  # fmt: skip
    options = {"groups": layout.groups, "batch_size": layout.prompts, "seed": 1}
    made = (
        AdaptiveSampler(picked, RewardSignal(), **options) if layout.adaptive else SelectionSampler(picked, **options)
    )
    made.set_epoch(layout.epoch)
    return made


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_groups_stay_whole_and_ranks_agree(count: int) -> None:
    names = np.array([f"s{i:03d}" for i in range(300)])
    for layout in layouts(count):
        size = layout.per_device * layout.steps_per_generation
        shards = [
            list(BatchSamplerShard(BatchSampler(sampler_of(layout, names), size, False), layout.world, rank))
            for rank in range(layout.world)
        ]
        # what the ranks hold of one generation after another, beside each other as TRL gathers them
        drawn = np.array([list(zip(*shards, strict=True))], dtype=np.int64).reshape(-1, layout.world * size)
        assert len(drawn) == layout.samples // layout.prompts * layout.groups.repeat_count, layout
        if not len(drawn):
            continue
        groups = drawn.reshape(-1, layout.groups.repeat_count, layout.prompts, layout.num_generations)
        assert (groups == groups[:, :1, :, :1]).all(), layout
        prompts = groups[:, 0, :, 0]
        assert all(len(set(batch)) == layout.prompts for batch in prompts.tolist()), layout
        if not layout.adaptive:
            assert len(np.unique(prompts)) == prompts.size, layout
