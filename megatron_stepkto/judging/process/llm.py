"""A language model reads the problem and the numbered steps and gives a verdict on each, several times over."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import IO, Any

from jinja2 import StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_stepkto.base.cache import AnswerCache, content_key
from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.progress import ProgressBar, warn
from megatron_stepkto.base.records import Label
from megatron_stepkto.judging.process.client import (
    BadAnswer,
    Client,
    NoAnswer,
    Service,
    TooLong,
    Unavailable,
    ask_each,
    check_servers,
    from_first,
    run_async,
)
from megatron_stepkto.judging.process.formats import RPRM, Format, GenPRM, ThinkPRM
from megatron_stepkto.judging.process.interface import (
    Judged,
    ProcessJudge,
    Resources,
    Solution,
    Solutions,
    Typical,
    Work,
    Workplace,
    majority,
)
from megatron_stepkto.recipe import keys as recipe
from megatron_stepkto.recipe.judge_keys import server_urls
from megatron_stepkto.recipe.prompts import TEMPLATE_FAULTS

WORDS: dict[str, Label] = {"right": 1, "wrong": 0, "unsure": None}
FEW = 20  # answers after which a judge whose answers are mostly useless is stopped
OWN_PROMPT = Path(str(resources.files("megatron_stepkto.judging").joinpath("prompts/step_judge.txt")))
LARGEST_SEED = 2**31  # some servers take 32 bits
# Tokens, for a plan (Qwen2.5's tokenizer): of the built-in prompt's instructions; of the mark before a step; of an
# entry of the JSON answer without its comment; characters of a comment per token.
INSTRUCTIONS, STEP_MARK, ENTRY, COMMENT_CHARS = 179, 6, 16, 4


def template_text(path: Path) -> str:
    """The prompt template in a file.

    Raises:
        UserError: the file is missing, or is not text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"judge.process.prompt: {path}: expected a text file ({error}); see docs/judges.md") from None


def format_of(name: str, prompt: Path | None) -> Format:
    """A generative reward model's format; ``prompt``: file of R-PRM's instructions.

    Raises:
        UserError: the file is missing, or does not hold them.
    """
    if name != "r_prm":
        return {"genprm": GenPRM, "thinkprm": ThinkPRM}[name]()
    assert prompt is not None, "the recipe's keys ask for it"
    text = template_text(prompt)
    if text.count("{}") != 3 or "<|" in text:
        raise UserError(
            f"judge.process.prompt: {prompt}: expected R-PRM's user message with three places {{}} (question, previous "
            f"steps, now step) and without chat markers such as <|im_start|>, got {text.count('{}')} places; correct it"
        )
    return RPRM(text)


class PromptTemplate:
    """Jinja in a sandbox: a template sees ``problem, reference, answer, steps, comments`` and nothing else."""

    def __init__(self, path: Path | None) -> None:
        environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
        self._where = str(path or "the built-in prompt")
        try:
            self._template = environment.from_string(template_text(path or OWN_PROMPT))
        except TEMPLATE_FAULTS as error:
            raise self._error(error) from None

    def render(self, solution: Solution, comments: bool) -> str:
        try:
            return self._template.render(
                problem=solution.problem.problem,
                reference=solution.problem.solution,
                answer=solution.problem.answer,
                steps=[text.strip() for text in solution.step_texts],
                comments=comments,
            )
        except TEMPLATE_FAULTS as error:
            raise self._error(error) from None

    def _error(self, error: Exception) -> UserError:
        line = getattr(error, "lineno", None)
        where = f"{self._where}:{line}" if line else self._where
        return UserError(f"judge.process.prompt: {where}: {' '.join(str(error).split())[:200]}; correct it")


def answer_schema(num_steps: int, comment_chars: int) -> dict[str, Any]:
    """One key per step, so that the number of verdicts is fixed; enums and bounded strings, so that it ends."""
    verdict: dict[str, Any] = {"type": "string", "enum": list(WORDS)}
    if comment_chars:
        properties = {"comment": {"type": "string", "maxLength": comment_chars}, "verdict": verdict}
        verdict = _object(properties)
    return _object({f"step_{number}": verdict for number in range(1, num_steps + 1)})


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object", "properties": properties, "required": list(properties), "additionalProperties": False,
    }  # fmt: skip


