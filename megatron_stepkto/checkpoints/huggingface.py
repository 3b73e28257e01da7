"""Hugging Face folders: safetensors weights (one file or shards with an index), config, tokenizer files."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.base.files import parse_json, read_json_object
from megatron_stepkto.base.model_folder import check_small_files, read_config, read_small_file
from megatron_stepkto.checkpoints.checksums import checksum, crc32_of_parts
from megatron_stepkto.checkpoints.stream import Bytes, Files

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")
# Files that are copied with a model: config, generation config, tokenizer, chat template. No code.
COMPANION_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken")
CHAT_TEMPLATES = "additional_chat_templates"  # transformers' folder for a model with several templates
# Files that this package writes beside a model.
OURS = ("manifest.json", "started.json", "conversion.json")
MAX_SHARD_BYTES = 5 * 2**30

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class StoredWeight:
    """Where a tensor's bytes begin in a safetensors file; ``dtype`` in safetensors' spelling (F32, BF16)."""

    path: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return torch.Size(self.shape[1:]).numel() * DTYPES[self.dtype].itemsize

    @property
    def num_bytes(self) -> int:
        return self.shape[0] * self.row_bytes


def read_header(path: Path) -> dict[str, StoredWeight]:
    """The tensors of one safetensors file.

    Raises:
        UserError: not a safetensors file, a truncated one, or one with an inconsistent header.
    """
    try:
        with safe_open(path, framework="np"):  # refuses shapes, overlaps and gaps that do not fit the file
            pass
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = parse_json(file.read(length))
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path}: damaged or truncated safetensors file ({error}); download it again") from None
    return {
        name: StoredWeight(path, 8 + length + entry["data_offsets"][0], entry["dtype"], tuple(entry["shape"]))
        for name, entry in header.items()
        if name != "__metadata__"
    }


class HFCheckpoint:
    """A Hugging Face folder: reads and checks the headers of all files, no tensors.

    Raises:
        UserError: no config.json, no safetensors weights, an index naming a missing file or a tensor that is not in
            the file it names, damaged files; names all of them.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        if (directory / ADAPTER).is_file():  # often without a config.json
            raise UserError(
                f"{directory}: holds an adapter ({ADAPTER}), which would be left out; merge it into the "
                f"model (peft's merge_and_unload), or remove {ADAPTER} to take the model without it; to train it "
                "further, keep it in a folder of its own and name that as train.lora.start"
            )
        if not (directory / "config.json").is_file():
            raise UserError(f"{directory}: expected a Hugging Face model folder (with config.json), found none")
        self.weights = self._locate()

    def _locate(self) -> dict[str, StoredWeight]:
        index = self.directory / INDEX
        if not index.is_file():
            if (self.directory / SINGLE).is_file():
                return read_header(self.directory / SINGLE)
            raise UserError(
                f"{self.directory}: expected {SINGLE} or {INDEX}, found neither; "
                "save the model with safetensors (pickled .bin weights are not read)"
            )
        weight_map = read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise UserError(f"{index}: expected an object weight_map from tensor names to file names, found none")
        faults, headers = [], {}
        names = set(weight_map.values())
        if (self.directory / SINGLE).is_file() and SINGLE not in names:
            raise UserError(
                f"{self.directory}: holds {SINGLE} and {INDEX}, which names other files: two models, and libraries "
                "differ in which one they load; remove the one you do not want"
            )
        if outside := sorted(name for name in names if Path(name).name != name):
            raise UserError(f"{index}: names files outside of the folder: {', '.join(outside)}; refused")
        if missing := sorted(name for name in names if not (self.directory / name).is_file()):
            faults.append(f"{index}: names files that are missing: {', '.join(missing)}; download them again")
        for name in sorted(names - set(missing)):
            try:
                headers[name] = read_header(self.directory / name)
            except UserError as error:
                faults.append(str(error))
        for name, header in headers.items():
            listed = {tensor for tensor, file in weight_map.items() if file == name}
            if absent := sorted(listed - header.keys()):
                faults.append(
                    f"{self.directory / name}: cannot find {', '.join(absent)}, which {INDEX} says is there; "
                    "download both again"
                )
            elsewhere = {tensor for tensor in header if weight_map.get(tensor, name) != name}
            for tensor in sorted(tensor for tensor in elsewhere if tensor in headers.get(weight_map[tensor], ())):
                faults.append(f"{tensor} is also in {name}, {INDEX} names {weight_map[tensor]}; remove one of them")
            if unlisted := sorted(header.keys() - weight_map.keys()):
                faults.append(f"{self.directory / name}: {INDEX} does not list its {', '.join(unlisted)}")
        if faults:
            raise UserError("; ".join(faults))
        return {tensor: headers[file][tensor] for tensor, file in weight_map.items()}

    def read_rows(self, files: Files, name: str, row: int, out: Bytes) -> None:
        """Fill ``out`` with rows from ``row``."""
        weight = self.weights[name]
        files.read_into(weight.path, weight.offset + row * weight.row_bytes, out)


