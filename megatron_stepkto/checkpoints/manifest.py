"""``conversion.json`` beside converted weights: sizes and CRC-32 of every file and every tensor.

It contains no times or absolute paths: the same input gives the same manifest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, PlainSerializer

from megatron_stepkto.base.files import read_json_if_there
from megatron_stepkto.checkpoints.checksums import checksum

NAME = "conversion.json"
_BLOCK = 4 * 2**20

CRC = Annotated[
    int,
    BeforeValidator(lambda value: int(value, 16) if isinstance(value, str) else value),
    PlainSerializer(lambda value: f"{value:08x}"),
]


class FileSum(BaseModel):
    bytes: int
    crc32: CRC


class Manifest(BaseModel):
    """Attributes:
    direction: hf_to_megatron or megatron_to_hf.
    cast: the training dtype that the numbers were rounded to, or None: bit for bit.
    files: by path within the folder.
    tensors: of every Hugging Face tensor (before a cast) the CRC-32 of its bytes.
    """

    format: Literal[1] = 1
    direction: str
    cast: str | None
    files: dict[str, FileSum]
    tensors: dict[str, CRC]


def read_manifest(directory: Path) -> Manifest | None:
    """Read the manifest; None where there is none.

    Raises:
        UserError: it is damaged.
    """
    content = read_json_if_there(directory / NAME, Manifest)
    return None if content is None else Manifest.model_validate(content)


def missing_or_resized(directory: Path, manifest: Manifest) -> list[str]:
    """Faults that are visible without reading the files."""
    faults = []
    for name, written in manifest.files.items():
        path = directory / name
        if not path.is_file():
            faults.append(f"{path}: missing")
        elif path.stat().st_size != written.bytes:
            faults.append(f"{path}: has {path.stat().st_size} bytes, {NAME} says {written.bytes}")
    return faults


def damaged_files(directory: Path, manifest: Manifest) -> list[str]:
    """Files that are missing or whose bytes differ from those written. Reads all of them."""
    faults = missing_or_resized(directory, manifest)
    blamed = {fault.partition(": ")[0] for fault in faults}
    for name, written in manifest.files.items():
        path = directory / name
        if str(path) not in blamed and (found := _crc32_of(path)) != written.crc32:
            faults.append(f"{path}: damaged: its CRC-32 is {found:08x}, {NAME} says {written.crc32:08x}")
    return faults


def _crc32_of(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            crc = checksum(block, crc)
    return crc
