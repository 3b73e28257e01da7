"""Reference log-probs: per step, computed once by the layout that trains, kept as a few floats per example."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from megatron_stepkto.base.files import atomic_writer
from megatron_stepkto.megatron.batch import Document, MicroBatch, pack_units

if TYPE_CHECKING:
    from megatron_stepkto.megatron.engine import Engine

# Documents scored between two progress reports. A pass that was cut short goes on at such a boundary, so that its
# documents are packed as they would have been.
REPORT_EVERY = 512


def score_documents(
    engine: Engine,
    documents: Sequence[Document],
    what: Callable[[MicroBatch, Tensor], list[Tensor]],
    after_part: Callable[[dict[str, Tensor]], None] = lambda _: None,
) -> dict[str, Tensor]:
    """``what`` per document ([n] each) under the engine's weights; every rank gets all of them.

    ``after_part`` is called on every rank with what has been found so far, each ``REPORT_EVERY`` documents.
    """
    found: dict[str, Tensor] = {}
    slot = engine.slot()
    for start in range(0, len(documents), REPORT_EVERY):
        part = documents[start : start + REPORT_EVERY]
        batches = pack_units([[document] for document in part], slot)
        scored = engine.score(
            batches, lambda batch, lp: list(zip((d.key for d in batch.documents), what(batch, lp), strict=True))
        )
        mine = {key: value.cpu() for pairs in scored for key, value in pairs} if engine.counts_once else {}
        gathered: list[dict[str, Tensor] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, mine)
        for share in gathered:
            found.update(share or {})
        after_part(found)
    assert len(found) == len({document.key for document in documents})
    return found


def per_step(batch: MicroBatch, token_log_probs: Tensor) -> list[Tensor]:
    """Log-prob of each document's steps."""
    return list(batch.step_sums(token_log_probs).split([len(d.steps) for d in batch.documents]))


def per_token(batch: MicroBatch, token_log_probs: Tensor) -> list[Tensor]:
    """Log-prob of each document's response tokens."""
    return list(token_log_probs.split([len(d.response) for d in batch.documents]))


def save_references(path: Path, references: dict[str, Tensor], fingerprint: str) -> None:
    """Write atomically; ``fingerprint`` says of which data and model they are."""
    keys = sorted(references)
    content = save(
        {
            "values": torch.cat([references[key] for key in keys]),
            "sizes": torch.tensor([references[key].numel() for key in keys]),
        },
        metadata={"keys": "\0".join(keys), "fingerprint": fingerprint},
    )
    with atomic_writer(path, "wb") as file:
        file.write(content)


def load_references(path: Path, fingerprint: str) -> dict[str, Tensor]:
    """What ``save_references`` wrote; nothing when there is no such file, or it is of other data or another model."""
    if not path.is_file():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            if metadata["fingerprint"] != fingerprint:
                return {}
            parts = file.get_tensor("values").split(file.get_tensor("sizes").tolist())
            return dict(zip(metadata["keys"].split("\0"), parts, strict=True))
    except (SafetensorError, KeyError):
        return {}
