"""What to measure on one NVIDIA GPU in ten minutes: the most valuable part first, each with its own time limit.

    python tools/gpu_parts.py                        every part, in the order of PARTS
    python tools/gpu_parts.py --parts tests head     some of them
    python tools/gpu_parts.py --rehearse             every part at reduced size on a CPU, with a stopwatch

A part that reaches its limit is killed with all its processes, and the next one starts. OUT/results.jsonl gets one line
when a part ends (status, seconds, figures, versions, device), which is on the disk before the next one starts; what the
parts print is in OUT/log.txt. A killed part leaves the figures that it had printed. A part whose needs are missing is
skipped with the reason. Only the standard library is imported here: the environment measured may be another one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "runs" / "gpu_parts"
BUDGET_S = 590  # of all parts: a command on a borrowed GPU often may take ten minutes
LEAST_S = 10  # a part is not started with less
GRACE_S = 3  # between SIGTERM and SIGKILL
PYTEST = ("pytest", "tests/gpu", "-v", "--no-header", "--tb=short", "-p", "no:cacheprovider")
TINY = ("--shapes", "tiny", "--device", "cpu")


@dataclass(frozen=True)
class Part:
    """A program and its limit.

    Attributes:
        module: what ``python -m`` runs, with its arguments, on a GPU.
        rehearsal: the same at reduced size on a CPU.
        limit_s: of the part on a GPU, its start included.
        gpu_s: seconds on an H100 beside what the processor does, by arithmetic: model FLOPs at 40% of 800 TFLOP/s, 10 s
            for CUDA and kernels of a part's processes, 1 ms per layer and decoded token of a batch, 60 ms per update of
            a small model.
        host_bound: the processor does on a GPU machine what it does in the rehearsal; else only its ``programs`` start.
    """

    name: str
    what: str
    module: tuple[str, ...]
    rehearsal: tuple[str, ...]
    limit_s: int
    gpu_s: float
    host_bound: bool = False
    programs: int = 1


# The order is that of what is worth most: a GPU may be taken away at any time.
PARTS = (
    # CUDA and kernels of two programs
    Part("tests", "tests/gpu in float32 and bf16 on local layers", (*PYTEST, "-m", "gpu and not transformer_engine"),
         (*PYTEST, "-m", "gpu and not transformer_engine"), 120, 15, host_bound=True),
    # 10 layers, 32,768 tokens: 1.7 s per update, 7 of each method; 4 KL and 4 reference passes of 0.6 s
    Part("train_8b", "8B-shaped slice in bf16 on local layers: Step-KTO, supervised",
         ("benchmarks.gpu_train", "--shapes", "8b", "--cases", "step_kto", "supervised", "--transformer-engine", "off",
          "--repeats", "5"),
         ("benchmarks.gpu_train", *TINY, "--cases", "step_kto", "supervised", "--repeats", "2"), 80, 45),
    # 7 heads of 34 TFLOP (four products), 9 times each
    Part("head", "log-prob head against full logits and Liger's kernel", ("benchmarks.gpu_head", "--repeats", "5"),
         ("benchmarks.gpu_head", "--device", "cpu", "--tokens", "256", "--words", "4096", "--hidden", "128",
          "--repeats", "2"), 40, 15),
    # 600 updates for the curves, 280 for the rest, checkpoints
    Part("te_tests", "tests/gpu on Transformer Engine's layers: FP8 against bf16",
         (*PYTEST, "-m", "transformer_engine"), (*PYTEST, "-m", "transformer_engine"), 120, 85),
    # 5 updates of 2 cases, 8 passes
    Part("te_train_8b", "8B-shaped slice on Transformer Engine's layers: bf16, FP8",
         ("benchmarks.gpu_train", "--shapes", "8b", "--cases", "step_kto", "fp8_current", "--transformer-engine",
          "required", "--repeats", "3"),
         ("benchmarks.gpu_train", *TINY, "--transformer-engine", "required"), 60, 35),
    # 2 layers, 16,384 tokens: 0.9 s per update, 5 of 3 cases, 8 passes
    Part("te_train_70b", "70B-shaped slice on Transformer Engine's layers: bf16, FP8",
         ("benchmarks.gpu_train", "--shapes", "70b", "--cases", "step_kto", "fp8_current", "fp8_blockwise",
          "--transformer-engine", "required", "--repeats", "3"),
         ("benchmarks.gpu_train", *TINY, "--transformer-engine", "required"), 60, 30),
    # 16,384 tokens: 32 layers of LoRA twice (2.2 s and 3 s), 4 layers seven times; 17 GB of host memory to pin, twice
    Part("memory", "memory against the plan: LoRA, recomputation, offloading", ("benchmarks.gpu_memory",),
         ("benchmarks.gpu_memory", *TINY), 90, 50),
    # 3 layers: 64 batches of 50 to 96 tokens; 40 updates; CUDA of six programs
    Part("mini", "one iteration of recipes/mini_cpu.yaml in bf16", ("benchmarks.gpu_loop", "mini"),
         ("benchmarks.gpu_loop", "mini", "--device", "cpu", "--short"), 120, 45, host_bound=True),
    # 30 layers: 12 batches of 96 tokens; 72 updates; CUDA of seven programs
    Part("smollm2", "one iteration of SmolLM2-135M on word problems in bf16", ("benchmarks.gpu_loop", "smollm2"),
         ("benchmarks.gpu_loop", "smollm2", "--device", "cpu", "--short"), 120, 60, programs=7),
)  # fmt: skip

# Versions without importing anything: an import of torch alone takes seconds.
VERSIONS = """
import importlib.metadata as m, json, platform
names = "torch triton megatron-core transformer-engine transformers vllm numpy liger-kernel megatron-stepkto".split()
found = {"python": platform.python_version()}
for name in names:
    try:
        found[name] = m.version(name)
    except m.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Result:
    """One line of results.jsonl. status: ok, failed, out of time, skipped or interrupted.

    seconds: by the clock. processor_s: of all its processes, user and system. start_s: of the processor, until torch
    and Megatron-Core are imported; measured in a rehearsal.
    """

    part: str
    status: str
    seconds: float
    processor_s: float
    limit_s: float
    said: str
    figures: list[dict[str, Any]]
    begun: str = ""
    rehearsal: bool = False
    start_s: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    device: str = ""
    commit: str = ""


