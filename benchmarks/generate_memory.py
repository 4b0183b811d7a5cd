"""Memory of `advance-step generate` over long inputs: lines are read as rows get free, never all at once.

    python benchmarks/generate_memory.py [--lines 1000 100000]

A tiny model with random weights decodes files of so many lines, 20 tokens a line, each in a process of its own. The
figure is the process's peak resident memory. Writes benchmarks/results/generate-memory-<date>.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tokenizers
import transformers
from report import machine, write

NEW_TOKENS = 20
BAR_MB = 100  # more than the first, at most

# The child reports its own peak: what getrusage says of children is the largest of them all.
RUN = """
import resource, sys
from advance_step.__main__ import main
try:
    main()
finally:
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
"""


def save_tiny(directory: Path) -> None:
    """A model of two small layers, and a tokenizer with a token for each byte."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(directory)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(directory)


def peak(directory: Path, lines: int) -> tuple[float, float]:
    """Peak memory in MB and seconds of a run over so many lines."""
    source, output = directory / f"{lines}.jsonl", directory / f"{lines}.out.jsonl"
    with source.open("w") as file:
        for number in range(lines):
            file.write(json.dumps({"id": f"line-{number}", "prompt": f"What is {number} + {number}?"}) + "\n")
    command = ["generate", "--raw", "--model", str(directory), "--input", str(source), "--output", str(output)]
    command += ["--max-new-tokens", str(NEW_TOKENS), "--batch-size", "64", "--steps-per-sync", "5"]
    begin = time.perf_counter()
    run = subprocess.run([sys.executable, "-c", RUN, *command], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(run.stderr)
    with output.open() as file:
        results = sum(json.loads(line)["tokens"] == NEW_TOKENS for line in file)
    if results != lines:
        raise RuntimeError(f"expected {lines} results of {NEW_TOKENS} tokens, got {results}")
    kib = int(run.stderr.rsplit("peak ", 1)[1])
    return kib * 1024 / 1e6, time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, nargs="+", default=[1000, 10_000, 100_000])
    options = parser.parse_args()
    rows = ["| lines | peak memory, MB | more than the first, MB |", "| ---: | ---: | ---: |"]
    with tempfile.TemporaryDirectory() as name:
        save_tiny(Path(name))
        first = None
        for lines in options.lines:
            megabytes, seconds = peak(Path(name), lines)
            first = megabytes if first is None else first
            rows.append(f"| {lines:,} | {megabytes:.0f} | {megabytes - first:.0f} |")
            print(f"{rows[-1]}  {seconds:.0f} s", flush=True)
    met = "met" if megabytes - first < BAR_MB else "NOT met"
    rows.append(f"\nAt {options.lines[-1]:,} lines we aim at less than {BAR_MB} MB over the first: {met}.")
    title = f"Memory of generate: {machine()}, transformers {transformers.__version__}"
    write(f"generate-memory-{time.strftime('%Y-%m-%d')}", title, __doc__ or "", {"Peak": "\n".join(rows)})


if __name__ == "__main__":
    main()
