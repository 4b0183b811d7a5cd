"""Sizes of a decoder, and what the machine has not got."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from test_attention import needs_core
from test_compiled import needs_compiler
from tiny_models import tiny_model
from torch._inductor import config, cpp_builder

from advance_step.decode.layouts import layouts_of
from advance_step.generate import engine
from advance_step.generate.engine import check_compiler, make_decoder, page_bytes, worth_compiling
from advance_step.generate.memory import free_memory, pages_for
from advance_step.generate.settings import Settings


def test_pages_for_every_row_and_for_one_as_long_as_can_be():
    assert pages_for(None, 1000, 10**9, batch_size=4, context=8192, max_new_tokens=128, block_size=16) == 8192 // 16
    assert pages_for(None, 1000, 10**9, batch_size=8, context=8192, max_new_tokens=128, block_size=16) == 8 * 1152 // 16
    assert pages_for(None, 1000, 10**9, batch_size=8, context=100, max_new_tokens=128, block_size=16) == 50
    assert pages_for(None, 1000, 100_000, batch_size=4, context=8192, max_new_tokens=128, block_size=16) == 80
    assert pages_for(7, 1000, 100_000, batch_size=4, context=8192, max_new_tokens=128, block_size=16) == 7


def test_a_cache_that_does_not_fit_is_refused():
    sizes = {"batch_size": 4, "context": 8192, "max_new_tokens": 128, "block_size": 16}
    with pytest.raises(
        ValueError, match=r"--num-pages: expected a KV cache of at most 1\.0 GiB, got 3 pages, 1\.5 GiB"
    ):
        pages_for(3, 2**29, 2**30, **sizes)
    with pytest.raises(ValueError, match="--block-size: no memory for a page of the KV cache, 2 MiB"):
        pages_for(None, 2**21, 2**21, **sizes)
    settings = Settings(num_pages=2**45)
    with pytest.raises(ValueError, match="--num-pages: expected a KV cache of at most "):
        make_decoder(tiny_model("llama"), None, settings, None)


def test_a_page_and_the_free_memory_are_counted_in_bytes():
    model = tiny_model("llama")
    layers, heads, head_dim, float32 = 3, 2, 8, 4
    assert page_bytes(layouts_of(model), 16, model.dtype) == layers * 2 * heads * 16 * head_dim * float32
    assert 2**20 < free_memory(torch.device("cpu")) < 2**50


def test_no_more_rows_than_requests():
    decoder = make_decoder(tiny_model("llama"), None, Settings(), 3)
    assert decoder.batch_size == 3


def test_no_compiler():
    """Where torch would look for one."""
    with config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        cpp_builder.cpp_compiler_search.cache_clear()
        with pytest.raises(
            ValueError, match=r"--compile: expected a C\+\+ compiler \(g\+\+, or what CXX names\), got none"
        ):
            make_decoder(tiny_model("llama"), None, Settings(compile=True), None)
    cpp_builder.cpp_compiler_search.cache_clear()
    check_compiler()


@needs_core
@needs_compiler
def test_what_is_worth_compiling():
    """5,000 steps, should every text become as long as it may."""
    model, sampling = tiny_model("llama"), {"max_new_tokens": 100, "seed": 0, "temperature": 1.0}
    for batch_size, n, least in [(1, 1, 50), (8, 1, 400), (8, 2, 200), (64, 4, 800)]:
        settings = Settings(batch_size=batch_size, sampling=sampling | {"n": n})
        assert not worth_compiling(model, settings, least - 1) and worth_compiling(model, settings, least)
        assert not worth_compiling(model, settings, None)  # nobody knows how many will come
        assert not worth_compiling(model, settings, 0)
        assert not worth_compiling(copy.deepcopy(model).to("meta"), settings, least)
    with config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        cpp_builder.cpp_compiler_search.cache_clear()
        assert not worth_compiling(model, settings, least)
    cpp_builder.cpp_compiler_search.cache_clear()


@needs_core
@needs_compiler
@pytest.mark.parametrize(
    "compile, most, compiled", [(None, 99, False), (None, 100, True), (False, 100, False), (True, 1, True)]
)
def test_what_pays_is_compiled_and_said(monkeypatch, compile, most, compiled):
    monkeypatch.setattr(engine, "STEPS_WORTH_COMPILING", 100)
    said = []
    settings = Settings(compile=compile, batch_size=1, sampling={"max_new_tokens": 1, "seed": 0})
    decoder = make_decoder(tiny_model("llama"), None, settings, most, said.append)
    assert (decoder.forward.compiled is not None) == decoder.compiled == compiled
    assert [line.split(":")[0] for line in said] == ["compiling the model"] * compiled


@needs_core
@needs_compiler
def test_a_model_that_cannot_be_compiled(monkeypatch):
    """It is decoded as it is, unless --compile was given."""
    monkeypatch.setattr(engine, "STEPS_WORTH_COMPILING", 1)
    model = tiny_model("llama")
    model.model.norm.register_forward_hook(lambda module, args, out: out if out.isfinite().all() else None)
    said = []
    decoder = make_decoder(model, None, Settings(), 100, said.append)
    assert decoder.forward.compiled is None and not decoder.compiled
    assert said[1].startswith("not compiled, and slower: compile: LlamaForCausalLM cannot be compiled whole: ")
    with pytest.raises(ValueError, match="compile: LlamaForCausalLM cannot be compiled whole: "):
        make_decoder(model, None, Settings(compile=True), 100, said.append)


def test_models_that_cannot_be_served_are_refused_by_name():
    sizes = {"vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 2}
    for family in (
        transformers.MambaConfig(**sizes, state_size=2),
        transformers.BloomConfig(vocab_size=97, hidden_size=16, n_layer=1, n_head=2),
        transformers.RwkvConfig(**sizes, attention_hidden_size=16),
    ):
        model = transformers.AutoModelForCausalLM.from_config(family).eval()
        with pytest.raises(ValueError, match=f"model: {type(model).__name__} cannot be decoded over pages: "):
            make_decoder(model, None, Settings(), None)
