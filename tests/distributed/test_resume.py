"""Killed and run again, the train stage ends with the weights of an undisturbed run, bit for bit."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from megatron_stepkto.base.stage import Result, Stage
from megatron_stepkto.checkpoints.convert import megatron_to_hf
from megatron_stepkto.checkpoints.torch_dist import CheckpointReader
from megatron_stepkto.recipe import keys as recipe
from megatron_stepkto.training.job import finished_checkpoints
from megatron_stepkto.training.launch import train
from tests.builders import VOCABULARY, random_examples, write_examples, write_llama
from tests.model_folders import read_tensor, write_model

pytestmark = pytest.mark.distributed

TIME_LIMIT_S = 600  # on a busy machine
ASYNC = "DP 2, distributed optimizer"  # whose checkpoints are written by processes beside the training
LAYOUTS: dict[str, dict[str, Any]] = {
    # torch's AdamW, the distributed optimizer's resharded state, and the lagged reference point are all resumed
    "DP 2, distributed optimizer": {"ranks": 2, "distributed_optimizer": True},
    "PP 2 interleaved": {"ranks": 2, "pipeline": 2, "virtual_pipeline": 2},
    "LoRA, DP 2, distributed optimizer, bfloat16": {"ranks": 2, "distributed_optimizer": True},
}


def settings(parallel: dict[str, Any], **changes: Any) -> recipe.Training:
    return recipe.Training.model_validate({
        "parallel": parallel, "optimizer": {"lr": 2e-3, "schedule": "cosine"}, "loss": {"reference_point": "batch"},
        "global_batch_size": 4, "micro_batch_tokens": 150, "checkpoint_every": 2, "device": "cpu", "timeout_s": 300,
        **changes,
    })  # fmt: skip


def run(folder: Path, parallel: dict[str, Any], **changes: Any) -> Result:
    """Train in ``folder/<name>`` on the data beside it. Also called in a process of its own, to be killed."""
    stage = Stage("train", folder, {}, {"model": folder.parent / "model", "train": folder.parent / "train"})
    return train(stage, settings(parallel, **changes), seed=5)


def run_until(folder: Path, parallel: dict[str, Any], sign: Path, python: str = sys.executable, **changes: Any) -> None:
    """Run in another process and SIGKILL that at the first sight of ``sign``."""
    call = f"run(Path({str(folder)!r}), {parallel}, **{changes})"
    code = f"from pathlib import Path; from tests.distributed.test_resume import run; {call}"
    process = subprocess.Popen([python, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    limit = time.monotonic() + TIME_LIMIT_S
    while not sign.exists():
        assert process.poll() is None, "the training ended before it could be killed"
        assert time.monotonic() < limit
        time.sleep(0.002)
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=TIME_LIMIT_S)
    assert not alive


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name.startswith("LoRA") else name for name in LAYOUTS]
)
def test_resume_equals_undisturbed(name: str, tmp_path: Path) -> None:
    write_llama(tmp_path / "model")
    write_examples(tmp_path / "train", random_examples(24))
    changes: dict[str, Any] = {"async_checkpoints": name == ASYNC}
    if name.startswith("LoRA"):
        changes |= {"lora": {"rank": 4, "alpha": 8.0}, "dtype": "bfloat16"}
    run(tmp_path / "undisturbed", LAYOUTS[name], **changes | {"async_checkpoints": False})
    killed = tmp_path / "killed"
    run_until(killed, LAYOUTS[name], killed / "checkpoints" / "update_000002" / "state.json", **changes)
    for left in ("update_000004", ".update_000006.partial"):  # half dropped, half written
        (killed / "checkpoints" / left).mkdir(exist_ok=True)
        (killed / "checkpoints" / left / "0.distcp").write_text("half")
        (killed / "checkpoints" / left / "state.json").unlink(missing_ok=True)
    run(killed, LAYOUTS[name], **changes)
    expected, got = CheckpointReader(tmp_path / "undisturbed" / "final"), CheckpointReader(killed / "final")
    assert got.shapes() == expected.shapes()
    assert all((".adapter." in key) == name.startswith("LoRA") for key in expected.shapes())
    for key in expected.shapes():
        assert torch.equal(read_tensor(got, key), read_tensor(expected, key)), key
    rows = [json.loads(line) for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert [row["update"] for row in rows] == [1, 2, 3, 4, 5, 6]
    # the lagged estimator: z is the last update's own mean log-ratio, clamped; 0 at first
    assert rows[0]["z_outcome"] == 0
    for before, row in itertools.pairwise(rows):
        assert row["z_outcome"] == pytest.approx(max(0.0, before["kl_outcome"]), rel=1e-6)
        assert row["z_step"] == pytest.approx(max(0.0, before["kl_step"]), rel=1e-6)
    assert any(row["z_outcome"] > 0 or row["z_step"] > 0 for row in rows)


RESHARDED = {
    "TP 2 to PP 2": ({"ranks": 2, "tensor": 2}, {"ranks": 2, "pipeline": 2}),
    "PP 2 interleaved to one process": ({"ranks": 2, "pipeline": 2, "virtual_pipeline": 2}, {"ranks": 1}),
    "one process to DP 2": ({"ranks": 1}, {"ranks": 2}),
    "distributed optimizer, DP 2 to TP 2": (
        {"ranks": 2, "distributed_optimizer": True},
        {"ranks": 2, "tensor": 2, "distributed_optimizer": True},
    ),
    # the tied embedding of the last stage is a bucket of 99 x 64 numbers, padded to a multiple of 128
    "distributed optimizer, PP 2 to one process": (
        {"ranks": 2, "pipeline": 2, "distributed_optimizer": True},
        {"ranks": 1, "distributed_optimizer": True},
    ),
}


def undisturbed_run(folder: Path) -> Path:
    """Of the model in ``folder``."""
    write_examples(folder / "train", random_examples(24))
    run(folder / "undisturbed", {"ranks": 1})
    return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return undisturbed_run(write_llama(tmp_path_factory.mktemp("resharded") / "model").parent)


@pytest.mark.parametrize(
    "name", [name if "DP 2" in name else pytest.param(name, marks=pytest.mark.long) for name in RESHARDED]
)
def test_resume_at_another_layout(name: str, undisturbed: Path) -> None:
    """Weights and both moments of AdamW are laid out anew; the data's order and the lagged z do not change."""
    resumed_equals_undisturbed(undisturbed / name.replace(" ", "_"), *RESHARDED[name])


