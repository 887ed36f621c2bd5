"""A user's own parts of what is said and read: one file and one config each, through the command line."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from steppo.cli import SteppoCLI
from steppo.types import Step
from tests.cli_helpers import evaluations, run

FILES = {
    "my_tools": """
        from steppo.envs import Env
        from steppo.types import Action, Message, Task, ToolCall, ToolSpec, Turn

        LOOK = ToolSpec("look", "Looks at a shelf.", {
            "type": "object", "properties": {"shelf": {"type": "integer"}}, "required": ["shelf"],
        })

        class Shelves(Env):
            max_steps = 4

            def __init__(self, note: str = "", wrong: bool = False):
                schema = {"type": "object", "properties": {"a": {"type": "text"}}} if wrong else {"type": "object"}
                self.tools = [LOOK, ToolSpec("leave", note, schema)]

            def tasks(self, split):
                return [Task(f"{split}/{n}", {"on": 1 + n % 2}) for n in range(8)]

            def reset(self, task):
                self.on, self.seen = task.data["on"], False
                return Turn("There are two shelves.", "Which shelf is the jar on?")

            def step(self, action):
                if not action.tool_calls:
                    won = action.text == f"shelf {self.on}"
                    return Turn("Well.", reward=float(won), terminated=True, success=won)
                self.seen = True
                shelves = [call.arguments.get("shelf") for call in action.tool_calls]
                seen = [Message("tool", "A jar." if shelf == self.on else "Dust.", call.id)
                        for shelf, call in zip(shelves, action.tool_calls)]
                return Turn(messages=seen, action_valid=not set(shelves) - {1, 2})

            def expert_action(self):
                look = Action(tool_calls=(ToolCall("look", {"shelf": self.on}),), text="I look.")
                return f"shelf {self.on}" if self.seen else look
        """,
    "my_engine": """
        import numpy as np
        from steppo.engines import Engine
        from steppo.types import Completion

        class Says(Engine):
            logprob_tolerance = float("inf")

            def __init__(self, texts: list[str]):
                self.texts = texts
                self.said = {}
                self.queue = []

            def bind(self, policy):
                self.tokenizer = policy.tokenizer

            def submit(self, request):
                self.queue.append(request)

            def release(self, session_id):
                self.said.pop(session_id)

            def poll(self):
                queue, self.queue = self.queue, []
                return [self.answer(request) for request in queue]

            def answer(self, request):
                number = self.said[request.session_id] = self.said.get(request.session_id, -1) + 1
                ids = self.tokenizer.encode(self.texts[number % len(self.texts)]) + [self.tokenizer.eos_token_id]
                return Completion(request.id, np.array(ids, np.int32), np.zeros(len(ids), np.float32), "stop")
        """,
    "my_context": """
        from steppo.rendering import ContextPolicy
        from steppo.types import Message

        class LastAnswer(ContextPolicy):
            def __init__(self, last: str, instructions: str = ""):
                super().__init__(instructions)
                self.last = last

            def messages(self, turns, steps):
                start = [self.opening(turns[0])]
                new = self.following(turns[-1], turns[-2]) if steps else []
                return [*start, steps[-1], *new, Message("user", self.last)] if steps else start
        """,
    "my_renderer": """
        from dataclasses import replace
        from steppo.rendering import Renderer
        from steppo.types import Message

        class Framed(Renderer):
            def __init__(self, frame: str = "#"):
                super().__init__()
                self.frame = frame

            def render(self, messages):
                framed = lambda text: f"{self.frame} {text} {self.frame}"
                return super().render([
                    replace(part, content=framed(part.content)) if isinstance(part, Message) else part for part in messages
                ])
        """,
    "my_parser": """
        from steppo.rendering import ActionParser, ParsedAction
        from steppo.types import Action, ToolCall

        class Slashes(ActionParser):
            def __init__(self, sign: str = "/"):
                self.sign = sign

            def bind(self, tools, renderer):
                self.names = [tool.name for tool in tools]

            def tools_text(self, tools):
                return f"Call {self.sign}look NUMBER."

            def parse(self, text, turn):
                if not text.startswith(self.sign):
                    return ParsedAction(Action(text=text))
                name, _, shelf = text.removeprefix(self.sign).partition(" ")
                if name not in self.names or not shelf.isdigit():
                    return ParsedAction(None, "There is no such call.")
                return ParsedAction(Action(tool_calls=(ToolCall(name, {"shelf": int(shelf)}, "0"),)))

            def answer(self, action, turn):
                return action.text or "".join(f"{self.sign}{one.name} {one.arguments['shelf']}" for one in action.tool_calls)
        """,
    "my_source": """
        from steppo.rollouts import EnvSource

        class Patient(EnvSource):
            def __init__(self, *args, patience: int = 1, **kwargs):
                super().__init__(*args, **kwargs)
                self.patience = patience
                self.rounds = {}

            def collect(self, groups, config, player=None, on_step=None):
                played = self.rounds[config.name] = []
                for episodes in super().collect(groups, config, player, on_step):
                    played.append(episodes)
                    yield episodes
        """,
}
CALLS = '<tool_call>[{"name": "look", "arguments": {"shelf": 1}}, {"name": "look", "arguments": {"shelf": 2}}]</tool_call>'
TEXTS = ["texts:", "  - |-", f"    {CALLS}", "  - <tool_call>{", "  - shelf 2"]
WITH_TOOLS = {
    "env": ["my_tools.Shelves"],
    "engine": ["", "  class_path: my_engine.Says", *(f"  {line}" for line in TEXTS)],
    "context": ["AppendContext"],
    "max_prompt_tokens": ["900"],
    "max_new_tokens": ["100"],
}

Play = Callable[..., tuple[SteppoCLI, list[list[Step]]]]


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Play]:
    """Plays and learns one iteration with a config of ``data.source``; gives the steps of its episodes."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for name, code in FILES.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(code))
    monkeypatch.syspath_prepend(folder)

    def play(parts: dict[str, list[str]], *options: str) -> tuple[SteppoCLI, list[list[Step]]]:
        lines = [f"{name}: {first}\n" + "".join(f"{line}\n" for line in rest) for name, (first, *rest) in parts.items()]
        config = tmp_path / "mine.yaml"
        config.write_text("data:\n  source:\n" + textwrap.indent("".join(lines), "    "))
        quick = [
            "--trainer.max_epochs=1",
            "--warm_start.updates=0",
            "--model.policy.max_positions=1024",
            "--data.eval_tasks=4",
        ]
        cli = run(tmp_path / "run", "--config", str(config), "--model.policy.max_positions=1024", *quick, *options)
        return cli, [list(episode.steps) for episode in cli.datamodule.buffer.experience.episodes]

    yield play
    for name in FILES:
        sys.modules.pop(name, None)


