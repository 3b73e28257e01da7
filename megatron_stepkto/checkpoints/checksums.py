"""CRC-32, the checksum of zip and gzip files (``crc32 FILE``): of bytes, and of a whole from parts that different
workers compute in any order. It detects damage, not tampering.

From ISA-L: nine times as fast as zlib's here (64 against 7 GB/s of one core), and a conversion reads every byte once.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray


def checksum(data: NDArray[np.uint8] | bytes | memoryview, start: int = 0) -> int:
    """CRC-32 of ``data`` appended to bytes whose CRC-32 is ``start``."""
    return isal_zlib.crc32(data.data if isinstance(data, np.ndarray) else data, start)


def crc32_of_parts(parts: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """CRC-32 and length of parts, given in order as (CRC-32, length)."""
    crc = length = 0
    for part, part_length in parts:
        crc = isal_zlib.crc32_combine(crc, part, part_length)
        length += part_length
    return crc, length
