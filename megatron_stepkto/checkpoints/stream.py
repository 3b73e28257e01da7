"""Moving rows between files: several workers, a few MB of memory each, checked and checksummed on the way.

Both directions of a conversion are the same work: a ``Piece`` is some rows of one Hugging Face tensor, which are
also consecutive rows of one slice of a Megatron-Core key. A worker reads a piece from one side, checks that its
numbers are finite, and writes it to the other. No more than a piece per worker is held,
whatever the model's size.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_stepkto.base.processes import usable_cores
from megatron_stepkto.base.progress import ProgressBar

# Small enough to stay in a core's cache between reading, checking and writing.
PIECE_BYTES = 2**19
# The disk starts writing while the workers read: otherwise all writing would come at the end.
WRITE_BACK_EVERY_BYTES = 32 * 2**20
_SYNC_FILE_RANGE_WRITE = 2
_MB = 10**6

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Piece:
    """``count`` rows: from row ``row`` of Hugging Face tensor ``name``, and from row ``at`` of Megatron's slice."""

    name: str
    row: int
    key: str
    index: tuple[int, ...]
    at: int
    count: int


class Moved(NamedTuple):
    """A piece's checksum on either side (they differ only where a cast changed the bits), and its lengths in bytes."""

    piece: Piece
    read_crc: int
    read_bytes: int
    written_crc: int
    written_bytes: int


def all_finite(data: Bytes, dtype: torch.dtype) -> bool:
    """Whether no element is NaN or infinite: its exponent would be all ones. Compares bits as integers, which is
    ten times as fast as torch.isfinite on bfloat16 and needs no memory.
    """
    signed, infinity = {
        torch.float32: (np.int32, 0x7F800000),
        torch.float16: (np.int16, 0x7C00),
        torch.bfloat16: (np.int16, 0x7F80),
    }[dtype]
    if not data.size:
        return True
    bits = data.view(signed)
    sign = 1 << (8 * bits.itemsize - 1)
    # As signed numbers the positive ones are the largest, as unsigned numbers the negative ones.
    return bool(bits.max() < infinity and bits.view(f"u{bits.itemsize}").max() < infinity + sign)


def cast(data: Bytes, source: torch.dtype, target: torch.dtype) -> Bytes:
    """The bytes of the same numbers in another dtype, rounded as torch rounds; ``data`` itself where it is the same."""
    if source == target:
        return data
    return torch.from_numpy(data).view(source).to(target).view(torch.uint8).numpy()


class Buffers(threading.local):
    """One growing buffer per worker."""

    def __init__(self) -> None:
        self._data = np.empty(0, np.uint8)

    def get(self, size: int) -> Bytes:
        if self._data.size < size:
            self._data = np.empty(size, np.uint8)
        return self._data[:size]


def _find_sync_file_range() -> Callable[[int], object]:
    """Linux's call; elsewhere nothing is written early, and the flush at the end does it all."""
    call = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if call is None:
        return lambda handle: None
    call.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return lambda handle: call(handle, 0, 0, _SYNC_FILE_RANGE_WRITE)


_sync_file_range = _find_sync_file_range()


class Files:
    """Open files, read and written at offsets by several threads; flushed to disk in the background.

    Use as a context manager: on a clean exit everything written is on the disk.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._read: dict[Path, int] = {}
        self._written: dict[Path, int] = {}
        self._unflushed = 0
        self._wake = threading.Event()
        self._closing = False
        self._flusher: threading.Thread | None = None

    def read_into(self, path: Path, offset: int, out: Bytes) -> None:
        """Raises OSError when the file is missing or ends too early."""
        handle = self._handle(path, self._read, os.O_RDONLY)
        view, done = out.data, 0
        while done < len(view):
            count = os.preadv(handle, [view[done:]], offset + done)
            if not count:
                raise OSError(None, f"ends at byte {offset + done}, expected {offset + len(view)} or more", str(path))
            done += count

    def write(self, path: Path, offset: int, data: Bytes | bytes) -> None:
        handle = self._handle(path, self._written, os.O_RDWR | os.O_CREAT)
        view = memoryview(data) if isinstance(data, bytes) else data.data
        done = 0
        while done < len(view):
            done += os.pwrite(handle, view[done:], offset + done)
        with self._lock:
            self._unflushed += len(view)
            if self._unflushed >= WRITE_BACK_EVERY_BYTES:
                self._unflushed = 0
                self._wake.set()
            if self._flusher is None:
                self._flusher = threading.Thread(target=self._write_back, daemon=True)
                self._flusher.start()

    def _handle(self, path: Path, opened: dict[Path, int], flags: int) -> int:
        with self._lock:
            if path not in opened:
                opened[path] = os.open(path, flags | os.O_CLOEXEC, 0o644)
            return opened[path]

    def _write_back(self) -> None:
        """Start writing dirty pages. Unlike fdatasync this waits neither for the disk nor for a journal."""
        while True:
            self._wake.wait()
            self._wake.clear()
            if self._closing:
                return
            for handle in list(self._written.values()):
                _sync_file_range(handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._closing = True
        self._wake.set()
        if self._flusher:
            self._flusher.join()
        try:
            if kind is None:
                for handle in self._written.values():
                    os.fsync(handle)
        finally:
            for handle in (*self._read.values(), *self._written.values()):
                with contextlib.suppress(OSError):
                    os.close(handle)


def move(
    pieces: Iterable[Piece],
    work: Callable[[Piece], Moved],
    *,
    workers: int | None,
    title: str,
    total_bytes: int,
) -> list[Moved]:
    """Do ``work`` on every piece, in ``workers`` threads, with a progress bar in MB read.

    workers: None: one per core, at most eight: more would only wait for the disk.

    The threads run side by side: reading, writing, checksums and checks release Python's lock.
    The first exception stops all workers and is raised; so does Ctrl-C.
    """
    workers = workers or min(8, usable_cores())
    queue, lock, stop = iter(pieces), threading.Lock(), threading.Event()
    moved: list[Moved] = []
    num_bytes = 0

    def worker() -> None:
        nonlocal num_bytes
        try:
            while not stop.is_set():
                with lock:
                    piece = next(queue, None)
                if piece is None:
                    return
                done = work(piece)
                with lock:
                    moved.append(done)
                    num_bytes += done.read_bytes
        except BaseException:
            stop.set()
            raise

    with ProgressBar(title, -(-total_bytes // _MB), "MB") as bar, ThreadPoolExecutor(workers) as threads:
        futures = [threads.submit(worker) for _ in range(workers)]
        try:
            while wait(futures, timeout=0.2).not_done:
                bar.update(num_bytes // _MB)
        finally:
            stop.set()
        for future in futures:
            future.result()
        bar.update(-(-num_bytes // _MB))
    return moved


def split_rows(start: int, count: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """(start, count) of blocks of whole rows, each about PIECE_BYTES at most (one row at least)."""
    step = max(1, PIECE_BYTES // row_bytes)
    for first in range(start, start + count, step):
        yield first, min(step, start + count - first)
