"""``VLLMEngine`` with a real vLLM server: what it samples, what its probe finds, what it survives, and how fast it is.

    pip install -c constraints.txt -e ".[vllm]"
    python benchmarks/vllm_engine.py --python venv_vllm/bin/python --model models/smollm2-135m

    python benchmarks/vllm_engine.py --python venv_vllm/bin/python --model models/smollm2-135m --device cuda \\
        --parts updates speed alone fit here --results benchmarks/results/vllm_engine_gpu.json   # a GPU that they share

    # a server that runs already: its command line is in docs/vllm.md; --load-format dummy, as the weights come from here
    python benchmarks/vllm_engine.py --url http://127.0.0.1:8000 --model models/smollm2-135m --parts updates speed

Parts (all that need no GPU unless ``--parts`` names some):

- ``updates``: the weights drift at random five times. After each: greedy ids against ``HFEngine``'s; log-probabilities of
  all ids (also at temperatures 0.7 and 1) against the learner's, and both against the learner's in float64; seconds of
  ``load_weights``. Prompts are openings of TextWorld's games, and ids at random, which no agent reads. Before each change,
  and before it is asked again, the server is told to sleep: without a GPU it pauses and drops its caches, but frees nothing.
- ``broadcast``: the same with weights from memory to memory (by gloo), and no sleep.
- ``cache``: a change of weights that leaves the prefix cache as it was, once.
- ``head``: a server that does not prepare its head anew.
- ``speed``: tokens/s of actions of 32 tokens after prompts of 200, at batches of 1, 8 and 32, beside ``HFEngine``.
- ``alone``: the same by vLLM's own ``LLM``, in its process.
- ``fit``: two iterations of ``configs/textworld.yaml`` with LoRA. ``killed``: the same, and the server is killed in the
  midst of the first rollout. ``here``: the same by ``HFEngine``.

``--shape`` has random weights in place of a model's, of whose folder the tokenizer is then. On CPUs all is float32, in two
processes with one thread each: an hour on two busy cores, and 8 GiB. On a GPU it is bfloat16, with graphs of decoding ticks
and longer runs, and the server sleeps while the learner learns. Adds to ``benchmarks/results/vllm_engine.json``, and prints
what it adds.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from measuring import about
from records import SHAPES
from transformers import LlamaConfig, LlamaForCausalLM

from steppo.batch import Segment
from steppo.cli import main as command_line
from steppo.engines import Engine, HFEngine, VLLMEngine, in_vllm
from steppo.engines.vllm_server import Server
from steppo.envs import TextWorldEnv
from steppo.errors import SteppoError
from steppo.models import HFPolicy, Policy
from steppo.packing import PaddedPacker
from steppo.rendering import AppendContext, Renderer
from steppo.types import Completion, Request, Sampling

ROOT = Path(__file__).parent.parent
PARTS = ("updates", "broadcast", "cache", "head", "speed", "fit", "killed")
BATCHES = {"cpu": (1, 8, 32), "cuda": (1, 8, 32, 128)}
PROMPT, ACTION = 200, 32  # tokens of speed
# A learner needs the rest; graphs, and nothing to compile.
ON_GPU = ["--gpu-memory-utilization", "0.3", "--compilation-config", '{"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}']
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
_HEAD = "            if isinstance(module, ParallelLMHead):\n"


def built(model: str, device: str) -> Policy:
    policy = HFPolicy(model)
    policy.build(list)
    return policy.to(device, torch.bfloat16 if device == "cuda" else torch.float32)


def random_weights(shape: str, tokenizer: str, folder: Path, device: str) -> str:
    """A folder of a Llama of this shape."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=8192, tie_word_embeddings=True)
    with torch.device(device):
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(Path(tokenizer) / name, folder)
    return str(folder)


@contextmanager
def engine_with(policy: Policy, where: str, broadcasts: bool = False, **environment: str) -> Iterator[VLLMEngine]:
    """An engine whose server has the policy's weights."""
    settings: Any = {"max_model_len": 1024, "sleep": not broadcasts, "transfer": "broadcast" if broadcasts else "file"}
    if where.startswith("http"):
        settings["urls"] = [where]
        await_health(where)
    else:
        settings["python"] = where
    if policy.device.type == "cuda":
        settings |= {"arguments": ON_GPU, "environment": environment}
    else:
        awake = [] if broadcasts else ["--no-enable-sleep-mode"]
        settings |= {"arguments": ["--enforce-eager", *awake], "environment": ENVIRONMENT | environment}
    with closing(VLLMEngine(**settings)) as engine:
        engine.bind(policy)
        load(engine, policy, 0)
        yield engine