def ended(name: str, output: str, end: int | str, seconds: float, processor_s: float, limit_s: float) -> Result:
    """What a part's output says. end: its exit code, or why it was killed."""
    figures = list(figures_of(output))
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    last = lines[-1] if lines else "no output"
    if "::" in output and (tests := counts_of_tests(output)):
        figures.append(tests)
    if isinstance(end, str):
        status, said = end, f"killed after {seconds:.0f} s, limit {limit_s:.0f} s; {len(figures)} figures before"
    elif end:
        status, said = "failed", f"exit code {end}: {last}"
    elif last.startswith("skipped: "):
        status, said = "skipped", last.removeprefix("skipped: ")
    elif figures and "passed" in figures[-1] and not figures[-1]["passed"]:
        reasons = sorted({line.partition(": ")[2] for line in lines if line.startswith("SKIPPED")})
        status, said = "skipped", "; ".join(reasons) or last
    else:
        status, said = "ok", last.strip("= ") if not last.startswith("{") else f"{len(figures)} figures"
    return Result(name, status, round(seconds, 1), round(processor_s, 1), limit_s, said[:300], figures)


def figures_of(output: str) -> Iterator[dict[str, Any]]:
    """The lines that are one JSON object."""
    for line in output.splitlines():
        if line.startswith("{"):
            with contextlib.suppress(ValueError):
                yield json.loads(line)


