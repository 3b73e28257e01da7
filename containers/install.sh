#!/usr/bin/env bash
# install.sh train|sample [flags of tools/gpu_setup.py]: what an image adds to its base. Run as root while it is built, by
# the Dockerfiles and the Apptainer definitions alike, in a copy of this repository.
set -euo pipefail
cd "$(dirname "$0")/.."
kind=$1
shift
export DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1
case $kind in
train)
    apt-get update -qq
    # g++ and the headers: for Transformer Engine now, and for the kernels that Triton compiles at run time
    apt-get install -y -qq --no-install-recommends g++ python3 python3-dev python3-venv >/dev/null
    rm -rf /var/lib/apt/lists/*
    python3 tools/gpu_setup.py --only train --without-gpu "$@"
    ;;
sample)
    export PIP_BREAK_SYSTEM_PACKAGES=1 # the image's Python is there for vLLM alone
    python3 tools/gpu_setup.py --complete "$@"
    ;;
*)
    echo "error: expected train or sample, found $kind" >&2
    exit 2
    ;;
esac
# Any user may run the image: nothing in it is written at run time.
chmod -R a+rX .
