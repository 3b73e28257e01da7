"""The on-disk contracts between stages: JSON lines with stable keys.

Spans are half-open. Token positions index the response (``token_ids``), not the prompt. A label is
1 (right), 0 (wrong) or null (not judged: it takes no part in any loss or rate).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.files import atomic_writer, describe, parse_json
from megatron_stepkto.base.locks import exclusive_lock
from megatron_stepkto.base.tables import is_table, table_rows

Label = Literal[0, 1] | None
# strict: "5" and true are not tokens; stored as int32
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31, strict=True)]], Field(min_length=1)]


# All but white space. Form feeds and backspaces come from LaTeX that lost its backslashes: "\frac", "\boxed".
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


# JSON can escape half a surrogate pair, which UTF-8 cannot encode: such a row could be read but not written.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]")


def written(text: str) -> str:
    """Return the text unchanged. Raises ValueError where it is blank or contains control characters."""
    if not text.strip():
        raise ValueError("must not be blank")
    if found := _CONTROL.search(text):
        raise ValueError(
            f"holds the control character U+{ord(found[0]):04X} (character {found.start()}, counted from 0); remove it"
            + (r', or write its command with two backslashes, such as "\\frac"' if found[0] in "\b\f" else "")
        )
    return text


def _named(text: str) -> str:
    if any(character in text for character in "\t\n\r"):
        raise ValueError("must be one line without tabs")
    return written(text)


Written = Annotated[str, AfterValidator(written)]
Name = Annotated[str, AfterValidator(_named)]


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Problem(Record):
    """A problem to solve. Extra keys (level, subject, ...) are kept."""

    model_config = ConfigDict(extra="allow", frozen=True)

    problem_id: Name
    problem: Written
    answer: Written | None = Field(description="null: only a reward model can judge the outcome")
    solution: str | None = None
    split: str | None = None


class Sampler(Record):
    """How a solution was sampled. ``model``: the checkpoint; ``seed``: of this one sample."""

    model: str
    temperature: float
    top_p: float
    seed: int


class Sample(Record):
    """One sampled solution. Token ids are the sampler's own: text is never tokenised again.

    ``token_log_probs`` (nats, temperature 1, one per response token) is present on the samples that the
    trainer compares with its own log-probs.
    """

    problem_id: str
    sample_id: str
    prompt_token_ids: TokenIds
    token_ids: TokenIds
    text: str
    finish_reason: str
    sampler: Sampler | None = None
    token_log_probs: list[float] | None = None

    @model_validator(mode="after")
    def _check_log_probs(self) -> Self:
        check_log_probs(self.token_log_probs, len(self.token_ids))
        return self


class Opinion(Record):
    """What one member of a combined judge said of a step; fields as of ``Step``."""

    label: Label = None
    votes: list[Label] | None = None
    score: float | None = None


class Step(Record):
    """One step: characters [start, end) of the text and tokens [token_start, token_end) of the response.

    ``votes`` and ``score`` (share of votes or probability of "right") are what the label was derived from; of a
    combined judge's label it is the opinions of its ``members``, by their names.
    """

    start: int = Field(ge=0)
    end: int = Field(ge=0)
    token_start: int = Field(ge=0)
    token_end: int = Field(ge=0)
    label: Label = None
    votes: list[Label] | None = None
    score: float | None = None
    members: dict[str, Opinion] | None = Field(None, exclude_if=lambda members: members is None)

    @model_validator(mode="after")
    def _check_span(self) -> Self:
        if self.start > self.end:
            raise ValueError(f"characters [{self.start}, {self.end}) end before they start")
        return self


class Judge(Record):
    """What gave the labels: names of the outcome and process judges.

    A reward model's outcome comes with its score and the threshold above which a solution is right.
    """

    outcome: str
    process: str
    score: float | None = None
    threshold: float | None = None


class JudgedSample(Sample):
    """A sample with its steps labelled. Every response token belongs to exactly one step."""

    steps: list[Step] = Field(min_length=1)
    outcome: Label = None
    extracted_answer: str | None = None
    judge: Judge

    @model_validator(mode="after")
    def _check_cover(self) -> Self:
        check_cover(self.steps, len(self.token_ids))
        return self


class TrainStep(Record):
    token_start: int = Field(ge=0)
    token_end: int = Field(ge=0)
    label: Label


def check_cover(steps: Sequence[Step | TrainStep], num_tokens: int) -> None:
    """Raises ValueError unless every response token is in exactly one step."""
    position = 0
    for number, step in enumerate(steps):
        if step.token_start != position or step.token_end < step.token_start:
            raise ValueError(
                f"step {number} covers tokens [{step.token_start}, {step.token_end}), "
                f"expected it to start at {position}"
            )
        position = step.token_end
    if position != num_tokens:
        raise ValueError(f"steps cover {position} of {num_tokens} response tokens")


def check_log_probs(log_probs: Sequence[float] | None, num_tokens: int) -> None:
    """Raises ValueError when log-probs are given, and not one per token."""
    if log_probs is not None and len(log_probs) != num_tokens:
        raise ValueError(f"{len(log_probs)} token_log_probs for {num_tokens} token_ids")


class KLPartner(Record):
    """Another problem's solution, paired with this example's prompt to estimate z_o and z_s."""

    example_id: str
    token_ids: TokenIds
    steps: list[TrainStep] = Field(min_length=1)

    @model_validator(mode="after")
    def _check_cover(self) -> Self:
        check_cover(self.steps, len(self.token_ids))
        return self


class TrainExample(Record):
    """What the trainer reads. ``pair_id`` binds the two sides, chosen and rejected, of a preference pair."""

    example_id: str
    problem_id: str
    prompt_token_ids: TokenIds
    token_ids: TokenIds
    steps: list[TrainStep] = Field(min_length=1)
    outcome: Label = None
    kl_partner: KLPartner | None = None
    pair_id: str | None = None
    side: Literal["chosen", "rejected"] | None = None
    token_log_probs: list[float] | None = None

    @model_validator(mode="after")
    def _check_tokens(self) -> Self:
        check_cover(self.steps, len(self.token_ids))
        check_log_probs(self.token_log_probs, len(self.token_ids))
        return self


class LogRatios(Record):
    """log pi_trained - log pi_ref of an example's steps, in nats, after the last update."""

    example_id: str
    steps: list[float]


