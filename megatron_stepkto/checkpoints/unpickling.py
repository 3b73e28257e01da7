"""The only place where pickles of a checkpoint folder are loaded, restricted to listed classes.

A pickle names functions that its reader calls, so a folder with a pickle can run any code. A ``torch_dist``
checkpoint consists of pickles: ``.metadata`` is one, ``common.pt`` and every entry of a ``.distcp`` file hold one, and
Transformer Engine keeps another, as bytes, inside the entries ``_extra_state``.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megatron_stepkto.base.errors import UserError

Allowed = Mapping[tuple[str, str], Any]


class Refused(pickle.UnpicklingError):
    """Not damage: a pickle asks for a class or function that no checkpoint needs."""


class RestrictedUnpickler(pickle._Unpickler):
    """Builds only what ``allowed`` names: with the value given there, or by importing it where that is None.

    The Python version, whose memo is a dict: one damaged byte makes the C version, whose memo is an array, ask for
    64 GB.
    """

    def __init__(self, file: BinaryIO, allowed: Allowed) -> None:
        super().__init__(file)
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._allowed:
            raise Refused(f"it asks for {module}.{name}")
        return self._allowed[module, name] or super().find_class(module, name)


# --- torch's loader ------------------------------------------------------------------------------------------


def load_plain(data: bytes) -> Any:
    """What ``torch.save`` wrote, if it is tensors and plain containers."""
    return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")


def read_plain(path: Path) -> Any:
    """As ``load_plain``, from a small file such as ``common.pt``.

    Raises:
        UserError: it is missing or damaged, would exhaust the memory, or would run code.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records) or (
            sum(record.file_size for record in records) > path.stat().st_size
        ):
            raise UserError(f"{path}: damaged: its records are larger than the file; write the checkpoint again")
        return torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        raise UserError(f"{path}: expected a file that torch.save wrote, found none") from None
    except UserError:
        raise
    # RuntimeError: from torch's archive reader; the others: from a damaged pickle
    except (pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, LookupError, TypeError, ValueError,
            AttributeError) as error:  # fmt: skip
        raise UserError(f"{path}: {blame(error)}") from None


_ASKED = re.compile(r"(?:it asks for|(?i:unsupported global): GLOBAL|unsupported GLOBAL) (\S+)")


def blame(error: BaseException) -> str:
    """What a loader found wrong with a file, and what to do; without torch's advice on how to load it anyway."""
    text = str(error)
    if isinstance(error, pickle.UnpicklingError) and (asked := _ASKED.search(text)):
        return f"refused: it asks for {asked[1]}, which no checkpoint needs; do not load this folder"
    first = text.partition("\n")[0]
    return f"damaged, or not of this model ({type(error).__name__}: {first:.200}); write the checkpoint again"


# --- Transformer Engine's state of a layer ---------------------------------------------------------------------

_TE = "transformer_engine.common.recipe"
# What get_extra_state of Transformer Engine 1 and 2 (transformer_engine/pytorch/module/base.py) puts into a pickle: a
# dict of tensors, numbers and text, and since 2.0 the recipe of those that a run of ours can have (acceleration.py).
_LAYER_STATE: Allowed = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): None,
    ("torch.storage", "_load_from_bytes"): load_plain,  # torch's own loads a tensor's bytes without any limit
    **dict.fromkeys(
        (_TE, name)
        for name in (
            *("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling"),
            *("Format", "_FormatHelper", "MMParams", "QParams", "_OverrideLinearPrecision"),
        )
    ),
    ("megatron.core.extensions.transformer_engine", "TEDelayedScaling"): None,
}


def plain_layer_state(state: Any, where: str) -> Any:
    """Rebuild a layer's ``_extra_state``: Transformer Engine unpickles it without restrictions, so it must contain only
    the classes that Transformer Engine itself writes.

    Args:
        state: [n] uint8, a pickle; or an archive, as Transformer Engine 1 keeps it; or None.
        where: the checkpoint and the entry, for messages.

    Raises:
        UserError: it would run code, or is damaged.
    """
    if state is None or isinstance(state, io.BytesIO):  # an archive, which Transformer Engine passes to torch.load
        return state
    if not isinstance(state, torch.Tensor) or state.dtype != torch.uint8:
        raise UserError(f"{where}: damaged: expected a layer's state as bytes, got {type(state).__name__}")
    if state.numel() == 0:  # of a layer without state
        return state
    try:
        found = RestrictedUnpickler(io.BytesIO(state.numpy().tobytes()), _LAYER_STATE).load()
    except Exception as error:  # a damaged pickle can fail in any way
        raise UserError(f"{where}: {blame(error)}") from None
    return torch.frombuffer(bytearray(pickle.dumps(found)), dtype=torch.uint8)
