"""The LLM judge against servers over HTTP that answer well, badly, late or not at all."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

from megatron_stepkto.base.cache import AnswerCache
from megatron_stepkto.base.errors import StageFailed, UserError
from megatron_stepkto.base.records import Label, Problem, Step
from megatron_stepkto.judging.process import client as clients
from megatron_stepkto.judging.process import llm
from megatron_stepkto.judging.process.interface import Solution, Verdict, Workplace, cut_after_first_error, majority
from megatron_stepkto.judging.process.llm import LLMJudge, PromptTemplate, answer_schema, read_votes
from megatron_stepkto.recipe.keys import LLMJudge as Settings
from tests.scripted_server import Reply, ScriptedServer, chat


def solution(number: int, steps: list[str]) -> Solution:
    ends = list(accumulate(map(len, steps)))
    spans = tuple(
        Step(start=end - len(s), end=end, token_start=0, token_end=0) for s, end in zip(steps, ends, strict=True)
    )
    problem = Problem(problem_id=f"p{number}", problem=f"Problem {number}?", answer="7", solution="Because.")
    return Solution(f"s{number}", problem, "".join(steps), spans)


SOLUTIONS = [solution(n, [f"good {n}\n", "bad\n", "unclear"][: 1 + n % 3]) for n in range(12)]
WORD = {"good": "right", "bad": "wrong", "unclear": "unsure"}
EXPECTED: dict[str, Label] = {"good": 1, "bad": 0, "unclear": None}


def steps_in(body: dict[str, Any]) -> list[str]:
    return re.findall(r"\[step \d+\]\n(\w+)", body["messages"][0]["content"])


def honest(body: dict[str, Any], number: int = 0) -> Reply:
    """Verdicts that follow from the steps' first words."""
    return chat({f"step_{n}": {"comment": "", "verdict": WORD[word]} for n, word in enumerate(steps_in(body), 1)})


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(clients, "LONGEST_PAUSE_S", 0.1)


def judge(url: str, cache: Path, **changes: Any) -> LLMJudge:
    options = {"kind": "llm", "base_url": url, "model": "judge", "timeout_s": 60.0, "max_outage_s": 60.0, **changes}
    return LLMJudge(Settings.model_validate(options), Workplace(cache))


def labels(verdicts: list[Any]) -> list[list[Label]]:
    return [[verdict.label for verdict in row] for row in verdicts]


ALL_RIGHT = [[EXPECTED[text.split()[0]] for text in s.step_texts] for s in SOLUTIONS]


def test_verdicts_seeds_and_schema(tmp_path: Path) -> None:
    with ScriptedServer(honest) as server:
        asked = judge(server.url, tmp_path, votes=3, concurrency=4)
        verdicts = list(asked.judge(SOLUTIONS))
    assert labels(verdicts) == ALL_RIGHT
    assert verdicts[1] == [Verdict(1, (1, 1, 1), 1.0), Verdict(0, (0, 0, 0), 0.0)]
    assert len(server.requests) == 36 and len({body["seed"] for body in server.requests}) == 36
    assert server.most_under_way <= 4
    assert set(server.paths) == {"/v1/chat/completions"}
    counts = asked.counts()["judge"]
    assert counts == {"answered": 36, "cached": 0, "prompt_tokens": 3600, "completion_tokens": 360}
    prompt = server.requests[0]["messages"][0]["content"]
    assert "Problem 0?" in prompt and "Because." in prompt and "Correct final answer: 7" in prompt
    sent = server.requests[0]["response_format"]["json_schema"]
    assert sent["strict"] and sent["schema"]["required"] == ["step_1"]
    assert sent["schema"]["properties"]["step_1"]["properties"]["verdict"]["enum"] == ["right", "wrong", "unsure"]


