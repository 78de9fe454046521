"""What the processes of one run have to agree on: who writes, what is finished, and whether anybody has failed.

Plain data parallelism needs no wrapper around the model: every process holds it whole, takes the next batch whenever it is
free and waits for nobody, so that all finish together however fast each is. They meet at the start, where they also divide
the tokenizing, before the first write and at the end. A process that fails brings its error to the next meeting instead of
leaving the others waiting for it.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from selector.errors import SelectorError
from selector.store.reader import FeatureStore
from selector.store.schema import Manifest

PATIENCE = timedelta(days=7)
"""How long a process waits for the others, as one that has failed does for the rest; launchers end all when one dies."""

ITEMS_TOGETHER = 131_072
"""Items whose results the processes send each other at a time; on GPUs these pass through their memory."""

T = TypeVar("T")


def process_state() -> PartialState:
    """This process's place among those that `accelerate launch` or `torchrun` started; begins their communication.

    Raises:
        SelectorError: the launcher started several processes, but Accelerate sees one: each would score everything.
    """
    launched = int(os.environ.get("WORLD_SIZE", 1))
    # without being told so, Accelerate takes several processes without GPUs for one
    on_cpu = (launched > 1 and not torch.cuda.is_available()) or parse_flag_from_env("ACCELERATE_USE_CPU")
    state = PartialState(cpu=on_cpu, timeout=PATIENCE)
    if state.num_processes != launched and launched > 1:
        raise SelectorError(
            "the processes do not know of each other", got=f"WORLD_SIZE={launched}, but Accelerate sees {state.num_processes}",
            fix="start with `accelerate launch` or `torchrun`, and call selector before anything else makes an Accelerator",
        )  # fmt: skip
    return state


@contextmanager
def together(state: PartialState) -> Iterator[None]:
    """Fail on every process when the block has failed on one, and wait for all at its end.

    Args:
        state: place of this process.

    Raises:
        SelectorError: naming the process that failed, on the processes that did not; the error itself where it happened.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # whatever it is, the others must hear of it before it ends this process
        failure = error
    if state.num_processes > 1:
        message = None if failure is None else f"{type(failure).__name__}: {failure}"
        messages = gather_object([message])
        failed = [rank for rank, text in enumerate(messages) if text is not None]
        if failed and failure is None:
            raise SelectorError(f"process {failed[0]} of {state.num_processes} has failed", got=messages[failed[0]])
    if failure is not None:
        raise failure


def from_main(value: T, state: PartialState) -> T:
    """The main process's value, on every process.

    Args:
        value: what this process has; it matters on the main process only.
        state: place of this process.
    """
    if state.num_processes == 1:
        return value
    values: list[Any] = [value]
    broadcast_object_list(values)
    return values[0]


def finished_rows(store: Path, manifest: Manifest, state: PartialState) -> set[int]:
    """Rows that are in a shard which any node can see; a row names a sample as long as the data set is the same.

    Args:
        store: directory of the store, on every node's own file system or on one that all share.
        manifest: the manifest in force.
        state: place of this process.
    """
    found = np.empty(0, np.int64)
    if state.is_local_main_process:
        shards = [table["row"].to_numpy() for table in FeatureStore(store, manifest).shards(["row"])]
        found = np.concatenate([found, *shards])
    everywhere = gather_object([found]) if state.num_processes > 1 else [found]
    return set(np.concatenate(everywhere).tolist())


def of_each(value: T, state: PartialState) -> list[T]:
    """The values of all processes, in order of their ranks.

    Args:
        value: of this process.
        state: place of this process.
    """
    return gather_object([value]) if state.num_processes > 1 else [value]


def turns(state: PartialState) -> Iterator[int]:
    """The numbers 0, 1, 2, …, each of which goes to one process: the first that asks when it is due.

    The server by which the launcher has let the processes find each other counts, so no further port has to be open. All
    processes call this together; then each asks when it likes.

    Args:
        state: place of this process.

    Returns:
        This process's numbers, without end, each drawn when it is asked for.

    Raises:
        SelectorError: nobody has told the processes where that server is.
    """
    if state.num_processes == 1:
        return itertools.count()
    if not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise SelectorError(
            "the processes have no server that counts their batches", got="no MASTER_ADDR and MASTER_PORT in the environment",
            fix="start with `accelerate launch` or `torchrun`",
        )  # fmt: skip
    name = from_main(uuid4().hex, state)  # every call counts for itself
    server = TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
        use_libuv=os.environ.get("USE_LIBUV", "1") == "1",
    )  # fmt: skip
    numbers = PrefixStore(name, server)
    return (numbers.add("next", 1) - 1 for _ in itertools.count())


def divided(work: Callable[[range], list[T]], count: int, state: PartialState) -> list[T]:
    """What work on many items gives, each process having done a part of it, on every process.

    Args:
        work: from positions of items to one result for each, in order.
        count: number of items.
        state: place of this process.

    Raises:
        SelectorError: as `together`.
    """
    if state.num_processes == 1:
        return work(range(count))
    done: list[T] = []
    for start in range(0, count, ITEMS_TOGETHER):
        items = range(start, min(start + ITEMS_TOGETHER, count))
        begin, end = (
            len(items) * rank // state.num_processes for rank in (state.process_index, state.process_index + 1)
        )
        with together(state):
            mine = work(items[begin:end])
        for part in of_each(mine, state):
            done += part
    return done


def on_every_file_system(state: PartialState) -> Iterator[bool]:
    """Let the main process go first and then one process of each node, so that nodes without a shared file system write too.

    Args:
        state: place of this process.

    Yields:
        Twice, whether it is this process's turn.
    """
    yield state.is_main_process
    state.wait_for_everyone()
    yield state.is_local_main_process and not state.is_main_process
    state.wait_for_everyone()
