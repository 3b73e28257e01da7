"""Training examples on disk: Arrow tables that every rank maps, so that its own memory does not grow with the data.

A folder holds ``samples.arrow`` (each solution once: its tokens, steps and labels) and ``examples.arrow`` (which of
them train, with which KL partner, on which side of which pair). Both are Arrow IPC files, which pandas reads with
``read_feather``. Rows are written in a stream and read one at a time.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.records import KLPartner, Label, TrainExample, TrainStep, read_records
from megatron_stepkto.base.storage import writing

if TYPE_CHECKING:
    import pyarrow as pa

SAMPLES, EXAMPLES = "samples.arrow", "examples.arrow"
Indices = NDArray[np.int64]
NONE = -1  # of a label, a partner or a side
SIDES = ("chosen", "rejected")
ROWS = 1024  # of a record batch: what a writer holds in memory


@dataclass(frozen=True, slots=True)
class Solution:
    """One sampled solution, as views of the mapped file.

    prompt, response: [P], [R] int32 tokens. step_ends: [S] int32, one past each step's last response token.
    step_labels: [S] int8; with outcome 1 (right), 0 (wrong) or -1 (not judged). log_probs: [R] float32 of the sampler,
    or empty.
    """

    sample_id: str
    problem_id: str
    prompt: NDArray[np.int32]
    response: NDArray[np.int32]
    step_ends: NDArray[np.int32]
    step_labels: NDArray[np.int8]
    outcome: int
    log_probs: NDArray[np.float32]


def label_number(label: Label) -> int:
    return NONE if label is None else label


def label_of(number: int) -> Label:
    return {1: 1, 0: 0}.get(int(number))  # type: ignore[return-value]


# --- writing -------------------------------------------------------------------------------------------------


class ExampleWriter:
    """Writes both tables in a stream. Rows of ``add_sample`` are what ``add_example`` refers to, in any order."""

    def __init__(self, samples: IO[bytes], examples: IO[bytes]) -> None:
        self.samples = _Table(samples, _sample_schema())
        self.examples = _Table(examples, _example_schema())

    def add_sample(
        self,
        sample_id: str,
        problem_id: str,
        prompt: Sequence[int],
        response: Sequence[int],
        step_ends: Sequence[int],
        step_labels: Sequence[Label],
        outcome: Label,
        log_probs: Sequence[float] | None = None,
    ) -> int:
        """Add a solution; returns its row. See ``Solution`` for the values."""
        return self.samples.add(
            sample_id,
            problem_id,
            np.asarray(prompt, np.int32),
            np.asarray(response, np.int32),
            np.asarray(step_ends, np.int32),
            np.asarray([label_number(label) for label in step_labels], np.int8),
            label_number(outcome),
            max(max(prompt), max(response)),
            np.asarray(log_probs if log_probs is not None else (), np.float32),
        )

    def add_example(
        self, example_id: str, sample: int, partner: int | None, pair_id: str | None, side: str | None
    ) -> int:
        """Add an example of the solution in row ``sample``, with the KL partner in row ``partner``."""
        number = NONE if side is None else SIDES.index(side)
        return self.examples.add(example_id, sample, NONE if partner is None else partner, pair_id, number)

    def close(self) -> None:
        self.samples.close()
        self.examples.close()


class _Table:
    """An Arrow file that grows by record batches of ``ROWS``; all but the last are that long."""

    def __init__(self, file: IO[bytes], schema: pa.Schema) -> None:
        import pyarrow as pa

        self.schema, self.writer = schema, pa.ipc.new_file(file, schema)
        self.rows: list[tuple[Any, ...]] = []
        self.count = 0

    def add(self, *row: Any) -> int:
        self.rows.append(row)
        self.count += 1
        if len(self.rows) == ROWS:
            self._flush()
        return self.count - 1

    def _flush(self) -> None:
        import pyarrow as pa

        columns = zip(*self.rows, strict=True)
        arrays = [pa.array(values, field.type) for field, values in zip(self.schema, columns, strict=True)]
        self.writer.write_batch(pa.record_batch(arrays, schema=self.schema))
        self.rows = []

    def close(self) -> None:
        if self.rows:
            self._flush()
        self.writer.close()


def _sample_schema() -> pa.Schema:
    import pyarrow as pa

    tokens = pa.list_(pa.int32())
    return pa.schema({
        "sample_id": pa.string(), "problem_id": pa.string(), "prompt_token_ids": tokens, "token_ids": tokens,
        "step_ends": tokens, "step_labels": pa.list_(pa.int8()), "outcome": pa.int8(), "largest_token": pa.int32(),
        "token_log_probs": pa.list_(pa.float32()),
    })  # fmt: skip


def _example_schema() -> pa.Schema:
    import pyarrow as pa

    return pa.schema({
        "example_id": pa.string(), "sample": pa.int64(), "kl_partner": pa.int64(), "pair_id": pa.string(),
        "side": pa.int8(),
    })  # fmt: skip


@contextlib.contextmanager
def writing_examples(folder: Path) -> Iterator[ExampleWriter]:
    """A writer into ``folder``, which appears complete, by rename, or, without an example or on an error, not at all.

    One process writes at a time. What is written is in the system's cache: the stage flushes it.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        with writing(folder):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            with (partial / SAMPLES).open("wb") as samples, (partial / EXAMPLES).open("wb") as examples:
                writer = ExampleWriter(samples, examples)
                yield writer
                writer.close()
            shutil.rmtree(folder, ignore_errors=True)
            if writer.examples.count:
                partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_examples(folder: Path, examples: Iterable[TrainExample]) -> int:
    """Write examples that are not judged samples, in a stream but for their KL partners; returns their number."""
    with writing_examples(folder) as writer:
        _add_all(writer, examples)
    return writer.examples.count


