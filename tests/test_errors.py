"""What is refused, in which words, and that nothing is written then."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from calls import CALLS, function, name_of, operator, tensors

import advance_step
from advance_step.errors import DtypeError

I32, I64 = torch.int32, torch.int64

# call, argument, value, kind, the message's first line after "<operator>: "
REFUSALS = [
    ("npu_advance_step_flashattn", "num_seqs", 0, ValueError, "num_seqs: expected num_seqs >= 1, got 0"),
    ("npu_advance_step_flashattn", "num_queries", 0, ValueError, "num_queries: expected num_queries >= 1, got 0"),
    ("npu_advance_step_flashattn", "block_size", -2, ValueError, "block_size: expected block_size >= 1, got -2"),
    (
        "npu_advance_step_flashattn",
        "num_queries",
        8,
        ValueError,
        "num_queries: expected num_queries < num_seqs with num_seqs=8, got 8",
    ),
    (
        "npu_advance_step_flashattn",
        "seq_lens",
        torch.zeros(8, dtype=I32),
        DtypeError,
        "seq_lens: expected int64 [num_seqs] with num_seqs=8, got int32 [8] on cpu",
    ),
    (
        "npu_advance_step_flashattn",
        "input_tokens",
        torch.zeros(7, dtype=I64),
        ValueError,
        "input_tokens: expected int64 [num_seqs] with num_seqs=8, got int64 [7] on cpu",
    ),
    (
        "npu_advance_step_flashattn",
        "sampled_token_ids",
        torch.zeros(5, dtype=I64),
        ValueError,
        "sampled_token_ids: expected int64 [num_queries, 1] with num_queries=5, got int64 [5] on cpu",
    ),
    (
        "npu_advance_step_flashattn",
        "block_tables",
        torch.zeros(8, 0, dtype=I64),
        ValueError,
        "block_tables: expected W >= 1, got int64 [8, 0] on cpu",
    ),
    (
        "npu_advance_step_flashattn",
        "block_tables",
        torch.zeros(8, 4, dtype=I64, device="meta"),
        ValueError,
        "block_tables: expected a tensor on cpu, as input_tokens is, got one on meta",
    ),
    (
        "npu_advance_step_flashattn",
        "spec_token",
        torch.zeros(8, 2, dtype=I64),
        ValueError,
        "accepted_num: expected a tensor, since spec_token is given, got None",
    ),
    (
        "npu_advance_step_flashattn",
        "accepted_num",
        torch.zeros(8, dtype=I64),
        ValueError,
        "spec_token: expected a tensor, since accepted_num is given, got None",
    ),
    (
        "npu_advance_step_flashattn",
        "seq_lens",
        torch.tensor([3, 64, 70, 1, 1, 1, 1, 1]),
        ValueError,
        "seq_lens: expected 0 <= position < W * block_size with block_tables [8, W], W=4, block_size=16 in every "
        "live row, got position 64 in row 1",
    ),
    (
        "npu_advance_step_flashattn",
        "seq_lens",
        torch.tensor([3, 3, -5, 1, 1, 1, 1, 1]),
        ValueError,
        "seq_lens: expected 0 <= position < W * block_size with block_tables [8, W], W=4, block_size=16 in every "
        "live row, got position -5 in row 2",
    ),
    (
        "npu_advance_step_flashattn (speculative)",
        "num_queries",
        3,
        ValueError,
        "num_queries: expected num_queries == num_seqs, since spec_token is given, with num_seqs=4, got 3",
    ),
    (
        "npu_advance_step_flashattn (speculative)",
        "spec_token",
        torch.zeros(4, 0, dtype=I64),
        ValueError,
        "spec_token: expected S >= 1, got int64 [4, 0] on cpu",
    ),
    (
        "npu_advance_step_flashattn (speculative)",
        "seq_lens",
        torch.zeros(11, dtype=I64),
        ValueError,
        "seq_lens: expected int64 [num_seqs, T] or [num_seqs * T] with num_seqs=4, T=3, got int64 [11] on cpu",
    ),
    (
        "npu_advance_step_flashattn (speculative)",
        "sampled_token_ids",
        torch.tensor([[1, 2, 3]] * 3 + [[-1] * 3]),
        ValueError,
        "sampled_token_ids: expected a token before the first -1 in every row, got -1 first in row 3",
    ),
    (
        "npu_advance_step_flashattn (speculative)",
        "accepted_num",
        torch.tensor([2, 54, 0, 0]),
        ValueError,
        "input_positions: expected 0 <= position < W * block_size with block_tables [4, W], W=4, block_size=16 in "
        "every live row, got position 64 in row 1",
    ),
    (
        "advance_step_flashattn",
        "num_queries",
        9,
        ValueError,
        "num_queries: expected num_queries <= num_seqs with num_seqs=8, got 9",
    ),
    (
        "advance_step_flashattn",
        "block_tables",
        torch.zeros(8, 4),
        DtypeError,
        "block_tables: expected int32 or int64 [num_seqs, W] with num_seqs=8, got float32 [8, 4] on cpu",
    ),
    (
        "advance_step_flashattn",
        "input_positions",
        torch.zeros(8, dtype=I32),
        DtypeError,
        "input_positions: expected int64 [num_seqs] with num_seqs=8, got int32 [8] on cpu",
    ),
    (
        "advance_step_flashinfer",
        "paged_kv_indices",
        torch.zeros(8, dtype=I32),
        ValueError,
        "paged_kv_indices: expected int32 [N] with N >= 9, the pages in use after this step, got N=8",
    ),
    (
        "advance_step_flashinfer",
        "paged_kv_indptr",
        torch.zeros(8, dtype=I32),
        ValueError,
        "paged_kv_indptr: expected int32 [num_seqs + 1] with num_seqs=8, got int32 [8] on cpu",
    ),
    (
        "advance_step_flashinfer",
        "block_tables",
        torch.full((8, 4), 2**31),
        ValueError,
        "block_tables: expected page ids that fit int32, got 2147483648 in row 0",
    ),
    (
        "eagle_step_update_slot_mapping_and_metadata",
        "input_batch_size",
        4,
        ValueError,
        "input_batch_size: expected input_batch_size >= batch_size with batch_size=5, got 4",
    ),
    (
        "eagle_step_update_slot_mapping_and_metadata",
        "max_model_len",
        0,
        ValueError,
        "max_model_len: expected max_model_len >= 1, got 0",
    ),
    (
        "eagle_step_update_slot_mapping_and_metadata",
        "out_clamped_positions",
        torch.zeros(5, dtype=I32),
        DtypeError,
        "out_clamped_positions: expected int64, the dtype of positions_1d, got int32 [5] on cpu",
    ),
    (
        "eagle_step_update_slot_mapping_and_metadata",
        "out_slot_mapping",
        torch.zeros(6, dtype=I64),
        ValueError,
        "out_slot_mapping: expected int64 [>= input_batch_size] with input_batch_size=7, got int64 [6] on cpu",
    ),
    (
        "advance_until_stop",
        "block_sizes",
        [16],
        ValueError,
        "block_sizes: expected one for each of 2 KV groups (1 to 16), got 1",
    ),
    ("advance_until_stop", "block_sizes", [16, 0], ValueError, "block_sizes[1]: expected block_sizes[1] >= 1, got 0"),
    (
        "advance_until_stop",
        "status",
        torch.zeros(6, dtype=I64),
        DtypeError,
        "status: expected int32 [B] with B=6, got int64 [6] on cpu",
    ),
    (
        "advance_until_stop",
        "num_generated",
        torch.tensor([0, -1, 0, 0, 0, 0]),
        ValueError,
        "num_generated: expected num_generated >= 0 in every running row, got -1 in row 1",
    ),
    ("compute_slot_mapping", "block_size", 0, ValueError, "block_size: expected block_size >= 1, got 0"),
    ("compute_slot_mapping", "cp_world_size", 0, ValueError, "cp_world_size: expected cp_world_size >= 1, got 0"),
    (
        "compute_slot_mapping",
        "cp_world_size",
        2**60,
        ValueError,
        "cp_world_size: expected block_size * cp_world_size < 2**63 with block_size=16, got 1152921504606846976",
    ),
    (
        "compute_slot_mapping",
        "cp_rank",
        1,
        ValueError,
        "cp_rank: expected cp_rank < cp_world_size with cp_world_size=1, got 1",
    ),
    ("compute_slot_mapping", "cp_rank", -1, ValueError, "cp_rank: expected cp_rank >= 0, got -1"),
    ("compute_slot_mapping", "cp_interleave", 0, ValueError, "cp_interleave: expected cp_interleave >= 1, got 0"),
    (
        "compute_slot_mapping",
        "cp_interleave",
        3,
        ValueError,
        "cp_interleave: expected a divisor of block_size with block_size=16, got 3",
    ),
    (
        "compute_slot_mapping",
        "query_start_loc",
        torch.zeros(0, dtype=I32),
        ValueError,
        "query_start_loc: expected [R + 1] with R >= 0, got int32 [0] on cpu",
    ),
    (
        "compute_slot_mapping",
        "query_start_loc",
        torch.zeros(5),
        DtypeError,
        "query_start_loc: expected int32 or int64 [R + 1], got float32 [5] on cpu",
    ),
    (
        "compute_slot_mapping",
        "positions",
        torch.zeros(30, 1, dtype=I64),
        ValueError,
        "positions: expected int32 or int64 [P], got int64 [30, 1] on cpu",
    ),
    (
        "compute_slot_mapping",
        "block_table",
        torch.zeros(3, 4, dtype=I64),
        ValueError,
        "block_table: expected int32 or int64 [>= R, W] with R=4, got int64 [3, 4] on cpu",
    ),
    (
        "compute_slot_mapping",
        "slot_mapping",
        torch.zeros(28, dtype=I32),
        DtypeError,
        "slot_mapping: expected int64 [M], got int32 [28] on cpu",
    ),
    (
        "compute_slot_mapping",
        "query_start_loc",
        torch.tensor([1, 3, 3, 23, 24]),
        ValueError,
        "query_start_loc: expected 0 first, got 1",
    ),
    (
        "compute_slot_mapping",
        "query_start_loc",
        torch.tensor([0, 3, 2, 1, 24]),
        ValueError,
        "query_start_loc: expected query_start_loc[r] <= query_start_loc[r + 1] in every request r, "
        "got 3 and 2 in request 1",
    ),
    (
        "compute_slot_mapping",
        "positions",
        torch.zeros(23, dtype=I64),
        ValueError,
        "query_start_loc: expected query_start_loc[R] <= P with positions [P], P=23, got 24",
    ),
    (
        "compute_slot_mapping",
        "slot_mapping",
        torch.zeros(23, dtype=I64),
        ValueError,
        "query_start_loc: expected query_start_loc[R] <= M with slot_mapping [M], M=23, got 24",
    ),
    (
        "compute_slot_mapping",
        "positions",
        torch.tensor([0] * 21 + [64, -1] + [0] * 7),
        ValueError,
        "positions: expected 0 <= position < W * block_size with block_table [8, W], W=4, block_size=16 for "
        "every token, got position 64 for token 21, in request 2",
    ),
    (
        "compute_slot_mapping",
        "positions",
        torch.tensor([0] * 23 + [-5] + [0] * 6, dtype=I32),
        ValueError,
        "positions: expected 0 <= position < W * block_size with block_table [8, W], W=4, block_size=16 for "
        "every token, got position -5 for token 23, in request 3",
    ),
]


def refused(target, call, argument, value):
    """The error of a call with one argument replaced, after seeing that it wrote nothing."""
    arguments = CALLS[call]() | {argument: value}
    before = [t.clone() for t in tensors(arguments)]
    with pytest.raises(ValueError) as error:
        target(**arguments)
    assert all(torch.equal(a, b) for a, b in zip(tensors(arguments), before, strict=True) if a.device.type == "cpu")
    return error.value


@pytest.mark.parametrize(("call", "argument", "value", "kind", "words"), REFUSALS)
def test_refusal(call, argument, value, kind, words):
    error = refused(function(call), call, argument, value)
    first, second = str(error).splitlines()
    assert first == f"{name_of(call)}: {words}"
    assert second.startswith(f"  in {name_of(call)}(") and f"{argument}=" in second
    assert type(error) is kind


@pytest.mark.parametrize(("call", "argument", "value", "kind", "words"), REFUSALS)
def test_dispatcher_refuses_in_the_same_words(call, argument, value, kind, words):
    assert str(refused(operator(call), call, argument, value)).splitlines()[0] == f"{name_of(call)}: {words}"


@pytest.mark.parametrize(
    ("argument", "value", "words"),
    [
        ("seq_lens", [1, 2], "seq_lens: expected int32 or int64 [num_seqs] with num_seqs=8, got list"),
        ("seq_lens", None, "seq_lens: expected int32 or int64 [num_seqs] with num_seqs=8, got None"),
        ("block_size", 1.5, "block_size: expected an int, got float"),
        ("input_batch_size", 3.0, "input_batch_size: expected an int, got float"),
        ("slot_mappings", torch.zeros(6), "slot_mappings: expected a list, got float32 [6] on cpu"),
        ("block_sizes", 16, "block_sizes: expected a list, got 16"),
        ("block_sizes", [16, None], "block_sizes[1]: expected an int, got None"),
        ("pad_slot", 1.0, "pad_slot: expected an int, got float"),
    ],
)
def test_no_tensor_or_no_int(argument, value, words):
    call = next(call for call in reversed(CALLS) if argument in inspect.signature(function(call)).parameters)
    call = "advance_step_flashattn" if argument in CALLS["advance_step_flashattn"]() else call
    assert str(refused(function(call), call, argument, value)).splitlines()[0] == f"{call}: {words}"
    with pytest.raises(TypeError):
        function(call)(**(CALLS[call]() | {argument: value}))


def test_a_sparse_tensor():
    call = CALLS["advance_step_flashattn"]()
    with pytest.raises(DtypeError) as error:
        advance_step.advance_step_flashattn(**(call | {"block_tables": call["block_tables"].to_sparse()}))
    words = "block_tables: expected int32 or int64 [num_seqs, W] with num_seqs=8, got int64 [8, 4] on cpu (sparse_coo)"
    assert words in str(error.value)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("lazy", ["negated view", "conjugated"])
def test_a_tensor_whose_memory_does_not_hold_its_values(call, lazy):
    """torch would make them in a copy, and lose what is written there."""
    for name, value in CALLS[call]().items():
        if isinstance(value, torch.Tensor):
            bad = torch._neg_view(value) if lazy == "negated view" else value.to(torch.complex64).conj()
            got = f"int{8 * value.element_size()} .* [(]negated view[)]" if lazy == "negated view" else "complex64 "
            for target in (function(call), operator(call)):
                error = refused(target, call, name, bad)
                assert re.search(f"^{name_of(call)}: {name}: expected int.* got {got}", str(error)), error
                assert isinstance(error, DtypeError)


@pytest.mark.parametrize(
    ("call", "argument"), [("advance_step_flashattn", "seq_lens"), ("advance_until_stop", "status")]
)
def test_dispatcher_refuses_none_for_a_tensor(call, argument):
    assert f"{call}: {argument}: expected int32" in str(refused(operator(call), call, argument, None))


def test_the_largest_int():
    error = refused(operator("advance_step_flashinfer"), "advance_step_flashinfer", "num_seqs", 2**63 - 1)
    assert "input_tokens: expected int64 [num_seqs] with num_seqs=9223372036854775807" in str(error)


@pytest.mark.parametrize("argument", ["num_seqs", "block_size"])
def test_an_int_past_64_bits(argument):
    error = refused(function("advance_step_flashattn"), "advance_step_flashattn", argument, 2**63)
    assert f"{argument}: expected {argument} < 2**63, got 9223372036854775808" in str(error)


def test_what_torch_itself_refuses_keeps_torchs_words():
    """Under functionalize no tensor has an address: nothing can be said of what they share."""
    call = CALLS["advance_step_flashattn"]()
    with pytest.raises(RuntimeError, match="alias annotations") as error:
        torch.func.functionalize(lambda arguments: advance_step.advance_step_flashattn(**arguments))(call)
    assert "memory of its own" not in str(error.value)


@pytest.mark.parametrize("call", CALLS)
def test_every_written_argument_must_lie_apart(call):
    """Each written tensor is put into the memory of every other argument of its size in turn."""
    schema = operator(call)._schema
    written = [a.name for a in schema.arguments if a.is_write and isinstance(CALLS[call]()[a.name], torch.Tensor)]
    allowed = {("input_tokens", "sampled_token_ids"), ("out_clamped_positions", "positions_1d")}
    if "spec_token" in CALLS[call]():
        allowed = set()
    tried = 0
    for name in written:
        for other, owner in CALLS[call]().items():
            if other == name or not isinstance(owner, torch.Tensor) or (name, other) in allowed:
                continue
            arguments = CALLS[call]()
            shape = arguments[name].shape
            if arguments[other].dtype != arguments[name].dtype or arguments[other].numel() < shape.numel():
                continue
            arguments[name] = arguments[other].flatten()[: shape.numel()].view(shape)
            with pytest.raises(ValueError, match="memory of its own") as error:
                function(call)(**arguments)
            assert name in str(error.value) and other in str(error.value)
            tried += 1
    assert tried >= 2


def test_columns_of_one_buffer_lie_apart():
    state = torch.zeros(8, 4, dtype=I64)
    call = CALLS["advance_step_flashattn"]()
    names = ("input_tokens", "input_positions", "seq_lens", "slot_mapping")
    expected = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    advance_step.advance_step_flashattn(**expected)
    for column, name in enumerate(names):
        state[:, column] = call[name]
        call[name] = state[:, column]
    advance_step.advance_step_flashattn(**call)
    assert torch.equal(state, torch.stack([expected[name] for name in names], dim=1))


@pytest.mark.parametrize("call", ["npu_advance_step_flashattn", "advance_step_flashattn", "advance_until_stop"])
def test_sampled_ids_in_the_memory_of_input_tokens(call):
    """Of one row, too, where a stride says nothing."""
    for live in (1, 3):
        arguments, expected = ({**CALLS[call]()} for _ in range(2))
        rows = len(arguments["input_tokens"])
        if "num_queries" in arguments:
            arguments["num_queries"] = expected["num_queries"] = live
        memory = torch.arange(rows * 2)
        arguments["input_tokens"], expected["input_tokens"] = memory[::2], memory[::2].clone()
        shared = memory[::2][: arguments.get("num_queries", rows), None]
        arguments["sampled_token_ids"], expected["sampled_token_ids"] = shared, shared.clone()
        function(call)(**expected)
        function(call)(**arguments)
        assert torch.equal(arguments["input_tokens"], expected["input_tokens"])
        assert torch.equal(memory[1::2], torch.arange(rows) * 2 + 1)


def test_a_last_page_length_past_32_bits():
    call = CALLS["advance_step_flashinfer"]() | {"block_size": 2**40}
    call["seq_lens"][:2] = torch.tensor([2**31 - 2, 2**31 - 1])
    before = [t.clone() for t in tensors(call)]
    words = "paged_kv_last_page_len: expected seq_lens % block_size < 2**31 - 1, got 2147483647 in row 1"
    for target in (function("advance_step_flashinfer"), operator("advance_step_flashinfer")):
        with pytest.raises(ValueError, match=re.escape(words)):
            target(**call)
    assert all(map(torch.equal, tensors(call), before))
    call["seq_lens"][1] = 7
    advance_step.advance_step_flashinfer(**call)
    assert call["paged_kv_last_page_len"][:2].tolist() == [2**31 - 1, 8]


def test_empty_tensors_share_nothing():
    empty = torch.empty(1, 0, dtype=I64).expand(6, 0)  # of strides (0, 1)
    call = CALLS["advance_until_stop"]() | {"output_tokens": empty}
    advance_step.advance_until_stop(**call)
    assert call["status"].tolist() == [2, 2, 2, 4, 2, 2]  # no room: LENGTH


def test_written_elements_must_lie_apart():
    call = CALLS["advance_step_flashattn"]() | {"slot_mapping": torch.zeros(1, dtype=I64).expand(8)}
    with pytest.raises(ValueError, match=r"slot_mapping: expected elements that lie apart .* got strides \(0,\)"):
        advance_step.advance_step_flashattn(**call)


WORDS = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
import test_errors as t
print(json.dumps([str(t.refused(t.operator(r[0]), *r[:3])) for r in t.REFUSALS]))
"""


def test_native_and_reference_refuse_in_the_same_words():
    if advance_step.backend_info()["devices"]["cpu"]["executor"] != "native":
        pytest.skip("needs the native core beside the reference")
    said = [
        subprocess.run(
            [sys.executable, "-c", WORDS, str(Path(__file__).parent)],
            env=os.environ | {"ADVANCE_STEP_BACKEND": backend},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for backend in ("native", "reference")
    ]
    assert json.loads(said[0]) == json.loads(said[1])


@pytest.mark.parametrize("call", CALLS)
def test_a_tensor_of_one_element_stands_for_an_int(call):
    """torch's dispatcher takes its value before any executor is asked: documented in errors.md."""
    arguments, expected = CALLS[call](), CALLS[call]()
    name = "pad_slot" if call == "advance_until_stop" else "block_size"
    value = torch.tensor(expected.setdefault(name, -1))
    operator(call)(**arguments | {name: value})
    operator(call)(**expected)
    assert all(map(torch.equal, tensors(arguments), tensors(expected)))
