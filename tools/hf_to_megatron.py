"""Convert a Hugging Face folder to a Megatron-Core torch_dist checkpoint, bit for bit."""

from megatron_stepkto.cli.interrupts import leave_at_once

if __name__ == "__main__":
    leave_at_once()  # before the imports, which take a second
    from megatron_stepkto.checkpoints.convert import HF_TO_MEGATRON
    from megatron_stepkto.cli.convert import tool

    tool(HF_TO_MEGATRON, __doc__)
