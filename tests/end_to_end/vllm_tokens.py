"""Run by ``test_architectures_vllm``: ``JOB`` names model folders; the greedy tokens of each are written as JSON."""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

from megatron_stepkto.base.processes import child_main, die_with_parent
from megatron_stepkto.sampling.vllm_engine import vllm_environment


def greedy(model: str, adapter: str | None, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.lora.request import LoRARequest

    llm = LLM(
        model, dtype="float32", enforce_eager=True, distributed_executor_backend="uni", max_model_len=256,
        max_num_seqs=len(prompts), kv_cache_memory_bytes=1 << 27, seed=0, trust_remote_code=False,
        enable_lora=adapter is not None,
    )  # fmt: skip
    parameters = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    given: list[Any] = [{"prompt_token_ids": prompt} for prompt in prompts]
    request = LoRARequest("adapter", 1, adapter) if adapter else None
    outputs = llm.generate(given, parameters, use_tqdm=False, lora_request=request)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    del llm
    cleanup_dist_env_and_memory()
    gc.collect()
    return tokens


def main() -> None:
    os.environ.update(vllm_environment("cpu"))
    job = json.loads(Path(sys.argv[1]).read_text())
    for model, adapter, out in job["cases"]:
        try:
            result: dict[str, Any] = {"tokens": greedy(model, adapter, job["prompts"], job["max_tokens"])}
        except Exception as error:  # one family that this build cannot run must not hide the others
            result = {"error": f"{type(error).__name__}: {error}"}
        Path(out).write_text(json.dumps(result))


if __name__ == "__mp_main__":
    die_with_parent()
if __name__ == "__main__":
    child_main(main)
