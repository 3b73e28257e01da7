"""Many requests to OpenAI-compatible servers: bounded, retried, spread over the servers that live.

What no retry can mend (a wrong key, an unknown model, a malformed request, no server left) ends the work at
once; what a retry may mend (429, 5xx, time-outs, broken connections, answers that do not parse) is tried again
with exponential back-off and full jitter, or after the time that the server names in Retry-After.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TypeVar

import aiohttp

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.progress import warn

T = TypeVar("T")
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
LONGEST_RETRY_AFTER_S = 120.0
DEAD_AFTER_S = 20.0  # a server that refuses connections for so long is dropped
TRY_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
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


@dataclass
class _Server:
    url: str
    failing_since: float | None = None
    last_failure: str = ""
    rest_until: float = 0.0


@dataclass(frozen=True)
class Service:
    """``base_url`` may name several servers of one model, separated by commas."""

    base_url: str
    api_key_env: str | None
    timeout_s: float
    retries: int
    key: str = "judge.process"

    def urls(self) -> list[str]:
        urls = [url.strip().rstrip("/") for url in self.base_url.split(",") if url.strip()]
        for url in urls:
            if not url.startswith(("http://", "https://")):
                raise UserError(f"{self.key}.base_url: {url!r} is no URL; expected http://host:port/v1")
        return urls

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
    """``async with Client(service) as client: await client.check_model(...); await client.post(...)``."""

    service: Service
    events: Counter[str] = field(default_factory=Counter)

    async def __aenter__(self) -> Self:
        self._servers = [_Server(url) for url in self.service.urls()]
        self._turn = 0
        self._last_words = ""
        self._session = aiohttp.ClientSession(
            headers=self.service.headers(),
            timeout=aiohttp.ClientTimeout(total=self.service.timeout_s),
            connector=aiohttp.TCPConnector(limit=0),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    # --- before the work ---

    async def check_model(self, model: str) -> None:
        """Is every server up, with this model? Those that are down are left out, with a warning.

        Raises:
            UserError: none is up, the key is refused, or one has not the model.
        """
        found = await asyncio.gather(*(self._models(server) for server in self._servers))
        for server, names in zip(self._servers, found, strict=True):
            if isinstance(names, list) and names and model not in names:
                raise UserError(
                    f"{self.service.key}.model: {server.url} has no model {model!r}; it has {', '.join(names[:10])}"
                )
        down = [f"{s.url} ({n})" for s, n in zip(self._servers, found, strict=True) if isinstance(n, str)]
        self._servers = [s for s, n in zip(self._servers, found, strict=True) if not isinstance(n, str)]
        if not self._servers:
            raise UserError(
                f"{self.service.key}.base_url: no server answers: {', '.join(down)}; start it, or correct the key"
            )
        if down:
            warn(f"{self.service.key}.base_url: going on without {', '.join(down)}")

    async def _models(self, server: _Server) -> list[str] | str | None:
        """Names of its models; None where it does not list them; a text where it is down."""
        try:
            limit = aiohttp.ClientTimeout(total=min(10.0, self.service.timeout_s))
            async with self._session.get(f"{server.url}/models", timeout=limit) as response:
                if response.status in (401, 403):
                    raise self._refused(server, response.status, await _text(response))
                if response.status in (502, 503, 504):
                    return f"status {response.status}"
                with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                    return [str(row["id"]) for row in json.loads(await _text(response))["data"]]
                return None
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return _reason(error)

    # --- the work ---

    async def post(self, path: str, body: dict[str, Any], read: Callable[[Any], T]) -> T:
        """POST ``body`` and hand the JSON that comes back to ``read``, which raises BadAnswer where it is none.

        ``path`` counts from /v1; with two slashes from the server's root.

        Raises:
            TooLong: the server says that the request does not fit. NoAnswer: all attempts failed.
            UserError: no attempt can succeed, or no server is left.
        """
        reason = ""
        for attempt in range(self.service.retries + 1):
            server = await self._next_server()
            pause = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**attempt) * random.random()
            try:
                async with self._session.post(_url(server, path), json=body) as response:
                    text = await _text(response)
                    server.failing_since = None
                    if response.status == 200:
                        return read(_parse(text))
                    self._check_status(server, response.status, text)
                    reason = f"status {response.status}: {text[:200]}"
                    self.events[f"status_{response.status}"] += 1
                    pause = _retry_after(response.headers.get("Retry-After")) or pause
            except BadAnswer as error:
                reason = str(error)
                self.events["bad_answers"] += 1
            except TimeoutError:
                reason = f"no answer in {self.service.timeout_s:g} s"
                self.events["time_outs"] += 1
            except (aiohttp.ClientError, OSError) as error:
                reason = _reason(error)
                self.events["connection_errors"] += 1
                self._failed(server, reason)
            if attempt < self.service.retries:
                await asyncio.sleep(pause)
        raise NoAnswer(reason)

    async def _next_server(self) -> _Server:
        """In turn; a server that just failed rests while another lives."""
        if not self._servers:
            raise UserError(
                f"{self.service.key}.base_url: no server is left ({self._last_words}); start one again and run the "
                "same command: answers so far are kept"
            )
        now = time.monotonic()
        awake = [server for server in self._servers if server.rest_until <= now] or self._servers
        self._turn += 1
        return awake[self._turn % len(awake)]

    def _failed(self, server: _Server, reason: str) -> None:
        now = time.monotonic()
        server.failing_since = server.failing_since or now
        server.rest_until = now + DEAD_AFTER_S / 8
        if now - server.failing_since >= DEAD_AFTER_S and server in self._servers:
            self._servers.remove(server)
            self._last_words = f"{server.url}: {reason}"
            if self._servers:
                warn(f"{server.url} is dropped: {reason}; {len(self._servers)} servers are left")

    def _check_status(self, server: _Server, status: int, text: str) -> None:
        if status in TRY_AGAIN:
            return
        if status in (401, 403):
            raise self._refused(server, status, text)
        if status in (400, 413, 422) and any(words in text.lower() for words in _TOO_LONG):
            raise TooLong(text[:200])
        raise UserError(f"{server.url} refuses the request with status {status}: {text[:400]}")

    def _refused(self, server: _Server, status: int, text: str) -> UserError:
        given = f"the key in {self.service.api_key_env}" if self.service.api_key_env else "a request without a key"
        return UserError(
            f"{server.url} refuses {given} (status {status}: {text[:200]}); "
            f"correct {self.service.key}.api_key_env or the variable that it names"
        )


async def check_servers(service: Service, model: str) -> None:
    """``Client.check_model``, of a client that asks nothing else."""
    async with Client(service) as client:
        await client.check_model(model)


def _url(server: _Server, path: str) -> str:
    return server.url.removesuffix("/v1") + path[1:] if path.startswith("//") else server.url + path


async def _text(response: aiohttp.ClientResponse) -> str:
    return (await response.read()).decode("utf-8", "replace")


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise BadAnswer(f"the server's answer is no JSON: {text[:100]!r}") from None


def _reason(error: BaseException) -> str:
    return "time-out" if isinstance(error, TimeoutError) else str(error) or type(error).__name__


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
