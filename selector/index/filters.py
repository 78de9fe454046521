"""Which members a search may return, by their metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool

from selector.errors import GradientIndexError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Conditions that all have to hold; a member without the value in question fails.

    Example:
        `Filter(sources=["math"], ranges={"n_tokens": (50, 1000), "score": (0.5, None)})`
    """

    sources: Sequence[str] | None = None
    """Data sets or mixture components to keep; all when None."""
    ranges: Mapping[str, tuple[float | int | None, float | int | None]] = field(default_factory=dict)
    """Lowest and highest value of metadata columns, both included; None leaves a side open."""

    def mask(self, members: pa.Table) -> Bool[np.ndarray, " N"]:
        """Which members pass.

        Args:
            members: the index's table of metadata.

        Raises:
            GradientIndexError: a column is not there, or holds no numbers.
        """
        allowed = np.ones(members.num_rows, dtype=bool)
        if self.sources is not None:
            allowed &= _true(pc.is_in(_column(members, "source"), value_set=pa.array(list(self.sources), pa.string())))  # pyright: ignore[reportAttributeAccessIssue]
        for name, (low, high) in self.ranges.items():
            column = _column(members, name)
            if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
                raise GradientIndexError(f"the column {name!r} has no range", got=column.type, allowed="numbers")
            if low is not None:
                allowed &= _true(pc.greater_equal(column, low))  # pyright: ignore[reportAttributeAccessIssue]
            if high is not None:
                allowed &= _true(pc.less_equal(column, high))  # pyright: ignore[reportAttributeAccessIssue]
        return allowed


def _column(members: pa.Table, name: str) -> pa.ChunkedArray:
    known = [column for column in members.column_names if column != "sample_id"]
    if name not in known:
        raise GradientIndexError(
            f"the index has no metadata column {name!r}", allowed=", ".join(known) or "none: the index was built without metadata",
            fix=did_you_mean(name, known) or None,
        )  # fmt: skip
    return members[name]


def _true(condition: pa.ChunkedArray) -> Bool[np.ndarray, " N"]:
    return pc.fill_null(condition, False).to_numpy()
