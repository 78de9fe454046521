"""A torch sampler that draws a selection: the same order on every rank, after every resume.

The order of an epoch is computed, never remembered (see `order`), so that a resumed run draws what the uninterrupted one
would have drawn. The price is that `set_epoch` must reach the sampler, which a resumed multi-process Accelerate loop only
does for a sampler installed by `DataLoader.set_sampler`; `selector.integrations.trl.attach` sees to it.

This is a plain `Sampler` and not a `RandomSampler`, which Accelerate would silently replace by its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Shaped
from torch.utils.data import Sampler

from selector.errors import SelectionError
from selector.sampling.order import BLOCK, Groups, deal, id_keys, weighted_order
from selector.selection import Selection


class SelectionSampler(Sampler[int]):
    """Yield the positions of a selection's samples, each once per epoch, in a new order every epoch.

    Args:
        selection: what to draw; its weights decide how early a sample tends to come.
        dataset_ids: [N] the sample id of each row of the data set that is loaded; None when that data set is the one that
            was scored, whose positions the selection knows.
        seed: of all orders, >= 0.
        strata: [K] a label for each sample of the selection, such as its source or its cluster of near-duplicates;
            every batch gets its share of each (see `order.deal`).
        batch_size: distinct samples of an optimizer step over all ranks; used with `strata` alone.
        groups: how samples are repeated, for trainers that draw groups of completions.

    Attributes:
        missing: ids of the selection that the data set does not have; they are not drawn.

    Raises:
        SelectionError: the data set has none of the samples, or names one twice.
    """

    def __init__(
        self,
        selection: Selection,
        *,
        dataset_ids: Sequence[str] | None = None,
        seed: int = 0,
        strata: Shaped[np.ndarray, " K"] | None = None,
        batch_size: int = 1,
        groups: Groups = Groups(),
    ) -> None:
        rows, present = _rows_of(selection, dataset_ids)
        self.missing: tuple[str, ...] = tuple(selection.ids[~present].tolist())
        # Sorted by id, so that ties of the order fall to the lower id wherever the rows lie.
        kept = np.flatnonzero(present)
        kept = kept[np.argsort(selection.ids[kept].astype(str), kind="stable")]
        self._rows = rows[kept]
        self._keys = id_keys(selection.ids[kept].tolist())
        self._weights = selection.weights[kept]
        self._strata = None if strata is None else np.asarray(strata)[kept]
        self._seed, self._batch_size, self._groups = seed, batch_size, groups
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration draws; calling it again with the same epoch changes nothing."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._groups.length(len(self._rows))

    def __iter__(self) -> Iterator[int]:
        return self._groups.repeat(self._draws(self._epoch))

    def _draws(self, epoch: int) -> Iterator[int]:
        order = weighted_order(self._keys, self._weights, seed=self._seed, epoch=epoch)
        if self._strata is not None:
            order = deal(order, self._strata[order], self._batch_size)
        for start in range(0, len(order), BLOCK):  # Python integers a block at a time: ten million take 400 MB
            yield from self._rows[order[start : start + BLOCK]].tolist()


def _rows_of(selection: Selection, dataset_ids: Sequence[str] | None) -> tuple[np.ndarray, np.ndarray]:
    """The row of each sample of the selection, and whether the data set has it."""
    if dataset_ids is None:
        return selection.rows, np.ones(len(selection), dtype=bool)
    position = {sample_id: row for row, sample_id in enumerate(dataset_ids)}
    if len(position) < len(dataset_ids):
        raise SelectionError(
            "the data set names a sample twice", got=f"{len(dataset_ids)} rows, {len(position)} ids",
            allowed="unique ids", fix="remove the duplicates, or name another id column",
        )  # fmt: skip
    present = np.array([sample_id in position for sample_id in selection.ids], dtype=bool)
    if not present.any():
        raise SelectionError(
            "the data set has no sample of the selection", got=f"ids such as {next(iter(position), None)!r}",
            allowed=f"ids such as {selection.ids[0] if len(selection) else None!r}",
            fix="train on the data set that was scored, or name the column that holds its sample ids",
        )  # fmt: skip
    return np.array([position.get(sample_id, -1) for sample_id in selection.ids], dtype=np.int64), present
