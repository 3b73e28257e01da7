"""Convert a Megatron-Core torch_dist checkpoint to a Hugging Face folder, bit for bit."""

if __name__ == "__main__":
    try:  # also around the imports, which take a second: Ctrl-C prints no traceback
        from megatron_stepkto.checkpoints.convert import MEGATRON_TO_HF
        from megatron_stepkto.cli.convert import tool

        tool(MEGATRON_TO_HF, __doc__)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