def test_structured_outputs_and_further_keys(tmp_path: Path) -> None:
    with ScriptedServer(honest) as server:
        changes = {"schema_key": "structured_outputs", "request": {"top_k": 20}, "comment_chars": 0}
        assert labels(list(judge(server.url, tmp_path, **changes).judge(SOLUTIONS[:3]))) == ALL_RIGHT[:3]
    body = max(server.requests, key=lambda b: len(steps_in(b)))
    assert "response_format" not in body and body["top_k"] == 20
    assert body["structured_outputs"]["json"] == answer_schema(3, 0)
    assert answer_schema(3, 0)["properties"]["step_3"] == {"type": "string", "enum": ["right", "wrong", "unsure"]}


def test_votes_that_differ(tmp_path: Path) -> None:
    """Four votes on the one step: right, wrong, wrong, right is a tie; three to one is not."""
    one = [solution(0, ["good"])]
    for given, expected in (("RWWR", None), ("RRWR", 1), ("WWRW", 0), ("UURR", None), ("RRRU", 1)):
        words = iter(given)
        code = {"R": "right", "W": "wrong", "U": "unsure"}
        with ScriptedServer(lambda body, n, w=words, c=code: chat({"step_1": {"verdict": c[next(w)]}})) as server:  # type: ignore[misc]
            verdicts = list(judge(server.url, tmp_path / given, votes=4, concurrency=1).judge(one))
        assert labels(verdicts) == [[expected]], given
        assert verdicts[0][0].score == given.count("R") / (4 - given.count("U"))  # type: ignore[index]


@pytest.mark.parametrize(
    ("votes", "threshold", "label", "score"),
    [
        ([1, 1, 0], 0.5, 1, 2 / 3), ([1, 1, 0], 0.7, None, 2 / 3), ([1, 1, 0], 1.0, None, 2 / 3),
        ([0, 0, 0], 0.9, 0, 0.0), ([0, 0, 0], 1.0, 0, 0.0), ([0, 0, 1, None, 0], 0.5, 0, 0.25),
        ([None, None, 1], 0.5, None, 1.0), ([1, 1, None, None], 0.5, None, 1.0),
        ([None, None], 0.5, None, None), ([], 0.5, None, None),
    ],
)  # fmt: skip
def test_majority(votes: list[Label], threshold: float, label: Label, score: float | None) -> None:
    verdict = majority(votes, threshold)
    assert (verdict.label, verdict.score) == (label, score)


def test_labels_after_the_first_error_may_be_dropped() -> None:
    given = [Verdict(1), Verdict(None), Verdict(0, (0, 0)), Verdict(1, (1, 1), 1.0), Verdict(0)]
    cut = cut_after_first_error(given)
    assert [v.label for v in cut] == [1, None, 0, None, None]
    assert cut[3].votes == (1, 1) and cut[3].score == 1.0


BAD = {
    "429": Reply("slow down", 429), "500": Reply("oops", 500), "503": Reply("starting", 503),
    "broken JSON": chat('{"step_1": {"verd'), "no JSON": Reply("<html>"), "no choices": Reply({"error": "?"}),
    "cut off": chat("{", "length"), "another word": chat({"step_1": {"verdict": "maybe"}}),
    "a step too few": chat({}), "a step too many": chat({f"step_{n}": {"verdict": "right"} for n in range(1, 9)}),
    "dropped": Reply(drop=True), "silence": Reply("late", hang_s=2.0),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD)
def test_what_a_retry_can_mend(tmp_path: Path, fault: str) -> None:
    """Every first attempt fails; the second is answered."""
    seen: Counter[int] = Counter()

    def script(body: dict[str, Any], number: int) -> Reply:
        seen[body["seed"]] += 1
        return BAD[fault] if seen[body["seed"]] == 1 else honest(body)

    silent = fault == "silence"
    with ScriptedServer(script) as server:
        asked = judge(server.url, tmp_path, timeout_s=1.0 if silent else 60.0, concurrency=3)
        assert labels(list(asked.judge(SOLUTIONS[:6]))) == ALL_RIGHT[:6]
    counts = asked.counts()["judge"]
    assert counts["answered"] == 6
    failed = sum(counts.values()) - sum(counts[n] for n in ("answered", "prompt_tokens", "completion_tokens"))
    if silent:  # on a busy machine an honest answer may be late, too
        assert failed == counts["time_outs"] >= 6
    else:
        assert failed == 6
        assert len(server.requests) == 12


