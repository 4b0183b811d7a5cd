"""The loop against transformers' own generate, token for token."""

from __future__ import annotations

import random

import pytest
import torch
import transformers
from tiny_models import FAMILIES, decoder_for, generate, requests_for, run, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from advance_step import decode
from advance_step.decode import Completion, Decoder, Request, SamplingParams, cpu_attention
from advance_step.decode.attention import paged
from advance_step.decode.model_check import check_model
from advance_step.decode.paged_kernels import PagedKernel, varlen_pages
from advance_step.decode.pages import PagePool
from advance_step.decode.steps import CapturedSteps, EagerSteps, doubling, mark_captured
from advance_step.decode.text import encode

TEXTS = ["Why is the sky blue?", "Hi", "Name the largest planet, and say in one sentence what it is made of."]


class PaddedSteps(EagerSteps):
    """Padding rows run through the model, as where the step is compiled."""

    def run(self, rows: int, pages: int, steps: int) -> None:
        super().run(self.step.state.num_seqs, pages, steps)


class ReplayedSteps(CapturedSteps):
    """As on a GPU, but that a replay is a call: more rows and wider tables than are live, and padding in between."""

    def capture(self):
        self.replayed = []

        def replay(rows: int, pages: int) -> None:
            self.replayed.append((rows, pages))
            self.step(rows, pages)

        return {(r, p): (lambda r=r, p=p: replay(r, p)) for r in self.rows for p in self.pages}


def of_lengths(prompts: list[list[int]], lengths: list[int]) -> list[Request]:
    return [
        Request(number, prompt, SamplingParams(max_new_tokens=length))
        for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
    ]


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("block_size", [1, 16, 256])
def test_page_sizes_and_permuted_tables(llama, prompts, llama_tokens, block_size, permuted):
    decoder = decoder_for(llama, block_size=block_size)
    if permuted:
        pages = list(range(decoder.pool.size))
        random.Random(2).shuffle(pages)
        decoder.pool = PagePool(pages)
    assert run(decoder, requests_for(prompts, 20)) == llama_tokens
    assert decoder.pool.available == decoder.pool.size == decoder.cache.spare_page  # every page came back


@pytest.mark.parametrize("batch_size", [1, 3, 8])  # rows refilled one by one; in turns; more rows than prompts
@pytest.mark.parametrize("way", [EagerSteps, PaddedSteps])
@pytest.mark.parametrize("steps_per_sync", [1, 3, 8])
def test_rows_come_and_go(llama, prompts, batch_size, way, steps_per_sync):
    lengths = [7, 1, 20, 3, 9, 2, 12]
    requests = of_lengths(prompts, lengths)
    expected = [generate(llama, p, n) for p, n in zip(prompts, lengths, strict=True)]
    decoder = decoder_for(llama, batch_size=batch_size, steps_per_sync=steps_per_sync)
    decoder.batch.steps = way(decoder.batch.step)
    assert run(decoder, requests) == expected
    assert {request.finish_reason for request in requests} == {"length"}


def test_steps_replayed_at_captured_sizes(llama, prompts, monkeypatch):
    monkeypatch.setattr(cpu_attention, "serves", lambda device, dtype: False)  # as on a GPU
    lengths = [7, 1, 20, 3, 9, 2, 12]
    decoder = decoder_for(llama, batch_size=5, steps_per_sync=4)
    steps = decoder.batch.steps = ReplayedSteps(decoder.batch.step, compile=False, min_tokens=32)
    expected = [generate(llama, p, n) for p, n in zip(prompts, lengths, strict=True)]
    assert run(decoder, of_lengths(prompts, lengths)) == expected
    assert {(5, 4), (1, 2)} <= set(steps.replayed) <= {(r, p) for r in (1, 2, 4, 5) for p in (2, 4)}


def test_captured_sizes(llama, monkeypatch):
    monkeypatch.setattr(cpu_attention, "serves", lambda device, dtype: False)  # as on a GPU
    assert doubling(1, 6) == [1, 2, 4, 6]
    assert doubling(8, 5) == [5]
    steps = CapturedSteps(decoder_for(llama, batch_size=8).batch.step, compile=False, min_tokens=32)
    assert (steps.rows, steps.pages) == ([1, 2, 4, 8], [2, 4])
    assert [steps.fit(*size) for size in [(1, 1), (3, 3), (2, 2), (8, 4)]] == [(1, 2), (4, 4), (2, 2), (8, 4)]


