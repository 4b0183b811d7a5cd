"""The operator on an emulated NPU, and ascend.torch_npu; `test_emulation.py` runs this in a process of its own."""

import warnings

import numpy as np
import pytest
import torch
from emulated_device import mode, same  # noqa: F401  (mode: every test here runs with and without inference mode)

import advance_step
from advance_step.ascend import emulation
from advance_step.ascend import torch_npu as npu_patch
from advance_step.conformance.run import check_clause
from advance_step.errors import DtypeError

emulation.enable()
import torch_npu  # noqa: E402

NAMES = ["input_tokens", "sampled_token_ids", "input_positions", "seq_lens", "slot_mapping", "block_tables"]
NAMES += ["num_seqs", "num_queries", "block_size"]


def plain(device):
    """16 rows, 8 of them live, with a guard before and after what the operator writes."""
    rng = np.random.default_rng(7)
    state = torch.full((4, 18), -77, dtype=torch.int64)
    state[2, 1:-1] = torch.from_numpy(rng.integers(0, 40, 16))
    state = state.to(device)
    sampled = torch.from_numpy(rng.integers(0, 99, (8, 1))).to(device)
    block_tables = torch.from_numpy(rng.integers(0, 99, (16, 6))).to(device)
    tokens, positions, lens, slots = state[:, 1:-1]
    return state, (tokens, sampled, positions, lens, slots, block_tables, 16, 8, 8)


@pytest.mark.parametrize(
    "operator",
    [
        lambda *args: torch_npu.npu_advance_step_flashattn(*args),
        lambda *args: torch.ops.npu.npu_advance_step_flashattn(*args),
        lambda *args: torch.ops.npu.npu_advance_step_flashattn.default(*args),
        lambda *args: advance_step.npu_advance_step_flashattn(*args),
        lambda *args: torch_npu.npu_advance_step_flashattn(**dict(zip(NAMES, args, strict=True))),
    ],
    ids=["torch_npu", "packet", "overload", "advance_step", "keywords"],
)
def test_the_operator_gives_what_it_gives_on_the_cpu(operator):
    (npu, npu_args), (cpu, cpu_args) = plain("npu"), plain("cpu")
    assert operator(*npu_args) is None
    advance_step.npu_advance_step_flashattn(*cpu_args)
    same(npu, cpu)
    assert not torch.equal(cpu, plain("cpu")[0])


def test_the_speculative_operator():
    results = []
    for device, module in (("npu", torch_npu), ("cpu", advance_step)):
        positions = torch.tensor([[5, 6, 7], [13, 14, 15]])
        state = torch.stack([positions * 0, positions, positions + 1, positions * 0]).to(device)
        sampled = torch.tensor([[11, 12, 13], [21, -1, -1]]).to(device)
        drafts, accepted = torch.tensor([[14, 15], [24, 25]]).to(device), torch.tensor([2, 0]).to(device)
        table = torch.tensor([[4, 1, 0], [2, 7, 3]]).to(device)
        tokens, positions, lens, slots = state
        module.npu_advance_step_flashattn(
            tokens, sampled, positions, lens, slots, table, 2, 2, 8, spec_token=drafts, accepted_num=accepted
        )
        results.append(state)
    same(*results)
    assert results[1][3].tolist() == [[8, 9, 10], [62, 63, 24]]


def call(**changes):
    state, args = plain("npu")
    arguments = dict(zip(NAMES, args, strict=True))
    arguments |= {name: change(arguments[name]) for name, change in changes.items()}
    before = state.clone()
    try:
        torch_npu.npu_advance_step_flashattn(**arguments)
    finally:
        same(state, before.cpu())


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        (
            {"block_tables": torch.Tensor.cpu},
            ValueError,
            "block_tables: expected a tensor on npu:0, as input_tokens is, got one on cpu",
        ),
        (
            {"seq_lens": torch.Tensor.int},
            DtypeError,
            "seq_lens: expected int64 [num_seqs] with num_seqs=16, got int32 [16] on npu:0",
        ),
        ({"sampled_token_ids": lambda t: t[:, 0]}, ValueError, "sampled_token_ids: expected int64 [num_queries, 1]"),
        ({"num_queries": lambda n: 16}, ValueError, "num_queries: expected num_queries < num_seqs"),
        ({"block_tables": lambda t: t[:, :2]}, ValueError, "seq_lens: expected 0 <= position < W * block_size"),
        ({"slot_mapping": lambda t: t.new_zeros(1).expand(16)}, ValueError, "slot_mapping: expected"),
    ],
)
def test_a_refusal_names_the_tensors_as_the_user_wrote_them(changes, kind, message):
    with pytest.raises(kind) as refusal:
        call(**changes)
    assert message in str(refusal.value)
    on_cpu = str(refusal.value).count("on cpu")
    assert on_cpu == (2 if message.endswith("on cpu") else 0)


