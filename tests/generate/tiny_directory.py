"""A tiny model with a tokenizer, as a directory that the command loads."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tiny_models import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# Every turn in brackets: what a template does can be read from its text.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'narrator' %}{{ raise_exception('no narrator') }}"
    "{% endif %}[{{ m['role'] }}:{{ m['content'] }}]{% endfor %}{% if add_generation_prompt %}[assistant:{% endif %}"
)
SPECIAL = ["<s>", "</s>", "<unk>"]


def tiny_tokenizer() -> Any:
    """A token for each printable character of ASCII but three, which the vocabulary of 97 has no room for."""
    letters = [chr(code) for code in range(33, 127) if chr(code) not in "^`~"]
    space, newline = "\u0120", "\u010a"  # as byte-level tokenizers write them
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, space, *letters, newline])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_tiny(directory: Path, family: str = "llama") -> Path:
    """The model and the tokenizer in `directory`."""
    tiny_model(family).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def run_job(model: Path, input: Path, output: Path) -> None:
    """One run of the command in this process, which goes on with the output if there is one."""
    from advance_step.generate.interrupts import terminable
    from advance_step.generate.job import generate
    from advance_step.generate.settings import Settings

    settings = Settings(model=str(model), dtype="float32", sampling={"max_new_tokens": 6, "seed": 0}, batch_size=2)
    with terminable():
        sys.exit(generate([], str(input), str(output), True, settings))
