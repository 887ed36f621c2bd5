"""One vLLM server: started or found, asked, given weights, ended. Its calls belong into an event loop."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import threading
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

import numpy as np

from steppo.engines import in_vllm
from steppo.engines.in_vllm.steppo_group import joined
from steppo.engines.vllm_weights import Weights
from steppo.envs.guard import Guard
from steppo.errors import in_short, said
from steppo.types import Completion, Request

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")

_CONNECT_S = 5.0
_LOOK_S = 0.2
# What a launcher of several processes told this one is not meant for a server.
_LAUNCHER = re.compile(r"(TORCHELASTIC|MASTER|GROUP|ROLE|LOCAL)_\w+|RANK|WORLD_SIZE")
_ARGUMENTS = (
    *("-m", "vllm.entrypoints.openai.api_server"),
    *("--generation-config", "vllm"),  # no sampling settings of the model's own
    *("--logprobs-mode", "processed_logprobs"),  # under the temperature
    *("--worker-extension-cls", "steppo_weights.Extension"),
    *("--weight-transfer-config", '{"backend": "steppo"}'),
    "--enable-prefix-caching",
    "--enable-scale-out",  # token ids in and out, each with the version of its weights
    "--no-enable-chunked-prefill",  # with seeds it ends vLLM 0.32
    "--disable-uvicorn-access-log",
)
_ENVIRONMENT = {
    "PYTHONPATH": str(Path(in_vllm.__file__).parent),
    "VLLM_SERVER_DEV_MODE": "1",  # the routes of weights
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


class ServerError(Exception):
    """A server cannot be reached, or fails."""


class Refused(ServerError):
    """It is well, but takes no such request."""


class Hangs(ServerError):
    """It gives no answer."""


@dataclass(frozen=True)
class Launch:
    """How servers are started.

    Attributes:
        python: The interpreter.
        arguments: Of the server, behind those that it needs.
        environment: Variables, over those of this process.
        timeout: Seconds that a start may take.
        folder: For sockets and logs.
        guard: Ends what is left of them.
    """

    python: str
    arguments: Sequence[str]
    environment: Mapping[str, str]
    timeout: float
    folder: Path
    guard: Guard


class Server:
    """A running server at ``name``, or one of our own of that name, on a socket that no other user can open.

    Args:
        name: URL or name.
        launch: How it is started, if it is our own.
        timeout: Seconds that an answer may take.

    Attributes:
        is_ready: It runs, and can be given weights.
        is_up: It has the newest weights, and its answer to the probe was right.
        is_asleep: It answers nothing before it is woken.
    """

    def __init__(self, name: str, launch: Launch | None, timeout: float) -> None:
        import httpx

        self.name = f"the vLLM server {name}"
        self.launch = launch
        self.is_ready = self.is_up = False
        self.is_asleep = launch is None  # perhaps: whoever used it before may have left it so
        self._mark = name
        self._timeout = timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._group: Any = None  # of this process and the server's
        self._turn = asyncio.Lock()
        self._ending = threading.Lock()
        socket = None if launch is None else str(launch.folder / f"{name}.sock")
        key = os.environ.get("VLLM_API_KEY")
        self._client = httpx.AsyncClient(
            base_url=name if launch is None else "http://localhost",
            transport=httpx.AsyncHTTPTransport(uds=socket, limits=httpx.Limits(max_connections=None)),
            headers={"Authorization": f"Bearer {key}"} if key else None,
            timeout=httpx.Timeout(timeout, connect=_CONNECT_S),
        )

    # ---- the process ----

    async def start(self, weights: Weights) -> None:
        """Starts it, anew if need be."""
        launch = self.launch
        assert launch is not None
        await asyncio.to_thread(self.kill)
        model = await asyncio.to_thread(weights.model)
        self.is_asleep = False
        socket, log = (launch.folder / f"{self._mark}.{kind}" for kind in ("sock", "log"))
        socket.unlink(missing_ok=True)
        command = [launch.python, *_ARGUMENTS, "--model", str(model), "--uds", str(socket), *launch.arguments]
        with open(log, "wb") as file, launch.guard.marking(self._mark):
            inherited = {name: value for name, value in os.environ.items() if not _LAUNCHER.fullmatch(name)}
            environment = {**inherited, **_ENVIRONMENT, **launch.environment}
            pipes: Any = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
            self._process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
        now = asyncio.get_running_loop().time
        deadline = now() + launch.timeout
        while not await self.is_healthy():
            if self._process.poll() is not None or now() > deadline:
                late = "" if self._process.poll() is not None else f" within {launch.timeout:g} s"
                await asyncio.to_thread(self.kill)
                raise ServerError(f"{self.name} did not start{late}: {_last_words(log)}")
            await asyncio.sleep(_LOOK_S)
        await self._call("/update_weight_version", {"new_version": weights.version})

    def kill(self) -> None:
        """Ends it and all its processes."""
        self.leave()
        with self._ending:  # who was cancelled here may still be at it
            if self._process is not None and self.launch is not None:
                self.launch.guard.kill(self._mark, [self._process.pid])
                self._process.wait()
                self._process = None

    async def close(self) -> None:
        """Ends it, if it is our own."""
        await self._client.aclose()
        await asyncio.to_thread(self.kill)

    # ---- what it is asked ----

    async def is_healthy(self) -> bool:
        """Whether it runs and answers."""
        import httpx

        if self._process is not None and self._process.poll() is not None:
            return False
        with suppress(httpx.HTTPError, OSError):
            return (await self._client.get("/health", timeout=_CONNECT_S)).is_success
        return False

    async def generate(self, request: Request, stop_ids: Collection[int], version: str | None) -> Completion:
        """Samples an action: its ids with the stop token, and their log-probabilities under the temperature.

        Args:
            request: What is asked.
            stop_ids: End it.
            version: Of the weights that each token must come from, if that matters.
        """
        sampling: dict[str, Any] = {
            "temperature": request.sampling.temperature,
            "max_tokens": request.sampling.max_new_tokens,
        }
        sampling |= {"seed": request.seed % 2**63, "stop_token_ids": sorted(stop_ids), "ignore_eos": True, "logprobs": 0}
        sampling |= {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
        texts = list(request.sampling.stop)
        sampling |= {"stop": texts, "detokenize": bool(texts), "skip_special_tokens": False}
        asked = {"token_ids": request.prompt_ids.tolist(), "sampling_params": sampling}
        answer = await self._call("/inference/v1/generate", asked)
        try:
            choice = answer.json()["choices"][0]
            ids = np.asarray(choice["token_ids"], dtype=np.int32)
            logprobs = np.asarray([token["logprob"] for token in choice["logprobs"]["content"]], dtype=np.float32)
            reason = str(choice["finish_reason"])
            versions = {span["version"] for span in choice["weight_versions"]}
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise ServerError(f"{self.name} answers otherwise than vLLM 0.32: {said(error)}") from error
        if reason not in ("stop", "length") or not len(ids) == len(logprobs) > 0:
            raise ServerError(f"{self.name} broke off ({reason}): {len(ids)} tokens, {len(logprobs)} log-probabilities")
        if version is not None and versions != {version}:
            raise ServerError(f"{self.name} answered with weights {', '.join(sorted(versions))} instead of {version}")
        if reason == "stop" and int(ids[-1]) not in stop_ids:
            reason = "text"
        return Completion(request.id, ids, logprobs, reason)

    async def update(self, weights: Weights) -> None:
        """Gives it the weights. What is under way is answered first, and its caches are emptied."""
        if weights.is_broadcast and self._group is None:
            await self._join(weights)
        await self._call("/pause?mode=wait&clear_cache=true")
        await self._call("/start_weight_update")
        told = self._call("/update_weights", {"update_info": weights.update_info()})
        if weights.is_broadcast:
            await self._together(_aside(partial(weights.send, self._group)), told)
        else:
            await told
        await self._call("/finish_weight_update", {"weight_version": weights.version})
        await self._call("/resume")

    async def sleep(self) -> None:
        """Gives its GPU away once what is under way is answered."""
        async with self._turn:
            if not self.is_asleep:
                self.is_asleep = True  # also where no answer comes
                await self._call("/sleep?level=1&mode=wait")

    async def wake(self) -> None:
        """Takes it back."""
        async with self._turn:
            if self.is_asleep:
                await self._call("/wake_up")
                self.is_asleep = False

    def leave(self) -> None:
        """Ends the group, if there is one."""
        group, self._group = self._group, None
        if group is not None:
            with suppress(RuntimeError):
                group.abort()

    async def _join(self, weights: Weights) -> None:
        size = 1 + (await self._call("/get_world_size", method="GET")).json()["world_size"]
        path = str(weights.folder / f"group-{uuid4().hex}")
        info = {"path": path, "size": size, "backend": weights.backend, "timeout": self._timeout}
        told = self._call("/init_weight_transfer_engine", {"init_info": info})
        self._group, _ = await self._together(_aside(partial(joined, 0, **info)), told)

    async def _together(self, *both: Awaitable[Any]) -> list[Any]:
        """What this process and the server do at once. Where it is broken off the group is of no use any more."""
        try:
            return await asyncio.gather(*both)
        except BaseException:
            self.leave()
            raise

    async def _call(self, path: str, body: Any = None, method: str = "POST") -> httpx.Response:
        import httpx

        try:
            response = await self._client.request(method, path, json=body)
        except httpx.ReadTimeout as error:
            raise Hangs(f"{self.name} gave no answer to {path} within {self._timeout:g} s") from error
        except httpx.HTTPError as error:
            raise ServerError(f"{self.name} cannot be reached: {said(error)}") from error
        if response.is_error:
            kind = Refused if response.is_client_error else ServerError
            raise kind(f"{self.name} said {response.status_code} to {path}: {in_short(response.text, 300)}")
        return response


async def _aside(work: Callable[[], T]) -> T:
    """What it gives, in a thread of its own, which nobody waits for once nobody waits here."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return await asyncio.wrap_future(future)


def _last_words(log: Path) -> str:
    """The last line of a log that names an error, or the last one."""
    with suppress(OSError):
        lines = log.read_text(errors="replace").splitlines()
        errors = [line for line in lines if re.search(r"\w(Error|Exception)\b|error: ", line)]
        return in_short((errors or lines or [""])[-1], 300)
    return ""
