"""In-process generation that keeps nothing: each prompt is read as a whole. For any causal model; the oracle of others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import DynamicCache

from steppo.engines.base import Engine, failed
from steppo.engines.sampling import draws, ended, logprob_tolerance, sample
from steppo.errors import require_at_least
from steppo.types import Completion, Request

if TYPE_CHECKING:
    from steppo.models.policy import Policy


class PlainEngine(Engine):
    """Batched sampling from a transformers model, whole answers at a time; no key or value outlives its batch.

    Each request draws its random numbers from a generator of its own, so its answer does not depend on what else is in the
    batch. Log-probabilities are those of the tempered distribution, as the learner recomputes them.

    Args:
        max_batch_size: Most requests in one forward pass.
    """

    _policy: Policy  # from ``bind``

    def __init__(self, max_batch_size: int = 64) -> None:
        require_at_least(1, self, max_batch_size=max_batch_size)
        self.max_batch_size = max_batch_size
        self._queue: list[Request] = []

    def bind(self, policy: Policy) -> None:
        self._policy = policy

    def submit(self, request: Request) -> None:
        self._queue.append(request)

    def poll(self) -> list[Completion]:
        batch, self._queue = self._queue[: self.max_batch_size], self._queue[self.max_batch_size :]
        try:
            return self._generate(batch) if batch else []
        except (torch.OutOfMemoryError, MemoryError) as error:
            return [failed(request, error) for request in batch]

    def release(self, session_id: str) -> None:
        self._queue = [request for request in self._queue if request.session_id != session_id]

    @torch.no_grad()
    def _generate(self, requests: list[Request]) -> list[Completion]:
        policy = self._policy
        device = policy.device
        self.logprob_tolerance = logprob_tolerance(policy)
        rows = len(requests)
        limits = np.asarray([request.sampling.max_new_tokens for request in requests])
        lengths = np.asarray([len(request.prompt_ids) for request in requests])
        width, steps = int(lengths.max()), int(limits.max())
        uniforms = torch.ones(rows, steps, dtype=torch.float64)
        for row, request in enumerate(requests):
            uniforms[row, : limits[row]] = torch.from_numpy(draws(request))
        uniforms = uniforms.to(device)

        # Prompts are padded on the left, so that all rows continue at the same column.
        ids = np.zeros((rows, width), dtype=np.int64)
        for row, request in enumerate(requests):
            ids[row, width - lengths[row] :] = request.prompt_ids
        inputs = torch.from_numpy(ids).to(device)
        start = torch.from_numpy(width - lengths).to(device)
        mask = (torch.arange(width, device=device) >= start[:, None]).long()
        positions = (torch.arange(width, device=device) - start[:, None]).clamp(min=0)
        temperature = torch.tensor([request.sampling.temperature for request in requests], device=device)
        stop = torch.tensor(sorted(policy.stop_ids), device=device)
        limit = torch.from_numpy(limits).to(device)
        said: dict[int, list[int]] = {row: [] for row, request in enumerate(requests) if request.sampling.stop}

        cache = DynamicCache(config=policy.model.config)  # which says what each layer keeps
        done = torch.zeros(rows, dtype=torch.bool, device=device)
        tokens, logprobs, sampled = [], [], []
        for step in range(steps):
            output = policy.trunk(
                input_ids=inputs, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            )
            token, logprob = sample(policy.logits(output.last_hidden_state[:, -1]), temperature, uniforms[:, step])
            tokens.append(token)
            logprobs.append(logprob)
            sampled.append(~done)
            done = done | torch.isin(token, stop) | (limit <= step + 1)
            if said:
                heard, over = token.tolist(), done.tolist()
                for row, so_far in said.items():
                    so_far.append(heard[row])
                    done[row] = over[row] or bool(ended(policy, requests[row], so_far))
            if bool(done.all()):
                break
            inputs = token[:, None]
            mask = torch.cat([mask, mask.new_ones(rows, 1)], dim=1)
            positions = positions[:, -1:] + 1

        token_ids = torch.stack(tokens, 1).int().cpu().numpy()
        token_logprobs = torch.stack(logprobs, 1).float().cpu().numpy()
        counts = torch.stack(sampled, 1).sum(1).cpu().numpy()
        completions = []
        for row, request in enumerate(requests):
            action = token_ids[row, : counts[row]]
            reason = ended(policy, request, action.tolist())
            completions.append(Completion(request.id, action, token_logprobs[row, : counts[row]], reason))
        return completions
