"""Prompts: text to tokens, against token numbers counted by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, processors
from transformers import AutoTokenizer

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.problems.chained_arithmetic.tokenizer import build_tokenizer
from megatron_stepkto.recipe.keys import Prompt
from megatron_stepkto.recipe.prompts import BadText, Prompts, end_token_ids, load_tokenizer
from megatron_stepkto.run.bpe_tokenizer import train_byte_level_bpe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(directory)
    return directory


def test_template_adds_special_tokens_and_keeps_the_text(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    ids = Prompts.of(Prompt(template="{problem}\n"), folder).token_ids("27 + 2 = 29.")
    pieces = ["<s>", "2", "7", " + ", "2", " = ", "2", "9", ".", "\n"]
    assert tokenizer.convert_ids_to_tokens(ids) == pieces


def test_braces_of_latex_survive(folder: Path) -> None:
    """str.format would fail on them, or read them as fields."""
    tokenizer = load_tokenizer(folder)
    ids = Prompts.of(Prompt(template="\\boxed{1} {problem}"), folder).token_ids("\\boxed{2}")
    boxes = [piece for piece in tokenizer.convert_ids_to_tokens(ids) if piece in ("\\boxed{", "}", "1", "2")]
    assert boxes == ["\\boxed{", "1", "}", "\\boxed{", "2", "}"]


def test_chat_template_with_system_and_generation_prompt(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ {'system': '1', 'user': '2'}[m.role] }}{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}Answer: {% endif %}"
    )
    prompt = Prompt(template="{problem} = ", chat=True, system="77")
    ids = Prompts(prompt, tokenizer, [2], "here").token_ids("3")
    assert isinstance(ids, list)
    # "177\n23 = \nAnswer: " without <s>: a chat template writes its own special tokens
    assert tokenizer.convert_ids_to_tokens(ids) == ["1", "7", "7", "\n", "2", "3", " = ", "\n", "Answer: "]


def test_chat_without_chat_template_names_the_key(folder: Path) -> None:
    with pytest.raises(UserError, match=r"prompt\.chat is true.*no chat template"):
        Prompts.of(Prompt(chat=True), folder)


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


# --- special tokens --------------------------------------------------------------------------------------------

BOS, EOT, END, USER, ASSISTANT = "<|begin|>", "<|eot|>", "<|end|>", "<|user|>", "<|assistant|>"
CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def bytes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bytes")
    train_byte_level_bpe(["text"], 259, directory)
    return directory


@pytest.fixture
def chat(bytes_folder: Path) -> Any:
    """Bytes, and Llama 3's kind of special tokens; like its tokenizer, it puts BOS before a text."""
    tokenizer = AutoTokenizer.from_pretrained(bytes_folder)
    added = [AddedToken(token, special=True, normalized=False) for token in (BOS, EOT, END, USER, ASSISTANT)]
    tokenizer.add_special_tokens({"additional_special_tokens": [*added, AddedToken("<|system|>", special=True)]})
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    tokenizer.bos_token, tokenizer.eos_token = BOS, EOT
    put_around(tokenizer, f"{BOS} $A")
    tokenizer.chat_template = CHAT
    return tokenizer


def put_around(tokenizer: Any, single: str) -> None:
    names = [token for token in single.split() if token.startswith("<")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(name, tokenizer.convert_tokens_to_ids(name)) for name in set(names)]
    )


def opened(tokenizer: Any, end: tuple[str, ...] = (EOT,), **keys: Any) -> Prompts:
    return Prompts(Prompt(**keys), tokenizer, tokenizer.convert_tokens_to_ids(list(end)), "M")


def refusal(tokenizer: Any, end: tuple[str, ...] = (EOT,), **keys: Any) -> str:
    with pytest.raises(UserError) as caught:
        opened(tokenizer, end, **keys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def shown(tokenizer: Any, ids: list[int]) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(ids))


def test_a_chat_template_that_writes_bos_gets_no_second_one(chat: Any) -> None:
    """Llama 3's template writes BOS, and its tokenizer adds one to every text."""
    assert shown(chat, chat("2?")["input_ids"]) == f"{BOS}2?"
    ids = opened(chat, chat=True, template="{problem}").token_ids("2?")
    assert shown(chat, ids) == f"{BOS}{USER}2?{EOT}{ASSISTANT}"
    assert shown(chat, opened(chat, template="{problem}").token_ids("2?")) == f"{BOS}2?"


