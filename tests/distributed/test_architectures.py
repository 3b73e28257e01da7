"""Every architecture against transformers: logits at several layouts, and the way back from what Megatron saved."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_stepkto.base.processes import Child, run_children
from megatron_stepkto.checkpoints.convert import hf_to_megatron, megatron_to_hf
from tests.model_folders import FAMILIES, write_model
from tests.unit.checkpoint_folders import assert_same_bits

pytestmark = pytest.mark.distributed

# Longer than the 32 positions that the scaled RoPEs were made for; several documents, so that none sees another.
TEXTS = [[3 + (7 * i) % 95 for i in range(150)], [5, 9, 11], [3 + (i * i) % 96 for i in range(40)]]
MIXTURES = [name for name in FAMILIES if "mixtral" in name or "moe" in name]
DENSE = [name for name in FAMILIES if name not in MIXTURES]
# A launch takes 8 s, so each runs all its models; layouts of one launch differ only in what groups do not see.
LAUNCHES: dict[str, list[tuple[dict[str, Any], list[str]]]] = {
    "one process": [({"ranks": 1}, list(FAMILIES))],
    "TP 2": [
        ({"ranks": 2, "tensor": 2}, DENSE),
        ({"ranks": 2, "tensor": 2, "sequence": True}, ["qwen2", "qwen3", *MIXTURES]),
    ],
    "TP 2 x EP 2": [({"ranks": 2, "tensor": 2, "expert": 2, "sequence": True}, MIXTURES)],
    "EP 2": [({"ranks": 2, "expert": 2}, MIXTURES)],
    "PP 2": [({"ranks": 2, "pipeline": 2}, list(FAMILIES))],
    "PP 2 interleaved": [({"ranks": 2, "pipeline": 2, "virtual_pipeline": 2}, ["llama", "qwen2", "qwen3", "mixtral"])],
    "PP 2 x TP 2 x EP 2": [
        ({"ranks": 4, "tensor": 2, "pipeline": 2, "expert": 2, "sequence": True}, ["qwen3_moe"]),
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """family -> folder with hf/, megatron/ and logits.pt of transformers."""
    from transformers import AutoModelForCausalLM

    found = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        write_model(folder / "hf", family)
        hf_to_megatron(folder / "hf", folder / "megatron")
        model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32, attn_implementation="eager")
        with torch.no_grad():
            torch.save(torch.cat([model(torch.tensor([ids])).logits[0] for ids in TEXTS]), folder / "logits.pt")
        found[family] = folder
    return found


def launch(folder: Path, layouts: list[dict[str, Any]], cases: list[tuple[str, str, int]]) -> None:
    job = folder / "job.json"
    job.write_text(json.dumps({"layouts": layouts, "cases": cases, "texts": TEXTS}))
    torchrun = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, f"--nproc-per-node={layouts[0]['ranks']}", "-m", "tests.distributed.logits_rank", str(job)]
    env = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(Path(__file__).parents[2])}
    run_children([Child(command, folder / "log", env)], title="logits", unit="models")


@pytest.mark.parametrize("name", LAUNCHES)
def test_logits_equal_transformers_and_the_saved_weights_come_back(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    layouts = [layout for layout, _ in LAUNCHES[name]]
    cases = {
        (family, number): tmp_path / f"{family}-{number}.pt"
        for number, (_, families) in enumerate(LAUNCHES[name])
        for family in families
    }
    launch(
        tmp_path, layouts,
        [(str(folders[family] / "megatron"), str(out), number) for (family, number), out in cases.items()],
    )  # fmt: skip
    gaps = {}
    for (family, number), out in cases.items():
        expected = torch.load(folders[family] / "logits.pt")
        assert expected.std() > 0.3, family
        gaps[family, number] = (torch.load(out) - expected).abs().max().item()
    assert max(gaps.values()) < 1e-4, gaps
    for (family, number), out in cases.items():
        saved = out.with_suffix("")
        (saved / "huggingface").symlink_to(folders[family] / "megatron" / "huggingface")
        megatron_to_hf(saved, tmp_path / f"back-{family}-{number}")
        assert_same_bits(
            load_file(tmp_path / f"back-{family}-{number}" / "model.safetensors"),
            load_file(folders[family] / "hf" / "model.safetensors"),
        )
