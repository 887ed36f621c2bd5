"""One update: its loss, microbatch by microbatch, and what it says of itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from steppo.batch import Microbatch
from steppo.distributed import gather, rank_and_world
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
from steppo.models import Critic, Policy


class StepRatios(NamedTuple):
    """Importance ratios of a microbatch: of each step the mean over its tokens, and the extremes over all tokens.

    ``index_N`` int64, the steps' places in the table; ``ratio_N`` float32; ``clipped_N`` float32, the share of the tokens
    outside the trust region.
    """

    index_N: Tensor
    ratio_N: Tensor
    clipped_N: Tensor
    lowest: Tensor
    highest: Tensor


class OldLogprobs(NamedTuple):
    """What an iteration's first update found: ``index_N`` int64, the steps' places in the table; ``logprobs_A`` float."""

    index_N: Tensor
    logprobs_A: Tensor


class LossPart(NamedTuple):
    """A part of an update's loss, with its graph, and its share of the update's figures, without."""

    loss: Tensor
    figures: dict[str, Tensor]
    ratios: StepRatios | None
    old_logprobs: OldLogprobs | None = None


@dataclass(frozen=True, eq=False)
class UpdateStatistics:
    """What one update found on this rank; of figures and ratios nothing if it was skipped.

    Attributes:
        figures: Shares of each figure, which is their sum over microbatches and ranks.
        ratios: By microbatch.
        old_logprobs: By microbatch, where they were not known before.
    """

    figures: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)
    ratios: Sequence[StepRatios] = ()
    old_logprobs: Sequence[OldLogprobs] = ()


@dataclass(frozen=True, eq=False)
class UpdateLoss:
    """The mean loss of a whole update, given in parts: the activations of policy and critic are never in memory together,
    unless they are shared.

    Attributes:
        policy: The policy.
        critic: The critic, if the credit scheme wants values.
        needs_values: Which values those are.
        policy_loss: The policy's part of the objective.
        settings: The rest of it.
    """

    policy: Policy
    critic: Critic | None
    needs_values: Literal["none", "step", "token"]
    policy_loss: PolicyLoss
    settings: ObjectiveSettings

    def parts(self, batch: Microbatch, policy_learns: bool = True) -> Iterator[LossPart]:
        """A microbatch's parts of the update's loss, each with a forward pass of its own: go backward before the next.

        Args:
            batch: The microbatch.
            policy_learns: The policy takes part, not only the critic.
        """
        critic = self.critic
        if critic is not None and critic.needs_policy_hidden:
            of_policy, hidden = self._of_policy(batch, policy_learns)
            of_critic = self._of_critic(critic, batch, hidden)
            loss = (1.0 if policy_learns else 0.0) * of_policy.loss + of_critic.loss
            yield of_policy._replace(loss=loss, figures=of_policy.figures | of_critic.figures)
            return
        if policy_learns:
            yield self._of_policy(batch, policy_learns)[0]
        if critic is not None:
            yield self._of_critic(critic, batch, None)

    def _of_policy(self, batch: Microbatch, policy_learns: bool) -> tuple[LossPart, Tensor]:
        settings, tokens = self.settings, batch.tokens
        total = batch.update_steps if settings.aggregation == "step-mean" else batch.update_tokens
        hidden, logprobs_A, entropy_A = self.policy(tokens, batch.temperature_A)
        old_A = logprobs_A.detach() if batch.old_logprobs_A is None else batch.old_logprobs_A
        share_A = token_weights(tokens.step_of_A, batch.weight_A.new_ones(tokens.num_steps), settings.aggregation)
        weight_A = share_A * batch.weight_A
        output = self.policy_loss(
            LossInputs(
                logprobs_A=logprobs_A,
                old_logprobs_A=old_A,
                behaviour_logprobs_A=batch.behaviour_logprobs_A,
                advantage_A=batch.advantage_A,
                step_of_A=tokens.step_of_A,
                num_steps=tokens.num_steps,
                weight_A=weight_A,
            )
        )
        policy_loss = (output.loss_A * weight_A).sum()
        entropy = (entropy_A * share_A).sum()
        loss = policy_loss - settings.ent_coef * entropy if settings.ent_coef else policy_loss
        if not policy_learns:  # only the hidden states are wanted: the policy takes no part, and has no figures
            return LossPart(loss / total, {}, None), hidden
        sums = {"policy_loss": policy_loss, "entropy": entropy}
        if batch.ref_logprobs_A is not None:
            sums["kl"] = (kl_penalty(logprobs_A, batch.ref_logprobs_A, settings.kl_estimator) * share_A).sum()
            if settings.kl == "loss":
                loss = loss + settings.kl_coef * sums["kl"]
        log_ratio_A = (logprobs_A - old_A).detach()
        sums["approx_kl"] = ((log_ratio_A.exp() - 1 - log_ratio_A) * share_A).sum()
        sums["clip_fraction"] = (output.clipped_A * share_A).sum()
        sums["ratio_mean"] = (output.ratio_A * share_A).sum()
        sums["weight_mean"] = weight_A.sum()
        figures = {name: value.detach() / total * batch.scale for name, value in sums.items()}
        found = OldLogprobs(batch.index_N, old_A) if batch.old_logprobs_A is None else None
        return LossPart(loss / total, figures, _step_ratios(batch, output) if batch.scale else None, found), hidden

    def _of_critic(self, critic: Critic, batch: Microbatch, hidden: Tensor | None) -> LossPart:
        if batch.old_value is None or batch.target is None:
            raise ValueError("a critic learns from values and targets: the microbatch has none")
        # One value per step: its mean is over steps, however tokens are aggregated.
        aggregation = "step-mean" if self.needs_values == "step" else self.settings.aggregation
        total = batch.update_steps if aggregation == "step-mean" else batch.update_tokens
        tokens = batch.tokens
        if self.needs_values == "token":
            share_A = token_weights(tokens.step_of_A, batch.weight_A.new_ones(tokens.num_steps), aggregation)
            weights = share_A * batch.weight_A
        else:
            weights = step_means(batch.weight_A, tokens.step_of_A, tokens.num_steps)
        values = critic(tokens, tokens.value_positions(self.needs_values), hidden)
        loss = value_loss(values, batch.old_value, batch.target, weights, self.settings.value_clip or None) / total
        return LossPart(self.settings.vf_coef * loss, {"value_loss": loss.detach() * batch.scale}, None)


def _step_ratios(batch: Microbatch, output: LossOutput) -> StepRatios:
    ratio_N, clipped_N = (
        step_means(column_A.float(), batch.tokens.step_of_A, batch.tokens.num_steps)
        for column_A in (output.ratio_A, output.clipped_A)
    )
    return StepRatios(batch.index_N, ratio_N, clipped_N, output.ratio_A.min(), output.ratio_A.max())


def run_update(
    loss: UpdateLoss,
    batch: Sequence[Microbatch],
    backward: Callable[[Tensor], object],
    step: Callable[[], Mapping[str, Tensor] | None],
    policy_learns: bool = True,
) -> UpdateStatistics:
    """All microbatches of an update forward and backward, then one step.

    Args:
        loss: Of the update.
        batch: This rank's part of it.
        backward: Adds a loss's gradients. They are to be averaged over ranks, and are scaled so that the average is the
            gradient of the whole update's loss.
        step: Changes the weights; gives norms of gradients by their parameters' name, or ``None`` if it left all as it was.
        policy_learns: The policy takes part, not only the critic.
    """
    _, world = rank_and_world()
    figures: dict[str, list[Tensor]] = {}
    ratios, found = [], []
    for microbatch in batch:
        for part in loss.parts(microbatch, policy_learns):
            backward(part.loss * (microbatch.scale * world))
            for name, value in part.figures.items():
                figures.setdefault(name, []).append(value)
            if part.ratios is not None:
                ratios.append(part.ratios)
            if part.old_logprobs is not None:
                found.append(part.old_logprobs)
    norms = step()
    if norms is None:
        return UpdateStatistics(old_logprobs=found)
    return UpdateStatistics(figures | {f"grad_norm_{name}": [norm / world] for name, norm in norms.items()}, ratios, found)


@dataclass(frozen=True, eq=False)
class ReplayStatistics:
    """What an iteration's updates found.

    Attributes:
        figures: Means over the updates that had them, over all ranks; of ratios also the extremes, and how far those of the
            first update are from 1, where nothing has been learned yet: infinite without any, or if that update found its
            own old log-probabilities.
        ratio_N: float32, of each step of this rank the mean importance ratio of its tokens at its last update; NaN without.
        clipped_N: float32, likewise the share of its tokens outside the trust region.
    """

    figures: Mapping[str, float]
    ratio_N: Tensor
    clipped_N: Tensor

    @classmethod
    def of(cls, updates: Sequence[UpdateStatistics], num_steps: int) -> ReplayStatistics:
        """Adds up the updates of an iteration of so many steps on this rank. All ranks must ask."""
        ratio_N, clipped_N = torch.full((2, num_steps), torch.nan)
        ratios = [ratios for update in updates for ratios in update.ratios]
        for part in ratios:
            ratio_N[part.index_N.cpu()] = part.ratio_N.cpu()
            clipped_N[part.index_N.cpu()] = part.clipped_N.cpu()
        mine: dict[str, float] = {}
        for name in sorted({name for update in updates for name in update.figures}):
            shares = [share for update in updates for share in update.figures.get(name, ())]
            mine[name] = float(sum(shares[1:], shares[0]))
        first = next((update for update in updates if "ratio_mean" in update.figures), UpdateStatistics())
        compared = first.ratios if not first.old_logprobs else ()  # with what was computed before, not with themselves
        ranks = gather((mine, _extremes(ratios), _extremes(compared)))
        counts = {name: sum(name in update.figures for update in updates) for name in mine}
        figures = {name: sum(sums[name] for sums, _, _ in ranks) / count for name, count in counts.items()}
        figures |= {"ratio_min": min(low for _, (low, _), _ in ranks), "ratio_max": max(high for _, (_, high), _ in ranks)}
        figures["first_ratio_spread"] = max(max(1 - low, high - 1) for *_, (low, high) in ranks)
        return cls(figures, ratio_N, clipped_N)


def _extremes(ratios: Sequence[StepRatios]) -> tuple[float, float]:
    lowest = min((float(part.lowest) for part in ratios), default=torch.inf)
    return lowest, max((float(part.highest) for part in ratios), default=-torch.inf)
