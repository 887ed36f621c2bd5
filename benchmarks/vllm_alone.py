"""How fast vLLM is without steppo: ``benchmarks/vllm_engine.py --parts alone`` runs this file in vLLM's environment.

    python benchmarks/vllm_alone.py MODEL BATCHES PROMPT ACTION REPEATS

Prints tokens/s of each batch, for each repeat, as JSON: actions of ``ACTION`` tokens after random prompts of ``PROMPT``.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
from vllm import LLM, SamplingParams


def main() -> None:
    model, batches, *sizes = sys.argv[1:]
    prompt, action, repeats = map(int, sizes)
    llm = LLM(
        model,
        dtype="bfloat16",
        max_model_len=1024,
        gpu_memory_utilization=0.3,
        compilation_config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
        enable_prefix_caching=True,
        logprobs_mode="processed_logprobs",
        generation_config="vllm",
    )
    rates = {}
    for batch in map(int, batches.split(",")):
        rates[batch] = []
        for turn in range(1 + repeats):
            rng = np.random.default_rng(1000 * turn + batch)
            prompts = [{"prompt_token_ids": rng.integers(100, 49000, prompt).tolist()} for _ in range(batch)]
            settings = {"temperature": 1.0, "max_tokens": action, "ignore_eos": True, "logprobs": 0, "detokenize": False}
            start = time.perf_counter()
            llm.generate(prompts, [SamplingParams(seed=seed, **settings) for seed in range(batch)], use_tqdm=False)
            if turn:
                rates[batch].append(action * batch / (time.perf_counter() - start))
    print(json.dumps({batch: sorted(found) for batch, found in rates.items()}))


if __name__ == "__main__":
    main()
