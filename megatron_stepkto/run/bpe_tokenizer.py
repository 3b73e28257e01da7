"""Train a byte-level BPE tokenizer, for a model that starts from random weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.problems.chained_arithmetic.tokenizer import save_tokenizer

PAD, BEGIN, END = "<pad>", "<s>", "</s>"
SPECIALS = (PAD, BEGIN, END)
MODEL_MAX_LENGTH = 2048


def train_byte_level_bpe(texts: Iterable[str], vocab_size: int, directory: Path) -> int:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json for transformers and vLLM.

    ``decode(encode(text)) == text`` for every text. Digits are single tokens, so a number's tokens are its
    digits. The same texts in the same order give the same files. Encoding with ``add_special_tokens`` puts
    ``<s>`` before the text; ``</s>`` ends a response.

    Args:
        vocab_size: tokens in all. The three special ones and the 256 bytes are among them: no text is unknown.

    Returns:
        The size of the vocabulary: ``vocab_size``, or less where the texts hold no more pairs to merge.

    Raises:
        UserError: no text at all.
    """
    kept = [text for text in texts if text.strip()]
    if not kept:
        raise UserError("training a tokenizer: expected texts, got none; check the corpus of the warm-up")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # a number is its digits, and line breaks, which end steps, never share a token with text
            pre_tokenizers.Split(Regex(r"\p{N}|\n+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIALS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(kept, trainer, length=len(kept))
    save_tokenizer(tokenizer, directory, {"pad_token": PAD, "bos_token": BEGIN, "eos_token": END}, MODEL_MAX_LENGTH)
    return int(tokenizer.get_vocab_size())
