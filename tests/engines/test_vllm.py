"""The engine of vLLM servers, before a server that answers as vLLM does: what it asks, believes, and survives."""

from __future__ import annotations

import math
import pickle
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from steppo.engines import HFEngine, VLLMEngine
from steppo.engines.vllm import _learners_gpu
from steppo.errors import ConfigError, RunError
from steppo.models import TinyPolicy
from steppo.models.adapters import LoRASettings
from steppo.types import Completion, Sampling
from tests.cli_helpers import evaluations, run
from tests.engines.test_engines import assert_same, make_requests
from tests.engines.test_engines import run as answers_of
from tests.vllm_server import FakeVLLM, served, write_python

Serve = Callable[..., VLLMEngine]


@pytest.fixture
def policy(tiny_policy: TinyPolicy) -> TinyPolicy:
    """Far from uniform, or stale weights would hardly show."""
    with torch.no_grad():
        tiny_policy.model.get_input_embeddings().weight.mul_(8)
    return tiny_policy


@pytest.fixture
def fake(policy: TinyPolicy, tmp_path: Path) -> FakeVLLM:
    policy.export(tmp_path / "model", merge=True)
    return FakeVLLM(tmp_path / "model")


@contextmanager
def engine_at(policy: TinyPolicy, *urls: str, **settings: Any) -> Iterator[VLLMEngine]:
    """An engine that has the policy's weights."""
    with closing(VLLMEngine(urls=list(urls), max_model_len=512, **settings)) as engine:
        engine.bind(policy)
        load(engine, policy)
        yield engine


@contextmanager
def engine_of(
    policy: TinyPolicy, folder: Path, url: str, count: int = 1, *arguments: str, **settings: Any
) -> Iterator[VLLMEngine]:
    """An engine that starts its servers."""
    settings |= {"python": str(write_python(folder, url)), "num_servers": count, "arguments": list(arguments)}
    with closing(VLLMEngine(max_model_len=512, **settings)) as engine:
        engine.bind(policy)
        load(engine, policy)
        yield engine


def load(engine: VLLMEngine, policy: TinyPolicy, version: int = 0) -> None:
    engine.load_weights(policy.inference_weights(), version)


def loaded_and_asked(engine: VLLMEngine, policy: TinyPolicy) -> dict[int, Completion]:
    load(engine, policy, 1)
    return answers_of(engine, make_requests(4))


