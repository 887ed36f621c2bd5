"""Critics: a value for each step's prompt, or before each action token. Values are float32 or better, whatever the trunk."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from steppo.batch import TokenBatch
from steppo.errors import ConfigError
from steppo.models.policy import AdapterView, Policy, trunk_states


class ValueHead(nn.Linear):
    """Hidden states [..., H] -> values [...]. Starts at 0, so that the first advantages are plain returns."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, 1)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.to(self.weight.dtype))[..., 0]


class Critic(nn.Module, ABC):
    """Reads values off a trunk. The constructor only stores settings; ``build`` makes the weights."""

    head: ValueHead

    @abstractmethod
    def build(self, policy: Policy) -> None:
        """Makes the critic for a policy."""

    @abstractmethod
    def states(self, batch: TokenBatch, policy_hidden: Tensor | None) -> Tensor:
        """Hidden states [B * T, H] to read values from; ``policy_hidden`` where the policy's own are at hand."""

    @property
    def needs_policy_hidden(self) -> bool:
        """Whether ``states`` wants the policy's hidden states."""
        return False

    def forward(self, batch: TokenBatch, positions: Tensor, policy_hidden: Tensor | None) -> Tensor:
        """``values``."""
        return self.values(batch, positions, policy_hidden)

    def trained_parameters(self) -> list[nn.Parameter]:
        """What the critic's optimizer group holds."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def values(self, batch: TokenBatch, positions: Tensor, policy_hidden: Tensor | None) -> Tensor:
        """Values at flat positions of a batch, the same shape as ``positions``."""
        return self.head(self.states(batch, policy_hidden)[positions])

    def copy_weights_from(self, policy: Policy) -> None:
        """The policy was warm-started: a critic that began as its copy begins there again."""


class SharedCritic(Critic):
    """A value head on the policy's own trunk: no second forward pass.

    Args:
        detach: Keep the value loss out of the trunk.
    """

    def __init__(self, detach: bool = False) -> None:
        super().__init__()
        self.detach = detach

    def build(self, policy: Policy) -> None:
        self.head = ValueHead(policy.text_config.hidden_size)

    @property
    def needs_policy_hidden(self) -> bool:
        return True

    def states(self, batch: TokenBatch, policy_hidden: Tensor | None) -> Tensor:
        if policy_hidden is None:
            raise ValueError("SharedCritic reads the policy's hidden states")
        return policy_hidden.detach() if self.detach else policy_hidden


class SeparateCritic(Critic):
    """A model of its own, begun as a copy of the policy's trunk (the paper's choice)."""

    def build(self, policy: Policy) -> None:
        if policy.adapters is not None:
            raise ConfigError("SeparateCritic would copy a frozen base: with LoRA use steppo.models.AdapterCritic instead")
        self.trunk = copy.deepcopy(policy.trunk)
        self.head = ValueHead(policy.text_config.hidden_size)

    def states(self, batch: TokenBatch, policy_hidden: Tensor | None) -> Tensor:
        return trunk_states(self.trunk, batch)

    def copy_weights_from(self, policy: Policy) -> None:
        self.trunk.load_state_dict(policy.trunk.state_dict())


class AdapterCritic(Critic):
    """A LoRA adapter of its own and a value head on the policy's frozen base: the critic costs an adapter, not a model."""

    def build(self, policy: Policy) -> None:
        if policy.adapters is None:
            raise ConfigError("AdapterCritic shares a frozen base: set quantization.lora_rank, or use SeparateCritic")
        self.head = ValueHead(policy.text_config.hidden_size)
        self._view = AdapterView(policy, policy.adapters, "critic", trained=True)

    def trained_parameters(self) -> list[nn.Parameter]:
        return [*self._view.parameters(), *super().trained_parameters()]

    def states(self, batch: TokenBatch, policy_hidden: Tensor | None) -> Tensor:
        return self._view(batch).hidden

    def copy_weights_from(self, policy: Policy) -> None:
        self._view.copy_weights_from(policy)