def test_bos_twice_is_refused(chat: Any) -> None:
    said = refusal(chat, template=BOS + " {problem}")
    assert said == (
        f"M: expected a prompt with one BOS token, got {BOS} {BOS} Ġ 1 Ġ + Ġ 1 ...; "
        "remove it from prompt.template: the tokenizer adds it"
    )
    chat.bos_token = None  # it is still what the tokenizer puts before a text
    assert "expected a prompt with one BOS token" in refusal(chat, template=BOS + "{problem}")
    chat.bos_token = BOS
    chat.chat_template = "{{ bos_token }}\n" + CHAT
    assert f"one BOS token, got {BOS} Ċ {BOS} {USER} 1" in refusal(chat, chat=True)


@pytest.mark.parametrize("after", ["", "\n", " \n\n"])
def test_a_prompt_that_ends_with_the_end_token_is_refused(chat: Any, after: str) -> None:
    put_around(chat, f"{BOS} $A {EOT}")  # add_eos_token: true
    said = refusal(chat, template="{problem}")
    assert said.startswith(
        "M: expected a prompt that a response can continue, got one that ends with the end token: ..."
    )
    assert said.endswith(f"= Ġ ? {EOT}; set add_eos_token: false in its tokenizer_config.json, or remove the token "
                         "from prompt.template")  # fmt: skip
    put_around(chat, f"{BOS} $A")
    assert "ends with the end token" in refusal(chat, template="{problem}<|eot|>" + after)
    assert "ends with the end token" in refusal(chat, (EOT, END), template="{problem}<|end|>" + after)
    for template in (
        CHAT.replace("{% if add_generation_prompt %}<|assistant|>{% endif %}", after),
        CHAT + "{{ eos_token }}" + after,
        CHAT.replace("<|assistant|>{% endif", "<|assistant|>{{ eos_token }}" + after + "{% endif"),
    ):
        chat.chat_template = template
        said = refusal(chat, chat=True)
        assert f"{EOT}" in said.partition("end token: ...")[2]
        assert said.endswith("; let its chat template open the assistant's turn (add_generation_prompt)")


def test_a_turn_marker_may_end_responses_too(chat: Any) -> None:
    """Phi-3's generation_config.json lists <|assistant|> as an end token; every one of its prompts ends with it."""
    ids = opened(chat, (EOT, ASSISTANT), chat=True, template="{problem}").token_ids("2?")
    assert shown(chat, ids) == f"{BOS}{USER}2?{EOT}{ASSISTANT}"


@pytest.mark.parametrize("chats", [False, True])
@pytest.mark.parametrize("token", [EOT, END, USER, BOS, "<pad>"])
def test_the_text_of_a_special_token_in_a_problem(chat: Any, chats: bool, token: str) -> None:
    prompts = opened(chat, (EOT, END), chat=chats)
    for problem in (f"What does {token} mean?", f"1 + 1?{token}", token):
        for refuses in (prompts.token_ids, prompts.check_problem):
            with pytest.raises(BadText) as caught:
                refuses(problem)
            assert f"the problem holds the text of special tokens ({token})" in str(caught.value)
    for problem in ("a < b, |c| <|x|> d", "<think>", "Is x<|end |> right?"):
        prompts.check_problem(problem)
        assert problem.strip() in chat.decode(prompts.token_ids(problem))


def test_the_text_of_a_special_token_in_a_response(chat: Any) -> None:
    prompts = opened(chat, template="{problem}")
    for text in (f"It is 2.{EOT}", f"It is 2.{EOT}\n", f"It {END}is 2."):
        with pytest.raises(BadText, match=r"the response holds the text of special tokens \(<\|e"):
            prompts.check_response(text)
    prompts.check_response("<think>\nIt is 2.")


def test_a_template_that_opens_a_think_block(chat: Any) -> None:
    chat.chat_template = CHAT.replace("<|assistant|>{%", "<|assistant|><think>\n{%")
    prompts = opened(chat, chat=True)
    assert prompts.thinks
    assert not opened(chat).thinks
    prompts.check_response("It is 2.\n</think>2")
    with pytest.raises(BadText, match="the response begins with <think>, which the prompt ends with already"):
        prompts.check_response("<think>\nIt is 2.")
    chat.chat_template = CHAT.replace("<|assistant|>{%", "<|assistant|><think>\n\n</think>\n\n{%")
    assert not opened(chat, chat=True).thinks
    assert not opened(chat, chat=True, system="Think between <think> and the answer.").thinks


