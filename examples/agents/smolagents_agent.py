"""An agent of smolagents that looks up a word with a tool. It needs ``pip install "smolagents[openai]"``.

    python train.py fit --config configs/agent/quickstart.yaml --data.source.agent examples.agents.smolagents_agent.play \
        --data.source.gateway.other_policy override --data.source.max_prompt_tokens 4000 --data.source.max_new_tokens 200 \
        --model.policy HFPolicy --model.policy.name_or_path models/smollm2-135m

The framework asks for a tool in every answer (``tool_choice: required``), which would make another policy: hence
``other_policy: override``. Its ``stop`` texts go to the engine.
"""

from __future__ import annotations

import os

from smolagents import LogLevel, OpenAIServerModel, ToolCallingAgent, tool

DOORS = {1: "near", 2: "near", 3: "far", 4: "far"}


@tool
def distance(steps: int) -> str:
    """Says whether a door is near or far.

    Args:
        steps: How many steps it is away.
    """
    return DOORS.get(abs(int(steps)), "unknown")


def play(task) -> dict:
    """Plays one task. What the framework cannot go on with is no answer, and worth nothing."""
    model = OpenAIServerModel("policy", api_base=os.environ["OPENAI_BASE_URL"], api_key=os.environ["OPENAI_API_KEY"])
    agent = ToolCallingAgent([distance], model, max_steps=3, verbosity_level=LogLevel.OFF)
    door = abs(task.data["door"])
    try:
        answer = agent.run(f"Is a door that is {door} steps away near or far? Answer with one word.")
    except Exception as error:
        answer = f"{type(error).__name__}"
    right = str(answer).strip().lower() == DOORS[door]
    return {"reward": float(right), "success": right}
