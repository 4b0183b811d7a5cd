"""The loop against transformers' own generate, token for token."""

from __future__ import annotations

import random
import shutil
from functools import partial

import pytest
import torch
import transformers
from tiny_models import FAMILIES, decoder_for, generate, requests_for, run, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from advance_step.decode.attention import PAGED
from advance_step.decode.graphs import StepGraphs, doubling
from advance_step.decode.paged_kernels import PagedKernel, varlen_pages
from advance_step.decode.request import Request, pages_for
from advance_step.generate.prompts import encode

TEXTS = ["Why is the sky blue?", "Hi", "Name the largest planet, and say in one sentence what it is made of."]


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("block_size", [1, 16, 256])
def test_page_sizes_and_permuted_tables(llama, prompts, llama_tokens, block_size, permuted):
    decoder = decoder_for(llama, block_size=block_size)
    if permuted:
        random.Random(2).shuffle(decoder.pool.free)
    assert run(decoder, requests_for(prompts, 20)) == llama_tokens
    assert sorted(decoder.pool.free) == list(range(decoder.cache.spare_page))  # every page came back, once


@pytest.mark.parametrize("batch_size", [1, 3, 8])  # rows refilled one by one; in turns; more rows than prompts
@pytest.mark.parametrize("static_rows", [False, True])  # True: padding rows run through the model
@pytest.mark.parametrize("window", [1, 3, 8])
def test_rows_come_and_go(llama, prompts, batch_size, static_rows, window):
    lengths = [7, 1, 20, 3, 9, 2, 12]
    requests = [Request(i, p, n) for i, (p, n) in enumerate(zip(prompts, lengths, strict=True))]
    expected = [generate(llama, p, n) for p, n in zip(prompts, lengths, strict=True)]
    decoder = decoder_for(llama, batch_size=batch_size, window=window)
    decoder.static_rows = static_rows
    assert run(decoder, requests) == expected
    assert {request.finish_reason for request in requests} == {"length"}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, prompts):
    model = tiny_model(family)
    expected = [generate(model, prompt, 12) for prompt in prompts]
    assert run(decoder_for(model, block_size=4), requests_for(prompts, 12)) == expected


@pytest.mark.parametrize("window", [1, 8])
def test_stop_tokens_end_a_row_and_are_kept(llama, prompts, llama_tokens, window):
    stop = [llama_tokens[0][3], llama_tokens[3][0]]  # in the middle of one text, and the first token of another
    expected = [generate(llama, prompt, 20, stop) for prompt in prompts]
    requests = requests_for(prompts, 20)
    assert run(decoder_for(llama, stop_token_ids=stop, window=window), requests) == expected
    assert [r.finish_reason for r in requests] == ["stop" if r.tokens[-1] in stop else "length" for r in requests]
    assert requests[3].tokens == [stop[1]]


def test_few_pages_make_prompts_wait(llama, prompts, llama_tokens):
    requests = requests_for(prompts, 20)
    enough = max(pages_for([request], 1, 16) for request in requests)
    decoder = decoder_for(llama, num_pages=enough + 2)
    widest = 0
    for _ in decoder.run(requests):
        widest = max(widest, len(decoder.rows))
    assert [request.tokens for request in requests] == llama_tokens
    assert widest < 4


def test_too_few_pages_for_a_prompt(llama, prompts):
    decoder = decoder_for(llama, num_pages=3)
    with pytest.raises(RuntimeError, match="KV cache: expected 4 free pages, got 3"):
        run(decoder, requests_for([prompts[3]], 20))