def text_of(cli: SteppoCLI, step: Step) -> str:
    return cli.model.policy.tokenizer.decode([*step.prompt_ids, *step.action_ids])


def test_an_environment_with_tools_and_an_engine(play: Play, tmp_path: Path) -> None:
    cli, episodes = play(WITH_TOOLS)
    assert len(episodes) == 8
    for steps in episodes:
        assert [step.action for step in steps] == ['look({"shelf": 1}); look({"shelf": 2})', "<tool_call>{", "shelf 2"]
        assert [step.action_valid for step in steps] == [True, False, True]
        text = text_of(cli, steps[-1])
        assert text.count('"name": "look", "description": "Looks at a shelf."') == 1
        jar = "Dust.\n</tool_response>\n<tool_response>\nA jar." if steps[-1].reward else "A jar.\n</tool_response>\n"
        assert f"{CALLS}<|end|>\n<tool_response>\n{jar}" in text
        assert "not valid JSON" in text
        assert text.endswith("\n>shelf 2<|end|>")
    assert {steps[-1].reward for steps in episodes} == {0.0, 1.0}
    assert [record["success_rate"] for record in evaluations(tmp_path / "run")] == [0.5, 0.5]


def test_demonstrations_of_an_expert_that_calls_tools(play: Play) -> None:
    parts = WITH_TOOLS | {"engine": ["HFEngine"]}
    warm = ["--warm_start.actions=expert", "--warm_start.updates=2", "--warm_start.episodes=8", "--warm_start.batch_size=8"]
    cli, episodes = play({"class_path": ["my_source.Patient"], **parts}, *warm)
    shown = [episode for episodes in cli.datamodule.source.rounds["warm_start"] for episode in episodes]
    assert len(shown) == len(episodes) == 8
    for episode in shown:
        call, answer = (cli.datamodule.source.renderer.decode_action(step.action_ids) for step in episode.steps)
        shelf = answer.removeprefix("shelf ")
        form = '<tool_call>\n{"name": "look", "arguments": {"shelf": %s}}\n</tool_call>'
        assert (call, episode.success) == (f"I look.\n{form % shelf}", True)


