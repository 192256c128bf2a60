"""Shuffled batches of rows in memory, cut so that the device never waits for them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from python_models.data import TaskData


class Batch(NamedTuple):
    """Rows, on the device: weights and domain where the data has them."""

    numeric: Tensor
    categorical: Tensor
    labels: Tensor
    weights: Tensor | None
    domain: Tensor | None

    def __len__(self) -> int:
        return self.labels.shape[0]


class Batches:
    """Batches of an epoch, its order fixed by seed and epoch alone: an epoch can begin at any of its batches.

    On a CPU, and on a GPU whose free memory holds the data four times over, the rows lie on the device and a batch is a
    gather there. Otherwise a thread gathers the next ones into pinned memory and copies them on a stream of its own
    while the device computes. The last batch may be short.

    Args:
        data: on the CPU.
        batch_size: rows of a batch.
        device: where the batches go.
        seed: of the shuffles.
        prefetch: batches that the thread is ahead; 0 keeps the rows on the device. None decides as said.
    """

    def __init__(
        self, data: TaskData, batch_size: int, device: torch.device, seed: int, prefetch: int | None = None
    ) -> None:
        self.rows, self.batch_size, self.device, self.seed = len(data), batch_size, device, seed
        columns = [data.numeric, data.categorical, data.labels, data.weights, data.domain]
        if prefetch is None:
            size = sum(c.nbytes for c in columns if c is not None)
            fits = device.type != "cuda" or 4 * size < torch.cuda.mem_get_info(device)[0]
            prefetch = 0 if fits else 3
        self.prefetch = prefetch
        self.columns = [c if c is None or prefetch else c.to(device) for c in columns]

    def __len__(self) -> int:
        """Batches of an epoch."""
        return -(-self.rows // self.batch_size)

    def order(self, epoch: int) -> Tensor:
        """The rows' order in an epoch, int64 [N], on the CPU."""
        state = np.random.SeedSequence([self.seed, epoch]).generate_state(1, np.uint64)
        return torch.randperm(self.rows, generator=torch.Generator().manual_seed(int(state[0]) >> 1))

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from the `first` on."""
        order = self.order(epoch)
        if self.prefetch:
            return self._prefetched(order.split(self.batch_size)[first:] if len(order) else ())
        order = order.to(self.device)
        return (self._gather(rows) for rows in (order.split(self.batch_size)[first:] if len(order) else ()))

    def _gather(self, rows: Tensor) -> Batch:
        return Batch(*(None if column is None else column.index_select(0, rows) for column in self.columns))

    def _pinned(self, rows: Tensor) -> Batch:
        """A batch in pinned memory, gathered straight into it."""
        if self.device.type != "cuda":
            return self._gather(rows)
        found = []
        for column in self.columns:
            if column is not None:
                out = torch.empty(len(rows), *column.shape[1:], dtype=column.dtype, pin_memory=True)
                column = torch.index_select(column, 0, rows, out=out)
            found.append(column)
        return Batch(*found)

    def _prefetched(self, chunks: tuple[Tensor, ...]) -> Iterator[Batch]:
        ready: queue.Queue = queue.Queue(self.prefetch)
        leave = threading.Event()

        def put(item: object) -> bool:
            while not leave.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    return True
                except queue.Full:
                    continue
            return False

        def work() -> None:
            try:
                stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
                for rows in chunks:
                    if not put(self._sent(self._pinned(rows), stream)):
                        return
                put(None)
            except BaseException as error:  # shown where the batches are used
                put(error)

        thread = threading.Thread(target=work, daemon=True, name="batches")
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                batch, _, copied = item
                if copied is not None:
                    now = torch.cuda.current_stream(self.device)
                    now.wait_event(copied)
                    for tensor in batch:
                        if tensor is not None:
                            tensor.record_stream(now)
                yield batch
        finally:
            leave.set()
            thread.join()

    def _sent(self, batch: Batch, stream: torch.cuda.Stream | None) -> tuple[Batch, Batch, torch.cuda.Event | None]:
        """The batch on the device, the pinned one, which must outlive the copy, and when the copy is done."""
        if stream is None:
            return batch, batch, None
        with torch.cuda.stream(stream):
            moved = Batch(*(None if t is None else t.to(self.device, non_blocking=True) for t in batch))
            done = torch.cuda.Event()
            done.record(stream)
        return moved, batch, done
