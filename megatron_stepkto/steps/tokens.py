"""Steps of a solution: characters of the text, and the sampler's own tokens, never re-tokenised."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.records import Step
from megatron_stepkto.steps.text import SplitRule, spans_of_cuts, split_text

REPLACEMENT = "\ufffd"  # what decoding puts in place of bytes that are not a whole character
# A character has at most four bytes and a token at least one: past this many waiting tokens one of the
# boundaries between them is a boundary between characters.
MAX_WAITING_TOKENS = 4


def _byte_tokens(tokenizer: Any) -> dict[int, int]:
    """Id to byte of the tokens <0x00> ... <0xFF> of a tokenizer with byte fallback; none of any other."""
    look_up = getattr(tokenizer, "convert_tokens_to_ids", None)
    if look_up is None or tokenizer.convert_ids_to_tokens(look_up("<0x0A>") or 0) != "<0x0A>":
        return {}
    ids = look_up([f"<0x{byte:02X}>" for byte in range(256)])
    return {token: byte for byte, token in enumerate(ids) if token is not None}


def _byte_run(token_ids: Sequence[int], start: int, byte_of: dict[int, int]) -> bytes:
    """The bytes of the uninterrupted run of byte tokens at ``start``."""
    end = start
    while end < len(token_ids) and token_ids[end] in byte_of:
        end += 1
    return bytes(byte_of[token] for token in token_ids[start:end])


def _starts_in_run(run: bytes) -> list[int]:
    """Character at which each byte of a run of byte tokens starts, counted from the run's first.

    A run is decoded as a whole: where it is not UTF-8, each byte becomes a character of its own, even those that would
    be whole characters alone.
    """
    try:
        run.decode()
    except UnicodeDecodeError:
        return list(range(len(run)))
    starts, begun = [], -1
    for byte in run:
        begun += byte & 0xC0 != 0x80  # not a continuation
        starts.append(begun)
    return starts


def _decode_tokens(token_ids: Sequence[int], tokenizer: Any) -> tuple[str, list[int]]:
    """Text of ``token_ids`` (no special tokens among them) and the character at which each token starts.

    A token starts at the first character that the tokens before it leave unfinished, so the tokens that
    share a character start at the same one. Streaming windows: tokens [anchor, read) are decoded already and
    give context (SentencePiece drops a leading space where there is none), tokens [read, now) wait for a
    whole character. A run of byte tokens is one unit, as it is to the decoder. Each token is decoded a
    bounded number of times.
    """

    def decode(start: int, end: int) -> str:
        window = token_ids[start:end]
        return str(tokenizer.decode(window, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    byte_of = _byte_tokens(tokenizer)
    pieces: list[str] = []
    starts: list[int] = []
    length = anchor = read = 0  # length: characters of tokens [0, read)
    context = ""  # text of tokens [anchor, read)
    unfinished_at = 0  # number of whole characters before the current token
    now = 0
    while now < len(token_ids):
        run = _byte_run(token_ids, now, byte_of)
        starts.extend(unfinished_at + start for start in (_starts_in_run(run) if run else [0]))
        now += len(run) or 1
        window = decode(anchor, now)
        end = now
        if not run and (window.endswith(REPLACEMENT) or len(window) <= len(context)):
            unfinished_at = max(unfinished_at, length + len(window.rstrip(REPLACEMENT)) - len(context))
            end = now - MAX_WAITING_TOKENS + 1
            # bytes that never form a character would wait for ever: release what is independent of the rest
            if end <= read or decode(anchor, end) + decode(end, now) != window:
                continue
            window = decode(anchor, end)
        pieces.append(window[len(context) :])
        length += len(pieces[-1])
        anchor, read = read, end
        context = decode(anchor, read)
        if end == now:
            unfinished_at = length
    pieces.append(decode(anchor, len(token_ids))[len(context) :])
    return "".join(pieces), starts


def token_starts(text: str, token_ids: Sequence[int], tokenizer: Any) -> list[int | None]:
    """The character of ``text`` at which each token starts; None for a special token, which has none.

    Two differences between ``text`` and a plain decoding are allowed: a leading space that SentencePiece
    drops when it does not see the prompt, and an unfinished last character, which samplers hold back.

    Raises:
        UserError: the tokens do not decode to the text; names the first character that differs.
    """
    special = {*tokenizer.all_special_ids, *_added_specials(tokenizer)}  # decoding leaves them out
    plain = [token for token in token_ids if token not in special]
    decoded, starts = _decode_tokens(plain, tokenizer)
    if text == decoded or text == decoded.rstrip(REPLACEMENT):
        shift = 0
    elif text in (" " + decoded, " " + decoded.rstrip(REPLACEMENT)):
        shift = 1
    else:
        at = next(
            (i for i, (a, b) in enumerate(zip(text, decoded, strict=False)) if a != b),
            min(len(text), len(decoded)),
        )
        raise UserError(
            f"the tokens decode to a different text: at character {at} expected {text[at : at + 20]!r}, got "
            f"{decoded[at : at + 20]!r}; use the tokenizer of the model that sampled, and its text unchanged"
        )
    position = iter(starts)
    shifted: list[int | None] = [None if token in special else next(position) + shift for token in token_ids]
    if shift and starts:
        shifted[next(i for i, start in enumerate(shifted) if start is not None)] = 0
    return shifted


def _added_specials(tokenizer: Any) -> dict[int, str]:
    """Id to text of the special tokens among those added to the vocabulary; ``all_special_ids`` lacks the reserved ones
    of many models."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {token: entry.content for token, entry in added.items() if entry.special}


