"""A pass over documents in parts, on an engine whose results depend on the micro-batch and on nothing else."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_stepkto.base.files import sha256_of
from megatron_stepkto.megatron import patches as cpu

cpu.install()  # micro-batches import Megatron

from megatron_stepkto.megatron.batch import MicroBatch, Slot, solution_document  # noqa: E402
from megatron_stepkto.training import references  # noqa: E402
from megatron_stepkto.training.references import load_references, save_references, score_documents  # noqa: E402
from tests.builders import random_examples  # noqa: E402

DOCUMENTS = [solution_document(example) for example in random_examples(60)]
TOKENS = sum(map(len, DOCUMENTS))


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


def test_parts_take_two_seconds_or_one_micro_batch(clock: list[float]) -> None:
    slow, fast, staged = StandIn(clock, 20.0), StandIn(clock, 0.4), StandIn(clock, 20.0, pipeline=3)
    found = [score_documents(engine, DOCUMENTS, value) for engine in (slow, fast, staged)]  # type: ignore[arg-type]
    assert found[0] == found[1] == found[2], "to the last bit, however the pass was cut"
    batches = len(slow.calls)
    assert batches == -(-TOKENS // 100)
    assert [len(call) for call in slow.calls] == [1] * batches
    assert [len(call) for call in fast.calls] == [1, 5, 5, batches - 11]
    assert [len(call) for call in staged.calls] == [3, 3, 3, 3, batches - 12]


def test_what_was_found_is_not_scored_again_and_changes_nothing(clock: list[float]) -> None:
    whole = score_documents(StandIn(clock, 20.0), DOCUMENTS, value)  # type: ignore[arg-type]
    kept: dict[str, torch.Tensor] = {}

    def stop_after(found: dict[str, torch.Tensor]) -> None:
        kept.update(found)
        if len(found) > 20:
            raise Asked

    first = StandIn(clock, 20.0)
    with pytest.raises(Asked):
        score_documents(first, DOCUMENTS, value, after_part=stop_after)  # type: ignore[arg-type]
    assert 20 < len(kept) < 60
    second = StandIn(clock, 20.0)
    assert score_documents(second, DOCUMENTS, value, known=kept) == whole  # type: ignore[arg-type]
    assert not {key for call in second.calls for batch in call for key in batch} & set(kept)
    # half of a micro-batch is worth nothing: the rest of it alone would be rounded otherwise
    half = dict(list(whole.items())[:1])
    third = StandIn(clock, 20.0)
    assert score_documents(third, DOCUMENTS, value, known=half) == whole  # type: ignore[arg-type]


def test_progress_counts_tokens_from_the_first_layer_on(clock: list[float]) -> None:
    shown: list[tuple[int, int]] = []
    known = score_documents(StandIn(clock, 20.0), DOCUMENTS[:8], value)  # type: ignore[arg-type]
    engine = StandIn(clock, 20.0)
    score_documents(engine, DOCUMENTS, value, progress=lambda *now: shown.append(now))  # type: ignore[arg-type]
    assert {total for _, total in shown} == {TOKENS}
    done = [number for number, _ in shown]
    assert done == sorted(done)
    sizes = {document.key: len(document) for document in DOCUMENTS}
    first = sum(sizes[key] for key in engine.calls[0][0])
    assert done[:3] == [0, round(first / 2), first]
    assert done[-1] == TOKENS
    assert len(known) == 8


def test_the_file_has_the_same_bytes_whatever_the_order(tmp_path: Path) -> None:
    values = {f"e{number}": torch.tensor([number / 7], dtype=torch.float64) for number in range(20)}
    hashes = set()
    for number, keys in enumerate([list(values), list(values)[::-1]] * 8):
        path = tmp_path / f"{number}.safetensors"
        save_references(path, {key: values[key] for key in keys}, "1234")
        hashes.add(sha256_of(path))
    assert len(hashes) == 1
    assert load_references(path, "1234") == values
    assert load_references(path, "another") == {}
