"""Models for the tests of every room: the real one, and a tiny one with random weights.

transformers is imported by whoever asks for one: the operators' tests run without it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def real() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct and its tokenizer; unpacked on first use, as a user would find it."""
    from advance_step.generate.model import load_model

    return load_model(None, torch.float32, print)


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    from tiny_models import ragged_prompts

    return ragged_prompts()


@pytest.fixture(scope="session")
def llama() -> Any:
    from tiny_models import tiny_model

    return tiny_model("llama")


@pytest.fixture(scope="session")
def llama_tokens(llama: Any, prompts: list[list[int]]) -> list[list[int]]:
    """What generate gives for `prompts`, 20 tokens each."""
    from tiny_models import generate

    return [generate(llama, prompt, 20) for prompt in prompts]