def test_resume_of_experts_at_another_layout(tmp_path: Path) -> None:
    """Saved with whole experts on ranks that share documents, resumed with every expert split."""
    undisturbed_run(write_model(tmp_path / "model", "qwen3_moe", num_hidden_layers=2).parent)
    saved, resumed = {"ranks": 2, "context": 2, "expert": 2}, {"ranks": 2, "expert_tensor": 2}
    resumed_equals_undisturbed(tmp_path / "resumed", saved, resumed)


def resumed_equals_undisturbed(killed: Path, before: dict[str, Any], after: dict[str, Any]) -> None:
    """``killed`` stands beside an undisturbed run."""
    undisturbed = killed.with_name("undisturbed")
    run_until(killed, before, killed / "checkpoints" / "update_000002" / "state.json")
    run(killed, after)
    expected, got = CheckpointReader(undisturbed / "final"), CheckpointReader(killed / "final")
    for key in expected.shapes():
        rows = VOCABULARY if "embedding" in key else None
        truth = read_tensor(expected, key, rows=rows)
        assert (read_tensor(got, key, rows=rows) - truth).norm() <= 1e-5 * truth.norm(), key
    rows = {folder: [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            for folder in (undisturbed, killed)}  # fmt: skip
    for ours, truth in zip(rows[killed], rows[undisturbed], strict=True):
        assert ours["tokens"] == truth["tokens"]
        assert ours["loss"] == pytest.approx(truth["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(truth["grad_norm"], rel=5e-5)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT], ids=lambda number: number.name)
def test_a_request_to_stop_saves_and_ends(number: signal.Signals, tmp_path: Path) -> None:
    """To the command alone, as a batch system or a terminal sends it. Then it goes on to the same weights."""
    write_llama(tmp_path / "model")
    write_examples(tmp_path / "train", random_examples(24))
    parallel = LAYOUTS["PP 2 interleaved"]
    # a constant rate: the short run below must not differ by its schedule
    changes = {"epochs": 20, "checkpoint_every": 1000, "optimizer": {"lr": 2e-3}}
    call = f"run(Path({str(tmp_path / 'run')!r}), {parallel}, **{changes})"
    code = (
        "from pathlib import Path; from tests.distributed.test_resume import run; "
        f"from megatron_stepkto.cli.guard import guarded; guarded(lambda: {call})"
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    with (tmp_path / "screen").open("wb") as screen:
        process = subprocess.Popen([sys.executable, "-c", code], stdout=screen, stderr=screen)
        limit = time.monotonic() + TIME_LIMIT_S
        while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
            assert process.poll() is None
            assert time.monotonic() < limit
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait(TIME_LIMIT_S) == (130 if number == signal.SIGINT else 143)
    said = "saving at the next opportunity" if number == signal.SIGINT else "saved and stopped"
    assert said in (tmp_path / "screen").read_text()
    [(done, _)] = finished_checkpoints(tmp_path / "run" / "checkpoints")
    assert 2 <= done < 120
    assert metrics.read_text().count("\n") == done, "the checkpoint is of the last update that was made"
    for name in ("run", "undisturbed"):
        run(tmp_path / name, parallel, **changes, max_updates=done + 2)
    expected, got = (CheckpointReader(tmp_path / name / "final") for name in ("undisturbed", "run"))
    assert all(torch.equal(read_tensor(got, key), read_tensor(expected, key)) for key in expected.shapes())


def test_a_finished_training_is_not_done_again(tmp_path: Path) -> None:
    """A kill while the stage tidies up leaves half-deleted folders: they are never read."""
    write_llama(tmp_path / "model")
    write_examples(tmp_path / "train", random_examples(8))
    first = run(tmp_path / "run", {"ranks": 1})
    when = (tmp_path / "run" / "metrics.jsonl").stat().st_mtime_ns
    for leftover in ("initial", "checkpoints/update_000002"):
        (tmp_path / "run" / leftover).mkdir(parents=True)
    assert run(tmp_path / "run", {"ranks": 1}) == first
    assert (tmp_path / "run" / "metrics.jsonl").stat().st_mtime_ns == when
    assert not (tmp_path / "run" / "initial").exists()


def test_bfloat16_follows_float32(tmp_path: Path) -> None:
    """bf16 weights with fp32 main weights, gradients and loss: near float32's curve, and exported as bf16."""
    write_llama(tmp_path / "model")
    write_examples(tmp_path / "train", random_examples(24))
    losses: dict[str, list[float]] = {}
    for dtype in ("float32", "bfloat16"):
        run(tmp_path / dtype, {"ranks": 2, "tensor": 2}, dtype=dtype, max_updates=3)
        lines = (tmp_path / dtype / "metrics.jsonl").read_text().splitlines()
        losses[dtype] = [json.loads(line)["loss"] for line in lines]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], abs=0.02)
    assert losses["bfloat16"] != losses["float32"]
    megatron_to_hf(tmp_path / "bfloat16" / "final", tmp_path / "exported")
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["dtype"] == "bfloat16"