def learn(policy: TinyPolicy, much: float = 0.02) -> None:
    """Other weights, the head's included."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.trained_parameters():
            parameter += much * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def in_process(policy: TinyPolicy) -> HFEngine:
    engine = HFEngine()
    engine.bind(policy)
    return engine


def polled(engine: VLLMEngine, count: int) -> dict[int, Completion]:
    answers: dict[int, Completion] = {}
    while len(answers) < count:
        answers |= {answer.request_id: answer for answer in engine.poll()}
    return answers


# ---- what it samples ----


@pytest.mark.parametrize(("temperature", "transfer"), [(0.0, "file"), (0.7, "broadcast"), (1.0, "file")])
def test_answers_are_those_of_the_engine_in_process(
    policy: TinyPolicy, fake: FakeVLLM, temperature: float, transfer: str
) -> None:
    """Before and after its weights change: ids with their stop token, log-probabilities, and why they end."""
    policy.stop_ids = frozenset(range(40))
    requests = make_requests(6, temperature, max_new_tokens=12)
    with served(fake) as url, engine_at(policy, url, transfer=transfer) as engine:
        for version in (1, 2):
            got, wanted = answers_of(engine, requests), answers_of(in_process(policy), requests)
            for number, answer in got.items():
                assert_same(answer, wanted[number], atol=1e-5)
            learn(policy)
            load(engine, policy, version)
    assert temperature == 0 or {answer.finish_reason for answer in wanted.values()} == {"stop", "length"}
    assert any(stop == sorted(policy.stop_ids) for _, stop in fake.asked)
    assert engine.counts() == {"lost_servers": 0, "reloaded_weights": 0}


def test_answers_that_end_with_a_text(policy: TinyPolicy, fake: FakeVLLM) -> None:
    [plain] = answers_of(in_process(policy), make_requests(1, 0.0)).values()
    text = policy.tokenizer.decode(plain.action_ids[:3])
    requests = [replace(request, sampling=Sampling(0.0, 8, (text[-2:],))) for request in make_requests(3, 0.0)]
    wanted = answers_of(in_process(policy), requests)
    with served(fake) as url, engine_at(policy, url) as engine:
        for number, answer in answers_of(engine, requests).items():
            assert_same(answer, wanted[number], atol=1e-5)
    assert wanted[0].finish_reason == "text"


def test_greedy_answers_to_a_policy_in_float64(policy: TinyPolicy, fake: FakeVLLM) -> None:
    policy.double()
    requests = make_requests(8, 0.0)
    with served(fake) as url, engine_at(policy, url) as engine:
        wanted = answers_of(in_process(policy), requests)
        for number, answer in answers_of(engine, requests).items():
            assert_same(answer, wanted[number], atol=1e-4)


@pytest.mark.parametrize("transfer", ["file", "broadcast"])
def test_a_policy_with_adapters_is_sent_merged(policy: TinyPolicy, fake: FakeVLLM, transfer: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy.add_lora(LoRASettings(rank=2, alpha=8.0))
    learn(policy, 0.05)
    requests = make_requests(4, 0.0)
    with served(fake) as url, engine_at(policy, url, transfer=transfer) as engine:
        wanted = answers_of(in_process(policy), requests)
        for number, answer in answers_of(engine, requests).items():
            assert_same(answer, wanted[number], atol=1e-5)


def test_what_is_written_is_a_model_of_transformers(policy: TinyPolicy, fake: FakeVLLM) -> None:
    with served(fake) as url, engine_at(policy, url) as engine:
        load(engine, policy, 1)
        folder = Path(engine._folder.name)
        [weights] = folder.glob("weights-*")  # the older are gone
        written = AutoModelForCausalLM.from_pretrained(weights)
    for name, parameter in policy.model.named_parameters():
        torch.testing.assert_close(written.get_parameter(name), parameter, atol=0, rtol=0)
    assert not folder.exists()


def test_folders_of_the_dead_are_removed(
    policy: TinyPolicy, fake: FakeVLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    left = tmp_path / "steppo-vllm-left"
    left.mkdir()
    (left / "lock").touch()
    with served(fake) as url, engine_at(policy, url) as first, engine_at(policy, url):
        assert Path(first._folder.name).exists()
    assert not left.exists()


# ---- weights that are broadcast ----


def test_a_server_joins_once_and_reads_no_file(policy: TinyPolicy, fake: FakeVLLM) -> None:
    with served(fake) as url, engine_at(policy, url, transfer="broadcast") as engine:
        learn(policy)
        load(engine, policy, 1)
        assert not list(Path(engine._folder.name).glob("weights-*"))
    assert fake.calls.count("/init_weight_transfer_engine") == 1
    assert fake.calls.count("/update_weights") == 2


def test_a_process_is_started_with_what_was_broadcast(policy: TinyPolicy, tmp_path: Path) -> None:
    requests = make_requests(4)
    with served(fake := FakeVLLM()) as url, engine_of(policy, tmp_path, url, transfer="broadcast") as engine:
        learn(policy)
        load(engine, policy, 1)
        assert fake.calls.count("/load") == fake.calls.count("/update_weights") == 1
        process = engine._servers[0]._process
        assert process is not None
        process.kill()
        process.wait()
        with pytest.warns(UserWarning, match="a server is lost"):
            answers_of(engine, make_requests(1))
        wanted = answers_of(in_process(policy), requests)
        for number, answer in answers_of(engine, requests).items():
            assert_same(answer, wanted[number], atol=1e-5)
        learn(policy)
        wanted = answers_of(in_process(policy), requests)
        assert_same(loaded_and_asked(engine, policy)[3], wanted[3], atol=1e-5)
        assert fake.calls.count("/load") == fake.calls.count("/update_weights") == 2


@pytest.mark.parametrize("path", ["/init_weight_transfer_engine", "/update_weights"])
def test_who_does_not_receive_joins_again(
    policy: TinyPolicy, fake: FakeVLLM, tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steppo.engines.vllm._AGAIN_S", 0.1)
    other = FakeVLLM(tmp_path / "model")
    with served(fake) as first, served(other) as second, engine_at(policy, first, second, transfer="broadcast") as engine:
        learn(policy)
        fake.fails = path
        engine._servers[0].leave()
        with pytest.warns(UserWarning, match=f"a server is lost: .*said 500 to {path}"):
            answers = loaded_and_asked(engine, policy)
        assert not any(answer.error for answer in answers.values())
        fake.fails = ""
        while not engine._servers[0].is_up:
            answers_of(engine, make_requests(1))
        wanted = answers_of(in_process(policy), make_requests(4))
        for number, answer in answers_of(engine, make_requests(4)).items():
            assert_same(answer, wanted[number], atol=1e-5)


def test_weights_that_cannot_be_written_end_the_run(policy: TinyPolicy, tmp_path: Path) -> None:
    with served(FakeVLLM()) as url, engine_of(policy, tmp_path, url, transfer="broadcast") as engine:
        load(engine, policy, 1)
        base = Path(engine._folder.name) / "base"
        shutil.rmtree(base)
        base.touch()  # which is no folder
        engine._servers[0].kill()
        with (
            pytest.warns(UserWarning, match="a server is lost"),
            pytest.raises(RunError, match="TMPDIR names another disk"),
        ):
            _ = [answers_of(engine, make_requests(1)) for _ in range(2)]  # the first may be answered before writing fails


# ---- while nobody plays ----


def test_servers_sleep_until_they_are_asked(policy: TinyPolicy, fake: FakeVLLM) -> None:
    with served(fake) as url, engine_at(policy, url, sleep=True) as engine:
        answers_of(engine, make_requests(2))
        for ask in (loaded_and_asked, lambda engine, policy: answers_of(engine, make_requests(4))):
            for _ in range(2):
                engine.rest()
                assert fake.is_asleep
            assert not any(answer.error for answer in ask(engine, policy).values())
            assert not fake.is_asleep


def test_a_server_that_somebody_left_asleep(policy: TinyPolicy, fake: FakeVLLM) -> None:
    with served(fake) as url:
        with engine_at(policy, url, sleep=True) as engine:
            engine.rest()
        assert fake.is_asleep
        with engine_at(policy, url) as engine:
            assert not answers_of(engine, make_requests(1))[0].error


def test_a_process_is_not_started_while_a_learner_has_the_gpu(policy: TinyPolicy, tmp_path: Path) -> None:
    with served(fake := FakeVLLM()) as url, engine_of(policy, tmp_path, url, sleep=True) as engine:
        fake.fails = "/sleep"
        with pytest.warns(UserWarning, match="a server is lost"):
            engine.rest()
        fake.fails = ""
        time.sleep(0.5)
        assert fake.calls.count("/load") == 1
        assert not answers_of(engine, make_requests(1))[0].error
        assert fake.calls.count("/load") == 2


def test_a_process_that_is_back_before_the_next_weights(policy: TinyPolicy, tmp_path: Path) -> None:
    with served(FakeVLLM()) as url, engine_of(policy, tmp_path, url) as engine:
        engine._servers[0].kill()
        request = make_requests(1)[0]
        with warnings.catch_warnings(record=True, action="always") as said:
            engine.submit(request)
            while engine._arrived.qsize() < 2:  # the request's failure, and the process
                time.sleep(0.05)
        assert "a server is lost" in str(said[0].message)
        engine.release(request.session_id)
        learn(policy)
        assert not loaded_and_asked(engine, policy)[0].error


def test_servers_that_sleep_have_the_learners_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert _learners_gpu(torch.device("cpu")) == {}
    assert _learners_gpu(torch.device("cuda", 1)) == {"CUDA_VISIBLE_DEVICES": "1"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert _learners_gpu(torch.device("cuda", 1)) == {"CUDA_VISIBLE_DEVICES": "7"}
    with pytest.raises(ConfigError, match="sleep is for one GPU"):
        VLLMEngine(python="python3", sleep=True, transfer="broadcast")


@pytest.mark.parametrize(
    ("path", "is_loaded", "num_lost"),
    [("/sleep", True, 0), ("/sleep", False, 0), ("/wake_up", True, 0), ("/wake_up", False, 4)],
)
def test_a_server_that_is_lost_meanwhile(
    policy: TinyPolicy, fake: FakeVLLM, path: str, is_loaded: bool, num_lost: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is brought back, and costs what it was asked while it slept."""
    monkeypatch.setattr("steppo.engines.vllm._AGAIN_S", 0.1)
    with served(fake) as url, engine_at(policy, url, sleep=True) as engine:
        fake.fails = path
        with warnings.catch_warnings(record=True, action="always") as said:
            engine.rest()
            if is_loaded:
                load(engine, policy, 1)
            for request in make_requests(4):
                engine.submit(request)
            lost = polled(engine, num_lost)
            while not said:  # the engine's thread says so, when it comes to it
                time.sleep(0.01)
        assert f"said 500 to {path}" in str(said[0].message)
        assert all(answer.error for answer in lost.values())
        fake.fails = ""
        answers = polled(engine, 4) if not num_lost else answers_of(engine, make_requests(4))
        assert not any(answer.error for answer in answers.values())
        assert engine.counts()["lost_servers"] == 1


