"""The byte-level BPE trainer: lossless, deterministic, loads offline."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.run.bpe_tokenizer import train_byte_level_bpe

TEXTS = [
    "Tom has 27 coins and 13 more.\nSo he has 27 + 13 = 40.\n\n",
    "Die Größe ist 5 µm — naïve café, \\(x^{2} \\ge \\frac{1}{2}\\), 答案是 42 🌈\n",
    "The answer is \\boxed{1,250}. Step 1: She spends $40 * 3 = <<40*3=120>>120 per week.\n",
] * 5


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    directory = tmp_path_factory.mktemp("bpe")
    assert train_byte_level_bpe(TEXTS, 320, directory) == 320
    return AutoTokenizer.from_pretrained(directory, local_files_only=True)


def test_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.eos_token == "</s>" and len(tokenizer) == 320
    assert tokenizer("Tom")["input_ids"][0] == 1
    assert 1 not in tokenizer("Tom", add_special_tokens=False)["input_ids"]


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_comes_back(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    for special in ("<pad>", "<s>", "</s>"):
        text = text.replace(special, "")
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_real_text_comes_back(tokenizer: PreTrainedTokenizerFast) -> None:
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_digits_and_line_breaks_are_tokens_of_their_own(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("27 + 13 = 40.\nSo", add_special_tokens=False)["input_ids"]
    pieces = [tokenizer.decode([token]) for token in ids]
    assert [piece for piece in pieces if any(c.isdigit() for c in piece)] == ["2", "7", "1", "3", "4", "0"]
    assert "\n" in pieces


def test_same_texts_same_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        train_byte_level_bpe(iter(TEXTS), 300, tmp_path / name)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected texts, got none"):
        train_byte_level_bpe([" ", ""], 300, tmp_path)
    assert train_byte_level_bpe(["ab"], 4096, tmp_path) < 300  # two letters hold few merges
