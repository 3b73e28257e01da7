"""Problems to prompt tokens, and the tokenizer that makes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.model_folder import CONFIG, check_small_files, read_config
from megatron_stepkto.recipe import keys as recipe

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a Hugging Face folder: nothing is downloaded and no code of the folder is run.

    Raises:
        UserError: the folder is missing or holds no tokenizer that loads.
    """
    from transformers import AutoTokenizer  # seconds to import, and only some commands need it

    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        found = "no tokenizer in it" if directory.is_dir() else "no such folder"
        raise UserError(
            f"{directory}: expected a Hugging Face folder with a tokenizer ({', '.join(TOKENIZER_FILES)}), "
            f"found {found}; copy the tokenizer files of the model there"
        )
    check_small_files(directory)
    if (directory / CONFIG).exists():
        read_config(directory)
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises nothing but Exception
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{directory}: the tokenizer does not load ({reason}); restore its files") from None


def tokenizer_difference(first: Path, second: Path) -> str:
    """How the tokenizers of two Hugging Face folders differ in what token ids mean and how text becomes ids; "" where
    they do not. Chat templates, and the special tokens that are put around a text, do not count.

    Raises:
        UserError: see ``load_tokenizer``.
    """
    if first.resolve() == second.resolve():
        return ""
    tokenizers = [load_tokenizer(folder) for folder in (first, second)]
    ours, theirs = ({i: token for token, i in t.get_vocab().items()} for t in tokenizers)
    for token_id in sorted(ours.keys() | theirs.keys()):
        if ours.get(token_id) != theirs.get(token_id):
            return f"token {token_id} is {ours.get(token_id)!r} in one and {theirs.get(token_id)!r} in the other"
    rules = [json.loads(t.backend_tokenizer.to_str()) if t.is_fast else {"model": type(t).__name__} for t in tokenizers]
    for part in ("normalizer", "pre_tokenizer", "model", "decoder"):
        if rules[0].get(part) != rules[1].get(part):
            return f"same vocabulary, another {part}"
    return ""


def prompt_token_ids(prompt: recipe.Prompt, problem: str, tokenizer: Any) -> list[int]:
    """Tokens of the prompt that asks ``problem``, special tokens included.

    ``{problem}`` is replaced as text: braces of LaTeX in the problem, or elsewhere in the template, mean
    nothing. With ``prompt.chat`` the text is the user's turn of the tokenizer's chat template.

    Raises:
        UserError: chat is asked for and the tokenizer has no chat template, or no token comes out.
    """
    text = prompt.template.replace("{problem}", problem)
    if not prompt.chat:
        ids = tokenizer(text)["input_ids"]
    else:
        if not tokenizer.chat_template:
            raise UserError(
                "prompt.chat is true, but the model's tokenizer has no chat template; set prompt.chat: false "
                "(and the whole prompt in prompt.template) or take an instruction-tuned model's tokenizer"
            )
        turns = [{"role": "system", "content": prompt.system}] if prompt.system is not None else []
        turns.append({"role": "user", "content": text})
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)
    if not ids:
        raise UserError(f"prompt.template makes an empty prompt of {problem!r:.60}; a model needs at least one token")
    return [int(token) for token in ids]