@pytest.mark.parametrize(
    ("prompt", "new", "words"),
    [
        ([1] * 60, 5, "request 1: expected a prompt and new tokens, 64 together at most, got 60 and 5"),
        ([], 5, "request 1: expected a prompt and new tokens, 64 together at most, got 0 and 5"),
        ([1], 0, "request 1: expected a prompt and new tokens, 64 together at most, got 1 and 0"),
    ],
)
def test_requests_that_do_not_fit_are_refused(llama, prompt, new, words):
    decoder = decoder_for(llama)
    good = Request(0, [5], 3)
    with pytest.raises(ValueError, match=words):
        run(decoder, [good, Request(1, prompt, new)])
    assert good.tokens == [] and len(decoder.pool.free) == decoder.cache.spare_page


def test_a_run_given_up_leaves_nothing_behind(llama, prompts, llama_tokens):
    decoder = decoder_for(llama)
    given_up = decoder.run(requests_for(prompts, 20))
    next(given_up), next(given_up)
    given_up.close()
    assert decoder.rows == [] and len(decoder.pool.free) == decoder.cache.spare_page
    assert run(decoder, requests_for(prompts, 20)) == llama_tokens


def test_rows_are_filled_before_a_window(llama, prompts, llama_tokens, monkeypatch):
    """However many prefills that takes."""
    monkeypatch.setattr("advance_step.decode.loop.PREFILL_TOKENS", 16)
    decoder = decoder_for(llama, window=8)
    assert run(decoder, requests_for(prompts[:4], 20)) == llama_tokens[:4]
    assert decoder.figures.steps == 19


def test_a_window_below_1_is_refused(llama):
    with pytest.raises(ValueError, match="window: expected window >= 1, got 0"):
        decoder_for(llama, window=0)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_follow_the_longest_row_are_refused(kind):
    config = FAMILIES["llama"]()
    config.rope_parameters = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    model = tiny_model("llama")
    model.config.rope_parameters = config.rope_parameters
    with pytest.raises(ValueError, match=f"got {kind} RoPE in LlamaForCausalLM"):
        decoder_for(model)


def test_pages_for_counts_the_largest():
    requests = [Request(0, [1] * 16, 1), Request(1, [1] * 3, 5), Request(2, [1] * 40, 24)]
    assert pages_for(requests, 2, 16) == 2 + 4


def test_long_prompts_are_prefilled_apart(llama, prompts, llama_tokens, monkeypatch):
    monkeypatch.setattr("advance_step.decode.loop.PREFILL_TOKENS", 20)
    assert run(decoder_for(llama), requests_for(prompts, 20)) == llama_tokens


def test_padding_rows_are_neutral_after_the_run(llama, prompts):
    decoder = decoder_for(llama)
    run(decoder, requests_for(prompts, 6))
    assert decoder.state.seq_lens.tolist() == [1] * 4
    assert (decoder.state.block_tables == decoder.cache.spare_page).all()
    assert all(torch.isfinite(layer).all() for layer in decoder.cache.layers)


def test_figures_count(llama, prompts):
    decoder = decoder_for(llama)
    run(decoder, requests_for(prompts[:4], 20))
    assert decoder.figures.tokens == 80
    assert decoder.figures.steps == 19  # the first tokens come with the prompts
    assert 0 < decoder.figures.advance_seconds < decoder.figures.decode_seconds < decoder.figures.seconds


def test_the_host_looks_once_per_window(llama, prompts):
    decoder = decoder_for(llama, window=8)
    looks, look = [], decoder.state.look
    decoder.state.look = lambda rows: looks.append(rows) or look(rows)
    run(decoder, requests_for(prompts[:4], 20))
    assert decoder.figures.steps == 19  # the first tokens come with the prompts; the last window is cut short
    assert len(looks) == 1 + 3


def test_steps_replayed_at_captured_sizes(llama, prompts):
    """As on a GPU, but that a replay is a call: more rows and wider tables than are live, and padding in between."""
    lengths = [7, 1, 20, 3, 9, 2, 12]
    requests = [Request(i, p, n) for i, (p, n) in enumerate(zip(prompts, lengths, strict=True))]
    decoder = decoder_for(llama, batch_size=5, window=4)
    replayed = []

    def step(rows, pages):
        replayed.append((rows, pages))
        decoder._step(rows, pages)

    sizes = [(rows, pages) for rows in doubling(1, 5) for pages in doubling(1, 4)]
    decoder.graphs = StepGraphs({size: partial(step, *size) for size in sizes})
    assert run(decoder, requests) == [generate(llama, p, n) for p, n in zip(prompts, lengths, strict=True)]
    assert {(5, 4), (1, 2)} <= set(replayed) <= set(sizes)


