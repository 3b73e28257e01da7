"""Steps to the sampler's tokens, on tokenizers trained here: byte-level BPE, tiktoken-like, SentencePiece-like."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.steps.text import SPLIT_RULES
from megatron_stepkto.steps.tokens import step_spans, token_starts

CORPUS = [
    "We add 3 + 4 = 7.\n\nThen $\\frac{1}{2} \\cdot x^2$ is 7.\nSo the answer is \\boxed{7}.",
    "naïve café – “quoted” text… 😀😃 家族 👨‍👩‍👧 ∑ π ≤ ∞\n\n\n\tcode = [1, 2]\n",
] * 20


@pytest.fixture(scope="module")
def bpe() -> Any:
    """Without the usual split into words, so that pieces reach over newlines and cut characters in two."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken("<reserved>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")


@pytest.fixture(scope="module")
def sentencepiece() -> Any:
    pieces = ["</s>", "▁", "▁a", "▁b", "a", "b", "\n", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


TEXTS = st.lists(
    st.one_of(
        st.sampled_from(
            [
                "\n",
                "\n\n",
                " ",
                "\\frac{1}{2}",
                "So the answer is 7.",
                "😀",
                "👨‍👩‍👧",
                "“家族”",
                "\ufffd",
                "𝔸",
                ". ",
                " The",
                "Mr. ",
                "Step 2: ",
                "## Step 3",
                "[asy]\n\ndraw();\n[/asy]",
                "\\[ x\n\n \\]",
                "ки",
            ]
        ),
        st.text(max_size=6),
    ),
    max_size=12,
).map("".join)


def check_cover(steps: list[Any], text: str, num_tokens: int) -> None:
    assert [step.start for step in steps] == [0, *(step.end for step in steps[:-1])]
    assert steps[-1].end == len(text)
    assert [step.token_start for step in steps] == [0, *(step.token_end for step in steps[:-1])]
    assert steps[-1].token_end == num_tokens
    assert all(step.token_end > step.token_start for step in steps)


# GPT-4's, as published in tiktoken (cl100k_base).
GPT4_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def tiktoken_like() -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(GPT4_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|eot|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|eot|>")


def _like_sentencepiece(model: Any) -> Any:
    """Llama 2's arrangement: a space is ▁, one precedes the text, unknown characters are bytes."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


BYTE_PIECES = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]


@pytest.fixture(scope="module")
def llama2_like() -> Any:
    """BPE over whole sentences, as SentencePiece trains it, with byte fallback."""
    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    learner.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=BYTE_PIECES, show_progress=False)
    learner.train_from_iterator(CORPUS, trainer)
    learned = json.loads(learner.to_str())["model"]
    merges = [tuple(merge) for merge in learned["merges"]]
    return _like_sentencepiece(
        models.BPE(learned["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )


@pytest.fixture(scope="module")
def unigram_like() -> Any:
    learner = Tokenizer(models.Unigram())
    learner.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    learner.train_from_iterator(CORPUS, trainer)
    learned = json.loads(learner.to_str())["model"]["vocab"]
    pieces = [(piece, -20.0) for piece in BYTE_PIECES] + [(p, score) for p, score in learned if p not in BYTE_PIECES]
    return _like_sentencepiece(models.Unigram(pieces, unk_id=0, byte_fallback=True))


def bytes_of(tokenizer: Any, token: str) -> bytes:
    """The bytes that a token represents, from its spelling: the code under test never sees it."""
    if tokenizer.backend_tokenizer.decoder.__class__.__name__ == "ByteLevel":
        symbols = {symbol: byte for byte, symbol in byte_symbols().items()}
        return bytes(symbols[character] for character in token)
    if len(token) == 6 and token.startswith("<0x"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


@settings(max_examples=120, deadline=None)
@given(text=TEXTS, how=st.sampled_from(SPLIT_RULES))
@pytest.mark.parametrize("kind", ["bpe", "tiktoken_like", "llama2_like", "unigram_like"])
def test_every_token_is_in_the_step_where_it_starts(
    kind: str, text: str, how: Any, request: pytest.FixtureRequest
) -> None:
    """Expected owners come from the bytes of each token's spelling."""
    tokenizer = request.getfixturevalue(kind)
    token_ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    tokens = tokenizer.convert_ids_to_tokens(token_ids)
    assume(not set(token_ids) & set(tokenizer.all_special_ids))
    spelt = [bytes_of(tokenizer, token) for token in tokens]
    whole = b"".join(spelt).decode()
    dropped = len(whole) - len(tokenizer.decode(token_ids))  # SentencePiece's leading space
    assert dropped in (0, 1)
    steps = step_spans(whole[dropped:], [*token_ids, tokenizer.eos_token_id], tokenizer, how, "ки")
    check_cover(steps, whole[dropped:], len(token_ids) + 1)
    owners = [number for number, step in enumerate(steps) for _ in range(step.token_start, step.token_end)]
    first_byte = 0
    for number, piece in enumerate(spelt):
        character = max(0, len(b"".join(spelt)[:first_byte].decode("utf-8", "ignore")) - dropped)
        step = steps[owners[number]]
        # a lone leading space that decoding drops has no character of its own
        assert step.start <= character < max(step.end, 1)
        first_byte += len(piece)
    assert owners[-1] == len(steps) - 1


@settings(max_examples=150, deadline=None)
@given(token_bytes=st.lists(st.integers(0, 255), min_size=1, max_size=40))
def test_any_bytes_a_model_may_write_are_covered(bpe: Any, token_bytes: list[int]) -> None:
    """A sampler may end inside a character or write bytes that are none."""
    alphabet = byte_tokens(bpe)
    token_ids = [alphabet[byte] for byte in token_bytes]
    text = bpe.decode(token_ids)
    check_cover(step_spans(text, token_ids, bpe, "line"), text, len(token_ids))


def byte_symbols() -> dict[int, str]:
    """The byte-level alphabet, GPT-2's."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(others)}}


def byte_tokens(bpe: Any) -> dict[int, int]:
    """Token id of each single byte."""
    return {byte: bpe.convert_tokens_to_ids(symbol) for byte, symbol in byte_symbols().items()}


def test_a_character_in_three_tokens_starts_where_it_stands(bpe: Any) -> None:
    alphabet = byte_tokens(bpe)
    token_ids = [alphabet[byte] for byte in "a\n€b".encode()]  # € is E2 82 AC
    assert token_starts("a\n€b", token_ids, bpe) == [0, 1, 2, 2, 2, 3]
    steps = step_spans("a\n€b", token_ids, bpe, "line")
    assert [(s.start, s.end, s.token_start, s.token_end) for s in steps] == [(0, 2, 0, 2), (2, 4, 2, 6)]


def test_special_tokens_close_a_step(bpe: Any) -> None:
    alphabet = byte_tokens(bpe)
    reserved, end = bpe.convert_tokens_to_ids("<reserved>"), bpe.eos_token_id
    token_ids = [reserved, alphabet[97], alphabet[10], reserved, alphabet[98], end]
    assert token_starts("a\nb", token_ids, bpe) == [None, 0, 1, None, 2, None]
    steps = step_spans("a\nb", token_ids, bpe, "line")
    assert [(s.token_start, s.token_end) for s in steps] == [(0, 4), (4, 6)]


def test_an_empty_response_is_one_step(bpe: Any) -> None:
    (step,) = step_spans("", [bpe.eos_token_id], bpe, "line")
    assert (step.start, step.end, step.token_start, step.token_end) == (0, 0, 0, 1)


def test_a_step_without_a_token_of_its_own_joins_the_one_before() -> None:
    tokenizer = Tokenizer(models.WordLevel({"x\ny\nz": 0, "w": 1, "</s>": 2}, unk_token="</s>"))
    tokenizer.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    steps = step_spans("wx\ny\nzw", [1, 0, 1, 2], wrapped, "line")
    # tokens: w | x\ny\nz | w | </s>; in the middle line no token starts, nor at the start of the last
    assert [(s.start, s.end, s.token_start, s.token_end) for s in steps] == [(0, 5, 0, 2), (5, 7, 2, 4)]


def test_an_unfinished_last_character_may_be_held_back(bpe: Any) -> None:
    alphabet = byte_tokens(bpe)
    token_ids = [alphabet[97], alphabet[10], alphabet[0xF0], alphabet[0x9F]]
    for text in ("a\n", "a\n\ufffd"):
        check_cover(step_spans(text, token_ids, bpe, "line"), text, 4)


def test_sentencepiece_leading_space(sentencepiece: Any) -> None:
    ids = [2, 6, 3, 6, 7, 8, 9, 10, 0]  # "▁a" "\n" "▁b" "\n" and 😀 in four bytes, end
    for text, starts in (
        ("a\n b\n😀", [0, 1, 2, 4, 5, 5, 5, 5, None]),
        (" a\n b\n😀", [0, 2, 3, 5, 6, 6, 6, 6, None]),
    ):
        assert token_starts(text, ids, sentencepiece) == starts
        steps = step_spans(text, ids, sentencepiece, "line")
        assert [(s.token_start, s.token_end) for s in steps] == [(0, 2), (2, 4), (4, 9)]


def test_tokens_of_another_text_are_refused(bpe: Any) -> None:
    ids = bpe.encode("So the answer is 7.")
    with pytest.raises(UserError, match=r"at character 17 expected '8\.', got '7\.'"):
        step_spans("So the answer is 8.", ids, bpe, "line")


class CountingTokenizer:
    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.decoded_tokens = tokenizer, 0
        self.all_special_ids, self.added_tokens_decoder = (
            tokenizer.all_special_ids,
            tokenizer.added_tokens_decoder,
        )

    def decode(self, ids: list[int], **options: Any) -> str:
        self.decoded_tokens += len(ids)
        return str(self.tokenizer.decode(ids, **options))


@pytest.mark.parametrize("byte", [97, 0xFF, 0x80, 0xE2])
def test_work_grows_with_the_length_only(bpe: Any, byte: int) -> None:
    """4,096 tokens, also of bytes that never become a character: a bounded number of decodings per token."""
    token_ids = [byte_tokens(bpe)[byte]] * 4096
    counting = CountingTokenizer(bpe)
    begun = time.process_time()  # not the clock: the machine may be busy
    text = bpe.decode(token_ids)
    check_cover(step_spans(text, token_ids, counting, "line"), text, 4096)
    assert counting.decoded_tokens < 40 * 4096
    assert time.process_time() - begun < 10


def test_a_special_token_may_be_the_tag(bpe: Any) -> None:
    """Special tokens are not in the text; the next step begins with the next token."""
    alphabet, tag = byte_tokens(bpe), bpe.convert_tokens_to_ids("<reserved>")
    token_ids = [alphabet[97], tag, alphabet[98], alphabet[10], tag, alphabet[99], bpe.eos_token_id]
    steps = step_spans("ab\nc", token_ids, bpe, "tag", "<reserved>")
    assert [(s.start, s.end, s.token_start, s.token_end) for s in steps] == [(0, 1, 0, 2), (1, 3, 2, 5), (3, 4, 5, 7)]