def test_cpu_tensors_are_no_npu_tensors():
    with pytest.raises(ValueError, match="input_tokens: expected a tensor on npu:0, got one on cpu"):
        torch_npu.npu_advance_step_flashattn(*plain("cpu")[1])


def test_other_operators_of_torch_npu_are_named():
    message = r"torch_npu\.npu_rms_norm is not emulated; .* torch_npu\.npu_advance_step_flashattn"
    with pytest.raises(AttributeError, match=message):
        torch_npu.npu_rms_norm(torch.ones(2, device="npu"))
    with pytest.raises(AttributeError, match="npu_rms_norm"):
        torch.ops.npu.npu_rms_norm(torch.ones(2, device="npu"))
    assert not hasattr(torch_npu, "npu_fusion_attention")


def test_patching_says_nothing():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with npu_patch.patched():
            pass
    assert said == []


# ascend.torch_npu, against an operator that does what the published plain kernel does by its source, on `cores` cores


def published(tokens, sampled, positions, lens, slots, table, num_seqs, num_queries, block_size, cores=5, **_):
    for pad in range(num_queries, num_seqs, cores):
        tokens[pad], positions[pad], slots[pad] = 0, 0, -1
    for i in range(min(cores, num_queries)):
        p = int(lens[i])
        tokens[i], positions[i], lens[i] = sampled[i, 0], p, p + 1
        slots[i] = (table[0, p // block_size] + table.size(1) * i) * block_size + p % block_size


@pytest.fixture
def published_torch_npu():
    kernel = torch.library.Library("npu", "IMPL")
    kernel.impl("npu_advance_step_flashattn", published, "PrivateUse1", allow_override=True)
    yield
    kernel._destroy()


def test_the_conformance_check_names_what_a_published_kernel_does(published_torch_npu):
    found = {
        clause: check_clause(torch_npu.npu_advance_step_flashattn, "npu", clause, "npu")
        for clause in ("own-row-of-the-table", "several-pad-rows", "one-row")
    }
    assert found["own-row-of-the-table"].deviation == "only row 0 has the right page"
    assert "every Nth pad row cleared" in found["several-pad-rows"].deviation
    assert found["one-row"].outcome == "holds"


def result(operator):
    state, args = plain("npu")
    operator(*args)
    return state.cpu()


def test_patch_and_unpatch(published_torch_npu):
    kept = torch_npu.npu_advance_step_flashattn  # a reference taken before the patch
    expected, args = plain("cpu")
    advance_step.npu_advance_step_flashattn(*args)
    wrong = result(kept)
    assert not torch.equal(wrong, expected)
    npu_patch.patch()
    npu_patch.patch()
    for operator in (kept, torch_npu.npu_advance_step_flashattn, torch.ops.npu.npu_advance_step_flashattn.default):
        assert torch.equal(result(operator), expected)
    npu_patch.unpatch()
    npu_patch.unpatch()
    assert torch.equal(result(kept), wrong)


def test_patched_is_undone_after_an_error_and_respects_a_patch_around_it(published_torch_npu):
    wrong = result(torch_npu.npu_advance_step_flashattn)
    with pytest.raises(ZeroDivisionError), npu_patch.patched():
        assert not torch.equal(result(torch_npu.npu_advance_step_flashattn), wrong)
        with npu_patch.patched():
            pass
        assert not torch.equal(result(torch_npu.npu_advance_step_flashattn), wrong)
        1 / 0  # noqa: B018
    assert torch.equal(result(torch_npu.npu_advance_step_flashattn), wrong)
