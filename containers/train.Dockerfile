# The training image: the CUDA toolkit, and the training environment of `make gpu` beside it. Build: make images
# CUDA: the version of cuda-toolkit in requirements/gpu-train.lock.
ARG CUDA=13.0.3
FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04
WORKDIR /opt/megatron-stepkto
# What decides the environment first: an edit elsewhere then compiles nothing again.
COPY containers/install.sh containers/
COPY tools/gpu_setup.py tools/
COPY requirements/gpu-train.lock requirements/
COPY pyproject.toml README.md LICENSE ./
COPY megatron_stepkto/__init__.py megatron_stepkto/
RUN containers/install.sh train
COPY megatron_stepkto megatron_stepkto
COPY recipes recipes
ENV PATH=/opt/megatron-stepkto/.venv-gpu-train/bin:$PATH
RUN useradd --create-home --uid 2000 stepkto
USER 2000
WORKDIR /home/stepkto
CMD ["stepkto", "--help"]
