"""Groups of rollouts taken apart, for whoever wants to score and select single rollouts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datasets

    from selector.data.layout import Layout


def one_row_per_rollout(dataset: datasets.Dataset, layout: Layout) -> datasets.Dataset:
    """A data set whose rows are single rollouts; its ids, rows and selections refer to it and no longer to the groups.

    Args:
        dataset: rows of format `rollouts`.
        layout: of these rows.

    Returns:
        Columns prompt, completion, advantage and group (the group's row), and the others that the layout names. A group
        that is no list of rollouts stays one row, which cannot be scored and says so.
    """
    columns = {role: column for role, column in layout.columns.items() if role not in ("completions", "advantages")}
    columns |= {column: column for column in (layout.id_column, layout.source_column) if column is not None}

    def take_apart(batch: Mapping[str, list[Any]], rows: list[int]) -> dict[str, list[Any]]:
        taken: dict[str, list[Any]] = {name: [] for name in (*columns, "completion", "advantage", "group")}
        groups = zip(batch[layout.columns["completions"]], batch[layout.columns["advantages"]], strict=True)
        for i, (completions, advantages) in enumerate(groups):
            whole = (
                isinstance(completions, list)
                and isinstance(advantages, list)
                and len(completions) == len(advantages) > 0
            )
            rollouts = list(zip(completions, advantages, strict=True)) if whole else [(None, None)]
            for number, (completion, advantage) in enumerate(rollouts):
                for name, column in columns.items():
                    value = batch[column][i]
                    taken[name].append(f"{value}/{number}" if name == layout.id_column and value is not None else value)
                taken["completion"].append(completion)
                taken["advantage"].append(advantage)
                taken["group"].append(rows[i])
        return taken

    return dataset.map(
        take_apart,
        with_indices=True,
        batched=True,
        batch_size=100,
        remove_columns=dataset.column_names,
        desc="taking groups apart",
    )
