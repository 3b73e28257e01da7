"""Conversion of 4 GB under a hard memory limit, and killed at any instant. Needs 14 GB of disk for half a minute."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from megatron_stepkto.checkpoints.convert import hf_to_megatron
from megatron_stepkto.checkpoints.metadata import read_metadata
from megatron_stepkto.checkpoints.tensor_file import TensorFile
from megatron_stepkto.checkpoints.torch_dist import CheckpointReader
from megatron_stepkto.checkpoints.verify import verify
from tests.big_model import write_big_llama
from tests.model_folders import read_tensor

pytestmark = pytest.mark.end_to_end
ROOT = Path(__file__).resolve().parents[2]
GB = 10**9
DISK_GB = 14

# RLIMIT_DATA bounds the private writable memory of a process: its heap, anonymous maps and thread stacks, touched or
# not. Pages of files do not count. The limit stands before anything is imported.
LIMITED = """
import resource, sys
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
from pathlib import Path
source, target = map(Path, sys.argv[3:5])
if sys.argv[2] == "read it all":
    print(len((source / "model.safetensors").read_bytes()))
else:
    from megatron_stepkto.checkpoints import convert
    getattr(convert, sys.argv[2])(source, target, workers=2)
"""


def limited(limit: float, what: str, source: Path, target: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LIMITED, str(int(limit)), what, str(source), str(target)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    if shutil.disk_usage(tmp_path).free < DISK_GB * GB:
        pytest.skip(f"{tmp_path} has less than {DISK_GB} GB of free disk")
    yield tmp_path
    shutil.rmtree(tmp_path)


def merge_layers(folder: Path, key: str) -> int:
    """Make one chunk of a stacked key's layers, as another program may write it; its size in bytes."""
    metadata = read_metadata(folder)
    entry = metadata.state_dict_metadata[key]
    assert isinstance(entry, TensorStorageMetadata)
    reader = CheckpointReader(folder)
    assert reader.check([key]) == []
    # zip files of more than 4 GB are not made here
    file = TensorFile(entry.properties.dtype, tuple(entry.size))
    before, after = file.ends(0)
    with (folder / "merged.distcp").open("wb") as out:
        out.write(before)
        for layer in range(entry.size[0]):
            out.write(read_tensor(reader, key, (layer,)).view(torch.uint8).numpy().data)
        out.write(after)
    for chunk in entry.chunks:
        del metadata.storage_data[MetadataIndex(key, chunk.offsets)]
    offset = torch.Size([0] * len(entry.size))
    entry.chunks[:] = [ChunkStorageMetadata(offset, entry.size)]
    metadata.storage_data[MetadataIndex(key, offset)] = _StorageInfo("merged.distcp", 0, file.length)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    (folder / "conversion.json").unlink()
    return file.num_bytes


def test_four_gigabytes_under_a_hard_memory_limit(disk: Path) -> None:
    """3 times the largest tensor plus 1 GB: 1.4 GB for a model of 4.2 GB, in both directions."""
    hf, megatron, back = disk / "hf", disk / "megatron", disk / "back"
    total, largest = write_big_llama(hf, layers=32)
    assert total > 4.1e9
    limit = 3 * largest + GB
    assert limit < 0.35 * total
    control = limited(limit, "read it all", hf, megatron)
    assert "MemoryError" in control.stderr  # the limit limits
    too_low = limited(0.15 * GB, "hf_to_megatron", hf, megatron)
    assert too_low.returncode != 0
    assert not megatron.exists()

    done = limited(limit, "hf_to_megatron", hf, megatron)
    assert done.returncode == 0, done.stderr
    # A chunk of 2.1 GB: larger than the limit, read by position.
    assert merge_layers(megatron, "decoder.layers.mlp.linear_fc1.weight") > limit
    done = limited(limit, "megatron_to_hf", megatron, back)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(hf)
    assert verify(back, megatron, workers=2) == []


def convert(source: Path, target: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tools" / "hf_to_megatron.py"), str(source), str(target)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)


def changed(folder: Path) -> int | None:
    """When; None without the folder."""
    try:
        return folder.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def test_killed_at_any_instant(tmp_path: Path) -> None:
    """Nothing that looks finished; the next attempt starts clean, and leaves nothing else behind but its lock."""
    source, target = tmp_path / "hf", tmp_path / "megatron"
    partial = tmp_path / ".megatron.partial"
    write_big_llama(source, layers=4)
    draw = random.Random(1)
    killed_inside = 0
    for attempt in range(8):
        left_behind = changed(partial)  # by an earlier kill -9: it stays until a conversion begins
        process = convert(source, target)
        began = time.monotonic()
        # Not before it has begun: an interrupt of the starting interpreter itself ends with code 1 and Python's words.
        while changed(partial) == left_behind and process.poll() is None and time.monotonic() - began < 60:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.5))
        interrupt = signal.SIGINT if attempt % 4 == 3 else signal.SIGKILL
        process.send_signal(interrupt)
        _, said = process.communicate(timeout=300)
        if interrupt == signal.SIGINT:
            assert process.returncode == 130 or (process.returncode == 0 and target.exists()), said
            assert b"Traceback" not in said
            assert left_behind or not partial.exists()
        if target.exists():  # it had just finished
            assert verify(source, target) == []
            shutil.rmtree(target)
        else:
            killed_inside += 1
        assert {path.name for path in tmp_path.iterdir()} <= {"hf", ".megatron.partial", ".megatron.lock"}
    assert killed_inside >= 3
    assert convert(source, target).wait(timeout=300) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [".megatron.lock", "hf", "megatron"]
    assert verify(source, target) == []


def test_two_at_a_time_into_one_folder(tmp_path: Path) -> None:
    source, target = tmp_path / "hf", tmp_path / "megatron"
    write_big_llama(source, layers=4)
    both = [convert(source, target) for _ in range(2)]
    said = [process.communicate(timeout=300)[1].decode() for process in both]
    codes = [process.returncode for process in both]
    assert 0 in codes
    assert set(codes) <= {0, 2}
    for code, text in zip(codes, said, strict=True):
        if code:
            assert "is being written by another process" in text or "already exists" in text
    assert verify(source, target) == []
    assert json.loads((target / "conversion.json").read_text())["direction"] == "hf_to_megatron"


def test_the_pieces_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    source = tmp_path / "hf"
    write_big_llama(source, layers=1)
    for workers in (1, 3):
        hf_to_megatron(source, tmp_path / str(workers), workers=workers)
    one, three = ((tmp_path / name / "conversion.json").read_bytes() for name in ("1", "3"))
    assert one == three
