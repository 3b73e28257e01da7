"""A number of an update that is not finite: which records it comes from, and what to do.

All ranks see the same pooled value, so all of them search together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.examples import Examples, Indices
from megatron_stepkto.megatron.batch import Document, Documents, MicroBatch, Part, pack_units
from megatron_stepkto.megatron.engine import Engine
from megatron_stepkto.training.job import Job, finished_checkpoints
from megatron_stepkto.training.references import StepValues, per_step, score_documents

MAX_BLAMED = 20  # records named


def bad_units(
    units: Sequence[Sequence[Document]], engine: Engine, loss_of: Callable[[Sequence[MicroBatch]], float]
) -> list[str]:
    """Records whose loss or gradient is not finite on its own, found by halving; the first ``MAX_BLAMED``.

    Args:
        loss_of: the pooled loss of micro-batches, whose gradients it leaves in the engine.
    """
    if math.isfinite(loss_of(pack_units(units, engine.slot()))) and math.isfinite(engine.gradient_norm()):
        return []
    if len(units) == 1:
        return [document.key for document in units[0]]
    found: list[str] = []
    for half in (units[: len(units) // 2], units[len(units) // 2 :]):
        if len(found) < MAX_BLAMED:
            found += bad_units(half, engine, loss_of)
    return found


def bad_pairs(pairs: Indices, engine: Engine, examples: Examples) -> list[str]:
    """KL pairs of these examples whose log-probs are not finite."""
    documents = Documents([Part(examples, pairs, kl=True)])
    found = StepValues(documents.num_steps)
    score_documents(engine, documents, per_step, found.put)
    return sorted(documents[index].key for index in np.flatnonzero(~found.are_finite()))


def not_finite(job: Job, update: int, what: str, records: str, blamed: Sequence[str]) -> UserError:
    """The error to raise. The weights are those of the last update that ended, and its checkpoints are on the disk.

    Args:
        update: from 1. what: the number. records: what ``blamed`` names.
    """
    saved = finished_checkpoints(job.checkpoints)
    more = " and maybe more" if len(blamed) >= MAX_BLAMED else ""
    names = f"{records} concerned: {', '.join(dict.fromkeys(blamed[:MAX_BLAMED]))}{more}"
    return UserError(
        f"update {update}: {what} is not finite; "
        f"{names if blamed else 'each record alone is finite: their sum overflows'}; last good "
        f"checkpoint: {saved[-1][1] if saved else job.initial}; "
        f"{f'{job.advice.without_records}; or ' if blamed else ''}{job.advice.lower_rate}"
    )
