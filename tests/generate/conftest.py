"""The tiny model of the command's tests."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny model and its tokenizer."""
    from tiny_directory import save_tiny

    return save_tiny(tmp_path_factory.mktemp("tiny"))
