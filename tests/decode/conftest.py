"""Models: the real one, and tiny ones of several families with random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import generate, ragged_prompts, tiny_model

from advance_step.decode.model import load_model


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    return ragged_prompts()


@pytest.fixture(scope="session")
def llama() -> Any:
    return tiny_model("llama")


@pytest.fixture(scope="session")
def llama_tokens(llama: Any, prompts: list[list[int]]) -> list[list[int]]:
    """What generate gives for `prompts`, 20 tokens each."""
    return [generate(llama, prompt, 20) for prompt in prompts]


@pytest.fixture(scope="session")
def real() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct and its tokenizer; unpacked on first use, as a user would find it."""
    return load_model(None, torch.float32, print)
