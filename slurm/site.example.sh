# The settings of your cluster. Copy to slurm/site.sh and edit; every job sources it. It is bash: quote paths.
# shellcheck shell=bash disable=SC1090,SC1091,SC2034

STEPKTO_HOME=$HOME/megatron-stepkto     # this checkout, after `make gpu`, on a file system that all nodes see

# --- where jobs go ---------------------------------------------------------------------------------------------
ACCOUNT=                                # empty: your default account
GPU_PARTITION=gpu                       # sample, evaluate, train; judge if it starts a server or runs a model
CPU_PARTITION=cpu                       # prepare, dataset, convert, finish, and judge where it needs no GPU
SBATCH_EXTRA=()                         # more flags of sbatch for every job, such as (--qos=long)

# --- what a node has -------------------------------------------------------------------------------------------
GPUS_PER_NODE=8                         # 0: no GPUs at all (recipes with device: cpu)
CPUS_PER_NODE=96
TRAIN_NODES=                            # empty: train.parallel.ranks / GPUS_PER_NODE
SAMPLE_ELEMENTS=4                       # elements of the sample array, one node each; a late one helps
CPU_TASK_CPUS=16                        # of prepare, dataset, convert, finish, and judge where it needs no GPU

# --- how long (a job that reaches its limit saves, is requeued and resumes) ------------------------------------
TIME_SAMPLE=04:00:00
TIME_JUDGE=04:00:00
TIME_TRAIN=08:00:00
TIME_EVALUATE=02:00:00
TIME_CPU=02:00:00
STOP_LEAD=600                           # seconds before the limit when a job is told: one update and one checkpoint

# --- programs --------------------------------------------------------------------------------------------------
CONTAINER=none                          # none, apptainer or enroot (with Pyxis)
IMAGE_TRAIN=                            # of `make images`: build/images/train.sif, or an enroot image
IMAGE_SAMPLE=                           # build/images/sample.sif
MOUNTS=$HOME,/scratch                   # what a container sees of the cluster, separated by commas: this checkout,
                                        # runs, models, problems

# environment KIND: make the command `stepkto` available. KIND: train (Megatron) or sample (vLLM). Runs on each node,
# inside the container if there is one. As written here: an image contains everything.
environment() {
    [[ $CONTAINER == none ]] || return 0
    source "$STEPKTO_HOME/.venv-gpu-$1/bin/activate" # made by `make gpu`
}

# JUDGE_SERVER: the command that runs a judge's server in the foreground, and where it listens. Where the recipe's
# judge.process.base_url names JUDGE_URL, judge and evaluate start it on their node, in the environment `sample`, and end
# it.
# Of recipes/llama3.3_70b_64xh100_fp8.yaml: two engines of four GPUs.
#   JUDGE_SERVER=(vllm serve "$STEPKTO_MODELS/Llama-3.3-70B-Instruct" --served-model-name Llama-3.3-70B-Instruct
#       --port 8000 --tensor-parallel-size 4 --data-parallel-size 2 --max-model-len 16384)
JUDGE_SERVER=()
JUDGE_URL=http://127.0.0.1:8000/v1

# --- network ---------------------------------------------------------------------------------------------------
RENDEZVOUS=                             # empty: the first node's name
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
export HF_HUB_OFFLINE=1                 # nodes often have no internet: models are folders
