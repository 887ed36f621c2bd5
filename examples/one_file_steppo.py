"""StepPO in one file: step-level MDP, step critic, step-level GAE, step-level importance sampling (arXiv 2604.18401).

    python examples/one_file_steppo.py            # a minute or two on one CPU core

A small policy learns to fetch a coin in a corridor: in the end it does so in 100 of 100 new ones (seeds 0, 1 and 2). It
reads a few words, says a few words, and the environment answers. All that it says between two observations is one action.

Read from the bottom up: ``main`` is the loop, ``update`` the objective, ``step_gae`` the credit, ``play`` the rollout.

What is left out, and is in the library: other tasks and models, contexts, groups, KL, several processes, checkpoints,
failures, evaluation on a fixed panel. The numbers are the library's: tests/test_one_file.py compares losses, gradients and
advantages on the same episodes.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen3Config, Qwen3ForCausalLM

PAD, END = 0, 1
WORDS = ["<pad>", "<end>", *["go", "left", "right", "take", "coin", "the", "is", "here", "rooms", "to"], *"12345"]
COMMANDS = ("go left", "go right", "take coin")
MAX_ACTION_TOKENS = 4


def encode(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def decode(ids: list[int]) -> str:
    return " ".join(WORDS[token] for token in ids if token not in (PAD, END))


# ---- the task: text in, text out ----


class Corridor:
    """Six rooms in a row, a coin in one of them. Reward 1 for taking it; over after ``max_steps`` or an unknown command."""

    max_steps = 12

    def __init__(self, rng: random.Random) -> None:
        self.room, self.coin = rng.sample(range(6), 2)
        self.steps = 0

    def observation(self) -> str:
        away = abs(self.room - self.coin)
        side = "left" if self.coin < self.room else "right"
        return f"the coin is {away} rooms to the {side}" if away else "the coin is here"

    def step(self, command: str) -> tuple[float, bool]:
        """Reward, and whether the episode is over."""
        self.steps += 1
        won = command == "take coin" and self.room == self.coin
        if command == "go left":
            self.room = max(self.room - 1, 0)
        elif command == "go right":
            self.room = min(self.room + 1, 5)
        return float(won), won or command not in COMMANDS or self.steps == self.max_steps


# ---- the agent: a policy, and a critic that is read once per step ----


class Agent(nn.Module):
    """A transformer with two heads: the next token, and the value of a state."""

    def __init__(self) -> None:
        super().__init__()
        config = Qwen3Config(
            vocab_size=len(WORDS),
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=64,
            tie_word_embeddings=True,
        )
        self.policy = Qwen3ForCausalLM(config)
        self.value_head = nn.Linear(config.hidden_size, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Logits [B, T, V] and values [B, T]. Rows are padded on the right: with causal attention no mask is needed."""
        ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=PAD)
        hidden = self.policy.model(input_ids=ids, use_cache=False).last_hidden_state
        return self.policy.lm_head(hidden), self.value_head(hidden)[..., 0]

    def read(self, steps: list[Step]) -> tuple[list[Tensor], Tensor]:
        """Log-probabilities of each step's action tokens, [L_t] each, and V(s_t) at its last prompt token, [N]."""
        logits, values = self([step.prompt + step.action[:-1] for step in steps])
        logprobs = logits.log_softmax(-1)
        last = [len(step.prompt) - 1 for step in steps]
        taken = [
            logprobs[row, at : at + len(step.action)].gather(1, torch.tensor(step.action)[:, None])[:, 0]
            for row, (step, at) in enumerate(zip(steps, last, strict=True))
        ]
        return taken, values[torch.arange(len(steps)), torch.tensor(last)]

    @torch.no_grad()
    def act(self, prompts: list[list[int]], greedy: bool) -> list[list[int]]:
        """Says one action after each prompt: tokens up to <end>."""
        actions: list[list[int]] = [[] for _ in prompts]
        going = list(range(len(prompts)))
        for _ in range(MAX_ACTION_TOKENS):
            logits, _ = self([prompts[row] + actions[row] for row in going])
            for line, row in enumerate(list(going)):
                last = logits[line, len(prompts[row]) + len(actions[row]) - 1]
                token = int(last.argmax() if greedy else torch.multinomial(last.softmax(-1), 1))
                actions[row].append(token)
                if token == END:
                    going.remove(row)
            if not going:
                break
        return actions


# ---- rollout: the step-level MDP, in token space ----


@dataclass
class Step:
    """``s_t`` and ``a_t`` as the ids that were read and sampled; what the learner adds later has a default."""

    prompt: list[int]
    action: list[int]
    reward: float
    old_logprobs: Tensor = field(default_factory=lambda: torch.zeros(0))
    value: float = 0.0
    advantage: float = 0.0
    target: float = 0.0


