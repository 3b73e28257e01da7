"""What the GPU tests need, or why they skip.

``STEPKTO_REHEARSE_GPU_TESTS=1`` runs those that need no Transformer Engine on the CPU: it tries the tests, not a GPU.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_stepkto.base.files import stable_hash, write_json
from megatron_stepkto.base.records import TrainExample
from megatron_stepkto.base.stage import Stage
from megatron_stepkto.megatron.acceleration import find_machine
from megatron_stepkto.recipe import keys as recipe
from megatron_stepkto.training.job import Job
from megatron_stepkto.training.launch import prepare_weights, train
from tests.builders import write_examples, write_llama

# Sizes that FP8 products take (multiples of 128) and that leave something to round.
MODEL = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2,
         "vocab_size": 512, "max_position_embeddings": 512, "initializer_range": 0.05}  # fmt: skip

Row = dict[str, Any]
Run = Callable[..., tuple[list[Row], Row, Path]]
JOB_LIMIT_S = 240


class Worker:
    """``tests.gpu.worker`` in a process, started again after it died."""

    def __init__(self, device: str, folder: Path) -> None:
        self.device, self.log = device, folder / "worker.log"
        self.process: subprocess.Popen[str] | None = None

    def train(self, job: Path) -> None:
        """Raises AssertionError with the end of its log when it fails or takes longer than JOB_LIMIT_S."""
        if self.process is None or self.process.poll() is not None:
            self.process = self._start()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(job, file=self.process.stdin, flush=True)
        ready, _, _ = select.select([self.process.stdout], [], [], JOB_LIMIT_S)
        answer = self.process.stdout.readline() if ready else ""
        if answer != "done\n":
            self.stop()
            raise AssertionError(f"no answer to {job}; the log ends with:\n{self.log.read_text()[-3000:]}")

    def _start(self) -> subprocess.Popen[str]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        env = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
               "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
        with self.log.open("a") as log:
            command = [sys.executable, "-W", "ignore", "-m", "tests.gpu.worker", self.device]
            return subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=env
            )

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.process = None


@pytest.fixture(scope="session")
def device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    if os.environ.get("STEPKTO_REHEARSE_GPU_TESTS"):
        return "cpu"
    pytest.skip("needs an NVIDIA GPU: torch sees none")


@pytest.fixture(scope="session")
def no_transformer_engine(device: str) -> str:
    """Why Transformer Engine cannot be used; empty: it can."""
    found = find_machine(torch.device(device)).transformer_engine
    return found.reason or ("rehearsal on the CPU" if device == "cpu" else "")


@pytest.fixture(autouse=True)
def _needs(request: pytest.FixtureRequest) -> None:
    wanted = request.node.get_closest_marker("transformer_engine")
    if wanted and (reason := request.getfixturevalue("no_transformer_engine")):
        pytest.skip(f"needs Transformer Engine on a GPU: {reason}")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("model"), **MODEL)


@pytest.fixture(scope="session")
def worker(tmp_path_factory: pytest.TempPathFactory, device: str) -> Iterator[Worker]:
    started = Worker(device, tmp_path_factory.mktemp("worker"))
    yield started
    started.stop()


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, model: Path, device: str, worker: Worker) -> Run:
    """(examples, settings) -> metrics per update, the run's notes, its folder.

    One rank trains in a process that all tests share, several as a user's do; a run that was made already is not made
    again. resume: a checkpoint to go on from.
    """
    made: dict[str, Path] = {}

    def start(examples: list[TrainExample], resume: Path | None = None, **settings: Any) -> tuple[list[Row], Row, Path]:
        chosen = recipe.Training.model_validate(
            {"optimizer": {"lr": 1e-4}, "global_batch_size": 8, "micro_batch_tokens": 512, "device": device,
             "loss": {"beta_outcome": 0.5, "beta_step": 1.0}, "timeout_s": 120, **settings}
        )  # fmt: skip
        key = f"{stable_hash([e.model_dump() for e in examples], chosen.model_dump(mode='json'), str(resume)):016x}"
        if key not in made:
            made[key] = train_once(examples, chosen, resume)
        folder = made[key]
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return rows, json.loads((folder / "notes.json").read_text()), folder

    def train_once(examples: list[TrainExample], chosen: recipe.Training, resume: Path | None) -> Path:
        folder = tmp_path_factory.mktemp("run")
        data = write_examples(folder / "data.jsonl", examples)
        stage = Stage("train", folder / "train", {}, {"model": model, "train": data})
        stage.directory.mkdir()
        if resume is not None:
            shutil.copytree(resume, stage.directory / "checkpoints" / resume.name)
        if chosen.parallel.ranks > 1:
            train(stage, chosen, 3)
            return stage.directory
        prepare_weights(stage, chosen)
        job = Job(settings=chosen, seed=3, initial=stage.directory / "initial", reference=None, train_examples=data,
                  held_out_examples=None, directory=stage.directory, fingerprint=folder.name)  # fmt: skip
        write_json(stage.directory / "job.json", job.model_dump(mode="json"))
        worker.train(stage.directory / "job.json")
        return stage.directory

    return start