# ---- what it believes ----


def test_caches_are_emptied_and_the_probe_fills_blocks(policy: TinyPolicy, fake: FakeVLLM) -> None:
    with served(fake) as url, engine_at(policy, url) as engine:
        fake.calls.clear()
        load(engine, policy, 7)
        assert fake.version.startswith("7.")
    probe = "/inference/v1/generate"
    change = ["/pause", "/start_weight_update", "/update_weights", "/finish_weight_update", "/resume"]
    assert fake.calls == [probe, *change, probe]
    assert {(len(prompt), tuple(stop)) for prompt, stop in fake.asked} == {(400, ())}


@pytest.mark.parametrize("what", ["keeps_cache", "keeps_head"])
def test_old_weights_are_found_and_sent_again(policy: TinyPolicy, fake: FakeVLLM, what: str) -> None:
    with served(fake) as url, engine_at(policy, url) as engine:
        setattr(fake, what, 1)
        learn(policy)
        with pytest.warns(UserWarning, match=r"off the learner's.*; the weights are sent again"):
            load(engine, policy, 1)
        assert engine.counts()["reloaded_weights"] == 1
        requests = make_requests(4)
        wanted = answers_of(in_process(policy), requests)
        assert_same(answers_of(engine, requests)[3], wanted[3], atol=1e-5)


