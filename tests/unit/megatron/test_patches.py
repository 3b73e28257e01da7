"""The one module that makes Megatron-Core run without CUDA: what it changes, and what it leaves alone."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_stepkto.base.errors import UserError
from megatron_stepkto.megatron import patches
from megatron_stepkto.megatron.version import SUPPORTED_MEGATRON, check_megatron_version
from tests.builders import write_llama

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="for machines without a GPU: what install() does lasts as long as the process"
)


@pytest.fixture(autouse=True)
def installed() -> None:
    patches.install()


def as_if_in(module: str, expression: str, **names: Any) -> Any:
    """Evaluate an expression whose caller is (as far as frames tell) ``module``."""
    return eval(expression, {"__name__": module, **names})


def test_norms_are_computed_again_without_transformer_engine() -> None:
    """Megatron takes fp8=False, its default, for FP8."""
    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    if hasattr(random, "FP8GlobalStateManager"):
        pytest.skip("Transformer Engine is installed")
    assert random.CheckpointWithoutOutput().fp8 is False


def test_norm_of_many_gradients() -> None:
    """16M elements, most of them small: torch.norm on a CPU is 6e-4 off."""
    clip: Any = importlib.import_module("megatron.core.optimizer.clip_grads")
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(32_768, 1, generator=generator).pow(8)
    grads = [torch.randn(32_768, 512, generator=generator) * scale, torch.tensor([3.0, 4.0])]
    norm, _ = clip.multi_tensor_applier(clip.l2_norm_impl, torch.zeros(1, dtype=torch.int), [grads], False)
    expected = sum(float(grad.double().square().sum()) for grad in grads) ** 0.5
    assert norm.shape == (1,)
    assert float(norm) == pytest.approx(expected, rel=1e-5)


# --- version -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["0.15.3", "0.17.0", "0.18.2", "0.160.1", "0.20.0", "1.16.0"])
def test_another_megatron_version_is_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(UserError) as caught:
        check_megatron_version()
    assert str(caught.value) == (
        f"expected megatron-core 0.16.x (Python 3.11) or 0.19.x (Python 3.12), found {version}; run `make setup`"
    )


@pytest.mark.parametrize("version", ["0.16.0", "0.16.1", "0.19.2"])
def test_supported_versions(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    assert check_megatron_version() == version


def test_the_lock_files_hold_supported_versions(repository: Path) -> None:
    for lock in ("cpu.lock", "py312.lock"):
        [pinned] = re.findall(r"^megatron-core==(\d+\.\d+)", (repository / "requirements" / lock).read_text(), re.M)
        assert pinned in SUPPORTED_MEGATRON


def test_a_megatron_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(UserError, match=r"megatron-core is not installed, expected 0\.16\.x .*; run `make setup`"):
        check_megatron_version()


def test_install_checks_the_version_before_it_touches_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.Tensor.type
    monkeypatch.setattr(patches, "_installed", False)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.15.0")
    with pytest.raises(UserError, match=r"found 0\.15\.0"):
        patches.install()
    assert torch.Tensor.type is before
    assert patches._installed is False


def test_the_installed_version_is_supported() -> None:
    assert check_megatron_version() == importlib.metadata.version("megatron-core")


def test_a_name_that_is_gone_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Moved:
        pass

    with pytest.raises(RuntimeError, match="has no _get_cuda_rng_state to replace"):
        patches._replace(Moved(), "_get_cuda_rng_state", None)
    monkeypatch.setattr(patches, "_installed", False)
    monkeypatch.setattr(patches, "PATCHED_MODULES", ("package_info",))  # a module that imports no torch
    with pytest.raises(RuntimeError, match=r"megatron\.core\.package_info has no global torch to replace"):
        patches.install()


# --- idempotent ----------------------------------------------------------------------------------------------


def test_install_again_changes_nothing() -> None:
    def state() -> list[Any]:
        return [
            torch.Tensor.type,
            torch.Tensor.cuda,
            *(importlib.import_module(f"megatron.core.{name}").torch for name in patches.PATCHED_MODULES),
        ]

    before = state()
    patches.install()
    assert all(a is b for a, b in zip(before, state(), strict=True))


@pytest.mark.parametrize("name", patches.PATCHED_MODULES)
def test_every_named_module_has_the_stand_in(name: str) -> None:
    module = importlib.import_module(f"megatron.core.{name}")
    assert module.torch is not torch
    assert module.torch.nn is torch.nn


# --- what the stand-in answers -------------------------------------------------------------------------------


def test_factories_put_cuda_tensors_on_the_cpu() -> None:
    stand_in: Any = importlib.import_module("megatron.core.utils").torch
    given = torch.ones(2)
    for made, expected in (
        (stand_in.zeros(2, device="cuda"), [0.0, 0.0]),
        (stand_in.tensor([1, 2], device=torch.device("cuda")), [1, 2]),
        (stand_in.full((2,), 3, device="cuda:0"), [3, 3]),
        (stand_in.arange(2, device=stand_in.cuda.current_device()), [0, 1]),
        (stand_in.zeros_like(given, device="cuda"), [0.0, 0.0]),
        (stand_in.ones(2), [1.0, 1.0]),
    ):
        assert made.device.type == "cpu"
        assert made.tolist() == expected
    assert stand_in.empty(2, device="meta").device.type == "meta"
    assert stand_in.zeros(2, dtype=torch.int32, device="cuda").dtype == torch.int32


def test_cuda_questions_are_answered_for_the_cpu() -> None:
    stand_in: Any = importlib.import_module("megatron.core.tensor_parallel.random").torch
    assert stand_in.cuda.current_device() == torch.device("cpu")
    assert stand_in.cuda.synchronize() is None
    assert stand_in.cuda.empty_cache() is None
    assert stand_in.cuda.is_available is torch.cuda.is_available


def test_the_random_state_that_megatron_saves_is_the_cpus() -> None:
    """Recompute must draw in backward what it drew in forward."""
    module: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    kept = torch.get_rng_state()
    try:
        torch.manual_seed(5)
        state = module._get_cuda_rng_state()
        first = torch.rand(3)
        assert not torch.equal(torch.rand(3), first)
        module._set_cuda_rng_state(state)
        assert torch.equal(torch.rand(3), first)
    finally:
        torch.set_rng_state(kept)


# --- torch itself --------------------------------------------------------------------------------------------


def test_tensor_methods_change_for_megatron_alone() -> None:
    tensor = torch.ones(1)
    assert tensor.type() == "torch.FloatTensor"
    for outside in ("__main__", "megatron_stepkto.losses", "transformers.models.llama", "megatron"):
        assert as_if_in(outside, "t.type()", t=tensor) == "torch.FloatTensor"
    assert as_if_in("megatron.core.optimizer.optimizer", "t.type()", t=tensor) == "torch.cuda.FloatTensor"
    assert as_if_in("megatron.core.optimizer.optimizer", "t.bfloat16().type()", t=tensor) == "torch.cuda.BFloat16Tensor"
    # with an argument it converts, as ever
    assert as_if_in("megatron.core.utils", "t.type(d)", t=tensor, d=torch.int64).dtype == torch.int64
    assert as_if_in("megatron.core.utils", "t.cuda()", t=tensor) is tensor


def test_cuda_outside_megatron_still_fails_without_a_gpu() -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        torch.ones(1).cuda()
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")
    with pytest.raises((AssertionError, RuntimeError)):
        as_if_in("megatron_core_lookalike", "t.cuda()", t=torch.ones(1))


SNAPSHOT = """
import importlib
import torch
from megatron_stepkto.megatron import patches

