"""``conversion.json`` beside converted weights: sizes and CRC-32 of every file and every tensor.

It contains no times or absolute paths: the same input gives the same manifest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.files import read_json
from megatron_stepkto.checkpoints.checksums import checksum

NAME = "conversion.json"
_FORMAT = 1
_BLOCK = 4 * 2**20


@dataclass(frozen=True)
class Manifest:
    """Attributes:
    direction: hf_to_megatron or megatron_to_hf.
    cast: the training dtype that the numbers were rounded to, or None: bit for bit.
    tensors: of every Hugging Face tensor (before a cast) the CRC-32 of its bytes.
    files: (CRC-32, bytes) by path within the folder.
    """

    direction: str
    cast: str | None
    tensors: Mapping[str, int]
    files: Mapping[str, tuple[int, int]]

    def to_json(self) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "direction": self.direction,
            "cast": self.cast,
            "files": {
                name: {"bytes": length, "crc32": f"{crc:08x}"} for name, (crc, length) in sorted(self.files.items())
            },
            "tensors": {name: f"{crc:08x}" for name, crc in sorted(self.tensors.items())},
        }


def read_manifest(directory: Path) -> Manifest | None:
    """Read the manifest; None where there is none.

    Raises:
        UserError: it is damaged.
    """
    path = directory / NAME
    if not path.is_file():
        return None
    content = read_json(path)
    try:
        if content["format"] != _FORMAT:
            raise UserError(f"{path}: expected format {_FORMAT}, got {content['format']}; update this program")
        return Manifest(
            content["direction"],
            content["cast"],
            {name: int(crc, 16) for name, crc in content["tensors"].items()},
            {name: (int(entry["crc32"], 16), int(entry["bytes"])) for name, entry in content["files"].items()},
        )
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise UserError(f"{path}: damaged: not a manifest of a conversion; convert again") from None


def missing_or_resized(directory: Path, manifest: Manifest) -> list[str]:
    """Faults that are visible without reading the files."""
    faults = []
    for name, (_, length) in manifest.files.items():
        path = directory / name
        if not path.is_file():
            faults.append(f"{path}: missing")
        elif path.stat().st_size != length:
            faults.append(f"{path}: has {path.stat().st_size} bytes, {NAME} says {length}")
    return faults


def damaged_files(directory: Path, manifest: Manifest) -> list[str]:
    """Files that are missing or whose bytes differ from those written. Reads all of them."""
    faults = missing_or_resized(directory, manifest)
    blamed = {fault.partition(": ")[0] for fault in faults}
    for name, (crc, _) in manifest.files.items():
        path = directory / name
        if str(path) not in blamed and (found := _crc32_of(path)) != crc:
            faults.append(f"{path}: damaged: its CRC-32 is {found:08x}, {NAME} says {crc:08x}")
    return faults


def _crc32_of(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            crc = checksum(block, crc)
    return crc
