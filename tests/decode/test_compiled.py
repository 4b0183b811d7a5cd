"""Steps compiled for the CPU: the same texts, one compilation, clear refusals."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from test_attention import needs_core
from test_packed_linear import needs_packing
from tiny_models import decoder_for, requests_for, run, tiny_model
from torch._dynamo.utils import counters

from advance_step.decode import cpu_attention, pack_linears

needs_compiler = pytest.mark.skipif(not shutil.which("c++"), reason="no compiler")


@needs_core
@needs_compiler
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "mistral"])
@pytest.mark.parametrize(
    "options",
    [{"batch_size": 1}, {"steps_per_sync": 3}, {"max_num_batched_tokens": 7}, {"draft_tokens": 3}],
    ids=str,
)
def test_compiled_texts_are_the_same(prompts, family, options):
    """While rows come and go, and prompts whole or in pieces; in float32, token for token."""
    model = tiny_model(family)
    expected = run(decoder_for(model), requests_for(prompts, 20))
    assert run(decoder_for(model, compile=True, **options), requests_for(prompts, 20)) == expected


@needs_core
@needs_compiler
def test_it_is_compiled_once_for_all_batch_sizes(llama, prompts, tmp_path, monkeypatch):
    """What the compiler made is on disk: another batch, or another process, finds it there."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    counters.clear()
    for hits, (batch_size, max_seq_len) in enumerate([(3, 64), (3, 64), (2, 64), (8, 64), (4, 96)]):
        decoder = decoder_for(llama, batch_size=batch_size, max_seq_len=max_seq_len, compile=True)
        run(decoder, requests_for(prompts, 4))
        assert (counters["inductor"]["fxgraph_cache_miss"], counters["inductor"]["fxgraph_cache_hit"]) == (1, hits)


@needs_core
@needs_compiler
def test_a_model_that_waits_for_values_is_refused(llama):
    model = copy.deepcopy(llama)
    model.model.norm.register_forward_hook(lambda module, args, out: out if out.isfinite().all() else None)
    with pytest.raises(ValueError, match="compile: LlamaForCausalLM cannot be compiled whole: "):
        decoder_for(model, compile=True)


def test_without_the_core_nothing_is_compiled(llama, monkeypatch):
    monkeypatch.setattr(cpu_attention, "serves", lambda device, dtype: False)
    with pytest.raises(ValueError, match="compile: expected the native core's attention on a CPU, got none"):
        decoder_for(llama, compile=True)


@needs_packing
@needs_compiler
def test_packed_and_compiled(prompts):
    """The tokens are those of the packed model up to rounding."""
    model = tiny_model("llama").to(torch.bfloat16)
    pack_linears(model)
    expected = run(decoder_for(model), requests_for(prompts, 6))
    got = run(decoder_for(model, compile=True), requests_for(prompts, 6))
    first = [tokens[0] for tokens in got]
    assert first == [tokens[0] for tokens in expected]  # of the prefill
    same = sum(a == b for x, y in zip(got, expected, strict=True) for a, b in zip(x, y, strict=True))
    assert same >= sum(map(len, expected)) / 2
