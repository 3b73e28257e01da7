"""The distribution of log-prob differences over some text, and a verdict.

Two programs that compute the same model sum in different orders, so log-probs differ by rounding. A forgotten bias, a
missing RoPE scaling or a damaged weight shows as more. The limits below are far above the first and, on real text, far
below the second; they are in nats per token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.progress import warn
from megatron_stepkto.checkpoints.convert import COMPANIONS
from megatron_stepkto.evaluation.scorers import Scores, open_scorer
from megatron_stepkto.recipe.prompts import load_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Limits:
    """Of absolute differences, nats. A single token may be an outlier: the largest has a wide limit."""

    mean: float
    p99: float
    max: float


LIMITS = {
    "float32": Limits(mean=2e-5, p99=2e-4, max=2e-3),
    "float16": Limits(mean=5e-3, p99=5e-2, max=0.5),
    "bfloat16": Limits(mean=3e-2, p99=0.25, max=2.0),
}

DEFAULT_TEXT = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many clips did "
    "she sell altogether in April and May? In May she sold 48 / 2 = 24 clips. Altogether she sold 48 + 24 = 72 clips.",
    "Let $f(x) = x^2 - 4x + 7$. Completing the square gives $f(x) = (x - 2)^2 + 3$, so the minimum is \\boxed{3}.",
    "The quick brown fox jumps over the lazy dog. Der schnelle braune Fuchs springt. 敏捷的棕色狐狸跳过懒狗。 🦊",
    "def gcd(a, b):\n    while b:\n        a, b = b, a % b\n    return a\n\nassert gcd(12, 18) == 6\n",
    "Step 1: The train travels 60 miles in the first hour. Step 2: It then slows to 45 miles per hour for two hours, "
    "which is 2 * 45 = 90 miles. Step 3: In total it travels 60 + 90 = 150 miles. The answer is 150.",
    # long enough for positions to matter: a wrong RoPE shows only at late ones
    " ".join(f"{n} squared is {n * n}, and {n} cubed is {n**3};" for n in range(1, 160)),
)


@dataclass(frozen=True)
class Distribution:
    """Absolute differences in nats; ``agree``: share of tokens before which both find the same token likeliest."""

    tokens: int
    mean: float
    median: float
    p99: float
    max: float
    agree: float

    def line(self) -> str:
        return (
            f"{self.tokens:>7}  {self.mean:9.2e}  {self.median:9.2e}  {self.p99:9.2e}  {self.max:9.2e}  "
            f"{100 * self.agree:7.2f}%"
        )


HEADING = f"{'tokens':>7}  {'mean':>9}  {'median':>9}  {'p99':>9}  {'max':>9}  {'argmax':>8}"


def distribution(differences: Tensor, agreements: Tensor) -> Distribution:
    """Args:
    differences: [n] nats. agreements: [n] bool.
    """
    sizes = differences.abs().double()
    median, p99 = (float(sizes.quantile(q)) if sizes.isfinite().all() else math.nan for q in (0.5, 0.99))
    return Distribution(
        tokens=sizes.numel(),
        mean=float(sizes.mean()),
        median=median,
        p99=p99,
        max=float(sizes.max()),
        agree=float(agreements.double().mean()),
    )


@dataclass(frozen=True)
class Comparison:
    names: tuple[str, str]
    dtype: str
    texts: tuple[Distribution, ...]
    total: Distribution
    faults: tuple[str, ...]

    @property
    def same(self) -> bool:
        return not self.faults

    def text(self) -> str:
        lines = [f"A: {self.names[0]}", f"B: {self.names[1]}", "|log p_A - log p_B| per token, in nats:", HEADING]
        lines += [f"{text.line()}  text {number}" for number, text in enumerate(self.texts, 1)]
        lines += [f"{self.total.line()}  all", ""]
        if self.same:
            limits = ", ".join(f"{name} {limit:g}" for name, limit in asdict(LIMITS[self.dtype]).items())
            lines.append(f"SAME: within the limits for {self.dtype}: {limits}")
        else:
            lines.append(f"DIFFERENT for {self.dtype}: {'; '.join(self.faults)}")
        return "\n".join(lines) + "\n"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "limits": asdict(LIMITS[self.dtype]), "same": self.same}


def judge(total: Distribution, limits: Limits) -> list[str]:
    """The numbers that are beyond their limit; NaN counts as beyond."""
    return [
        f"{name} is {getattr(total, name):.2e}, the limit {limit:g}"
        for name, limit in asdict(limits).items()
        if not getattr(total, name) <= limit
    ]


def compare_scores(names: tuple[str, str], ours: Sequence[Scores], theirs: Sequence[Scores], dtype: str) -> Comparison:
    pairs = [(a.log_probs - b.log_probs, a.best == b.best) for a, b in zip(ours, theirs, strict=True)]
    texts = tuple(distribution(*pair) for pair in pairs)
    total = distribution(*(torch.cat(column) for column in zip(*pairs, strict=True)))
    return Comparison(names, dtype, texts, total, tuple(judge(total, LIMITS[dtype])))


def compare(first: str, second: str, text: Path | None, tokenizer: Path | None, dtype: str) -> Comparison:
    """Score the same token ids with both.

    Args:
        first, second: folders or URLs (see ``open_scorer``).
        text: a file with one text a line; None: ``DEFAULT_TEXT``.
        tokenizer: a folder; None: that of the first folder given.
        dtype: in which folders are computed; it also sets the limits.

    Raises:
        UserError: a folder, server or text that cannot be used.
    """
    scorers = [open_scorer(place, DTYPES[dtype]) for place in (first, second)]
    ids = _tokens(text, load_tokenizer(tokenizer or _tokenizer_folder(first, second)))
    limit = min((scorer.max_tokens for scorer in scorers if scorer.max_tokens), default=None)
    if limit and max(map(len, ids)) > limit:
        warn(f"texts of up to {max(map(len, ids))} tokens are cut to the {limit} that both models take")
        ids = [tokens[:limit] for tokens in ids]
    words = min((scorer.words for scorer in scorers if scorer.words), default=None)
    if words and max(map(max, ids)) >= words:
        raise UserError(
            f"the text has token id {max(map(max, ids))}, but a model has only {words} words; give its own --tokenizer"
        )
    ours, theirs = (scorer.score(ids) for scorer in scorers)
    return compare_scores((scorers[0].name, scorers[1].name), ours, theirs, dtype)


def _tokenizer_folder(*places: str) -> Path:
    for place in places:
        for folder in (Path(place) / COMPANIONS, Path(place)):
            if not place.startswith("http") and (folder / "config.json").is_file():
                return folder
    raise UserError("neither side is a folder with a tokenizer: give one with --tokenizer FOLDER")


def _tokens(text: Path | None, tokenizer: Any) -> list[list[int]]:
    lines: Sequence[str] = DEFAULT_TEXT
    if text is not None:
        try:
            lines = [line for line in text.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{text}: expected a text file in UTF-8: {error}") from None
    ids = [[int(token) for token in tokenizer(line)["input_ids"]] for line in lines]
    ids = [tokens for tokens in ids if len(tokens) > 1]
    if not ids:
        raise UserError(f"{text}: expected lines of text, found none of two tokens or more")
    return ids
