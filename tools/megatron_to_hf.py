"""Convert a Megatron-Core torch_dist checkpoint to a Hugging Face folder, bit for bit."""

from megatron_stepkto.cli.interrupts import leave_at_once

if __name__ == "__main__":
    leave_at_once()  # before the imports, which take a second
    from megatron_stepkto.checkpoints.convert import MEGATRON_TO_HF
    from megatron_stepkto.cli.convert import tool

    tool(MEGATRON_TO_HF, __doc__)
