"""Which Megatron-Core is installed, and what differs between the supported versions. Imports nothing of Megatron."""

from __future__ import annotations

import importlib.metadata

from megatron_stepkto.base.errors import UserError

# Tested versions of Megatron-Core, and the Python that each was tested on (0.17 and later need 3.12).
SUPPORTED_MEGATRON = {"0.16": "3.11", "0.19": "3.12"}


def check_megatron_version() -> str:
    """The installed version. Raises UserError unless it is one that this package is tested with."""
    supported = " or ".join(f"{version}.x (Python {python})" for version, python in SUPPORTED_MEGATRON.items())
    try:
        version = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"megatron-core is not installed, expected {supported}; run `make setup`") from None
    if not version.startswith(tuple(f"{v}." for v in SUPPORTED_MEGATRON)):
        raise UserError(f"expected megatron-core {supported}, found {version}; run `make setup`")
    return version


def needs_common_pt() -> bool:
    """0.16 reads a checkpoint's common state from common.pt; from 0.17 on it is an object inside the checkpoint."""
    return check_megatron_version().startswith("0.16.")


def async_writer() -> dict[str, str]:
    """Further arguments of an asynchronous save: from 0.17 on Megatron asks for nvidia-resiliency-ext unless its own
    writer is named; 0.16 does not know the argument.
    """
    return {} if check_megatron_version().startswith("0.16.") else {"async_strategy": "mcore"}
