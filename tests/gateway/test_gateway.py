"""The gateway before the unmodified openai package and bare HTTP: what is recorded, what is refused."""

from __future__ import annotations

import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import openai
import pytest
from gateway_fuzz import Rig, fuzz, number_of

from steppo.engines import Engine, HFEngine, PlainEngine
from steppo.gateway.session import Session
from steppo.gateway.wire import Said
from steppo.models import TinyPolicy
from steppo.types import Completion, Request

HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {
    "type": "function",
    "function": {"name": "find", "parameters": {"type": "object", "properties": {"what": {"type": "string"}}}},
}
CALL = 'Wait.\n<tool_call>\n{"name": "find", "arguments": {"what": "ö"}}\n</tool_call>'


class ScriptedEngine(Engine):
    """Says what ``say`` makes of a request, after as many ticks as ``ticks`` says; keeps all requests."""

    def __init__(self, policy: TinyPolicy) -> None:
        self.policy = policy
        self.say: Callable[[Request], str] = lambda request: f"Answer {request.seed % 1000}"
        self.seen: list[Request] = []
        self.released: list[str] = []
        self.hold = threading.Event()
        self.hold.set()
        self._queue: list[Request] = []

    def submit(self, request: Request) -> None:
        self.seen.append(request)
        self._queue.append(request)

    def poll(self) -> list[Completion]:
        if not self.hold.wait(0.2):  # so often it may be silent as an answer may have tokens: eight seconds
            return []
        asked, self._queue = self._queue, []
        return [self._answer(request) for request in asked]

    def _answer(self, request: Request) -> Completion:
        said = self.say(request)
        ids = np.asarray([*self.policy.tokenizer.encode(said), self.policy.tokenizer.eos_token_id], np.int32)
        return Completion(request.id, ids, -np.arange(len(ids), dtype=np.float32), "stop")

    def release(self, session_id: str) -> None:
        self.released.append(session_id)
        self._queue = [request for request in self._queue if request.session_id != session_id]


