"""GGUF files: unpacked whole and once, or refused with nothing left behind."""

from __future__ import annotations

import resource
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from advance_step.generate.fingerprint import cache_directory
from advance_step.generate.gguf import unpacked
from advance_step.generate.model import find_model, load_model, stop_token_ids

SIZE, LAYERS, HEADS, WORDS = 32, 2, 4, 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of unpacked models."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "advance-step"


def write(path: Path, without: str = "nothing", seed: int = 0) -> Path:
    """A tiny llama as a GGUF file, but for the tensors whose names begin with `without`."""
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(SIZE)
    writer.add_feed_forward_length(2 * SIZE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(WORDS)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["w", "1", "w1", *(f"t{n}" for n in range(WORDS - 3))])
    writer.add_token_types([1] * WORDS)
    writer.add_token_merges(["w 1"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    blocks = {
        "attn_q": (SIZE, SIZE),
        "attn_k": (SIZE, SIZE),
        "attn_v": (SIZE, SIZE),
        "attn_output": (SIZE, SIZE),
        "attn_norm": (SIZE,),
        "ffn_gate": (2 * SIZE, SIZE),
        "ffn_up": (2 * SIZE, SIZE),
        "ffn_down": (SIZE, 2 * SIZE),
        "ffn_norm": (SIZE,),
    }
    shapes = {f"blk.{n}.{name}.weight": shape for n in range(LAYERS) for name, shape in blocks.items()}
    shapes |= {"token_embd.weight": (WORDS, SIZE), "output_norm.weight": (SIZE,), "output.weight": (WORDS, SIZE)}
    for name, shape in shapes.items():
        if not name.startswith(without):
            writer.add_tensor(name, random.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def embedding(directory: Path) -> torch.Tensor:
    model, _ = load_model(str(directory), torch.float32, print)
    return model.get_input_embeddings().weight.detach()


def test_a_change_in_the_middle_unpacks_again(tmp_path, cache):
    path, said = write(tmp_path / "m.gguf"), []
    first = unpacked(path, said.append)
    assert unpacked(path, said.append) == first and len(said) == 1
    data = bytearray(path.read_bytes())
    before = embedding(first)
    place = data.index(before[5].numpy().tobytes())
    data[place : place + 4 * SIZE] = np.ones(SIZE, np.float32).tobytes()
    path.write_bytes(data)
    second = unpacked(path, said.append)
    assert second != first and len(said) == 2
    after = embedding(second)
    assert torch.equal(after[5], torch.ones(SIZE)) and torch.equal(after[6:], before[6:])


def test_a_file_that_lacks_weights_is_refused_and_not_kept(tmp_path, cache):
    path = write(tmp_path / "m.gguf", without="blk.1.")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"m\.gguf: expected all weights .*, got none for model\.layers\.1\."):
            load_model(str(path), torch.float32, print)
        assert not list(cache.glob("m-*"))


def test_one_part_of_several_is_refused_by_name(tmp_path, cache):
    path = write(tmp_path / "big-00001-of-00003.gguf", without="blk.1.")
    with pytest.raises(ValueError) as error:
        load_model(str(path), torch.float32, print)
    merge = "llama-gguf-split --merge big-00001-of-00003.gguf big.gguf makes one file of them"
    assert str(error.value) == f"--model: {path}: part 1 of 3, and parts are not read: {merge}"


def test_a_file_that_cannot_be_read_leaves_nothing_behind(tmp_path, cache):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ValueError, match=r"--model: .*bad\.gguf: cannot be loaded: ") as error:
        load_model(str(tmp_path / "bad.gguf"), torch.float32, print)
    assert "\n" not in str(error.value) and not list(cache.glob("bad-*"))


def test_a_full_disk_leaves_nothing_behind(tmp_path, cache):
    path = write(tmp_path / "m.gguf")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"m\.gguf cannot be unpacked into .* \(XDG_CACHE_HOME names another place\)"):
            unpacked(path, print)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(cache.glob("m-*"))


def test_the_default_model_is_unpacked(real):
    model, tokenizer = real
    (directory,) = cache_directory().glob(f"{find_model(None).stem}-{'?' * 16}")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in directory.iterdir()}
    assert model.dtype == torch.float32 and not model.training
    assert stop_token_ids(model) == [tokenizer.eos_token_id] == [2]
