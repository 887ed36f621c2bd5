"""A run's policy as a Hugging Face folder, which plain transformers loads: ``python -m steppo.export --help``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

import yaml
from huggingface_hub import ModelCardData
from lightning.fabric import Fabric
from rich.console import Console
from transformers import GenerationConfig

from callbacks.progress import in_words
from steppo.checkpoints import read
from steppo.cli import PartsCLI, build_parts, errors_in_one_line, own_options
from steppo.errors import ConfigError
from steppo.models import Policy
from steppo.paths import user_path
from steppo.rendering import PLAIN_TEMPLATE

_SECRET = re.compile(r"(^|_)(token|secret|password|passwd|credentials?|api_?key)$", re.IGNORECASE)
# transformers loads in evaluation mode, in which bitsandbytes computes another way on a CPU than while it trained.
_QUANTIZED_LAYERS = [
    "for layer in model.modules():",
    '    if type(layer).__name__ in ("Linear4bit", "Linear8bitLt"):',
    "        layer.training = True  # computes as in the run, on a CPU too",
]
_USER_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")


@errors_in_one_line()
def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line (the process's own unless given)."""
    parser = own_options(
        "python -m steppo.export",
        "Writes the policy of a checkpoint as a Hugging Face folder: weights (safetensors), tokenizer, chat template,\n"
        "generation config, and a model card with the run's config and results.",
        "python -m steppo.export --ckpt_path runs/quickstart/version_0/checkpoints/best.ckpt --out exported",
    )
    parser.add_argument("--out", type=user_path, metavar="DIR", help="Folder to write; it must be empty or not exist.")
    parser.add_argument("--merge", action="store_true", help="Of an adapter: write base and adapter as one model.")
    options, overrides = parser.parse_known_args(args)
    if options.ckpt_path is None or options.out is None:
        raise ConfigError("give --ckpt_path, the checkpoint, and --out, the folder to write")
    out: Path = options.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists already and is not an empty folder")
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"reading {options.ckpt_path}")
    checkpoint = read(options.ckpt_path, mmap=True)
    parts = build_parts(options, overrides)
    policy: Policy = parts.model.policy
    parts.build_models(Fabric(accelerator="cpu", devices=1, precision=parts.config_dump["trainer"]["precision"]), checkpoint)
    if not policy.tokenizer.chat_template:  # contexts begin with what the tokenizer begins with
        begin = policy.tokenizer.decode(policy.tokenizer.encode("", add_special_tokens=True))
        policy.tokenizer.chat_template = begin + PLAIN_TEMPLATE
    policy.model.generation_config = _generation(parts)
    adapter = policy.adapters is not None and not options.merge
    card = _card(out.resolve().name, parts, checkpoint, adapter)
    weights = policy.trained_parameters() if adapter else list(policy.model.parameters())
    console.print(f"writing {sum(weight.numel() for weight in weights):,} parameters to {out}")
    try:
        out.mkdir(parents=True, exist_ok=True)
        policy.export(out, options.merge)
        (out / "README.md").write_text(card, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write to {out}: {error.strerror or error}") from error
    console.print("done: " + ", ".join(sorted(path.name for path in out.iterdir())))


def _generation(parts: PartsCLI) -> GenerationConfig:
    """Sampling as in the run's evaluations: temperature only, whatever the base model came with."""
    policy, temperature = parts.model.policy, parts.config_dump["evaluation"]["temperature"]
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    source = parts.datamodule.source.scripted
    return GenerationConfig(
        max_new_tokens=source.max_new_tokens if source is not None else None,
        eos_token_id=sorted(policy.stop_ids),
        pad_token_id=policy.tokenizer.pad_token_id,
        **sampling,
    )


def _card(name: str, parts: PartsCLI, checkpoint: dict[str, Any], adapter: bool) -> str:
    """The model card: front matter, what it was trained on, results, use, config."""
    base = parts.model.policy.base_model()
    on_hub = base is not None and not Path(base).exists()
    front = ModelCardData(
        base_model=base if on_hub else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["steppo", "reinforcement-learning", "agent"],
    )
    config = clean_config(parts.config_dump)
    data, model = config["data"]["init_args"], config["model"]["init_args"]
    environment = data["source"].get("init_args", {}).get("env") or data["source"]
    counters = checkpoint["steppo"]["counters"]
    started = "weights from scratch" if base is None else f"`{_clean_text(base)}`"
    return "\n".join(
        [
            "---",
            front.to_yaml(),
            "---",
            "",
            f"# {name}",
            "",
            "A language-model agent, trained with steppo: reinforcement learning at the granularity of interaction steps.",
            "",
            f"- Began as: {started}",
            f"- Environment: `{environment['class_path']}`, split `{data['train_split']}`",
            f"- Credit: `{model['advantage']['class_path']}`; policy loss: `{model['loss']['class_path']}`",
            f"- Trained for: {counters['iterations']} iterations, {counters['updates']} updates, "
            f"{counters['episodes']:,} episodes, {counters['environment_steps']:,} environment steps",
            "",
            "## Results",
            "",
            *_results(checkpoint, config["evaluation"]["temperature"]),
            "",
            "## Use",
            "",
            "```python",
            *_use(name, parts, adapter),
            "```",
            "",
            "## Config of the run",
            "",
            "```yaml",
            yaml.safe_dump(config, sort_keys=False, allow_unicode=True).strip(),
            "```",
            "",
        ]
    )


def _use(name: str, parts: PartsCLI, adapter: bool) -> list[str]:
    """Code that gives the run's own answers: the base stored and computing as in the run, and sampling as evaluated."""
    policy, source = parts.model.policy, parts.datamodule.source.scripted
    arguments = {key: value for key, value in policy.load_arguments().items() if adapter or key == "attn_implementation"}
    loaded = "".join(f"    {key}={value!r},\n" for key, value in arguments.items())
    names = "AutoTokenizer, GenerationConfig" if adapter else "AutoModelForCausalLM, AutoTokenizer"
    mixed = parts.config_dump["trainer"]["precision"] == "bf16-mixed" and (adapter or policy.adapters is None)
    turns, rendering = [{"role": "user", "content": "..."}], ""
    if source is not None:
        source.bind_tokenizer(policy.tokenizer, policy.stop_ids)
        knows = source.renderer.template_knows_tools
        first = [source.context.instructions, "" if knows else source.parser.tools_text(source.tools)]
        if any(first):
            turns.insert(0, {"role": "system", "content": "\n\n".join(filter(None, first))})
        written_with = source.renderer.template_kwargs | ({"tools": [tool.schema for tool in source.tools]} if knows else {})
        rendering = "".join(f", {key}={value!r}" for key, value in written_with.items())
    return [
        *(["import torch"] if mixed or "torch." in loaded else []),
        *(["from peft import AutoPeftModelForCausalLM"] if adapter else []),
        f"from transformers import {names}",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        f"model = Auto{'Peft' if adapter else ''}ModelForCausalLM.from_pretrained("
        + (f'\n    "{name}",\n{loaded})' if loaded else f'"{name}")'),
        *([f'model.generation_config = GenerationConfig.from_pretrained("{name}")'] if adapter else []),
        *(_QUANTIZED_LAYERS if "quantization_config" in arguments else []),
        f"prompt = {turns!r}  # as the context in the config below writes it",
        f"text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False{rendering})",
        'inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt").to(model.device)',
        *(["with torch.autocast(model.device.type, torch.bfloat16):"] if mixed else []),
        f"{'    ' if mixed else ''}action = model.generate(**inputs)",
    ]


def _results(checkpoint: dict[str, Any], temperature: float) -> list[str]:
    """Each split's first evaluation and those of these weights, out of all up to the checkpoint."""
    records = checkpoint.get("callbacks", {}).get("EvaluationCallback", {}).get("history", [])
    if not records:
        return ["The run was not evaluated."]
    iterations = checkpoint["steppo"]["counters"]["iterations"]
    firsts = {record["split"]: record for record in reversed(records)}
    shown = [record for record in records if record["iteration"] == iterations or record is firsts[record["split"]]]
    how = f"at temperature {temperature:g}" if temperature else "greedily"
    return [*(f"- {in_words(record)}" for record in shown), "", f"Played {how}; with 95 % intervals (Wilson's)."]


def clean_config(value: Any, key: str = "") -> Any:
    """A config to show around: no secrets and no paths of a machine."""
    if isinstance(value, dict):
        terse = key in ("", "trainer")  # null is the default there
        return {name: clean_config(entry, name) for name, entry in value.items() if entry is not None or not terse}
    if isinstance(value, list):
        return [clean_config(entry, key) for entry in value]
    if isinstance(value, str):
        return "(removed)" if _SECRET.search(key) else _clean_text(value)
    return value


def _clean_text(text: str) -> str:
    """Text without the user of a URL; of an absolute path, what is below the working directory, or the last part."""
    path = PurePath(text)
    if "\n" in text or not path.is_absolute() or len(path.parts) < 3:  # "/no_think" is no path
        return _USER_IN_URL.sub("", text)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name


if __name__ == "__main__":
    main()