class Bench(Rig):
    """A gateway with an engine, for one test."""

    def __init__(self, policy: TinyPolicy, engine: Engine, **settings: Any) -> None:
        super().__init__(policy, engine, 20, 900, 40, **({"update_wait_s": 0.1} | settings))

    def client(self, session: Session, **options: Any) -> Any:
        options = {"max_retries": 0, "timeout": 30} | options
        return openai.OpenAI(base_url=self.gateway.base_url(session), api_key=session.key, **options)

    def post(self, path: str, body: Any, key: str = "", method: str = "POST", **headers: str) -> tuple[int, Any, Any]:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        if key:
            given["Authorization"] = f"Bearer {key}"
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        status, text, told = self.send(method, path, data, given)
        return status, json.loads(text) if text else None, told

    def chat(self, session: Session, messages: Any = None, **options: Any) -> tuple[int, Any, Any]:
        headers = {name: options.pop(name) for name in list(options) if name.startswith("x_") or name == "idempotency_key"}
        body = {"model": "policy", "messages": messages or HELLO} | options
        return self.post(f"/sessions/{session.id}/v1/chat/completions", body, session.key, **headers)

    @contextmanager
    def half(self, session: Session) -> Iterator[None]:
        """A call that nobody waits for once this is left."""
        body = json.dumps({"model": "policy", "messages": HELLO})
        head = f"POST /sessions/{session.id}/v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {session.key}"
        with socket.create_connection(self.place) as connection:
            connection.sendall(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
            yield


@pytest.fixture(scope="module")
def policy() -> TinyPolicy:
    policy = TinyPolicy(hidden_size=32, seed=0)
    policy.build(lambda: ["Hello Answer Wait. find what user assistant"])
    return policy


@pytest.fixture
def bench(policy: TinyPolicy) -> Iterator[Bench]:
    made = Bench(policy, ScriptedEngine(policy))
    yield made
    made.gateway.close()


def ids_of(policy: TinyPolicy, text: str) -> list[int]:
    return policy.tokenizer.encode(text, add_special_tokens=False)


def test_a_dialogue_is_extended_in_token_space(bench: Bench, policy: TinyPolicy) -> None:
    session = bench.open()
    engine = bench.engine
    assert isinstance(engine, ScriptedEngine)
    with bench.asking():
        client = bench.client(session)
        assert [model.id for model in client.models.list()] == ["policy"]
        messages: list[Any] = list(HELLO)
        for number in range(3):
            completion = client.chat.completions.create(model="policy", messages=messages)
            message = completion.choices[0].message
            assert (completion.choices[0].finish_reason, message.role) == ("stop", "assistant")
            messages += [message, {"role": "user", "content": f"And {number}?"}]
        usage = completion.usage
    steps = session.steps(is_over=True)
    for step, request in zip(steps, engine.seen, strict=True):
        assert step.prompt_ids.tolist() == request.prompt_ids.tolist()
        assert step.behaviour_logprobs.tolist() == list(range(0, -len(step.action_ids), -1))
    for before, step in itertools.pairwise(steps):
        both = [*before.prompt_ids.tolist(), *before.action_ids.tolist()]
        assert step.prompt_ids[: len(both)].tolist() == both
    assert [step.index for step in steps] == [0, 1, 2]
    assert [step.terminated for step in steps] == [False, False, True]
    assert {step.agent_id for step in steps} == {"agent"}
    assert [step.policy_version for step in steps] == [7, 7, 7]
    assert [request.seed for request in engine.seen] == [number_of(f"session|agent|{n}") for n in range(3)]
    assert [step.observation for step in steps] == ["Hello", "And 0?", "And 1?"]
    assert usage.prompt_tokens == len(steps[-1].prompt_ids)
    assert usage.completion_tokens == len(steps[-1].action_ids)


def test_a_rewritten_history_is_another_prompt_of_the_same_chain(bench: Bench) -> None:
    session = bench.open()
    with bench.asking():
        for content in ("one", "two", "three"):
            assert bench.chat(session, [{"role": "user", "content": content}])[0] == 200
        said = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "Never said"}, *HELLO]
        assert bench.chat(session, said)[0] == 200
    steps = session.steps(is_over=True)
    assert [(step.agent_id, step.observation) for step in steps] == [
        ("agent", "one"),
        ("agent", "two"),
        ("agent", "three"),
        ("agent", "Hello"),
    ]
    assert b"Never said" in bench.policy.tokenizer.decode(steps[3].prompt_ids.tolist()).encode()


def parallel_records(bench: Bench, order: list[str]) -> dict[str, tuple[str, int]]:
    session = bench.open("team")
    engine = bench.engine
    assert isinstance(engine, ScriptedEngine)
    engine.seen.clear()
    with bench.asking():
        assert bench.chat(session)[0] == 200
        engine.hold.clear()
        with ThreadPoolExecutor(3) as threads:
            tasks = []
            for place, content in enumerate(order, start=1):
                messages = [{"role": "system", "content": "You help."}, {"role": "user", "content": content}]
                tasks.append(threads.submit(bench.chat, session, messages))
                while session.under_way < place:
                    time.sleep(0.001)
            engine.hold.set()
            assert [task.result()[0] for task in tasks] == [200] * 3
    steps = session.steps(is_over=True)
    assert [step.index for step in steps] == [0, 1, 2, 3]
    assert all(step.terminated for step in steps)  # each is the last of its chain
    seeds = {request.prompt_ids.tobytes(): request.seed for request in engine.seen}
    return {step.observation: (step.agent_id, seeds[step.prompt_ids.tobytes()], step.index) for step in steps}


def test_parallel_calls_are_chains_whatever_the_order_in_which_they_come(bench: Bench) -> None:
    found = parallel_records(bench, ["a", "b", "c"])
    assert found == parallel_records(bench, ["c", "a", "b"])
    assert len({agent for agent, *_ in found.values()}) == len({seed for _, seed, _ in found.values()}) == 4


def test_agents_may_be_named(bench: Bench) -> None:
    session = bench.open()
    with bench.asking():
        for name in ("planner", "worker", "planner"):
            assert bench.chat(session, x_agent_id=name)[0] == 200
        for system in ("It is noon.", "It is one."):
            prompt = [{"role": "system", "content": system}, {"role": "user", "content": system}]
            assert bench.chat(session, prompt, x_agent_id="worker#2")[0] == 200
    agents = [step.agent_id for step in session.steps(True)]
    assert agents == ["planner", "worker", "planner", "worker_2", "worker_2"]