# --- chat templates --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "system", "said"),
    [
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHAT,
            "You are.",
            "M: the chat template fails (turns: system, user): System role not supported; correct the tokenizer's "
            "chat_template, remove prompt.system if that is why, or set prompt.chat: false",
        ),
        (
            "{% if messages[0].role != 'system' %}{{ raise_exception('Where is the system?') }}{% endif %}" + CHAT,
            None,
            "(turns: user): Where is the system?; correct the tokenizer's chat_template, set prompt.system if that",
        ),
        ("{{ bos_token }}\n{% for m in messages %}{{ m.content }}", None, "the chat template fails in line 2"),
        ("{{ messages[0].content.parts[0] }}", None, "the chat template fails (turns: user): "),
        ("{{ 1 / 0 }}", None, "division by zero"),
        ("{{ messages[0].nothing() }}", None, "the chat template fails (turns: user): "),
        ("{{ messages[0].content + 1 }}", None, "the chat template fails (turns: user): "),
        ("{{ range(10 ** 9) | list }}", None, "the chat template fails (turns: user): "),
        ("{{ '(' * 2 }}{{ " + "(" * 3000 + " }}", None, "the chat template fails"),
        ("<|user|>{{ messages[0].text }}<|assistant|>", None, "leaves out the user's turn"),
        (
            "{{ messages[-1].content }}<|assistant|>",
            "You are.",
            "leaves out prompt.system; remove it, or write it into",
        ),
    ],
)
def test_a_chat_template_that_fails_is_one_line(chat: Any, template: str, system: str | None, said: str) -> None:
    chat.chat_template = template
    assert said in refusal(chat, chat=True, system=system)


def test_several_chat_templates_without_a_default(chat: Any, tmp_path: Path) -> None:
    chat.chat_template = {"rag": CHAT, "tool_use": CHAT}
    assert refusal(chat, chat=True).startswith(
        "M: expected one chat template or one named default, got rag, tool_use; write the one to use into"
    )
    chat.chat_template = None
    chat.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    named = [{"name": name, "template": CHAT} for name in ("rag", "tool_use")]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": named}))
    assert "one named default, got rag, tool_use" in refusal(load_tokenizer(tmp_path), chat=True)
    named[0]["name"] = "default"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": named}))
    assert shown(chat, opened(load_tokenizer(tmp_path), chat=True).token_ids("2?")).startswith(f"{BOS}{USER}2?")


def test_a_prompt_does_not_depend_on_the_day(chat: Any) -> None:
    """Llama 3.2's and 3.3's templates write today's date: samples of two days would be of two prompts."""
    chat.chat_template = "{{ strftime_now('%d %b %Y') }} " + CHAT
    ids = opened(chat, chat=True, template="{problem}").token_ids("2?")
    assert chat.decode(ids) == f"26 Jul 2024 {BOS}{USER}2?{EOT}{ASSISTANT}"


def test_a_response_ends_as_the_chat_template_closes_turns(chat: Any) -> None:
    """Llama-3-8B-Instruct came with eos_token <|end_of_text|>, and closes turns with <|eot_id|>."""
    chat.eos_token = END
    number = chat.convert_tokens_to_ids
    both = opened(chat, (EOT, END), chat=True)
    assert (both.end_token, both.warnings) == (number(EOT), [])
    assert opened(chat, (EOT, END)).end_token == number(END)
    only = opened(chat, (END,), chat=True)
    assert only.end_token == number(END)
    assert only.warnings == [
        f"M: the chat template closes a turn with {EOT}, which is not an end token ({END}): responses may run on to "
        f"max_tokens; add {number(EOT)} to eos_token_id in generation_config.json"
    ]


def test_an_end_token_that_the_tokenizer_lacks(chat: Any) -> None:
    """config.json of a larger vocabulary: it is shown by its number."""
    prompts = Prompts(Prompt(chat=True), chat, [70_000], "M")
    assert "not an end token (70000)" in prompts.warnings[0]


def test_end_tokens_of_all_files(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert end_token_ids(tmp_path, tokenizer) == [2]
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 7]}')
    assert end_token_ids(tmp_path, tokenizer) == [2, 7, 9]
    for wrong in ('"</s>"', "true", "[1, null]", "-1", "{}"):
        (tmp_path / "config.json").write_text(f'{{"eos_token_id": {wrong}}}')
        with pytest.raises(UserError, match=r"config\.json: eos_token_id = .*: expected a token id, or a list of them"):
            end_token_ids(tmp_path, tokenizer)