@pytest.mark.parametrize("what", ["keeps_cache", "keeps_head", "tempered"])
def test_a_server_that_stays_wrong_ends_the_run(policy: TinyPolicy, fake: FakeVLLM, what: str) -> None:
    with served(fake) as url, engine_at(policy, url) as engine:
        setattr(fake, what, False if what == "tempered" else 9)
        learn(policy)
        with warnings.catch_warnings(action="ignore"), pytest.raises(RunError) as caught:
            load(engine, policy, 1)
    text = str(caught.value)
    assert f"the vLLM server {url} gives log-probabilities that are" in text
    assert "more than 0.0001 (token " in text
    assert "\n" not in text


def test_a_process_that_keeps_its_head_is_started_again(policy: TinyPolicy, tmp_path: Path) -> None:
    with served(fake := FakeVLLM()) as url, engine_of(policy, tmp_path, url) as engine:
        fake.keeps_head = 9
        learn(policy)
        with pytest.warns(UserWarning, match="the weights are sent again|it is started again"):
            load(engine, policy, 1)
        assert fake.calls.count("/load") == 2
        wanted = answers_of(in_process(policy), make_requests(4))
        assert_same(answers_of(engine, make_requests(4))[3], wanted[3], atol=1e-5)


def test_an_answer_of_other_weights_has_failed(policy: TinyPolicy, fake: FakeVLLM) -> None:
    with served(fake) as url, engine_at(policy, url) as engine:
        fake.version = "somebody's"
        [answer] = answers_of(engine, make_requests(1)).values()
    assert "answered with weights somebody's instead of 0.1" in answer.error