def await_health(url: str) -> None:
    import httpx

    while True:
        with suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health").is_success:
                return
        time.sleep(0.5)


def load(engine: VLLMEngine, policy: Policy, version: int) -> tuple[float, list[str]]:
    """Seconds, and what was warned of."""
    start = time.perf_counter()
    with warnings.catch_warnings(record=True, action="always") as said:
        engine.load_weights(policy.inference_weights(), version)
    return time.perf_counter() - start, [str(warning.message) for warning in said]


def drift(policy: Policy, seed: int, much: float = 0.005) -> None:
    """Moves each weight at random, relative to how large its tensor's are."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.trained_parameters():
            parameter += much * parameter.std() * torch.randn(parameter.shape, generator=generator).to(parameter)


def requests(policy: Policy, count: int, length: int, tokens: int, temperature: float, seed: int = 0) -> list[Request]:
    rng = np.random.default_rng(seed)
    sampling = Sampling(temperature, tokens)
    prompts = rng.integers(100, policy.vocab_size, (count, length)).astype(np.int32)
    return [Request(number, f"{seed}/{number}", prompt, sampling, seed + number) for number, prompt in enumerate(prompts)]


def openings(policy: Policy, count: int, tokens: int, temperature: float, seed: int = 0) -> list[Request]:
    """What an agent is first asked in games."""
    renderer, context, env = Renderer(), AppendContext(), TextWorldEnv("simple", num_train=100)
    renderer.bind(policy.tokenizer, policy.stop_ids)
    context.bind(renderer)
    sampling = Sampling(temperature, tokens)
    found = []
    tasks = env.tasks("train")[seed * count : (seed + 1) * count]
    env.prepare(tasks, lambda done, total: None)
    for number, task in enumerate(tasks):
        prompt = context.prompt_ids([env.reset(task)], [])
        found.append(Request(number, f"{seed}/{number}", prompt, sampling, seed + number))
    env.close()
    return found


def answers(engine: Engine, asked: Sequence[Request]) -> list[Completion]:
    for request in asked:
        engine.submit(request)
    found: dict[int, Completion] = {}
    while len(found) < len(asked):
        found |= {completion.request_id: completion for completion in engine.poll()}
    for request in asked:
        engine.release(request.session_id)
    return [found[request.id] for request in asked]


@torch.no_grad()
def logprobs(policy: Policy, asked: Sequence[Request], answered: Sequence[Completion]) -> np.ndarray:
    """A learner's, of all ids that were answered."""
    found = []
    for request, answer in zip(asked, answered, strict=True):
        if answer.error:
            raise RuntimeError(answer.error)
        [(_, batch)] = PaddedPacker().pack([Segment(request.prompt_ids, answer.action_ids)], 2**31)
        temperature_A = torch.full((len(answer.action_ids),), request.sampling.temperature, device=policy.device)
        found.append(policy(batch.to(policy.device), temperature_A).logprobs_A.double().cpu().numpy())
    return np.concatenate(found)


def off(one: np.ndarray, other: np.ndarray) -> float:
    """The largest difference."""
    return float(np.abs(one - other).max())


def off_learner(policy: Policy, asked: Sequence[Request], answered: Sequence[Completion]) -> float:
    return off(logprobs(policy, asked, answered), np.concatenate([answer.logprobs for answer in answered]))


def in_use() -> float:
    """GiB of the GPU, by whomever."""
    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**30


def same_ids(left: Sequence[Completion], right: Sequence[Completion]) -> int:
    return sum(np.array_equal(one.action_ids, other.action_ids) for one, other in zip(left, right, strict=True))


# ---- parts ----


def compared(policy: Policy, engine: Engine, here: Engine, asked: Mapping[float, list[Request]]) -> dict[str, Any]:
    """Requests at each temperature."""
    theirs = {heat: answers(engine, some) for heat, some in asked.items()}
    all_asked, all_answers = (list(chain(*by_heat.values())) for by_heat in (asked, theirs))
    found = np.concatenate([answer.logprobs for answer in all_answers])
    heats = np.concatenate([np.full(len(one.logprobs), heat) for heat, some in theirs.items() for one in some])
    ours, true = (logprobs(one, all_asked, all_answers) for one in (policy, copy.deepcopy(policy).double()))
    return {
        "same greedy ids": same_ids(theirs[0.0], answers(here, asked[0.0])),
        "same ids again": same_ids(theirs[0.7], answers(engine, asked[0.7])),
        "tokens": len(found),
        "off the learner": off(found, ours),
        "by temperature": {heat: off(found[heats == heat], ours[heats == heat]) for heat in theirs},
        "off float64": {"vllm": off(found, true), "learner": off(ours, true)},
    }


