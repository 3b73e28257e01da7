"""Problems to prompt tokens, and what a prompt and a response may hold: one place for sampling, imports, evaluation."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.model_folder import CONFIG, check_small_files, end_tokens, read_config
from megatron_stepkto.base.records import Problem
from megatron_stepkto.recipe import keys as recipe

# What a Jinja template may raise: it is a program that the user wrote.
TEMPLATE_FAULTS = (
    TemplateError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError, RecursionError,
)  # fmt: skip
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
# Llama 3.2's and 3.3's templates write today's date: a run would have other prompts after midnight. This is the date
# that Llama 3.1's template writes.
DATE = datetime.datetime(2024, 7, 26)
THINK = "<think>"


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


def end_token_ids(model: Path, tokenizer: Any) -> list[int]:
    """Tokens that end a response: the tokenizer's, config.json's and generation_config.json's, sorted.

    Raises:
        UserError: there is none, so no response would end by itself; or a file names something else than token ids.
    """
    found = end_tokens(model)
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    if not found:
        raise UserError(
            f"{model}: expected an end token, found eos_token_id in none of config.json, "
            "generation_config.json and the tokenizer; set it in config.json"
        )
    return sorted(found)


def render_chat(
    tokenizer: Any, turns: Sequence[dict[str, str]], source: str, *, generation_prompt: bool, advice: str = ""
) -> str:
    """The text that a chat template makes of ``turns``; it does not depend on the day.

    Args:
        source: the tokenizer's folder or the key that names it, for the error.
        advice: what else the user may do than correct the template.

    Raises:
        UserError: the template does not parse, refuses the turns or fails, or none of several is the default.
    """
    try:
        text: str = tokenizer.apply_chat_template(
            list(turns), add_generation_prompt=generation_prompt, tokenize=False, strftime_now=DATE.strftime
        )
    except TEMPLATE_FAULTS as error:
        templates = tokenizer.chat_template
        if isinstance(templates, dict) and "default" not in templates:
            raise UserError(
                f"{source}: expected one chat template or one named default, got {', '.join(sorted(templates))}; "
                f"write the one to use into the tokenizer's chat_template.jinja"
            ) from None
        number = getattr(error, "lineno", None)
        line = f" in line {number}" if number else ""
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{source}: the chat template fails{line} (turns: {', '.join(turn['role'] for turn in turns)}): {reason}; "
            f"correct the tokenizer's chat_template{advice}"
        ) from None
    return text


ProblemCheck = Callable[[Problem], Problem]


class BadText(ValueError):
    """A problem or a response that cannot be trained on as it is; readers of rows add its place."""


class Prompts:
    """Prompts of one tokenizer and one section ``prompt``, checked once.

    ``{problem}`` is replaced as text: braces of LaTeX in the problem, or elsewhere in the template, mean nothing.
    With ``prompt.chat`` the text is the user's turn of the tokenizer's chat template.

    Attributes:
        warnings: what is allowed and likely a mistake, to be shown once.
        thinks: the prompt ends inside a <think> block, which the response continues.

    Raises:
        UserError: the section makes prompts that begin with two BOS tokens, end with an end token or leave out the
            problem or prompt.system; or the chat template fails.
    """

    def __init__(self, prompt: recipe.Prompt, tokenizer: Any, end_ids: Collection[int], source: str) -> None:
        self._prompt, self._tokenizer, self._end_ids, self._source = prompt, tokenizer, end_ids, source
        if prompt.chat and not tokenizer.chat_template:
            raise UserError(
                f"{source}: prompt.chat is true, but the model's tokenizer has no chat template; set prompt.chat: "
                "false (and the whole prompt in prompt.template) or take an instruction-tuned model's tokenizer"
            )
        special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        # An unknown token is what a small vocabulary makes of ordinary text.
        self._control = (special | set(tokenizer.all_special_ids) | set(end_ids)) - {tokenizer.unk_token_id}
        words = filter(None, tokenizer.convert_ids_to_tokens(sorted(self._control)))
        self._literal = re.compile("|".join(map(re.escape, words)))
        text = self._text("1 + 1 = ?")
        ids = self._encode(text)
        self._expected = self._controls(ids)
        self._check_begin(ids)
        self._check_end(ids)
        self._check_contents(text)
        self.thinks = text.rstrip().endswith(THINK)
        closing = self._closing_token() if prompt.chat else None
        self._closes = closing if closing in end_ids else tokenizer.eos_token_id
        self.warnings: list[str] = []
        if closing is not None and closing not in end_ids:
            self.warnings.append(
                f"{source}: the chat template closes a turn with {self._show([closing])}, which is not an end token "
                f"({self._show(sorted(end_ids))}): responses may run on to max_tokens; add {closing} to "
                "eos_token_id in generation_config.json"
            )

    @classmethod
    def of(cls, prompt: recipe.Prompt, directory: Path) -> Prompts:
        """With the tokenizer and the end tokens of a Hugging Face folder."""
        tokenizer = load_tokenizer(directory)
        return cls(prompt, tokenizer, end_token_ids(directory, tokenizer), str(directory))

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer

    @property
    def end_token(self) -> int:
        """The token that ends a response: that of the chat template's turns, else the tokenizer's.

        Raises:
            UserError: the tokenizer has none.
        """
        if self._closes is None:
            raise UserError(
                f"{self._source}: the tokenizer has no end token; set eos_token in its tokenizer_config.json"
            )
        return int(self._closes)

    def token_ids(self, problem: str) -> list[int]:
        """Tokens of the prompt that asks ``problem``, special tokens included.

        Raises:
            BadText: the problem's text holds special tokens, or no token comes out.
        """
        ids = self._encode(self._text(problem))
        if not ids:
            raise BadText(f"prompt.template makes an empty prompt of {problem!r:.60}; a model needs at least one token")
        if self._controls(ids) != self._expected:
            found = self._controls(self._encode_text(problem))
            raise BadText(
                f"the problem holds the text of special tokens ({self._show(found or self._controls(ids))}), which the "
                "model would read as the end or beginning of a turn; write them in another way or remove the problem"
            )
        return ids

    def conversation(self, turns: Sequence[Any]) -> list[int]:
        """Tokens of the prompt that a conversation makes through the chat template: ``role`` and ``content`` of each.

        prompt.template does not apply; prompt.system begins a conversation without a system turn.

        Raises:
            BadText: prompt.chat is false, a turn holds special tokens, or the template refuses the turns.
        """
        if not self._prompt.chat:
            raise BadText(f"the prompt has {len(turns)} messages, which need a chat template; set prompt.chat: true")
        for turn in turns:
            if self._literal.search(turn.content) and (found := self._controls(self._encode_text(turn.content))):
                raise BadText(
                    f"a message of the {turn.role} holds the text of special tokens ({self._show(found)}); remove it"
                )
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        if self._prompt.system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self._prompt.system})
        try:
            return self._encode(self._render(messages))
        except UserError as error:  # templates refuse some orders of roles: a matter of this conversation
            raise BadText(str(error)) from None

    def turns(self, problem: str, system: str | None = None) -> list[dict[str, str]]:
        """The messages that ask ``problem``: the template behind the section's system turn (or ``system``)."""
        system = self._prompt.system if system is None else system
        turns = [{"role": "system", "content": system}] if system is not None else []
        return [*turns, {"role": "user", "content": self._prompt.template.replace("{problem}", problem)}]

    def check(self, problem: Problem) -> Problem:
        """The problem as it is, for readers of rows. Raises BadText: see ``check_problem``."""
        self.check_problem(problem.problem)
        return problem

    def check_problem(self, text: str) -> None:
        """``token_ids`` where it could fail: cheap enough for every row. Raises BadText: special tokens in the text."""
        if self._literal.search(text):
            self.token_ids(text)

    def check_response(self, text: str, token_ids: Sequence[int] | None = None) -> None:
        """Raises BadText: a response, given without its end token, holds special tokens or begins as the prompt ends.

        token_ids: of the text; None: made where the text looks like holding special tokens.
        """
        if token_ids is None:
            token_ids = self._encode_text(text) if self._literal.search(text) else []
        if found := self._controls(token_ids):
            raise BadText(
                f"the response holds the text of special tokens ({self._show(found)}); remove it: a finished response "
                "gets its end token here"
            )
        if self.thinks and text.lstrip().startswith(THINK):
            raise BadText(f"the response begins with {THINK}, which the prompt ends with already; remove it")

    def _text(self, problem: str, system: str | None = None) -> str:
        turns = self.turns(problem, system)
        return self._render(turns) if self._prompt.chat else turns[-1]["content"]

    def _render(self, turns: Sequence[dict[str, str]], *, generation_prompt: bool = True) -> str:
        system = "remove" if self._prompt.system is not None else "set"
        advice = f", {system} prompt.system if that is why, or set prompt.chat: false"
        return render_chat(self._tokenizer, turns, self._source, generation_prompt=generation_prompt, advice=advice)

    def _encode(self, text: str) -> list[int]:
        return self._encode_text(text, special=not self._prompt.chat)  # a chat template writes its own special tokens

    def _encode_text(self, text: str, *, special: bool = False) -> list[int]:
        ids = self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return [int(token) for token in ids]

    def _controls(self, ids: Sequence[int]) -> list[int]:
        return [token for token in ids if token in self._control]

    def _show(self, ids: Sequence[int]) -> str:
        words = self._tokenizer.convert_ids_to_tokens(list(ids))  # None: config.json names a token that it lacks
        return " ".join(str(word or token) for word, token in zip(words, ids, strict=True))

    def _visible(self, ids: Sequence[int]) -> list[int]:
        """Without tokens of white space alone."""
        return [token for token in ids if token in self._control or self._tokenizer.decode([token]).strip()]

    def _check_begin(self, ids: Sequence[int]) -> None:
        first, second, *_ = *self._visible(ids), None, None
        if first == second and first in self._control:  # whether the tokenizer calls it bos_token or not
            fix = (
                "correct the chat template, which writes both"
                if self._prompt.chat
                else "remove it from prompt.template: the tokenizer adds it"
            )
            raise UserError(
                f"{self._source}: expected a prompt with one BOS token, got {self._show(ids[:8])} ...; {fix}"
            )

    def _check_end(self, ids: Sequence[int]) -> None:
        visible = self._visible(ids)
        if not visible or visible[-1] not in self._end_ids:
            return
        if self._prompt.chat and visible[-1] != self._tokenizer.eos_token_id:
            # Phi-3 lists <|assistant|> among its end tokens, so that a response ends where another turn would begin.
            closed = self._render(self.turns("1 + 1 = ?"), generation_prompt=False)
            if visible[-1] not in self._encode(closed):
                return
        fix = (
            "let its chat template open the assistant's turn (add_generation_prompt)"
            if self._prompt.chat
            else "set add_eos_token: false in its tokenizer_config.json, or remove the token from prompt.template"
        )
        raise UserError(
            f"{self._source}: expected a prompt that a response can continue, got one that ends with the end token: "
            f"... {self._show(ids[-8:])}; {fix}"
        )

    def _check_contents(self, text: str) -> None:
        if text == self._text("2 + 2 = ?"):
            raise UserError(
                f"{self._source}: the chat template leaves out the user's turn, so prompts would not hold the problem; "
                "correct it, or set prompt.chat: false"
            )
        system = self._prompt.system
        if system is not None and text == self._text("1 + 1 = ?", system=f"{system} 1"):
            raise UserError(
                f"{self._source}: the chat template leaves out prompt.system; remove it, or write it into "
                "prompt.template"
            )

    def _closing_token(self) -> int | None:
        """The special token that the chat template puts behind an assistant's turn."""
        answer = "1 + 1 = 2."
        turns = [*self.turns("1 + 1 = ?"), {"role": "assistant", "content": answer}]
        try:
            text = self._render(turns, generation_prompt=False)
        except UserError:  # a template may take no assistant's turn: none is ever given
            return None
        _, found, behind = text.rpartition(answer)
        return next(iter(self._controls(self._encode_text(behind))), None) if found else None
