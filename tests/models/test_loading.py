"""Models of a folder: whole ones of any kind, and damaged ones, which are refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    MptConfig,
    MptForCausalLM,
    PreTrainedModel,
)

from steppo.errors import ConfigError
from steppo.models import HFPolicy, SeparateCritic, SharedCritic
from steppo.models.policy import beyond_full_attention
from steppo.rollouts.base import require_positions
from tests.models.test_identity import base


def _cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def _lacking(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def _config(**entries: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    return change


def _holding(name: str, text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_text(text)

    return change


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut weights": (_cut, "SafetensorError: Error while deserializing header: incomplete metadata"),
    "empty weights": (_holding("model.safetensors", ""), "SafetensorError: Error while deserializing header"),
    "a weight too few": (_lacking, "1 are missing or have other shapes, such as model.layers.1.mlp.up_proj.weight"),
    "another width": (_config(intermediate_size=8), "6 are missing or have other shapes, such as model.layers.0.mlp.down"),
    "another depth": (_config(num_hidden_layers=3, layer_types=None), "such as model.layers.2."),
    "another vocabulary": (_config(vocab_size=999), "1 are missing or have other shapes, such as model.embed_tokens.weight"),
    "a text for a width": (_config(hidden_size="x"), "Field 'hidden_size' expected int, got str"),
    "no heads": (_config(num_attention_heads=0), "ZeroDivisionError"),
    "an activation that is none": (_config(hidden_act="nonsense"), "KeyError: 'nonsense'"),
    "a config that is a list": (_holding("config.json", "[]"), "Unrecognized model in"),
    "a tokenizer of nothing": (_holding("tokenizer.json", "{}"), "KeyError: 'added_tokens'"),
    "a tokenizer config that is a list": (_holding("tokenizer_config.json", "[]"), "AttributeError: 'list' object has no"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_model_is_refused(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    damage(base(tmp_path))
    with pytest.raises(ConfigError) as raised:
        HFPolicy(str(tmp_path)).build(list)
    said = str(raised.value)
    assert said.startswith("HFPolicy: ")
    assert repr(str(tmp_path)) in said
    assert message in said
    assert "\n" not in said


def _bloom(rows: int) -> PreTrainedModel:
    return BloomForCausalLM(BloomConfig(vocab_size=rows, hidden_size=32, n_layer=1, n_head=2))


def _mpt(rows: int) -> PreTrainedModel:
    return MptForCausalLM(MptConfig(vocab_size=rows, d_model=32, n_layers=1, n_heads=2))


def _gemma(rows: int) -> PreTrainedModel:
    """One that reads images too: what it says of text is a part of its config."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": rows, "head_dim": 16, "num_key_value_heads": 1, "max_position_embeddings": 64}
    text |= {"layer_types": ["sliding_attention", "full_attention"], "attention_dropout": 0.5}
    vision = {**sizes, "image_size": 28, "patch_size": 14}
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))


def loaded(make: Callable[[int], PreTrainedModel], folder: Path) -> HFPolicy:
    """A model of another kind than steppo's own, by steppo's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(base(folder))
    model = make(len(tokenizer))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    policy = HFPolicy(str(folder), attn_implementation="eager")
    policy.build(list)
    return policy


@pytest.mark.parametrize("make", [_bloom, _mpt])
def test_a_model_without_a_limit_of_positions_reads_any_length(
    make: Callable[[int], PreTrainedModel], tmp_path: Path
) -> None:
    require_positions(loaded(make, tmp_path), 10**9, 10**9)


def test_a_model_that_reads_images_too_is_one_of_text(tmp_path: Path) -> None:
    policy = loaded(_gemma, tmp_path)
    assert policy.text_config.attention_dropout == 0
    require_positions(policy, 32, 32)
    with pytest.raises(ConfigError, match="= 65 is more than the model's 64 positions"):
        require_positions(policy, 33, 32)
    assert "sliding_attention" in beyond_full_attention(policy.trunk)
    for critic in (SharedCritic(), SeparateCritic()):
        critic.build(policy)
        assert critic.head.in_features == 32
