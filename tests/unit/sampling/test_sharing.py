"""Other processes merge the chunks, or remove them, at the worst instant; workers are called in this process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.records import Problem, write_records
from megatron_stepkto.evaluation.stage import evaluation_drawing
from megatron_stepkto.problems.chained_arithmetic.tokenizer import build_tokenizer
from megatron_stepkto.recipe.file import read_recipe
from megatron_stepkto.recipe.keys import Sampling
from megatron_stepkto.sampling import draw, worker
from megatron_stepkto.sampling.draw import Drawing
from megatron_stepkto.sampling.interface import Completion, Report, Request
from megatron_stepkto.sampling.job import Job, Pass, PromptRow
from megatron_stepkto.sampling.worker import SharedEngine, Worker


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Of two chunks."""
    build_tokenizer(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    settings = Sampling(backend="transformers", num_samples=1, chunk_problems=1, max_tokens=4, gap_problems=0)
    return Job(
        model=tmp_path / "model", model_name="M0", settings=settings, seed=3, directory=tmp_path / "sample",
        prompts=[PromptRow(problem_id=name, token_ids=[5]) for name in ("a", "b")],
        passes=[Pass(name="samples", num_samples=1, temperature=1.0, top_p=1.0)],
    )  # fmt: skip


def work(job: Job, monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[], None] = lambda: None) -> None:
    """A worker whose engine takes its time: ``meanwhile`` happens."""

    class Engine:
        wants_more = False
        requests: dict[str, Request]

        def add(self, requests: Mapping[str, Request]) -> None:
            self.requests = dict(requests)

        def step(self, report: Report) -> dict[str, Completion]:
            meanwhile()
            return {key: Completion([7, 2], "stop", None) for key in self.requests}

        def reset(self) -> None:
            pass

    monkeypatch.setattr(worker, "open_engine", lambda *_: Engine())
    draw._claim(job)
    Worker(job, "w", SharedEngine([job])).run()


def merge(job: Job) -> None:
    for pass_ in job.passes:
        draw._merge(job, pass_, job.output(pass_))
    shutil.rmtree(job.chunk_dir)


def test_all_is_merged_and_removed_as_soon_as_the_last_chunk_is_there(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left to be written into a folder that goes, or is made anew by it."""
    write = worker.write_records

    def write_and_merge(path: Path, samples: Any) -> int:
        count = write(path, samples)
        if not job.missing():
            merge(job)
        return count

    monkeypatch.setattr(worker, "write_records", write_and_merge)
    work(job, monkeypatch)
    assert [path.name for path in job.directory.iterdir()] == ["samples.jsonl"]
    assert len((job.directory / "samples.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("begun", [False, True], ids=["removed", "begun anew"])
def test_what_is_drawn_when_another_forced_other_settings_does_not_count(
    job: Job, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    """It looked at the claims when this worker had none, between two chunks. A chunk of the old settings under the
    name of one of the new would be taken for that."""
    write, written = worker.write_records, []

    def write_then_forced(path: Path, samples: Any) -> int:
        written.append(path)
        count = write(path, samples)
        shutil.rmtree(job.chunk_dir)
        if begun:
            draw._claim(job.model_copy(update={"seed": 4}))
        return count

    monkeypatch.setattr(worker, "write_records", write_then_forced)
    with pytest.raises(UserError, match="another process removed what was drawn, to draw with other settings"):
        work(job, monkeypatch)
    assert len(written) == 1
    assert not list(job.chunk_dir.glob("samples-*"))


def test_who_hung_until_others_had_drawn_and_merged_all_ends_well(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 2 would end a chain of Slurm jobs."""
    write = worker.write_records

    def others() -> None:
        for chunk in job.missing():
            requests = worker.chunk_requests(job, chunk)
            drawn = [Completion([7, 2], "stop", None) for _ in requests]
            write(job.chunk_dir / chunk.file_name, worker.chunk_samples(job, chunk, requests, drawn, tokenizer, None))
        merge(job)

    tokenizer = worker.load_tokenizer(job.model)
    work(job, monkeypatch, others)
    assert [path.name for path in job.directory.iterdir()] == ["samples.jsonl"]
    assert len((job.directory / "samples.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("error", [FileNotFoundError, FileExistsError])
def test_merged_between_the_look_and_the_claim(job: Job, monkeypatch: pytest.MonkeyPatch, error: type[OSError]) -> None:
    work(job, monkeypatch)

    def goes(path: Path, _: object) -> None:
        merge(job)
        raise error(str(path))

    monkeypatch.setattr(draw, "write_json", goes)
    Drawing(job, "test", job.directory / "logs").draw()
    assert [path.name for path in job.directory.iterdir()] == ["samples.jsonl"]


def test_a_folder_that_is_lost_is_an_error(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def goes(path: Path, _: object) -> None:
        raise FileNotFoundError(str(path))

    monkeypatch.setattr(draw, "write_json", goes)
    with pytest.raises(FileNotFoundError, match=r"job\.json"):
        Drawing(job, "test", job.directory / "logs").draw()


def test_the_job_file_goes_while_it_is_compared(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    draw._claim(job)
    path = job.chunk_dir / "job.json"
    is_file = Path.is_file

    def then_gone(self: Path) -> bool:
        found = is_file(self)
        if self == path:
            path.unlink()
        return found

    monkeypatch.setattr(Path, "is_file", then_gone)
    draw._claim(job)
    assert path.exists()


def test_speeds_are_not_read_from_a_folder_that_others_remove(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attempt was killed between the merging and the manifest; another process tidies up now."""
    work(job, monkeypatch)
    drawing = Drawing(job, "test", job.directory / "logs")
    merge(job)
    job.chunk_dir.mkdir()
    (job.chunk_dir / "speed-w.json").symlink_to("gone")
    assert drawing.finish().counts["solutions"] == 2
    assert not job.chunk_dir.exists()


def test_who_comes_late_to_an_evaluation_draws_nothing(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process has drawn, measured and removed the samples since this one looked whether it is done."""
    model, problems = repository / "recipes" / "mini_cpu_m0", tmp_path / "problems.jsonl"
    write_records(problems, [Problem(problem_id="p", problem="Max has 2 coins.", answer="2")])
    recipe = read_recipe(repository / "recipes" / "mini_cpu.yaml", [f"output={tmp_path}"])
    drawing = evaluation_drawing(model, "M0", problems, recipe, tmp_path / "M0")
    assert len(drawing.job.missing()) == 2
    (tmp_path / "M0").mkdir()
    (tmp_path / "M0" / "metrics.json").write_text("{}")
    assert drawing.job.missing() == []

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("no worker is needed")

    monkeypatch.setattr(draw, "run_children", refuse)
    drawing.draw()
    assert [path.name for path in (tmp_path / "M0").iterdir()] == ["metrics.json"]
