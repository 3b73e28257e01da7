"""Many requests to OpenAI-compatible servers: bounded, retried, spread over the servers that answer.

Three kinds of failure are kept apart:

- *The server* does not answer (refused, reset or hung connections, names that do not resolve, 429, 502 to 504, a
  proxy's page, half an answer). That says nothing about what was asked, so it is never a result: requests wait, with
  exponential back-off and full jitter or as long as Retry-After says, until a server answers again. When none has
  answered for ``max_outage_s`` the work stops.
- *The answer* is one, but not to what was asked (``BadAnswer``): asked again ``retries`` times, then ``NoAnswer``.
- *The request* can never be answered: too long for the model (``TooLong``, of this request alone), a wrong key, an
  unknown model, a malformed request (the work stops at once).
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import itertools
import json
import os
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

import aiohttp

from megatron_stepkto.base.errors import StageFailed, UserError
from megatron_stepkto.base.progress import say, warn
from megatron_stepkto.recipe.judge_keys import server_urls

T = TypeVar("T")
Q = TypeVar("Q")
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
LONGEST_RETRY_AFTER_S = 120.0
SAY_AFTER_S, SAY_EVERY_S = 10.0, 30.0  # of an outage
CHECK_S = 3.0  # how long a check before the work waits for a server
FEWEST_FAULTS = 3  # answers of status 500 to one request, while others are answered, before it counts as its fault
# may pass: 5xx but for "not implemented", 500 is told apart; 52x are of proxies such as Cloudflare's
NOT_NOW = frozenset({408, 409, 425, 429, *range(502, 600)}) - {505}
_TOO_LONG = (
    "context length",
    "context_length",
    "too long",
    "maximum model length",
    "max_model_len",
    "reduce the length",
)


class BadAnswer(Exception):
    """An answer that is not what was asked for: asked again, a sampling model may do better."""


class TooLong(Exception):
    """The request does not fit into the model: it will never be answered."""


class NoAnswer(Exception):
    """Every attempt failed; says how the last one did."""


class Unavailable(Exception):
    """The server gave no answer of its kind; says what came instead. ``pause_s``: how long it asks to be left alone."""

    def __init__(self, reason: str, event: str, pause_s: float | None = None) -> None:
        super().__init__(reason)
        self.event, self.pause_s = event, pause_s


@dataclass
class _Server:
    url: str
    answered: int = 0  # requests
    last_answer: float = 0.0
    failing_since: float | None = None
    last_failure: float = 0.0
    failures: int = 0  # in a row; those of requests that were under way together count once
    rest_until: float = 0.0
    said_at: float | None = None  # of this outage


@dataclass(frozen=True)
class Service:
    """``base_url`` may name several servers of one model, separated by commas.

    ``model``: as it is asked for. ``reported_model``: as answers name it, None: the same.
    """

    base_url: str
    model: str
    api_key_env: str | None
    timeout_s: float
    retries: int
    max_outage_s: float
    reported_model: str | None = None
    key: str = "judge.process"

    def urls(self) -> tuple[str, ...]:
        """Raises UserError where one is not a URL."""
        try:
            return server_urls(self.base_url)
        except ValueError as error:
            raise UserError(f"{self.key}.base_url: {error}") from None

    def headers(self) -> dict[str, str]:
        if self.api_key_env is None:
            return {}
        secret = os.environ.get(self.api_key_env)
        if not secret:
            raise UserError(
                f"{self.key}.api_key_env names the environment variable {self.api_key_env}, which is not set; set it"
            )
        return {"Authorization": f"Bearer {secret}"}


@dataclass
class Client:
    """``async with Client(service) as client: await client.check_model(); await client.post(...)``."""

    service: Service
    events: Counter[str] = field(default_factory=Counter)

    async def __aenter__(self) -> Self:
        self._servers = [_Server(url) for url in self.service.urls()]
        self._turn = 0
        self._said_at: float | None = None  # that no server answers
        self._session = aiohttp.ClientSession(
            headers=self.service.headers(),
            timeout=aiohttp.ClientTimeout(total=self.service.timeout_s),
            connector=aiohttp.TCPConnector(limit=0),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    # --- before the work ---

    async def check_model(self) -> None:
        """Wait until a server is up, and check that all that are up have the model.

        Raises:
            UserError: the key is refused, or a server does not have the model. StageFailed: none answers for
                ``max_outage_s``.
        """
        await asyncio.gather(*(self._check_server(server) for server in self._servers))
        attempt = 0
        while not any(server.failing_since is None for server in self._servers):
            await asyncio.sleep(_pause(attempt))
            attempt += 1
            await self._check_server(await self._next_server())

    async def _check_server(self, server: _Server) -> None:
        begun = time.monotonic()
        try:
            names = await self._models(server)
        except Unavailable as error:
            self._failed(server, begun, error)
            return
        self._answered(server)
        self._check_has_model(server, names)

    async def silent_servers(self) -> list[str]:
        """Which servers do not answer now, and why. Raises UserError: the key is refused, or one has not the model."""
        silent = []
        for server in self._servers:
            try:
                self._check_has_model(server, await self._models(server))
            except Unavailable as error:
                silent.append(f"{server.url} ({error})")
        return silent

    def _check_has_model(self, server: _Server, names: list[str]) -> None:
        if names and self.service.model not in names:
            raise UserError(
                f"{self.service.key}.model: {server.url} has no model {self.service.model!r}; it has "
                f"{', '.join(names[:10])}"
            )

    async def _models(self, server: _Server) -> list[str]:
        """Names of its models; none where it does not list them."""
        limit = aiohttp.ClientTimeout(total=min(10.0, self.service.timeout_s))
        with _connection_failures(limit.total or 0.0):
            async with self._session.get(f"{server.url}/models", timeout=limit) as response:
                if response.status in (401, 403):
                    raise self._refused(server, response.status, await _text(response))
                if response.status in NOT_NOW:
                    raise _not_now(response, "")
                with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                    return [str(row["id"]) for row in json.loads(await _text(response))["data"]]
        return []

    # --- the work ---

    async def post(self, path: str, body: dict[str, Any], read: Callable[[Any], T]) -> T:
        """POST ``body`` and hand the JSON that comes back to ``read``.

        ``path`` counts from /v1; with two slashes from the server's root. ``read`` raises BadAnswer where the answer is
        not to what was asked, Unavailable where it is not an answer of such a server.

        Raises:
            TooLong: the server says that the request does not fit. NoAnswer: no attempt gave what was asked for.
            UserError: no attempt can succeed. StageFailed: no server answers for ``max_outage_s``.
        """
        faults = {"bad": 0, "500": 0}
        answered = {server.url: server.answered for server in self._servers}
        attempt = 0  # since the last answer
        while True:
            server, begun = await self._next_server(), time.monotonic()
            try:
                found = await self._attempt(server, path, body, read)
            except BadAnswer as error:
                self.events["bad_answers"] += 1
                self._answered(server)
                faults["bad"] += 1
                if faults["bad"] > self.service.retries:
                    raise NoAnswer(str(error)) from None
                attempt = 0
                await asyncio.sleep(_pause(attempt))
            except TooLong:
                self._answered(server)
                raise
            except Unavailable as error:
                self.events[error.event] += 1
                if error.event == "status_500" and server.answered > answered[server.url]:
                    # others are answered: this request makes the server fail
                    answered[server.url] = server.answered
                    faults["500"] += 1
                    if faults["500"] > max(self.service.retries, FEWEST_FAULTS):
                        raise NoAnswer(str(error)) from None
                self._failed(server, begun, error)
                attempt += 1
                await asyncio.sleep((error.pause_s or 0.0) + _pause(0 if error.pause_s else attempt))
            else:
                self._answered(server)
                return found

    async def _attempt(self, server: _Server, path: str, body: dict[str, Any], read: Callable[[Any], T]) -> T:
        with _connection_failures(self.service.timeout_s):
            async with self._session.post(_url(server, path), json=body) as response:
                text = await _text(response)
                if response.status == 500 or response.status in NOT_NOW:
                    raise _not_now(response, text)
                if response.status != 200:
                    raise self._refusal(server, response.status, text)
        answer = _parse(text)
        self._check_reported(server, answer)
        return read(answer)

    def _check_reported(self, server: _Server, answer: Any) -> None:
        """Labels by a model that was not asked for would look like the asked one's."""
        expected = self.service.reported_model or self.service.model
        reported = answer.get("model") if isinstance(answer, dict) else None
        if isinstance(reported, str) and reported != expected:
            raise UserError(
                f"{self.service.key}: asked {server.url} for the model {expected!r}, the answer is from {reported!r}; "
                f"name that one in the recipe, or set reported_model: {reported} if both are the same model"
            )

    # --- which server, and for how long none ---

    async def _next_server(self) -> _Server:
        """In turn. A server that does not answer rests while another does; after each rest one request tries it."""
        now = time.monotonic()
        awake = [server for server in self._servers if server.rest_until <= now] or self._servers
        self._turn += 1
        server = awake[self._turn % len(awake)]
        if server.failing_since is not None:
            server.rest_until = now + _rest(server)
        return server

    def _answered(self, server: _Server) -> None:
        if server.said_at is not None and server.failing_since is not None:
            say(f"{server.url} answers again, after {time.monotonic() - server.failing_since:.0f} s")
        server.answered += 1
        server.last_answer = time.monotonic()
        self._said_at = None
        server.failing_since, server.failures, server.rest_until, server.said_at = None, 0, 0.0, None

    def _failed(self, server: _Server, begun: float, error: Unavailable) -> None:
        """Note a failed attempt, begun at ``begun``.

        Raises:
            StageFailed: no server has answered for ``max_outage_s``.
        """
        now = time.monotonic()
        if server.failing_since is None:
            # an answer to another request, while this one was under way, shows that it lived until then
            server.failing_since = max(begun, server.last_answer)
        if begun >= server.last_failure:
            server.failures += 1
        server.last_failure = now
        server.rest_until = now + (error.pause_s or _rest(server))
        since = [each.failing_since for each in self._servers if each.failing_since is not None]
        silent = now - max(since) if len(since) == len(self._servers) else None
        if silent is not None and silent >= self.service.max_outage_s:
            raise StageFailed(
                f"{self._names()} not answered for {_spelled(silent)} ({error}), longer than "
                f"{self.service.key}.max_outage_s; finished work is kept: start the server and run the same command "
                "again"
            )
        self._say(server, now, silent, error)

    def _say(self, server: _Server, now: float, silent: float | None, error: Unavailable) -> None:
        """A line when an outage has lasted a while, and again from time to time.

        silent: seconds since which no server answers; None: another does.
        """
        assert server.failing_since is not None
        if silent is None:
            if server.said_at is None and now - server.failing_since >= SAY_AFTER_S:
                server.said_at = now
                warn(f"{server.url} does not answer ({error}); the other servers continue")
            return
        # a wrong address shows at once
        never = all(each.answered == 0 for each in self._servers)
        if silent >= SAY_AFTER_S or never:
            if self._said_at is not None and now - self._said_at < SAY_EVERY_S:
                return
            self._said_at = server.said_at = now
            warn(
                f"{self._names()} not answered for {silent:.0f} s ({error}); waiting up to "
                f"{_spelled(self.service.max_outage_s)} ({self.service.key}.max_outage_s)"
            )

    def _names(self) -> str:
        urls = ", ".join(server.url for server in self._servers)
        return f"judge server at {urls} has" if len(self._servers) == 1 else f"judge servers at {urls} have"

    # --- what a status says ---

    def _refusal(self, server: _Server, status: int, text: str) -> Exception:
        if status in (401, 403):
            return self._refused(server, status, text)
        if status in (400, 413, 422) and any(words in text.lower() for words in _TOO_LONG):
            return TooLong(text[:200])
        return UserError(f"{server.url} refuses the request with status {status}: {text[:400]}")

    def _refused(self, server: _Server, status: int, text: str) -> UserError:
        given = f"the key in {self.service.api_key_env}" if self.service.api_key_env else "a request without a key"
        return UserError(
            f"{server.url} refuses {given} (status {status}: {text[:200]}); "
            f"correct {self.service.key}.api_key_env or the variable that it names"
        )


