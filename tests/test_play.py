"""The play command: what is printed is what was played, whoever plays."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from steppo.batch import Segment
from steppo.cli import SteppoCLI
from steppo.models import TinyPolicy
from steppo.packing import PaddedPacker
from steppo.play.command import main
from steppo.play.show import Show
from steppo.types import Action, Step, Turn
from tests.callbacks.test_quantization import fit
from tests.cli_helpers import TOY, checkpoint, evaluations
from tests.toy_env import CorridorEnv

TOY_CONFIG = f"--config={TOY}"


def play(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    capsys.readouterr()
    main(args)
    return capsys.readouterr().out


def moves(text: str) -> list[str]:
    return re.findall(r"\d+> (\S+)", text)


def expert_moves(task_index: int) -> list[str]:
    env = CorridorEnv()
    turn = env.reset(env.tasks("valid")[task_index])
    found = []
    while not turn.terminated:
        found.append(env.expert_action() or "")
        turn = env.step(Action(found[-1]))
    return found


def test_the_expert_solves_what_it_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    text = play(capsys, TOY_CONFIG, "--player=expert", "--episodes=2")
    assert moves(text) == expert_moves(0) + expert_moves(1)
    assert text.count("solved: return 1 in") == 2
    assert "goal: Take the coin in room" in text
    assert "You take the coin." in text  # what is seen after the last action too
    assert "2 episodes: success 1.00, return 1" in text
    assert "value" not in text


def test_a_task_is_chosen_by_id_or_index_and_a_split_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    by_index = play(capsys, TOY_CONFIG, "--player=expert", "--task=3", "--split=train")
    by_id = play(capsys, TOY_CONFIG, "--player=expert", "--task=corridor/train/3", "--split=train")
    assert by_index == by_id
    assert "corridor/train/3 · expert" in by_id


def test_random_play_repeats_with_its_seed_and_takes_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    options = [TOY_CONFIG, "--player=random", "--episodes=3", "--data.source.env.max_steps=4", "--data.source.env.length=9"]
    text = play(capsys, *options)
    assert text == play(capsys, *options)
    assert text != play(capsys, *options, "--seed_everything=7")
    assert set(moves(text)) <= {"left", "right", "take"}
    assert "in 4 steps" in text
    assert "not valid" not in text


def test_the_policy_plays_as_it_was_evaluated(toy_run: tuple[SteppoCLI, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Greedy on the panel: success, return and steps of the run's last evaluation."""
    folder = toy_run[1]
    text = play(capsys, f"--ckpt_path={checkpoint(folder)}", "--episodes=8")
    record = evaluations(folder)[-1]
    expected = (
        f"8 episodes: success {record['success_rate']:.2f}, return {record['return_mean']:.3g}, "
        f"steps {record['steps_mean']:.1f}"
    )
    assert expected in text
    assert "policy, temperature 0" in text
    assert "untrained" not in text
    assert re.search(r"value before -?\d\.\d+", text)
    assert max(abs(float(value)) for value in re.findall(r"value before (-?[\d.]+)", text)) > 0  # the head starts at 0


class KeepSteps(Show):
    """Keeps what it shows."""

    steps: ClassVar[list[Step]] = []

    def turn(self, step: Step | None, turn: Turn) -> None:
        self.steps += [] if step is None else [step]
        super().turn(step, turn)


