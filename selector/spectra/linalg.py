"""Symmetric eigenvalues and factors of batches of small matrices, by LAPACK on CPU.

A matrix with an entry that is not finite is solved as zeros: callers mark its sample by a NaN scale, so that it neither stops
the batch nor touches its neighbours.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from selector.spectra.threads import over_batch


def eigenvalues(matrices: Float[Tensor, "N n n"]) -> Float[Tensor, "N n"]:
    """Eigenvalues of symmetric matrices.

    Args:
        matrices: finite, float32 or float64.

    Returns:
        Eigenvalues, descending; off by at most a few ε of the largest magnitude.
    """
    return over_batch(torch.linalg.eigvalsh, matrices).flip(-1)


def semidefinite_factor(matrices: Float[Tensor, "N n n"]) -> Float[Tensor, "N n n"]:
    """Lower triangular L with L Lᵀ close to a positive semidefinite matrix, singular ones included.

    Each diagonal entry is raised by a few dozen ε of itself, which lets the factorisation of a singular matrix finish and moves
    L Lᵀ by no more than that; where it still does not finish, the square root of its eigendecomposition takes its place.

    Args:
        matrices: finite, positive semidefinite up to rounding, float32 or float64.

    Returns:
        The factor. A zero row of the matrix gives a zero row and column.
    """
    jitter = 32 * torch.finfo(matrices.dtype).eps
    diagonal = matrices.diagonal(dim1=-2, dim2=-1)
    empty = diagonal <= 0
    lower, info = torch.linalg.cholesky_ex(matrices + torch.diag_embed(torch.where(empty, 1.0, jitter * diagonal)))
    lower = lower.masked_fill(empty.unsqueeze(-2), 0.0)
    if failed := info.nonzero().flatten().tolist():
        values, vectors = torch.linalg.eigh(matrices[failed])
        lower[failed] = vectors * values.clamp_min(0).sqrt().unsqueeze(-2)
    return lower