def test_retry_after_is_honoured(tmp_path: Path) -> None:
    times: list[float] = []

    def script(body: dict[str, Any], number: int) -> Reply:
        times.append(time.monotonic())
        return honest(body) if number else Reply("wait", 429, {"Retry-After": "0.7"})

    with ScriptedServer(script) as server:
        list(judge(server.url, tmp_path).judge(SOLUTIONS[:1]))
    assert len(times) == 2 and times[1] - times[0] >= 0.69


def test_retry_after_as_a_date_and_nonsense() -> None:
    assert clients._retry_after("Wed, 21 Oct 2099 07:28:00 GMT") == clients.LONGEST_RETRY_AFTER_S
    assert clients._retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert clients._retry_after("3") == 3 and clients._retry_after("99999999") == clients.LONGEST_RETRY_AFTER_S
    assert clients._retry_after("soon") is None and clients._retry_after(None) is None


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (Reply("bad key", 401), "refuses a request without a key .status 401: bad key"),
        (Reply({"error": "The model `judge` does not exist"}, 404), "does not exist"),
        (Reply({"error": "unknown field response_format"}, 400), "status 400.*unknown field"),
    ],
)
def test_what_no_retry_can_mend_ends_at_once(tmp_path: Path, reply: Reply, said: str) -> None:
    with ScriptedServer(lambda body, number: reply) as server, pytest.raises(UserError, match=said):
        list(judge(server.url, tmp_path, concurrency=2).judge(SOLUTIONS))
    assert len(server.requests) <= 2


def test_no_request_is_made_to_a_wrong_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ScriptedServer(honest) as server, pytest.raises(UserError, match="no model 'llama'; it has judge"):
        list(judge(server.url, tmp_path, model="llama").judge(SOLUTIONS))
    with ScriptedServer(honest, models=Reply("no", 401)) as locked, pytest.raises(UserError, match="status 401"):
        list(judge(locked.url, tmp_path).judge(SOLUTIONS))
    assert not server.requests and not locked.requests
    for address in ("localhost", "localhost:8000/v1", "http://", "http:///v1", "ftp://host/v1", "http://[::1/v1",
                    "http://host:port/v1", "http://host/v1,host"):  # fmt: skip
        with pytest.raises(ValueError, match=r"is not a URL; expected http://host:port/v1"):
            judge(address, tmp_path)
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(UserError, match="JUDGE_KEY, which is not set"):
        list(judge(server.url, tmp_path, api_key_env="JUDGE_KEY").judge(SOLUTIONS))


def test_the_key_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    with ScriptedServer(honest) as server:
        list(judge(server.url, tmp_path, api_key_env="JUDGE_KEY").judge(SOLUTIONS[:2]))
    assert set(server.keys) == {"Bearer secret"}
    assert "secret" not in (tmp_path / "cache" / "verdicts.jsonl").read_text()


def test_a_solution_that_does_not_fit_loses_its_votes_alone(tmp_path: Path) -> None:
    def script(body: dict[str, Any], number: int) -> Reply:
        too_long = "Problem 4?" in body["messages"][0]["content"]
        return Reply("This model's maximum context length is 10 tokens", 400) if too_long else honest(body)

    with ScriptedServer(script) as server:
        asked = judge(server.url, tmp_path)
        verdicts = labels(list(asked.judge(SOLUTIONS)))
    assert verdicts == [[None, None] if n == 4 else row for n, row in enumerate(ALL_RIGHT)]
    assert asked.counts()["judge"]["too_long"] == 1 and len(server.requests) == 12


