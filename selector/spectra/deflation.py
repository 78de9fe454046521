"""Eigenvalues of matrices that few directions dominate, at the price of float32.

Float32 finds eigenvalues to about ε of the largest one, which is nothing to those of a gradient whose common part outweighs the rest
by orders of magnitude. So the largest directions are taken out in float64, by subspace iteration, and float32 has what is left:

    Q = orth(A^p Ω),    A ≈ Q (Qᵀ A Q) Qᵀ + P A P,    P = I - Q Qᵀ

What couples the two parts, P A Q, moves eigenvalues by its square over the gap between them. It vanishes for small eigenvalues by
(λ / λ_k)^p, and where eigenvalues next to the k-th move, their sum does not.

Source: Golub and Van Loan, Matrix Computations, sections 8.2.4 (orthogonal iteration) and 8.1.1 (perturbation).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

DIRECTIONS, ROUNDS = 16, 24
COUPLING = 5e-2
"""Largest coupling, relative to the smallest eigenvalue taken out; at 4e-2 the sum of the roots was off by 5e-6."""


def deflate(
    matrices: Float[Tensor, "N n n"],
) -> tuple[Float[Tensor, "N k"], Float[Tensor, "N n n"], Bool[Tensor, " N"]]:
    """Take out the largest directions.

    Args:
        matrices: positive semidefinite, float64, symmetric.

    Returns:
        The largest eigenvalues, k = `DIRECTIONS`, any order; what is left, which has k eigenvalues near 0 in their place; and whether
        the two are apart enough to be taken for the spectrum.
    """
    n = matrices.shape[-1]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(n, DIRECTIONS, generator=generator, dtype=torch.float64).to(matrices.device)
    q = _orthonormal(matrices @ start)
    for _ in range(ROUNDS):
        q = _orthonormal(matrices @ q)
    image = matrices @ q
    small = q.mT @ image
    coupling = torch.linalg.matrix_norm(image - q @ small)
    half = image - 0.5 * (q @ small)
    rest = torch.baddbmm(torch.baddbmm(matrices, q, half.mT, alpha=-1), half, q.mT, alpha=-1)
    largest = torch.linalg.eigvalsh(small).clamp_min(0)
    return largest, rest, coupling <= COUPLING * largest.amin(-1)


def _orthonormal(vectors: Tensor) -> Tensor:
    """Columns with the same span by way of their Gram matrix, twice; zeros in place of directions that are not there."""
    for _ in range(2):
        # Columns of like length, since the Gram matrix rounds away short ones. What it loses where one eigenvalue is 1e8 times the
        # others stays zero, and the matrix counts as not apart.
        vectors = vectors / torch.linalg.vector_norm(vectors, dim=-2, keepdim=True).clamp_min(1e-150)
        values, basis = torch.linalg.eigh(vectors.mT @ vectors)
        there = values > torch.finfo(values.dtype).eps * values[:, -1:]
        vectors = vectors @ (basis * torch.where(there, values.clamp_min(1e-300).rsqrt(), 0.0).unsqueeze(-2))
    return vectors
