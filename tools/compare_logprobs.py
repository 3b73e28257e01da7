"""Compare two copies of a model by the log-probs that they give to some text: ``stepkto compare-logprobs``."""

import sys

from megatron_stepkto.__main__ import main

if __name__ == "__main__":
    main(["compare-logprobs", *sys.argv[1:]])