@pytest.mark.parametrize("steps_per_sync", [1, 8])
def test_stop_tokens_end_a_row_and_are_kept(llama, prompts, llama_tokens, steps_per_sync):
    stop = [llama_tokens[0][3], llama_tokens[3][0]]  # in the middle of one text, and the first token of another
    expected = [generate(llama, prompt, 20, stop) for prompt in prompts]
    requests = requests_for(prompts, 20)
    assert run(decoder_for(llama, stop_token_ids=stop, steps_per_sync=steps_per_sync), requests) == expected
    assert [r.finish_reason for r in requests] == ["stop" if r.tokens[-1] in stop else "length" for r in requests]
    assert requests[3].tokens == [stop[1]]


@pytest.mark.parametrize("steps_per_sync", [1, 8])
def test_rows_have_their_own_stop_tokens(llama, prompts, llama_tokens, steps_per_sync):
    """And ignore the model's, though the device stops by those on which all agree."""
    eos = llama_tokens[0][3]
    params = [
        SamplingParams(max_new_tokens=20),
        SamplingParams(max_new_tokens=20, ignore_eos=True),
        SamplingParams(max_new_tokens=20, stop_token_ids=(llama_tokens[0][6],), ignore_eos=True),
        SamplingParams(max_new_tokens=20, stop_token_ids=(llama_tokens[0][1],)),
    ]
    requests = [Request(number, prompts[0], sampling) for number, sampling in enumerate(params)]
    run(decoder_for(llama, stop_token_ids=[eos], steps_per_sync=steps_per_sync), requests)
    tokens = llama_tokens[0]
    ends = [tokens.index(stop) + 1 for stop in (eos, tokens[6], tokens[1])]
    assert [len(r.tokens) for r in requests] == [ends[0], 20, ends[1], min(ends[0], ends[2])]
    assert all(r.tokens == tokens[: len(r.tokens)] for r in requests)


@pytest.mark.parametrize("share_prefixes", [True, False])
@pytest.mark.parametrize("steps_per_sync", [1, 3, 8])
@pytest.mark.parametrize("block_size", [1, 4])
def test_few_pages_put_rows_back(llama, prompts, llama_tokens, block_size, steps_per_sync, share_prefixes):
    """The youngest wait and go on later; with several steps to a sync, rows stand still for want of a page."""
    requests = requests_for(prompts, 20)
    decoder = decoder_for(
        llama,
        block_size=block_size,
        num_pages=max(request.pages_needed(block_size) for request in requests) + 2,
        steps_per_sync=steps_per_sync,
        share_prefixes=share_prefixes,
    )
    assert run(decoder, requests) == llama_tokens
    assert decoder.figures.preemptions > 0
    assert decoder.pool.available == decoder.pool.size


@pytest.mark.parametrize("max_num_batched_tokens", [1, 5, 16, 20])
def test_long_prompts_are_prefilled_in_pieces(llama, prompts, llama_tokens, max_num_batched_tokens):
    decoder = decoder_for(llama, max_num_batched_tokens=max_num_batched_tokens)
    assert run(decoder, requests_for(prompts, 20)) == llama_tokens
    assert decoder.figures.prefill_tokens == sum(map(len, prompts))


@pytest.mark.parametrize("budget", [7, 4096])
@pytest.mark.parametrize("share", [True, False])
def test_a_common_prefix_is_computed_once(llama, prompts, share, budget):
    prefix = prompts[3] + prompts[4]  # three pages full
    common = [prefix + prompt for prompt in prompts]
    expected = [generate(llama, prompt, 8) for prompt in common]
    decoder = decoder_for(llama, max_seq_len=96, share_prefixes=share, max_num_batched_tokens=budget)
    assert run(decoder, requests_for(common, 8)) == expected
    assert decoder.figures.shared_tokens == (48 * 6 if share else 0)
    before = decoder.figures.prefill_tokens
    assert run(decoder, requests_for(common, 8)) == expected  # pages are kept while they are not needed
    assert (decoder.figures.prefill_tokens - before < len(common) * 17) == share


