"""Doors through which a checkpoint folder could run code: a payload behind each of them."""

from __future__ import annotations

import ast
import collections
import dataclasses
import enum
import io
import os
import pickle
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from megatron_stepkto.checkpoints.convert import read_model_config
from megatron_stepkto.checkpoints.metadata import read_metadata
from megatron_stepkto.checkpoints.unpickling import plain_layer_state, read_plain
from megatron_stepkto.megatron.acceleration import Acceleration
from megatron_stepkto.megatron.engine import Engine
from megatron_stepkto.megatron.patches import plain_objects_only
from megatron_stepkto.megatron.ranks import one_rank
from tests.unit.checkpoint_folders import copy, load_in_megatron, refusal, training_settings

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="cpu.install() lasts as long as the process: not beside GPU tests"
)
WITH_STATES = Acceleration(transformer_engine=True)


class Payload:
    """Unpickles to a call that leaves a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def as_bytes(value: object) -> torch.Tensor:
    """As Transformer Engine keeps a layer's state."""
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def plant(folder: Path, data: bytes, part: str) -> None:
    """Let every entry whose name holds ``part`` be ``data``."""
    metadata = read_metadata(folder)
    (folder / "__9_0.distcp").write_bytes(data)
    for index, info in metadata.storage_data.items():
        if part in index.fqn:
            for field, value in (("relative_path", "__9_0.distcp"), ("offset", 0), ("length", len(data))):
                object.__setattr__(info, field, value)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


# --- what Megatron-Core loads ---------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["archive", "bytes in it", "older archive in it"])
def test_a_layers_state(models: dict[str, Path], tmp_path: Path, form: str) -> None:
    marker = tmp_path / "ran"
    folder = copy(models["megatron"], tmp_path / "megatron")
    forms = {
        "archive": [Payload(marker)],
        "bytes in it": [as_bytes({"recipe": Payload(marker)})],
        "older archive in it": [io.BytesIO(saved({"scale_fwd": Payload(marker)}))],
    }
    plant(folder, saved(forms[form]), "_extra_state")
    load_in_megatron(folder)  # local layers have no states: what is there is not read
    if form == "older archive in it":  # local layers ignore a state; see below for what Transformer Engine does with it
        load_in_megatron(folder, WITH_STATES)
    else:
        said = refusal(lambda: load_in_megatron(folder, WITH_STATES))
        assert said.startswith(f"{folder}")
        assert "it asks for posix.system" in said
    assert not marker.exists()


