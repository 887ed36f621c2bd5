"""The table of steps: what failed has no rows, and every column stays with its step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from steppo.learner.steps import StepTable
from steppo.packing import Packer, PaddedPacker
from tests.learner.fakes import EPISODES, LEARNED_CODES, WIDE, ScrambledPacker, codes_A, codes_N
from tests.numeric_helpers import close


def test_failed_episodes_are_kept_but_not_learned_from() -> None:
    table = StepTable.of(EPISODES)
    assert [episode.order for episode in table.episodes] == list(range(11))
    assert codes_N(table) == LEARNED_CODES
    assert table.num_tokens == len(codes_A(table)) == sum(len(step.action_ids) for step in table.records) == 37
    assert len(table.segments) == len(LEARNED_CODES) == 20


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_episodes_does_not_matter(seed: int) -> None:
    shuffled = [EPISODES[row] for row in np.random.default_rng(seed).permutation(len(EPISODES))]
    assert shuffled != EPISODES
    table, expected = StepTable.of(shuffled), StepTable.of(EPISODES)
    assert codes_N(table) == codes_N(expected)
    assert table.order_N.tolist() == [code // 1000 for code in LEARNED_CODES]
    for name in ("order_N", "group_N", "lengths_N"):
        np.testing.assert_array_equal(getattr(table, name), getattr(expected, name))


def test_columns_by_token_follow_the_steps() -> None:
    table = StepTable.of(EPISODES)
    close(table.behaviour_logprobs_A.double(), -codes_A(table) / 1024)
    close(table.temperature_A.double(), 1 + (codes_A(table) // 50 * 50) / 1024, 1e-6)


@pytest.mark.parametrize("packer", [PaddedPacker(), ScrambledPacker()])
@pytest.mark.parametrize("max_tokens", [1, 20, WIDE])
def test_batches_name_their_steps_and_tokens(packer: Packer, max_tokens: int) -> None:
    table = StepTable.of(EPISODES)
    step_codes, token_codes = torch.tensor(codes_N(table)), codes_A(table)
    found = []
    for rows, batch in packer.pack(table.segments, max_tokens):
        assert batch.input_ids_BT.flatten()[batch.value_at_N].tolist() == step_codes[rows].tolist()
        assert batch.target_A.tolist() == token_codes[table.tokens_of(rows)].tolist()
        assert (batch.target_A // 50 * 50).tolist() == step_codes[rows][batch.step_of_A].tolist()
        found += rows.tolist()
    assert sorted(found) == list(range(len(step_codes)))


def test_final_prompts_belong_to_truncated_episodes() -> None:
    segments = StepTable.of(EPISODES).final_segments
    assert {segment.episode: int(segment.prompt_ids[-1]) for segment in segments} == {2: 900_002, 8: 900_008}
    assert not any(len(segment.action_ids) for segment in segments)
