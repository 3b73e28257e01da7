"""The LLM judge and the reward-model judge against servers of vLLM's CPU build with small random models."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.judging.process.interface import Workplace
from megatron_stepkto.judging.process.llm import LLMJudge
from megatron_stepkto.recipe.keys import LLMJudge as LLMSettings
from megatron_stepkto.sampling.vllm_engine import vllm_environment
from tests.unit.judging.test_prm_judge import CHAT, SOLUTIONS, judge, qwen_reference, write_qwen_prm, write_tokenizer

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
READY_S = 900.0  # on a busy machine


def server_command(model: Path, port: int, *options: str) -> list[str]:
    return [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port),
        "--host", "127.0.0.1", "--served-model-name", "judge", "--dtype", "float32", "--enforce-eager",
        "--max-num-seqs", "16", *options,
    ]  # fmt: skip


SERVER_ENV = {**vllm_environment("cpu"), "VLLM_CPU_KVCACHE_SPACE": "1"}


@contextlib.contextmanager
def serve(model: Path, *options: str) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command, env = server_command(model, port, *options), {**os.environ, **SERVER_ENV}
    log = model / "server.log"
    with log.open("wb") as out:
        server = subprocess.Popen(command, env=env, stdout=out, stderr=out, start_new_session=True)
        try:
            deadline = time.monotonic() + READY_S
            while True:
                assert server.poll() is None, f"the server ended:\n{log.read_text(errors='replace')[-3000:]}"
                assert time.monotonic() < deadline, f"not ready in {READY_S} s"
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                    break
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


COMPACT = json.dumps({"backend": "xgrammar", "disable_any_whitespace": True})


def write_chat_model(directory: Path) -> None:
    """A random model that knows nothing, of 4,096 tokens, with a tokenizer and a chat template."""
    tokenizer = write_tokenizer(directory)
    tokenizer.chat_template = CHAT + "{{ '<|im_start|>assistant\n' }}"
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=96, max_position_embeddings=4096, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)


def test_llm_judge_under_a_schema(tmp_path: Path) -> None:
    """A random model knows nothing, but under the schema every answer is a verdict on every step."""
    write_chat_model(tmp_path)
    with serve(tmp_path, "--structured-outputs-config", COMPACT) as url:
        for schema_key in ("response_format", "structured_outputs"):
            settings = LLMSettings.model_validate(
                {"kind": "llm", "base_url": url, "model": "judge", "votes": 2, "temperature": 1.0, "max_tokens": 500,
                 "comment_chars": 10, "schema_key": schema_key, "concurrency": 4}
            )  # fmt: skip
            asked = LLMJudge(settings, Workplace(tmp_path / schema_key))
            verdicts = list(asked.judge(SOLUTIONS[:4]))
            counts = asked.counts()["judge"]
            assert counts["answered"] == 8 and "failed" not in counts and "bad_answers" not in counts, counts
            assert counts["prompt_tokens"] > 4000 and counts["completion_tokens"] > 100
            for solution, row in zip(SOLUTIONS, verdicts, strict=False):
                assert not isinstance(row, UserError) and len(row) == len(solution.steps)
                assert all(len(v.votes or ()) == 2 and set(v.votes or ()) <= {0, 1, None} for v in row)
        with pytest.raises(UserError, match="no model 'another'; it has judge"):
            list(
                LLMJudge(settings.model_copy(update={"model": "another"}), Workplace(tmp_path / "x")).judge(
                    SOLUTIONS[:1]
                )
            )


def test_reward_model_behind_pooling(tmp_path: Path) -> None:
    """Scores over HTTP equal an independent forward pass."""
    model = write_qwen_prm(tmp_path / "model")
    (model / "modeling_qwen2_rm.py").unlink()
    config = json.loads((model / "config.json").read_text())
    del config["auto_map"]
    (model / "config.json").write_text(json.dumps(config))
    tag = PreTrainedTokenizerFast.from_pretrained(model).convert_tokens_to_ids("<extra_0>")
    with serve(model, "--runner", "pooling", "--pooler-config", json.dumps({"step_tag_id": tag})) as url:
        asked = judge(model, tmp_path, convention="qwen_math_prm", base_url=url, served_name="judge")
        verdicts = list(asked.judge(SOLUTIONS[:9]))
    for row, scores in zip(verdicts, qwen_reference(model, SOLUTIONS[:9]), strict=True):
        assert not isinstance(row, UserError)
        assert [v.score for v in row] == pytest.approx(scores, abs=1e-4)