def test_a_streamed_answer_leaves_the_same_record(bench: Bench) -> None:
    engine = bench.engine
    assert isinstance(engine, ScriptedEngine)
    engine.say = lambda request: CALL
    whole, streamed = bench.open("same"), bench.open("same")
    with bench.asking():
        answer = bench.client(whole).chat.completions.create(model="policy", messages=HELLO, tools=[TOOL])
        chunks = list(
            bench.client(streamed).chat.completions.create(
                model="policy", messages=HELLO, tools=[TOOL], stream=True, stream_options={"include_usage": True}
            )
        )
    [call] = answer.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("find", {"what": "ö"})
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("Wait.", "tool_calls")
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == "Wait."
    assert [it.function.arguments for delta in deltas for it in delta.tool_calls or ()] == [call.function.arguments]
    assert chunks[-1].usage == answer.usage
    [step], [other] = whole.steps(True), streamed.steps(True)
    assert step.prompt_ids.tolist() == other.prompt_ids.tolist()
    assert step.action_ids.tolist() == other.action_ids.tolist()
    assert step.action == other.action == 'find({"what": "ö"})'


def test_calls_of_tools_go_on_in_token_space(bench: Bench) -> None:
    engine = bench.engine
    assert isinstance(engine, ScriptedEngine)
    says = iter([CALL, "<tool_call>{broken", "Done."])
    engine.say = lambda request: next(says)
    session = bench.open()
    with bench.asking():
        client = bench.client(session)
        messages: list[Any] = list(HELLO)
        for _ in range(3):
            message = client.chat.completions.create(model="policy", messages=messages, tools=[TOOL]).choices[0].message
            calls = message.tool_calls or []
            answers = [{"role": "tool", "tool_call_id": call.id, "content": "here"} for call in calls]
            messages += [message, *(answers or [{"role": "user", "content": "Go on."}])]
    steps = session.steps(True)
    assert [step.action_valid for step in steps] == [True, False, True]
    for before, step in itertools.pairwise(steps):
        both = [*before.prompt_ids.tolist(), *before.action_ids.tolist()]
        assert step.prompt_ids[: len(both)].tolist() == both
    assert messages[-4].content == "<tool_call>{broken"


def test_a_retry_is_known_by_its_header_alone(bench: Bench) -> None:
    session = bench.open()
    with bench.asking():
        first = bench.chat(session)[1]
        assert bench.chat(session, x_stainless_retry_count="1")[1]["id"] == first["id"]
        assert bench.chat(session, x_stainless_retry_count="0")[1]["id"] != first["id"]
        named = bench.chat(session, idempotency_key="a")[1]
        assert bench.chat(session, idempotency_key="a")[1]["id"] == named["id"]
        assert bench.chat(session, idempotency_key="b")[1]["id"] != named["id"]
        assert bench.chat(session, [{"role": "user", "content": "Other"}], idempotency_key="a")[0] == 400
        assert bench.chat(session, [{"role": "user", "content": "New"}], x_stainless_retry_count="2")[0] == 200
    assert len(session.steps(True)) == 5
    assert bench.gateway.counts["gateway_retries"] == 2


def test_who_hangs_up_takes_no_answer_from_another(bench: Bench) -> None:
    engine = bench.engine
    assert isinstance(engine, ScriptedEngine)
    session = bench.open()
    with bench.asking(), ThreadPoolExecutor(3) as threads, ExitStack() as hanging_up:
        engine.hold.clear()
        waiting = [threads.submit(bench.chat, session)]
        wait_until(lambda: session.under_way == 1)
        with bench.half(session):
            wait_until(lambda: session.under_way == 2)
            waiting.append(threads.submit(bench.chat, session))
            wait_until(lambda: session.under_way == 3)
        wait_until(lambda: session.under_way == 2)
        hanging_up.enter_context(bench.half(session))
        wait_until(lambda: session.under_way == 3)
        waiting.append(threads.submit(bench.chat, session))
        wait_until(lambda: session.under_way == 4)
        assert len({chain.agent_id for chain in session.chains}) == 4
        hanging_up.close()
        wait_until(lambda: session.under_way == 3)
        engine.hold.set()
        assert [call.result()[0] for call in waiting] == [200] * 3
    assert len(session.steps(True)) == 3


