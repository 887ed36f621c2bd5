"""In-process generation with the learner's own weights: no copy, no synchronisation, the same numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import DynamicCache

from steppo.engines.base import Engine, failed
from steppo.errors import ConfigError
from steppo.types import Completion, Request

if TYPE_CHECKING:
    from steppo.models.policy import Policy


class HFEngine(Engine):
    """Batched sampling from a transformers model.

    Each request draws its random numbers from a generator of its own, so its answer does not depend on what else is in the
    batch. Log-probabilities are those of the tempered distribution, as the learner recomputes them.

    Args:
        max_batch_size: Most requests in one forward pass.
    """

    _policy: Policy  # from ``bind``

    def __init__(self, max_batch_size: int = 64) -> None:
        if max_batch_size < 1:
            raise ConfigError(f"HFEngine: max_batch_size must be at least 1, not {max_batch_size}")
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
        exact = policy.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(device.type)
        self.logprob_tolerance = 1e-4 if exact else 0.1
        rows = len(requests)
        limits = np.asarray([request.sampling.max_new_tokens for request in requests])
        lengths = np.asarray([len(request.prompt_ids) for request in requests])
        width, steps = int(lengths.max()), int(limits.max())
        uniforms = torch.ones(rows, steps, dtype=torch.float64)
        for row, request in enumerate(requests):
            drawn = np.random.Generator(np.random.Philox(request.seed)).random(limits[row])
            uniforms[row, : limits[row]] = torch.from_numpy(drawn)
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
        greedy = temperature == 0
        divisor = torch.where(greedy, torch.ones_like(temperature), temperature)[:, None]
        stop = torch.tensor(sorted(policy.stop_ids), device=device)
        limit = torch.from_numpy(limits).to(device)

        cache = DynamicCache()
        done = torch.zeros(rows, dtype=torch.bool, device=device)
        tokens, logprobs, sampled = [], [], []
        for step in range(steps):
            output = policy.trunk(
                input_ids=inputs, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            )
            logits = policy.logits(output.last_hidden_state[:, -1]) / divisor
            log_normaliser = torch.logsumexp(logits, dim=-1)
            cumulative = (logits - log_normaliser[:, None]).double().exp().cumsum(dim=-1)
            threshold = uniforms[:, step] * cumulative[:, -1]
            drawn = torch.searchsorted(cumulative, threshold[:, None], right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
            token = torch.where(greedy, logits.argmax(dim=-1), drawn)
            tokens.append(token)
            logprobs.append(logits.gather(1, token[:, None])[:, 0] - log_normaliser)
            sampled.append(~done)
            done = done | torch.isin(token, stop) | (limit <= step + 1)
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
            reason = "stop" if int(action[-1]) in policy.stop_ids else "length"
            completions.append(Completion(request.id, action, token_logprobs[row, : counts[row]], reason))
        return completions
