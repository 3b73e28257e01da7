"""``make gpu-smoke``: is this machine's GPU path sound, and how fast? Under ten minutes on one NVIDIA GPU.

It makes its own environment (.venv-gpu) from the default package index, or offline from a folder of wheels
(WHEELS=DIR), or takes the environment that runs it (--here), and checks packages and kernels. Then gpu_parts.py runs
tests/gpu, the benchmarks and the recipes. Whatever is skipped is listed with its reason.
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
ENVIRONMENT = ROOT / ".venv-gpu"
OUTPUT = ROOT / "runs" / "gpu_smoke"
# Its three packages must be of one version: the library, the name that it is found by, and the part for torch.
TE_LIBRARY, TE_NAME, TE_TORCH = (f"transformer-engine{part}==2.11.0" for part in ("-cu13", "", "-torch"))
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


def run(command: Sequence[str], log: Path, **env: str) -> str:
    """Output of a command, kept in ``log`` too.

    Raises:
        Failed: it ended with an error or took too long.
    """
    with log.open("w", encoding="utf-8") as file:
        try:
            done = subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, stdout=file, stderr=subprocess.STDOUT,
                                  timeout=LIMIT_S, check=False)  # fmt: skip
        except subprocess.TimeoutExpired:
            raise Failed(f"took more than {LIMIT_S} s; see {log}") from None
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


def install(python: Path, wheels: Path | None) -> str:
    """The environment, without Transformer Engine, which may fail to build and is a part of its own."""
    if not python.exists():
        run([sys.executable, "-m", "venv", str(ENVIRONMENT)], OUTPUT / "venv.log")
    pip(python, wheels, ["-r", str(ROOT / "requirements" / "gpu.txt")], "install.log")
    pip(python, wheels, ["--no-build-isolation", "--editable", "."], "package.log")
    return f"in {ENVIRONMENT.name}" + (f", offline from {wheels}" if wheels else "")


def transformer_engine(python: Path, wheels: Path | None) -> str:
    check = [str(python), "-c", "import transformer_engine.pytorch, transformer_engine as t; print(t.__version__)"]
    try:
        return "already there: " + run(check, OUTPUT / "te.log").split()[-1]
    except Failed:
        pass
    if (nvcc := find_nvcc()) is None:
        raise Skipped("its torch part is built with the headers beside nvcc, and there is no nvcc here")
    where = "import nvidia, pathlib as p; print(*(d for r in nvidia.__path__ for d in p.Path(r).glob('*/include')))"
    try:
        # A CUDA toolkit brings no headers of cuDNN: those that came with torch.
        headers = run([str(python), "-c", where], OUTPUT / "headers.log").split()
        pip(python, wheels, ["--no-deps", TE_LIBRARY, TE_NAME], "te_core.log")
        pip(python, wheels, ["--no-deps", "--no-build-isolation", TE_TORCH], "te_torch.log",
            CUDA_HOME=str(nvcc.parents[1]), CPATH=os.pathsep.join([*headers, os.environ.get("CPATH", "")]).strip(":"),
            PATH=os.pathsep.join([str(python.parent), str(nvcc.parent), os.environ["PATH"]]))  # fmt: skip
        return "built: " + run(check, OUTPUT / "te.log").split()[-1]
    except Failed as error:
        # Half of it would break every import of Megatron-Core, and with it the parts that need none.
        names = [package.partition("==")[0] for package in (TE_LIBRARY, TE_NAME, TE_TORCH)]
        run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *names], OUTPUT / "te_removed.log")
        raise Skipped(f"could not be installed: {error}") from None


def find_nvcc() -> Path | None:
    """On the path, or where CUDA's own installer puts it."""
    places = [shutil.which("nvcc"), f"{os.environ.get('CUDA_HOME', '')}/bin/nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((Path(place).resolve() for place in places if place and Path(place).is_file()), None)


def pip(python: Path, wheels: Path | None, what: Sequence[str], log: str, **env: str) -> None:
    offline = ["--no-index", "--find-links", str(wheels)] if wheels else []
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *offline, *what]
    run(command, OUTPUT / log, **env)


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
        ("environment", only_without_here(lambda: install(python, arguments.wheels))),
        ("Transformer Engine", only_without_here(lambda: transformer_engine(python, arguments.wheels))),
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
