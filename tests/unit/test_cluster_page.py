"""docs/cluster.md typed from top to bottom into bash: programs that need a cluster note how they were called."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.unit.test_docs import FENCE, refusal
from tools import gpu_setup

ROOT = Path(__file__).parents[2]
NOTE = '#!/bin/bash\nprintf "%q " "${0##*/}" "$@" >>"$NOTES"; echo >>"$NOTES"\n'
PROGRAMS = {
    "make": f'{NOTE}exec /usr/bin/env PATH="$REAL_PATH" make -n -C {ROOT} "$@"\n',
    "srun": f'{NOTE}while [[ $1 == -* ]]; do shift; done\nexec "$@"\n',
    "tail": NOTE,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder with a checkout that has both environments: as after ``make gpu``, but for what they hold."""
    home = tmp_path_factory.mktemp("home")
    checkout, programs = home / "megatron-stepkto", home / "programs"
    for folder in (checkout, programs):
        folder.mkdir()
    for name, text in PROGRAMS.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    shutil.copytree(ROOT / "slurm", checkout / "slurm")
    shutil.copytree(ROOT / "recipes", checkout / "recipes")
    for kind in gpu_setup.KINDS:
        binaries = checkout / gpu_setup.environment_path(kind).name / "bin"
        binaries.mkdir(parents=True)
        (binaries / "stepkto").write_text(NOTE)
        (binaries / "stepkto").chmod(0o755)
        (binaries / "activate").write_text(f'export VIRTUAL_ENV={binaries.parent}\nPATH={binaries}:"$PATH"\n')
    return home


def bash(home: Path, script: str) -> subprocess.CompletedProcess[str]:
    environment = {
        "HOME": str(home), "USER": "me", "NOTES": str(home / "notes"), "REAL_PATH": os.environ["PATH"],
        "PATH": f"{home / 'programs'}:/usr/bin:/bin",
    }  # fmt: skip
    return subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=home, env=environment, capture_output=True,
                          text=True, timeout=60, check=False)  # fmt: skip


def test_every_command_of_the_page_works_as_typed(home: Path) -> None:
    blocks = FENCE.findall((ROOT / "docs" / "cluster.md").read_text())
    script = "\n".join(block for _, language, block in blocks if language != "text")
    done = bash(home, script)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert (home / "megatron-stepkto" / "slurm" / "site.sh").read_text() == (ROOT / "slurm/site.example.sh").read_text()
    called = [shlex.split(line) for line in (home / "notes").read_text().splitlines()]
    # srun's command is noted by itself: by the program that srun starts
    ours = [words for program, *words in called if program == "stepkto"]
    assert [" ".join(words[:2]) for words in ours] == [
        "doctor recipes/llama3.1_8b_8xh100.yaml", "doctor recipes/llama3.1_8b_8xh100.yaml",
        "plan recipes/llama3.1_8b_8xh100.yaml", "slurm submit", "slurm submit", "slurm submit", "slurm status",
        "status runs/llama3.1_8b_8xh100",
    ]  # fmt: skip
    for words in ours:
        assert refusal(words) == "", words
        for word in words:
            assert not word.startswith("recipes/") or (ROOT / word).is_file(), word
    assert [words for program, *words in called if program == "make"] == [
        ["gpu-wheels", "WHEELS=wheels"], ["gpu", "WHEELS=wheels"], ["images"], ["images", "IMAGES=apptainer"],
    ]  # fmt: skip


@pytest.mark.parametrize("kind", gpu_setup.KINDS)
def test_the_site_file_activates_what_make_gpu_makes(home: Path, kind: str) -> None:
    done = bash(
        home, f'source {ROOT}/slurm/site.example.sh; environment {kind}; echo "$VIRTUAL_ENV"; stepkto --version'
    )
    assert done.stdout == f"{home}/megatron-stepkto/{gpu_setup.environment_path(kind).name}\n", done.stderr