def test_captured_sizes():
    assert doubling(1, 6) == [1, 2, 4, 6]
    assert doubling(8, 5) == [5]
    graphs = StepGraphs(dict.fromkeys([(8, 4), (8, 2), (1, 4), (1, 2)], lambda: None))
    assert [graphs.fit(*size) for size in [(1, 1), (1, 3), (2, 2), (8, 4)]] == [(1, 2), (1, 4), (8, 2), (8, 4)]


class OnDevice(TorchDispatchMode):
    """Refuses an operator that reads a value back to the host, or meets a tensor that lies there.

    On torch's meta device the former has no kernel: there are no values.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]:
            assert tensor.device.type == "meta", f"{func} meets a tensor on {tensor.device}"
        return out


@pytest.mark.parametrize(
    ("family", "kernel"),
    [
        *((family, None) for family in FAMILIES),
        *((family, PagedKernel("varlen", varlen_pages)) for family in FAMILIES if family != "gemma2"),  # softcap
    ],
)
def test_a_step_is_device_work_only(family, kernel):
    """What a graph captures: the host reads nothing, and copies nothing to the device."""
    model = tiny_model(family).to(torch.bfloat16).to("meta")
    model.set_attn_implementation(PAGED)
    decoder = decoder_for(model, block_size=256, max_seq_len=600, stop_token_ids=[3], window=8)
    decoder.kernel = kernel
    with OnDevice(), torch.inference_mode():
        decoder._step(4, 3)
        decoder._step(2, 1)


def test_host_work_in_a_step_is_seen():
    with OnDevice():
        with pytest.raises(RuntimeError, match="item"):
            torch.zeros(1, device="meta").item()
        with pytest.raises(AssertionError, match="on cpu"):
            torch.tensor([1]).to("meta")


@pytest.mark.skipif(not shutil.which("c++"), reason="no compiler")
def test_compiled_once_as_lengths_grow(llama, prompts, llama_tokens):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    decoder = decoder_for(llama, compile=True)
    assert run(decoder, requests_for(prompts, 20)) == llama_tokens
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert torch._dynamo.utils.counters["inductor"]["mkldnn_linear_weight_pack_matcher_count"] > 0  # frozen


def test_compiled_once_for_all_captured_sizes(llama):
    """And once more for a single row. (What the compiler is given is the same whatever it makes of it.)"""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    llama.set_attn_implementation(PAGED)
    decoder = decoder_for(llama, batch_size=8, max_seq_len=128)
    decoder.compiled = True
    decoder.forward = torch.compile(decoder._forward, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        for rows in (8, 4, 2, 1):
            for pages in (8, 4, 2):
                decoder._step(rows, pages)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_models_without_the_attention_interface_are_refused():
    mamba = transformers.MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=1)
    with pytest.raises(ValueError, match="model: expected a causal LM on transformers' attention interface, got Mamba"):
        decoder_for(transformers.MambaForCausalLM(mamba))


@pytest.mark.parametrize("block_size", [1, 16, 256])
def test_real_model(real, block_size):
    model, tokenizer = real
    ids = [encode(tokenizer, text, raw=False) for text in TEXTS]
    expected = [generate(model, prompt, 10, [2]) for prompt in ids]
    decoder = decoder_for(model, batch_size=2, block_size=block_size, max_seq_len=96, stop_token_ids=[2])
    random.Random(3).shuffle(decoder.pool.free)
    decoder.static_rows = True
    assert run(decoder, requests_for(ids, 10)) == expected
