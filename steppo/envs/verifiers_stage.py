"""Where episodes of verifiers are played: its own loop, and a model's endpoint that waits for actions from elsewhere.

Imports verifiers, so this is imported where that is used.
"""

from __future__ import annotations

import asyncio
import json
import sys
import uuid
import weakref
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import httpx
import verifiers.v1 as vf
from aiohttp import web
from verifiers.v1.configs.agent import agent_config_fields
from verifiers.v1.dialects.chat import message_to_wire
from verifiers.v1.harnesses.utils.mcp import call_mcp, connect_mcp

from steppo.errors import ConfigError, WrongValue, in_short
from steppo.types import Action, Message

__all__ = ["Chat"]  # what verifiers looks for

_CHAT = "steppo_chat"
sys.modules[_CHAT] = sys.modules[__name__]  # verifiers finds a harness by the name of a top-level module
_REPLACED = ("bash", "null")  # harnesses that Chat stands in for: the second as it is, the first without its shell
_LONGEST_REQUEST = 2**30


class ChatConfig(vf.HarnessConfig):
    """Names ``Chat``."""

    id: str = _CHAT


class Chat(vf.Harness[ChatConfig]):
    """Asks the model, and calls the task's own tools, until it answers without a call.

    Like verifiers' ``null``, but in this process: that starts a program, which installs what it needs.
    """

    APPENDS_SYSTEM_PROMPT = True
    SUPPORTS_MCP = True
    SUPPORTS_RESUME = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(
        self,
        ctx: vf.ModelContext,
        trace: vf.Trace,
        runtime: vf.Runtime,
        endpoint: str,
        secret: str,
        mcp_urls: dict[str, str],
        data: vf.TaskData,
    ) -> vf.ProgramResult:
        system, prompt = self.resolve_prompt(data)
        messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        if isinstance(prompt, str):
            messages.append({"role": "user", "content": prompt})
        else:
            messages += map(message_to_wire, prompt or [])
        async with AsyncExitStack() as stack:
            servers = {name: {"url": url, "timeout": self.config.tool_timeout} for name, url in mcp_urls.items()}
            tools, places, connections = await connect_mcp({"mcpServers": servers}, stack)
            http = await stack.enter_async_context(httpx.AsyncClient(timeout=None, trust_env=False))
            request = {"model": ctx.model, "messages": messages} | ({"tools": tools} if tools else {})
            key = {"Authorization": f"Bearer {secret}"}
            while True:
                answer = await http.post(f"{endpoint}/chat/completions", json=request, headers=key)
                if answer.status_code != 200:  # also where the task has ended the dialogue: then the trace says so
                    return vf.ProgramResult(exit_code=1, stdout="", stderr=answer.text)
                message = answer.json()["choices"][0]["message"]
                messages.append(message)
                if not message.get("tool_calls"):
                    return vf.ProgramResult(exit_code=0, stdout="", stderr="")
                for call in message["tool_calls"]:
                    name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
                    content = await call_mcp(connections, places, name, arguments)
                    messages.append({"role": "tool", "tool_call_id": call["id"], "name": name, "content": content})


@dataclass(frozen=True)
class Question:
    """What the model is asked: what it is told all along, and what was said since its last answer."""

    system: str
    messages: tuple[Message, ...]


class Stage:
    """An environment of verifiers and the loop that it lives in, which runs while somebody waits for a dialogue."""

    def __init__(self, env: vf.Env) -> None:
        self.env = env
        self.name = env.config.env_id
        self.asked: dict[str, Dialogue] = {}  # by the model that is asked
        runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self.loop = runner.get_loop()
        self._stack = AsyncExitStack()
        self.close = weakref.finalize(self, _closed, runner, self._stack)  # also when the process ends
        self.endpoint = self.loop.run_until_complete(self._open())

    def dialogue(self, data: Mapping[str, Any]) -> Dialogue:
        """Begins an episode of the task with this data, as far as its first question."""
        kind = type(self.env.taskset).task_type()
        return Dialogue(self, kind(kind.data_type().model_validate(data), self.env.config.taskset.task))

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    async def _open(self) -> str:
        """Starts what episodes share. Gives the address of the model."""
        app = web.Application(client_max_size=_LONGEST_REQUEST)
        app.router.add_post("/v1/chat/completions", self._answer)
        runner = web.AppRunner(app, shutdown_timeout=1.0)
        await runner.setup()
        self._stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        await self._stack.enter_async_context(self.env.serving())
        return f"http://127.0.0.1:{runner.addresses[0][1]}/v1"

    async def _answer(self, request: web.Request) -> web.Response:
        asked = await request.json()
        message = await self.asked[asked["model"]].answer_to(asked)
        reason = "tool_calls" if message.get("tool_calls") else "stop"
        choice = {"index": 0, "finish_reason": reason, "message": message}
        about = {"id": uuid.uuid4().hex, "object": "chat.completion", "created": 0, "model": asked["model"]}
        return web.json_response({**about, "choices": [choice]})


def _closed(runner: asyncio.Runner, stack: AsyncExitStack) -> None:
    runner.get_loop().run_until_complete(stack.aclose())
    runner.close()


