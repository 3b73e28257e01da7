"""Compare two copies of a model by the log-probs that they give to some text (see --help)."""

from megatron_stepkto.cli.compare import tool

if __name__ == "__main__":
    tool()
