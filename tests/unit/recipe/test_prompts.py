"""Prompts: text to tokens, against token numbers counted by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.problems.chained_arithmetic.tokenizer import build_tokenizer
from megatron_stepkto.recipe.keys import Prompt
from megatron_stepkto.recipe.prompts import load_tokenizer, prompt_token_ids


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(directory)
    return directory


def test_template_adds_special_tokens_and_keeps_the_text(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    ids = prompt_token_ids(Prompt(template="{problem}\n"), "27 + 2 = 29.", tokenizer)
    pieces = ["<s>", "2", "7", " + ", "2", " = ", "2", "9", ".", "\n"]
    assert tokenizer.convert_ids_to_tokens(ids) == pieces


def test_braces_of_latex_survive(folder: Path) -> None:
    """str.format would fail on them, or read them as fields."""
    tokenizer = load_tokenizer(folder)
    ids = prompt_token_ids(Prompt(template="\\boxed{1} {problem}"), "\\boxed{2}", tokenizer)
    boxes = [piece for piece in tokenizer.convert_ids_to_tokens(ids) if piece in ("\\boxed{", "}", "1", "2")]
    assert boxes == ["\\boxed{", "1", "}", "\\boxed{", "2", "}"]


def test_chat_template_with_system_and_generation_prompt(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ {'system': '1', 'user': '2'}[m.role] }}{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}Answer: {% endif %}"
    )
    prompt = Prompt(template="{problem} = ", chat=True, system="77")
    ids = prompt_token_ids(prompt, "3", tokenizer)
    assert isinstance(ids, list)
    # "177\n23 = \nAnswer: " without <s>: a chat template writes its own special tokens
    assert tokenizer.convert_ids_to_tokens(ids) == ["1", "7", "7", "\n", "2", "3", " = ", "\n", "Answer: "]


def test_chat_without_chat_template_names_the_key(folder: Path) -> None:
    with pytest.raises(UserError, match=r"prompt\.chat is true.*no chat template"):
        prompt_token_ids(Prompt(chat=True), "3", load_tokenizer(folder))


def test_missing_folder_and_folder_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(UserError, match="no tokenizer in it"):
        load_tokenizer(tmp_path)


def test_broken_tokenizer_is_no_traceback(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text((folder / "tokenizer_config.json").read_text())
    for text, said in (
        ("{", "tokenizer.json:1: expected JSON"),
        ("{}", "does not load"),
        ('{"model": 3}', "does not load"),
    ):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(UserError, match=said):
            load_tokenizer(tmp_path)
