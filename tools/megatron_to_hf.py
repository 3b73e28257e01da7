"""Convert a Megatron-Core torch_dist checkpoint to a Hugging Face folder, bit for bit."""

from megatron_stepkto.checkpoints.command import tool
from megatron_stepkto.checkpoints.convert import MEGATRON_TO_HF

if __name__ == "__main__":
    tool(MEGATRON_TO_HF, __doc__)