def play(agent: Agent, tasks: list[Corridor], greedy: bool = False) -> list[list[Step]]:
    """One episode for each task, all at the same time."""
    episodes: list[list[Step]] = [[] for _ in tasks]
    going = list(range(len(tasks)))
    while going:
        prompts = [encode(tasks[number].observation()) for number in going]
        still_going = []
        for number, prompt, action in zip(going, prompts, agent.act(prompts, greedy), strict=True):
            reward, over = tasks[number].step(decode(action))
            episodes[number].append(Step(prompt, action, reward))
            if not over:
                still_going.append(number)
        going = still_going
    return episodes


# ---- credit: step-level GAE ----


def step_gae(episodes: list[list[Step]], gamma: float, lam: float) -> None:
    """``A_t = delta_t + gamma lam A_{t+1}`` with ``delta_t = r_t + gamma V_{t+1} - V_t``, one value per step.

    The target ``A_t + V_t`` is of the advantage before it is whitened; whitening is over steps, not tokens.
    """
    for episode in episodes:
        advantage = next_value = 0.0
        for step in reversed(episode):
            advantage = step.reward + gamma * next_value - step.value + gamma * lam * advantage
            step.advantage, step.target = advantage, advantage + step.value
            next_value = step.value
    steps = [step for episode in episodes for step in episode]
    advantages = torch.tensor([step.advantage for step in steps], dtype=torch.float64)
    whitened = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    for step, value in zip(steps, whitened.tolist(), strict=True):
        step.advantage = value


# ---- the objective: step-level importance sampling ----


def policy_loss(logprobs: list[Tensor], steps: list[Step], clip: float) -> Tensor:
    """``- mean_t min(w_t A_t, clip(w_t) A_t)`` with ``w_t`` the geometric mean of the ratios of a step's tokens."""
    objective = []
    for current, step in zip(logprobs, steps, strict=True):
        ratio = (current - step.old_logprobs).mean().exp()  # one, whatever the length of the action
        objective.append(torch.minimum(ratio * step.advantage, ratio.clamp(1 - clip, 1 + clip) * step.advantage))
    return -torch.stack(objective).mean()


def value_loss(values: Tensor, steps: list[Step], clip: float) -> Tensor:
    """``0.5 mean_t max((v - R)^2, (clip(v, v_old +- clip) - R)^2)``."""
    old = torch.tensor([step.value for step in steps])
    target = torch.tensor([step.target for step in steps])
    clipped = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - target).square(), (clipped - target).square()).mean()


def update(agent: Agent, optimizer: torch.optim.Optimizer, steps: list[Step]) -> None:
    logprobs, values = agent.read(steps)
    loss = policy_loss(logprobs, steps, clip=0.1) + 0.5 * value_loss(values, steps, clip=0.5)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(agent.parameters(), 1.0)
    optimizer.step()


# ---- the run ----


def clone_random_commands(agent: Agent, rng: random.Random, updates: int) -> None:
    """Teaches the form of an action, and nothing of the task, as a pretrained model would bring it."""
    optimizer = torch.optim.AdamW(agent.parameters(), lr=2e-3)
    for _ in range(updates):
        said = [[*encode(rng.choice(COMMANDS)), END] for _ in range(64)]
        logprobs, _ = agent.read([Step(encode(Corridor(rng).observation()), action, 0.0) for action in said])
        optimizer.zero_grad()
        (-torch.cat(logprobs).mean()).backward()
        optimizer.step()


def success(episodes: list[list[Step]]) -> float:
    return sum(episode[-1].reward for episode in episodes) / len(episodes)


def main(seed: int = 0, iterations: int = 40, cloned: int = 100) -> float:
    """Trains, prints a line per iteration, and gives the greedy success at the end."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    agent = Agent()
    clone_random_commands(agent, rng, updates=cloned)
    optimizer = torch.optim.AdamW(agent.parameters(), lr=5e-4)
    for iteration in range(1, iterations + 1):
        episodes = play(agent, [Corridor(rng) for _ in range(64)])
        steps = [step for episode in episodes for step in episode]
        with torch.no_grad():  # what the policy and the critic said when the iteration started
            for step, logprobs, value in zip(steps, *agent.read(steps), strict=True):
                step.old_logprobs, step.value = logprobs, float(value)
        step_gae(episodes, gamma=0.95, lam=0.95)
        for _ in range(2):  # passes over the iteration's steps
            rng.shuffle(steps)
            for part in range(3):
                update(agent, optimizer, steps[part::3])
        print(
            f"iteration {iteration:2}: success {success(episodes):.2f}, {len(steps) / len(episodes):4.1f} steps", flush=True
        )
    greedy = success(play(agent, [Corridor(rng) for _ in range(100)], greedy=True))
    print(f"greedy, 100 new corridors: success {greedy:.2f}")
    return greedy


if __name__ == "__main__":
    torch.set_num_threads(1)  # so small a model gains nothing by more
    main()
