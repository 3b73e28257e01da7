"""Regenerate requirements/gpu-train.lock and gpu-sample.lock: ``python tools/gpu_lock.py``.

It takes a minute, reads metadata only, and needs uv (``pip install uv``). The direct requirements are those of
pyproject.toml and requirements/gpu-KIND.in. Other packages have the versions that are tested on the CPU (cpu.lock,
py312.lock). Package indexes are those that uv is configured for; none is written into a lock.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = ROOT / "requirements"
KINDS = ("train", "sample")
# What the locks are for. uv repeats it behind every package; the header of the lock says it once.
PLATFORM = (
    "sys_platform == 'linux' and platform_machine == 'x86_64' and implementation_name == 'cpython' "
    "and platform_python_implementation == 'CPython'"
)
HEADER = """\
# Every package of .venv-gpu-{kind} with the hashes of its files: CPython 3.11 and 3.12 on Linux x86-64, CUDA 13.
# Made by tools/gpu_lock.py from gpu-{kind}.in and pyproject.toml; do not edit. Installed by tools/gpu_setup.py.
# To download under Python 3.12: {gigabytes:.1f} GB
"""
# Its metadata can only be computed where torch is installed, and names CUDA 12's library where it is not.
TRANSFORMER_ENGINE_TORCH = ["einops", "onnxscript", "onnx", "packaging", "pydantic", "torch", "transformer-engine-cu13"]


def requirement_lines(path: Path) -> list[str]:
    return [line for raw in path.read_text(encoding="utf-8").splitlines() if (line := raw.partition(" #")[0].strip())
            and not line.startswith("#")]  # fmt: skip


def tested_versions(kind: str, direct: list[str]) -> list[str]:
    """Constraints from the CPU's locks: on Python 3.12 training has a lock of its own, sampling has not.

    Packages that ``direct`` limits itself are left out.
    """
    pinned = {name_of(line) for line in direct if re.search("==|<", line.partition(";")[0])}
    locks = {"cpu.lock": "python_version < '3.12'", "py312.lock": "python_version >= '3.12'"}
    if kind == "sample":
        locks = {"cpu.lock": "python_version >= '3.11'"}
    return [
        f"{line} ; {marker}"
        for lock, marker in locks.items()
        for line in requirement_lines(REQUIREMENTS / lock)
        if name_of(line) not in pinned and "+cpu" not in line
    ]


def name_of(requirement: str) -> str:
    """The normalised name of a package (PEP 503)."""
    name = re.match(r"[\w.-]+", requirement)
    assert name, requirement
    return re.sub(r"[-_.]+", "-", name[0]).lower()


def quoted(values: list[str]) -> str:
    return "[" + ", ".join(f'"{value}"' for value in values) + "]"


def project(kind: str) -> str:
    """A pyproject.toml for uv."""
    package = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    direct = requirement_lines(REQUIREMENTS / f"gpu-{kind}.in")
    engine = next((line for line in direct if name_of(line) == "transformer-engine-torch"), None)
    text = f"""
[project]
name = "gpu-{kind}"
version = "0"
requires-python = "{package["requires-python"]}"
dependencies = {quoted([*package["dependencies"], *direct])}
[tool.uv]
environments = ["{PLATFORM}"]
constraint-dependencies = {quoted(tested_versions(kind, direct))}
"""
    if engine:
        text += f"""
[[tool.uv.dependency-metadata]]
name = "transformer-engine-torch"
version = "{engine.partition("==")[2]}"
requires-dist = {quoted(TRANSFORMER_ENGINE_TORCH)}
"""
    return text


def lock(kind: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "pyproject.toml").write_text(project(kind), encoding="utf-8")
        uv(["lock", "--quiet"], folder)
        size = download_size(tomllib.loads(Path(folder, "uv.lock").read_text(encoding="utf-8")))
        text = uv(["export", "--quiet", "--frozen", "--format=requirements-txt", "--no-emit-project", "--no-annotate",
                   "--no-header"], folder)  # fmt: skip
    platform = " and ".join(sorted(PLATFORM.split(" and ")))  # as uv prints it
    text = text.replace(f" ; {platform}", "").replace(f" and {platform}", "")
    return HEADER.format(kind=kind, gigabytes=size / 1e9) + text


def download_size(locked: dict) -> int:
    """Bytes of the files that pip takes under CPython 3.12: per package its smallest fitting wheel, or its source."""
    total = 0
    for package in locked["package"]:
        markers = " ".join(package.get("resolution-markers", []))
        if "< '3.12'" in markers and ">= '3.12'" not in markers:
            continue
        fitting = re.compile(r"-(cp312|py3|py2\.py3|cp3\d+-abi3)")
        wheels = [wheel["size"] for wheel in package.get("wheels", []) if fitting.search(wheel["url"])]
        if wheels or "sdist" in package:
            total += min(wheels) if wheels else package["sdist"]["size"]
    return total


def uv(arguments: list[str], folder: str) -> str:
    done = subprocess.run(["uv", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: uv {arguments[0]} failed:\n{done.stderr.strip()}")
    return done.stdout


def main() -> None:
    for kind in KINDS:
        path = REQUIREMENTS / f"gpu-{kind}.lock"
        path.write_text(lock(kind), encoding="utf-8")
        print(f"{path.relative_to(ROOT)}: {len(re.findall('==', path.read_text()))} packages", file=sys.stderr)


if __name__ == "__main__":
    main()
