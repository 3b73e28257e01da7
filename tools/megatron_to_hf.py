"""Convert a Megatron-Core torch_dist checkpoint to a Hugging Face folder, bit for bit."""

from megatron_stepkto.checkpoints.command import conversion_command
from megatron_stepkto.checkpoints.convert import megatron_to_hf

if __name__ == "__main__":
    conversion_command(__doc__, megatron_to_hf)