def updates(policy: Policy, where: str, broadcasts: bool) -> dict[str, Any]:
    rows = []
    start = time.perf_counter()
    with engine_with(policy, where, broadcasts) as engine:
        ready = time.perf_counter() - start
        here = HFEngine()
        here.bind(policy)
        for version in range(6):
            seconds = asleep = awake = 0.0
            if version:
                drift(policy, version)
                here.load_weights((), version)
                engine.rest()
                asleep = in_use()
                seconds, said = load(engine, policy, version)
                assert not said, said
                awake = in_use()
                engine.rest()
            row = {"version": version, "seconds": seconds, "GiB of the GPU in use, asleep and awake": (asleep, awake)}
            for name, prompts in (("openings", openings), ("random ids", partial(requests, length=150))):
                asked = {heat: prompts(policy, 4, tokens=16, temperature=heat, seed=version) for heat in (0.0, 0.7, 1.0)}
                row[name] = compared(policy, engine, here, asked)
            print(row, flush=True)
            rows.append(row)
        assert not engine.losses + engine.reloads
    return {"seconds to the first answer": ready, "requests at each temperature": 4, "updates": rows}


def cache(policy: Policy, python: str) -> dict[str, Any]:
    """The first change of weights forgets to empty the caches."""
    with engine_with(policy, python) as engine:
        call, forgotten = Server._call, []

        async def forgetful(self: Server, path: str, *others: Any) -> Any:
            if path.startswith("/pause") and not forgotten:
                forgotten.append(path)
                path = path.replace("clear_cache=true", "clear_cache=false")
            return await call(self, path, *others)

        drift(policy, 1)
        with mock.patch.object(Server, "_call", forgetful):
            seconds, said = load(engine, policy, 1)
        asked = requests(policy, 4, 150, 16, 1.0)
        return {"seconds": seconds, "said": said, "off the learner": off_learner(policy, asked, answers(engine, asked))}


def head(policy: Policy, python: str) -> dict[str, Any]:
    """What loads the weights in the server leaves out its last step."""
    ours = Path(in_vllm.__file__).with_name("steppo_weights.py").read_text()
    assert _HEAD in ours
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "steppo_weights.py").write_text(ours.replace(_HEAD, "            if False:\n"))
        paths = f"{folder}:{Path(in_vllm.__file__).parent}"
        with engine_with(policy, python, PYTHONPATH=paths) as engine:
            drift(policy, 1)
            seconds, said = load(engine, policy, 1)
            asked = requests(policy, 4, 150, 16, 1.0)
            return {"seconds": seconds, "said": said, "off the learner": off_learner(policy, asked, answers(engine, asked))}


def speed(policy: Policy, where: str, repeats: int) -> dict[str, Any]:
    rates: dict[str, Any] = {"vllm": {}, "in process": {}}
    policy.stop_ids = frozenset()  # all actions have the same length
    with engine_with(policy, where) as engine:
        here = HFEngine()
        here.bind(policy)
        for name, one in (("vllm", engine), ("in process", here)):
            for batch in BATCHES[policy.device.type]:
                found = []
                for turn in range(repeats):
                    asked = requests(policy, batch, PROMPT, ACTION, 1.0, seed=1000 * turn + batch)
                    start = time.perf_counter()
                    answers(one, asked)
                    found.append(ACTION * batch / (time.perf_counter() - start))
                rates[name][batch] = sorted(found)
                print(name, batch, rates[name][batch], flush=True)
    return {"tokens/s": rates}


def alone(model: str, python: str, repeats: int) -> dict[str, Any]:
    """What ``vllm_alone.py`` says, in their environment."""
    batches = ",".join(map(str, BATCHES["cuda"]))
    line = [python, str(ROOT / "benchmarks" / "vllm_alone.py"), model, *map(str, (batches, PROMPT, ACTION, repeats))]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return {"tokens/s": json.loads(done.stdout.splitlines()[-1])}


