"""Hugging Face folders: safetensors weights (one file or shards with an index), config, tokenizer files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_stepkto.errors import UserError
from megatron_stepkto.files import read_json, write_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")
# Files that travel with a model: config, generation config, tokenizer, chat template. No code.
COMPANION_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken")
MAX_SHARD_BYTES = 5 * 2**30


class HFCheckpoint:
    """A Hugging Face folder, opened lazily: a tensor is read when it is asked for.

    Raises:
        UserError: no config.json, no safetensors weights, an index naming a missing file, a damaged file.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        if not (directory / "config.json").is_file():
            raise UserError(f"{directory}: expected a Hugging Face model folder (with config.json), found none")
        self.config: dict[str, Any] = read_json(directory / "config.json")
        self._files = self._locate()
        self._open: dict[str, Any] = {}

    def _locate(self) -> dict[str, str]:
        if (self.directory / INDEX).is_file():
            weight_map: dict[str, str] = read_json(self.directory / INDEX).get("weight_map", {})
            missing = sorted({name for name in weight_map.values() if not (self.directory / name).is_file()})
            if missing:
                raise UserError(
                    f"{self.directory / INDEX}: names files that are missing: {', '.join(missing)}; download them again"
                )
            return weight_map
        if (self.directory / SINGLE).is_file():
            with self._handle(self.directory / SINGLE) as file:
                return dict.fromkeys(file.keys(), SINGLE)
        raise UserError(
            f"{self.directory}: expected {SINGLE} or {INDEX}, found neither; "
            "save the model with safetensors (pickled .bin weights are not read)"
        )

    @staticmethod
    def _handle(path: Path) -> Any:
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: damaged or truncated safetensors file ({error}); download it again") from None

    def names(self) -> set[str]:
        return set(self._files)

    def _read(self, name: str, how: str) -> Any:
        file = self._files[name]
        if file not in self._open:
            self._open[file] = self._handle(self.directory / file)
        try:
            return getattr(self._open[file], how)(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.directory / file}: cannot read {name} ({error})") from None

    def tensor(self, name: str) -> Tensor:
        tensor: Tensor = self._read(name, "get_tensor")
        return tensor

    def shape_and_dtype(self, name: str) -> tuple[tuple[int, ...], str]:
        """From the header alone; the dtype in safetensors' spelling (F32, BF16)."""
        part = self._read(name, "get_slice")
        return tuple(part.get_shape()), part.get_dtype()


def copy_companions(source: Path, target: Path) -> None:
    """Copy config, generation config, tokenizer and chat template files; never weights or code."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        wanted = path.name.endswith(COMPANION_SUFFIXES) and not path.name.endswith(WEIGHT_SUFFIXES)
        if path.is_file() and wanted and path.name not in ("manifest.json", "started.json"):
            shutil.copyfile(path, target / path.name)


def write_hf(directory: Path, companions: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write a model folder: companions of another folder and these weights, sharded past MAX_SHARD_BYTES."""
    copy_companions(companions, directory)
    names: dict[str, int] = {}
    pending: dict[str, Tensor] = {}
    files: list[Path] = []
    total = size = 0
    dtype: torch.dtype | None = None

    def flush() -> None:
        files.append(directory / f"shard-{len(files)}.tmp")
        save_file(pending, files[-1], metadata={"format": "pt"})
        pending.clear()

    for name, tensor in tensors:
        num_bytes = tensor.numel() * tensor.element_size()
        if pending and size + num_bytes > MAX_SHARD_BYTES:
            flush()
            size = 0
        pending[name] = tensor.contiguous()
        names[name] = len(files)
        dtype = dtype or tensor.dtype
        size += num_bytes
        total += num_bytes
    flush()
    if len(files) == 1:
        files[0].rename(directory / SINGLE)
    else:
        final = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
        for file, name in zip(files, final, strict=True):
            file.rename(directory / name)
        write_json(
            directory / INDEX,
            {"metadata": {"total_size": total}, "weight_map": {name: final[i] for name, i in sorted(names.items())}},
        )
    config = read_json(directory / "config.json")
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    config[key] = str(dtype).removeprefix("torch.")
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
