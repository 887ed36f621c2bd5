"""Generation by vLLM, in processes and an environment of its own. Nothing that it says of its weights is believed."""

from __future__ import annotations

import asyncio
import concurrent.futures
import fcntl
import os
import queue
import shutil
import tempfile
import threading
import warnings
from collections import Counter
from collections.abc import Coroutine, Iterable
from contextlib import suppress
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from urllib.parse import urlsplit

import torch
from torch import Tensor

from steppo.distributed import rank_and_world
from steppo.engines.base import Engine, failed
from steppo.engines.sampling import logprob_tolerance
from steppo.engines.vllm_probe import Probe
from steppo.engines.vllm_server import Hangs, Launch, Refused, Server, ServerError
from steppo.engines.vllm_weights import Weights
from steppo.envs.guard import Guard
from steppo.errors import ConfigError, RunError, in_short, require_at_least, said
from steppo.types import Completion, Request

if TYPE_CHECKING:
    from steppo.models.policy import Policy

T = TypeVar("T")

_WAKE_S = 0.2  # in which whoever waits hears that it shall not
_AGAIN_S = 5.0
_FOLDER = "steppo-vllm"


class VLLMEngine(Engine):
    """Has vLLM servers on this machine sample: it starts them, or is told where they are.

    They live in an environment of their own (``docs/vllm.md``). They are sent the weights, adapters merged. Before and after
    each change of weights a server answers a probe of several cache blocks, and the log-probabilities of what it generated
    are compared with the learner's own: caches or layers that kept old weights are found. Then the weights are sent again,
    then the server is started anew, then the run ends.

    An episode stays with one server. What a server that dies or hangs was answering has failed; another takes over, and one
    of our own is started again.

    Args:
        python: Python of the environment that has vLLM; starts ``num_servers`` servers, on sockets that no other user can
            open, which end with the run.
        urls: Of running servers, instead; each process of the run takes its share. Their key is in ``VLLM_API_KEY``.
        num_servers: Of our own.
        max_model_len: Most tokens of prompt and action together; the servers' own may not be less.
        dtype: That servers compute in; float32 if the learner does, else bfloat16.
        arguments: Of our own servers, as on vLLM's command line.
        environment: Variables for our own servers.
        transfer: How weights reach them: through a ``file``, or by ``broadcast`` from memory to memory, from one GPU to
            another by NCCL.
        sleep: While nobody plays, servers give their GPU away, so that the learner can have it: their weights wait in the
            machine's memory, their caches are dropped. Own servers get the learner's GPU; those at ``urls`` want
            ``--enable-sleep-mode``.
        tolerance: Mean difference of the probe's log-probabilities to the learner's; 1e-4 in float32, else 0.2, of which
            rounding makes some hundredths.
        timeout: Seconds that an answer may take; then its server hangs.
        start_timeout: Seconds that a server may take to start.

    Attributes:
        reloads: Weights that were sent again, or a server started again, since a probe was off.
        losses: Servers that died or hung.
    """

    _policy: Policy  # from ``bind``
    _servers: list[Server]  # these from the first weights on
    _loop: asyncio.AbstractEventLoop
    _folder: tempfile.TemporaryDirectory[str]
    _arrived: queue.SimpleQueue[Any]

    def __init__(
        self,
        python: str | None = None,
        urls: list[str] | None = None,
        num_servers: int = 1,
        max_model_len: int = 4096,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        arguments: list[str] | None = None,
        environment: dict[str, str] | None = None,
        transfer: Literal["file", "broadcast"] = "file",
        sleep: bool = False,
        tolerance: float | None = None,
        timeout: float = 600.0,
        start_timeout: float = 600.0,
    ) -> None:
        require_at_least(1, self, num_servers=num_servers, max_model_len=max_model_len, timeout=timeout)
        require_at_least(1, self, start_timeout=start_timeout)
        if (python is None) == (not urls):
            raise ConfigError("VLLMEngine: give either python, of the environment that has vLLM, or urls of running servers")
        for url in urls or ():
            if not _is_local(url):
                raise ConfigError(
                    f"VLLMEngine: {url} is not on this machine, as http://127.0.0.1:8000 is: whoever reaches a vLLM server "
                    "can change its weights without a key"
                )
        if sleep and transfer == "broadcast":
            raise ConfigError("VLLMEngine: sleep is for one GPU of learner and servers, broadcast for one each: choose")
        if find_spec("httpx") is None:
            raise ConfigError("VLLMEngine needs httpx: pip install 'steppo[vllm]'")
        self.python = python
        self.urls = urls or []
        self.num_servers = num_servers
        self.max_model_len = max_model_len
        self.dtype = dtype
        self.arguments = arguments or []
        self.environment = environment or {}
        self.transfer = transfer
        self.sleep = sleep
        self.tolerance = tolerance
        self.timeout = timeout
        self.start_timeout = start_timeout
        self.reloads = self.losses = 0
        self._is_open = False
        self._loads = 0
        self._weights: Weights | None = None  # the newest
        self._asked: dict[int, str] = {}  # requests under way -> session

    def __getstate__(self) -> dict[str, Any]:
        """For another process, with servers of its own."""
        if self.urls:
            raise ConfigError("VLLMEngine: each process would change the weights of the same servers: give python, not urls")
        return vars(self)

    # ---- for the thread that asks ----

    def bind(self, policy: Policy) -> None:
        if self.python is not None and shutil.which(os.path.expanduser(self.python)) is None:
            raise ConfigError(f"VLLMEngine: there is no {self.python}; docs/vllm.md says how to make its environment")
        self._longest = min(self.max_model_len, policy.max_positions)
        rank, world = rank_and_world()
        if self.urls and len(self.urls) < world:
            raise ConfigError(f"VLLMEngine: {world} processes need as many urls: each sets its servers' weights")
        self._policy = policy
        self._stop_ids = policy.stop_ids
        self._names = self.urls[rank::world] or [f"vllm-{number}" for number in range(self.num_servers)]
        self._probe = Probe(policy, self._longest)

    def submit(self, request: Request) -> None:
        longest = len(request.prompt_ids) + request.sampling.max_new_tokens
        if longest > self._longest:
            raise ConfigError(f"VLLMEngine: a prompt and its action may have {longest} tokens: raise max_model_len")
        self._asked[request.id] = request.session_id
        self._loop.call_soon_threadsafe(self._send, request)

    def poll(self) -> list[Completion]:
        completions: list[Completion] = []
        while self._asked and not completions:
            with suppress(queue.Empty):
                arrived = [self._arrived.get(timeout=_WAKE_S)]
                while not self._arrived.empty():
                    arrived.append(self._arrived.get())
                for item in arrived:
                    if isinstance(item, RunError):
                        raise item
                    if isinstance(item, tuple):
                        if why := self._welcome(*item):
                            raise RunError(why)
                    elif self._asked.pop(item.request_id, None) is not None:
                        completions.append(item)
        return completions

    def release(self, session_id: str) -> None:
        self._asked = {request: session for request, session in self._asked.items() if session != session_id}
        if self._is_open:
            self._loop.call_soon_threadsafe(self._forget, session_id)

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Gives all servers the weights, and compares what they then generate with the learner.

        Raises:
            RunError: A server does not take them.
        """
        exact = logprob_tolerance(self._policy) < 1e-3
        dtype = self.dtype or ("float32" if exact else "bfloat16")
        usual = 1e-4 if exact and dtype == "float32" else 0.2
        self._tolerance = usual if self.tolerance is None else self.tolerance
        self.logprob_tolerance = 3 * self._tolerance  # of the largest difference
        is_first = not self._is_open
        if is_first:
            self._open(dtype)
        self._wait(self._stop())
        self._arrived = queue.SimpleQueue()  # what came in between was of older weights
        self._loads += 1
        name, is_broadcast = f"{version}.{self._loads}", self.transfer == "broadcast"
        new = Weights(self._policy, weights, name, getattr(torch, dtype), Path(self._folder.name), is_broadcast)
        old, self._weights = self._weights, new
        if not is_broadcast:
            new.model()
        if self.sleep and torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # the servers want it
        self._renew_all(is_first)
        new.settle()
        if old is not None:
            old.remove()

    def rest(self) -> None:
        if self.sleep and self._is_open:
            self._wait(self._put_to_sleep())

    def counts(self) -> Counter[str]:
        return Counter({"lost_servers": self.losses, "reloaded_weights": self.reloads})

    def close(self) -> None:
        self._asked = {}
        if not self._is_open:
            return
        self._is_open, self._weights = False, None
        try:
            self._wait(self._end())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
            if self._guard is not None:
                self._guard.close()
            self._folder.cleanup()
            self._lock.close()

    def _open(self, dtype: str) -> None:
        for lock in Path(tempfile.gettempdir()).glob(f"{_FOLDER}-*/lock"):
            with suppress(OSError), lock.open() as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # its owner was killed
                shutil.rmtree(lock.parent)
        self._folder = tempfile.TemporaryDirectory(prefix=f"{_FOLDER}-")
        self._lock = (Path(self._folder.name) / "lock").open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._guard = launch = None
        if self.python is not None:
            self._guard = Guard()
            limits = ["--max-model-len", self._longest, "--max-num-batched-tokens", max(4096, self._longest)]
            asleep = ["--enable-sleep-mode"] if self.sleep else []
            arguments = [*map(str, limits), "--dtype", dtype, *asleep, *self.arguments]
            python, folder = os.path.expanduser(self.python), Path(self._folder.name)
            environment = (_learners_gpu(self._policy.device) if self.sleep else {}) | self.environment
            launch = Launch(python, arguments, environment, self.start_timeout, folder, self._guard)
        self._in_use = asyncio.Event()
        self._servers = [Server(name, launch, self.timeout) for name in self._names]
        self._waiting: list[Request] = []  # for a server; these three are touched in the loop only
        self._homes: dict[str, Server] = {}  # by session
        self._tasks: dict[asyncio.Task[None], str | None] = {}  # requests, by session, and what brings servers back
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()
        self._is_open = True

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        """What the loop makes of it; an interrupt is heard."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            while not concurrent.futures.wait([future], _WAKE_S).done:
                pass
        except BaseException:
            future.cancel()
            raise
        return future.result()

    # ---- weights ----

    def _renew_all(self, is_first: bool) -> None:
        """Brings the weights to all servers, in the mildest way after which the probe is right."""
        servers = self._servers
        for then in ("; the weights are sent again", "; it is started again", ""):
            answers = self._wait(_gathered(self._renew(server, restart=not then) for server in servers))
            wrong: dict[Server, str] = {}
            for server, answer in zip(servers, answers, strict=True):
                if not isinstance(answer, ServerError):
                    if why := self._welcome(server, answer):
                        wrong[server] = why
                elif is_first:
                    raise RunError(f"{answer}; docs/vllm.md has a server's command line")
                else:
                    self._loop.call_soon_threadsafe(self._lose, server, answer)
            if not wrong:
                return
            servers = list(wrong)
            self.reloads += len(wrong)
            if then:
                warnings.warn("; ".join(wrong.values()) + then, stacklevel=3)
        raise RunError("; ".join(wrong.values()))

    def _welcome(self, server: Server, answer: Completion) -> str:
        """Has a server asked from now on, if it answers the probe as the learner would; says how it does not."""
        fault = self._probe.fault(answer, self._tolerance)
        if fault:
            return f"{server.name} {fault}"
        self._loop.call_soon_threadsafe(self._join, server)
        return ""

    # ---- in the loop ----

    async def _renew(self, server: Server, restart: bool) -> Completion | ServerError:
        """Gives a server the weights. Its answer to the probe then, or why there is none."""
        weights = self._weights
        assert weights is not None
        was_ready, server.is_ready, server.is_up = server.is_ready, False, False
        if restart:
            server.leave()
        try:
            if server.launch is not None and (restart or not was_ready):
                await server.start(weights)
            else:
                await server.wake()
                await server.generate(self._probe.request, (), None)  # now its caches hold what may not be read again
                await server.update(weights)
            answer = await server.generate(self._probe.request, (), weights.version)
        except (ServerError, OSError, RuntimeError) as error:  # what torch says of a broadcast is in the last
            server.is_asleep = server.launch is None  # it may have been left in the midst of a pause
            return error if isinstance(error, ServerError) else ServerError(f"{server.name}: {in_short(said(error), 300)}")
        server.is_ready = True
        return answer

    async def _stop(self) -> None:
        """Ends what is under way."""
        self._in_use.set()
        tasks, self._tasks, self._waiting = list(self._tasks), {}, []
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _put_to_sleep(self) -> None:
        self._in_use.clear()
        for server in [server for server in self._servers if server.is_up]:
            try:
                await server.sleep()
            except ServerError as error:
                self._lose(server, error)

    async def _end(self) -> None:
        await self._stop()
        await _gathered(server.close() for server in self._servers)

    def _begin(self, work: Coroutine[Any, Any, None], session_id: str | None) -> None:
        task = self._loop.create_task(work)
        self._tasks[task] = session_id
        task.add_done_callback(lambda task: self._tasks.pop(task, None))

    def _send(self, request: Request) -> None:
        self._in_use.set()
        up = [server for server in self._servers if server.is_up]
        if not up:
            self._waiting.append(request)
            return
        home = self._homes.get(request.session_id)
        if home is None or not home.is_up:
            sessions = Counter(self._homes.values())
            home = self._homes[request.session_id] = min(up, key=lambda server: sessions[server])
        self._begin(self._ask(home, request), request.session_id)

    def _forget(self, session_id: str) -> None:
        """Drops connections: a server ends what nobody waits for."""
        self._homes.pop(session_id, None)
        self._waiting = [request for request in self._waiting if request.session_id != session_id]
        for task in [task for task, session in self._tasks.items() if session == session_id]:
            task.cancel()

    def _join(self, server: Server) -> None:
        """The server is asked from now on."""
        server.is_up = True
        waiting, self._waiting = self._waiting, []
        for request in waiting:
            self._send(request)

    async def _ask(self, server: Server, request: Request) -> None:
        try:
            assert self._weights is not None
            await server.wake()
            completion = await server.generate(request, self._stop_ids, self._weights.version)
        except Exception as error:
            completion = failed(request, error)
            is_well = not server.is_asleep and (isinstance(error, Refused) or await server.is_healthy())
            is_lost = isinstance(error, Hangs) or not is_well
            if is_lost and server.is_up:  # another request may have found out
                self._lose(server, error)
        self._arrived.put(completion)

    def _lose(self, server: Server, error: Exception) -> None:
        """It is asked nothing more, until it is back."""
        server.is_up = False
        self.losses += 1
        warnings.warn(f"a server is lost: {error}", stacklevel=2)
        self._begin(self._bring_back(server), None)

    async def _bring_back(self, server: Server) -> None:
        """Starts it anew, or waits until whoever owns it has; not while servers sleep, since a learner has their GPU."""
        await self._in_use.wait()
        last = self._loop.time() + self.start_timeout
        try:
            while isinstance(answer := await self._renew(server, restart=True), ServerError):
                if self._loop.time() > last and not any(other.is_up for other in self._servers):
                    raise RunError(f"no vLLM server is left: {answer}")
                await asyncio.sleep(_AGAIN_S)
                await self._in_use.wait()
        except RunError as error:
            self._arrived.put(error)
        else:
            self._arrived.put((server, answer))


async def _gathered(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    return list(await asyncio.gather(*works))


def _learners_gpu(device: torch.device) -> dict[str, str]:
    """Variables of a server that has the same one, if it is one."""
    if device.type != "cuda":
        return {}
    index, visible = device.index or 0, os.environ.get("CUDA_VISIBLE_DEVICES")
    return {"CUDA_VISIBLE_DEVICES": visible.split(",")[index] if visible else str(index)}


def _is_local(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    with suppress(ValueError):
        return ip_address(host).is_loopback
    return host == "localhost"
