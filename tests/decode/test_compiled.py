"""Steps compiled for the CPU, and linear layers packed for it: the same texts, one compilation, clear refusals."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from families import SERVED, family_model
from test_attention import needs_core
from tiny_models import decoder_for, requests_for, run, tiny_model
from torch._dynamo.utils import counters

from advance_step.decode import cpu_attention, pack_linears
from advance_step.decode.model_check import _difference
from advance_step.decode.packed_linear import PackedLinear

needs_compiler = pytest.mark.skipif(not shutil.which("c++"), reason="no compiler")
needs_bfloat16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN does not multiply in bfloat16 here"
)


@needs_core
@needs_compiler
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "mistral"])
@pytest.mark.parametrize("batch_size", [1, 4])  # compiled for one row; for any number
def test_compiled_texts_are_the_same(prompts, family, batch_size):
    """While rows come and go; in float32, token for token."""
    model = tiny_model(family)
    expected = run(decoder_for(model), requests_for(prompts, 20))
    assert run(decoder_for(model, batch_size=batch_size, compile=True), requests_for(prompts, 20)) == expected


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


@needs_bfloat16
@pytest.mark.parametrize("family", SERVED)
def test_a_packed_model_gives_the_same_logits(family):
    """Up to the order of sums, for any number of rows."""
    model = family_model(family).to(torch.bfloat16)
    tokens = torch.randint(5, 90, (3, 7), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(input_ids=tokens, use_cache=False).logits
        alone = model(input_ids=tokens[:1, :1], use_cache=False).logits
        linears = sum(type(module) is torch.nn.Linear for module in model.modules())
        assert pack_linears(model) == linears
        assert not any(type(module) is torch.nn.Linear for module in model.modules())
        assert _difference(model(input_ids=tokens, use_cache=False).logits, expected) < 0.05
        assert _difference(model(input_ids=tokens[:1, :1], use_cache=False).logits, alone) < 0.05


@needs_bfloat16
def test_projections_of_one_input_are_one_matmul():
    model = tiny_model("qwen2").to(torch.bfloat16)  # with biases
    pack_linears(model)
    attention = model.model.layers[0].self_attn
    packed = attention.q_proj.packed
    assert packed is attention.k_proj.packed is attention.v_proj.packed
    x, y = (torch.randn(2, 3, attention.q_proj.in_features).to(torch.bfloat16) for _ in range(2))
    whole = packed.product(x, packed.handle).split(packed.sizes, -1)
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    for order in ([0, 1, 2], [2, 0, 1], [1, 1, 0]):  # whoever asks, and whatever came between
        for part in order:
            assert torch.equal(layers[part](x), whole[part])
            layers[0](y)


@needs_bfloat16
@needs_core
@needs_compiler
def test_packed_and_compiled(prompts):
    """The compiled step looks weights up by their handles; the tokens are those of the packed model up to rounding."""
    model = tiny_model("llama").to(torch.bfloat16)
    pack_linears(model)
    expected = run(decoder_for(model), requests_for(prompts, 6))
    got = run(decoder_for(model, compile=True), requests_for(prompts, 6))
    first = [tokens[0] for tokens in got]
    assert first == [tokens[0] for tokens in expected]  # of the prefill
    same = sum(a == b for x, y in zip(got, expected, strict=True) for a, b in zip(x, y, strict=True))
    assert same >= sum(map(len, expected)) / 2


def test_only_what_pays_is_packed(llama):
    model = copy.deepcopy(llama)
    before = dict(model.named_modules())
    assert pack_linears(model) == 0 and dict(model.named_modules()) == before  # float32

    class Own(torch.nn.Linear):
        pass

    odd = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(8, 8), "k_proj": Own(8, 8), "v_proj": torch.nn.Linear(4, 8)})
    odd = odd.to(torch.bfloat16)
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert pack_linears(odd) == 2  # apart: they have different inputs
        assert type(odd["k_proj"]) is Own and type(odd["q_proj"]) is PackedLinear
        assert odd["q_proj"].packed is not odd["v_proj"].packed


@needs_bfloat16
def test_a_tied_embedding_keeps_its_weight():
    model = tiny_model("llama").to(torch.bfloat16)
    model.tie_weights()
    embedding = model.get_input_embeddings().weight.clone()
    pack_linears(model)
    assert torch.equal(model.get_input_embeddings().weight, embedding)
