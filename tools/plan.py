"""Propose layouts (TP, PP, DP, recompute, micro-batch) for a model on a cluster: the command ``stepkto plan``."""

import sys

from megatron_stepkto.__main__ import main

if __name__ == "__main__":
    main(["plan", *sys.argv[1:]])
