"""Contamination check: compares training problems with evaluation sets, and refuses any overlap."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_stepkto.base.errors import UserError

NGRAM = 13  # words, as in the GPT-3 report (Brown et al. 2020, appendix C)
_WORD = re.compile(r"\w+")
_TOKEN = re.compile(r"\w+|[^\w\s]")
SHOWN = 20  # overlaps that an error lists


@dataclass(frozen=True)
class Text:
    """A problem with its place ("file:line") and id."""

    where: str
    problem_id: str
    problem: str


@dataclass(frozen=True)
class Overlap:
    """``kind``: "same" (equal except for white space and case) or "13-gram"."""

    train: Text
    held_out: Text
    kind: str


def find_overlaps(train: Iterable[Text], held_out: Sequence[Text], ngrams: bool) -> list[Overlap]:
    """Training problems that are also in a held-out set, each with the first match.

    Args:
        ngrams: also match problems that share any 13 consecutive words. That finds copies with other numbers, but also
            problems that share only a figure's code or the wording that asks for the answer.
    """
    same: dict[str, Text] = {}
    by_gram: dict[tuple[str, ...], Text] = {}
    for text in held_out:
        same.setdefault(_normal(text.problem), text)
        if ngrams:
            for gram in _grams(text.problem):
                by_gram.setdefault(gram, text)
    found = []
    for text in train:
        if (other := same.get(_normal(text.problem))) is not None:
            found.append(Overlap(text, other, "same"))
        elif ngrams and (gram := next((gram for gram in _grams(text.problem) if gram in by_gram), ())):
            found.append(Overlap(text, by_gram[gram], "13-gram"))
    return found


def _normal(problem: str) -> str:
    return " ".join(_TOKEN.findall(problem.casefold()))


def _grams(problem: str) -> Iterable[tuple[str, ...]]:
    words = _WORD.findall(problem.casefold())  # signs are not words: "x^{2}" and "x^2" match
    return (tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1))


def check_apart(train: Iterable[Text], held_out: Sequence[Text], *, ngrams: bool, allow: bool) -> dict[str, object]:
    """Refuse training problems that are also in a held-out set.

    Returns:
        {} where there are none; with ``allow``, for the manifest: {"overlaps", "overlapping_ids"}.

    Raises:
        UserError: lists the first overlaps, with file:line and id of both sides, and their number.
    """
    overlaps = find_overlaps(train, held_out, ngrams)
    if not overlaps:
        return {}
    if allow:
        return {"overlaps": len(overlaps), "overlapping_ids": [overlap.train.problem_id for overlap in overlaps]}
    lines = [
        f"  {o.train.where} ({o.train.problem_id}) = {o.held_out.where} ({o.held_out.problem_id}), {o.kind}: "
        f"{' '.join(o.train.problem.split()):.90}"
        for o in overlaps[:SHOWN]
    ]
    more = f"\n  and {len(overlaps) - SHOWN} more" if len(overlaps) > SHOWN else ""
    raise UserError(
        f"{len(overlaps)} training problems are also in an evaluation set, so its scores would be meaningless:\n"
        + "\n".join(lines)
        + more
        + "\nremove them from one side, or pass --allow-overlap, which is recorded in the manifest"
    )
