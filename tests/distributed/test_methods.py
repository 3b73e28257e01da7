"""BCO's running mean over ranks, micro-batches and a resume; and a method that no file of the package knows."""

from __future__ import annotations

import itertools
import json
import sys
from typing import Any

import pytest
import torch

from megatron_stepkto.base.processes import Child, run_children
from megatron_stepkto.checkpoints.convert import hf_to_megatron
from megatron_stepkto.recipe import keys as recipe
from megatron_stepkto.training.job import Job
from tests.builders import VOCABULARY, random_examples, write_examples, write_llama
from tests.distributed.test_layouts import write_neighbour

pytestmark = pytest.mark.distributed

UPDATES = 4
# folder -> method, layout, micro_batch_tokens, whether the reference is another model
RUNS: dict[str, tuple[str, dict[str, Any], int, bool]] = {
    "bco": ("bco", {"ranks": 2}, 60, True),
    "bco at once": ("bco", {"ranks": 2, "tensor": 2}, 4000, True),
    "resumed": ("bco", {"ranks": 2}, 60, True),
    "apo_zero": ("apo_zero", {"ranks": 2}, 60, False),
    "linear": ("linear", {"ranks": 2}, 60, False),
}
Run = tuple[list[dict[str, Any]], dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Metrics and final weights of each, all in one launch."""
    folder = tmp_path_factory.mktemp("methods")
    source = write_llama(folder / "hf", num_hidden_layers=2)
    for name, hf in (("initial", source), ("reference", write_neighbour(source, folder / "near"))):
        hf_to_megatron(hf, folder / name, torch.float32)
    judged = [e for e in random_examples(40) if e.outcome is not None][: 4 * UPDATES]
    write_examples(folder / "train", judged)
    jobs = []
    for name, (method, parallel, tokens, apart) in RUNS.items():
        settings = recipe.Training.model_validate({
            "method": method, "parallel": parallel, "optimizer": {"lr": 0.3, "eps": 0.1, "clip_grad": 0.5},
            "global_batch_size": 4, "micro_batch_tokens": tokens, "reference": "initial" if apart else "previous",
            "max_updates": UPDATES if method == "bco" else 1, "device": "cpu", "timeout_s": 300,
            "log": {"tensorboard": False},
        })  # fmt: skip
        directory = folder / name
        directory.mkdir()
        job = Job(settings=settings, seed=3, initial=folder / "initial", directory=directory, fingerprint="x",
                  reference=folder / "reference" if apart else None, train_examples=folder / "train",
                  held_out_examples=None)  # fmt: skip
        (directory / "job.json").write_text(job.model_dump_json())
        jobs.append(str(directory / "job.json"))
    (folder / "jobs.json").write_text(json.dumps(jobs))
    torchrun = ["-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *torchrun, "-m", "tests.distributed.method_worker", str(folder / "jobs.json")]
    env = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    run_children([Child(command, folder / "log", env)], title="methods", unit="jobs")
    return {
        name: (
            [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()],
            torch.load(folder / name / "weights.pt", weights_only=True),
        )
        for name in RUNS
    }


def test_bco_does_not_depend_on_how_a_batch_is_cut(runs: dict[str, Run]) -> None:
    (cut, weights), (whole, expected) = runs["bco"], runs["bco at once"]
    for ours, truth in zip(cut, whole, strict=True):
        for key in ("loss", "loss_right", "loss_wrong", "grad_norm", "margin"):
            assert ours[key] == pytest.approx(truth[key], rel=1e-5), key
        assert ours["z_outcome"] == pytest.approx(truth["z_outcome"], abs=2e-5)
    for key, truth in expected.items():
        words = VOCABULARY if "embedding" in key or "output_layer" in key else None  # without the padding's rows
        assert (weights[key][:words] - truth[:words]).norm() <= 1e-5 * truth.norm(), key


def test_delta_is_the_mean_over_all_updates_before(runs: dict[str, Run]) -> None:
    rows = runs["bco"][0]
    assert [row["update"] for row in rows] == list(range(1, UPDATES + 1))
    assert rows[0]["z_outcome"] == 0
    total = count = 0
    for row, after in itertools.pairwise(rows):
        total += sum((row[f"log_ratio_{side}"] or 0) * row[f"num_{side}"] for side in ("right", "wrong"))
        count += row["num_right"] + row["num_wrong"]
        assert after["z_outcome"] == pytest.approx(total / count, rel=1e-9)
        assert row["loss"] == pytest.approx(row["loss_right"] + row["loss_wrong"], rel=1e-9)
    assert count == 4 * (UPDATES - 1)
    assert all(abs(row["z_outcome"]) > 0.01 for row in rows[1:]), "the comparison would pass on zeros"


def test_bco_resumed_is_undisturbed_bit_for_bit(runs: dict[str, Run]) -> None:
    (rows, weights), (resumed, got) = runs["bco"], runs["resumed"]
    assert set(weights) == set(got)
    for key in weights:
        assert torch.equal(got[key], weights[key]), key
    same = ("update", "loss", "loss_right", "loss_wrong", "z_outcome", "kl_outcome", "grad_norm")
    assert [[row[key] for key in same] for row in resumed] == [[row[key] for key in same] for row in rows]


def test_a_method_of_one_file_trains(runs: dict[str, Run]) -> None:
    """At the reference's own weights APO-zero's slope is beta / 4, so its gradient is that of the linear loss / 40."""
    [linear], [apo] = runs["linear"][0], runs["apo_zero"][0]
    assert linear["grad_norm"] == pytest.approx(40 * apo["grad_norm"], rel=1e-4)
    assert linear["loss_linear"] == pytest.approx(linear["loss"], abs=1e-9)
    assert apo["loss"] == pytest.approx(0.5, abs=1e-5)
    assert linear["three_per_micro_batch"] > 0
    assert "loss_right" not in linear
