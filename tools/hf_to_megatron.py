"""Convert a Hugging Face folder to a Megatron-Core torch_dist checkpoint, bit for bit."""

if __name__ == "__main__":
    try:  # also around the imports, which take a second: Ctrl-C prints no traceback
        from megatron_stepkto.checkpoints.convert import HF_TO_MEGATRON
        from megatron_stepkto.cli.convert import tool

        tool(HF_TO_MEGATRON, __doc__)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
