"""containers/: Dockerfiles and Apptainer definitions agree with each other and the locks; their steps run."""

from __future__ import annotations

import fnmatch
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.test_gpu_setup import PYPROJECT, VENV, lock_of, write_wheel
from tools import gpu_setup

ROOT = Path(__file__).parents[2]
HOME = "/opt/megatron-stepkto/"
BASES = {  # the package of the lock whose version is the base's
    "train": ("cuda-toolkit", "nvidia/cuda:{}-devel-ubuntu24.04"),
    "sample": ("vllm", "vllm/vllm-openai:v{}"),
}


def dockerfile(kind: str) -> list[list[str]]:
    """Instructions, as words; arguments filled in."""
    text = (ROOT / "containers" / f"{kind}.Dockerfile").read_text()
    for name, value in re.findall(r"^ARG (\w+)=(\S+)", text, re.MULTILINE):
        text = text.replace(f"${{{name}}}", value)
    return [line.split() for line in text.splitlines() if line and not line.startswith("#")]


def definition(kind: str) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Header and sections of an Apptainer definition; a section is its lines."""
    head, *sections = re.split(r"^%", (ROOT / "containers" / f"{kind}.def").read_text(), flags=re.MULTILINE)
    header = dict(re.findall(r"^(\w+): (.+)", head, re.MULTILINE))
    lines = {text.split("\n")[0]: [line.strip() for line in text.split("\n")[1:] if line.strip()] for text in sections}
    return header, lines


@pytest.mark.parametrize("kind", gpu_setup.KINDS)
def test_both_recipes_of_an_image_are_the_same_and_of_the_locks_versions(kind: str) -> None:
    instructions, (header, sections) = dockerfile(kind), definition(kind)
    package, pattern = BASES[kind]
    pins = gpu_setup.read_lock(gpu_setup.lock_path(kind), (3, 12))  # Ubuntu 24.04's Python, and that of vLLM's image
    [version] = [pin.version for pin in pins if pin.name == package]
    base = pattern.format(".".join(version.split(".")[:3]))
    assert ["FROM", base] in instructions
    assert header == {"Bootstrap": "docker", "From": base}
    # the same files at the same places
    assert ["WORKDIR", HOME.rstrip("/")] in instructions
    copied = {}
    for word, *paths in instructions:
        for source in paths[:-1] if word == "COPY" else []:
            target = paths[-1].removeprefix("./")
            copied[source] = (
                target if target.endswith(source.rsplit("/", 1)[-1]) else target + source.rsplit("/", 1)[-1]
            )
    del copied["megatron_stepkto/__init__.py"]  # alone first, for the layers' sake
    assert all(source == target for source, target in copied.items()), copied
    placed = dict(line.split() for line in sections["files"])
    assert {source: (target + Path(source).name).removeprefix(HOME) for source, target in placed.items()} == copied
    # the same steps and the same command
    assert [
        f"{HOME}{' '.join(words)}" for step, *words in instructions if step == "RUN" and "useradd" not in words
    ] == (sections["post"])
    assert [" ".join(words) for step, *words in instructions if step == "ENV"] == [
        line.removeprefix("export ") for line in sections.get("environment", [])
    ]
    # not root
    assert [words for step, *words in instructions if step == "USER"] == [["2000"]]
    assert instructions.index(["USER", "2000"]) > max(i for i, words in enumerate(instructions) if words[0] == "RUN")


@pytest.mark.parametrize("kind", gpu_setup.KINDS)
def test_what_an_image_copies_is_there_and_reaches_the_build(kind: str) -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    allowed = [rule[1:] for rule in rules if rule.startswith("!")]
    for source in definition(kind)[1]["files"]:
        path = source.split()[0]
        assert (ROOT / path).exists(), path
        assert path in allowed
    assert rules[0] == "*"
    assert all((ROOT / path).exists() for path in allowed)
    assert any(fnmatch.fnmatch("megatron_stepkto/base/__pycache__", rule) for rule in rules if rule != "*")


def test_install_script() -> None:
    script = ROOT / "containers" / "install.sh"
    assert script.stat().st_mode & 0o111 == 0o111
    done = subprocess.run(["bash", str(script), "judge"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "error: expected train or sample, found judge\n")
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("vllm", ["1.0", "2.0"])
def test_the_sampling_image_gets_what_it_lacks(tmp_path: Path, vllm: str) -> None:
    """In a Python that has vLLM and another version of something: as in vLLM's image."""
    wheels, index, image = tmp_path / "wheels", tmp_path / "simple", tmp_path / "image"
    wheels.mkdir()
    subprocess.run([sys.executable, "-c", VENV, str(image)], check=True)
    [packages] = image.glob("lib/python*/site-packages")
    for name, version in (("vllm", vllm), ("numpy", "2.3.4")):
        subprocess.run(["unzip", "-q", write_wheel(tmp_path, name, version, {}), "-d", packages], check=True)
    needs = "Requires-Dist: latex2sympy2_extended==1.0\nRequires-Dist: not-on-linux ; sys_platform == 'win32'\n"
    pins = {
        f"{name}==1.0": write_wheel(wheels, name, "1.0", {}, requires=needs if name == "math-verify" else "")
        for name in ("vllm", "numpy", "math-verify", "latex2sympy2-extended", "of-vllm-alone")
    }
    for path in wheels.iterdir():
        name = path.name.split("-")[0].replace("_", "-")
        (index / name).mkdir(parents=True)
        (index / name / "index.html").write_text(f'<a href="{path.as_uri()}">{path.name}</a>')
    for folder in ("containers", "tools", "requirements"):
        (tmp_path / folder).mkdir()
    for file in ("containers/install.sh", "tools/gpu_setup.py"):
        shutil.copy(ROOT / file, tmp_path / file)
    (tmp_path / "requirements" / "gpu-sample.lock").write_text(lock_of(pins))
    (tmp_path / "pyproject.toml").write_text(
        f'{PYPROJECT}[project]\nname = "megatron-stepkto"\ndependencies = ["numpy>=2,<3", "math-verify==1.0"]\n'
    )
    package = write_wheel(tmp_path, "megatron-stepkto", "0.1", {"megatron_stepkto.py": ""})
    (tmp_path / "backend.py").write_text(
        "import os, shutil\n"
        "def get_requires_for_build_editable(settings=None): return []\n"
        "def build_editable(folder, settings=None, metadata=None):\n"
        f"    return shutil.copy({str(package)!r}, folder).rsplit('/', 1)[1]\n"
    )
    done = subprocess.run(
        [tmp_path / "containers" / "install.sh", "sample"], capture_output=True, text=True, check=False,
        env={"PATH": f"{image}/bin:/usr/bin:/bin", "PIP_CONFIG_FILE": "/dev/null", "PIP_INDEX_URL": index.as_uri()},
    )  # fmt: skip
    if vllm == "2.0":
        assert done.stderr == "error: expected an image with vLLM 1.0, found 2.0\n"
        assert done.returncode == 2
        return
    assert done.returncode == 0, done.stderr
    assert done.stdout == "added math-verify 1.0, latex2sympy2-extended 1.0\n"  # its own numpy stays
    installed = {path.name for path in packages.glob("*.dist-info")}
    assert {"numpy-2.3.4.dist-info", "math_verify-1.0.dist-info", "megatron_stepkto-0.1.dist-info"} <= installed
