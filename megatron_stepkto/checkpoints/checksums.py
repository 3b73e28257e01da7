"""CRC-32 of a whole from the CRC-32s of its parts, which different workers compute in any order.

CRC-32 is the checksum of zip and gzip files (``crc32 FILE``, ``zlib.crc32``). It finds damage, not forgery.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

_POLYNOMIAL = 0xEDB88320


def _times(matrix: tuple[int, ...], vector: int) -> int:
    """A 32 x 32 matrix over GF(2), as the images of the unit vectors, times a vector."""
    total = 0
    for column in matrix:
        if not vector:
            break
        if vector & 1:
            total ^= column
        vector >>= 1
    return total


def _square(matrix: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(_times(matrix, column) for column in matrix)


@functools.cache
def _zeros(power: int) -> tuple[int, ...]:
    """What 2**power zero bytes do to a CRC-32 register."""
    if power == 0:
        matrix = (_POLYNOMIAL, *(1 << bit for bit in range(31)))  # one zero bit
        return _square(_square(_square(matrix)))
    return _square(_zeros(power - 1))


def crc32_combine(first: int, second: int, second_length: int) -> int:
    """CRC-32 of two byte strings, one behind the other, from the CRC-32 of each (zlib's crc32_combine)."""
    power = 0
    while second_length:
        if second_length & 1:
            first = _times(_zeros(power), first)
        second_length >>= 1
        power += 1
    return first ^ second


def crc32_of_parts(parts: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """CRC-32 and length of parts, given in order as (CRC-32, length)."""
    crc = length = 0
    for part, part_length in parts:
        crc = crc32_combine(crc, part, part_length)
        length += part_length
    return crc, length