def fit(model: str, python: str | None, device: str, kill: bool) -> dict[str, Any]:
    """A run by the command line; by ``HFEngine`` where there is no ``python``."""
    asked: list[Request] = []
    generate = Server.generate

    async def killing(self: Server, request: Request, *others: Any) -> Completion:
        asked.extend([request] if request.session_id != "probe" else [])
        if kill and len(asked) == 6:  # of twelve, four at a time
            assert self._process is not None
            self._process.kill()
        return await generate(self, request, *others)

    short = {
        "trainer.max_epochs": 2,
        "evaluation.before_training": "false",
        "trainer.check_val_every_n_epoch": 2,
        "warm_start.updates": 0,
        "rollout.episodes_per_iteration": 12,
        "data.train_tasks": 12,
        "data.eval_tasks": 2,
        "data.num_minibatches": 2,
        "data.source.num_slots": 4,
        "data.source.env.settings.level": 2,
        "data.source.env.max_steps": 3,
        "model.policy.name_or_path": model,
        "transcripts.num_shown": 0,
    }
    configs = ["textworld", "model/smollm2-135m"]
    if device == "cuda":
        configs.append("trainer/gpu")
        short |= {
            "trainer.max_epochs": 3,
            "trainer.check_val_every_n_epoch": 4,
            "rollout.episodes_per_iteration": 64,
            "data.train_tasks": 64,
            "data.source.num_slots": 64,
            "data.source.env.max_steps": 10,
            "data.source.on_invalid": "continue",
            "data.max_tokens_per_microbatch": 16384,
        }
    if python is not None:
        configs.append("engine/vllm")
        short |= {"data.source.engine.python": python, "data.source.engine.max_model_len": 1024}
        if device == "cuda":
            short |= {"data.source.engine.sleep": "true", "data.source.engine.environment": "{}"}
            short |= {"data.source.engine.dtype": "bfloat16", "data.source.engine.arguments": json.dumps(ON_GPU)}
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(Server, "generate", killing):
        arguments = [f"--config={ROOT}/configs/{name}.yaml" for name in configs]
        arguments += [f"--{name}={value}" for name, value in short.items()]
        start = time.perf_counter()
        try:
            cli = command_line(["fit", *arguments, f"--trainer.logger.save_dir={folder}"])
        except SteppoError as error:
            return {"ended": str(error)}
    latest = cli.model.latest
    figures = {name: value for name, value in latest.items() if "rollout/" in name or "mismatch" in name}
    return {
        "seconds": time.perf_counter() - start,
        "phases": dict(cli.model.seconds),
        "counts": dict(cli.datamodule.source.counts()),
        "last iteration": figures,
        "episodes": cli.model.counters.episodes,
    }


def version(python: str) -> str:
    """Of vLLM, whose build for CPUs has a name of its own."""
    code = (
        "import importlib.metadata as m; print([d.version for d in m.distributions() if d.name in ('vllm', 'vllm-cpu')][0])"
    )
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="venv_vllm/bin/python", help="Of the environment with vLLM.")
    parser.add_argument("--url", help="Of a server, for updates, broadcast and speed.")
    parser.add_argument("--model", default="models/smollm2-135m", help="Folder of the model.")
    parser.add_argument("--shape", choices=SHAPES, help="Of random weights.")
    parser.add_argument("--device", choices=list(BATCHES), default="cpu")
    parser.add_argument("--parts", nargs="+", choices=(*PARTS, "alone", "here"), default=PARTS)
    parser.add_argument("--repeats", type=int, default=3, help="Of each batch of speed.")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "vllm_engine.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    theirs = "" if options.url else version(options.python)
    results = json.loads(options.results.read_text()) if options.results.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        model, python, device = options.model, options.python, options.device
        if options.shape:
            model = random_weights(options.shape, model, Path(folder), device)
        for part in options.parts:
            if part in ("fit", "killed", "here"):
                found = fit(model, None if part == "here" else python, device, part == "killed")
            elif part in ("updates", "broadcast"):
                found = updates(built(model, device), options.url or python, part == "broadcast")
            elif part == "speed":
                found = speed(built(model, device), options.url or python, options.repeats)
            elif part == "alone":
                found = alone(model, python, options.repeats)
            else:
                found = {"cache": cache, "head": head}[part](built(model, device), python)
            key = f"{part}, {options.shape}" if options.shape else part
            results[key] = {"about": about() | {"vllm": theirs}, **found}
            options.results.write_text(json.dumps(results, indent=1) + "\n")
            print(key, json.dumps(found, indent=1), flush=True)


if __name__ == "__main__":
    main()