# ---- what it survives ----


def test_an_episode_stays_with_its_server(policy: TinyPolicy, fake: FakeVLLM, tmp_path: Path) -> None:
    other = FakeVLLM(tmp_path / "model")
    with served(fake) as first, served(other) as second, engine_at(policy, first, second) as engine:
        for server in (fake, other):
            server.asked.clear()
        for seed in range(3):
            answers_of(engine, make_requests(4, seed=seed))
    lengths = [{len(prompt) for prompt, _ in server.asked} for server in (fake, other)]
    assert sorted(lengths, key=min) == [{1, 7}, {4, 10}]


def test_who_is_not_waited_for_is_not_asked(policy: TinyPolicy, fake: FakeVLLM) -> None:
    with served(fake) as url, engine_at(policy, url) as engine:
        fake.held.set()
        fake.calls.clear()
        for request in make_requests(2):
            engine.submit(request)
        while len(fake.calls) < 2:
            time.sleep(0.01)
        engine.release("1")
        while not fake.dropped:
            time.sleep(0.01)
        fake.held.clear()
        assert list(polled(engine, 1)) == [0]
        assert engine.poll() == []


def test_a_process_that_dies_costs_what_it_was_asked(policy: TinyPolicy, tmp_path: Path) -> None:
    """The other one is asked meanwhile; it comes back with the newest weights."""
    with served(fake := FakeVLLM()) as url, engine_of(policy, tmp_path, url, 2) as engine:
        learn(policy)
        load(engine, policy, 1)
        fake.held.set()
        fake.calls.clear()
        requests = make_requests(4)
        for request in requests:
            engine.submit(request)
        while len(fake.calls) < 4:
            time.sleep(0.01)
        victim = engine._servers[0]
        assert victim._process is not None
        with warnings.catch_warnings(record=True, action="always") as said:
            victim._process.kill()
            answers = polled(engine, 2)
        assert "a server is lost: the vLLM server vllm-0 cannot be reached" in str(said[0].message)
        assert all("cannot be reached" in answer.error for answer in answers.values())
        fake.held.clear()
        assert not any(answer.error for answer in polled(engine, 2).values())
        while not victim.is_up:  # both are one fake, which forgets its weights when a process starts
            engine.submit(requests[0])
            polled(engine, 1)
        wanted = answers_of(in_process(policy), requests)
        for number, answer in answers_of(engine, requests).items():
            assert_same(answer, wanted[number], atol=1e-5)
        assert engine.counts()["lost_servers"] == 1
        processes = [server._process for server in engine._servers]
    assert all(process is not None and process.poll() is not None for process in processes)


def test_the_only_process_dies(policy: TinyPolicy, tmp_path: Path) -> None:
    """What is asked then waits for the next one."""
    with served(FakeVLLM()) as url, engine_of(policy, tmp_path, url) as engine:
        assert engine._servers[0]._process is not None
        engine._servers[0]._process.kill()
        engine._servers[0]._process.wait()
        with pytest.warns(UserWarning, match="a server is lost"):
            first = answers_of(engine, make_requests(1))
        assert first[0].error
        assert not answers_of(engine, make_requests(2))[1].error