class Dialogue:
    """One episode: verifiers plays it, and waits for each answer of the model."""

    def __init__(self, stage: Stage, task: vf.Task) -> None:
        self._stage = stage
        self._model = f"steppo-{uuid.uuid4().hex}"
        self._heard: list[dict[str, Any]] = []  # all that was said up to the last answer
        self._asked: asyncio.Future[dict[str, Any]] = stage.loop.create_future()
        self._reply: asyncio.Future[dict[str, Any]] = stage.loop.create_future()
        stage.asked[self._model] = self
        client = vf.EvalClientConfig(base_url=stage.endpoint, api_key_var="STEPPO_NO_KEY")
        context = vf.ModelContext(model=self._model, client=client)
        self._play = stage.loop.create_task(stage.env.run_episode(task, context))

    def question(self) -> Question | None:
        """What the model is asked next; ``None``: the episode is over.

        Raises:
            WrongValue: It does not go on with the same dialogue, or with what is no text.
        """
        waited = asyncio.wait({self._play, self._asked}, return_when=asyncio.FIRST_COMPLETED)
        self._stage.loop.run_until_complete(waited)
        return self._read(self._asked.result()) if self._asked.done() else None

    def tools(self) -> list[dict[str, Any]]:
        """What the model may call, as it is told with its first question: name, description, parameters."""
        if self.question() is None:
            self.trace()
            raise WrongValue("its first task ends before the model is asked")
        names = ("name", "description", "parameters")
        return [{name: tool["function"][name] for name in names} for tool in self._asked.result().get("tools", [])]

    def trace(self) -> vf.Trace:
        """What was played. Raises ``WrongValue`` where verifiers failed."""
        episode = self._play.result()
        traces = [trace for trace in episode.traces if trace.agent.config.model == self._model]
        if episode.ok and len(traces) == 1:
            return traces[0]
        errors = [*episode.errors, *(error for trace in episode.traces if not trace.ok for error in trace.errors)]
        why = f"{errors[-1].type}: {errors[-1].message}" if errors else f"the model was {len(traces)} agents"
        raise WrongValue(f"{self._stage.name} has failed: {in_short(why)}")

    def answer(self, action: Action) -> None:
        """Answers the question that was asked."""
        calls = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": json.dumps(call.arguments)}}
            for call in action.tool_calls
        ]
        message: dict[str, Any] = {"role": "assistant", "content": action.text if calls else str(action)}
        message |= {"tool_calls": calls} if calls else {}
        message |= {"reasoning_content": action.reasoning} if action.reasoning else {}
        self._heard.append(message)
        reply, self._reply = self._reply, self._stage.loop.create_future()
        self._asked = self._stage.loop.create_future()
        reply.set_result(message)

    async def answer_to(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Waits for an answer."""
        if self._asked.done():
            raise web.HTTPConflict(text="this model answers one question after the other")
        self._asked.set_result(asked)
        return await self._reply

    def close(self) -> None:
        """Ends it, wherever it is."""
        del self._stage.asked[self._model]
        self._reply.cancel()
        self._play.cancel()
        self._stage.loop.run_until_complete(asyncio.gather(self._play, return_exceptions=True))

    def __enter__(self) -> Dialogue:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _read(self, asked: dict[str, Any]) -> Question:
        messages = asked["messages"]
        system = [message for message in messages if message["role"] in ("system", "developer")]
        said = [message for message in messages if message not in system]
        known = len(self._heard)
        if list(map(_gist, said[:known])) != list(map(_gist, self._heard)) or not said[known:]:
            raise WrongValue(f"{self._stage.name} does not go on with one dialogue: its next question has another beginning")
        self._heard, new = said, said[known:]
        if wrong := next((message["role"] for message in new if message["role"] not in ("user", "tool")), None):
            raise WrongValue(f"{self._stage.name} speaks as {wrong}, which only the policy does")
        said_now = tuple(Message(each["role"], self._text(each), each.get("tool_call_id", "")) for each in new)
        return Question("\n\n".join(map(self._text, system)), said_now)

    def _text(self, message: Mapping[str, Any]) -> str:
        content = message["content"]
        if isinstance(content, str):
            return content
        if wrong := next((part["type"] for part in content if part["type"] != "text"), None):
            raise WrongValue(f"{self._stage.name} says something that is no text: {wrong}")
        return "\n".join(part["text"] for part in content)


def _gist(message: Mapping[str, Any]) -> tuple[str, Any]:
    """What tells messages apart; verifiers may write an answer anew."""
    return message["role"], None if message["role"] == "assistant" else message["content"]


def loaded(settings: Mapping[str, Any]) -> vf.Env:
    """The environment of these settings, with ``Chat`` as the agent that is to be played, and as others that chat."""
    config = vf.resolve_env_config(dict(settings))
    agents = agent_config_fields(config)
    free = [name for name, agent in agents.items() if agent.model is None]
    if len(free) != 1:
        raise ConfigError(f"of its agents ({', '.join(agents)}) all but one need a model, not {len(agents) - len(free)}")
    default = vf.default_harness_id(config.taskset.id)
    local = {}
    for name, agent in agents.items():
        harness = agent.harness.id if agent.harness else default
        if harness in _REPLACED:
            local[name] = agent.model_copy(update={"harness": ChatConfig(), "runtime": vf.SubprocessConfig()})
        elif name in free:
            raise ConfigError(f"its agent is the program {harness}, whose steps are its own; name the harness null")
    return vf.load_environment(config.model_copy(update=local))