def test_steps_are_cut_at_the_last_rows_end(llama, prompts, llama_tokens):
    decoder = decoder_for(llama, steps_per_sync=8, max_num_batched_tokens=16)
    assert run(decoder, requests_for(prompts[:4], 20)) == llama_tokens[:4]
    assert decoder.figures.steps == 19  # the first tokens come with the prompts, of which all are in before a step
    assert decoder.figures.tokens == 80


def test_the_host_looks_once_per_sync(llama, prompts):
    decoder = decoder_for(llama, steps_per_sync=8)
    syncs, sync = [], decoder.batch.state.sync
    decoder.batch.state.sync = lambda rows: syncs.append(rows) or sync(rows)
    run(decoder, requests_for(prompts[:4], 20))
    assert len(syncs) == 1 + 3


def test_requests_are_drawn_as_rows_get_free(llama, prompts):
    drawn = []

    def source():
        for request in requests_for(prompts, 5):
            drawn.append(request)
            yield request

    decoder = decoder_for(llama, batch_size=2)
    most = 0
    for _ in decoder.run(source()):
        most = max(most, len(drawn) - sum(request.finish_reason is not None for request in drawn))
    assert len(drawn) == 7 and most <= 3  # the rows, and the one that is next


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request(1, [1] * 60, SamplingParams(max_new_tokens=5)), "a prompt and new tokens of at most 64 together"),
        (Request(1, []), "expected a prompt, got no token"),
        (Request(1, [5, 97], SamplingParams(max_new_tokens=5)), r"expected token ids in \[0, 97\), got 97"),
        (Request(1, [5], SamplingParams(max_new_tokens=5, stop=("x",))), "no stop strings without a tokenizer"),
        (Request(1, [5], SamplingParams(max_new_tokens=5, logprobs=21)), "logprobs <= 20, got 21"),
        (
            Request(1, [5], SamplingParams(max_new_tokens=5), tokens=[3]),
            "a request that has not been decoded, got one with 1 tokens",
        ),
    ],
)
def test_requests_that_do_not_fit_are_refused(llama, request_, words):
    decoder = decoder_for(llama)
    with pytest.raises(ValueError, match=f"request 1: .*{words}"):
        run(decoder, [request_])
    assert decoder.num_rows == 0 and decoder.pool.available == decoder.pool.size


def test_a_request_that_the_pool_cannot_hold_alone_is_named(llama, prompts):
    decoder = decoder_for(llama, num_pages=3)
    with pytest.raises(ValueError, match="request 0: expected at most 3 pages, all that there are, got 4"):
        run(decoder, requests_for([prompts[3]], 20))


def test_the_same_request_twice_is_refused(llama, prompts):
    request = requests_for(prompts[:1], 4)[0]
    decoder = decoder_for(llama)
    with pytest.raises(ValueError, match="request 0: expected each request once"):
        run(decoder, [request, request])
    request.tokens.clear()
    run(decoder, [request])
    with pytest.raises(ValueError, match="request 0: expected a request that has not been decoded"):
        run(decoder, [request])


@pytest.mark.parametrize("name", ["batch_size", "block_size", "num_pages", "steps_per_sync", "max_num_batched_tokens"])
def test_settings_below_1_are_refused(llama, name):
    with pytest.raises(ValueError, match=f"{name}: expected {name} >= 1, got 0"):
        Decoder(llama, **{"batch_size": 1, "block_size": 4, "max_seq_len": 8, "num_pages": 2, name: 0})


def test_a_run_given_up_leaves_nothing_behind(llama, prompts, llama_tokens):
    decoder = decoder_for(llama)
    given_up = decoder.run(requests_for(prompts, 20))
    next(given_up), next(given_up)
    with pytest.raises(RuntimeError, match="expected one run at a time"):
        next(decoder.run([]))
    given_up.close()
    assert decoder.num_rows == 0 and decoder.pool.available == decoder.pool.size
    assert run(decoder, requests_for(prompts, 20)) == llama_tokens


