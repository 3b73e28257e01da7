"""Training examples on disk: what was written is read, over the bounds of record batches, and little is in memory."""

from __future__ import annotations

import shutil
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.examples import EXAMPLES, ROWS, SAMPLES, Examples, write_examples, writing_examples
from megatron_stepkto.base.records import KLPartner, TrainExample, TrainStep, write_records
from tests.builders import random_examples

STEPS = [TrainStep(token_start=0, token_end=2, label=1)]
COUNT = ROWS + 300  # two record batches


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[TrainExample], Path]:
    examples = random_examples(COUNT)
    examples[3] = examples[3].model_copy(update={"token_log_probs": [-0.5] * len(examples[3].token_ids)})
    examples[5] = examples[5].model_copy(update={"pair_id": "x", "side": "rejected"})
    folder = tmp_path_factory.mktemp("examples") / "train"
    assert write_examples(folder, examples) == COUNT
    return examples, folder


def test_what_was_written_is_read(made: tuple[list[TrainExample], Path]) -> None:
    examples, folder = made
    read = Examples.open(folder)
    assert len(read) == COUNT
    assert list(read) == examples
    assert read[-1] == examples[-1]
    assert read[ROWS - 1 : ROWS + 1] == examples[ROWS - 1 : ROWS + 1]
    with pytest.raises(IndexError):
        read[COUNT]


def test_columns_are_those_of_the_rows(made: tuple[list[TrainExample], Path]) -> None:
    examples, folder = made
    read = Examples.open(folder)
    own = read.sample
    assert read.prompt_tokens[own].tolist() == [len(e.prompt_token_ids) for e in examples]
    assert read.response_tokens[own].tolist() == [len(e.token_ids) for e in examples]
    assert read.largest_token[own].tolist() == [max(*e.prompt_token_ids, *e.token_ids) for e in examples]
    assert read.outcomes().tolist() == [-1 if e.outcome is None else e.outcome for e in examples]
    assert np.flatnonzero(read.has_log_probs[own]).tolist() == [3]
    assert np.flatnonzero(read.partner >= 0).tolist() == [n for n, e in enumerate(examples) if e.kl_partner]
    labels = [-1 if s.label is None else s.label for n in (ROWS, 2) for s in examples[n].steps]
    assert read.step_labels(own[[ROWS, 2]]).tolist() == labels
    pair, has_pair = read.pairs()
    assert np.flatnonzero(has_pair).tolist() == [5]
    assert pair[[4, 5]].tolist() == [-1, 0]


def test_each_solution_is_stored_once(made: tuple[list[TrainExample], Path]) -> None:
    """A partner is a row of another example; one that is no example has a row of its own."""
    examples, folder = made
    assert pa.ipc.open_file(str(folder / SAMPLES)).read_all().num_rows == COUNT
    other = KLPartner(example_id="elsewhere", token_ids=[7, 8], steps=STEPS)
    alone = Examples.of([examples[0].model_copy(update={"kl_partner": other})])
    assert (alone.sample.tolist(), alone.partner.tolist()) == ([0], [1])
    assert alone[0].kl_partner == other


def test_json_lines_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    examples = random_examples(20)
    write_records(tmp_path / "train.jsonl", examples)
    assert list(Examples.open(tmp_path / "train.jsonl")) == examples


def test_a_writer_holds_one_record_batch(tmp_path: Path) -> None:
    """Peak memory of two record batches and of eight, of solutions of 400 tokens: int32 of one batch, little else."""

    def peak(count: int) -> int:
        tracemalloc.start()
        with writing_examples(tmp_path / str(count)) as writer:
            for number in range(count):
                row = writer.add_sample(str(number), "p", [1] * 100, [2] * 300, [300], [1], 1)
                writer.add_example(str(number), row, None, None, None)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert 400 * 4 * ROWS < peak(2 * ROWS) < 3 * 400 * 4 * ROWS
    assert peak(8 * ROWS) < 1.1 * peak(2 * ROWS)


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def breaks() -> Iterator[TrainExample]:
        yield from random_examples(10)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_examples(tmp_path / "train", breaks())
    assert list(tmp_path.iterdir()) == []
    write_examples(tmp_path / "train", random_examples(10))
    write_examples(tmp_path / "train", random_examples(20))
    assert len(Examples.open(tmp_path / "train")) == 20, "what an interrupted stage left is replaced"
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


@pytest.mark.parametrize("damage", ["cut", "missing", "other"])
def test_damaged_files_are_one_line(made: tuple[list[TrainExample], Path], damage: str, tmp_path: Path) -> None:
    folder = shutil.copytree(made[1], tmp_path / "train")
    if damage == "missing":
        (folder / EXAMPLES).unlink()
    elif damage == "cut":
        (folder / SAMPLES).write_bytes((folder / SAMPLES).read_bytes()[:-100])
    else:
        (folder / SAMPLES).write_text("{}\n" * 100)
    with pytest.raises(UserError, match=r"train: expected training examples, they do not read: .*; remove the folder"):
        Examples.open(folder)
