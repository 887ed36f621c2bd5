"""A small policy from scratch: a Qwen3 of a few hundred thousand parameters and a tokenizer of its environment's words."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from steppo.errors import ConfigError, require_at_least
from steppo.models.policy import Policy

PAD, END = "<|pad|>", "<|end|>"
_BYTES_AND_SPECIALS = 256 + 2


class TinyPolicy(Policy):
    """Qwen3 architecture, random weights, byte-level BPE trained on the environment's text. Nothing is downloaded.

    Args:
        hidden_size: Width.
        num_layers: Depth.
        num_heads: Attention heads; key-value heads are half as many.
        vocab_size: Tokens, 258 at least (all bytes and two special tokens).
        max_positions: Longest sequence in tokens.
        seed: Of the initial weights; the run's seed unless given.
    """

    def __init__(
        self,
        hidden_size: int = 96,
        num_layers: int = 2,
        num_heads: int = 4,
        vocab_size: int = 512,
        max_positions: int = 1024,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        require_at_least(_BYTES_AND_SPECIALS, self, vocab_size=vocab_size)
        require_at_least(1, self, hidden_size=hidden_size, num_layers=num_layers)
        require_at_least(1, self, num_heads=num_heads, max_positions=max_positions)
        if num_heads % 2 or hidden_size % (2 * num_heads):
            raise ConfigError(
                f"TinyPolicy: num_heads must be even, and hidden_size a multiple of 2 * num_heads, not {num_heads} and "
                f"{hidden_size}"
            )
        self.seed = seed
        self.config = Qwen3Config(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=3 * hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=num_heads // 2,
            head_dim=hidden_size // num_heads,
            max_position_embeddings=max_positions,
            tie_word_embeddings=True,
            attention_dropout=0.0,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )

    def build(self, tokenizer_texts: Callable[[], list[str]]) -> None:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.config.vocab_size,
            special_tokens=[PAD, END],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(tokenizer_texts(), trainer)
        self.load_tokenizer_state(tokenizer.to_str())
        self.stop_ids = frozenset([self.tokenizer.eos_token_id])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch.initial_seed() if self.seed is None else self.seed)
            self.model = Qwen3ForCausalLM(self.config)

    def tokenizer_state(self) -> str:
        return self.tokenizer.backend_tokenizer.to_str()

    def load_tokenizer_state(self, state: str) -> None:
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(state), pad_token=PAD, eos_token=END, clean_up_tokenization_spaces=False
        )
