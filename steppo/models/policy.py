"""A language-model policy: a transformers trunk and head, read only where actions are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from steppo.types import TokenBatch

# Most logits held at once, in numbers: 64 MiB in float32.
_LOGITS_PER_CHUNK = 2**24


class Policy(nn.Module, ABC):
    """A causal language model with its tokenizer.

    The constructor only stores settings; ``build`` makes the model.

    Attributes:
        model: The transformers model, once built.
        tokenizer: Its tokenizer, once built.
        stop_ids: Token ids that end an action.
    """

    model: Any
    tokenizer: Any
    stop_ids: frozenset[int]

    def __init__(self) -> None:
        super().__init__()
        self.model = None

    @abstractmethod
    def build(self, corpus: Callable[[], list[str]]) -> None:
        """Makes model and tokenizer.

        Args:
            corpus: Gives texts of the training environment, for policies that make their own tokenizer.
        """

    def tokenizer_state(self) -> str:
        """The tokenizer, for the checkpoint; empty when it comes with the model."""
        return ""

    def load_tokenizer_state(self, state: str) -> None:
        """Takes the tokenizer of a checkpoint."""

    def base_model(self) -> str | None:
        """Hub id or folder of the model that it began as; ``None`` for a model from scratch."""
        return None

    def export(self, folder: Path, merge: bool) -> None:
        """Writes model and tokenizer as transformers loads them.

        Args:
            folder: Exists, empty.
            merge: Write one whole model where the policy is an adapter on another; a whole model has nothing to merge.
        """
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @property
    def trunk(self) -> Any:
        """The transformer without its head."""
        return self.model.base_model

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def max_positions(self) -> int:
        """Longest sequence in tokens."""
        return int(self.model.config.max_position_embeddings)

    def hidden(self, batch: TokenBatch) -> Tensor:
        """Last hidden states, [B * T, H]."""
        return trunk_states(self.trunk, batch)

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits of hidden states [..., H], in float32 or better: [..., V]."""
        logits = self.model.get_output_embeddings()(hidden)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def action_logprobs(self, hidden: Tensor, batch: TokenBatch, temperature_A: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the action tokens, and the entropy where each was drawn.

        Logits exist at action positions only, one chunk at a time, in the backward pass too.

        Args:
            hidden: [B * T, H], from ``hidden``.
            batch: The same batch.
            temperature_A: Temperature of each action token; 0 (greedy) counts as 1.

        Returns:
            Two tensors [A], in float32 or better.
        """
        states_A = hidden[batch.predict_at_A]
        divisor_A = torch.where(temperature_A == 0, torch.ones_like(temperature_A), temperature_A)
        chunk = max(1, _LOGITS_PER_CHUNK // int(self.model.config.vocab_size))
        if states_A.shape[0] <= chunk:
            return self._read(states_A, batch.target_A, divisor_A)
        parts = [
            checkpoint(self._read, *part, use_reentrant=False)
            for part in zip(states_A.split(chunk), batch.target_A.split(chunk), divisor_A.split(chunk), strict=True)
        ]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    def _read(self, states_A: Tensor, target_A: Tensor, divisor_A: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.logits(states_A)
        logits = logits / divisor_A[:, None].to(logits.dtype)
        log_normaliser = torch.logsumexp(logits, dim=-1)
        logprobs = logits.gather(1, target_A[:, None])[:, 0] - log_normaliser
        entropy = log_normaliser - ((logits - log_normaliser[:, None]).exp() * logits).sum(-1)
        return logprobs, entropy


def trunk_states(trunk: nn.Module, batch: TokenBatch) -> Tensor:
    """Last hidden states of a trunk, [B * T, H]."""
    output = trunk(
        input_ids=batch.input_ids_BT, position_ids=batch.position_ids_BT, attention_mask=batch.attention, use_cache=False
    )
    return output.last_hidden_state.flatten(0, 1)
