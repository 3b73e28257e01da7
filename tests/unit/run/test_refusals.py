"""What a later stage would refuse is refused before anything is sampled, and no sooner than it is needed."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.files import write_json
from megatron_stepkto.base.records import write_records
from megatron_stepkto.cli.main import main
from megatron_stepkto.megatron import patches as cpu
from megatron_stepkto.problems.chained_arithmetic.student import corpus
from megatron_stepkto.recipe.file import read_recipe
from megatron_stepkto.recipe.keys import Recipe
from megatron_stepkto.run import refusals
from megatron_stepkto.run.folder import Run
from megatron_stepkto.run.pipeline import prepare
from megatron_stepkto.run.stages import training_of
from megatron_stepkto.training import requirements
from megatron_stepkto.training.requirements import Ranks, check_devices, check_longest, check_packages
from tests.slurm.cluster import free_ports
from tests.unit.megatron.test_acceleration import settings as training


def load(repository: Path, output: Path, *sets: str) -> Recipe:
    return read_recipe(
        repository / "recipes" / "mini_cpu.yaml", [f"output={output}", "iterations=2", "train.device=cpu", *sets]
    )


def refused(repository: Path, output: Path, capsys: pytest.CaptureFixture[str], *sets: str) -> str:
    """What ``stepkto run`` says, in one line; it ends with exit code 2, and has sampled nothing."""
    words = [f"--set={each}" for each in (f"output={output}", "iterations=2", *sets)]
    with pytest.raises(SystemExit) as stop:
        main(["run", str(repository / "recipes" / "mini_cpu.yaml"), *words])
    assert stop.value.code == 2
    assert not list(output.rglob("chunks"))
    return " ".join(capsys.readouterr().err.split())


LLM = "judge.process={kind: llm, base_url: 'http://127.0.0.1:PORT/v1', model: m%s}"


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["train.dtype=bfloat16", "train.fp8={}"],
         "iteration 1 train: train.fp8 needs an NVIDIA GPU, but training runs on the CPU; remove train.fp8"),
        (["train.apex=required"], "iteration 1 train: train.apex is required, but training runs on the CPU"),
        (["train.dtype=bfloat16", "train.transformer_engine=required"],
         "iteration 1 train: train.transformer_engine is required, but training runs on the CPU"),
        (["train.dtype=bfloat16", "train.optimizer.offload=0.5", "train.parallel.distributed_optimizer=true"],
         "iteration 1 train: train.optimizer.offload: 0.5 needs an NVIDIA GPU, but training runs on the CPU, whose"),
        (["train.recompute={modules: [moe]}"],
         "iteration 1 train: --set train.recompute={modules: [moe]}: train.recompute.modules names moe, which the mod"),
        (["train.log.wandb=mine"], "iteration 1 train: train.log.wandb is set, but the package wandb is not installed"),
        (["problems={source: files, per_iteration: 4, train: recipe.yaml, test: [recipe.yaml, none.jsonl]}"],
         "problems.test.1: expected a file of problems, found none at "),
        (["train.device=cuda"], "iteration 1 train: torch sees 0 GPUs, the layout needs 2 on this node"),
        (["train.parallel={ranks: 3, tensor: 3}"],
         "iteration 1 train: --set train.parallel={ranks: 3, tensor: 3}: train.parallel.tensor = 3 does not divide"),
        (["sample.tensor_parallel=2"],
         "evaluate M0: sample.tensor_parallel is 2, but vLLM's CPU build is installed; set sample.tensor_parallel: 1"),
        (["judge.process={kind: monte_carlo, sample: {max_tokens: 9, tensor_parallel: 2}}"],
         "evaluate M0: sample.tensor_parallel is 2, but vLLM's CPU build is installed"),
        ([LLM % ""], "evaluate M0: judge.process.base_url: no server answers: http://127.0.0.1:PORT/v1 (Cannot conn"),
        ([LLM % "", "evaluate=null"], "iteration 1 judge: judge.process.base_url: no server answers"),
        ([LLM % ", api_key_env: NO_SUCH_KEY"], "judge.process.api_key_env names the environment variable NO_SUCH_KEY"),
        (["judge.process={kind: prm, convention: qwen_math_prm, model: mini_cpu_m0, "
          "base_url: 'http://127.0.0.1:PORT/v1'}"], "evaluate M0: judge.process.base_url: no server answers"),
    ],
)  # fmt: skip
def test_what_the_machine_lacks(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], sets: list[str], said: str
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine lacks no GPU")
    [port] = free_ports(1)
    found = refused(repository, tmp_path / "runs", capsys, *(each.replace("PORT", str(port)) for each in sets))
    assert found.startswith("error: ")
    assert said.replace("PORT", str(port)) in found
    assert not (tmp_path / "runs").exists(), "nothing is left behind"


def test_all_refusals_are_told_at_once(repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each once, though every iteration, and every compared method, would refuse it."""
    found = refused(repository, tmp_path, capsys, "train.apex=required", "train.log.wandb=x", "train.device=cpu")
    assert found == (
        "error: refused before anything is sampled: iteration 1 train: train.log.wandb is set, but the package wandb "
        "is not installed; `pip install wandb`, or remove the key iteration 1 train: train.apex is required, but "
        "training runs on the CPU; install NVIDIA Apex (built from source: apex on the package index is another "
        "project), or set train.apex to auto or off"
    )


