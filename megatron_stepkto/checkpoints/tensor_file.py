"""The file that ``torch.save`` makes of one tensor, taken apart and put together without holding the tensor.

Such a file is a zip archive of uncompressed records: a small pickle that describes the tensor, and its bytes. A
torch_dist checkpoint is many of them, one behind another.
"""

from __future__ import annotations

import functools
import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megatron_stepkto.checkpoints.checksums import checksum
from megatron_stepkto.checkpoints.unpickling import Allowed, Refused, RestrictedUnpickler

_STORAGES = {
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.float64: torch.DoubleStorage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.uint8: torch.ByteStorage,
}
_ALIGNMENT = 64
_DESCRIPTION_BYTES = 2**20  # the description of one tensor has a few hundred
_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_END = struct.Struct("<4sHHHHIIH")
_DOS_DATE = 0x0021  # 1980-01-01: the same bytes every time
# Sizes in a plain zip archive have 32 bits.
MAX_TENSOR_BYTES = 2**32 - 2**20


class TensorFileError(Exception):
    """Not a file that ``torch.save`` wrote of one plain tensor, or a damaged one."""


@dataclass(frozen=True)
class TensorFile:
    """A tensor's file, but for its data: ``before`` + data + ``after``. The lengths do not depend on the checksum."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def length(self) -> int:
        before, after = self.ends(0)
        return len(before) + self.num_bytes + len(after)

    def ends(self, crc: int) -> tuple[bytes, bytes]:
        """The bytes before and after the data, whose CRC-32 is ``crc``."""
        if self.num_bytes > MAX_TENSOR_BYTES:
            raise ValueError(f"a chunk of {self.num_bytes} bytes: cut it to {MAX_TENSOR_BYTES} or less")
        pickled = _pickled(self.dtype, self.shape)
        small = (("archive/data.pkl", pickled), ("archive/byteorder", b"little"), ("archive/version", b"3\n"))
        out, directory = io.BytesIO(), io.BytesIO()
        for name, content in small:
            _record(out, directory, name, len(content), checksum(content))
            out.write(content)
        _record(out, directory, "archive/data/0", self.num_bytes, crc, align=True)
        start = out.tell() + self.num_bytes
        size, count = directory.tell(), len(small) + 1
        directory.write(_END.pack(b"PK\5\6", 0, 0, count, count, size, start, 0))
        return out.getvalue(), directory.getvalue()


def _record(out: BinaryIO, directory: BinaryIO, name: str, size: int, crc: int, align: bool = False) -> None:
    start, encoded = out.tell(), name.encode()
    padding = b""
    if align:  # in an extra field, as torch does it, so that a reader may map the data
        begins = start + _LOCAL.size + len(encoded) + 4
        fill = -begins % _ALIGNMENT
        padding = b"FB" + struct.pack("<H", fill) + b"Z" * fill
    fields = (0, 0, 0, _DOS_DATE, crc, size, size, len(encoded))
    out.write(_LOCAL.pack(b"PK\3\4", 20, *fields, len(padding)) + encoded + padding)
    directory.write(_CENTRAL.pack(b"PK\1\2", 20, 20, *fields, 0, 0, 0, 0, 0, start) + encoded)


class _StorageOf:
    def __init__(self, dtype: torch.dtype, numel: int) -> None:
        self.reference = ("storage", _STORAGES[dtype], "0", "cpu", numel)


class _TensorOf:
    """Pickles as a contiguous tensor would."""

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        strides = [1]
        for size in reversed(shape[1:]):
            strides.insert(0, strides[0] * max(size, 1))
        storage = _StorageOf(dtype, torch.Size(shape).numel())
        self.arguments: tuple[Any, ...] = (storage, 0, shape, tuple(strides[: len(shape)]), False, OrderedDict())

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return torch._utils._rebuild_tensor_v2, self.arguments


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return value.reference if isinstance(value, _StorageOf) else None


@functools.lru_cache(maxsize=4096)
def _pickled(dtype: torch.dtype, shape: tuple[int, ...]) -> bytes:
    out = io.BytesIO()
    _Pickler(out, protocol=2).dump(_TensorOf(dtype, shape))
    return out.getvalue()


# --- reading -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredTensor:
    """Where in its file a contiguous tensor's data begin."""

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class _Window(io.RawIOBase):
    """``length`` bytes of an open file, as a file object."""

    def __init__(self, handle: int, offset: int, length: int) -> None:
        self._handle, self._offset, self._length, self._position = handle, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = (0, self._position, self._length)[whence] + offset
        return self._position

    def readinto(self, out: Any) -> int:
        view = memoryview(out)[: max(0, self._length - self._position)]
        count = os.preadv(self._handle, [view], self._offset + self._position)
        self._position += count
        return count