@pytest.mark.parametrize("call", [0, 1, 3])
def test_a_run_that_fails_leaves_no_wrong_page_behind(llama, prompts, llama_tokens, call):
    """Pages that a failed pass was to fill are not taken for filled."""
    decoder = decoder_for(llama, max_num_batched_tokens=30, block_size=4)
    calls = 0

    def fails(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls > call:
            raise ZeroDivisionError

    hook = llama.model.layers[1].register_forward_pre_hook(fails)
    with pytest.raises(ZeroDivisionError):
        run(decoder, requests_for(prompts, 20))
    hook.remove()
    assert decoder.pool.available == decoder.pool.size
    assert run(decoder, requests_for(prompts, 20)) == llama_tokens


def test_the_model_is_as_it_was_after_a_run(llama, prompts):
    llama.set_attn_implementation("eager")
    run(decoder_for(llama), requests_for(prompts[:1], 4))
    assert llama.config._attn_implementation == "eager"


def test_padding_rows_are_neutral_after_the_run(llama, prompts):
    decoder = decoder_for(llama)
    run(decoder, requests_for(prompts, 6))
    state = decoder.batch.state
    assert state.seq_lens.tolist() == [1] * 4 and state.num_rows == 0
    assert (state.block_tables[0] == decoder.cache.spare_page).all()


def test_for_requests_has_room_for_every_row_and_no_more(llama):
    lengths = [(16, 1), (3, 5), (40, 24)]
    requests = [Request(i, [1] * p, SamplingParams(max_new_tokens=n)) for i, (p, n) in enumerate(lengths)]
    decoder = Decoder.for_requests(llama, requests, batch_size=2, block_size=16)
    assert (decoder.pool.size, decoder.max_seq_len, decoder.batch_size) == (1 + 4, 64, 2)
    with pytest.raises(ValueError, match="requests: expected at least one, got none"):
        Decoder.for_requests(llama, [])


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
    decoder = decoder_for(model, block_size=256, max_seq_len=600, stop_token_ids=[3], steps_per_sync=8)
    decoder.forward.kernel = kernel
    with paged(model), OnDevice(), torch.inference_mode():
        decoder.batch.step(4, 3)
        decoder.batch.step(2, 1)


def test_host_work_in_a_step_is_seen():
    with OnDevice():
        with pytest.raises(RuntimeError, match="item"):
            torch.zeros(1, device="meta").item()
        with pytest.raises(AssertionError, match="on cpu"):
            torch.tensor([1]).to("meta")


def test_compiled_once_for_all_captured_sizes(llama, monkeypatch):
    """And once more for a single row. (What the compiler is given is the same whatever it makes of it.)"""
    monkeypatch.setattr(cpu_attention, "serves", lambda device, dtype: False)  # as on a GPU
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    step = decoder_for(llama, batch_size=8, max_seq_len=128).batch.step
    logits = torch.compile(step.logits, fullgraph=True, backend="aot_eager")
    step.logits = lambda *inputs: logits(*mark_captured(list(inputs), gathered=True))
    with paged(llama), torch.inference_mode():
        for rows in (8, 4, 2, 1):
            for pages in (8, 4, 2):
                step(rows, pages)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_between_two_yields_the_model_is_free(llama, prompts, llama_tokens):
    """For its own generate, and for another decoder, in whatever order the two runs end."""
    llama.set_attn_implementation(own := "eager")
    requests, others = requests_for(prompts, 20), requests_for(prompts, 20)
    run_of_one, run_of_other = decoder_for(llama).run(requests), decoder_for(llama, batch_size=2).run(others)
    next(run_of_one)
    next(run_of_other)
    assert llama.config._attn_implementation == own
    ids = torch.tensor([prompts[0]])
    out = llama.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    assert out[0, len(prompts[0]) :].tolist() == llama_tokens[0]
    for _ in zip(run_of_one, run_of_other, strict=False):
        assert llama.config._attn_implementation == own
    for left in (run_of_one, run_of_other):
        list(left)
    assert [r.tokens for r in requests] == [r.tokens for r in others] == llama_tokens
    assert llama.config._attn_implementation == own


def test_layouts_save_the_check_of_the_model(llama, prompts, llama_tokens):
    layouts = check_model(llama)
    passes = []
    hook = llama.register_forward_pre_hook(lambda *args: passes.append(1))
    decoder = decoder_for(llama, layouts=layouts)
    assert not passes
    assert run(decoder, requests_for(prompts, 20)) == llama_tokens
    hook.remove()


def test_models_without_the_attention_interface_are_refused():
    mamba = transformers.MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=1)
    with pytest.raises(ValueError, match="Mamba"):
        decoder_for(transformers.MambaForCausalLM(mamba))


