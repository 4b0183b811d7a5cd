"""What the tests of every room share: a real model, a tiny one with random weights, and a browser.

transformers is imported by whoever asks for a model, playwright by whoever asks for a tab: the operators' tests run
without them.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from browser import Tab
    from playwright.sync_api import Browser


def pytest_configure() -> None:
    """Whoever runs the tests in a shell's background has Ctrl-C ignored, and so would they, and all that they start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


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


@pytest.fixture(scope="module")  # not longer: as long as it runs, asyncio has a running loop in this thread
def chromium() -> Iterator[Browser]:
    import browser

    with browser.chromium() as started:
        yield started


@pytest.fixture
def tab(chromium: Browser) -> Iterator[Tab]:
    """A page in a headless Chromium that is the test's own; it skips where there is no Chromium."""
    from browser import Tab

    context = chromium.new_context()
    yield Tab(context.new_page())
    context.close()
