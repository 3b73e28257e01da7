"""Where a checkpoint keeps each slice: under standard names, or as other tools name, prefix or split the weights.

Megatron-Core's own ``sharded_state_dict`` writes, by its metadata, a key stacked over layers and experts, one key per
layer (``non_homogeneous_layers``), or one key per layer and expert with gate and up apart (``singleton_local_shards``).
Module specs name a few norms differently. Tools put ``module.`` or ``model.`` before every name. Optimizer state,
random state and the like are stored beside the weights and are ignored.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_stepkto.architectures.mapping import LAYERS, Entry
from megatron_stepkto.base.errors import UserError
from megatron_stepkto.checkpoints.slices import Slice

Index = tuple[int, ...]
Shapes = Mapping[str, tuple[int, ...]]

_PREFIXES = ("module.", "model.")
_NOT_WEIGHTS = re.compile(r"(chained_\d+\.)?optimizer\.|opt_param_scheduler|rng_state|rerun_state_machine_state")
TRACKER = "latest_checkpointed_iteration.txt"
_EXPERTS = "mlp.experts.experts."


@dataclass(frozen=True)
class Place:
    """``rows`` rows of a slice, from its row ``first``, are the slice ``index`` of the stored tensor ``key``."""

    key: str
    index: Index
    first: int
    rows: int


@dataclass
class Layout:
    """Every slice's places by (key, index), and the faults of the checkpoint's names and shapes."""

    places: dict[tuple[str, Index], list[Place]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    @property
    def stored(self) -> set[str]:
        """Names of all tensors that hold weights."""
        return {place.key for places in self.places.values() for place in places}

    def by_key(self) -> dict[str, set[str]]:
        """Standard key -> the stored tensors that make it up."""
        found: dict[str, set[str]] = defaultdict(set)
        for (key, _), places in self.places.items():
            found[key].update(place.key for place in places)
        return found


def find_weights(directory: Path) -> Path:
    """The folder with the weights: this one, or the newest iteration in a folder that Megatron-LM's trainer wrote.

    Raises:
        UserError: the tracker file names an iteration that is not there.
    """
    tracker = directory / TRACKER
    if (directory / ".metadata").is_file() or not tracker.is_file():
        return directory
    with tracker.open("rb") as file:
        newest = file.read(64).decode(errors="replace").strip()
    folder = directory / (f"iter_{int(newest):07d}" if newest.isdecimal() else newest)
    if newest != "release" and not newest.isdecimal():
        raise UserError(f"{tracker}: expected an iteration number or release, found {newest[:40]!r}")
    if not folder.is_dir():
        there = ", ".join(sorted(path.name for path in directory.glob("iter_*"))) or "none"
        raise UserError(f"{tracker}: names {folder.name}, which does not exist (existing: {there}); name one of them")
    return folder


def find_layout(slices: list[Slice], shapes: Shapes) -> Layout:
    """Find every slice among the stored tensors.

    Args:
        shapes: of every stored tensor by name.
    """
    layout = Layout()
    weights = {_bare(name): name for name in shapes if not _NOT_WEIGHTS.match(_bare(name))}
    missing: list[str] = []
    for slice_ in slices:
        places = next((found for found in _candidates(slice_) if all(place.key in weights for place in found)), None)
        if places is None:
            missing.append(slice_.key)
            continue
        stored = [replace(place, key=weights[place.key]) for place in places]
        layout.places[slice_.key, slice_.index] = stored
    if missing:
        layout.faults.append(f"missing: {', '.join(sorted(_summary(missing, slices)))}")
    if extra := set(weights.values()) - layout.stored:
        layout.faults.append(f"not mapped: {', '.join(sorted(extra))}")
    layout.faults += sorted(_shape_faults(slices, layout, shapes))
    return layout


def _bare(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _candidates(slice_: Slice) -> Iterator[list[Place]]:
    """The ways in which a slice may be stored, standard first; names without a prefix."""
    rows = slice_.entry.shape[0]
    for key in (slice_.key, *slice_.entry.aliases):
        yield [Place(key, slice_.index, 0, rows)]
        if not slice_.index:
            continue
        layer, *inner = slice_.index
        one_layer = key.replace(LAYERS, f"{LAYERS}{layer}.", 1)
        yield [Place(one_layer, tuple(inner), 0, rows)]
        single = one_layer.replace(_EXPERTS, f"{_EXPERTS}{inner[0]}.", 1) if inner else one_layer
        yield [Place(single, (), 0, rows)]
        if "linear_fc1.weight" in key:
            yield [Place(f"{single}_w", (), 0, rows // 2), Place(f"{single}_v", (), rows // 2, rows // 2)]


def _summary(missing: list[str], slices: list[Slice]) -> Iterator[str]:
    """A key, and the number of missing slices where only some are missing."""
    for key in set(missing):
        whole = sum(slice_.key == key for slice_ in slices)
        count = missing.count(key)
        yield key if count == whole else f"{key} ({count} of {whole} slices)"


def _shape_faults(slices: list[Slice], layout: Layout, shapes: Shapes) -> set[str]:
    faults = set()
    for slice_ in slices:
        for place in layout.places.get((slice_.key, slice_.index), []):
            found, asked = shapes[place.key], _asked(slice_.entry, place)
            rows_may_pad = slice_.entry.pads_rows and len(found) == len(asked) and found[0] >= asked[0]
            if found != (asked if not rows_may_pad else (found[0], *asked[1:])):
                faults.add(f"{place.key} has shape {found}, expected {asked}")
    return faults


def _asked(entry: Entry, place: Place) -> tuple[int, ...]:
    lead = entry.lead[len(entry.lead) - len(place.index) :] if place.index else ()
    return (*lead, place.rows, *entry.shape[1:])