def read_votes(content: Any, num_steps: int) -> list[Label]:
    """The verdicts in a model's answer.

    Raises:
        BadAnswer: it is not one verdict for each step.
    """
    try:
        answer = json.loads(content, strict=False)  # guided decoding lets control characters into a comment
        given = [answer[f"step_{number}"] for number in range(1, num_steps + 1)]
        words = [entry["verdict"] if isinstance(entry, dict) else entry for entry in given]
        if len(answer) != num_steps:
            raise KeyError("too many steps")
        return [WORDS[word] for word in words]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BadAnswer(f"expected a verdict on each of {num_steps} steps, got {str(content)[:200]!r}") from None


def votes_of(answer: Any, num_steps: int) -> list[Label]:
    """The votes in what the server sent.

    Raises:
        BadAnswer: the model gave no verdict on each step. Unavailable: this is not a model's answer.
    """
    try:
        choice = answer["choices"][0]
        content = choice["message"]["content"]
    except (KeyError, IndexError, TypeError):
        # a proxy's error, or another kind of server: the model has no part in it
        raise Unavailable(f"expected choices[0].message.content, got {str(answer)[:200]}", "garbled") from None
    if choice.get("finish_reason") == "length":
        raise BadAnswer(f"the answer is longer than judge.process.max_tokens: ...{str(content)[-80:]!r}")
    return read_votes(content, num_steps)


