"""An agent on the openai package. It looks for a door, a step at a time, and knows nothing of training.

python train.py fit --config configs/agent/quickstart.yaml
"""

from __future__ import annotations

from openai import OpenAI

STEPS = 6


def play(task) -> dict:
    """Plays one task; what it returns is its reward. ``OPENAI_BASE_URL`` and ``OPENAI_API_KEY`` are set for each task."""
    client = OpenAI()
    way = task.data["door"]  # steps to the east, or to the west if below 0
    for _ in range(STEPS):
        question = f"The door is {abs(way)} steps to the {'east' if way > 0 else 'west'}. Which way?"
        completion = client.chat.completions.create(model="policy", messages=[{"role": "user", "content": question}])
        answer = (completion.choices[0].message.content or "").strip().lower()
        way += -1 if answer[:1] < "n" else 1  # letters before n: east; so a policy that knows no word yet walks about, too
        if way == 0:
            return {"reward": 1.0, "success": True}
    return {"reward": 0.0, "success": False}