async def check_servers(service: Service) -> None:
    """Before the work: does a server answer, and have those that do the model? There is nothing to lose yet, so the
    wait is short.

    Raises:
        UserError: none answers, the key is refused, or one has not the model.
    """
    deadline = time.monotonic() + CHECK_S
    async with Client(service) as client:
        while len(silent := await client.silent_servers()) == len(service.urls()):
            if time.monotonic() > deadline:
                raise UserError(
                    f"{service.key}.base_url: no server answers: {', '.join(silent)}; start one first (where a "
                    "cluster's judging jobs start it, JUDGE_SERVER in the site file, this is no fault)"
                )
            await asyncio.sleep(_pause(0))


async def served_models(service: Service) -> list[str]:
    """Names of the models at the servers, asked once; none where no server lists them.

    Raises:
        UserError: no server answers, or the key is refused.
    """
    names: list[str] = []
    silent = []
    async with Client(service) as client:
        for server in client._servers:
            try:
                names += await client._models(server)
            except Unavailable as error:
                silent.append(f"{server.url} ({error})")
    if len(silent) == len(service.urls()):
        raise UserError(f"no server answers: {', '.join(silent)}")
    return list(dict.fromkeys(names))


def _url(server: _Server, path: str) -> str:
    return server.url.removesuffix("/v1") + path[1:] if path.startswith("//") else server.url + path


