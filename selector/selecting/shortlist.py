"""Top and quota policies on a table of tens of millions of scores, without holding its ids.

A first pass reads scores, tokens and sources, and finds how far down each group the budget can possibly reach; ties at
that point and the order within ties are left open. A second pass reads the ids of only those rows. The ordinary policy
then runs on them, and picks exactly what it would have picked from the whole table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float64, Int, Int64

from selector.policies import Budget
from selector.policies.quota import named_shares
from selector.scores.table import read_provenance, resolve_name, to_scores
from selector.types import Scores

BATCH = 1 << 18
"""Rows that are read at a time when ids are looked up."""
FLOOR_FROM = 1 << 20
"""Rows from which on a sample tells first how much need not be sorted."""
STRIDE = 61
"""Every so many rows are that sample."""
FLOOR_SLACK = 1.2
"""How much more than the budget is sought in it."""


@dataclass(frozen=True, eq=False)
class Shortlist:
    """Rows among which the picks are, and what the rest of the table adds up to."""

    scores: Scores
    """The rows that the budget could reach."""
    budget: Budget
    """The budget as an absolute amount for the whole table."""
    policy: str
    """What to run on these rows to get what the policy would pick from the whole table."""
    options: dict[str, Any]
    """Its options, with shares that were relative to the whole table as numbers."""
    removed: dict[str, int]
    """How many rows of the table could not be picked, by reason."""
    sources: dict[str, tuple[int, int]]
    """Samples and tokens of each source in the whole table."""


def can_shortlist(policy: str, options: Mapping[str, Any]) -> bool:
    """Whether a policy looks at nothing but the best scores of each source; False for options that it does not have.

    Args:
        policy: its name.
        options: its options.
    """
    known = {"top": set(), "proportional": {"within"}, "quota": {"within", "shares"}}
    shares = options.get("shares", "equal")
    readable = isinstance(shares, Mapping) or shares in ("equal", "proportional")
    return policy in known and set(options) <= known[policy] and options.get("within", "top") == "top" and readable


def shortlist(path: str | Path, name: str | None, budget: Budget, policy: str, options: Mapping[str, Any]) -> Shortlist:
    """Find the rows of a table that a policy could pick.

    Args:
        path: a table of scores.
        name: which score; the first when None.
        budget: how much may be picked.
        policy: a policy for which `can_shortlist` holds.
        options: its options.

    Raises:
        SelectionError: the file holds no scores, or none of that name.
    """
    provenance = read_provenance(path)
    name = resolve_name(provenance, name)
    table = pq.read_table(path, columns=[name, "n_tokens", "source"]).unify_dictionaries()
    values, n_tokens = table[name].to_numpy(), table["n_tokens"].to_numpy()
    names, codes = _dictionary(table["source"])
    del table
    scored = np.isfinite(values)
    absolute = budget.resolve(n_tokens[scored])
    costs = n_tokens if absolute.unit == "tokens" else np.ones(len(values), dtype=np.int32)
    removed = {"no score": int(len(values) - scored.sum())}
    if policy == "top":
        groups, shares = np.zeros(len(values), dtype=np.int32), np.ones(1)
    else:
        spent = np.bincount(codes[scored], weights=costs[scored], minlength=len(names))
        groups, shares = codes, _shares(policy, options, names, spent)
        removed["no quota"] = int((scored & (shares[codes] <= 0)).sum())
        policy, options = "quota", {"shares": {s: float(w) for s, w in zip(names, shares, strict=True) if w > 0}}
    reached = within_reach(values, groups, shares, costs, int(absolute.amount))
    totals = np.bincount(codes, minlength=len(names)), np.bincount(codes, weights=n_tokens, minlength=len(names))
    return Shortlist(
        scores=to_scores(_read_rows(path, name, reached), name, provenance[name]),
        budget=absolute,
        policy=policy,
        options=dict(options),
        removed={reason: count for reason, count in removed.items() if count},
        sources={s: (int(n), int(t)) for s, n, t in zip(names, *totals, strict=True)},
    )


def within_reach(
    values: Float64[np.ndarray, " N"],
    groups: Int[np.ndarray, " N"],
    shares: Float64[np.ndarray, " G"],
    costs: Int[np.ndarray, " N"],
    limit: int,
) -> Bool[np.ndarray, " N"]:
    """Rows that a fair queue of groups can pick before it has spent a budget, whatever the order of equal scores.

    Args:
        values: the score, NaN where there is none.
        groups: group of each row, of which those without a share are never picked.
        shares: share of each group, >= 0.
        costs: what each row costs.
        limit: the budget.
    """
    reached = np.zeros(len(values), dtype=bool)
    floor = _floor(values, groups, shares, costs, limit)
    part = np.flatnonzero(values >= floor[groups])
    inside, lowest = _reach(values[part], groups[part], shares, costs[part], limit)
    if (lowest < floor).any():
        # the sample misled; look at everything
        part = np.flatnonzero(np.isfinite(values))
        inside, _ = _reach(values[part], groups[part], shares, costs[part], limit)
    reached[part[inside]] = True
    return reached


def _floor(
    values: Float64[np.ndarray, " N"],
    groups: Int[np.ndarray, " N"],
    shares: Float64[np.ndarray, " G"],
    costs: Int[np.ndarray, " N"],
    limit: int,
) -> Float64[np.ndarray, " G"]:
    """A score in each group that the budget will hardly reach, from a sample; it spares sorting the rest."""
    floor = np.full(len(shares), -np.inf)
    if len(values) < FLOOR_FROM:
        return floor
    sample = np.flatnonzero(np.isfinite(values[::STRIDE])) * STRIDE
    _, lowest = _reach(values[sample], groups[sample], shares, costs[sample], int(FLOOR_SLACK * limit / STRIDE))
    return lowest


def _reach(
    values: Float64[np.ndarray, " N"],
    groups: Int[np.ndarray, " N"],
    shares: Float64[np.ndarray, " G"],
    costs: Int[np.ndarray, " N"],
    limit: int,
) -> tuple[Bool[np.ndarray, " N"], Float64[np.ndarray, " G"]]:
    """Rows within reach among finite scores, and the lowest of them in each group, -inf where it is used up."""
    order = np.argsort(-values)
    order = order[np.argsort(groups[order].astype(np.min_scalar_type(len(shares))), kind="stable")]
    bounds = np.concatenate([[0], np.cumsum(np.bincount(groups, minlength=len(shares)))])
    members = [order[a:b] for a, b in pairwise(bounds)]
    spent = [np.cumsum(costs[rows], dtype=np.int64) for rows in members]
    largest = int(costs.max(initial=0))
    # equal scores may come in another order than here, which moves what a group has spent at a turn by one sample
    turn = _turn(spent, shares, limit + 2 * largest * len(shares))
    reached, lowest = np.zeros(len(values), dtype=bool), np.full(len(shares), -np.inf)
    for group, (rows, total, share) in enumerate(zip(members, spent, shares, strict=True)):
        if share <= 0:
            lowest[group] = np.inf
            continue
        last = int(np.searchsorted(total, share * turn + 2 * largest)) + 1
        if last < len(rows):
            last += int(np.searchsorted(-values[rows[last:]], -values[rows[last - 1]], side="right"))
        reached[rows[:last]] = True
        if last < len(rows):
            lowest[group] = values[rows[last - 1]]
    return reached, lowest


def _turn(spent: list[Int64[np.ndarray, " _"]], shares: Float64[np.ndarray, " G"], wanted: int) -> float:
    """The turn at which all groups together have spent an amount, by bisection; infinite when they never do."""

    def total(turn: float) -> int:
        ends = [int(np.searchsorted(one, share * turn)) for one, share in zip(spent, shares, strict=True)]
        return sum(int(one[end - 1]) for one, end in zip(spent, ends, strict=True) if end)

    high = max(
        (one[-1] / share for one, share in zip(spent, shares, strict=True) if len(one) and share > 0), default=0.0
    )
    if total(high * 2 + 1) < wanted:
        return float("inf")
    low, high = 0.0, float(high * 2 + 1)
    for _ in range(64):
        middle = (low + high) / 2
        low, high = (low, middle) if total(middle) >= wanted else (middle, high)
    return high


def _shares(
    policy: str, options: Mapping[str, Any], names: list[str], weights: Float64[np.ndarray, " G"]
) -> Float64[np.ndarray, " G"]:
    """Share of each source under a policy, 0 where none of its samples has a score."""
    shares = options.get("shares", "equal") if policy == "quota" else "proportional"
    if shares == "proportional":
        return weights
    if shares == "equal":
        return (weights > 0).astype(float)
    found = np.zeros(len(names))
    present = np.flatnonzero(weights > 0)
    found[present] = named_shares(shares, [names[i] for i in present])
    return found


def _dictionary(column: pa.ChunkedArray) -> tuple[list[str], Int[np.ndarray, " N"]]:
    chunks = column.chunks
    names = chunks[0].dictionary.to_pylist() if chunks else []
    codes = [chunk.indices.to_numpy(zero_copy_only=False) for chunk in chunks]
    return names, np.concatenate(codes) if codes else np.zeros(0, dtype=np.int32)


def _read_rows(path: str | Path, name: str, wanted: Bool[np.ndarray, " N"]) -> pa.Table:
    """Whole rows of a table, read batch by batch."""
    columns = ["sample_id", "row", "source", "n_tokens", "n_loss_tokens", name, f"{name}.raw"]
    kept, first = [], 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(BATCH, columns=columns):
            kept.append(batch.filter(pa.array(wanted[first : first + len(batch)])))
            first += len(batch)
        schema = file.schema_arrow
    fields = pa.schema([schema.field(column) for column in columns])
    return pa.Table.from_batches(kept, schema=fields)