def test_a_retry_is_of_the_try_that_failed_whatever_equal_ones_there_are(bench: Bench) -> None:
    engine = bench.engine
    assert isinstance(engine, ScriptedEngine)
    session = bench.open()
    with bench.asking(), ThreadPoolExecutor(1) as threads:
        engine.hold.clear()
        with bench.half(session):
            wait_until(lambda: session.under_way == 1)
            other = threads.submit(bench.chat, session)
            wait_until(lambda: session.under_way == 2)
        wait_until(lambda: bench.gateway.counts["gateway_cancelled"] == 1)
        engine.hold.set()
        again = bench.chat(session, x_stainless_retry_count="1")[1]["id"]
        assert again != other.result()[1]["id"]
        assert bench.chat(session, x_stainless_retry_count="1")[1]["id"] == again
    assert len(session.made) == 1
    assert len(session.steps(True)) == 2


def test_who_hangs_up_cancels_and_may_ask_again(bench: Bench) -> None:
    engine = bench.engine
    assert isinstance(engine, ScriptedEngine)
    session = bench.open()
    with bench.asking():
        engine.hold.clear()
        with pytest.raises(openai.APITimeoutError):
            bench.client(session, timeout=0.3).chat.completions.create(model="policy", messages=HELLO)
        wait_until(lambda: bench.gateway.counts["gateway_cancelled"] == 1 and engine.released)
        engine.hold.set()
        assert bench.chat(session, x_stainless_retry_count="1")[0] == 200
    [step] = session.steps(True)
    assert engine.seen[0].seed == engine.seen[-1].seed  # the first was never answered
    assert step.action_ids.size