def test_a_context(play: Play) -> None:
    cli, episodes = play(WITH_TOOLS | {"context": ["", "  class_path: my_context.LastAnswer", "  last: Which?"]})
    for first, second, third in episodes:
        assert "Which?" not in text_of(cli, first)
        assert text_of(cli, second).count("\nWhich?\n>") == text_of(cli, third).count("\nWhich?\n>") == 1
        assert [CALLS in text_of(cli, step) for step in (first, second, third)] == [True, True, False]


def test_a_renderer(play: Play) -> None:
    state = {"context": ["", "  class_path: StateContext", "  instructions: Be brief."]}
    cli, episodes = play(WITH_TOOLS | state | {"renderer": ["", "  class_path: my_renderer.Framed", "  frame: '%%'"]})
    for step in (step for steps in episodes for step in steps):
        assert text_of(cli, step).startswith("%% Be brief. %%\n\nYou may call tools.")
        assert "\n%% Which shelf is the jar on?\n" + ("Done: " if step.index else "") in text_of(cli, step)


def test_a_parser(play: Play, tmp_path: Path) -> None:
    said = {"engine": ["", "  class_path: my_engine.Says", "  texts: ['!look 2', '!walk 1', 'shelf 2']"]}
    cli, episodes = play(WITH_TOOLS | said | {"parser": ["", "  class_path: my_parser.Slashes", "  sign: '!'"]})
    for steps in episodes:
        assert [step.action for step in steps] == ['look({"shelf": 2})', "!walk 1", "shelf 2"]
        assert [step.action_valid for step in steps] == [True, False, True]
        assert text_of(cli, steps[0]).count("Call !look NUMBER.") == 1
    assert evaluations(tmp_path / "run")[-1]["success_rate"] == 0.5


def test_a_source(play: Play) -> None:
    cli, episodes = play({"class_path": ["my_source.Patient"], "patience": ["3"], **WITH_TOOLS, "num_slots": ["3"]})
    source = cli.datamodule.source
    assert (type(source).__name__, source.patience, source.num_slots) == ("Patient", 3, 3)
    assert [len(groups) for groups in source.rounds.values()] == [4, 8]  # the panel's twice
    assert len(episodes) == 8


MISTAKES = {
    "a parser of commands": (
        ["--data.source.env=my_tools.Shelves", "--data.source.parser=CommandParser"],
        "CommandParser reads no calls of tools, and the environment has some: use HermesParser",
    ),
    "commands in calls": (
        ["--data.source.env=my_tools.Shelves", "--data.source.parser=ToolCallParser"],
        "ToolCallParser reads no calls of tools, and the environment has some: use HermesParser",
    ),
    "a parser of calls": (
        ["--data.source.parser=HermesParser"],
        "HermesParser reads calls of tools, and the environment has none: use CommandParser",
    ),
    "a wrong schema": (
        ["--data.source.env=my_tools.Shelves", "--data.source.env.wrong=true"],
        "the schema of the tool leave is wrong: 'text' is not",
    ),
    "markup": (
        ["--data.source.env=my_tools.Shelves", "--data.source.env.note=Ends with <|end|>"],
        "the tool leave cannot be shown: <|end|> in it is markup of the model's prompts",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_parts_that_do_not_fit_are_one_clear_line(name: str, play: Play, capsys: pytest.CaptureFixture[str]) -> None:
    options, message = MISTAKES[name]
    with pytest.raises(SystemExit) as stopped:
        play({"num_slots": ["2"]}, *options)
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line