def test_a_tensor(models: dict[str, Path], tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    folder = copy(models["megatron"], tmp_path / "megatron")
    plant(folder, saved(Payload(marker)), "final_layernorm")
    assert "it asks for posix.system" in refusal(lambda: load_in_megatron(folder))
    assert not marker.exists()


def test_common_state(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    marker = tmp_path / "ran"
    folder = copy(models["megatron"], tmp_path / "megatron")
    (folder / "common.pt").write_bytes(saved({"iteration": Payload(marker)}))
    said = refusal(lambda: load_in_megatron(folder))
    asks = "refused: it asks for posix.system, which no checkpoint needs; do not load this folder"
    assert said == f"{folder / 'common.pt'}: {asks}"
    assert not marker.exists()


def test_metadata_that_changes_after_it_was_looked_at(models: dict[str, Path], tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    folder = copy(models["megatron"], tmp_path / "megatron")
    (folder / ".metadata").write_bytes(pickle.dumps(Payload(marker)))
    with plain_objects_only():
        assert "it asks for posix.system" in refusal(FileSystemReader(folder).read_metadata)
    assert not marker.exists()


def test_resuming(models: dict[str, Path], tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    config, _ = read_model_config(models["tied"])
    folder, device = tmp_path / "state", torch.device("cpu")
    with one_rank(device):
        engine = Engine(config, training_settings(), device)
        engine.checkpoints.load_weights(models["megatron"])
        engine.checkpoints._allocate_optimizer_state()  # as after an update
        engine.checkpoints.save_state(folder)
        engine.checkpoints.load_state(folder)
        plant(folder, saved([Payload(marker)]), "_extra_state")
        engine.checkpoints.load_state(folder)
        plant(folder, saved(Payload(marker)), "optimizer")
        assert "it asks for posix.system" in refusal(lambda: engine.checkpoints.load_state(folder))
    assert not marker.exists()


def test_the_payloads_work_on_an_open_door(tmp_path: Path) -> None:
    """Else the tests above show nothing. Behind the door the environment is what it was."""
    marker = tmp_path / "ran"
    data = saved(Payload(marker))
    with plain_objects_only(), pytest.raises(pickle.UnpicklingError):
        torch.load(io.BytesIO(data), weights_only=False)
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    assert FileSystemReader.read_metadata.__module__ == "torch.distributed.checkpoint.filesystem"
    torch.load(io.BytesIO(data), weights_only=False)
    assert marker.exists()


def test_every_loader_of_pickles_is_one_of_these(repository: Path) -> None:
    """A new one must come here, and be held to a list."""
    doors = {"loads", "Unpickler", "_Unpickler", "load", "load_state_dict_from_url", "load_tensors_metadata"}
    owners = {"pickle", "torch", "dist_checkpointing", "dcp", "checkpoint", "joblib", "cloudpickle"}
    found = collections.Counter(
        (path.relative_to(repository / "megatron_stepkto").as_posix(), f"{node.value.id}.{node.attr}")
        for path in sorted((repository / "megatron_stepkto").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if node.value.id in owners and node.attr in doors
    )
    assert {(Path(file).name, call) for file, call in found} == {
        ("unpickling.py", "pickle._Unpickler"),
        ("unpickling.py", "torch.load"),
        ("state.py", "dist_checkpointing.load"),
        ("patches.py", "torch.load"),  # looks at its code, to see that it takes the restriction
    }


# --- what a folder may hold instead ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("common.pt", b"", "damaged"),
        ("common.pt", b"not an archive", "damaged"),
        ("common.pt", saved([1, 2]), "damaged: expected a dict"),
        ("metadata.json", b"", "expected JSON"),
        ("metadata.json", b"[]", "expected a JSON object, got a list"),
        (
            "metadata.json",
            b"{}",
            "expected sharded_backend = 'torch_dist' and common_backend = 'torch', got None and 'torch'; ",
        ),
        ("metadata.json", b'{"sharded_backend": "zarr", "common_backend": "torch"}', "got 'zarr' and 'torch'"),
    ],
)
def test_small_files_that_are_damaged(
    models: dict[str, Path], tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    folder = copy(models["megatron"], tmp_path / "megatron")
    (folder / name).write_bytes(content)
    found = refusal(lambda: load_in_megatron(folder))
    assert found.startswith(f"{folder / name}:")
    assert said in found


def test_megatron_0_19_names_one_backend(models: dict[str, Path], tmp_path: Path) -> None:
    folder = copy(models["megatron"], tmp_path / "megatron")
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    load_in_megatron(folder)


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5])
def test_a_data_file_that_ends_early(models: dict[str, Path], tmp_path: Path, kept: float) -> None:
    folder = copy(models["megatron"], tmp_path / "megatron")
    file = folder / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[: int(kept * file.stat().st_size)])
    assert refusal(lambda: load_in_megatron(folder)).startswith(f"{folder}: damaged, or not of this model (")


def test_an_archive_that_would_fill_the_memory(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "common.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 24))
    assert (tmp_path / "common.pt").stat().st_size < 1 << 16
    assert "its records are larger than the file" in refusal(lambda: read_plain(tmp_path / "common.pt"))


# --- Transformer Engine's states -------------------------------------------------------------------------------


class _FormatHelper(NamedTuple):
    max_fwd: float
    max_bwd: float


class Format(enum.Enum):
    HYBRID = _FormatHelper(max_fwd=448, max_bwd=57344)


@dataclasses.dataclass
class DelayedScaling:
    """The fields of Transformer Engine's."""

    margin: int = 0
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = 1024
    amax_compute_algo: str = "max"


@pytest.fixture
def transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its recipes under the names that its pickles hold; the package itself needs a GPU."""
    for name in ("transformer_engine", "transformer_engine.common", "transformer_engine.common.recipe"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for class_ in (_FormatHelper, Format, DelayedScaling):
        monkeypatch.setattr(class_, "__module__", "transformer_engine.common.recipe")
        monkeypatch.setattr(sys.modules["transformer_engine.common.recipe"], class_.__name__, class_, raising=False)


def test_a_state_of_delayed_scaling_is_kept(transformer_engine: None) -> None:
    state = {
        "recipe": DelayedScaling(amax_history_len=16),
        "scale_fwd": torch.arange(3, dtype=torch.float32),
        "amax_history_fwd": torch.rand(16, 3),
        "extra_fp8_variables": {"fp8_checkpoint": True, "fp8_max_fwd": 448, "others": [1.5, (2, "a")]},
    }
    found = pickle.loads(plain_layer_state(as_bytes(state), "here").numpy().tobytes())
    assert found["recipe"] == state["recipe"]
    assert found["recipe"].fp8_format is Format.HYBRID
    assert torch.equal(found["scale_fwd"], torch.tensor([0.0, 1.0, 2.0]))
    assert torch.equal(found["amax_history_fwd"], state["amax_history_fwd"])  # type: ignore[arg-type]
    assert found["extra_fp8_variables"] == state["extra_fp8_variables"]
    empty = torch.empty(0, dtype=torch.uint8)
    assert plain_layer_state(empty, "here") is empty
    assert plain_layer_state(None, "here") is None


def test_a_tensor_inside_of_a_state_is_no_door(tmp_path: Path, transformer_engine: None) -> None:
    """torch pickles a tensor as bytes that its own function loads without a limit."""

    class Inner:
        def __reduce__(self) -> tuple[Any, tuple[bytes]]:
            return torch.storage._load_from_bytes, (saved(Payload(tmp_path / "ran")),)

    said = refusal(lambda: plain_layer_state(as_bytes({"scale_fwd": Inner()}), "folder: entry"))
    assert said.startswith("folder: entry: refused: it asks for posix.system, which no checkpoint needs")
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Inner()))
    assert (tmp_path / "ran").exists()


def test_a_recipe_that_names_a_function_is_refused(transformer_engine: None) -> None:
    state = {"recipe": DelayedScaling(amax_compute_algo=os.getcwd)}  # type: ignore[arg-type]
    assert "it asks for posix.getcwd" in refusal(lambda: plain_layer_state(as_bytes(state), "here"))


def test_a_damaged_state(models: dict[str, Path]) -> None:
    said = refusal(lambda: plain_layer_state(torch.tensor([128, 4, 0], dtype=torch.uint8), "folder: entry"))
    assert said.startswith("folder: entry: damaged")
    for state in ([1], "text", torch.ones(3)):
        assert "expected a layer's state as bytes" in refusal(lambda state=state: plain_layer_state(state, "here"))  # type: ignore[misc]


def test_metadata_is_unpickled_once_for_all_readers(models: dict[str, Path]) -> None:
    with plain_objects_only():
        first, second = (FileSystemReader(models["megatron"]).read_metadata() for _ in range(2))
    assert isinstance(first, Metadata)
    assert first is second
