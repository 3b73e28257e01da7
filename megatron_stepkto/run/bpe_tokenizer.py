"""Train a byte-level BPE tokenizer, for a model that starts from random weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.files import atomic_writer, write_json

PAD, BEGIN, END = "<pad>", "<s>", "</s>"
SPECIALS = (PAD, BEGIN, END)
MIN_VOCAB_SIZE = len(SPECIALS) + 256  # every byte is a token, so that no text is unknown


def train_byte_level_bpe(
    texts: Iterable[str], vocab_size: int, directory: Path, *, model_max_length: int = 2048
) -> int:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json for transformers and vLLM.

    ``decode(encode(text)) == text`` for every text. Digits are single tokens, so a number's tokens are its
    digits. The same texts in the same order give the same files. Encoding with ``add_special_tokens`` puts
    ``<s>`` before the text; ``</s>`` ends a response.

    Args:
        vocab_size: tokens in all, the three special ones and the 256 bytes among them.
        model_max_length: tokens that the model takes.

    Returns:
        The size of the vocabulary: ``vocab_size``, or less where the texts hold no more pairs to merge.

    Raises:
        UserError: ``vocab_size`` below 259, or no text at all.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(
            f"vocab_size: expected {MIN_VOCAB_SIZE} or more (256 bytes and {len(SPECIALS)} special tokens), "
            f"got {vocab_size}; raise warm_up.vocab_size"
        )
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
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A",
        pair=f"{BEGIN} $A {BEGIN}:1 $B:1",
        special_tokens=[(BEGIN, SPECIALS.index(BEGIN))],
    )
    _save(tokenizer, directory, model_max_length)
    return int(tokenizer.get_vocab_size())


def _save(tokenizer: Tokenizer, directory: Path, model_max_length: int) -> None:
    names = {"pad_token": PAD, "bos_token": BEGIN, "eos_token": END}
    with atomic_writer(directory / "tokenizer.json") as file:
        file.write(tokenizer.to_str(pretty=True))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "clean_up_tokenization_spaces": False,  # it would delete the space before a full stop
        "model_max_length": model_max_length,
        "padding_side": "right",
    }
    write_json(directory / "tokenizer_config.json", config)
    write_json(directory / "special_tokens_map.json", names)
