"""A GGUF file as a directory that transformers loads, made once and kept in the user's cache."""

import io
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import GgufConfig

from advance_step.generate.fingerprint import cache_directory, file_fingerprint
from advance_step.generate.loading import load_tokenizer, load_weights

PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")  # what llama.cpp calls the parts of one model


def unpacked(gguf: Path, say: Callable[[str], None]) -> Path:
    """The directory of a GGUF file in float32 (exact), made on first use.

    Raises ValueError for a file that cannot be read, that lacks weights or that is one part of several, and OSError
    where there is no room; nothing is left behind then.
    """
    if part := PART.search(gguf.name):
        raise ValueError(
            f"--model: {gguf}: part {int(part[1])} of {int(part[2])}, and parts are not read: "
            f"llama-gguf-split --merge {gguf.name} {PART.sub('.gguf', gguf.name)} makes one file of them"
        )
    directory = cache_directory() / f"{gguf.stem}-{file_fingerprint(gguf)[:16]}"
    if directory.is_dir():
        return directory
    say(f"unpacking {gguf.name} into {directory} (once, about half a minute)")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        # Made beside its place and then renamed: what stands there is whole, whoever else unpacks at the same time.
        unfinished = Path(tempfile.mkdtemp(prefix=f"{gguf.stem}-", dir=directory.parent))
    except OSError as error:
        raise _no_room(gguf, directory, error) from error
    try:
        # The reader always draws a progress bar: good in a terminal, not in a log.
        with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):
            model = load_weights(
                gguf.parent,
                gguf_file=gguf.name,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
            )
        tokenizer = load_tokenizer(gguf.parent, gguf_file=gguf.name)
        try:
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
        except (OSError, SafetensorError) as error:
            raise _no_room(gguf, directory, error) from error
        try:
            unfinished.rename(directory)
        except OSError:
            if not directory.is_dir():  # otherwise somebody else was first, and theirs is as good
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return directory


def _no_room(gguf: Path, directory: Path, error: Exception) -> OSError:
    place = f"{directory} (XDG_CACHE_HOME names another place)"
    return OSError(f"--model: {gguf.name} cannot be unpacked into {place}: {error}")
