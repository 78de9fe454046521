"""The small matrices that factors are reduced to, and their solution in batches over samples and layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from selector.spectra.linalg import root_eigenvalues, semidefinite_factor, uses_kernels
from selector.spectra.threads import over_batch

MEMORY = 1 << 30
"""Bytes of work space that `solve` takes on CPU unless told otherwise; on a GPU it takes half of what is free."""


@dataclass(frozen=True, eq=False)
class Core:
    """The small matrices that hold the spectra of one projection for a batch of samples."""

    matrix: Float[Tensor, "N n m"]
    """A symmetric matrix (its upper triangle) whose eigenvalues are sigma², or its right factor where `left` is given, or one with singular values sigma."""
    left: Float[Tensor, "N n n"] | None
    """Left factor of the product whose eigenvalues are sigma²; one tensor shared by projections of the same input."""
    squared: bool
    """Whether eigenvalues are sigma² (else singular values are sigma)."""
    scale: Float[Tensor, " N"]
    """What the spectra are multiplied by, float64; NaN for a sample whose factors are not finite."""
    frobenius: Float[Tensor, " N"]
    """‖G‖_F, float64."""
    floor: Float[Tensor, " N"]
    """Bound on the noise of a singular value, in the unit of the gradient, float64."""
    route: str
    """How it is solved, for people to read: `"fast: 256x256 Gram"`."""
    escalated: tuple[Tensor, Core] | None = None
    """Positions of the samples that need more precision, and their cores."""


def solve(cores: Sequence[Core], memory: int | None = None) -> list[Float[Tensor, "N _"]]:
    """Solve cores of any number of layers; those of one size go through one batched solver.

    Args:
        cores: what `reduce_factors` returned, of one or many layers.
        memory: bytes of work space to stay within; None chooses it from what is free.

    Returns:
        Singular values for each core, `[N, R]` float64, descending.
    """
    groups: dict[tuple, list[int]] = defaultdict(list)
    for i, core in enumerate(cores):
        groups[_padded(core), core.squared, core.left is None, core.matrix.dtype, core.matrix.device].append(i)
    spectra: list[Tensor] = [torch.empty(0)] * len(cores)
    for (shape, *_), members in groups.items():
        for chunk in _chunks(cores, members, shape, memory):
            for i, sigma in zip(chunk, _solve_chunk([cores[i] for i in chunk], shape), strict=True):
                spectra[i] = sigma
    again = [(i, *core.escalated) for i, core in enumerate(cores) if core.escalated]
    for (i, samples, _), sigma in zip(again, solve([core for *_, core in again], memory) if again else (), strict=True):
        spectra[i][samples] = sigma
    return spectra


def _padded(core: Core) -> torch.Size:
    """Shape in which a core is solved: the kernels work on blocks of 64, and added zero rows only add zeros to a spectrum."""
    shape = core.matrix.shape[-2:]
    return torch.Size(-(-size // 64) * 64 for size in shape) if core.squared and uses_kernels(core.matrix) else shape


def _chunks(cores: Sequence[Core], members: list[int], shape: torch.Size, memory: int | None) -> Iterator[list[int]]:
    """Runs of members whose matrices, at eight copies each, fit the work space; at least one member each."""
    matrix = cores[members[0]].matrix
    if memory is None:
        memory = torch.cuda.mem_get_info(matrix.device)[0] // 2 if matrix.is_cuda else MEMORY
    room = memory // max(8 * shape.numel() * matrix.element_size(), 1)
    chunk, rows = [], 0
    for i in members:
        if chunk and rows + len(cores[i].matrix) > room:
            yield chunk
            chunk, rows = [], 0
        chunk.append(i)
        rows += len(cores[i].matrix)
    yield chunk


def _solve_chunk(cores: list[Core], shape: torch.Size) -> list[Tensor]:
    """Spectra of cores that share kind, dtype and device, padded to one size."""
    matrices = _stack([core.matrix for core in cores], shape)
    if not cores[0].squared:
        values = over_batch(torch.linalg.svdvals, matrices)
    else:
        if cores[0].left is not None:
            lefts = {id(core.left): core.left for core in cores if core.left is not None}
            lower = semidefinite_factor(_stack(list(lefts.values()), shape)).split(
                [len(left) for left in lefts.values()]
            )
            by_left = dict(zip(lefts, lower, strict=True))
            start = 0
            for core in cores:
                part, factor = matrices[start : start + len(core.matrix)], by_left[id(core.left)]
                part.copy_(factor.mT @ part.double() @ factor)
                start += len(part)
        values = root_eigenvalues(matrices)
    spectra = values.double() * torch.cat([core.scale for core in cores]).unsqueeze(-1)
    return [
        part[:, : core.matrix.shape[-2]]
        for part, core in zip(spectra.split([len(core.matrix) for core in cores]), cores, strict=True)
    ]


def _stack(parts: list[Tensor], shape: torch.Size) -> Tensor:
    """One new tensor of all parts, each matrix padded to the shape by zeros."""
    if all(part.shape[-2:] == shape for part in parts):
        return torch.cat(parts)
    stacked = parts[0].new_zeros(sum(len(part) for part in parts), *shape)
    start = 0
    for part in parts:
        stacked[start : start + len(part), : part.shape[-2], : part.shape[-1]] = part
        start += len(part)
    return stacked
