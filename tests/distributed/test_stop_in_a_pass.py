"""Asked to stop in a pass without gradient, a training ends after a part of it and loses nothing.

The training runs in a process of its own on one rank, and is asked by its own stand-in of a signal.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_stepkto.base.files import sha256_of
from megatron_stepkto.base.progress import read_progress
from megatron_stepkto.checkpoints.convert import hf_to_megatron
from megatron_stepkto.checkpoints.torch_dist import CheckpointReader
from megatron_stepkto.recipe import keys as recipe
from megatron_stepkto.training.job import Job, finished_checkpoints
from tests.builders import random_examples, write_examples, write_llama
from tests.model_folders import read_tensor

pytestmark = [pytest.mark.distributed, pytest.mark.long]

TIME_LIMIT_S = 600  # on a busy machine
PASSES = ("the reference's log-probs", "held-out examples", "the log-ratios for the report")


def attempt(folder: Path, stop_in: str) -> str:
    """Train from where the folder stands; returns how it ended. On a rank of its own; called by ``attempts``."""
    from megatron.core import parallel_state

    from megatron_stepkto.training.rank import make_trainer

    job = Job.model_validate_json((folder / "job.json").read_text())
    trainer = make_trainer(job, torch.device("cpu"))
    score = trainer._score

    def scored(title: str, *args: object, **keys: object) -> object:
        # the held-out pass after the last update, not the one before the first
        trainer._asked = title == stop_in and (title != PASSES[1] or keys.get("update") == 6)
        return score(title, *args, **keys)  # type: ignore[arg-type]

    trainer._score = scored  # type: ignore[method-assign,assignment]
    try:
        trainer.run()
    except SystemExit as end:
        return f"exit {end.code}, saved {[done for done, _ in finished_checkpoints(job.checkpoints)]}"
    finally:
        parallel_state.destroy_model_parallel()
    return "done"


def attempts(folder: Path) -> None:
    from megatron_stepkto.megatron.ranks import join_ranks

    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    join_ranks(recipe.Parallel(), torch.device("cpu"), 60)
    ends = [attempt(folder / "undisturbed", ""), *(attempt(folder / "stopped", stop) for stop in (*PASSES, ""))]
    (folder / "ends.json").write_text(json.dumps(ends))


def test_stopped_in_every_pass_ends_as_undisturbed(tmp_path: Path) -> None:
    hf_to_megatron(write_llama(tmp_path / "model"), tmp_path / "initial", torch.float32)
    examples = random_examples(40)
    settings = recipe.Training.model_validate({
        "optimizer": {"lr": 2e-3}, "global_batch_size": 4, "max_updates": 6, "micro_batch_tokens": 150,
        "checkpoint_every": 4, "device": "cpu", "log": {"tensorboard": False},
    })  # fmt: skip
    for name in ("undisturbed", "stopped"):
        (tmp_path / name).mkdir()
        job = Job(
            settings=settings, seed=3, initial=tmp_path / "initial", reference=None,
            train_examples=write_examples(tmp_path / "train", examples[:30]),
            held_out_examples=write_examples(tmp_path / "held_out", examples[30:]),
            directory=tmp_path / name, fingerprint="x",
        )  # fmt: skip
        (tmp_path / name / "job.json").write_text(job.model_dump_json())
    code = (
        "from pathlib import Path; from tests.distributed.test_stop_in_a_pass import attempts\n"
        f"if __name__ == '__main__': attempts(Path({str(tmp_path)!r}))"
    )
    (tmp_path / "main.py").write_text(code)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(tmp_path / "main.py")],
        env=environment, capture_output=True, text=True, timeout=TIME_LIMIT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "ends.json").read_text()) == [
        "done", "exit 143, saved []", "exit 143, saved [4, 6]", "exit 143, saved [4, 6]", "done",
    ]  # fmt: skip
    expected, got = (CheckpointReader(tmp_path / name / "final") for name in ("undisturbed", "stopped"))
    assert all(torch.equal(read_tensor(got, key), read_tensor(expected, key)) for key in expected.shapes())
    [reference] = (tmp_path / "stopped").glob("reference-*.npy")
    for name in (reference.name, "log_ratios.jsonl"):
        assert sha256_of(tmp_path / "stopped" / name) == sha256_of(tmp_path / "undisturbed" / name)
    rows = {
        name: [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("undisturbed", "stopped")
    }
    assert [(row["update"], "held_out" in row) for row in rows["stopped"]] == [
        (0, True), *((n, False) for n in (1, 2, 3, 4)), (4, True), (5, False), (6, False), (6, True),
    ]  # fmt: skip
    for ours, truth in zip(rows["stopped"], rows["undisturbed"], strict=True):
        assert ours.get("loss") == truth.get("loss")
        assert ours.get("held_out") == truth.get("held_out")
    # 24 of the 30 examples train: only their log-probs, those of their KL pairs and of the held-out ones were asked for
    trained = {json.loads(line)["example_id"] for line in (tmp_path / "stopped" / "log_ratios.jsonl").open()}
    assert len(trained) == 24
    solutions = [e for number, e in enumerate(examples) if number >= 30 or e.example_id in trained]
    pairs = [e.kl_partner for e in examples[:30] if e.kl_partner and e.example_id in trained]
    values = np.load(reference)
    assert values.shape == (sum(len(one.steps) for one in (*solutions, *pairs)),)
    assert np.isfinite(values).all()


def test_a_signal_in_the_reference_pass_is_heard_within_a_part(tmp_path: Path) -> None:
    """To the command alone, with two ranks; the pass would take longer than the parts that it is cut into."""
    write_llama(tmp_path / "model", num_hidden_layers=12)
    examples = random_examples(4000)
    write_examples(tmp_path / "train", examples)
    call = f"run(Path({str(tmp_path / 'run')!r}), {{'ranks': 2}}, micro_batch_tokens=60, global_batch_size=4000)"
    code = (
        "from pathlib import Path; from tests.distributed.test_resume import run; "
        f"from megatron_stepkto.cli.guard import guarded; guarded(lambda: {call})"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    limit = time.monotonic() + TIME_LIMIT_S
    while (report := read_progress(tmp_path / "run" / "progress.json")) is None or report.done == 0:
        assert process.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.005)
    assert report.unit == "tokens of the reference's log-probs"
    assert report.total == sum(len(e.prompt_token_ids) + len(e.token_ids) for e in examples)
    process.send_signal(signal.SIGTERM)
    assert process.wait(TIME_LIMIT_S) == 143
    [reference] = (tmp_path / "run").glob("reference-*.npy")
    share = np.isfinite(np.load(reference)).mean()
    assert 0 < share < 1, "ended in the pass, and kept what it had found"
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