for name in patches.PATCHED_MODULES:  # importing Megatron may change torch; that is not ours
    importlib.import_module("megatron.core." + name)


def snapshot():
    owners = {"torch": torch, "torch.cuda": torch.cuda, "torch.Tensor": torch.Tensor, "torch.random": torch.random,
              "torch.distributed": torch.distributed, "torch.optim": torch.optim, "torch.nn.Module": torch.nn.Module}
    return {(owner, name): value for owner, holder in owners.items() for name, value in vars(holder).items()}


before = snapshot()
patches.install()
after = snapshot()
assert before.keys() <= after.keys()
print(sorted(".".join(key) for key in after if key not in before or before[key] is not after[key]))
print(torch.zeros(1).device, torch.get_default_device(), torch.get_default_dtype())
"""


def test_nothing_else_of_torch_is_touched() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", SNAPSHOT], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == ["['torch.Tensor.cuda', 'torch.Tensor.type']", "cpu cpu torch.float32"]


UPDATES = """
import hashlib
import sys
from pathlib import Path

import megatron.core.optimizer as optimizer

from megatron_stepkto.megatron.ranks import one_rank
from tests.unit.megatron.test_lora import CPU, make_engine, update

hf = Path(sys.argv[1])
print(optimizer.USING_PYTORCH_OPTIMIZER)
for changes in ({}, {"dtype": "bfloat16"}, {"parallel": {"distributed_optimizer": True}}):
    with one_rank(CPU):
        engine = make_engine(hf, **changes)
        update(engine, 2)
        weights = b"".join(weight.float().detach().numpy().tobytes() for weight in engine.policies[0].parameters())
        print(hashlib.sha256(weights).hexdigest())
"""
GPU_ONLY = """
class FusedAdam:
    def __init__(self, *args, **kwargs):
        raise RuntimeError("no GPU")

FusedSGD = FusedAdam

def multi_tensor_applier(*args):
    raise RuntimeError("no GPU")

multi_tensor_l2norm = multi_tensor_scale = multi_tensor_applier
"""


def test_on_a_cpu_updates_are_torchs_where_a_package_for_gpus_is_installed(repository: Path, tmp_path: Path) -> None:
    """As Transformer Engine's environment on a login node: Megatron would take its AdamW, which needs a GPU."""
    fake = tmp_path / "packages"
    for file in ("apex/__init__.py", "apex/optimizers.py", "apex/multi_tensor_apply.py", "amp_C.py"):
        (fake / file).parent.mkdir(parents=True, exist_ok=True)
        (fake / file).write_text(GPU_ONLY)
    hf = write_llama(tmp_path / "hf", num_hidden_layers=2)
    found = []
    for path in (f"{repository}", f"{repository}:{fake}"):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", UPDATES, str(hf)],
            env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(done.stdout.split())
    plain, beside = found
    assert (plain[0], beside[0]) == ("True", "False")
    assert len(plain) == 4 and plain[1:] == beside[1:]
