"""The small matrices that factors are reduced to, and their solution in batches over samples and layers.

Eigenvalues in float32 carry noise: singular values up to about sqrt(eps32)/8 of the largest, 4e-5, mean nothing. One of them is
nothing, but where a gradient has few directions (a sample with a single loss token) all others are noise, and their sum is not. So
each spectrum that was sought in float32 is looked at, and its matrix is solved again in float64 where values at the noise make up
more than `NOISY` of the nuclear norm: 0 to 1 % of the matrices of ordinary samples, 1 to 9 % where samples have one to three loss
tokens. The products of factors may stay in float32 for that: their rounding matters ten times less than the eigen-solver's.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from selector.spectra.deflation import deflate
from selector.spectra.linalg import congruence, padded_size, root_eigenvalues, semidefinite_factor, uses_kernels
from selector.spectra.threads import over_batch

MEMORY, MEMORY_ON_GPU = 1 << 30, 16 << 30
"""Bytes of work space that `solve` takes unless told otherwise, on a GPU no more than half of what is free: larger chunks are no faster,
and the blocks that they leave in torch's allocator would have to go before the model's next pass finds room."""
NOISE = torch.finfo(torch.float32).eps ** 0.5 / 8
"""Singular values below this share of the largest are what float32 makes of zeros."""
NOISY = 1e-4
"""Largest share of the nuclear norm that such values may have."""
DEFLATE_FROM = 256
"""Size from which float64 is so dear on a GPU that float32 is tried again without the largest directions."""


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
    """Power of two near ‖G‖ that the solver divides sigma by, float64, on the CPU; NaN for a sample that cannot be solved so."""
    frobenius: Float[Tensor, " N"]
    """‖G‖_F, float64, on the CPU."""
    floor: Float[Tensor, " N"]
    """Bound on the noise of a singular value, in the unit of the gradient, float64, on the CPU."""
    dtype: torch.dtype
    """In which the eigen-solver starts; what its noise spoils is solved again in float64."""
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
        groups[_padded(core), core.squared, core.left is None, core.dtype, core.matrix.device].append(i)
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
    """Shape in which a core is solved: added zero rows only add zeros to a spectrum."""
    shape = core.matrix.shape[-2:]
    return torch.Size(padded_size(size, core.matrix) for size in shape) if core.squared else shape


def _chunks(cores: Sequence[Core], members: list[int], shape: torch.Size, memory: int | None) -> Iterator[list[int]]:
    """Runs of members whose matrices, at six copies in float64 each, fit the work space; at least one member each."""
    matrix = cores[members[0]].matrix
    if memory is None:
        memory = min(free_memory(matrix.device) // 2, MEMORY_ON_GPU) if matrix.is_cuda else MEMORY
    room = memory // max(6 * 8 * shape.numel(), 1)
    chunk, rows = [], 0
    for i in members:
        if chunk and rows + len(cores[i].matrix) > room:
            yield chunk
            chunk, rows = [], 0
        chunk.append(i)
        rows += len(cores[i].matrix)
    yield chunk


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a GPU, those among them that torch keeps for later.

    Args:
        device: the GPU.
    """
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def _solve_chunk(cores: list[Core], shape: torch.Size) -> list[Tensor]:
    """Spectra of cores that share kind, dtype and device, padded to one size; one wait for the GPU where the dtype is float32."""
    lengths = [len(core.matrix) for core in cores]
    matrices = _stack([core.matrix for core in cores], shape)
    scale = torch.cat([core.scale for core in cores]).to(matrices.device)
    if not cores[0].squared:
        values = over_batch(torch.linalg.svdvals, matrices)
    else:
        squares = _Squares(cores, matrices, scale)
        values = root_eigenvalues(squares(), cores[0].dtype).double()
        noisy = _is_noisy(values).nonzero().flatten() if cores[0].dtype == torch.float32 else None
        if noisy is not None and len(noisy):
            values[noisy] = _solve_noisy(squares(noisy))
    spectra = values.double() * scale.unsqueeze(-1)
    return [part[:, : core.matrix.shape[-2]] for part, core in zip(spectra.split(lengths), cores, strict=True)]


def _stack(matrices: Sequence[Tensor], shape: torch.Size) -> Tensor:
    """All matrices in one batch, padded with zeros."""
    return torch.cat([
        m if m.shape[-2:] == shape else F.pad(m, (0, shape[1] - m.shape[-1], 0, shape[0] - m.shape[-2])) for m in matrices
    ])  # fmt: skip


class _Squares:
    """The matrices whose eigenvalues are sigma², divided by the squares of the scales.

    Args:
        cores: whose matrices they are.
        matrices: of all of them, one behind the other.
        scale: of each matrix.
    """

    def __init__(self, cores: Sequence[Core], matrices: Float[Tensor, "M n n"], scale: Float[Tensor, " M"]) -> None:
        self._matrices = matrices
        self._shares = scale.square().reciprocal().nan_to_num(0.0)[:, None, None]
        self._factors = self._owners = None
        if cores[0].left is not None:
            lefts = {id(core.left): core.left for core in cores if core.left is not None}
            starts = dict(zip(lefts, itertools.accumulate(map(len, lefts.values()), initial=0), strict=False))
            owners = [starts[id(core.left)] + torch.arange(len(core.matrix)) for core in cores]
            self._owners = torch.cat(owners).to(matrices.device)
            self._factors = semidefinite_factor(_stack(list(lefts.values()), matrices.shape[-2:]))

    def __call__(self, which: Tensor | slice = slice(None)) -> Float[Tensor, "m n n"]:
        """Those of some matrices, float64, valid on and above the diagonal.

        Args:
            which: positions of the matrices; all when left out.
        """
        matrices = self._matrices[which] * self._shares[which]  # powers of two: exact
        if self._factors is None or self._owners is None:
            return matrices
        return congruence(self._factors[self._owners[which]], matrices)


def _solve_noisy(squares: Tensor) -> Tensor:
    """Roots of eigenvalues of matrices whose small ones float32 does not find: in float32 again without their largest directions, where
    float64 is much dearer, and in float64 where that does not do either."""
    n = squares.shape[-1]
    if not uses_kernels(squares) or n < DEFLATE_FROM:
        return root_eigenvalues(squares)
    upper = squares.triu()
    squares = upper + upper.triu(1).mT
    largest, rest, apart = deflate(squares)
    roots = root_eigenvalues(rest, torch.float32).double()
    again = ~apart | _is_noisy(roots, largest.sqrt().sum(-1))
    # the directions taken out have left as many zeros
    values = torch.cat([largest.sqrt(), roots[:, : n - largest.shape[-1]]], dim=-1).sort(descending=True).values
    if again.any():
        values[again] = root_eigenvalues(squares[again])
    return values


def _is_noisy(values: Tensor, beside: Tensor | float = 0.0) -> Tensor:
    """Which spectra `[N, n]`, sought in float32, owe more than `NOISY` of their sum, and of what is `beside` them, to values that
    noise alone could have made."""
    noise = values.masked_fill(values > NOISE * values[:, :1], 0.0)
    return noise.sum(-1) > NOISY * (values.sum(-1) + beside)