def test_a_server_that_hangs_is_left_and_asked_again_later(
    policy: TinyPolicy, fake: FakeVLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steppo.engines.vllm._AGAIN_S", 0.1)
    other = FakeVLLM(tmp_path / "model")
    with served(fake) as first, served(other) as second, engine_at(policy, first, second, timeout=1.0) as engine:
        fake.held.set()
        with pytest.warns(UserWarning, match="gave no answer to /inference/v1/generate within 1 s"):
            answers = answers_of(engine, make_requests(4))
        assert sorted(bool(answer.error) for answer in answers.values()) == [False, False, True, True]
        assert not any(answer.error for answer in answers_of(engine, make_requests(4)).values())
        fake.held.clear()
        while not engine._servers[0].is_up:
            answers_of(engine, make_requests(1))
        load(engine, policy, 1)


def test_a_server_that_is_gone_when_weights_change(
    policy: TinyPolicy, fake: FakeVLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steppo.engines.vllm._AGAIN_S", 0.1)
    with served(FakeVLLM(tmp_path / "model")) as other, ExitStack() as stack:
        with served(fake) as url:
            engine = stack.enter_context(engine_at(policy, url, other))
        learn(policy)
        with pytest.warns(UserWarning, match="a server is lost"):
            answers = loaded_and_asked(engine, policy)
        assert not any(answer.error for answer in answers.values())
        with served(FakeVLLM(tmp_path / "model"), int(url.rpartition(":")[2])):
            while not engine._servers[0].is_up:
                answers_of(engine, make_requests(1))
    with pytest.raises(RunError, match=rf"{url} cannot be reached.*docs/vllm.md"), engine_at(policy, url):
        pass


def test_a_process_that_does_not_start(policy: TinyPolicy, tmp_path: Path) -> None:
    with (
        served(FakeVLLM()) as url,
        pytest.raises(RunError, match="vllm-0 did not start: SomeError: there is no memory for this"),
        engine_of(policy, tmp_path, url, 1, "--fail"),
    ):
        pass


# ---- settings ----


def test_a_prompt_that_is_too_long(policy: TinyPolicy, fake: FakeVLLM) -> None:
    with served(fake) as url, engine_at(policy, url) as engine, pytest.raises(ConfigError, match="raise max_model_len"):
        engine.submit(make_requests(1, max_new_tokens=512)[0])


def test_local_addresses(policy: TinyPolicy) -> None:
    for url in ("http://localhost:8000", "http://127.0.0.2:1", "http://[::1]:8000"):
        assert VLLMEngine(urls=[url]).urls == [url]
    for url in ("http://10.0.0.1:8000", "http://gpu.example:8000", "http://0.0.0.0:1", "localhost:8000"):
        with pytest.raises(ConfigError, match="not on this machine"):
            VLLMEngine(urls=[url])


def test_processes_of_a_run_share_urls(policy: TinyPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steppo.engines.vllm.rank_and_world", lambda: (1, 2))
    urls = [f"http://127.0.0.1:{port}" for port in (1, 2, 3)]
    engine = VLLMEngine(urls=urls)
    engine.bind(policy)
    assert engine._names == urls[1:2]
    with pytest.raises(ConfigError, match="2 processes need as many urls"):
        VLLMEngine(urls=urls[:1]).bind(policy)


def test_it_can_be_sent_to_a_process(policy: TinyPolicy) -> None:
    assert pickle.loads(pickle.dumps(VLLMEngine(python="python3", num_servers=3))).num_servers == 3
    with pytest.raises(ConfigError, match="give python, not urls"):  # whose weights each would change
        pickle.dumps(VLLMEngine(urls=["http://127.0.0.1:1"]))


def test_tolerances(policy: TinyPolicy, fake: FakeVLLM) -> None:
    with served(fake) as url:
        with engine_at(policy, url) as engine:
            assert engine.logprob_tolerance == pytest.approx(3e-4)
        with engine_at(policy, url, tolerance=0.02) as engine:
            assert engine.logprob_tolerance == pytest.approx(0.06)
        with engine_at(policy, url, dtype="bfloat16", tolerance=math.inf) as engine:
            assert engine.logprob_tolerance == math.inf


# ---- a run ----


def test_a_run_with_its_own_server(tmp_path: Path) -> None:
    """Which learner and server take in turns."""
    with served(fake := FakeVLLM()) as url:
        engine = ["--data.source.engine=VLLMEngine", f"--data.source.engine.python={write_python(tmp_path, url)}"]
        run(tmp_path, *engine, "--data.source.engine.max_model_len=512", "--data.source.engine.sleep=true")
    assert fake.calls.count("/load") == 1
    assert fake.calls.count("/sleep") == fake.calls.count("/wake_up") + 1 == 5  # three evaluations and two rollouts
    assert len(evaluations(tmp_path)) == 3
    curves = EventAccumulator(str(tmp_path)).Reload()
    assert [point.value for point in curves.Scalars("rollout/lost_servers")] == [0, 0]
    assert all(point.value < 1e-4 for point in curves.Scalars("train/logprob_mismatch"))