@pytest.mark.parametrize("block_size", [1, 16, 256])
def test_real_model(real, block_size):
    model, tokenizer = real
    ids = [encode(tokenizer, [{"role": "user", "content": text}]) for text in TEXTS]
    expected = [generate(model, prompt, 10, [2]) for prompt in ids]
    decoder = decoder_for(model, batch_size=2, block_size=block_size, max_seq_len=96, stop_token_ids=[2])
    decoder.batch.steps = PaddedSteps(decoder.batch.step)
    assert run(decoder, requests_for(ids, 10)) == expected


@pytest.mark.parametrize("options", [{}, {"steps_per_sync": 8}, {"draft_tokens": 3}])
def test_stop_strings_end_a_text_before_them(real, options):
    """Whatever the tokens that they are made of, and with tokens sampled past them before the host looks."""
    model, tokenizer = real
    prompt = encode(tokenizer, [{"role": "user", "content": TEXTS[0]}])
    whole = Completion(0, 0, "", generate(model, prompt, 24, [2]), "length", [])
    text = tokenizer.decode(whole.token_ids, skip_special_tokens=True)
    stop = text[20:27]  # wherever the tokens begin and end
    results = decode.generate(
        model,
        tokenizer,
        [prompt, prompt],
        [SamplingParams(max_new_tokens=24, stop=(stop, "no such")), SamplingParams(max_new_tokens=24)],
        **options,
    )
    assert results[0].text == text[: text.index(stop)] and results[0].finish_reason == "stop"
    assert results[0].token_ids == whole.token_ids[: len(results[0].token_ids)] != whole.token_ids
    assert results[1].text == text


def test_samples_of_one_prompt(real):
    """They share its pages, differ, and are the same with the same seed, streamed or not, whatever runs beside them."""
    model, tokenizer = real
    params = SamplingParams(max_new_tokens=8, temperature=1.0, seed=5, n=3)
    prompt = "The quick brown fox jumps over the lazy dog, and then it says to the dog that it is"
    results = decode.generate(model, tokenizer, [prompt, "Hello"], params)
    assert [(r.prompt, r.sample) for r in results] == [(p, s) for p in range(2) for s in range(3)]
    assert len({tuple(r.token_ids) for r in results[:3]}) == 3
    streamed = list(decode.generate(model, tokenizer, [prompt], params, stream=True, batch_size=2))
    assert {(r.sample, r.text) for r in streamed} == {(r.sample, r.text) for r in results[:3]}


def test_a_run_is_the_same_with_the_same_global_seed(llama, prompts):
    def sampled(seed):
        torch.manual_seed(seed)
        requests = [Request(i, p, SamplingParams(max_new_tokens=9, temperature=2.0)) for i, p in enumerate(prompts)]
        return run(decoder_for(llama), requests)

    assert sampled(1) == sampled(1) != sampled(2)