def problem_files(folder: Path, answer: str | None) -> list[str]:
    """Files of four problems each, whose text the miniature's tokenizer knows. answer: of those of train."""
    text = "Max has 27 coins. Tom has 2 more than Max. How many coins does Tom have?"
    folder.mkdir(exist_ok=True)
    for split in ("train", "test"):
        rows: list[dict[str, Any]] = [
            {
                "problem_id": f"{split}{n}",
                "problem": text.replace("27", str(ord(split[1]) % 50 + n)),
                "answer": answer if split == "train" else "29",
            }
            for n in range(4)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = f"problems={{source: files, train: {folder}/train.jsonl, test: {folder}/test.jsonl, per_iteration: 2}}"
    return [files, "evaluate.num_problems=4", "judge.process=equations", "sample.backend=transformers"]


@pytest.mark.parametrize(
    ("answer", "sets", "said"),
    [
        # behind the evaluation of M0
        ("29", ["problems.per_iteration=5"], "problems.per_iteration is 5, the train file holds 4 problems; lower it"),
        ("29", ["sample.max_tokens=300"], "evaluate M0: {m0}: the prompt of problem test0 has "),
        ("29", ["train.micro_batch_tokens=100"],
         "iteration 1 train: {run}/iteration_1/problems/problems.jsonl: the longest prompt has 19 tokens, a response "
         "up to 96 (sample.max_tokens); with padding an example may have 115, a micro-batch has room for 100; raise"),
        (None, [], "iteration 1 judge: {run}/iteration_1/problems/problems.jsonl: 2 problems have no answer, such as"),
    ],
)  # fmt: skip
def test_what_the_problems_show(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], answer: str | None, sets: list[str], said: str
) -> None:
    m0 = repository / "recipes" / "mini_cpu_m0"
    found = refused(repository, tmp_path, capsys, *problem_files(tmp_path / "files", answer), *sets)
    assert said.format(m0=m0, run=tmp_path / "mini_cpu") in found


@pytest.mark.parametrize(
    ("answer", "sets", "said"),
    [
        ("29", ["problems.per_iteration=5"], "problems.per_iteration is 5, the train file holds 4 problems; lower it"),
        ("29", ["evaluate.num_problems=5"], "test.jsonl: evaluate.num_problems is 5, the file holds 4; lower it"),
        ("29", ["sample.max_tokens=300"], "the prompt of problem test0 has "),
        (None, [], "2 problems have no answer, such as"),
    ],
)
def test_what_the_problems_show_is_said_before_m0_is_trained(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], answer: str | None, sets: list[str], said: str
) -> None:
    solutions = tmp_path / "solutions.jsonl"
    write_records(solutions, [problem.model_copy(update={"solution": text}) for problem, text in corpus(4, seed=5)])
    training = "{method: rft, optimizer: {lr: 1.0e-3}, global_batch_size: 2, device: cpu}"
    warm_up = f"warm_up={{solutions: [{solutions}], training: {training}}}"
    found = refused(repository, tmp_path, capsys, *problem_files(tmp_path / "files", answer), warm_up, *sets)
    assert said in found
    assert not (tmp_path / "mini_cpu" / "M0" / "train").exists()


def test_a_judge_of_rollouts_by_models_that_are_still_to_be_trained(repository: Path, tmp_path: Path) -> None:
    """The judge of iteration 2 completes with M1, whose folder is not there yet."""
    judge = "judge.process={kind: monte_carlo, sample: {max_tokens: 96, num_samples: 2, backend: transformers}}"
    run = Run(load(repository, tmp_path, *problem_files(tmp_path / "files", "29"), judge))
    prepare(run)
    assert [(item.kind, item.t) for item in refusals.pending(run)][-1] == ("evaluate", 2)