def test_adapters_play_as_they_were_trained(
    tiny_policy: TinyPolicy, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Policy and critic are those that ``validate`` loads, and neither is the base."""
    monkeypatch.setattr(KeepSteps, "steps", [])
    monkeypatch.setattr("steppo.play.command.Show", KeepSteps)
    tiny_policy.model.save_pretrained(tmp_path / "base")
    tiny_policy.tokenizer.save_pretrained(tmp_path / "base")
    base, options = str(tmp_path / "base"), ["--model.objective.kl=loss", "--quantization.gradient_checkpointing=true"]
    far = ["--warm_start.updates=20", "--model.critic_optimizer.lr=0.02", "--evaluation.before_training=false"]
    fit(tmp_path / "run", base, *options, *far)
    trained = f"--ckpt_path={checkpoint(tmp_path / 'run')}"
    text = play(capsys, trained, "--episodes=4")
    module = fit(tmp_path / "again", base, *options, trained, command="validate").model

    steps = KeepSteps.steps
    ((rows, batch),) = PaddedPacker().pack([Segment(step.prompt_ids, step.action_ids) for step in steps], 10**6)
    logprobs = torch.from_numpy(np.concatenate([steps[row].behaviour_logprobs for row in rows]))
    values = torch.tensor([float(value) for value in re.findall(r"value before (-?[\d.]+)", text)])[rows]
    with torch.no_grad():
        ones = torch.ones(len(logprobs))
        torch.testing.assert_close(logprobs, module.policy(batch, ones).logprobs_A, rtol=0, atol=1e-4)
        torch.testing.assert_close(values, module.critic(batch, batch.value_at_N, None), rtol=0, atol=6e-4)
        of_base = tiny_policy(batch, ones)
        assert float((logprobs - of_base.logprobs_A).abs().max()) > 0.01
        assert float((values - module.critic.head(of_base.hidden[batch.value_at_N])).abs().max()) > 0.01


def test_without_a_checkpoint_the_policy_is_untrained(capsys: pytest.CaptureFixture[str]) -> None:
    text = play(capsys, TOY_CONFIG, "--temperature=1", "--data.source.env.max_steps=2")
    assert "untrained: there is no --ckpt_path" in text
    assert "policy, temperature 1" in text
    assert len(moves(text)) == 2 or "not valid" in text


def test_a_human_plays_by_number_and_by_word(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # Task 3 of the panel: from room 3 to room 2.
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n9\nfly\x1b[31m\n1\nTAKE\n"))
    text = play(capsys, TOY_CONFIG, "--player=human", "--task=3")
    assert "There are 2 commands." in text
    assert moves(text) == ["fly\ufffd[31m", "left", "take"]
    assert "[31m' is not possible here." in text  # nothing that is said steers the terminal
    assert "\x1b" not in text
    assert text.count("not valid") == 1
    assert "solved: return 0.9 in 3 steps (terminated)" in text


SEARCH = """
    from steppo.envs import Env, TextGameEnv
    from steppo.types import Message, Task, ToolSpec, Turn

    class Search(TextGameEnv):
        max_steps = 9

        def tasks(self, split):
            return [Task("search")]

        def reset(self, task):
            return Turn("A page.", "Find it.", ("search[...]", "think: ...", "next"))

        def command(self, command):
            return Turn(f"After <{command}>.", "", ("finish[...]", "next"), terminated=command.startswith("finish"))

    class Tools(Env):
        max_steps = 9
        tools = (ToolSpec("find"),)

        def tasks(self, split):
            return [Task("tools")]

        def reset(self, task):
            return Turn("A page.", "Find it.")

        def step(self, action):
            found = tuple(Message("tool", f"{call.name}: no page", call.id) for call in action.tool_calls)
            return Turn(f"After <{action}>.", messages=found, terminated=not found)
    """


@pytest.fixture
def search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module of that name, also for workers."""
    (tmp_path / "search.py").write_text(textwrap.dedent(SEARCH))
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("search", None)


def test_a_human_fills_in_open_commands(
    search: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("1\n\u00b2\nSearch[a  ladder]\nsearch[it]\n2\n1\nfinish[ ]\nfinish[3]\n"))
    text = play(capsys, TOY_CONFIG, "--player=human", "--data.source.env=search.Search")
    assert "1 search[...]   2 think: ...   3 next" in text
    assert text.count("Type it, with words of your own: search[...]") == 1
    assert text.count("Type it, with words of your own: finish[...]") == 1
    said = ["\u00b2", "search[a ladder]", "search[it]", "next", "finish[ ]", "finish[3]"]
    assert re.findall(r"\d+> (.+?)  (?:said|reward)", text) == said
    assert "After <finish[3]>." in text
    assert text.count("not valid") == 3
    assert "'search[it]' is not possible here." in text


@pytest.mark.parametrize(("env", "why"), [("Search", ""), ("Tools", "no commands are shown here")])
def test_random_play_has_no_words_of_its_own(env: str, why: str, search: None, capsys: pytest.CaptureFixture[str]) -> None:
    options = [TOY_CONFIG, "--player=random", f"--data.source.env=search.{env}"]
    if not why:
        assert moves(play(capsys, *options)) == ["next"] * 9
        return
    with pytest.raises(SystemExit):
        main(options)
    assert capsys.readouterr().err.splitlines()[-1] == f"error: no episode could be played: NoAction: {why}"


def test_a_human_calls_tools(search: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    call = '<tool_call>{"name": "find", "arguments": {"what": "it"}}</tool_call>'
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{call}\n{call.replace('find', 'walk')}\n1\n"))
    text = play(capsys, TOY_CONFIG, "--player=human", "--data.source.env=search.Tools")
    assert re.findall(r"After <(.*)>", text) == ['find({"what": "it"})'] * 2 + ["1"]  # again after what was refused
    assert text.count("find: no page") == 2
    assert "The tool call names 'walk', and there is no such tool." in text


@pytest.mark.parametrize("words", ["1\nquit\nleft\n", "1\n"])
def test_a_human_may_leave(words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(words))
    text = play(capsys, TOY_CONFIG, "--player=human", "--task=3", "--episodes=2")
    assert len(moves(text)) == 1
    assert text.endswith("left\n")
    assert "solved" not in text


MISTAKES = {
    "player": (["--player=nobody"], "invalid choice: 'nobody'"),
    "split": (["--player=expert", "--split=dev"], "no split 'dev'"),
    "task": (["--player=expert", "--task=99"], "split 'valid' has no task '99'; give an index below 8"),
    "no_tasks": (["--player=expert", "--data.source.env.num_tasks=0"], "split 'valid' of the environment is empty"),
    "episodes": (["--episodes=0"], "--episodes must be at least 1"),
    "number": (["--episodes=many"], "argument --episodes"),
    "checkpoint": (["--ckpt_path=nowhere.ckpt"], "there is no checkpoint nowhere.ckpt"),
    "option": (["--player=expert", "--data.source.env.lenght=3"], "did you mean data.source.env.length?"),
    "broken": (
        [
            "--player=expert",
            "--task=1",
            "--data.source.env=tests.toy_env.FaultyEnv",
            "--data.source.env.fail_tasks=[corridor/valid/1]",
        ],
        "no episode could be played: RuntimeError: broken on purpose",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_clear_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    args, message = MISTAKES[name]
    with pytest.raises(SystemExit) as stopped:
        main([TOY_CONFIG, *args])
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line


def test_no_config_at_all_is_one_clear_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([])
    assert "error: give a --config" in capsys.readouterr().err


SPY = """
    import os
    import sys
    from steppo.envs import Env
    from steppo.types import Task, Turn

    class Spy(Env):
        max_steps = 3

        def tasks(self, split):
            return [Task("spy")]

        def reset(self, task):
            return self.see()

        def step(self, action):
            return self.see()

        def see(self):
            return Turn(f"process {os.getpid()}, torch: {'torch' in sys.modules}", commands=("wait",))
    """


def test_workers_have_no_torch_and_end_with_ctrl_c(tmp_path: Path) -> None:
    """As a command, not in process: what workers import depends on how the program was started."""
    (tmp_path / "spy.py").write_text(textwrap.dedent(SPY))
    command = [sys.executable, "-m", "steppo.play", TOY_CONFIG, "--player=human", "--data.source.env=spy.Spy"]
    root = str(TOY.parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, str(tmp_path)]), "PYTHONUNBUFFERED": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # Where the suite runs in the background, its children would ignore Ctrl-C.
    heed: Any = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with subprocess.Popen(command, env=environment, text=True, **pipes, **heed) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("1\n")
        process.stdin.flush()
        seen: list[str] = []
        while not seen or "1> wait" not in seen[-1]:
            seen.append(process.stdout.readline())
            assert seen[-1], process.stderr and process.stderr.read()
        seen.append(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted" in rest
    assert "Traceback" not in errors
    (worker,) = set(re.findall(r"process (\d+), torch: False", "".join(seen)))
    with pytest.raises(ProcessLookupError):
        os.kill(int(worker), 0)
