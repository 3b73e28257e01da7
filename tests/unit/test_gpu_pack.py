"""``tools/gpu_pack.py``: what is sent, in which order, and that what was cut arrives whole."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

FILES = {
    "torch-2.13.0-cp312-cp312-manylinux_2_28_x86_64.whl": 900,
    "nvidia_cublas-13.1.0-py3-none-manylinux_2_27_x86_64.whl": 900,
    "numpy-2.3.5-cp312-cp312-manylinux_2_28_x86_64.whl": 300,
    "megatron_core-0.19.2-cp312-cp312-manylinux_2_28_x86_64.whl": 400,
    "math_verify-0.9.0-py3-none-any.whl": 100,
    "datasets-5.2.0-py3-none-any.whl": 700,
    "transformer_engine-2.11.0-py3-none-any.whl": 50,
    "transformer_engine_cu13-2.11.0-py3-none-manylinux_2_28_x86_64.whl": 2500,
    "transformer_engine_torch-2.11.0.tar.gz": 60,
}


def run(*arguments: object) -> str:
    command = [sys.executable, str(REPOSITORY / "tools" / "gpu_pack.py"), *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name, size in FILES.items():
        (folder / name).write_bytes(os.urandom(size))
    return folder


def test_what_the_machine_lacks_arrives_whole_and_transformer_engine_last(wheels: Path, tmp_path: Path) -> None:
    (tmp_path / "present").write_text("NumPy==2.5.2\nPyYAML==6.0.3\n")
    run("make", tmp_path / "out", "--wheels", wheels, "--present", tmp_path / "present", "--limit-mib", 1000 / 2**20)
    folders = sorted((tmp_path / "out").iterdir())
    assert all(sum(file.stat().st_size for file in folder.iterdir()) <= 1000 for folder in folders)
    held = [{file.name.partition(".piece")[0].partition("-")[0] for file in folder.iterdir()} for folder in folders]
    assert held == [
        {"math_verify", "megatron_core"},
        {"datasets"},
        {"transformer_engine", "transformer_engine_torch"},
        *[{"transformer_engine_cu13"}] * 3,
    ]
    for folder in folders:
        run("take", folder, tmp_path / "arrived")
    expected = {name for name in FILES if not name.startswith(("torch", "nvidia", "numpy"))}
    assert {file.name for file in (tmp_path / "arrived").iterdir()} == expected
    assert all((tmp_path / "arrived" / name).read_bytes() == (wheels / name).read_bytes() for name in expected)


def test_a_wheel_goes_before_the_source_of_the_same_project(wheels: Path, tmp_path: Path) -> None:
    (wheels / "transformer_engine_torch-2.11.0-cp312-cp312-linux_x86_64.whl").write_bytes(b"built")
    run("make", tmp_path / "out", "--wheels", wheels)
    sent = {file.name for folder in (tmp_path / "out").iterdir() for file in folder.iterdir()}
    assert "transformer_engine_torch-2.11.0-cp312-cp312-linux_x86_64.whl" in sent
    assert "transformer_engine_torch-2.11.0.tar.gz" not in sent


def test_install_puts_wheels_where_pythonpath_finds_them(tmp_path: Path) -> None:
    (tmp_path / "arrived").mkdir()
    with zipfile.ZipFile(tmp_path / "arrived" / "small-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("small.py", "VALUE = 7\n")
        wheel.writestr("small-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: small\nVersion: 1.0\n")
        wheel.writestr("small-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("small-1.0.dist-info/RECORD", "")
    (tmp_path / "arrived" / "large-1.0-py3-none-any.whl.piece00of02").write_bytes(b"half")  # the rest has not come yet
    run("install", tmp_path / "arrived", tmp_path / "site")
    code = "import small; print(small.VALUE)"
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout == "7\n"