def test_a_folder_is_not_evaluated_without_its_judge(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    problem_files(tmp_path, "29")
    [port] = free_ports(1)
    judge = (LLM % "").replace("PORT", str(port))
    with pytest.raises(SystemExit) as stop:
        main(["measure", str(repository / "recipes" / "mini_cpu_m0"), f"--data={tmp_path}/test.jsonl",
              f"--output={tmp_path}/out", "--set=sample.max_tokens=96", f"--set={judge}"])  # fmt: skip
    assert stop.value.code == 2
    assert "judge.process.base_url: no server answers" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out" / "results").exists()


def test_the_longest_example_by_hand() -> None:
    """100 + 50 tokens; padded to 152 = 8 x 19; a pair's sides share the micro-batch; dropped above the limit."""
    padded = training(pad_documents_to=8, micro_batch_tokens=152)
    check_longest(100, 50, None, padded, "x")
    check_longest(100, 900, 150, padded, "x")
    with pytest.raises(UserError, match=r"may have 160, a micro-batch has room for 152; raise train\.micro_batch_to"):
        check_longest(100, 53, None, padded, "x")
    check_longest(100, 50, None, training(method="dpo", micro_batch_tokens=300), "x")
    with pytest.raises(UserError, match="may have 150, a micro-batch has room for 149"):
        check_longest(100, 50, None, training(method="irpo", micro_batch_tokens=299), "x")


def finish(run: Run, *names: str) -> None:
    for name in names:
        write_json(run.base / name / "manifest.json", {"key": {"settings": {}}})


def kinds(run: Run, *compare: Any) -> list[str]:
    return [item.title for item in refusals.pending(run, compare)]


def test_what_is_finished_needs_nothing(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that has only an evaluation left goes on where there is neither Apex nor Megatron-Core."""
    run = Run(load(repository, tmp_path, "train.apex=required"))

    def absent() -> None:
        raise UserError("megatron-core is not installed")

    monkeypatch.setattr(cpu, "check_megatron_version", absent)
    monkeypatch.setattr(requirements.cpu, "check_megatron_version", absent)
    assert kinds(run) == [
        "evaluate M0", "iteration 1 sample", "iteration 1 judge", "iteration 1 train", "evaluate M1",
        "iteration 2 sample", "iteration 2 judge", "iteration 2 train", "evaluate M2",
    ]  # fmt: skip
    finish(run, "evaluate/M0", *(f"iteration_1/{stage}" for stage in ("sample", "judge", "train")), "evaluate/M1")
    finish(run, "iteration_2/sample", "iteration_2/judge")
    found = refusals.machine_refusals(run)
    assert [line.partition(":")[0] for line in found] == ["iteration 2 train"] * 2
    assert "megatron-core is not installed" in found[0]
    finish(run, "iteration_2/train")
    assert kinds(run) == ["evaluate M2"]
    assert refusals.machine_refusals(run) == []
    ends = Run(load(repository, tmp_path / "ends", "train.apex=required", "evaluate.models=first_and_last"))
    assert [name for name in kinds(ends, "kto") if "evaluate" in name] == [
        "evaluate M0",
        "evaluate M2",
        "kto evaluate M2",
    ]
    # a compared method has trainings of its own, and shares the rest of the first iteration
    assert kinds(run, "kto")[:3] == ["evaluate M2", "kto iteration 1 train", "kto evaluate M1"]


def test_each_environment_of_a_cluster_is_asked_for_its_own_stages(repository: Path, tmp_path: Path) -> None:
    sets = ["train.log.wandb=x", "sample.tensor_parallel=2"]
    run = Run(load(repository, tmp_path, *sets))
    [train] = refusals.machine_refusals(run, environment="train")
    [sample] = refusals.machine_refusals(run, environment="sample")
    assert "wandb" in train
    assert "tensor_parallel" in sample
    assert refusals.machine_refusals(run) == [train, sample]
    with pytest.raises(UserError, match=r"train\.log\.wandb is set"):
        refusals.refuse(refusals.machine_refusals(run, environment="train", elsewhere=True))


def test_with_force_what_changed_is_asked_again(repository: Path, tmp_path: Path) -> None:
    recipe = load(repository, tmp_path, "evaluate=null")
    run = Run(recipe)
    for t in (1, 2):
        finish(run, *(f"iteration_{t}/{stage}" for stage in ("sample", "judge", "train")))
        for stage, of in refusals._STAGE_OF.items():
            if stage != "evaluate":
                write_json(of(run, t).manifest_path, {"key": {"settings": dict(of(run, t).settings)}})
    assert kinds(run) == kinds(Run(recipe, force=True)) == []
    changed = recipe.model_copy(update={"train": recipe.train.model_copy(update={"epochs": 7})})
    assert training_of(Run(changed), 1).settings != training_of(run, 1).settings
    assert kinds(Run(changed)) == [], "refused with the difference by the stage itself"
    assert kinds(Run(changed, force=True)) == [
        "iteration 1 train", "iteration 2 sample", "iteration 2 judge", "iteration 2 train",
    ]  # fmt: skip


# --- training on another machine, on GPUs ----------------------------------------------------------------------


def test_packages_for_gpus_that_another_machine_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `prepare` asks on a node without GPUs: what is installed counts, though it may not load without a driver."""
    fp8 = training(fp8={"scaling": "blockwise"})
    with pytest.raises(UserError, match=r"train\.fp8 needs Transformer Engine, which is not installed"):
        check_packages(fp8)
    with pytest.raises(UserError, match="training runs on the CPU; remove"):
        check_packages(training(fp8={}, device="cpu"))
    check_packages(training())
    (tmp_path / "transformer_engine" / "pytorch").mkdir(parents=True)
    (tmp_path / "transformer_engine" / "__init__.py").write_text("raise OSError('libcuda.so.1: cannot open')\n")
    metadata = tmp_path / "transformer_engine-2.2.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: transformer-engine\nVersion: 2.2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    check_packages(training(fp8={"scaling": "current"}, transformer_engine="required"))
    with pytest.raises(UserError, match=r"blockwise needs Transformer Engine 2\.3 or newer, 2\.2 is installed"):
        check_packages(fp8)
    sys.modules.pop("transformer_engine", None)


def test_gpus_are_looked_at_by_a_process_of_its_own(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its refusal comes back as the user's error. The process sees no GPU here, and says so."""
    monkeypatch.setattr(requirements, "check_gpus", lambda wanted: None)
    wanted = Ranks(settings=training(device="cuda"), model=repository / "recipes" / "mini_cpu_m0", ranks=2)
    with pytest.raises(UserError, match=r"train\.device is cuda, but torch sees no GPU"):
        check_devices(wanted)


def test_memory_of_the_ranks_that_share_a_machine(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama 8B in bfloat16 on one rank: 16 bytes per parameter and the gradient's float32 are 160 GB."""
    wanted = Ranks(settings=training(device="cpu"), model=repository / "recipes" / "configs" / "llama3.1_8b", ranks=4)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=4 * 64 * 10**9))
    with pytest.raises(UserError, match=r"its share \(1 of 4\) of the host's memory has 64\.0 GB"):
        check_devices(wanted)


# --- disk space ------------------------------------------------------------------------------------------------


def parameters_of(recipe: Recipe) -> int:
    from safetensors.torch import load_file

    assert recipe.initial_model is not None
    return sum(t.numel() for t in load_file(recipe.initial_model / "model.safetensors").values())


def test_checkpoint_size_by_hand(repository: Path, tmp_path: Path) -> None:
    """fp32: weights 4 bytes, with AdamW 12; one input, 2 + 1 checkpoints, 2 iterations in 2 formats."""
    recipe = load(repository, tmp_path)
    parameters = parameters_of(recipe)
    m0 = Run(recipe).model(0)
    assert refusals.checkpoint_bytes(recipe, m0, 2) == parameters * (4 + 3 * 12 + 2 * 2 * 4)
    assert refusals.checkpoint_bytes(recipe, m0, 1) == parameters * (4 + 3 * 12 + 1 * 2 * 4)
    assert refusals.checkpoint_bytes(recipe, m0, 0) == 0
    assert refusals.checkpoint_bytes(recipe, tmp_path / "not made yet", 2) == 0
    bf16 = recipe.model_copy(update={"train": recipe.train.model_copy(update={"dtype": "bfloat16"})})
    assert refusals.checkpoint_bytes(bf16, m0, 2) == parameters * (2 + 3 * 14 + 2 * 2 * 2)


def test_full_disk(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load(repository, tmp_path)
    run, parameters = Run(recipe), parameters_of(recipe)

    def found(free: int) -> list[str]:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
        return refusals.machine_refusals(run, environment="train")

    needed = parameters * (4 + 3 * 12 + 2 * 2 * 4)
    assert found(needed) == []
    [line] = found(needed - 1)
    assert line.startswith(
        f"checkpoints: {tmp_path} has 0.0 GB free, the run's checkpoints need 0.0 GB; make room, set output to another"
    )
    # what is trained needs no more room, and what an attempt has written is there
    finish(run, "iteration_1/train")
    needed = parameters * (4 + 3 * 12 + 1 * 2 * 4)
    written = run.base / "iteration_2" / "train" / "initial" / "weights"
    written.parent.mkdir(parents=True)
    written.write_bytes(bytes(1000))
    assert found(needed - 1000) == []
    assert len(found(needed - 1001)) == 1
    finish(run, "iteration_2/train")
    assert found(0) == []
