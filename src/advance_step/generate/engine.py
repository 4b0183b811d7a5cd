"""A decoder for a run of the command: its sizes, and whether the machine has what it takes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from advance_step.decode import cpu_attention
from advance_step.decode.cache import LayerLayout, PagedKVCache
from advance_step.decode.forward import CompileError
from advance_step.decode.loop import Decoder
from advance_step.decode.model_check import check_model
from advance_step.decode.packed_linear import pack_linears
from advance_step.decode.paged_kernels import default_block_size
from advance_step.generate.memory import free_memory, pages_for
from advance_step.generate.model import context_length, stop_token_ids
from advance_step.generate.settings import Settings

# Steps between two looks of the host, where no option says otherwise. On a GPU a look costs as much as some steps.
STEPS_PER_SYNC = {"cuda": 8}

# To compile SmolLM2-135M took 50 to 60 s (2 cores), and later 8 to 14 s to find it on disk; a step of 8 rows then took
# 13 ms less. Texts that end before --max-new-tokens take fewer steps than are counted.
STEPS_WORTH_COMPILING = 5_000


def make_decoder(
    model: Any, tokenizer: Any, settings: Settings, most: int | None, say: Callable[[str], object] = lambda line: None
) -> Decoder:
    """A decoder for requests as long as the model's context, as far as there is memory.

    On a CPU the model's linear layers are packed (`pack_linears`): it can then be decoded, and not saved.

    most: prompts that there will be, at most, where that is known.
    say: told what takes long.
    Raises ValueError for a model that cannot be decoded, a cache that does not fit, and --compile without a compiler
    or for a model that cannot be compiled.
    """
    on_cpu = model.device.type == "cpu"
    if settings.compile and on_cpu:
        check_compiler()
    compile = worth_compiling(model, settings, most) if settings.compile is None else settings.compile
    layouts, context = check_model(model), context_length(model)
    block_size = settings.block_size or default_block_size(model)
    batch_size = min(settings.batch_size, most or settings.batch_size)
    free, page = free_memory(model.device), page_bytes(layouts, block_size, model.dtype)
    new = settings.sampling["max_new_tokens"]
    num_pages = pages_for(settings.num_pages, page, free, batch_size, context, new, block_size)
    pack_linears(model)
    by_default = 1 if settings.draft_tokens else STEPS_PER_SYNC.get(model.device.type, 1)

    def decoder(compile: bool) -> Decoder:
        return Decoder(
            model,
            batch_size=batch_size,
            block_size=block_size,
            max_seq_len=context,
            num_pages=num_pages,
            stop_token_ids=stop_token_ids(model),
            tokenizer=tokenizer,
            steps_per_sync=settings.steps_per_sync or by_default,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            draft_tokens=settings.draft_tokens,
            compile=compile,
            layouts=layouts,
        )

    try:
        if not (compile and on_cpu):
            return decoder(compile)
        say("compiling the model: about a minute the first time, ten seconds from then on (--no-compile: not at all)")
        try:
            return decoder(compile)
        except CompileError as error:
            if settings.compile:
                raise
            say(f"not compiled, and slower: {error}")
            return decoder(compile=False)
    except (RuntimeError, MemoryError) as error:  # torch's allocators say it as RuntimeError
        raise ValueError(f"--num-pages: no memory for a KV cache of {num_pages} pages: {error}") from error


def page_bytes(layouts: Sequence[LayerLayout], block_size: int, dtype: torch.dtype) -> int:
    """What a page takes in all layers."""
    spare = PagedKVCache.allocate(layouts, 0, block_size, dtype, torch.device("meta"))
    return sum(layer.nbytes for layer in spare.layers)


def worth_compiling(model: Any, settings: Settings, most: int | None) -> bool:
    """Whether a job of `most` prompts is to be compiled where no option says so.

    On a CPU with the native core and a C++ compiler, if it takes `STEPS_WORTH_COMPILING` at least, should every text
    become as long as it may. The number of prompts decides, and not how many are left, so that a job that goes on
    decodes as it began.
    """
    if not most or not cpu_attention.serves(model.device, model.dtype):
        return False
    texts = most * settings.sampling.get("n", 1)
    if texts * settings.sampling["max_new_tokens"] < STEPS_WORTH_COMPILING * min(settings.batch_size, texts):
        return False
    try:
        check_compiler()
    except ValueError:
        return False
    return True


def check_compiler() -> None:
    """ValueError where torch.compile would find no C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ValueError("--compile: expected a C++ compiler (g++, or what CXX names), got none") from error