R = TypeVar("R", bound=BaseModel)
T = TypeVar("T")


def parse_row(line: bytes, parse: Callable[[dict[str, Any]], T]) -> T:
    """One line of a JSON-lines file through ``parse``.

    Raises:
        ValueError: what is wrong with the row, as one clause.
    """
    try:
        row = parse_json(line.rstrip())  # json counts columns from 1 again after a newline
        if not isinstance(row, dict):
            raise ValueError(f"expected a JSON object, got {type(row).__name__}")
        if (b"\\u" in line or b"\xed" in line) and _SURROGATE.search(line):  # few lines need the slower search
            json.dumps(row, ensure_ascii=False).encode()
        return parse(row)
    except ValidationError as error:
        raise ValueError(describe(error)) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"broken JSON at column {error.colno}: {error.msg}") from None
    except UnicodeEncodeError:
        raise ValueError("holds half a surrogate pair, which is not a character") from None
    except KeyError as error:
        raise ValueError(f"missing key {error}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (TypeError, AttributeError) as error:  # values of types that the parser does not expect
        raise ValueError(f"unexpected layout: {error}") from None


def count_rows(path: Path) -> int:
    """Rows of a file that ``parse_rows`` reads, without parsing JSON lines.

    Raises:
        UserError: there is no such file.
    """
    return sum(1 for _ in _raw_rows(path))


def bad_row(path: Path, number: int, reason: object, *, may_set_aside: bool = True) -> UserError:
    """may_set_aside: whether the command takes a quarantine; else the file is one that a command writes."""
    other = "pass --quarantine FILE to set bad rows aside" if may_set_aside else "make the file again"
    return UserError(f"{path}:{number}: {reason}; correct the row, or {other}")


def parse_rows(path: Path, parse: Callable[[dict[str, Any]], T]) -> Iterator[tuple[int, bytes, T | ValueError]]:
    """(line number, row, its record or what is wrong with it) of JSON lines, or of a table (base/tables.py).

    Blank lines are skipped; the rows of a table are counted from 1.

    Raises:
        UserError: there is no such file.
    """
    for number, raw in _raw_rows(path):
        try:
            found: T | ValueError = parse_row(raw, parse)
        except UserError:  # not about this row alone
            raise
        except ValueError as error:
            found = error
        yield number, raw, found


def _raw_rows(path: Path) -> Iterator[tuple[int, bytes]]:
    if is_table(path):
        yield from table_rows(path)
        return
    if not path.is_file():
        raise UserError(f"{path}: expected a file of JSON lines, found none")
    with path.open("rb") as file:
        yield from ((number, raw) for number, raw in enumerate(file, 1) if raw.strip())


def rejected(path: Path, number: int, raw: bytes, reason: object) -> dict[str, Any]:
    """A bad row as a quarantine holds it."""
    row = raw.decode("utf-8", "replace").strip()
    return {"file": str(path), "line": number, "error": str(reason), "row": row}


def read_rows(
    path: Path, parse: Callable[[dict[str, Any]], R], *, quarantine: Path | Literal[False] | None = False
) -> Iterator[R]:
    """Parse a JSON-lines file row by row with ``parse``.

    Blank lines are skipped. Without ``quarantine`` the first bad row is an error; with it bad rows are written there
    as ``{"file", "line", "error", "row"}``, and the good ones are returned.

    Args:
        quarantine: what the user chose, None for nothing; False where the command does not offer the choice.

    Raises:
        UserError: the file is missing or empty, a row is bad, or no row is good. Names file:line.
    """
    good = 0
    bad: list[dict[str, Any]] = []
    for number, raw, found in parse_rows(path, parse):
        if not isinstance(found, ValueError):
            good += 1
            yield found
        elif not quarantine:
            raise bad_row(path, number, found, may_set_aside=quarantine is None)
        else:
            bad.append(rejected(path, number, raw, found))
    if bad and quarantine:
        set_aside(quarantine, path, bad)
    if not good:
        raise UserError(
            f"{path}: expected at least one record, got {len(bad)} bad rows and no good ones"
            if bad
            else f"{path}: expected at least one record, the file is empty"
        )


def set_aside(quarantine: Path, source: Path, bad: Sequence[dict[str, Any]]) -> None:
    """Write bad rows of ``source`` to the quarantine, replacing those that an earlier run of the same check wrote.

    Raises:
        UserError: the file exists and is not a quarantine.
    """
    # Another run may write to the same file: the lock keeps either from losing the other's rows.
    with exclusive_lock(quarantine.with_name(f".{quarantine.name}.lock"), str(quarantine), wait=True):
        kept = []
        for line in quarantine.read_bytes().splitlines() if quarantine.is_file() else []:
            try:
                row = parse_json(line)
                same = row["file"] == str(source) and set(row) == set(bad[0])
            except (ValueError, TypeError, KeyError):
                raise UserError(
                    f"{quarantine}: expected the quarantine file of an earlier run, got other text; choose a new file"
                ) from None
            kept += [] if same else [line + b"\n"]
        with atomic_writer(quarantine, "wb") as out:
            out.writelines(kept)
            out.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in bad)


def read_records(path: Path, model: type[R], *, quarantine: Path | Literal[False] | None = False) -> Iterator[R]:
    """``read_rows`` for rows in a record format of this package."""
    return read_rows(path, model.model_validate, quarantine=quarantine)


def write_records(path: Path, records: Iterable[BaseModel]) -> int:
    """Write records as JSON lines, atomically; returns their number."""
    count = 0
    with atomic_writer(path) as file:
        for record in records:
            file.write(record.model_dump_json(exclude_none=False) + "\n")
            count += 1
    return count
