"""Hardware for a plan. GB and TFLOP/s are powers of ten, as in data sheets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """GPUs and their links.

    memory_gb: of one GPU. bf16_tflops: dense matrix peak. hbm_gbs: memory bandwidth. node_gbs: one direction of a
    GPU's links inside its node. network_gbs: one direction per GPU between nodes. pcie_gbs: one direction between a GPU
    and its host. host_gbs: bandwidth of the host's memory, a GPU's share of its node's.
    """

    name: str
    gpus: int = 8
    gpus_per_node: int = 8
    memory_gb: float
    bf16_tflops: float
    hbm_gbs: float
    node_gbs: float
    network_gbs: float
    pcie_gbs: float
    host_gbs: float
    source: str

    def link_gbs(self, span: int) -> float:
        """Bandwidth of a group whose ranks are within ``span`` consecutive ranks."""
        return self.node_gbs if span <= self.gpus_per_node else self.network_gbs


PRESETS = {
    "h100": Cluster(
        name="h100",
        memory_gb=80,
        bf16_tflops=989,
        hbm_gbs=3350,
        node_gbs=450,
        network_gbs=50,
        pcie_gbs=64,
        host_gbs=76.8,
        source="NVIDIA H100 SXM data sheet (80 GB, 989 TFLOP/s bf16 without sparsity, 3.35 TB/s, NVLink 900 GB/s "
        "both directions); DGX H100: 400 Gb/s per GPU, PCIe 5.0 x16, 16 DDR5-4800 channels for eight GPUs",
    ),
    "h200": Cluster(
        name="h200",
        memory_gb=141,
        bf16_tflops=989,
        hbm_gbs=4800,
        node_gbs=450,
        network_gbs=50,
        pcie_gbs=64,
        host_gbs=76.8,
        source="NVIDIA H200 SXM data sheet (141 GB, 989 TFLOP/s bf16 without sparsity, 4.8 TB/s, NVLink 900 GB/s "
        "both directions); DGX H200: 400 Gb/s per GPU, PCIe 5.0 x16, 16 DDR5-4800 channels for eight GPUs",
    ),
    "a100": Cluster(
        name="a100",
        memory_gb=80,
        bf16_tflops=312,
        hbm_gbs=2039,
        node_gbs=300,
        network_gbs=25,
        pcie_gbs=32,
        host_gbs=51.2,
        source="NVIDIA A100 80GB SXM data sheet (312 TFLOP/s bf16 without sparsity, 2,039 GB/s, NVLink 600 GB/s both "
        "directions); DGX A100: 200 Gb/s per GPU, PCIe 4.0 x16, 16 DDR4-3200 channels for eight GPUs",
    ),
}