def chain_of(answer: Any) -> str | None:
    """A generative reward model's answer; None where the server cut it off or it is empty: it has no verdict.

    Raises:
        Unavailable: this is not a model's answer.
    """
    try:
        choice = answer["choices"][0]
        content = choice["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise Unavailable(f"expected choices[0].message.content, got {str(answer)[:200]}", "garbled") from None
    return content if isinstance(content, str) and choice.get("finish_reason") != "length" else None


# What turns an answer into votes, which are what is kept. It alone: any other change of this module would ask for paid
# answers again.
READING = (WORDS, inspect.getsource(read_votes), inspect.getsource(votes_of))


@dataclass(frozen=True)
class _Question:
    """The requests of one vote. ``key``: of its answer in the cache."""

    key: str
    bodies: list[dict[str, Any]]
    num_steps: int


class LLMJudge(ProcessJudge[recipe.LLMJudge]):
    recipe_keys = recipe.LLMJudge

    def __init__(self, settings: recipe.LLMJudge, place: Workplace | None = None) -> None:
        super().__init__(settings, place)
        self._service = Service(
            settings.base_url, settings.model, settings.api_key_env, settings.timeout_s, settings.retries,
            settings.max_outage_s, settings.reported_model,
        )  # fmt: skip
        self._counts: Counter[str] = Counter()
        self._useless = ""  # the last useless answer
        self._begun: set[str] = set()  # keys that are asked for, or got no answer
        self._finished = 0  # votes

    @property
    def name(self) -> str:
        return f"llm:{self.settings.model}"

    def inputs(self) -> dict[str, Path]:
        prompt = self.settings.prompt or (OWN_PROMPT if self.settings.format == "schema" else None)
        return {} if prompt is None else {"prompt": prompt}

    def content_hash(self, path: Path) -> str:
        return hashlib.sha256(template_text(path).encode()).hexdigest()  # of the text, whatever its line ends

    def resources(self) -> Resources:
        return Resources(servers=server_urls(self.settings.base_url), served=self.settings.model)

    def work(self, typical: Typical) -> Work:
        if self.settings.format != "schema":
            raise UserError(
                f"the length of its answers in format {self.settings.format} is not known; judge a few solutions "
                "(stepkto judge-eval --limit) and read completion_tokens in the manifest"
            )
        shared = typical.prompt + typical.reference  # in the server's prefix cache after the first; so the instructions
        own = typical.response + STEP_MARK * typical.steps
        answer = typical.steps * (ENTRY + self.settings.comment_chars / COMMENT_CHARS)
        read = typical.solutions * (shared / typical.per_problem + own)
        written = typical.solutions * self.settings.votes * answer
        return Work(Path(self.settings.model), read, written, INSTRUCTIONS + shared + own + answer)

    @functools.cached_property
    def _template(self) -> PromptTemplate:
        return PromptTemplate(self.settings.prompt)

    @functools.cached_property
    def _format(self) -> Format | None:
        """None: the model is asked for verdicts under a JSON schema."""
        return None if self.settings.format == "schema" else format_of(self.settings.format, self.settings.prompt)

    def load(self) -> None:
        _ = self._format or self._template

    def counts(self) -> dict[str, Any]:
        counts: dict[str, Any] = dict(sorted(self._counts.items()))
        return {"judge": counts | ({"last_without_verdict": self._useless} if self._useless else {})}

    def check(self) -> None:
        super().check()
        run_async(check_servers(self._service))

    def judge(self, solutions: Solutions) -> Judged:
        """Every answer goes into the cache as it comes; verdicts are then made of what is there, in order.

        What the second pass needs of each solution is a line of a temporary file.
        """
        with (
            AnswerCache(self.place.cache / "verdicts.jsonl") as cache,
            tempfile.TemporaryFile("w+", dir=self.place.cache) as asked,
        ):
            self._ask_all(solutions, cache, asked)
            asked.seek(0)
            for line in asked:
                num_steps, keys = json.loads(line)
                given = [cache.get(key) or [None] * num_steps for key in keys]  # no answer is no verdict
                yield [majority(step, self.settings.threshold) for step in zip(*given, strict=True)]

    # --- requests ---

    def _bodies(self, solution: Solution, vote: int) -> list[dict[str, Any]]:
        """The requests of one vote: all that decides the answers."""
        if self._format is None:
            prompt = self._template.render(solution, self.settings.comment_chars > 0)
            return [self._body([{"role": "user", "content": prompt}], vote) | self._schema(len(solution.steps))]
        prompts = self._format.prompts(solution.problem.problem, [text.strip() for text in solution.step_texts])
        system = [] if self._format.system is None else [{"role": "system", "content": self._format.system}]
        return [self._body([*system, {"role": "user", "content": prompt}], vote) for prompt in prompts]

    def _body(self, messages: list[dict[str, str]], vote: int) -> dict[str, Any]:
        settings = self.settings
        return {
            "model": settings.model,
            "messages": messages,
            "temperature": settings.temperature,
            "max_tokens": settings.max_tokens,
            # spaced by hashing: servers that draw n samples from seed s use s, s + 1, ...
            "seed": int(content_key(messages[-1]["content"], vote)[:8], 16) % LARGEST_SEED,
            **settings.request,
        }

    def _schema(self, num_steps: int) -> dict[str, Any]:
        schema = answer_schema(num_steps, self.settings.comment_chars)
        if self.settings.schema_key == "structured_outputs":
            return {"structured_outputs": {"json": schema}}
        return {
            "response_format": {
                "type": "json_schema", "json_schema": {"name": "verdicts", "strict": True, "schema": schema},
            }
        }  # fmt: skip

    def _key(self, bodies: list[dict[str, Any]], num_steps: int) -> str:
        # a format's request need not say how many steps it is about; a schema does
        reading = READING if self._format is None else (type(self._format).reading(), num_steps)
        return content_key(*bodies, self.settings.reported_model, *reading)

    def _questions(self, solutions: Solutions, cache: AnswerCache, asked: IO[str]) -> Iterator[_Question | None]:
        """What is to be asked, None where there is nothing to ask. ``asked`` gets a line for each solution.

        Equal solutions are one question.
        """
        for solution in solutions:
            keys = []
            for vote in range(self.settings.votes):
                bodies = self._bodies(solution, vote)
                keys.append(key := self._key(bodies, len(solution.steps)))
                if key in cache or key in self._begun:
                    self._counts["cached"] += cache.was_kept(key)
                    self._finished += 1
                    yield None
                else:
                    self._begun.add(key)
                    yield _Question(key, bodies, len(solution.steps))
            asked.write(json.dumps([len(solution.steps), keys]) + "\n")

    def _ask_all(self, solutions: Solutions, cache: AnswerCache, asked: IO[str]) -> None:
        self._begun, self._finished = set(), 0
        self._counts["cached"] = 0
        questions = from_first(self._questions(solutions, cache, asked))
        if questions is not None:
            run_async(self._work(questions, len(solutions) * self.settings.votes, cache))

    async def _work(self, questions: Iterator[_Question | None], total: int, cache: AnswerCache) -> None:
        async with Client(self._service, self._counts) as client:
            await client.check_model()
            with ProgressBar("judging steps", total, "votes") as bar:

                def show() -> None:
                    bar.update(self._finished, self._note(), self._counts["cached"])

                async def ask(question: _Question) -> None:
                    found = await self._ask(client, question.bodies, question.num_steps)
                    if found is not None:
                        cache.put(question.key, found)
                        self._begun.discard(question.key)  # the ones without an answer stay: not asked again
                    self._finished += 1

                show()
                await ask_each(questions, min(self.settings.concurrency, total), ask, show)
        if failed := self._counts["failed"] + self._counts["too_long"]:
            warn(f"{failed} of {total} votes have no verdict and count for neither label; the last: {self._useless}")

    def _count_tokens(self, answer: Any) -> None:
        usage = answer.get("usage") if isinstance(answer, dict) else None
        for name in ("prompt_tokens", "completion_tokens"):
            self._counts[name] += int((usage or {}).get(name) or 0)

    async def _labels(self, client: Client, bodies: list[dict[str, Any]], num_steps: int) -> list[Label]:
        """The labels of one vote, from one request under the schema, or from the requests of a format.

        Raises:
            NoAnswer: no step has a verdict, or ``client.post`` says so. TooLong: as ``client.post``.
        """

        def read(answer: Any) -> list[Label]:
            self._count_tokens(answer)
            return votes_of(answer, num_steps)

        def read_chain(answer: Any) -> str | None:
            self._count_tokens(answer)
            return chain_of(answer)

        if self._format is None:
            return await client.post("/chat/completions", bodies[0], read)
        labels: list[Label] = []
        asked = num_steps if len(bodies) == 1 else 1
        said: list[dict[str, str]] = []  # of a conversation, without the system's message
        chain: str | None = None
        for body in bodies:
            *before, own = body["messages"]
            try:
                chain = await client.post("/chat/completions", {**body, "messages": [*before, *said, own]}, read_chain)
            except TooLong:
                if not labels:
                    raise
                self._counts["steps_too_long"] += num_steps - len(labels)
                break  # the requests of later steps are longer still
            self._counts["cut_off"] += chain is None
            labels += [None] * asked if chain is None else self._format.read(chain, asked)
            if self._format.conversation:
                if chain is None:
                    break  # a critique is missing: the model was not trained to go on without it
                said += [own, {"role": "assistant", "content": chain}]
        labels += [None] * (num_steps - len(labels))
        self._counts["steps_without_verdict"] += labels.count(None)
        if not any(label is not None for label in labels):
            got = "an answer cut off at judge.process.max_tokens" if chain is None else repr(chain[-200:])
            raise NoAnswer(f"expected verdicts in the format {self.settings.format}, got {got}")
        return labels

    async def _ask(self, client: Client, bodies: list[dict[str, Any]], num_steps: int) -> list[Label] | None:
        """One vote; None if there is none."""
        try:
            found = await self._labels(client, bodies, num_steps)
            self._counts["answered"] += 1
            return found
        except TooLong as error:
            self._counts["too_long"] += 1
            self._useless = str(error)
        except NoAnswer as error:
            self._counts["failed"] += 1
            self._useless = str(error)
        useless = self._counts["failed"] + self._counts["too_long"]
        answered = self._counts["answered"] + self._counts["cached"]
        # too long a request is refused at once: it must not count while the ones beside it are being answered
        if useless >= max(FEW, self.settings.concurrency) and useless > answered:
            raise UserError(
                f"{useless} of the first {useless + answered} votes have no verdict; the last: "
                f"{self._useless}; check the model, judge.process.max_tokens and judge.process.prompt"
            )
        return None

    def _note(self) -> str:
        counts = self._counts
        tried = sum(count for name, count in counts.items() if name.startswith("status_"))
        tried += sum(counts[name] for name in ("bad_answers", "time_outs", "connection_errors", "garbled"))
        return (
            f"{counts['prompt_tokens']:,} + {counts['completion_tokens']:,} tokens"
            + (f", {counts['cached']:,} cached" if counts["cached"] else "")
            + (f", {tried:,} failed attempts" if tried else "")
        )
