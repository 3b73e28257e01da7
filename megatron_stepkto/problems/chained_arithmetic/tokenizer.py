"""The miniature task's tokenizer: its pieces, spaces included, tile the text exactly."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from megatron_stepkto.base.files import atomic_writer, write_json
from megatron_stepkto.problems.chained_arithmetic.generate import NAMES, THINGS

PAD, BEGIN, END, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"
SPECIALS = (PAD, BEGIN, END, UNKNOWN)
PIECES = (
    *NAMES, *(f" {things}" for things in THINGS), *"0123456789",
    " has ", " more than ", " fewer than ", "twice as many as ", " times as many as ",
    "How many", " does ", " have?", ". ", ".", "\n", " + ", " - ", " * ", " = ", "Answer: ", "\\boxed{", "}",
)  # fmt: skip
MODEL_MAX_LENGTH = 256


def build_tokenizer(directory: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json for transformers and vLLM.

    ``decode(encode(text)) == text`` for every text of the task, and one text has one encoding: the split
    takes the longest piece first (". " before "."). Encoding a prompt puts ``<s>`` before it.
    """
    vocabulary = {piece: number for number, piece in enumerate((*SPECIALS, *PIECES))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    longest_first = sorted(PIECES, key=len, reverse=True)
    pattern = "|".join("".join(f"\\{c}" if c in "\\.*+?{}" else c for c in piece) for piece in longest_first)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    names = {"pad_token": PAD, "bos_token": BEGIN, "eos_token": END, "unk_token": UNKNOWN}
    save_tokenizer(tokenizer, directory, names, MODEL_MAX_LENGTH)


def save_tokenizer(tokenizer: Tokenizer, directory: Path, names: dict[str, str], model_max_length: int) -> None:
    """Write the files of a tokenizer that puts the token ``bos_token`` of ``names`` before every text."""
    begin = names["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin}:1 $B:1", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
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
