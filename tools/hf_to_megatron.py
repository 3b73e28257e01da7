"""Convert a Hugging Face folder to a Megatron-Core torch_dist checkpoint, bit for bit."""

from megatron_stepkto.checkpoints.command import conversion_command
from megatron_stepkto.checkpoints.convert import hf_to_megatron

if __name__ == "__main__":
    conversion_command(__doc__, hf_to_megatron)
