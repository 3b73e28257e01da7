"""``make gpu-smoke``: is this machine's GPU path sound, and how fast? Under ten minutes on one NVIDIA GPU.

It runs in the training environment of ``make gpu`` (tools/gpu_setup.py), which it makes where it is not yet there, from
the package index or offline from a folder of wheels (WHEELS=DIR), or in the environment that runs it (--here). It
checks packages and kernels; then gpu_parts.py runs tests/gpu, the benchmarks and the recipes. Whatever is skipped is
listed with its reason.
Only the standard library is imported here: the script runs before anything is installed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = ROOT / ".venv-gpu-train"
OUTPUT = ROOT / "runs" / "gpu_smoke"
INSTALL_LIMIT_S = 3600
LIMIT_S = 570  # of one command


@dataclass(frozen=True)
class Row:
    part: str
    state: str  # ok, FAILED or skipped
    seconds: float
    said: str


class Skipped(Exception):
    """Why a part was not run."""


class Failed(Exception):
    """What went wrong, and where to read more."""


def run(command: Sequence[str], log: Path, limit_s: int = LIMIT_S, **env: str) -> str:
    """Output of a command, kept in ``log`` too.

    Raises:
        Failed: it ended with an error or took too long.
    """
    with log.open("w", encoding="utf-8") as file:
        try:
            done = subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, stdout=file, stderr=subprocess.STDOUT,
                                  timeout=limit_s, check=False)  # fmt: skip
        except subprocess.TimeoutExpired:
            raise Failed(f"took more than {limit_s} s; see {log}") from None
    text = log.read_text(encoding="utf-8", errors="replace")
    if done.returncode:
        last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no output")
        raise Failed(f"{last[:160]} (exit code {done.returncode}; see {log})")
    return text


def gpu() -> str:
    if shutil.which("nvidia-smi") is None:
        raise Failed("no nvidia-smi here: an NVIDIA GPU with its driver is needed")
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        raise Failed((done.stderr or done.stdout).strip()[:160] or "nvidia-smi failed")
    return done.stdout.strip().splitlines()[0]


def environment(wheels: Path | None) -> str:
    """The training environment; without Transformer Engine where that cannot be compiled: the other parts need none."""
    setup = [
        sys.executable,
        str(ROOT / "tools" / "gpu_setup.py"),
        "--only",
        "train",
        "--transformer-engine",
        "optional",
    ]
    offline = ["--wheels", str(wheels)] if wheels else []
    print(f"  its progress: {OUTPUT / 'environment.log'}", flush=True)
    return run([*setup, *offline], OUTPUT / "environment.log", INSTALL_LIMIT_S).splitlines()[-1]


KERNELS = """
import torch
if {device!r} == "cuda" and not torch.cuda.is_available():
    raise SystemExit(f"torch {{torch.__version__}} sees no GPU: its build is for CUDA {{torch.version.cuda}}")
from megatron_stepkto.megatron.acceleration import choose, describe, find_machine
from megatron_stepkto.recipe.keys import Training
device = torch.device({device!r})
machine = find_machine(device)
chosen = choose(Training(optimizer={{"lr": 1e-5}}, global_batch_size=8, dtype="bfloat16"), machine)
a = torch.randn(2048, 2048, device=device, dtype=torch.bfloat16)
error = ((a @ a).float() - a.float() @ a.float()).abs().max().item()
if not error < 1:  # sums of 2,048 products of size 1, rounded to 8 bits: 0.5 is usual
    raise SystemExit(f"a bf16 product is off by {{error}}")
print("torch", torch.__version__ + ";", describe(chosen, machine) + ";", f"bf16 product within {{error:.2f}}")
"""


def kernels(python: Path, device: str) -> str:
    return run([str(python), "-W", "ignore", "-c", KERNELS.format(device=device)], OUTPUT / "kernels.log").splitlines()[
        -1
    ]


def table(rows: Sequence[Row]) -> str:
    width = max(len(row.part) for row in rows)
    return "\n".join(f"{row.part:{width}}  {row.state:7}  {row.seconds:6.1f} s  {row.said}" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, help="folder of wheels and source packages; nothing is downloaded")
    parser.add_argument("--here", action="store_true", help="use the environment that runs this; install nothing")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with --here: tries the script, not a GPU")
    arguments = parser.parse_args()
    if arguments.wheels and not arguments.wheels.is_dir():
        parser.error(f"--wheels {arguments.wheels}: expected a folder of wheels")
    device = "cpu" if arguments.rehearse else "cuda"
    here = arguments.here or arguments.rehearse
    python = Path(sys.executable) if here else ENVIRONMENT / "bin" / "python"
    OUTPUT.mkdir(parents=True, exist_ok=True)

    def only_without_here(part: Callable[[], str]) -> Callable[[], str]:
        def skip() -> str:
            raise Skipped("--here: nothing is installed")

        return skip if here else part

    parts: list[tuple[str, Callable[[], str]]] = [
        ("GPU", gpu if device == "cuda" else lambda: "rehearsal on the CPU"),
        ("environment", only_without_here(lambda: environment(arguments.wheels))),
        ("packages and kernels", lambda: kernels(python, device)),
    ]
    rows: list[Row] = []
    for name, part in parts:
        print(f"{name} ...", flush=True)
        begun = time.monotonic()
        try:
            state, said = "ok", part()
        except Skipped as reason:
            state, said = "skipped", str(reason)
        except Failed as error:
            state, said = "FAILED", str(error)
        except Exception as error:  # of this script: the other parts still run
            state, said = "FAILED", f"{type(error).__name__}: {error}"
        rows.append(Row(name, state, time.monotonic() - begun, said))
        if state == "FAILED":
            print(table(rows))
            raise SystemExit(1)
    print(table(rows), flush=True)
    # A program of its own: it is what a machine without a network runs, where nothing can be installed.
    measure = [sys.executable, str(ROOT / "tools" / "gpu_parts.py"), "--python", str(python), "--out", str(OUTPUT)]
    raise SystemExit(subprocess.call([*measure, "--rehearse"] if arguments.rehearse else measure))


if __name__ == "__main__":
    main()
