"""Spoiled calls of every operator: the executor that serves the CPU accepts and refuses what the contract does.

The native core decides for itself whether a call is good, and its decision must be that of `_contracts`, in its words.
ADVANCE_STEP_FUZZ=100000 spoils so many calls of each operator instead of a few; the seed of each is in its message.
"""

from __future__ import annotations

import os
from random import Random

import pytest
import torch
from calls import CALLS, function, name_of, tensors

from advance_step import _schema

CALLS_EACH = int(os.environ.get("ADVANCE_STEP_FUZZ", "400"))
DTYPES = [torch.int32, torch.int64, torch.int16, torch.float32, torch.bool, torch.complex64]


def spoiled_int(value, random):
    near = [value - 1, value + 1, 0, 1, 2, -1, True]
    far = [2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 2**70]
    return random.choice([*near, *far, 1.5, None, "1"])  # a tensor of one int is an int to torch's dispatcher


def spoiled_tensor(value, random, others):
    rows = value.shape[0]
    other = random.choice(others)
    ways = [
        lambda: value.to(random.choice(DTYPES)),
        lambda: value.to("meta"),
        lambda: random.choice([None, 1, 1.5, [1, 2], "tensor"]),
        lambda: value[: max(rows - 1, 0)],
        lambda: torch.cat([value, value[:1]]),
        lambda: value[:0],
        lambda: value[..., :0],
        lambda: value.unsqueeze(random.choice([0, -1])),
        lambda: value.flatten(),
        lambda: value.reshape(-1)[0],
        lambda: value[:1].expand(value.shape),
        lambda: torch.stack([value, value], dim=-1)[..., random.choice([0, 1])],
        lambda: value.mT.contiguous().mT if value.dim() == 2 else value.flip(0),
        lambda: value.to_sparse(),
        lambda: torch._neg_view(value),
        lambda: other,
        lambda: other.flatten()[: value.numel()].view(value.shape),
        lambda: other.flatten()[1 : value.numel() + 1].view(value.shape),
        lambda: other[:rows],
        lambda: torch.full_like(value, random.choice([-1, -2, 0, 1, 63, 64, 2**31 - 1])),
        lambda: torch.where(torch.arange(value.numel()).view(value.shape) % 3 == 0, random.choice([-1, 64]), value),
    ]
    try:
        return random.choice(ways)()
    except (RuntimeError, IndexError):  # of a shape that this way does not know
        return None


def spoiled_list(value, random, others):
    at = random.randrange(len(value))
    one = spoiled_tensor(value[at], random, others) if isinstance(value[at], torch.Tensor) else None
    one = spoiled_int(value[at], random) if isinstance(value[at], int) else one
    return random.choice([[*value[:at], one, *value[at + 1 :]], [], value[:1], value * 9, tuple(value), None, value[0]])


def spoiled(call, random):
    """A good call with one to three arguments that may not be."""
    arguments = CALLS[call](random.choice([1, 2, 3, 7, 8]))
    for name in random.sample(list(arguments), random.choice([1, 1, 2, 3])):
        value, others = arguments[name], [t for t in tensors(arguments) if t.device.type == "cpu"]
        if isinstance(value, torch.Tensor):
            arguments[name] = spoiled_tensor(value, random, others)
        elif isinstance(value, list):
            arguments[name] = spoiled_list(value, random, others)
        else:
            arguments[name] = spoiled_int(value, random)
    return arguments


def verdict(target, *args, **kwargs):
    try:
        target(*args, **kwargs)
    except ValueError as error:
        return type(error).__name__, str(error)
    return None


@pytest.mark.parametrize("call", CALLS)
def test_spoiled_calls_are_judged_as_the_contract_says(call):
    operator = next(o for o in _schema.OPERATORS if _schema.name_of(o) == name_of(call))
    outcomes = set()
    for seed in range(CALLS_EACH):
        arguments = spoiled(call, Random(f"{call} {seed}"))
        named = {a.name: arguments.get(a.name, a.default_value) for a in _schema._arguments(operator)}
        held = [(t, t.clone(), t._version) for t in tensors(arguments) if t.device.type == "cpu"]
        expected = verdict(_schema.check, operator, named)
        got = verdict(function(call), **arguments)
        assert got == expected, f"seed {seed}"
        if got is not None:
            for tensor, before, version in held:
                assert tensor._version == version, f"seed {seed}"
                assert tensor.layout != torch.strided or torch.equal(tensor, before), f"seed {seed}"
        outcomes.add(got is None)
    assert outcomes == {True, False}