def wait_until(done: Callable[[], Any], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_only_the_sessions_own_key_opens_a_route(bench: Bench) -> None:
    session, other, over = bench.open(), bench.open(), bench.open()
    bench.end(over)
    routes = [
        ("POST", "/v1/chat/completions", {"model": "policy", "messages": HELLO}, "key"),
        ("GET", "/v1/models", {}, "key"),
        ("POST", "/reward", {"reward": 1.0}, "reward_key"),
    ]
    with bench.asking():
        for method, path, body, key in routes:
            where = f"/sessions/{session.id}{path}"
            wrong = [session.reward_key if key == "key" else session.key, getattr(other, key), "wrong", "ä", ""]
            for given in wrong:
                status, answer, _ = bench.post(where, body, given.encode().decode("latin-1"), method)
                assert (status, answer["error"]["code"]) == (401, "invalid_api_key"), (path, given)
            assert bench.post(f"/sessions/none{path}", body, getattr(session, key), method)[0] == 401
            late = bench.post(f"/sessions/{over.id}{path}", body, getattr(over, key), method)
            assert (late[0], late[2]["x-should-retry"]) == (409, "false")
            assert bench.post(f"/sessions/{over.id}{path}", body, getattr(session, key), method)[0] == 401
        for method, path, body, key in routes:
            assert bench.post(f"/sessions/{session.id}{path}", body, getattr(session, key), method)[0] == 200
        bench.end(session)
        assert bench.chat(session)[0] == 409
    assert session.reward == 1.0
    assert not other.taken


def test_rewards_are_of_a_step_or_of_all(bench: Bench) -> None:
    session = bench.open()
    path = f"/sessions/{session.id}/reward"
    with bench.asking():
        ids = [bench.chat(session)[1]["id"] for _ in range(2)]
        for body in ({"reward": 0.5, "completion": ids[0]}, {"reward": 3}, {"reward": 2, "success": True}):
            assert bench.post(path, body, session.reward_key)[0] == 200
        for body in ({}, {"reward": True}, {"reward": 1e300}, {"reward": 1, "success": 1}, {"reward": 1, "completion": 5}):
            assert bench.post(path, body, session.reward_key)[0] == 400
        assert bench.post(path, {"reward": 1, "completion": "none"}, session.reward_key)[0] == 404
    assert [step.reward for step in session.steps(True)] == [0.5, 0.0]
    assert (session.reward, session.success) == (2.0, True)


def test_another_policy_is_refused_or_overridden(policy: TinyPolicy) -> None:
    for how, status in (("refuse", 400), ("override", 200)):
        bench = Bench(policy, ScriptedEngine(policy), other_policy=how)
        try:
            with bench.asking():
                found, answer, _ = bench.chat(bench.open(), temperature=0.2, top_p=0.5)
            assert found == status
            assert bench.gateway.counts["gateway_other_policy"] == 1
            if how == "refuse":
                assert (answer["error"]["code"], answer["error"]["param"]) == ("unsupported_parameter", "temperature")
            else:
                assert {request.sampling.temperature for request in bench.engine.seen} == {1.0}  # type: ignore[attr-defined]
        finally:
            bench.gateway.close()


def test_while_there_is_no_engine_calls_wait_then_are_told_when_to_come_again(policy: TinyPolicy) -> None:
    for waits_s, retries in ((30.0, 0), (0.0, 3)):  # the call waits; it is refused, and the client's own retry succeeds
        bench = Bench(policy, ScriptedEngine(policy), update_wait_s=waits_s)
        try:
            session = bench.open()
            if retries:
                status, answer, headers = bench.chat(session)
                assert (status, answer["error"]["code"], headers["retry-after"]) == (429, "updating", "1")
            create = bench.client(session, max_retries=retries).chat.completions.create
            with ThreadPoolExecutor(1) as threads:
                called = threads.submit(create, model="policy", messages=[{"role": "user", "content": "Now?"}])
                wait_until(lambda: len(session.made) == 1 + bool(retries))  # noqa: B023
                with bench.asking():
                    assert called.result().choices[0].message.content
            assert len(session.steps(True)) == 1
        finally:
            bench.gateway.close()


def test_limits(policy: TinyPolicy) -> None:
    bench = Bench(policy, ScriptedEngine(policy), max_body_kib=2, max_calls_per_s=2.0, max_sessions=1)
    try:
        session = bench.open()
        with pytest.raises(Exception, match="max_sessions allows no more"):
            bench.open()
        with bench.asking():
            long = bench.chat(session, [{"role": "user", "content": "x" * 3000}])
            assert (long[0], long[1]["error"]["code"]) == (413, "body_too_large")
            over = bench.chat(session, [{"role": "user", "content": "x " * 950}])
            assert (over[0], over[1]["error"]["code"]) == (400, "context_length_exceeded")
            assert session.overflowed
            answers = [bench.chat(session) for _ in range(12)]
            assert {status for status, *_ in answers} == {200, 429}
            assert {headers.get("retry-after") for status, _, headers in answers if status == 429} == {"1"}
    finally:
        bench.gateway.close()


def test_a_call_that_came_too_soon_is_made_when_it_is_tried_again(policy: TinyPolicy) -> None:
    bench = Bench(policy, ScriptedEngine(policy), max_calls_per_s=5.0)
    try:
        session = bench.open()
        with bench.asking():
            create = bench.client(session, max_retries=9).chat.completions.create
            ids = [create(model="policy", messages=HELLO).id for _ in range(13)]  # whose bodies are all the same
            assert bench.gateway.counts["gateway_refused"]
        assert len(set(ids)) == len(session.steps(True)) == 13
    finally:
        bench.gateway.close()


def test_the_gateway_is_on_loopback_and_says_no_key(bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    session = bench.open()
    bench.gateway._made = lambda *request: 1 / 0  # type: ignore[method-assign]
    with bench.asking():
        status, answer, _ = bench.chat(session)
    assert (status, answer["error"]["code"]) == (500, "internal_error")
    assert bench.gateway.address.startswith("http://127.0.0.1:")
    said = capfd.readouterr()
    for key in (session.key, session.reward_key):
        assert key not in said.out + said.err + str(answer) + repr(session)


def test_calls_of_two_agents_in_one_dialogue_have_names_of_their_own(bench: Bench) -> None:
    engine, session = bench.engine, bench.open()
    assert isinstance(engine, ScriptedEngine)
    engine.say = lambda request: CALL
    with bench.asking():
        create = bench.client(session).chat.completions.create
        message = create(model="policy", messages=HELLO, tools=[TOOL]).choices[0].message
        found = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "here"}
        other = [{"role": "system", "content": "You are another."}, *HELLO, message, found]
        handed = create(model="policy", messages=other, tools=[TOOL]).choices[0].message
    assert message.tool_calls[0].id != handed.tool_calls[0].id


def test_no_more_than_max_steps(bench: Bench) -> None:
    session = bench.open()
    with bench.asking():
        assert [bench.chat(session)[0] for _ in range(22)] == [200] * 20 + [409] * 2
    assert session.is_full
    assert [step.truncated for step in session.steps(False)] == [False] * 19 + [True]


def test_what_no_route_or_template_takes_is_said_in_openais_shape(bench: Bench) -> None:
    session = bench.open()
    with bench.asking():
        for method, path in (("GET", "/nowhere"), ("GET", f"/sessions/{session.id}/v1/chat/completions")):
            status, answer, _ = bench.post(path, {}, session.key, method)
            assert status in (404, 405)
            assert answer["error"]["type"] == "invalid_request_error"
        bad = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": 3}}}]
        assert bench.chat(session, tools=bad)[0] == 400
    assert not session.chains
    assert bench.post(f"/sessions/{session.id}/v1/responses", {}, session.key)[0] == 404
    assert session.refusal == f"POST /sessions/{session.id}/v1/responses: Not Found"  # what an empty trace's error will say


def test_an_engine_that_fails_costs_its_calls(bench: Bench) -> None:
    engine = bench.engine
    assert isinstance(engine, ScriptedEngine)
    session = bench.open()

    def fails(request: Request) -> str:
        raise RuntimeError("out of order")

    with bench.asking():
        engine.say = fails
        status, answer, _ = bench.chat(session)
        assert (status, answer["error"]["code"]) == (503, "engine_error")
        engine.say = lambda request: "Well"
        assert bench.chat(session)[0] == 200
    assert len(session.steps(True)) == 1


@pytest.mark.parametrize("kind", [HFEngine, PlainEngine])
def test_stop_goes_to_the_engine(kind: type[Engine], policy: TinyPolicy) -> None:
    bench = Bench(policy, kind())
    bench.engine.bind(policy)
    try:
        session, plain = bench.open("a"), bench.open("a")
        with bench.asking():
            text = bench.chat(plain)[1]["choices"][0]["message"]["content"]
            stop = text[len(text) // 2 :][:1]
            answer = bench.chat(session, stop=[stop])[1]
            said = answer["choices"][0]["message"]
            again = bench.chat(session, [*HELLO, said, *HELLO])
            assert again[0] == 200
        assert said["content"] == text.partition(stop)[0]
        first, second = session.steps(True)
        sampled = policy.tokenizer.decode(first.action_ids.tolist(), skip_special_tokens=False)
        assert stop in sampled
        assert stop not in policy.tokenizer.decode(first.action_ids[:-1].tolist(), skip_special_tokens=False)
        assert answer["choices"][0]["finish_reason"] == "stop"
        whole = [*first.prompt_ids.tolist(), *first.action_ids.tolist(), policy.tokenizer.eos_token_id]
        assert second.prompt_ids[: len(whole)].tolist() == whole
    finally:
        bench.gateway.close()


def test_said_is_what_makes_dialogues_equal() -> None:
    assert Said("user", "a") == Said("user", "a") != Said("assistant", "a")


def test_what_is_recorded_is_what_was_read_and_sampled_whatever_agents_send() -> None:
    counts = fuzz(240, threads=4)
    assert {name: count for name, count in counts.items() if name.startswith("WRONG")} == {}
    assert min(counts[kind] for kind in ("goes on", "rewritten", "malformed", "retry", "hangs up")) > 5
    assert counts["steps"] >= counts["goes on"]