def test_many_that_do_not_fit_stop_neither_the_work_nor_its_second_run(tmp_path: Path) -> None:
    """A refusal comes at once: before the answers that are under way, and on a second run before anything else."""
    many = [solution(n, ["good"]) for n in range(120)]

    def script(body: dict[str, Any], number: int) -> Reply:
        place = int(re.findall(r"Problem (\d+)\?", body["messages"][0]["content"])[0])
        return Reply("This model's maximum context length is 10 tokens", 400) if place % 4 == 0 else honest(body)

    expected = [[None] if n % 4 == 0 else [1] for n in range(120)]
    with ScriptedServer(script) as server:
        for asked_now, kept in ((120, 0), (30, 90)):
            before = len(server.requests)
            asked = judge(server.url, tmp_path, concurrency=8)
            assert labels(list(asked.judge(many))) == expected
            counts = asked.counts()["judge"]
            assert (counts["too_long"], counts["cached"]) == (30, kept)
            assert len(server.requests) - before == asked_now


def test_as_many_votes_as_are_under_way_are_waited_for(tmp_path: Path) -> None:
    many = [solution(n, ["good"]) for n in range(60)]

    def script(body: dict[str, Any], number: int) -> Reply:
        place = int(re.findall(r"Problem (\d+)\?", body["messages"][0]["content"])[0])
        if place < 25:
            return Reply("This model's maximum context length is 10 tokens", 400)
        time.sleep(0.3)
        return honest(body)

    with ScriptedServer(script) as server:
        found = labels(list(judge(server.url, tmp_path, concurrency=60).judge(many)))
    assert found == [[None]] * 25 + [[1]] * 35


def test_a_judge_of_useless_answers_is_stopped(tmp_path: Path) -> None:
    many = [solution(n, ["good"]) for n in range(200)]
    with (
        ScriptedServer(lambda body, number: chat("I think that")) as server,
        pytest.raises(UserError, match=r"20 of the first 20 votes have no verdict.*I think that"),
    ):
        list(judge(server.url, tmp_path, retries=1, concurrency=4).judge(many))
    assert len(server.requests) <= 50


def test_what_fails_for_good_loses_a_vote_and_is_asked_again_later(tmp_path: Path) -> None:
    def script(body: dict[str, Any], number: int) -> Reply:
        return chat("?") if "Problem 1?" in body["messages"][0]["content"] else honest(body)

    with ScriptedServer(script) as server:
        first = judge(server.url, tmp_path, retries=1)
        assert labels(list(first.judge(SOLUTIONS)))[1] == [None, None]
        server.script = honest
        second = judge(server.url, tmp_path, retries=1)
        assert labels(list(second.judge(SOLUTIONS))) == ALL_RIGHT
    assert second.counts()["judge"]["cached"] == 11 and len(server.requests) == 12 + 1 + 1


def test_the_cache_asks_nothing_twice_and_heals_a_torn_line(tmp_path: Path) -> None:
    with ScriptedServer(honest) as server:
        list(judge(server.url, tmp_path, votes=2).judge(SOLUTIONS))
    path = tmp_path / "cache" / "verdicts.jsonl"
    # the server is gone: nothing is needed from it
    again = judge(server.url, tmp_path, votes=2)
    assert labels(list(again.judge(SOLUTIONS))) == ALL_RIGHT and again.counts()["judge"] == {"cached": 24}
    path.write_bytes(path.read_bytes()[:-20])
    with ScriptedServer(honest) as server:
        list(judge(server.url, tmp_path, votes=2).judge(SOLUTIONS))
        assert len(server.requests) == 1
        list(judge(server.url, tmp_path, votes=3).judge(SOLUTIONS))  # the third votes alone
        assert len(server.requests) == 1 + 12
        list(judge(server.url, tmp_path, temperature=0.9).judge(SOLUTIONS))  # another question
        assert len(server.requests) == 1 + 12 + 12
    lines = path.read_text().splitlines()
    path.write_text("\n".join(["nonsense", *lines]) + "\n")
    with pytest.raises(UserError, match=r"verdicts\.jsonl:1: expected a cached answer"), AnswerCache(path):
        pass


