"""Reference log-probs: per step, computed once by the layout that trains, kept as a few floats per example."""

from __future__ import annotations

import contextlib
import math
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from megatron_stepkto.base.errors import MachineFault, UserError
from megatron_stepkto.base.examples import Indices
from megatron_stepkto.base.files import atomic_writer
from megatron_stepkto.base.packing import pack, share_out
from megatron_stepkto.megatron.batch import Documents, MicroBatch

if TYPE_CHECKING:
    from megatron_stepkto.megatron.engine import Engine
    from megatron_stepkto.training.job import Job

# Documents whose micro-batches are planned together: looking for room among all would take minutes.
PACKED_TOGETHER = 512
# Length of a part of a pass: between parts all ranks learn of a request to stop, and the results so far can be saved.
PART_S = 2.0
SAVE_EVERY_S = 60.0
VISIBLE_S = 120.0  # by then every node sees what another wrote, or shares no folder with it
BLOCK = 1 << 20  # values written at once

T = TypeVar("T")


def score_documents(
    engine: Engine,
    documents: Documents,
    what: Callable[[MicroBatch, Tensor], list[Tensor]],
    take: Callable[[int, Tensor], None],
    *,
    known: NDArray[np.bool_] | None = None,
    after_part: Callable[[], None] = lambda: None,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> None:
    """``what`` per document ([n] each) under the engine's weights; ``take`` gets all of them, on every rank.

    A micro-batch depends on ``documents`` and its capacity alone. So the values are the same to the last bit however
    the pass was cut into parts, and whatever an earlier attempt had found.

    Args:
        take: called with the index of a document and its values, in any order.
        known: [documents], the same on every rank, what an earlier attempt found; micro-batches of these alone are
            passed over.
        after_part: called on every rank after each part of the pass. A part is one micro-batch per rank (in a
            pipeline one per stage), or as many as take ``PART_S``.
        progress: called on every rank with the tokens that are done and all, at the start and after each layer.
    """
    slot = engine.slot()
    lengths = slot.sizes(documents.lengths)
    bins = [members for members in _bins(lengths, slot.capacity) if known is None or not known[members].all()]
    sizes = [int(lengths[members].sum()) for members in bins]
    total = int(lengths.sum())
    done = total - sum(sizes)
    progress(done, total)
    shares = share_out([[number] for number in range(len(bins))], sizes, slot.ranks, slot.bins_multiple)
    smallest = math.lcm(slot.bins_multiple, engine.settings.parallel.pipeline)
    start, length = 0, smallest
    while start < len(shares[0]):
        part = [number for share in shares for members in share[start : start + length] for number in members]
        mine = [
            [index for number in numbers for index in bins[number]]
            for numbers in shares[slot.rank][start : start + length]
        ]
        batches = [slot.micro_batch([documents[index] for index in members]) for members in mine]
        tokens = sum(sizes[number] for number in part)
        begun = time.monotonic()
        with engine.layer_by_layer(partial(_advance, progress, done, tokens / len(batches), total)):
            scored = engine.score(batches, lambda batch, log_probs: [x.cpu() for x in what(batch, log_probs)])
        seconds = time.monotonic() - begun
        # only the last stage of a pipeline has scores, and one rank of each replica counts
        found = [pair for pairs in map(zip, mine, scored) for pair in pairs] if engine.counts_once else []
        for rank_found, rank_seconds in _gather((found, seconds)):
            seconds = max(seconds, rank_seconds)
            for index, values in rank_found:
                take(index, values)
        start, done = start + len(batches), done + tokens
        length = smallest * max(1, int(PART_S * len(batches) / max(seconds, 1e-6) / smallest))
        progress(done, total)
        after_part()


def _bins(sizes: Indices, capacity: int) -> list[Indices]:
    """The documents of each micro-batch, by index."""
    return [
        start + np.array(members, np.int64)
        for start in range(0, len(sizes), PACKED_TOGETHER)
        for members in pack(sizes[start : start + PACKED_TOGETHER].tolist(), capacity)
    ]


def _advance(progress: Callable[[int, int], None], done: int, each: float, total: int, micro_batches: float) -> None:
    progress(min(total, round(done + each * micro_batches)), total)


def _gather(mine: T) -> list[T]:
    gathered = [mine] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    return gathered


def _from_first(value: T) -> T:
    """Rank 0's."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def per_step(batch: MicroBatch, token_log_probs: Tensor) -> list[Tensor]:
    return list(batch.step_sums(token_log_probs).split([d.num_steps for d in batch.documents]))


def per_token(batch: MicroBatch, token_log_probs: Tensor) -> list[Tensor]:
    return list(token_log_probs.split([len(d.response) for d in batch.documents]))


class StepValues:
    """A number per step of each of some documents, NaN until it is known; in memory, or in a file that ranks share.

    values: [S] float64, the documents' steps one after another.
    """

    def __init__(self, num_steps: NDArray[np.int32], values: NDArray[np.float64] | None = None) -> None:
        self.starts = np.concatenate([[0], np.cumsum(num_steps, dtype=np.int64)])
        self.values = np.full(self.starts[-1], np.nan) if values is None else values

    def put(self, document: int, values: Tensor) -> None:
        self.values[self.starts[document] : self.starts[document + 1]] = values.numpy()

    def of(self, start: int, end: int | None = None) -> Tensor:
        """[S] of one document, or of those from ``start`` up to ``end``."""
        end = start + 1 if end is None else end
        return torch.from_numpy(np.array(self.values[self.starts[start] : self.starts[end]]))

    def are_finite(self) -> NDArray[np.bool_]:
        """[documents] whether all values of each are; every document has a step."""
        return np.logical_and.reduceat(np.isfinite(self.values), self.starts[:-1])

    def checksum(self) -> int:
        return zlib.crc32(self.values.data)

    def flush(self) -> None:
        if isinstance(self.values, np.memmap):
            self.values.flush()


def find_references(engine: Engine, job: Job, documents: Documents, score: Callable[..., None]) -> StepValues:
    """Reference log-probs per step of ``documents``, in a file that all ranks map.

    From an earlier attempt, or by a pass of the reference, whose values rank 0 writes as they are found.

    Args:
        score: ``Trainer._score``. When asked to stop, it calls ``keep`` and ends the process.

    Raises:
        UserError: some are not finite.
    """
    path = job.references(documents.digest())
    steps = int(documents.num_steps.sum())
    found = StepValues(documents.num_steps, open_references(path, steps)) if dist.get_rank() == 0 else None
    # as rank 0 sees the file: ranks must score the same documents
    known = _from_first(found.are_finite() if found else np.zeros(0, np.bool_))
    if not known.all():
        saved = time.monotonic()

        def keep(last: bool) -> None:
            nonlocal saved
            if found and (last or time.monotonic() - saved > SAVE_EVERY_S):
                found.flush()
                saved = time.monotonic()

        if job.reference is not None:
            engine.checkpoints.load_weights(job.reference)
        base = job.settings.lora is not None and job.settings.reference == "initial"
        with engine.without_adapters() if base else contextlib.nullcontext():
            score(documents, per_step, found.put if found else lambda *_: None, known=known, keep=keep)
        keep(True)
        if job.reference is not None:
            engine.checkpoints.load_weights(job.initial)
    bad, check = _from_first(
        (np.flatnonzero(~found.are_finite()), found.checksum()) if found else (np.zeros(0, np.int64), 0)
    )
    if bad.size:
        names = ", ".join(sorted({documents[index].key for index in bad})[:20])
        raise UserError(
            f"the reference's log-probs of {bad.size} of {len(documents)} documents are not finite: {names}; "
            f"check the weights of {job.reference or job.initial}, or {job.advice.without_records}"
        )
    return StepValues(documents.num_steps, read_references(path, check))


def open_references(path: Path, steps: int) -> NDArray[np.float64]:
    """[steps] of an earlier attempt, or NaN in a new file; what is written to the array is written to the file."""
    with contextlib.suppress(OSError, ValueError):
        found = np.lib.format.open_memmap(path, mode="r+")
        if found.shape == (steps,) and found.dtype == np.float64:
            return found
    with atomic_writer(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": (steps,)})
        for start in range(0, steps, BLOCK):
            file.write(np.full(min(BLOCK, steps - start), np.nan).tobytes())
    return np.lib.format.open_memmap(path, mode="r+")


def read_references(path: Path, check: int) -> NDArray[np.float64]:
    """The finished file, mapped. check: CRC-32 of its values.

    Raises:
        MachineFault: after ``VISIBLE_S`` this node still does not see them.
    """
    limit = time.monotonic() + VISIBLE_S
    while True:
        with contextlib.suppress(OSError, ValueError):
            found = np.lib.format.open_memmap(path, mode="r")
            if zlib.crc32(found.data) == check:
                return found
        if time.monotonic() > limit:
            raise MachineFault(
                f"{path}: this node does not see the reference's log-probs that rank 0 wrote there; expected a folder "
                "that all nodes share"
            )
        time.sleep(0.5)
