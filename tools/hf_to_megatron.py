"""Convert a Hugging Face folder to a Megatron-Core torch_dist checkpoint, bit for bit."""

from megatron_stepkto.checkpoints.command import tool
from megatron_stepkto.checkpoints.convert import HF_TO_MEGATRON

if __name__ == "__main__":
    tool(HF_TO_MEGATRON, __doc__)
