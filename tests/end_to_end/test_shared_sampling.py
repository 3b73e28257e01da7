"""Several processes draw one job, as the elements of a Slurm array do: by claims, nothing twice, nothing lost."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_stepkto.base.files import read_json
from megatron_stepkto.base.stage import Result, Stage, run_stage
from megatron_stepkto.problems.chained_arithmetic.tokenizer import build_tokenizer
from megatron_stepkto.recipe.keys import Sampling
from megatron_stepkto.recipe.prompts import load_tokenizer
from megatron_stepkto.sampling.draw import Drawing
from megatron_stepkto.sampling.job import Job, Pass, PromptRow
from tests.builders import write_llama

pytestmark = pytest.mark.end_to_end
TIME_LIMIT_S = 600  # on a busy machine
CHUNKS = 10


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    build_tokenizer(directory)
    tokenizer = load_tokenizer(directory)
    return write_llama(directory, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)


def drawing(model: Path, directory: Path, stall_timeout_s: float = 600) -> Drawing:
    numbers = random.Random(0)
    prompts = [PromptRow(problem_id=f"p{n}", token_ids=[numbers.randrange(4, 40) for _ in range(9)]) for n in range(40)]
    settings = Sampling(
        backend="transformers", num_samples=4, chunk_problems=4, max_tokens=48, gap_problems=0, dtype="float32",
        stall_timeout_s=stall_timeout_s,
    )  # fmt: skip
    job = Job(
        model=model, model_name="M0", prompts=prompts, settings=settings, seed=3, directory=directory,
        passes=[Pass(name="samples", num_samples=4, temperature=1.0, top_p=1.0)],
    )  # fmt: skip
    return Drawing(job, "test", directory / "logs")


def sample(model: Path, directory: Path, stall_timeout_s: float = 600) -> dict[str, object]:
    """The sample stage as the pipeline runs it."""
    mine = drawing(model, directory, stall_timeout_s)

    def work() -> Result:
        done = mine.finish()
        return Result(list(done.paths.values()), done.counts)

    return run_stage(Stage("sample", directory, {}, {}), work, together=mine.draw)


def start(model: Path, directory: Path, stall_timeout_s: float = 600) -> subprocess.Popen[str]:
    script = (
        "from pathlib import Path; from tests.end_to_end.test_shared_sampling import sample\n"
        "from megatron_stepkto.base.progress import show_messages\n"  # as the command line does
        f"show_messages(); sample(Path({str(model)!r}), Path({str(directory)!r}), {stall_timeout_s})"
    )
    return subprocess.Popen(
        [sys.executable, "-c", script], cwd=Path(__file__).parents[2], stderr=subprocess.PIPE, text=True
    )


def wait_for_chunks(directory: Path, count: int) -> None:
    deadline = time.monotonic() + TIME_LIMIT_S
    while len(list((directory / "chunks").glob("samples-*.jsonl"))) < count:
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("alone")
    counts = sample(model, directory)["counts"]
    assert counts["solutions"] == 160  # type: ignore[index]
    assert counts["engines"] == 1  # type: ignore[index]
    return directory / "samples.jsonl"


def test_late_helper_and_dead_element(alone: Path, model: Path, tmp_path: Path) -> None:
    """One starts, a second joins later, the first is killed in mid-chunk: the second takes its claim over."""
    first = start(model, tmp_path)
    wait_for_chunks(tmp_path, 2)
    second = start(model, tmp_path)
    wait_for_chunks(tmp_path, 4)
    first.kill()
    first.communicate()
    assert second.wait(TIME_LIMIT_S) == 0, second.communicate()[1]
    second.communicate()
    assert (tmp_path / "samples.jsonl").read_bytes() == alone.read_bytes()
    manifest = read_json(tmp_path / "manifest.json")
    assert manifest["counts"]["engines"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".lock", "logs", "manifest.json", "samples.jsonl", "started.json",
    ]  # fmt: skip


def test_elements_that_end_together_agree(alone: Path, model: Path, tmp_path: Path) -> None:
    running = [start(model, tmp_path) for _ in range(3)]
    ends = [process.communicate(timeout=TIME_LIMIT_S)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], ends
    assert (tmp_path / "samples.jsonl").read_bytes() == alone.read_bytes()
    assert sum("finished by another process" in end or "already done" in end for end in ends) == 2
    assert not (tmp_path / "chunks").exists()


@pytest.mark.long  # it must be silent for half a minute
def test_an_engine_without_progress_is_started_again(alone: Path, model: Path, tmp_path: Path) -> None:
    """A stopped process is the purest stuck engine: alive, silent, deaf to SIGTERM."""
    process = start(model, tmp_path, stall_timeout_s=30)  # an engine starts within that, also on a busy machine
    wait_for_chunks(tmp_path, 3)
    [worker] = psutil.Process(process.pid).children(recursive=True)
    os.kill(worker.pid, signal.SIGSTOP)
    said = process.communicate(timeout=TIME_LIMIT_S)[1]
    assert process.returncode == 0, said
    assert "makes no progress: restarting it" in said
    assert not psutil.pid_exists(worker.pid)
    assert (tmp_path / "samples.jsonl").read_bytes() == alone.read_bytes()