def is_companion(name: str) -> bool:
    """By name: config, tokenizer and chat template files; also JSON that indexes weights or that we write."""
    return name.endswith(COMPANION_SUFFIXES) or name.startswith("tokenizer.model")  # Mistral: tokenizer.model.v3


def companions_of(directory: Path) -> list[Path]:
    """Config, generation config, tokenizer and chat template files; never weights or code."""
    return [
        path
        for path in sorted([*directory.iterdir(), *(directory / CHAT_TEMPLATES).glob("*.jinja")])
        if path.is_file()
        and is_companion(path.name)
        and not path.name.endswith(WEIGHT_SUFFIXES)
        and path.name not in OURS
    ]


def read_companions(directory: Path) -> dict[str, bytes]:
    """Contents of the companions by path; config.json without ``auto_map``, which names code that is not copied."""
    check_small_files(directory)
    contents = {path.relative_to(directory).as_posix(): read_small_file(path) for path in companions_of(directory)}
    config = read_config(directory)
    if "auto_map" in config:
        contents["config.json"] = _as_json({key: value for key, value in config.items() if key != "auto_map"})
    return contents


def copy_companions(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name, content in read_companions(source).items():
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_bytes(content)


def _as_json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


class HFWriter:
    """Places every tensor before the first byte is written, so that any worker may write any part.

    Args:
        tensors: (name, dtype, shape) in the order of the file; sharded past MAX_SHARD_BYTES.
    """

    def __init__(self, directory: Path, tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> None:
        self.directory = directory
        groups: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
        size = 0
        for name, dtype, shape in tensors:
            num_bytes = torch.Size(shape).numel() * dtype.itemsize
            if groups[-1] and size + num_bytes > MAX_SHARD_BYTES:
                groups.append({})
                size = 0
            groups[-1][name] = (dtype, shape)
            size += num_bytes
        self.dtype = next(iter(groups[0].values()))[0]
        self._headers: dict[str, bytes] = {}
        self.weights: dict[str, StoredWeight] = {}
        for i, group in enumerate(groups):
            file = SINGLE if len(groups) == 1 else f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
            self._place(file, group)

    def _place(self, file: str, group: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name, (dtype, shape) in group.items():
            end = position + torch.Size(shape).numel() * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
            position = end
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._headers[file] = struct.pack("<Q", len(encoded)) + encoded
        for name, (dtype, shape) in group.items():
            start = len(self._headers[file]) + header[name]["data_offsets"][0]
            self.weights[name] = StoredWeight(self.directory / file, start, _NAMES[dtype], shape)

    def write(self, files: Files, name: str, row: int, data: Bytes) -> None:
        """Rows from ``row`` of a tensor."""
        weight = self.weights[name]
        files.write(weight.path, weight.offset + row * weight.row_bytes, data)

    def finish(
        self, files: Files, sums: Mapping[str, tuple[int, int]], companions: Mapping[str, bytes]
    ) -> dict[str, tuple[int, int]]:
        """Write headers, the index and the companions.

        Args:
            sums: CRC-32 and length of every tensor by name.

        Returns:
            CRC-32 and length of every file by name.
        """
        contents = dict(companions)
        config = json.loads(contents["config.json"])
        for key in [key for key in ("torch_dtype", "dtype") if key in config] or ["dtype"]:
            config[key] = str(self.dtype).removeprefix("torch.")
        contents["config.json"] = _as_json(config)
        if len(self._headers) > 1:
            total = sum(weight.num_bytes for weight in self.weights.values())
            located = {name: weight.path.name for name, weight in sorted(self.weights.items())}
            contents[INDEX] = _as_json({"metadata": {"total_size": total}, "weight_map": located})
        found = {name: (checksum(content), len(content)) for name, content in contents.items()}
        for name, content in contents.items():
            (self.directory / name).parent.mkdir(exist_ok=True)
            files.write(self.directory / name, 0, content)
        parts = {name: [(checksum(header), len(header))] for name, header in self._headers.items()}
        for name, header in self._headers.items():
            files.write(self.directory / name, 0, header)
        for name, weight in self.weights.items():  # in file order
            assert sums[name][1] == weight.num_bytes, f"{name}: {sums[name][1]} bytes were written"
            parts[weight.path.name].append(sums[name])
        return found | {name: crc32_of_parts(part) for name, part in parts.items()}
