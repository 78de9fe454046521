"""Singular values of weight gradients from their factors, in two stages.

The gradient of a linear layer is G = deltaᵀ x. Its singular values need neither G nor an SVD of an O x I matrix:

    T <= min(I, O)   sigma² = eig((x xᵀ)(delta deltaᵀ)), two T x T Gram matrices; the one of x serves all projections that read x
    T >  min(I, O)   sigma² = eig(G Gᵀ) on the smaller side of G

`reduce_factors` keeps only those small matrices, so that hooks can free x and delta at once; `solve` takes the matrices of all
layers and solves those of one size together.

Squaring costs half the digits. What lies below the floor of a route is noise:

    fast        float32 (operands of 16 bits are exact in it)   sqrt(eps32) ‖x‖ ‖delta‖, about 3e-4 of that product
    high        float64 throughout                              sqrt(eps64) ‖x‖ ‖delta‖, about 1.5e-8 of it; eps64 of it on CPU for T <= min(I, O)
    reference   float64, nothing squared                        eps64 ‖x‖ ‖delta‖

where ‖x‖ and ‖delta‖ are spectral norms, and ‖G‖ stands in place of the product for T > min(I, O). The product is near ‖G‖ on ordinary
data, but not where the tokens of x share a large common part that delta cancels. `auto` is fast for 16-bit factors and high for
others, and solves a sample's matrix again in high where the floor comes near its typical singular value, ‖G‖_F / sqrt(R).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from selector.errors import ConfigError, SelectorError, did_you_mean
from selector.spectra.linalg import eigenvalues, semidefinite_factor
from selector.spectra.threads import over_batch

Precision = Literal["fast", "high", "reference", "auto"]

ESCALATE = 0.1
"""`auto` solves a matrix again when its floor exceeds this share of ‖G‖_F / sqrt(R)."""

MEMORY = 1 << 30
"""Bytes of work space that `solve` takes on CPU unless told otherwise; on a GPU it takes a quarter of what is free."""


@dataclass(frozen=True, eq=False)
class Core:
    """The small matrices that hold the spectra of one projection for a batch of samples."""

    matrix: Float[Tensor, "N n m"]
    """A symmetric matrix whose eigenvalues are sigma², or its right factor where `left` is given, or one with singular values sigma."""
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


def singular_values(
    x: Float[Tensor, "N T I"], delta: Float[Tensor, "N T O"], precision: Precision = "auto"
) -> Float[Tensor, "N R"]:
    """Singular values of each sample's weight gradient deltaᵀ x, without forming it where that is cheaper.

    Args:
        x: layer inputs, any floating dtype.
        delta: gradients of the sample's loss with respect to the layer's outputs; rows of padding tokens are zero.
        precision: see the module; `auto` follows the dtype of x.

    Returns:
        `[N, R]` float64, descending, R = min(T, I, O), in the unit of the gradient; NaN for samples that are not finite.

    Raises:
        ConfigError: the precision is unknown.
        SelectorError: the factors do not fit each other.
    """
    return solve(reduce_factors(x, [delta], precision))[0]


def reduce_factors(
    x: Float[Tensor, "N T I"], deltas: Sequence[Float[Tensor, "N T _"]], precision: Precision = "auto"
) -> list[Core]:
    """Reduce the factors of a layer to the small matrices that `solve` needs; x and deltas can be freed afterwards.

    Args:
        x: inputs that all projections read, any floating dtype.
        deltas: output gradients, one per projection; rows of padding tokens are zero.
        precision: see the module; `auto` follows the dtype of x.

    Returns:
        One core per projection.

    Raises:
        ConfigError: the precision is unknown.
        SelectorError: the factors do not fit each other.
    """
    check_factors(x, deltas, precision)
    chosen = precision if precision != "auto" else "fast" if x.element_size() < 4 else "high"
    cores = _reduce(x, deltas, chosen)
    if precision != "auto" or chosen != "fast":
        return cores
    return [_escalate(core, x, delta) for core, delta in zip(cores, deltas, strict=True)]


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
        groups[core.matrix.shape[-2:], core.squared, core.left is None, core.matrix.dtype, core.matrix.device].append(i)
    spectra: list[Tensor] = [torch.empty(0)] * len(cores)
    for members in groups.values():
        for i, sigma in zip(members, _solve_group([cores[i] for i in members], memory), strict=True):
            spectra[i] = sigma
    again = [i for i, core in enumerate(cores) if core.escalated]
    for i, sigma in zip(again, solve([cores[i].escalated[1] for i in again], memory) if again else (), strict=True):
        spectra[i][cores[i].escalated[0]] = sigma
    return spectra


def check_factors(x: Tensor, deltas: Sequence[Tensor], precision: str) -> None:
    """Refuse a precision that is not known and factors that do not fit each other.

    Args:
        x: inputs.
        deltas: output gradients.
        precision: what the user asked for.

    Raises:
        ConfigError: the precision is unknown.
        SelectorError: the factors do not fit each other.
    """
    if precision not in get_args(Precision):
        raise ConfigError(
            "unknown precision", got=repr(precision), allowed=", ".join(get_args(Precision)),
            fix=did_you_mean(precision, get_args(Precision)) or None,
        )  # fmt: skip
    for delta in deltas:
        if x.ndim != 3 or delta.ndim != 3 or x.shape[:2] != delta.shape[:2]:
            raise SelectorError(
                "the factors of a gradient do not fit each other",
                got=f"x {list(x.shape)} and delta {list(delta.shape)}",
                allowed="x [N, T, I] and delta [N, T, O]",
            )


def _reduce(x: Tensor, deltas: Sequence[Tensor], precision: str) -> list[Core]:
    """The cores of all projections, the long ones (T > min(I, O)) one by one and the others with their shared part."""
    length, width = x.shape[1:]
    short = [i for i, delta in enumerate(deltas) if length <= min(width, delta.shape[-1])]
    unsquared = precision == "reference" or (precision == "high" and x.device.type == "cpu")
    pair = _triangle_cores if unsquared else _gram_cores
    cores = dict(zip(short, pair(x, [deltas[i] for i in short], precision), strict=True)) if short else {}
    return [cores[i] if i in cores else _gradient_core(x, delta, precision) for i, delta in enumerate(deltas)]


def _gram_cores(x: Tensor, deltas: Sequence[Tensor], precision: str) -> list[Core]:
    eps = torch.finfo(_work_dtype(precision)).eps
    x, x_scale = _operand(x, precision)
    operands = [_operand(delta, precision) for delta in deltas]
    rights = [_gram(delta) for delta, _ in operands]
    live = torch.stack([right.diagonal(dim1=-2, dim2=-1) != 0 for right in rights]).any(0)
    # Rows that no projection uses (padding, the last token) may hold anything; they must not even be multiplied by zero.
    left = _gram(x).masked_fill(~(live.unsqueeze(-1) & live.unsqueeze(-2)), 0.0)
    left_ok = _trace(left).isfinite()
    left = left.masked_fill(~left_ok[:, None, None], 0.0)
    cores = []
    for right, (_, scale) in zip(rights, operands, strict=True):
        ok = left_ok & _trace(right).isfinite()
        right = right.masked_fill(~ok[:, None, None], 0.0)
        scale = (x_scale * scale).masked_fill(~ok, torch.nan)
        frobenius = (left * right).double().sum((-2, -1)).clamp_min(0).sqrt() * scale
        # The Frobenius norm of a Gram matrix bounds its largest eigenvalue from above, and closely.
        norms = torch.linalg.matrix_norm(left).double() * torch.linalg.matrix_norm(right).double()
        size = left.shape[-1]
        cores.append(
            Core(right, left, True, scale, frobenius, (eps * norms).sqrt() * scale, f"{precision}: {size}x{size} Gram")
        )
    return cores


def _triangle_cores(x: Tensor, deltas: Sequence[Tensor], precision: str) -> list[Core]:
    """With xᵀ = Q R and deltaᵀ = P S (QR), G = P (S Rᵀ) Qᵀ has the singular values of S Rᵀ."""
    live = torch.stack([(delta != 0).any(-1) for delta in deltas]).any(0)
    x, x_ok = _finite(x.double().masked_fill(~live.unsqueeze(-1), 0.0))
    right = over_batch(_triangle, x.mT).mT
    cores = []
    for delta in deltas:
        delta, ok = _finite(delta.double())
        matrix = over_batch(_triangle, delta.mT) @ right
        scale = torch.where(x_ok & ok, 1.0, torch.nan)
        norms = torch.linalg.matrix_norm(x) * torch.linalg.matrix_norm(delta)
        size = matrix.shape[-1]
        cores.append(
            Core(
                matrix, None, False, scale, torch.linalg.matrix_norm(matrix) * scale,
                torch.finfo(torch.float64).eps * norms * scale, f"{precision}: {size}x{size} triangular factors",
            )
        )  # fmt: skip
    return cores


def _triangle(matrices: Tensor) -> Tensor:
    return torch.linalg.qr(matrices, mode="r").R


def _gradient_core(x: Tensor, delta: Tensor, precision: str) -> Core:
    eps = torch.finfo(_work_dtype(precision)).eps
    x = x.masked_fill((delta == 0).all(-1, keepdim=True), 0.0)
    x, x_scale = _operand(x, precision)
    delta, scale = _operand(delta, precision)
    small_side_first = (delta.mT, x) if delta.shape[-1] <= x.shape[-1] else (x.mT, delta)
    gradient, ok = _finite(_matmul(*small_side_first))
    scale = (x_scale * scale).masked_fill(~ok, torch.nan)
    frobenius = torch.linalg.matrix_norm(gradient).double() * scale
    size, squared = gradient.shape[-2], precision != "reference"
    return Core(
        _matmul(gradient, gradient.mT) if squared else gradient, None, squared, scale, frobenius,
        (eps**0.5 if squared else eps) * frobenius, f"{precision}: {size}x{size} " + ("Gram of G" if squared else "G"),
    )  # fmt: skip


def _escalate(core: Core, x: Tensor, delta: Tensor) -> Core:
    typical = core.frobenius / max(core.matrix.shape[-1], 1) ** 0.5
    need = (core.floor > ESCALATE * typical).nonzero().flatten()
    if not len(need):
        return core
    (better,) = _reduce(x[need], [delta[need]], "high")
    return Core(**{**core.__dict__, "escalated": (need, better), "route": f"{core.route}, {len(need)} in high"})


def _solve_group(cores: list[Core], memory: int | None) -> list[Tensor]:
    """Spectra of cores that share size, kind, dtype and device, in chunks of whole cores that fit the work space."""
    matrix = cores[0].matrix
    if memory is None:
        memory = torch.cuda.mem_get_info(matrix.device)[0] // 4 if matrix.is_cuda else MEMORY
    size = 4 * max(matrix[:1].nbytes, 1)
    spectra, chunk, rows = [], [], 0
    for core in cores:
        if chunk and (rows + len(core.matrix)) * size > memory:
            spectra, chunk, rows = spectra + _solve_chunk(chunk), [], 0
        chunk.append(core)
        rows += len(core.matrix)
    return spectra + _solve_chunk(chunk)


def _solve_chunk(cores: list[Core]) -> list[Tensor]:
    matrices = torch.cat([core.matrix for core in cores])
    if not cores[0].squared:
        values = over_batch(torch.linalg.svdvals, matrices)
    else:
        if cores[0].left is not None:
            lefts = {id(core.left): core.left for core in cores}
            lower = semidefinite_factor(torch.cat(list(lefts.values()))).split([len(left) for left in lefts.values()])
            by_left = dict(zip(lefts, lower, strict=True))
            factors = torch.cat([by_left[id(core.left)] for core in cores])
            matrices = factors.mT @ matrices @ factors
        values = eigenvalues(matrices).clamp_min(0).sqrt()
    scale = torch.cat([core.scale for core in cores])
    return list((values.double() * scale.unsqueeze(-1)).split([len(core.matrix) for core in cores]))


def _work_dtype(precision: str) -> torch.dtype:
    return torch.float32 if precision == "fast" else torch.float64


def _operand(values: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """The values in the dtype of the products, and the power of two per sample that keeps float32 squares in range."""
    if precision != "fast":
        return values.double(), values.new_ones(len(values), dtype=torch.float64)
    values = values.float()
    largest = values.flatten(1).abs().amax(-1) if values.numel() else values.new_zeros(len(values))
    exponent = torch.where(largest.isfinite(), torch.frexp(largest).exponent, 0).clamp(-126, 126)
    ones = torch.ones_like(largest)
    return values * torch.ldexp(ones, -exponent)[:, None, None], torch.ldexp(ones.double(), exponent)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


def _gram(values: Tensor) -> Tensor:
    return _matmul(values, values.mT)


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)


def _finite(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """The matrices with those that are not finite replaced by zeros, and which ones are finite."""
    ok = matrices.isfinite().flatten(1).all(-1)
    return matrices.masked_fill(~ok[:, None, None], 0.0), ok
