"""compare-logprobs against a real vLLM server (CPU build)."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_stepkto.checkpoints.convert import hf_to_megatron
from megatron_stepkto.evaluation.logprobs import DEFAULT_TEXT
from megatron_stepkto.run.bpe_tokenizer import train_byte_level_bpe
from megatron_stepkto.sampling.vllm_engine import vllm_environment
from tests.builders import write_llama
from tests.unit.checkpoint_folders import UP, change_weights, copy

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
START_S = 900  # on a busy machine


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "model"
    write_llama(folder, vocab_size=300, hidden_size=64, head_dim=32, max_position_embeddings=512)
    train_byte_level_bpe(DEFAULT_TEXT, 300, folder)
    return folder


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port),
        "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--max-num-seqs", "4", "--max-model-len", "512",
    ]  # fmt: skip
    environment = {**os.environ, **vllm_environment("cpu"), "VLLM_CPU_KVCACHE_SPACE": "1"}
    log = model.parent / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    began = time.monotonic()
    try:
        while True:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=2).close()
                break
            except OSError:
                assert process.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() - began < START_S, log.read_text()[-3000:]
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(START_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def compare(*arguments: object) -> subprocess.CompletedProcess[str]:
    tool = Path(__file__).resolve().parents[2] / "tools" / "compare_logprobs.py"
    command = [sys.executable, str(tool), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(tool.parents[1])}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)


def test_a_server_and_both_kinds_of_folder(model: Path, server: str, tmp_path: Path) -> None:
    hf_to_megatron(model, tmp_path / "megatron")
    report = tmp_path / "report.json"
    for folder in (model, tmp_path / "megatron"):
        done = compare(folder, server, "--json", report)
        assert done.returncode == 0, done.stderr + done.stdout
        assert f"at {server}" in done.stdout
        total = json.loads(report.read_text())["total"]
        assert total["max"] < 1e-4
        assert total["tokens"] > 900
        assert total["agree"] > 0.99


def test_a_server_with_another_weight(model: Path, server: str, tmp_path: Path) -> None:
    other = change_weights(copy(model, tmp_path / "other"), lambda weights: weights[UP][3, 5].add_(1))
    done = compare(server + "/v1/", other)
    assert done.returncode == 1, done.stderr
    assert "DIFFERENT for float32: mean is " in done.stdout
    assert "Traceback" not in done.stderr


def test_a_server_needs_a_tokenizer_from_somewhere(model: Path, server: str) -> None:
    done = compare(server, server)
    assert done.returncode == 2
    assert "give one with --tokenizer FOLDER" in done.stderr
    assert compare(server, server, "--tokenizer", model).returncode == 0
