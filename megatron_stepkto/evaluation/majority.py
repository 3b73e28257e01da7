"""The answer that most of a problem's samples give."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from megatron_stepkto.answers.equivalence import EquivalenceChecker
from megatron_stepkto.answers.text import normalise
from megatron_stepkto.base.records import JudgedSample

Same = Callable[[str, str], bool]  # are two extracted answers equal?


def majority_is_right(samples: Sequence[JudgedSample], same: Same) -> bool:
    """Is the most frequent answer right? A tie goes to the answer seen first.

    Answers vote by class: one normal form, or two that ``same`` calls equal. Solutions that state no answer
    and those whose answer could not be judged do not vote; without any vote the problem is not solved.
    """
    classes: list[_AnswerClass] = []
    for sample in samples:
        if sample.extracted_answer is None or sample.outcome is None:
            continue
        form = normalise(sample.extracted_answer)
        found = next((c for c in classes if c.holds(form, sample.outcome, same)), None)
        if found is None:
            found = _AnswerClass(form, sample.outcome)
            classes.append(found)
        found.votes += 1
    return bool(classes) and max(classes, key=lambda c: c.votes).outcome == 1


@dataclass
class _AnswerClass:
    form: str
    outcome: int
    votes: int = 0

    def holds(self, form: str, outcome: int, same: Same) -> bool:
        """All right answers equal the gold answer, so each other; a right and a wrong one differ."""
        if outcome != self.outcome:
            return False
        return outcome == 1 or form == self.form or same(self.form, form)


def answer_comparison(samples: Iterable[Sequence[JudgedSample]], checker: EquivalenceChecker) -> Same:
    """Decide every pair of wrong answers that ``majority_is_right`` may ask about, in one go.

    A pair that cannot be decided is two answers.
    """
    pairs: list[tuple[str, str]] = []
    for group in samples:
        wrong = [s.extracted_answer for s in group if s.outcome == 0 and s.extracted_answer is not None]
        forms = list(dict.fromkeys(map(normalise, wrong)))
        pairs += [(one, other) for i, one in enumerate(forms) for other in forms[i + 1 :]]
    verdicts = checker.check_many(pairs)
    equal = {pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict.verdict == "right"}
    return lambda one, other: (one, other) in equal or (other, one) in equal