def step_spans(
    text: str, token_ids: Sequence[int], tokenizer: Any, how: SplitRule, tag: str | None = None
) -> list[Step]:
    """Split a response into unlabelled steps, characters and tokens.

    Every token is in exactly one step and the token spans are contiguous from 0 to ``len(token_ids)``. A
    token that reaches over a boundary belongs to the step in which it starts; a special token (the end
    token) to the step of the token before it. A step in which no token starts, because one token holds it
    and the end of the step before, is merged into that step before.

    Args:
        tokenizer: the sampler's, of transformers (``decode``, ``all_special_ids``, ``added_tokens_decoder``).
        tag: for ``how="tag"``. It may be a special token of the tokenizer, which the text leaves out.

    Raises:
        UserError: the tokens do not decode to the text, or see ``split_text``.
    """
    starts = token_starts(text, token_ids, tokenizer)
    specials = _added_specials(tokenizer) if how == "tag" else {}
    special_tag = next((token for token, content in specials.items() if content == tag), None)
    if special_tag is None:
        spans = split_text(text, how, tag)
    else:
        spans = spans_of_cuts(text, _cuts_at(special_tag, token_ids, starts, len(text)))
    begins = [start for start, _ in spans]
    owners: list[int] = []
    for start in starts:
        before = owners[-1] if owners else 0
        owners.append(before if start is None else bisect.bisect_right(begins, start) - 1)
    steps: list[Step] = []
    for number, (start, end) in enumerate(spans):
        token_start, token_end = bisect.bisect_left(owners, number), bisect.bisect_right(owners, number)
        if token_start == token_end and steps:
            steps[-1] = steps[-1].model_copy(update={"end": end})
        else:
            steps.append(Step(start=start, end=end, token_start=token_start, token_end=token_end))
    return steps


def _cuts_at(tag: int, token_ids: Sequence[int], starts: Sequence[int | None], length: int) -> list[int]:
    """The character at which each step begins that a special token closes."""
    cuts, following = [], length
    for token, start in zip(reversed(token_ids), reversed(starts), strict=True):
        if start is not None:
            following = start
        elif token == tag:
            cuts.append(following)
    return cuts
