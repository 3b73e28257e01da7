"""Reference log-probs: per step, computed once by the layout that trains, kept as a few floats per example."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.files import atomic_writer
from megatron_stepkto.base.packing import pack, share_out
from megatron_stepkto.megatron.batch import Document, MicroBatch, Slot

if TYPE_CHECKING:
    from megatron_stepkto.megatron.engine import Engine
    from megatron_stepkto.training.job import Job

# Documents whose micro-batches are planned together: looking for room among all would take minutes.
PACKED_TOGETHER = 512
# Length of a part of a pass: between parts all ranks learn of a request to stop, and the results so far can be saved.
PART_S = 2.0
SAVE_EVERY_S = 60.0


def score_documents(
    engine: Engine,
    documents: Sequence[Document],
    what: Callable[[MicroBatch, Tensor], list[Tensor]],
    *,
    known: Mapping[str, Tensor] | None = None,
    after_part: Callable[[dict[str, Tensor]], None] = lambda _: None,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> dict[str, Tensor]:
    """``what`` per document ([n] each) under the engine's weights; every rank gets all of them.

    A micro-batch depends on ``documents`` and its capacity alone. So the values are the same to the last bit however
    the pass was cut into parts, and whatever an earlier attempt had found.

    Args:
        known: what an earlier attempt found; micro-batches of these alone are passed over.
        after_part: called on every rank with all that is found by then. A part is one micro-batch per rank (in a
            pipeline one per stage), or as many as take ``PART_S``.
        progress: called on every rank with the tokens that are done and all, at the start and after each layer.
    """
    slot = engine.slot()
    found = {d.key: known[d.key] for d in documents if d.key in known} if known else {}
    total = slot.size(documents)
    bins = [members for members in _bins(documents, slot) if any(d.key not in found for d in members)]
    sizes = [slot.size(members) for members in bins]
    done = total - sum(sizes)
    progress(done, total)
    shares = share_out([[number] for number in range(len(bins))], sizes, slot.ranks, slot.bins_multiple)
    smallest = math.lcm(slot.bins_multiple, engine.settings.parallel.pipeline)
    start, length = 0, smallest
    while start < len(shares[0]):
        part = [number for share in shares for members in share[start : start + length] for number in members]
        members = shares[slot.rank][start : start + length]
        batches = [slot.micro_batch([d for number in numbers for d in bins[number]]) for numbers in members]
        tokens = sum(sizes[number] for number in part)
        begun = time.monotonic()
        with engine.layer_by_layer(partial(_advance, progress, done, tokens / len(batches), total)):
            mine = _score(engine, batches, what)
        seconds = time.monotonic() - begun
        for rank_found, rank_seconds in _gather((mine, seconds)):
            found.update(rank_found)
            seconds = max(seconds, rank_seconds)
        start, done = start + len(batches), done + tokens
        length = smallest * max(1, int(PART_S * len(batches) / max(seconds, 1e-6) / smallest))
        progress(done, total)
        after_part(found)
    assert len(found) == len({document.key for document in documents})
    return found


def _bins(documents: Sequence[Document], slot: Slot) -> list[list[Document]]:
    """The documents of each micro-batch."""
    found = []
    for start in range(0, len(documents), PACKED_TOGETHER):
        block = documents[start : start + PACKED_TOGETHER]
        found += [[block[i] for i in members] for members in pack([slot.size([d]) for d in block], slot.capacity)]
    return found


def _advance(progress: Callable[[int, int], None], done: int, each: float, total: int, micro_batches: float) -> None:
    progress(min(total, round(done + each * micro_batches)), total)


def _score(
    engine: Engine, batches: Sequence[MicroBatch], what: Callable[[MicroBatch, Tensor], list[Tensor]]
) -> dict[str, Tensor]:
    """Of this rank's micro-batches; empty on all but one rank of each replica."""
    scored = engine.score(
        batches, lambda batch, lp: list(zip((d.key for d in batch.documents), what(batch, lp), strict=True))
    )
    return {key: value.cpu() for pairs in scored for key, value in pairs} if engine.counts_once else {}


def _gather(mine: tuple[dict[str, Tensor], float]) -> list[tuple[dict[str, Tensor], float]]:
    gathered = [mine] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    return gathered


def find_references(
    engine: Engine, job: Job, documents: Sequence[Document], score: Callable[..., dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Reference log-probs per step ([S] float64) of ``documents`` by key.

    From the file of an earlier attempt, or by a pass of the reference, which is saved every ``SAVE_EVERY_S``.

    Args:
        score: ``Trainer._score``. When asked to stop, it saves what the pass has found and ends the process.

    Raises:
        UserError: some are not finite.
    """
    found = load_references(job.references, job.fingerprint)
    counts = [0] * dist.get_world_size()
    dist.all_gather_object(counts, len(found))
    if len(set(counts)) > 1:  # some node's cache holds an older file: ranks must score the same documents
        found = {}
    if any(document.key not in found for document in documents):
        saved = time.monotonic()

        def save(values: dict[str, Tensor]) -> None:
            nonlocal saved
            if dist.get_rank() == 0:
                save_references(job.references, values, job.fingerprint)
            saved = time.monotonic()

        def keep(more: dict[str, Tensor], last: bool) -> None:
            if last or time.monotonic() - saved > SAVE_EVERY_S:
                save(found | more)

        if job.reference is not None:
            engine.checkpoints.load_weights(job.reference)
        base = job.settings.lora is not None and job.settings.reference == "initial"
        with engine.without_adapters() if base else contextlib.nullcontext():
            found |= score(documents, per_step, known=found, keep=keep)
        save(found)
        if job.reference is not None:
            engine.checkpoints.load_weights(job.initial)
    if bad := sorted(key for key, values in found.items() if not values.isfinite().all()):
        raise UserError(
            f"the reference's log-probs of {len(bad)} of {len(found)} documents are not finite: "
            f"{', '.join(bad[:20])}; remove these records, or check the weights of {job.reference or job.initial}"
        )
    return found


def per_step(batch: MicroBatch, token_log_probs: Tensor) -> list[Tensor]:
    """Log-prob of each document's steps."""
    return list(batch.step_sums(token_log_probs).split([len(d.steps) for d in batch.documents]))


def per_token(batch: MicroBatch, token_log_probs: Tensor) -> list[Tensor]:
    """Log-prob of each document's response tokens."""
    return list(token_log_probs.split([len(d.response) for d in batch.documents]))


def save_references(path: Path, references: dict[str, Tensor], fingerprint: str) -> None:
    """Write atomically, the same bytes for the same values; ``fingerprint`` says of which data and model they are."""
    keys = sorted(references)
    # one entry of metadata: safetensors writes several in a random order
    content = save(
        {
            "values": torch.cat([references[key] for key in keys]),
            "sizes": torch.tensor([references[key].numel() for key in keys]),
        },
        metadata={"about": json.dumps({"fingerprint": fingerprint, "keys": keys})},
    )
    with atomic_writer(path, "wb") as file:
        file.write(content)


def load_references(path: Path, fingerprint: str) -> dict[str, Tensor]:
    """What ``save_references`` wrote; nothing when there is no such file, or it is of other data or another model."""
    if not path.is_file():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["about"])
            if about["fingerprint"] != fingerprint:
                return {}
            parts = file.get_tensor("values").split(file.get_tensor("sizes").tolist())
            return dict(zip(about["keys"], parts, strict=True))
    except (SafetensorError, KeyError):
        return {}