def _add_all(writer: ExampleWriter, examples: Iterable[TrainExample]) -> None:
    """Solutions first, then partners that are none of the solutions, then the examples."""
    rows: dict[str, int] = {}
    waiting: list[tuple[str, KLPartner | None, str | None, str | None]] = []
    for e in examples:
        ends, labels = _steps(e.steps)
        rows[e.example_id] = writer.add_sample(
            e.example_id, e.problem_id, e.prompt_token_ids, e.token_ids, ends, labels, e.outcome, e.token_log_probs
        )
        waiting.append((e.example_id, e.kl_partner, e.pair_id, e.side))
    for name, partner, pair_id, side in waiting:
        other = None
        if partner is not None:
            if partner.example_id not in rows:
                ends, labels = _steps(partner.steps)
                rows[partner.example_id] = writer.add_sample(
                    partner.example_id, "", [0], partner.token_ids, ends, labels, None
                )
            other = rows[partner.example_id]
        writer.add_example(name, rows[name], other, pair_id, side)


def _steps(steps: Sequence[TrainStep]) -> tuple[list[int], list[Label]]:
    return [step.token_end for step in steps], [step.label for step in steps]


# --- reading -------------------------------------------------------------------------------------------------


class Examples(Sequence[TrainExample]):
    """Examples in a mapped file. Columns of a number per row are in memory; tokens, steps and names are read by row.

    sample, partner: [N] int64, rows of the solutions; partner is -1 without a KL pair. side: [N] int8, 0 chosen,
    1 rejected, -1 neither. Of each solution [M]: prompt_tokens, response_tokens, num_steps: int32; outcome: int8;
    largest_token: int32; has_log_probs: bool.
    """

    def __init__(self, samples: pa.NativeFile | pa.Buffer, examples: pa.NativeFile | pa.Buffer) -> None:
        self._samples, self._examples = _Columns(samples), _Columns(examples)
        self.sample, self.partner, self.side = (self._examples.numbers(n) for n in ("sample", "kl_partner", "side"))
        self.prompt_tokens, self.response_tokens, self.num_steps, log_probs = (
            self._samples.sizes(name) for name in ("prompt_token_ids", "token_ids", "step_ends", "token_log_probs")
        )
        self.outcome, self.largest_token = (self._samples.numbers(name) for name in ("outcome", "largest_token"))
        self.has_log_probs = log_probs > 0

    @classmethod
    def open(cls, path: Path) -> Examples:
        """Examples of a folder that ``writing_examples`` wrote, or JSON lines of an earlier version, then in memory.

        Raises:
            UserError: there are none, or they are damaged.
        """
        import pyarrow as pa

        if path.is_file():
            return cls.of(read_records(path, TrainExample))
        try:
            return cls(*(pa.memory_map(str(path / name)) for name in (SAMPLES, EXAMPLES)))
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{path}: expected training examples, they do not read: {error}; remove the folder and make it again"
            ) from None

    @classmethod
    def of(cls, examples: Iterable[TrainExample]) -> Examples:
        import pyarrow as pa

        files = BytesIO(), BytesIO()
        writer = ExampleWriter(*files)
        _add_all(writer, examples)
        writer.close()
        return cls(*(pa.py_buffer(file.getbuffer()) for file in files))

    def __len__(self) -> int:
        return len(self.sample)

    def example_id(self, index: int) -> str:
        return str(self._examples.cell("example_id", index))

    def pair_id(self, index: int) -> str | None:
        return self._examples.cell("pair_id", index)

    def side_name(self, index: int) -> str | None:
        side = int(self.side[index])
        return None if side == NONE else SIDES[side]

    def outcomes(self) -> NDArray[np.int8]:
        """[N] outcome of each example."""
        return self.outcome[self.sample]

    def pairs(self) -> tuple[Indices, NDArray[np.bool_]]:
        """[N] number of each example's pair, in order of appearance, and whether it has one."""
        column = self._examples.table.column("pair_id").combine_chunks().dictionary_encode()
        missing = np.asarray(column.is_valid())
        return np.asarray(column.indices.fill_null(NONE)).astype(np.int64), missing

    def solution(self, row: int) -> Solution:
        """The solution in a row of the samples."""
        cell, values = self._samples.cell, self._samples.values
        return Solution(
            cell("sample_id", row),
            cell("problem_id", row),
            values("prompt_token_ids", row),
            values("token_ids", row),
            values("step_ends", row),
            values("step_labels", row),
            int(self.outcome[row]),
            values("token_log_probs", row),
        )

    def step_labels(self, rows: Indices) -> NDArray[np.int8]:
        """Labels of all steps of the solutions in ``rows``, one after another."""
        return np.concatenate([self._samples.values("step_labels", row) for row in rows] or [np.zeros(0, np.int8)])

    def __getitem__(self, index: Any) -> Any:
        """The example, or list of examples, in Python's own types."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        own = self.solution(self.sample[index])
        partner = None
        if self.partner[index] != NONE:
            other = self.solution(self.partner[index])
            partner = KLPartner(
                example_id=other.sample_id, token_ids=other.response.tolist(), steps=_train_steps(other)
            )
        return TrainExample(
            example_id=self.example_id(index),
            problem_id=own.problem_id,
            prompt_token_ids=own.prompt.tolist(),
            token_ids=own.response.tolist(),
            steps=_train_steps(own),
            outcome=label_of(own.outcome),
            kl_partner=partner,
            pair_id=self.pair_id(index),
            side=self.side_name(index),
            token_log_probs=own.log_probs.tolist() if own.log_probs.size else None,
        )


def _train_steps(solution: Solution) -> list[TrainStep]:
    starts = [0, *solution.step_ends.tolist()]
    spans = zip(starts, starts[1:], solution.step_labels, strict=False)
    return [TrainStep(token_start=a, token_end=b, label=label_of(label)) for a, b, label in spans]


class _Columns:
    """The columns of an Arrow file as views, by record batch."""

    def __init__(self, source: pa.NativeFile | pa.Buffer) -> None:
        import pyarrow as pa

        self.reader = pa.ipc.open_file(source)
        batches = [self.reader.get_batch(i) for i in range(self.reader.num_record_batches)]
        self.table = pa.Table.from_batches(batches, self.reader.schema)
        self.lists = {
            name: [(np.asarray(part.offsets), np.asarray(part.values)) for part in self.table.column(name).chunks]
            for name, kind in zip(self.table.column_names, self.table.schema.types, strict=True)
            if pa.types.is_list(kind)
        }

    def numbers(self, name: str) -> NDArray[Any]:
        return self.table.column(name).to_numpy()

    def sizes(self, name: str) -> NDArray[np.int32]:
        """[rows] int32 length of each list."""
        return np.concatenate([np.diff(offsets) for offsets, _ in self.lists[name]] or [np.zeros(0, np.int32)])

    def cell(self, name: str, row: int) -> Any:
        batch, place = divmod(int(row), ROWS)
        return self.table.column(name).chunk(batch)[place].as_py()

    def values(self, name: str, row: int) -> NDArray[Any]:
        batch, place = divmod(int(row), ROWS)
        offsets, values = self.lists[name][batch]
        return values[offsets[place] : offsets[place + 1]]
