"""What an update descends, microbatch by microbatch, and what an iteration's updates say of themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from steppo.losses import (
    LossInputs,
    LossOutput,
    ObjectiveSettings,
    PolicyLoss,
    kl_penalty,
    step_means,
    token_weights,
    value_loss,
)
from steppo.types import Microbatch

if TYPE_CHECKING:
    from steppo.models import Critic, Policy


class Figures:
    """Figures of an iteration's updates. Each is a mean over the updates that had it; ratios also have their extremes.

    Args:
        ratio_N: float [N] on the learner's device, all steps of the iteration on this rank: where the mean ratio of each
            step's tokens at its last update goes.
        clipped_N: The same for the share of its tokens outside the trust region.
    """

    def __init__(self, ratio_N: Tensor, clipped_N: Tensor) -> None:
        infinity = torch.tensor(torch.inf, device=ratio_N.device)
        self._ratio_N, self._clipped_N = ratio_N, clipped_N
        self._extremes = {"ratio_min": infinity, "ratio_max": -infinity}
        self._sums: dict[str, Tensor] = {}
        self._updates_of: Counter[str] = Counter()

    @contextmanager
    def update(self) -> Iterator[Callable[[], None]]:
        """An update is made in here. Its figures count if the function that is given is called."""
        sums, extremes, kept = dict(self._sums), dict(self._extremes), [False]

        def keep() -> None:
            kept[0] = True

        yield keep
        if kept[0]:
            self._updates_of.update(name for name, value in self._sums.items() if value is not sums.get(name))
        else:
            self._sums, self._extremes = sums, extremes

    def add(self, name: str, value: Tensor) -> None:
        """Adds to this update's figure; over all microbatches and ranks it is their sum."""
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def add_ratios(self, batch: Microbatch, output: LossOutput) -> None:
        """Takes the ratios of a microbatch's tokens."""
        tokens = batch.tokens
        self._extremes = {
            "ratio_min": torch.minimum(self._extremes["ratio_min"], output.ratio_A.min()),
            "ratio_max": torch.maximum(self._extremes["ratio_max"], output.ratio_A.max()),
        }
        for column_N, column_A in ((self._ratio_N, output.ratio_A), (self._clipped_N, output.clipped_A)):
            column_N[batch.index_N] = step_means(column_A.float(), tokens.step_of_A, tokens.num_steps)

    def reduced(self, reduce: Callable[[Tensor, str], float]) -> dict[str, float]:
        """All figures, in the same order on all ranks.

        Args:
            reduce: Number and operation (``sum``, ``min``, ``max``) -> the number over all ranks.
        """
        means = {name: reduce(value, "sum") / self._updates_of[name] for name, value in sorted(self._sums.items())}
        return means | {name: reduce(value, name.removeprefix("ratio_")) for name, value in sorted(self._extremes.items())}


class UpdateLoss:
    """The mean loss of a whole update, given in parts: the activations of policy and critic are never in memory together,
    unless they are shared.

    Args:
        policy: The policy.
        critic: The critic, if the credit scheme wants values.
        needs_values: Which values those are.
        policy_loss: The policy's part of the objective.
        settings: The rest of it.
    """

    def __init__(
        self,
        policy: Policy,
        critic: Critic | None,
        needs_values: Literal["none", "step", "token"],
        policy_loss: PolicyLoss,
        settings: ObjectiveSettings,
    ) -> None:
        self._policy = policy
        self._critic = critic
        self._needs_values: Literal["none", "step", "token"] = needs_values
        self._policy_loss = policy_loss
        self._settings = settings

    def parts(self, batch: Microbatch, figures: Figures, policy_learns: bool = True) -> Iterator[Tensor]:
        """A microbatch's parts of the update's loss, each with a forward pass of its own: go backward before the next.

        Args:
            batch: The microbatch.
            figures: Takes what is to be said of it.
            policy_learns: The policy takes part, not only the critic.
        """
        critic = self._critic
        if critic is not None and critic.needs_policy_hidden:
            loss, hidden = self._of_policy(batch, figures, policy_learns)
            yield (1.0 if policy_learns else 0.0) * loss + self._of_critic(critic, batch, figures, hidden)
            return
        if policy_learns:
            yield self._of_policy(batch, figures, policy_learns)[0]
        if critic is not None:
            yield self._of_critic(critic, batch, figures, None)

    def _of_policy(self, batch: Microbatch, figures: Figures, policy_learns: bool) -> tuple[Tensor, Tensor]:
        settings, tokens = self._settings, batch.tokens
        total = batch.update_steps if settings.aggregation == "step-mean" else batch.update_tokens
        hidden, logprobs_A, entropy_A = self._policy(tokens, batch.temperature_A)
        share_A = token_weights(tokens.step_of_A, batch.weight_A.new_ones(tokens.num_steps), settings.aggregation)
        weight_A = share_A * batch.weight_A
        output = self._policy_loss(
            LossInputs(
                logprobs_A=logprobs_A,
                old_logprobs_A=batch.old_logprobs_A,
                behaviour_logprobs_A=batch.behaviour_logprobs_A,
                advantage_A=batch.advantage_A,
                step_of_A=tokens.step_of_A,
                num_steps=tokens.num_steps,
                weight_A=weight_A,
            )
        )
        policy_loss = (output.loss_A * weight_A).sum()
        entropy = (entropy_A * share_A).sum()
        loss = policy_loss - settings.ent_coef * entropy
        if not policy_learns:  # only the hidden states are wanted: the policy takes no part, and has no figures
            return loss / total, hidden
        sums = {"policy_loss": policy_loss, "entropy": entropy}
        if batch.ref_logprobs_A is not None:
            sums["kl"] = (kl_penalty(logprobs_A, batch.ref_logprobs_A, settings.kl_estimator) * share_A).sum()
            if settings.kl == "loss":
                loss = loss + settings.kl_coef * sums["kl"]
        log_ratio_A = (logprobs_A - batch.old_logprobs_A).detach()
        sums["approx_kl"] = ((log_ratio_A.exp() - 1 - log_ratio_A) * share_A).sum()
        sums["clip_fraction"] = (output.clipped_A * share_A).sum()
        sums["ratio_mean"] = (output.ratio_A * share_A).sum()
        sums["weight_mean"] = weight_A.sum()
        for name, value in sums.items():
            figures.add(name, value.detach() / total * batch.scale)
        if batch.scale:
            figures.add_ratios(batch, output)
        return loss / total, hidden

    def _of_critic(self, critic: Critic, batch: Microbatch, figures: Figures, hidden: Tensor | None) -> Tensor:
        assert batch.old_value is not None
        assert batch.target is not None
        # One value per step: its mean is over steps, however tokens are aggregated.
        aggregation = "step-mean" if self._needs_values == "step" else self._settings.aggregation
        total = batch.update_steps if aggregation == "step-mean" else batch.update_tokens
        tokens = batch.tokens
        if self._needs_values == "token":
            share_A = token_weights(tokens.step_of_A, batch.weight_A.new_ones(tokens.num_steps), aggregation)
            weights = share_A * batch.weight_A
        else:
            weights = step_means(batch.weight_A, tokens.step_of_A, tokens.num_steps)
        values = critic(tokens, tokens.value_positions(self._needs_values), hidden)
        loss = value_loss(values, batch.old_value, batch.target, weights, self._settings.value_clip or None) / total
        figures.add("value_loss", loss.detach() * batch.scale)
        return self._settings.vf_coef * loss