def counts_of_tests(output: str) -> dict[str, Any] | None:
    """Tests by outcome as ``pytest -v`` prints them, one line each as it ends, and the names of those that failed."""
    outcomes = re.findall(r"^(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED)", output, re.MULTILINE)
    if not outcomes:
        return None
    count = {word.lower(): sum(o == word for _, o in outcomes) for word in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    return {**count, "names": [name for name, outcome in outcomes if outcome in ("FAILED", "ERROR")]}


def run_part(part: Part, python: Path, out: Path, limit_s: float, *, rehearse: bool) -> Result:
    """Run one part in a process group of its own; at the limit, or when this process is stopped, it is killed."""
    command = [str(python), "-W", "ignore", "-m", *(part.rehearsal if rehearse else part.module)]
    env = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *_given_path()])}
    if rehearse:
        # One thread: two that wait for each other on a busy machine measure the other jobs.
        env |= {"STEPKTO_REHEARSE_GPU_TESTS": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    log = out / "log.txt"
    with log.open("ab") as file:
        file.write(f"\n=== {part.name}: {' '.join(command[3:])}\n".encode())
        file.flush()
        start = file.tell()
        before, begun = _processor_seconds(), time.monotonic()
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        end: int | str
        try:
            end = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            end = "out of time"
        except (KeyboardInterrupt, SystemExit):
            end = "interrupted"
        _kill_group(process)
    seconds, processor_s = time.monotonic() - begun, _processor_seconds() - before
    with log.open("rb") as file:
        file.seek(start)
        output = file.read().decode(errors="replace")
    return ended(part.name, output, end, seconds, processor_s, limit_s)


def _given_path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """The part and what it left. Processes of stages have groups of their own; the kernel kills them with their parent
    (base/processes.py)."""
    for number, wait_s in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(wait_s)


def record(result: Result, out: Path) -> None:
    """Append to results.jsonl; on the disk when this returns."""
    with (out / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(result)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def describe(command: Sequence[str]) -> str:
    """Output of a short command, or what went wrong with it."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown: {error}"
    return done.stdout.strip() if done.returncode == 0 else f"unknown: {(done.stderr or done.stdout).strip()[:160]}"


def device_of(rehearse: bool) -> str:
    if rehearse:
        return f"no GPU: rehearsal on a CPU of {os.cpu_count()} cores"
    if shutil.which("nvidia-smi") is None:
        return "no nvidia-smi here"
    return describe(["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"])


def start_seconds(python: Path) -> float:
    before = _processor_seconds()
    describe([str(python), "-W", "ignore", "-c", "import torch, megatron.core, transformers"])
    return round(_processor_seconds() - before, 1)


def run_parts(
    parts: Sequence[Part], python: Path, out: Path, *, rehearse: bool = False, budget_s: float = BUDGET_S
) -> list[Result]:
    """Run the parts in order, each within its own limit and what is left of ``budget_s``; record each as it ends."""
    out.mkdir(parents=True, exist_ok=True)
    versions = describe([str(python), "-c", VERSIONS])
    about: dict[str, Any] = {
        "rehearsal": rehearse,
        "start_s": start_seconds(python) if rehearse else 0.0,
        "versions": json.loads(versions) if versions.startswith("{") else {"python": versions},
        "device": device_of(rehearse),
        "commit": describe(["git", "describe", "--always", "--dirty"]),
    }
    print(f"{about['device']}; {', '.join(f'{name} {version}' for name, version in about['versions'].items())}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the part in progress is killed and recorded
    end = time.monotonic() + budget_s
    results: list[Result] = []
    for part in parts:
        begun, left = time.strftime("%Y-%m-%dT%H:%M:%S%z"), end - time.monotonic()
        print(f"{part.name}: {part.what} ...", flush=True)
        if left < LEAST_S:
            result = Result(part.name, "skipped", 0.0, 0.0, part.limit_s, "no time left", [])
        else:
            limit_s = left if rehearse else min(left, part.limit_s)
            result = run_part(part, python, out, limit_s, rehearse=rehearse)
        result = replace(result, begun=begun, **about)
        record(result, out)
        results.append(result)
        print(f"{part.name}: {result.status}, {result.seconds:.0f} s; {result.said}", flush=True)
        if result.status == "interrupted":
            raise SystemExit(143)
    return results


def estimate_s(part: Part, result: Result) -> float:
    """Seconds on an H100 with 16 free cores: what the processor does, as if those cores were no faster than the
    rehearsal's one, and what the GPU does."""
    return (result.processor_s if part.host_bound else part.programs * result.start_s) + part.gpu_s


def table(parts: Sequence[Part], results: Sequence[Result]) -> str:
    rehearsal = any(result.rehearsal for result in results)
    rows = []
    for part, result in zip(parts, results, strict=True):
        row = f"{part.name:13} {result.status:11} {result.seconds:6.1f} s"
        if rehearsal:
            row += f"  processor {result.processor_s:6.1f} s  on an H100 about {estimate_s(part, result):4.0f} s"
            row += f" (limit {part.limit_s} s)"
        rows.append(f"{row}  {result.said}")
    total = f"in all {sum(result.seconds for result in results):.0f} s"
    if rehearsal:
        seconds = sum(estimate_s(part, result) for part, result in zip(parts, results, strict=True))
        total += f"; on an H100 about {seconds:.0f} s, {seconds / 60:.1f} minutes"
    return "\n".join([*rows, total])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in PARTS], help="default: all")
    parser.add_argument("--out", type=Path, default=OUTPUT, help="results.jsonl and log.txt; new lines are appended")
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="of the environment to measure")
    parser.add_argument("--seconds", type=float, default=BUDGET_S, help=f"for all parts (default {BUDGET_S})")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU at reduced size, without the parts' limits")
    arguments = parser.parse_args()
    parts = [part for part in PARTS if arguments.parts is None or part.name in arguments.parts]
    budget_s = 3600.0 if arguments.rehearse else arguments.seconds
    results = run_parts(
        parts, arguments.python, arguments.out.resolve(), rehearse=arguments.rehearse, budget_s=budget_s
    )
    print(table(parts, results))
    raise SystemExit(any(result.status in ("failed", "out of time") for result in results))


if __name__ == "__main__":
    main()
