"""Main weights in and out of the distributed optimizer, whole: what FP8 runs save and load. Needs no FP8."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch

from megatron_stepkto.base.processes import Child, run_children
from megatron_stepkto.checkpoints.convert import hf_to_megatron
from megatron_stepkto.recipe import keys as recipe
from megatron_stepkto.training.job import Job
from tests.builders import random_examples, write_examples, write_llama

pytestmark = pytest.mark.distributed
TIME_LIMIT_S = 900  # on a busy machine


@pytest.mark.parametrize("parallel", [{"ranks": 2}, {"ranks": 2, "context": 2}], ids=["DP 2", "CP 2"])
def test_main_weights_of_all_ranks_make_whole_tensors(tmp_path: Path, parallel: dict[str, int]) -> None:
    hf_to_megatron(write_llama(tmp_path / "hf", tie_word_embeddings=True), tmp_path / "initial", torch.bfloat16)
    settings = recipe.Training.model_validate({  # FP8 weights are not gathered beside computation
        "parallel": {**parallel, "distributed_optimizer": True, "overlap": False}, "optimizer": {"lr": 1e-2},
        "dtype": "bfloat16", "global_batch_size": 8, "micro_batch_tokens": 200, "max_updates": 2,
        "device": "cpu", "timeout_s": 300,
    })  # fmt: skip
    job = Job(
        settings=settings, seed=1, initial=tmp_path / "initial", reference=None,
        train_examples=write_examples(tmp_path / "train", random_examples(16)), held_out_examples=None,
        directory=tmp_path, fingerprint="x",
    )  # fmt: skip
    (tmp_path / "job.json").write_text(job.model_dump_json())
    torchrun = ["-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *torchrun, "-m", "tests.distributed.main_weights_rank", str(tmp_path / "job.json")]
    deadline = time.monotonic() + TIME_LIMIT_S

    def in_time() -> None:
        assert time.monotonic() < deadline, f"the ranks took more than {TIME_LIMIT_S} s"

    env = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    run_children([Child(command, tmp_path / "ranks.log", env)], title="main weights", unit="jobs", progress=in_time)
    assert sorted(p.name for p in tmp_path.glob("*.passed")) == ["rank0.passed", "rank1.passed"]
