"""torch.save's file of a tensor, put together and taken apart, and CRC-32 of parts; torch, zipfile and zlib judge."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import pickle
import random
import resource
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_stepkto.checkpoints.checksums import checksum, crc32_of_parts
from megatron_stepkto.checkpoints.tensor_file import TensorFile, TensorFileError, locate_tensor

SHAPES = [(3,), (1,), (2, 5), (1, 4, 8), (1, 1, 2, 3), (7, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_reads_ours_and_we_find_torchs(shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.randn(shape).to(dtype)
    data = tensor.view(torch.uint8).numpy().tobytes()
    ours = TensorFile(dtype, shape)
    before, after = ours.ends(zlib.crc32(data))
    content = before + data + after
    assert len(content) == ours.length
    assert len(before) % 64 == 0  # data are aligned
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.testzip() is None
    read = torch.load(io.BytesIO(content), weights_only=True)
    assert (read.dtype, read.shape, read.stride()) == (dtype, tensor.shape, tensor.stride())
    assert torch.equal(read, tensor)

    saved = io.BytesIO()
    torch.save(tensor, saved)
    part = torch.randn(3, *shape).to(dtype)
    view = io.BytesIO()
    torch.save(part[1], view)  # a view: torch stores all of it
    path = tmp_path / "file"
    blocks = [content, saved.getvalue(), view.getvalue()]
    path.write_bytes(b"before" + b"".join(blocks) + b"behind")
    handle, offset = os.open(path, os.O_RDONLY), 6
    for block, expected in zip(blocks, (tensor, tensor, part[1]), strict=True):
        found = locate_tensor(handle, path, offset, len(block))
        assert (found.dtype, found.shape) == (dtype, shape)
        size = expected.numel() * dtype.itemsize
        assert os.pread(handle, size, found.offset) == expected.contiguous().view(torch.uint8).numpy().tobytes()
        offset += len(block)
    os.close(handle)


def test_every_truncation_and_many_flipped_bits_are_an_error_or_harmless(tmp_path: Path) -> None:
    saved = io.BytesIO()
    tensor = torch.arange(6.0).view(2, 3)
    torch.save(tensor, saved)
    content, path = saved.getvalue(), tmp_path / "file"
    draw, found_at = random.Random(0), None
    spoiled = [content[:length] for length in range(len(content))]
    for _ in range(2000):
        flipped = bytearray(content)
        flipped[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        spoiled.append(bytes(flipped))
    for block in spoiled:
        path.write_bytes(block)
        handle = os.open(path, os.O_RDONLY)
        try:
            found_at = locate_tensor(handle, path, 0, len(content)).offset
            assert 0 < found_at <= len(block) - 24
        except TensorFileError:
            pass
        finally:
            os.close(handle)
    assert found_at is not None


@pytest.mark.parametrize(
    ("pickled", "packing", "said"),
    [
        (b"\x80\x02" + b"0" * 2**24, zipfile.ZIP_DEFLATED, "data.pkl is packed, or far too large"),  # 16 KB on disk
        (b"\x80\x02" + b"0" * 2**21, zipfile.ZIP_STORED, "data.pkl is packed, or far too large"),
        (b"\x80\x02Nr\xff\xff\xff\x7f.", zipfile.ZIP_STORED, "not a plain tensor"),  # a memo of 2^31 places
    ],
    ids=["packed", "large", "memo"],
)
def test_descriptions_that_would_fill_the_memory(pickled: bytes, packing: int, said: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    with zipfile.ZipFile(path, "w", packing) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", b"0123")
    handle = os.open(path, os.O_RDONLY)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(TensorFileError, match=said):
        locate_tensor(handle, path, 0, path.stat().st_size)
    os.close(handle)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10_000  # KB


def described(shape: tuple[Any, ...], start: Any, strides: tuple[Any, ...], numel: int = 6) -> bytes:
    """What torch.save writes of a tensor, with any numbers."""

    class Storage:
        pass

    class Tensor:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (Storage(), start, shape, strides, False, OrderedDict())

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", numel) if isinstance(value, Storage) else None

    out = io.BytesIO()
    Pickler(out, protocol=2).dump(Tensor())
    return out.getvalue()


@pytest.mark.parametrize(
    ("shape", "start", "strides", "whole"),
    [
        ((2, 3), 0, (3, 1), True),
        ((2, 3), -3, (3, 1), False),
        ((2, 3), 1, (3, 1), False),
        ((-2, -3), 0, (3, 1), False),
        ((2, 3), 0, (3, 1, 1), False),
        ((2, 2**61), 0, (2**61, 1), False),
        (("2", 3), 0, (3, 1), False),
        ((2, 3), None, (3, 1), False),
        ((2, 3), 0, (1, 2), False),
    ],
    ids=str,
)
def test_a_description_that_lies(
    shape: tuple[Any, ...], start: Any, strides: tuple[Any, ...], whole: bool, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", described(shape, start, strides))
        archive.writestr("archive/data/0", bytes(24))
    handle = os.open(path, os.O_RDONLY)
    with contextlib.nullcontext() if whole else pytest.raises(TensorFileError):
        assert locate_tensor(handle, path, 0, path.stat().st_size).shape == shape
    os.close(handle)


@pytest.mark.parametrize("value", [[1, 2], {"a": torch.ones(2)}, torch.nn.Linear(2, 2)], ids=["list", "dict", "module"])
def test_other_things_are_no_tensor(value: object, tmp_path: Path) -> None:
    path = tmp_path / "file"
    torch.save(value, path)
    handle = os.open(path, os.O_RDONLY)
    with pytest.raises(TensorFileError):
        locate_tensor(handle, path, 0, path.stat().st_size)
    os.close(handle)


def test_more_than_a_plain_zip_file_can_hold() -> None:
    with pytest.raises(ValueError, match="cut it"):
        TensorFile(torch.float32, (2**30 + 1,)).ends(0)


def test_checksums_of_parts() -> None:
    draw = random.Random(2)
    content = draw.randbytes(100_000)
    for _ in range(50):
        cuts = sorted([0, len(content), *(draw.randrange(len(content)) for _ in range(draw.randrange(9)))])
        parts = [content[a:b] for a, b in itertools.pairwise(cuts)]
        found = crc32_of_parts((zlib.crc32(part), len(part)) for part in parts)
        assert found == (zlib.crc32(content), len(content))
    zeros = bytes(10**6)
    found = crc32_of_parts([(checksum(content), len(content)), (checksum(zeros), len(zeros))])
    assert found == (zlib.crc32(content + zeros), len(content + zeros))
    assert checksum(np.frombuffer(zeros, np.uint8), checksum(content)) == zlib.crc32(content + zeros)
