"""What is refused, in which words, and that nothing is written then."""

from __future__ import annotations

import json
import os
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
        "W: expected W >= 1, got 0",
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
    ],
)
def test_no_tensor_or_no_int(argument, value, words):
    with pytest.raises(TypeError) as error:
        advance_step.advance_step_flashattn(**(CALLS["advance_step_flashattn"]() | {argument: value}))
    assert str(error.value).splitlines()[0] == f"advance_step_flashattn: {words}"


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