def test_a_server_that_dies_is_dropped_and_its_work_goes_to_the_other(tmp_path: Path) -> None:
    many = [solution(n, ["good"]) for n in range(60)]
    with ScriptedServer(honest) as living:
        dying = ScriptedServer(lambda body, number: honest(body) if number < 5 else Reply(drop=True))
        with dying:
            asked = judge(f"{dying.url}, {living.url}", tmp_path, concurrency=4)
            assert labels(list(asked.judge(many))) == [[1]] * 60
    assert len(living.requests) == 55
    assert asked.counts()["judge"]["connection_errors"] >= 1


OUTAGES = {
    "dropped": Reply(drop=True), "half an answer": Reply('{"choices": [', half=True),
    "a part of the JSON": Reply('{"choices": [{"message": {"con'), "a proxy's page": Reply("<html>Bad Gateway</html>"),
    "a proxy's error": Reply({"error": {"message": "no healthy upstream"}}), "loading": Reply("loading", 503),
    "502": Reply("", 502), "504": Reply("", 504), "520": Reply("", 520), "408": Reply("", 408),
    "500": Reply("dead", 500), "busy": Reply("later", 429, {"Retry-After": "0.05"}),
    "silence": Reply("late", hang_s=0.6),
}  # fmt: skip


@pytest.mark.parametrize("outage", OUTAGES)
def test_an_outage_becomes_no_label(tmp_path: Path, outage: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Half of the votes are answered, then nothing for longer than all retries take; then the server is back."""
    faults = 0

    def script(body: dict[str, Any], number: int) -> Reply:
        nonlocal faults
        if 6 <= number < (12 if outage == "silence" else 24):
            faults += 1
            return OUTAGES[outage]
        return honest(body)

    with ScriptedServer(script) as server:
        asked = judge(server.url, tmp_path, retries=0, concurrency=3, timeout_s=0.5 if outage == "silence" else 60.0)
        assert labels(list(asked.judge(SOLUTIONS))) == ALL_RIGHT
    counts = asked.counts()["judge"]
    assert counts["answered"] == 12 and "failed" not in counts
    if outage != "silence":
        assert faults == 18 == sum(counts.values()) - sum(counts[n] for n in ANSWERED)
    assert len((tmp_path / "cache" / "verdicts.jsonl").read_text().splitlines()) == 12


ANSWERED = ("answered", "prompt_tokens", "completion_tokens", "cached")


@pytest.mark.parametrize("comes_back", [True, False])
def test_the_only_server_is_killed_in_the_middle(
    tmp_path: Path, comes_back: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody listens any more: the judge waits and says so. Labels are those of an undisturbed run, or none are."""
    monkeypatch.setattr(clients, "SAY_AFTER_S", 0.0)
    monkeypatch.setattr(clients, "SAY_EVERY_S", 0.1)
    many = [solution(n, ["good", "bad"]) for n in range(60)]
    first = ScriptedServer(honest)

    def dies(body: dict[str, Any], number: int) -> Reply:
        if number == 30:
            threading.Thread(target=first.stop).start()
        return honest(body) if number < 30 else Reply(drop=True)

    first.script = dies
    with first:
        asked = judge(first.url, tmp_path, concurrency=4, max_outage_s=60.0 if comes_back else 0.4)
        if not comes_back:
            said = r"has not answered for \d s \(.*\), longer than judge.process.max_outage_s; finished work is kept"
            with pytest.raises(StageFailed, match=said):
                list(asked.judge(many))
            with ScriptedServer(honest) as other:
                assert labels(list(judge(other.url, tmp_path).judge(many))) == [[1, 0]] * 60
            assert len(other.requests) == 30
            return
        result: list[Any] = []
        worker = threading.Thread(target=lambda: result.append(list(asked.judge(many))))
        worker.start()
        printed = ""
        while "Connect call failed" not in printed:  # nobody listens any more
            time.sleep(0.02)
            printed += capsys.readouterr().err
            assert worker.is_alive()
        assert f"judge server at {first.url} has not answered for 0 s (" in printed
        assert "waiting up to 60 s (judge.process.max_outage_s)" in printed
        with ScriptedServer(honest, port=first.port) as second:
            worker.join(60)
        assert labels(result[0]) == [[1, 0]] * 60
    assert len(second.requests) == 30
    assert f"{first.url} answers again, after " in "".join(capsys.readouterr())


def test_a_server_that_is_not_up_yet_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It refuses connections, then loads its model, then answers: no request is made before."""
    with ScriptedServer(honest) as gone:
        pass
    with pytest.raises(StageFailed, match=rf"judge server at {gone.url} has not answered for .*Connect call failed"):
        list(judge(gone.url, tmp_path, max_outage_s=0.2).judge(SOLUTIONS))
    assert "waiting up to 0 s" in capsys.readouterr().err  # a wrong address shows at once
    with ScriptedServer(honest, models=Reply("loading", 503)) as server:
        threading.Timer(0.3, lambda: setattr(server, "models", Reply({"data": [{"id": "judge"}]}))).start()
        assert labels(list(judge(server.url, tmp_path).judge(SOLUTIONS))) == ALL_RIGHT
    assert len(server.requests) == 12


def test_a_name_that_does_not_resolve_is_an_outage(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match=r"judge server at http://nowhere\.invalid/v1 has not answered"):
        list(judge("http://nowhere.invalid/v1", tmp_path, max_outage_s=0.2).judge(SOLUTIONS))


def test_a_request_that_the_server_cannot_stand_loses_its_votes_alone(tmp_path: Path) -> None:
    """Status 500 for one solution while all others are answered is no outage."""

    def script(body: dict[str, Any], number: int) -> Reply:
        return Reply("assertion failed", 500) if "Problem 4?" in body["messages"][0]["content"] else honest(body)

    many = [*SOLUTIONS, *(solution(n, ["good"]) for n in range(100, 200))]
    with ScriptedServer(script) as server:
        asked = judge(server.url, tmp_path, retries=1, concurrency=2)
        verdicts = labels(list(asked.judge(many)))
    assert verdicts == [[None, None] if n == 4 else row for n, row in enumerate(ALL_RIGHT)] + [[1]] * 100
    counts = asked.counts()["judge"]
    assert counts["failed"] == 1
    assert counts["status_500"] >= 4  # two votes, each asked twice; once more where no other answer came between
    assert counts["last_without_verdict"] == "status 500: assertion failed"


def test_answers_of_another_model_are_refused(tmp_path: Path) -> None:
    def script(body: dict[str, Any], number: int) -> Reply:
        reply = honest(body)
        return Reply({**reply.body, "model": "judge-2025"})

    with ScriptedServer(script) as server:
        with pytest.raises(UserError, match=r"asked .* for the model 'judge', the answer is from 'judge-2025'"):
            list(judge(server.url, tmp_path, concurrency=2).judge(SOLUTIONS))
        assert len(server.requests) <= 2
        assert not (tmp_path / "cache" / "verdicts.jsonl").read_text()
        named = judge(server.url, tmp_path, reported_model="judge-2025")
        assert labels(list(named.judge(SOLUTIONS))) == ALL_RIGHT


def test_votes_are_kept_for_what_was_asked_and_the_code_that_read_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(**changes: Any) -> int:
        before = len(server.requests)
        list(judge(server.url, tmp_path, **changes).judge(SOLUTIONS[:4]))
        return len(server.requests) - before

    prompt = tmp_path / "prompt.txt"
    prompt.write_text("{% for s in steps %}[step {{ loop.index }}]\n{{ s }}\n{% endfor %}")
    with ScriptedServer(honest, models=Reply({"data": [{"id": "judge"}, {"id": "other"}]})) as server:
        assert (asked(), asked(), asked(threshold=0.9, concurrency=1, timeout_s=9.0, max_outage_s=9.0)) == (4, 0, 0)
        for changes in ({"model": "other"}, {"max_tokens": 9}, {"request": {"top_k": 1}}, {"temperature": 0}):
            assert asked(**changes) == 4, changes
        assert (asked(prompt=str(prompt)), asked(prompt=str(prompt))) == (4, 0)
        prompt.write_text(prompt.read_text() + "Be strict.")
        assert asked(prompt=str(prompt)) == 4
        monkeypatch.setattr(llm, "READING", ("another way to read",))
        assert asked() == 4


def test_a_template_is_the_users_and_sees_only_its_variables(tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("{{ problem }}|{{ steps[0] }}|{{ answer }}")
    hostile = solution(0, ["{{ 7 * 7 }} {% raw %}"])
    assert PromptTemplate(path).render(hostile, False) == "Problem 0?|{{ 7 * 7 }} {% raw %}|7"
    for text, said in (
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ nothing }}", "'nothing' is undefined"),
        ("a\n{% if %}", r"prompt\.txt:2"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=said):
            PromptTemplate(path).render(hostile, False)
    with pytest.raises(UserError, match="expected a text file"):
        PromptTemplate(tmp_path / "none.txt")


@pytest.mark.parametrize("content", ["", "[]", "1", None, '{"step_1": {}}', '{"step_1": []}', "[" * 100000])
def test_answers_that_are_none(content: Any) -> None:
    with pytest.raises(clients.BadAnswer):
        read_votes(content, 1)


def test_equal_solutions_are_asked_about_once(tmp_path: Path) -> None:
    """At a low temperature many samples of a problem are the same text."""
    same = [solution(1, ["good\n", "bad"]) for _ in range(10)]
    with ScriptedServer(honest) as server:
        verdicts = list(judge(server.url, tmp_path, votes=2).judge([*same, solution(2, ["unclear"])]))
    assert labels(verdicts) == [[1, 0]] * 10 + [[None]] and len(server.requests) == 4


def test_a_comment_may_hold_control_characters() -> None:
    """As vLLM's guided decoding lets a model write them."""
    assert read_votes('{"step_1": {"comment": "a\tb\x16", "verdict": "wrong"}}', 1) == [0]


def test_killed_in_the_middle_no_paid_answer_is_asked_again(tmp_path: Path) -> None:
    """kill -9 while requests are under way: at most those under way are asked twice."""

    killed = threading.Event()

    def slow(body: dict[str, Any], number: int) -> Reply:
        time.sleep(0.02 * random.random())
        if number >= 150:
            killed.wait()
        return honest(body)

    with ScriptedServer(slow) as server:
        script = (
            "import sys; from pathlib import Path; from tests.unit.judging.test_llm_judge import judge, solution\n"
            f"judge({server.url!r}, Path({str(tmp_path)!r}), votes=2, concurrency=8)"
            ".judge([solution(n, ['good', 'bad']) for n in range(300)]).__next__()"
        )
        child = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parents[3])
        deadline = time.monotonic() + 300
        while len(server.requests) <= 150:
            assert child.poll() is None and time.monotonic() < deadline, "it ended before it could be killed"
            time.sleep(0.005)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        killed.set()
        many = [solution(n, ["good", "bad"]) for n in range(300)]
        assert labels(list(judge(server.url, tmp_path, votes=2, concurrency=8).judge(many))) == [[1, 0]] * 300
        assert 600 <= len(server.requests) <= 600 + 8
    rows = [json.loads(line) for line in (tmp_path / "cache" / "verdicts.jsonl").open()]
    assert len({row["key"] for row in rows}) == len(rows) == 600


def test_solutions_are_read_as_they_are_asked(tmp_path: Path) -> None:
    """With four requests at a time no more than four of 200 solutions are read ahead of their answers."""
    read = answered = ahead = 0

    class File(list[Solution]):
        def __iter__(self) -> Any:
            nonlocal read, ahead
            for each in super().__iter__():
                read += 1
                ahead = max(ahead, read - answered)
                yield each

    def handle(body: dict[str, Any], number: int) -> Reply:
        nonlocal answered
        answered += 1
        return honest(body)

    with ScriptedServer(handle) as server:
        found = list(
            judge(server.url, tmp_path, concurrency=4).judge(File(solution(n, [f"good {n}"]) for n in range(200)))
        )
    assert labels(found) == [[1]] * 200 and read == 200 and ahead <= 5
