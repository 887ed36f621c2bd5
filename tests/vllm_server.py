"""What of vLLM's HTTP the engine needs, answered by ``HFEngine``; and a stand-in for the Python that starts a server."""

from __future__ import annotations

import json
import os
import select
import socketserver
import stat
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any


class Handler(BaseHTTPRequestHandler):
    """One request of a connection. ``app`` answers it: (path, body) -> status, JSON."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if getattr(self.server, "is_gone", False):
            self.close_connection = True
            return
        status, answer = self.server.app(self.path, json.loads(body) if body else None, self)  # type: ignore[attr-defined]
        if status:
            text = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

    def log_message(self, *args: Any) -> None:
        pass

    def is_dropped(self) -> bool:
        """Whether nobody waits for the answer any more."""
        return bool(select.select([self.connection], [], [], 0)[0])


class FakeVLLM:
    """A server of a policy out of a folder.

    Attributes:
        calls: Paths that were asked for, but ``/health``.
        asked: (Prompt, stop ids) of each generation.
        keeps_cache: It forgets to empty its caches: for so many updates.
        keeps_head: It forgets to prepare its head: for so many updates.
        tempered: Whether log-probabilities are those under the temperature.
        held: Generation waits while this is set.
        dropped: Connections that were closed while it did.
        is_asleep: It does nothing until it is woken.
        fails: A path that is answered with an error.
    """

    def __init__(self, model: Path | None = None) -> None:
        self.calls: list[str] = []
        self.asked: list[tuple[list[int], list[int]]] = []
        self.keeps_cache = self.keeps_head = 0
        self.tempered = True
        self.held = threading.Event()
        self.dropped = 0
        self.is_asleep = False
        self.fails = ""
        self._lock = threading.Lock()
        if model is not None:
            self._load(model)

    def _load(self, model: Path) -> None:
        """As a new process does."""
        from steppo.engines import HFEngine
        from steppo.models import HFPolicy

        class Keeping(HFEngine):
            """Its caches are emptied when it is told, not when it sees new weights."""

            def _versions(self) -> int:
                return 0

        self.policy = HFPolicy(str(model))
        self.policy.build(list)
        self.engine = Keeping()
        self.engine.bind(self.policy)
        self.version = "default"
        self.is_asleep = False
        self._count = 0

    def app(self, path: str, body: Any, handler: Handler) -> tuple[int, Any]:
        path = path.partition("?")[0]
        if path == "/health":
            return 200, {}
        self.calls.append(path)
        if path == self.fails:
            return 500, {}
        if path == "/inference/v1/generate":
            while self.held.is_set():
                if handler.is_dropped():
                    self.dropped += 1
                    return 0, None
                time.sleep(0.02)
        with self._lock:
            return 200, self._answer(path, body)

    def _answer(self, path: str, body: Any) -> Any:
        if path == "/load":  # vLLM has no such route: the stand-in says what a new process would read
            self._load(Path(body["model"]))
        elif path == "/pause":
            if self.keeps_cache:
                self.keeps_cache -= 1
            else:
                self.engine.load_weights((), 0)
        elif path == "/get_world_size":
            return {"world_size": 1}
        elif path == "/init_weight_transfer_engine":
            from steppo.engines.in_vllm.steppo_group import joined

            self._group = joined(1, **body["init_info"])
        elif path == "/update_weights":
            self._update(**body["update_info"])
        elif path in ("/sleep", "/wake_up"):
            assert path == "/wake_up" or not self.is_asleep
            self.is_asleep = path == "/sleep"
        elif path == "/finish_weight_update":
            self.version = body["weight_version"]
        elif path == "/update_weight_version":
            self.version = body["new_version"]
        elif path == "/inference/v1/generate":
            return self._generate(body["token_ids"], body["sampling_params"])
        return {}

    def _update(self, path: str = "", dtype: str = "", shapes: Mapping[str, Any] = MappingProxyType({})) -> None:
        import torch
        from safetensors.torch import load_file

        from steppo.engines.in_vllm.steppo_group import broadcast

        assert not self.is_asleep
        weights = load_file(path) if path else {}
        for name, shape in shapes.items():
            weights[name] = torch.empty(shape, dtype=getattr(torch, dtype))
            broadcast(self._group, [weights[name]])
        model = self.policy.model
        head = model.get_output_embeddings()
        if self.keeps_head:
            self.keeps_head -= 1
            head.weight = torch.nn.Parameter(head.weight.detach().clone())
        else:
            head.weight = model.get_input_embeddings().weight
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in weights:
                    parameter.copy_(weights.pop(name))
        assert not weights

    def _generate(self, ids: list[int], wanted: dict[str, Any]) -> Any:
        import numpy as np

        from steppo.types import Request, Sampling

        assert not self.is_asleep
        assert wanted["ignore_eos"]
        assert wanted["top_p"] == 1
        self.asked.append((ids, wanted["stop_token_ids"]))
        self.policy.stop_ids = frozenset(wanted["stop_token_ids"])
        self._count += 1
        sampling = Sampling(wanted["temperature"], wanted["max_tokens"], tuple(wanted["stop"]))
        assert bool(wanted["stop"]) == wanted["detokenize"]
        self.engine.submit(Request(self._count, "one", np.array(ids, np.int32), sampling, wanted["seed"]))
        while not (done := self.engine.poll()):
            pass
        scale = 1.0 if self.tempered else 1.1
        tokens = [{"logprob": float(logprob) * scale} for logprob in done[0].logprobs]
        choice = {"token_ids": done[0].action_ids.tolist(), "logprobs": {"content": tokens}}
        why = "stop" if done[0].finish_reason == "text" else done[0].finish_reason  # vLLM makes no difference
        spans = [{"version": self.version, "start": 0, "end": len(tokens)}]
        return {"choices": [{**choice, "finish_reason": why, "weight_versions": spans}]}


@contextmanager
def served(fake: FakeVLLM, port: int = 0) -> Iterator[str]:
    """Serves at the URL that it gives. Nothing is answered any more once it is left."""
    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        server.app = fake.app  # type: ignore[attr-defined]
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.is_gone = True  # type: ignore[attr-defined]
            server.shutdown()


def write_python(folder: Path, url: str) -> Path:
    """A stand-in for the Python of vLLM's environment: its process hands on what it is asked to the server at ``url``."""
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "{__file__}" {url} "$@"\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


# ---- the process ----


class _OnSocket(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


def _main(url: str, *arguments: str) -> None:
    options = dict(pairwise(arguments))
    assert os.environ["VLLM_SERVER_DEV_MODE"] == "1"
    assert "RANK" not in os.environ
    if "--fail" in arguments:
        sys.exit("SomeError: there is no memory for this")

    def hand_on(path: str, body: Any, handler: Handler | None) -> tuple[int, Any]:
        data = None if body is None and path == "/health" else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(urllib.request.Request(url + path, data)) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, {}

    hand_on("/load", {"model": options["--model"]}, None)
    with _OnSocket(options["--uds"], Handler) as server:
        server.app = hand_on  # type: ignore[attr-defined]
        server.serve_forever()


if __name__ == "__main__":
    _main(*sys.argv[1:])
