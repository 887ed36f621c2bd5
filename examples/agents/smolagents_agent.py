"""An agent of smolagents that is asked for the way, a step at a time. It needs ``pip install "smolagents[openai]"``.

python train.py fit --config configs/agent/smolagents.yaml
"""

from __future__ import annotations

import os

from smolagents import LogLevel, OpenAIModel, ToolCallingAgent
from smolagents.models import REMOVE_PARAMETER, ChatMessageToolCall, ChatMessageToolCallFunction

STEPS = 6


class SmallModel(OpenAIModel):
    """What is no call of a tool is the final answer: a policy that knows no words yet cannot write one."""

    def parse_tool_calls(self, message):
        answer = ChatMessageToolCallFunction(name="final_answer", arguments={"answer": message.content})
        message.tool_calls = [ChatMessageToolCall(id="0", type="function", function=answer)]
        return message


def play(task) -> dict:
    """Plays one task; what it returns is its reward."""
    model = SmallModel(
        "policy",
        os.environ["OPENAI_BASE_URL"],
        os.environ["OPENAI_API_KEY"],
        tool_choice=REMOVE_PARAMETER,  # the framework asks for a call in every answer, which would make another policy
        tools=REMOVE_PARAMETER,  # a larger model reads their schemas; then leave this line out
    )
    agent = ToolCallingAgent([], model, verbosity_level=LogLevel.OFF)
    agent.prompt_templates["system_prompt"] = "You walk to a door."  # its own has some thousand tokens
    way = task.data["door"]  # steps to the east, or to the west if below 0
    for _ in range(STEPS):
        side = "east" if way > 0 else "west"
        answer = agent.run(f"You are in the {task.data['room']}. The door is {abs(way)} steps to the {side}. Which way?")
        way += -1 if str(answer).strip().lower()[:1] < "n" else 1  # any answer is a step, as in openai_agent.py
        if way == 0:
            break
    return {"reward": float(way == 0), "success": way == 0}
