# The sampling image: vLLM's own, and what this package needs besides. Build: make images
# VLLM: the version of vllm in requirements/gpu-sample.lock.
ARG VLLM=0.32.0
FROM vllm/vllm-openai:v${VLLM}
WORKDIR /opt/megatron-stepkto
COPY containers/install.sh containers/
COPY tools/gpu_setup.py tools/
COPY requirements/gpu-sample.lock requirements/
COPY pyproject.toml README.md LICENSE ./
COPY megatron_stepkto/__init__.py megatron_stepkto/
RUN containers/install.sh sample
COPY megatron_stepkto megatron_stepkto
COPY recipes recipes
RUN useradd --create-home --uid 2000 stepkto
USER 2000
WORKDIR /home/stepkto
# The base's starts vLLM's server; jobs give their own command.
ENTRYPOINT []
CMD ["stepkto", "--help"]