# Builds nothing but a description of one tensor.
_DESCRIPTION: Allowed = {
    ("torch._utils", "_rebuild_tensor_v2"): lambda *arguments: arguments,
    ("collections", "OrderedDict"): OrderedDict,
    **{("torch", storage.__name__): dtype for dtype, storage in _STORAGES.items()},
}


class _DescriptionUnpickler(RestrictedUnpickler):
    def persistent_load(self, reference: Any) -> Any:
        return reference


def locate_tensor(handle: int, path: Path, offset: int, length: int) -> StoredTensor:
    """Find the data of the tensor that ``torch.save`` wrote to ``length`` bytes at ``offset`` of an open file.

    Raises:
        TensorFileError: damaged, code instead of a tensor, or a tensor that is not stored whole and in order.
    """
    try:
        return _locate(handle, path, offset, length)
    except Refused as error:
        raise TensorFileError(f"{error}, which a plain tensor does not need: refused") from None
    except (zipfile.BadZipFile, pickle.UnpicklingError, struct.error, OSError, EOFError) as error:
        raise TensorFileError(f"damaged: {error}") from None
    # RuntimeError: an encrypted record, endless nesting, sizes that torch refuses
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError) as error:
        raise TensorFileError(f"not a plain tensor, or damaged ({type(error).__name__}: {error})") from None


def _locate(handle: int, path: Path, offset: int, length: int) -> StoredTensor:
    window = _Window(handle, offset, length)
    with zipfile.ZipFile(io.BufferedReader(window, 4096)) as archive:
        records = {info.filename.partition("/")[2]: info for info in archive.infolist()}

        def small(name: str) -> bytes:
            if records[name].compress_type != zipfile.ZIP_STORED or records[name].file_size > _DESCRIPTION_BYTES:
                raise TensorFileError(f"damaged: its record {name} is packed, or far too large for a tensor")
            return archive.read(records[name])

        if "byteorder" in records and small("byteorder") != b"little":
            raise TensorFileError("written on a big-endian machine")
        described = _DescriptionUnpickler(io.BytesIO(small("data.pkl")), _DESCRIPTION).load()
        (_, dtype, name, _, _), start, shape, strides = described[:4]
        data = records[f"data/{name}"]
        fields = _LOCAL.unpack(os.pread(handle, _LOCAL.size, offset + data.header_offset))
    shape = tuple(shape)
    if not all(type(number) is int and number >= 0 for number in (start, *shape)):
        raise TensorFileError(f"not a plain tensor, or damaged (shape {shape}, from element {start})")
    stored = TensorFile(dtype, shape)
    contiguous = _TensorOf(dtype, shape).arguments[3]
    if data.compress_type != zipfile.ZIP_STORED or fields[0] != b"PK\3\4":
        raise TensorFileError("damaged: its data record is not stored plainly")
    if any(size > 1 and a != b for size, a, b in zip(shape, strides, contiguous, strict=True)):
        raise TensorFileError(f"its rows are not stored in order (strides {tuple(strides)}); save it contiguous")
    begins = data.header_offset + _LOCAL.size + fields[-2] + fields[-1]
    if (
        start * dtype.itemsize + stored.num_bytes > data.file_size
        or begins + data.file_size > length
        or offset + length > os.fstat(handle).st_size
    ):
        raise TensorFileError("truncated: its data end too early")
    return StoredTensor(path, offset + begins + start * dtype.itemsize, dtype, shape)
