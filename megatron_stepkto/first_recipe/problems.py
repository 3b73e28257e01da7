"""The problems that a first recipe trains and measures on, from files as their publishers ship them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.progress import ProgressBar, warn
from megatron_stepkto.base.records import Problem
from megatron_stepkto.base.tables import splits_of
from megatron_stepkto.problems.datasets import set_names
from megatron_stepkto.problems.published import Published, hold_out, read_published, without
from megatron_stepkto.recipe.prompts import BadText, ProblemCheck, Prompts

HELD_OUT_SHARE, HELD_OUT = 0.1, 500
SHOWN = 3
TRAIN = "train"


@dataclass(frozen=True)
class Problems:
    """files: by name without suffix, ``train`` first; the others measure. train_why, test_why: where they are from.

    rejected: bad rows, as of ``Published``. notes: what was left out or changed, for the user.
    """

    files: dict[str, list[Problem]]
    train_why: str
    test_why: str
    rejected: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def lines(self, quarantine: Path) -> list[str]:
        """What ``stepkto init`` prints of the rows. quarantine: where it wrote the bad ones."""
        if not self.rejected:
            return self.notes
        shown = [f"  {row['file']}:{row['line']}: {row['error']}" for row in self.rejected[:SHOWN]]
        more = [f"  and {len(self.rejected) - SHOWN} more"] if len(self.rejected) > SHOWN else []
        head = f"rows that cannot be used, written to {quarantine}: {len(self.rejected)}"
        return [head, *shown, *more, *self.notes]


def choose_problems(sources: Sequence[Path], tests: Sequence[Path], check: ProblemCheck) -> Problems:
    """Read the files of all sources; no problem that measures, white space and case aside, trains.

    Args:
        sources: files and folders; of a folder the split ``train`` trains, else the files whose names tell no split.
        tests: files and folders, a data set each. None: the split of the sources that measures, else a tenth of the
            problems, ``HELD_OUT`` at most.
        check: raises ValueError for a problem to refuse; its row is set aside.

    Raises:
        UserError: a file is missing, or nothing is left to train on.
    """
    named = _listed(sources)
    train_files, held_out = _source_files(sources)
    train = _read(train_files, check, "problems")
    if tests:
        names = ["test"]
        if len(tests) > 1:
            names = [f"test/{name}" for name in set_names([str(test) for test in tests], "--test")]
        chosen = [_test_files(test) for test in tests]
        measured = {name: _read(files, check, "test problems") for name, files in zip(names, chosen, strict=True)}
        why = f"from {_listed(tests)}"
    elif held_out:
        measured, why = {"test": _read(held_out, check, "test problems")}, f"split of {named} that measures"
    else:
        count = max(1, min(HELD_OUT, int(HELD_OUT_SHARE * len(train.problems))))
        if len(train.problems) <= count:
            raise UserError(f"{named}: expected two problems or more, to train on and to test on, found one")
        train.problems, chosen_problems = hold_out(train.problems, count)
        measured, why = {"test": Published(chosen_problems)}, f"held out of {named} by the hash of their texts"
    left = without(train.problems, [problem for each in measured.values() for problem in each.problems])
    if overlapping := len(train.problems) - len(left):
        warn(f"{overlapping} training problems are also test problems, and were left out of training")
    if not left:
        raise UserError(f"{named}: all its problems are test problems; nothing is left to train on")
    read = {TRAIN: train, **measured}
    return Problems(
        {TRAIN: left, **{name: each.problems for name, each in measured.items()}}, f"from {named}", why,
        [row for each in read.values() for row in each.rejected], _notes(read),
    )  # fmt: skip


def problem_check(prompts: Prompts, positions: int) -> ProblemCheck:
    """What refuses a problem: special tokens in its text, unknown words, or half of all positions and more."""
    tokenizer = prompts.tokenizer
    unknown = tokenizer.unk_token_id

    def check(problem: Problem) -> Problem:
        prompts.check_problem(problem.problem)
        text = problem.problem
        # a token is a character or more; and of byte-level tokenizers none is unknown
        if len(text) > positions // 2 or unknown is not None:
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            if len(ids) > positions // 2:
                raise BadText(f"has {len(ids)} tokens; the model has {positions} positions, for prompt and response")
            if unknown in ids:
                raise BadText("has words that the model's tokenizer does not know")
        return problem

    return check


def _source_files(sources: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """(the files that train, those of the splits that measure)."""
    train: list[Path] = []
    held_out: list[Path] = []
    unnamed: list[Path] = []
    for source in sources:
        if not source.exists():
            raise UserError(f"{source}: expected a file or folder of problems, found none")
        splits = splits_of(source)
        found = splits.get(TRAIN) or splits.get("")
        if not found:
            raise UserError(f"{source}: holds {' and '.join(sorted(splits))} problems alone; name those that train")
        train += found
        held_out += splits.get(_measuring(splits), [])
        unnamed += splits.get("", []) if TRAIN in splits else []
    if left_out := [file for file in unnamed if file not in train]:
        warn(f"left out, as their names tell no split: {_listed(left_out)}; name each with --problems")
    return list(dict.fromkeys(train)), list(dict.fromkeys(held_out))


def _test_files(source: Path) -> list[Path]:
    """Of a folder the split that measures, else the files whose names tell no split, else all."""
    splits = splits_of(source)
    measuring = splits.get(_measuring(splits))
    chosen = measuring or splits.get("") or [file for files in splits.values() for file in files]
    left_out = [file for name in ("", TRAIN) for file in splits.get(name, ()) if file not in chosen]
    if left_out:
        warn(f"--test {source}: took {_listed(chosen)}; left out {_listed(left_out)}: name each data set with --test")
    return chosen


def _measuring(splits: Mapping[str, Sequence[Path]]) -> str:
    """The split that measures, or a name that none has."""
    return next((split for split in ("test", "validation", "valid", "val", "dev", "eval") if split in splits), "none")


def _read(files: Sequence[Path], check: ProblemCheck, title: str) -> Published:
    with ProgressBar(f"reading {title}", len(files), "files") as bar:
        done = 0

        def report(rows: int) -> None:
            nonlocal done
            if rows % 1000 == 0:
                bar.update(done, f"{rows:,} rows")

        found = read_published(files, check, report)
        bar.update(len(files), f"{len(found.problems):,} problems")
    return found


def _notes(read: Mapping[str, Published]) -> list[str]:
    notes = []
    repeated = [row for each in read.values() for row in each.repeated]
    if repeated:
        more = ", ..." if len(repeated) > SHOWN else ""
        notes.append(f"repeated problems, left out: {len(repeated)} ({', '.join(repeated[:SHOWN])}{more})")
    if renamed := [f"{name}.jsonl" for name, each in read.items() if each.renamed]:
        notes.append(f"ids were not unique: those in {_listed(renamed)} are hashes of the texts")
    return notes


def _listed(items: Sequence[Path | str]) -> str:
    return " and ".join(map(str, items)) if len(items) < 3 else ", ".join(map(str, items))
