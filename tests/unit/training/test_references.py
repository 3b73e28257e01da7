"""A pass over documents in parts, on an engine whose results depend on the micro-batch and on nothing else."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_stepkto.base.errors import MachineFault
from megatron_stepkto.base.examples import Examples
from megatron_stepkto.megatron import patches as cpu

cpu.install()  # micro-batches import Megatron

from megatron_stepkto.megatron.batch import Documents, MicroBatch, Part, Slot  # noqa: E402
from megatron_stepkto.training import references  # noqa: E402
from megatron_stepkto.training.references import (  # noqa: E402
    StepValues,
    open_references,
    read_references,
    score_documents,
)
from tests.builders import random_examples  # noqa: E402

DOCUMENTS = Documents([Part(Examples.of(random_examples(60)), np.arange(60))])
TOKENS = int(DOCUMENTS.lengths.sum())


class Asked(Exception):
    """A request to stop."""


class StandIn:
    """One rank of an engine of two layers; each micro-batch takes ``seconds`` of a clock of its own."""

    counts_once = True

    def __init__(self, clock: list[float], seconds: float, pipeline: int = 1) -> None:
        self.clock, self.seconds = clock, seconds
        self.settings = SimpleNamespace(parallel=SimpleNamespace(pipeline=pipeline))
        self.calls: list[list[list[str]]] = []
        self._after_layer: Callable[[float], None] = lambda _: None

    def slot(self) -> Slot:
        return Slot(0, 1, capacity=100, multiple=1, bins_multiple=1, device=torch.device("cpu"))

    @contextlib.contextmanager
    def layer_by_layer(self, done: Callable[[float], None]) -> Iterator[None]:
        self._after_layer = done
        yield

    def score(self, batches: Sequence[MicroBatch], what: Callable[[MicroBatch, torch.Tensor], Any]) -> list[Any]:
        self.calls.append([[document.key for document in batch.documents] for batch in batches])
        results = []
        for number, batch in enumerate(batches):
            for layer in (1, 2):
                self.clock[0] += self.seconds / 2
                self._after_layer(number + layer / 2)
            results.append(what(batch, torch.zeros(0)))
        return results


def value(batch: MicroBatch, _: torch.Tensor) -> list[torch.Tensor]:
    """Of a document: what else is in its micro-batch, and in which order."""
    rng = random.Random("|".join(document.key for document in batch.documents))
    return [torch.tensor([rng.random()]) for _ in batch.documents]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Of this process group of one rank."""
    now = [0.0]
    monkeypatch.setattr(references, "time", SimpleNamespace(monotonic=lambda: now[0]))
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield now
    dist.destroy_process_group()


def score(engine: StandIn, documents: Documents = DOCUMENTS, **how: Any) -> list[float]:
    """One value per document."""
    found: dict[int, float] = {}
    score_documents(engine, documents, value, lambda n, x: found.update({n: x.item()}), **how)  # type: ignore[arg-type]
    return [found.get(number, math.nan) for number in range(len(documents))]


def test_parts_take_two_seconds_or_one_micro_batch(clock: list[float]) -> None:
    slow, fast, staged = StandIn(clock, 20.0), StandIn(clock, 0.4), StandIn(clock, 20.0, pipeline=3)
    found = [score(engine) for engine in (slow, fast, staged)]
    assert found[0] == found[1] == found[2], "to the last bit, however the pass was cut"
    batches = len(slow.calls)
    assert batches == -(-TOKENS // 100)
    assert [len(call) for call in slow.calls] == [1] * batches
    assert [len(call) for call in fast.calls] == [1, 5, 5, batches - 11]
    assert [len(call) for call in staged.calls] == [3, 3, 3, 3, batches - 12]


def test_what_was_found_is_not_scored_again_and_changes_nothing(clock: list[float]) -> None:
    whole = score(StandIn(clock, 20.0))
    parts = 0

    def stop_after() -> None:
        nonlocal parts
        parts += 1
        if parts == 5:
            raise Asked

    found: dict[int, float] = {}
    first = StandIn(clock, 20.0)
    with pytest.raises(Asked):
        score_documents(first, DOCUMENTS, value, lambda n, x: found.update({n: x.item()}), after_part=stop_after)  # type: ignore[arg-type]
    assert 10 < len(found) < 60
    known = np.array([number in found for number in range(60)])
    second = StandIn(clock, 20.0)
    rest = score(second, known=known)
    assert [found.get(n, x) for n, x in enumerate(rest)] == whole
    kept = {DOCUMENTS[number].key for number in found}
    assert not {key for call in second.calls for batch in call for key in batch} & kept
    # half of a micro-batch is worth nothing: the rest of it alone would be rounded otherwise
    half = np.arange(60) == min(found)
    assert score(StandIn(clock, 20.0), known=half) == whole


def test_progress_counts_tokens_from_the_first_layer_on(clock: list[float]) -> None:
    shown: list[tuple[int, int]] = []
    engine = StandIn(clock, 20.0)
    score(engine, progress=lambda *now: shown.append(now))
    assert {total for _, total in shown} == {TOKENS}
    done = [number for number, _ in shown]
    assert done == sorted(done)
    sizes = {document.key: len(document) for document in DOCUMENTS}
    first = sum(sizes[key] for key in engine.calls[0][0])
    assert done[:3] == [0, round(first / 2), first]
    assert done[-1] == TOKENS


def test_values_stay_in_the_file_and_unknown_ones_are_nan(tmp_path: Path) -> None:
    """Documents of 2, 1 and 3 steps: what is written to the second attempt's array is beside the first's."""
    path, num_steps = tmp_path / "reference.npy", np.array([2, 1, 3], np.int32)
    first = StepValues(num_steps, open_references(path, 6))
    assert first.are_finite().tolist() == [False] * 3
    first.put(2, torch.tensor([-1.5, -2.5, -3.5], dtype=torch.float64))
    first.values[0] = -9.0  # half of a document counts as none
    first.flush()
    second = StepValues(num_steps, open_references(path, 6))
    assert second.are_finite().tolist() == [False, False, True]
    second.put(0, torch.tensor([-0.25, -0.5], dtype=torch.float64))
    second.put(1, torch.tensor([-0.75], dtype=torch.float64))
    assert np.load(path).tolist() == [-0.25, -0.5, -0.75, -1.5, -2.5, -3.5]
    assert second.of(1).tolist() == [-0.75]
    assert second.of(1, 3).tolist() == [-0.75, -1.5, -2.5, -3.5]
    assert np.isnan(open_references(path, 7)).all(), "another number of steps is another data set"


def test_a_node_waits_for_the_values_that_rank_0_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "reference.npy"
    values = open_references(path, 3)
    values[:] = [-1.0, -2.0, -3.0]
    check = StepValues(np.array([3], np.int32), values).checksum()
    assert read_references(path, check).tolist() == [-1.0, -2.0, -3.0]
    now = [0.0]
    monkeypatch.setattr(references, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=late(now, path, values)))
    values[1] = -7.0  # as a node that still sees an older file
    assert read_references(path, check).tolist() == [-1.0, -2.0, -3.0]
    assert 10 < now[0] < references.VISIBLE_S
    path.unlink()
    with pytest.raises(MachineFault, match="this node does not see the reference's log-probs"):
        read_references(path, check)
    assert now[0] > references.VISIBLE_S


def late(now: list[float], path: Path, values: Any) -> Callable[[float], None]:
    """A clock that sleeps; the file becomes right after ten seconds."""

    def sleep(seconds: float) -> None:
        now[0] += seconds
        if now[0] > 10:
            values[1] = -2.0

    return sleep
