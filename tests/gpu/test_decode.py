"""The decode loop on a GPU: its captured steps give the CPU's tokens, and between two looks the host does nothing."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from test_attention import written_out
from tiny_models import FAMILIES, decoder_for, generate, ragged_prompts, requests_for, run, tiny_model

from advance_step.decode import Request, SamplingParams, paged_kernels
from advance_step.decode.steps import CapturedSteps, EagerSteps

PROMPTS = ragged_prompts()
LENGTHS = [7, 1, 20, 3, 9, 2, 12]


@pytest.fixture(scope="module")
def llama_tokens():
    """What transformers makes of PROMPTS on the CPU, 20 tokens each."""
    model = tiny_model("llama")
    return [generate(model, prompt, 20) for prompt in PROMPTS]


@pytest.mark.parametrize("steps_per_sync", [1, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_the_cpus(device, family, steps_per_sync):
    """float32, so that the likeliest token is the same; prompts of all lengths, more of them than rows."""
    model = tiny_model(family)
    params = [SamplingParams(max_new_tokens=n) for n in LENGTHS]
    requests = [Request(i, p, n) for i, (p, n) in enumerate(zip(PROMPTS, params, strict=True))]
    expected = [generate(model, p, n) for p, n in zip(PROMPTS, LENGTHS, strict=True)]
    decoder = decoder_for(model.to(device), batch_size=3, block_size=4, steps_per_sync=steps_per_sync)
    steps = decoder.batch.steps = CapturedSteps(decoder.batch.step, compile=False, min_tokens=8)
    assert run(decoder, requests) == expected
    assert (steps.rows, steps.pages) == ([1, 2, 3], [2, 4, 8, 16])


@pytest.mark.parametrize(
    "sampling",
    [{"temperature": 0.8, "top_p": 0.9}, {"temperature": 1.0, "repetition_penalty": 1.2}, {"logprobs": 2}],
    ids=str,
)
def test_sampled_tokens_are_those_of_steps_that_are_not_captured(device, sampling):
    """One set of graphs for each kind of sampling, captured in the middle of a run."""

    def requests():
        return [
            Request(i, p, SamplingParams(max_new_tokens=20, seed=i, **(sampling if i % 2 else {})))
            for i, p in enumerate(PROMPTS)
        ]

    model = tiny_model("llama").to(device)
    eager = decoder_for(model, batch_size=3)
    eager.batch.steps = EagerSteps(eager.batch.step)
    assert run(decoder_for(model, batch_size=3, steps_per_sync=4), requests()) == run(eager, requests())


def test_stop_tokens(device, llama_tokens):
    model = tiny_model("llama")
    stop = [llama_tokens[0][3], llama_tokens[3][0]]
    expected = [generate(model, prompt, 20, stop) for prompt in PROMPTS]
    decoder = decoder_for(model.to(device), stop_token_ids=stop, steps_per_sync=8)
    assert run(decoder, requests_for(PROMPTS, 20)) == expected


def test_compiled_steps(device, llama_tokens):
    torch._dynamo.reset()
    decoder = decoder_for(tiny_model("llama").to(device), steps_per_sync=4, compile=True)
    assert run(decoder, requests_for(PROMPTS, 20)) == llama_tokens


def test_between_two_syncs_the_host_neither_waits_nor_allocates(device):
    decoder = decoder_for(tiny_model("llama").to(device), steps_per_sync=8)
    steps = decoder.run(requests_for(PROMPTS[:4], 20))
    next(steps)  # the prompts are in
    decoder.batch.steps.run(4, 2, 1)  # captured
    torch.cuda.synchronize()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda._sleep(800_000_000)  # the device is busy for a while
    done = torch.cuda.Event()
    torch.cuda.set_sync_debug_mode("error")
    try:
        decoder.batch.steps.run(4, 2, 7)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    done.record()
    assert not done.query()  # all seven were launched before the first began
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert [len(tokens) for _, tokens in decoder.batch.state.sync()] == [8] * 4


@pytest.mark.parametrize("kernel", [paged_kernels.flash_attn_pages, paged_kernels.varlen_pages])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("heads, kv_heads", [(8, 8), (9, 3)])
def test_kernels_that_read_pages(device, kernel, window, heads, kv_heads):
    if kernel is paged_kernels.flash_attn_pages:
        pytest.importorskip("flash_attn", reason="flash-attn is not installed")
    elif not paged_kernels.takes("torch.nn.attention.varlen", "varlen_attn", "block_table"):
        pytest.skip(f"torch {torch.__version__}'s varlen_attn takes no block table")
    torch.manual_seed(0)
    rows, pages, block_size, head_dim = 5, 3, 256, 64
    layer = torch.randn(rows * pages, 2, kv_heads, block_size, head_dim, dtype=torch.bfloat16, device=device)
    tables = torch.randperm(rows * pages, device=device, dtype=torch.int32).view(rows, pages)
    seq_lens = torch.tensor([1, 255, 256, 257, 700], dtype=torch.int32, device=device)
    query = torch.randn(rows, 1, heads, head_dim, dtype=torch.bfloat16, device=device)
    keys, values = layer.transpose(2, 3).unbind(1)
    wide = torch.cat([tables, tables], 1)[:, :pages]  # columns of a wider table, as the loop has them
    out = kernel(query, keys, values, wide, seq_lens, 0.125, window, None)
    assert out.shape == query.shape
    for row in range(rows):
        stored = layer[tables[row].long()].permute(1, 0, 3, 2, 4).reshape(2, -1, kv_heads, head_dim).cpu()
        expected = written_out(query[row, 0].cpu(), *stored, int(seq_lens[row]) - 1, 0.125, window, None)
        torch.testing.assert_close(out[row, 0].cpu().double(), expected, rtol=2e-2, atol=2e-2)