@pytest.mark.parametrize(
    "sampling",
    [{"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.8, "repetition_penalty": 1.2}, {"frequency_penalty": 1.0}],
    ids=str,
)
def test_a_seed_gives_the_same_text_whatever_the_batch(llama, prompts, sampling):
    """Alone, beside others, put back for want of pages, or standing still until there is one."""

    def requests():
        return [
            Request(i, p, SamplingParams(max_new_tokens=20, seed=i, min_new_tokens=3, **sampling))
            for i, p in enumerate(prompts)
        ]

    alone = [run(decoder_for(llama, stop_token_ids=[5]), [request])[0] for request in renumbered(requests())]
    few = decoder_for(llama, stop_token_ids=[5], block_size=4, num_pages=15, steps_per_sync=3)
    assert run(few, requests()) == alone
    assert few.figures.preemptions > 0
    assert run(decoder_for(llama, stop_token_ids=[5], batch_size=7), requests()) == alone


def renumbered(requests):
    return [Request(0, request.prompt_ids, request.sampling) for request in requests]


def test_logprobs_are_the_models(llama, prompts):
    """Of every token, in the row's own order, through windows and preemption."""
    requests = [Request(i, p, SamplingParams(max_new_tokens=10, logprobs=3)) for i, p in enumerate(prompts)]
    requests[2] = Request(2, prompts[2], SamplingParams(max_new_tokens=10))
    few = decoder_for(llama, block_size=4, num_pages=13, steps_per_sync=3)
    run(few, requests)
    assert few.figures.preemptions > 0 and requests[2].logprobs == []
    for request in [r for r in requests if r.id != 2]:
        llama.set_attn_implementation("sdpa")
        logits = llama(torch.tensor([request.token_ids])).logits[0, len(request.prompt_ids) - 1 : -1]
        expected = logits.log_softmax(-1)
        assert len(request.logprobs) == 10
        for token, noted, row in zip(request.tokens, request.logprobs, expected, strict=True):
            top = row.topk(3)
            assert abs(noted.logprob - row[token].item()) < 1e-4
            assert [t for t, _ in noted.top] == top.indices.tolist()
            assert all(abs(v - w) < 1e-4 for (_, v), w in zip(noted.top, top.values.tolist(), strict=True))


def test_logits_processors_of_anybody(llama, prompts, llama_tokens):
    """transformers' own, one row of the batch each; the others are as they were."""
    banned = llama_tokens[0][0]
    processor = transformers.SuppressTokensLogitsProcessor([banned])
    requests = requests_for(prompts, 20)
    requests[0] = Request(0, prompts[0], SamplingParams(max_new_tokens=20, logits_processors=(processor,)))
    run(decoder_for(llama), requests)
    assert banned not in requests[0].tokens
    assert [request.tokens for request in requests[1:]] == llama_tokens[1:]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_p": 0.9}], ids=["greedy", "sampled"])
def test_200_prompts_through_a_tenth_of_their_pages(llama, sampling):
    """Every text is the one that the prompt alone gives; rows are put back many times on the way.

    A page for each row that will grow is kept free; with pages of one token that is not enough for long.
    """
    draw = random.Random(0)
    prompts = [[draw.randrange(1, 97) for _ in range(draw.randrange(1, 20))] for _ in range(200)]
    lengths = [draw.randrange(1, 44) for _ in prompts]

    def requests():
        params = [SamplingParams(max_new_tokens=n, seed=i, **sampling) for i, n in enumerate(lengths)]
        return [Request(i, p, n) for i, (p, n) in enumerate(zip(prompts, params, strict=True))]

    needed = sum(request.pages_needed(1) for request in requests())
    few = decoder_for(llama, batch_size=64, block_size=1, num_pages=needed // 10, steps_per_sync=3)
    plenty = decoder_for(llama, batch_size=200, block_size=1, num_pages=needed, share_prefixes=False)
    assert run(few, requests()) == run(plenty, requests())
    print(f"{few.figures.preemptions} preemptions, {needed // 10} of {needed} pages")
    assert few.figures.preemptions > 50
    assert few.pool.available == few.pool.size


def test_occupancy_between_two_yields(llama, prompts):
    """Every request that is not finished and has begun is in the batch; pages are held as long as somebody is."""
    requests = of_lengths(prompts, [9] * len(prompts))
    decoder = decoder_for(llama, batch_size=3, max_num_batched_tokens=7)
    assert decoder.occupancy == ([], [], 0)
    seen, pieces = set(), 0
    for _ in decoder.run(requests):
        live, prefilling, pages = decoder.occupancy
        assert [id(request) for request in live] == [id(row.request) for row in decoder.scheduler.rows]
        assert all(request.tokens and not request.finish_reason for request in live)
        assert not any(request.tokens for request in prefilling)
        assert len(live) + len(prefilling) <= 3 and bool(pages) == bool(live or prefilling)
        seen |= {request.id for request in (*live, *prefilling)}
        pieces += len(prefilling)
    assert seen == {request.id for request in requests} and pieces
    assert decoder.occupancy == ([], [], 0)