async def _text(response: aiohttp.ClientResponse) -> str:
    return (await response.read()).decode("utf-8", "replace")


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise Unavailable(f"the answer is not JSON: {text[:100]!r}", "garbled") from None


@contextlib.contextmanager
def _connection_failures(timeout_s: float) -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        raise Unavailable(f"no answer in {timeout_s:g} s", "time_outs") from None
    except (aiohttp.ClientError, OSError) as error:
        raise Unavailable(str(error) or type(error).__name__, "connection_errors") from None


def _not_now(response: aiohttp.ClientResponse, text: str) -> Unavailable:
    event = f"status_{response.status}"
    reason = f"status {response.status}: {text[:200]}" if text else f"status {response.status}"
    return Unavailable(reason, event, _retry_after(response.headers.get("Retry-After")))


def _pause(attempt: int) -> float:
    """Seconds before another attempt: full jitter, or all requests would come back at the same instant."""
    return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(attempt, 10)) * random.random()


def _rest(server: _Server) -> float:
    return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(server.failures, 10))


def _spelled(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


def _retry_after(header: str | None) -> float | None:
    """Seconds, from a number or a date; bounded, or one header could stop the work for days."""
    if not header:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER_S)


def run_async(work: Coroutine[Any, Any, None]) -> None:
    """Run ``work``; of a group of failures, as tasks that ran side by side leave, the first is the cause."""
    try:
        asyncio.run(work)
    except BaseExceptionGroup as group:
        cause: BaseException = group
        while isinstance(cause, BaseExceptionGroup):
            cause = cause.exceptions[0]
        raise cause from None


def from_first(questions: Iterator[Q | None]) -> Iterator[Q | None] | None:
    """The questions from the first that is to be asked; None where there is none, so that no server is needed."""
    first = next((question for question in questions if question is not None), None)
    return None if first is None else itertools.chain([first], questions)


async def ask_each(
    questions: Iterator[Q | None], at_once: int, ask: Callable[[Q], Awaitable[None]], show: Callable[[], None]
) -> None:
    """Ask the questions, ``at_once`` at a time, and read them only as they are asked.

    Args:
        questions: None stands for one that needs no answer.
        show: shows the progress, after each.
    """

    async def worker() -> None:
        for question in questions:
            if question is None:
                await asyncio.sleep(0)  # answers on their way are not kept waiting
            else:
                await ask(question)
            show()

    async with asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(worker())
