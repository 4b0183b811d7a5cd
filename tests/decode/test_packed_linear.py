"""Linear layers over packed weights: the operator against float64, and the models whose layers it takes over."""

from __future__ import annotations

import copy

import pytest
import torch
from families import SERVED, family_model
from tiny_models import tiny_model

from advance_step.decode import pack_linears
from advance_step.decode.model_check import _difference
from advance_step.decode.packed_linear import PackedLinear, _packs, linear, pack_weight

needs_packing = pytest.mark.skipif(
    not _packs(torch.nn.Linear(2, 2, dtype=torch.bfloat16)), reason="no native core, or a CPU that it does not pack for"
)


# Each number of rows is worked off in other pieces of 32, 16, 8, 4, 2 and 1.
ROWS = [0, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 40, 64, 100]


def example(rows, ins, outs, bias=False):
    """Input, weight and bias, some of them negative and some large."""
    generator = torch.Generator().manual_seed(rows * ins + outs)
    tensors = [torch.randn(shape, generator=generator).bfloat16() for shape in ((rows, ins), (outs, ins), (outs,))]
    return tensors if bias else [*tensors[:2], None]


@needs_packing
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ins", [1, 31, 32, 33, 576])
@pytest.mark.parametrize("outs", [1, 15, 16, 17, 33, 960])
def test_the_product_is_right(bias, ins, outs):
    for rows in ROWS:
        x, weight, b = example(rows, ins, outs, bias)
        expected = torch.nn.functional.linear(*(None if t is None else t.double() for t in (x, weight, b)))
        got = linear(x, pack_weight(weight), b, outs)
        assert got.dtype == torch.bfloat16 and got.shape == (rows, outs)
        # half a unit in the last place of the result, and of float32 for each of the terms
        room = expected.abs() * torch.finfo(torch.bfloat16).eps + x.double().abs() @ weight.double().abs().T * 2.0**-22
        assert ((got.double() - expected).abs() <= room + 1e-6).all(), rows


@needs_packing
def test_a_row_does_not_depend_on_those_beside_it():
    """Bit for bit, however many there are, and whatever they hold."""
    x, weight, b = example(100, 96, 50, bias=True)
    packed = pack_weight(weight)
    whole = linear(x, packed, b, 50)
    for rows in ROWS[1:]:
        some = x[:rows].clone()
        some[1:3] = torch.nan
        some[3:5] = torch.inf
        got = linear(some, packed, b, 50)
        assert torch.equal(got[:1], whole[:1]) and torch.equal(got[5:], whole[5:rows])
        assert got[1:3].isnan().all() and not got[3:5].isfinite().any()


@needs_packing
def test_leading_dimensions_and_strides():
    x, weight, _ = example(24, 64, 40)
    packed, expected = pack_weight(weight), linear(x, pack_weight(weight), None, 40)
    assert torch.equal(linear(x.view(2, 3, 4, 64), packed, None, 40), expected.view(2, 3, 4, 40))
    assert torch.equal(linear(x.T.contiguous().T, packed, None, 40), expected)
    assert torch.equal(linear(x[0], packed, None, 40), expected[0])
    assert linear(x[:0].view(3, 0, 64), packed, None, 40).shape == (3, 0, 40)


@needs_packing
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(input=torch.zeros(2, 64)), "input: expected bfloat16"),
        (dict(input=torch.zeros(2, 64, dtype=torch.float16)), "input: expected bfloat16"),
        (dict(input=torch.zeros(2, 96, dtype=torch.bfloat16)), "weight: expected what pack_weight makes"),
        (dict(input=torch.zeros((), dtype=torch.bfloat16)), "input: expected "),
        (dict(weight=torch.zeros(3, 32, 16, 2, dtype=torch.float16)), "weight: expected what pack_weight makes"),
        (dict(weight=torch.zeros(3, 32, 2, 16, dtype=torch.bfloat16).mT), "weight: expected what pack_weight makes"),
        (dict(out_features=49), "weight: expected what pack_weight makes"),
        (dict(out_features=0), "out_features, in_features: expected numbers > 0"),
        (dict(bias=torch.zeros(40)), "bias: expected "),
        (dict(bias=torch.zeros(41, dtype=torch.bfloat16)), "bias: expected "),
        (dict(bias=torch.zeros(80, dtype=torch.bfloat16)[::2]), "bias: expected "),
    ],
)
def test_what_does_not_fit_is_refused(change, named):
    x, weight, bias = example(2, 64, 40, bias=True)
    with pytest.raises(ValueError, match=f"packed_linear: {named}"):
        linear(**(dict(input=x, weight=pack_weight(weight), bias=bias, out_features=40) | change))


@needs_packing
def test_torch_accepts_the_operator():
    x, weight, bias = example(3, 33, 17, bias=True)
    torch.library.opcheck(linear, (x, pack_weight(weight), bias, 17), test_utils=("test_schema", "test_faketensor"))


@needs_packing
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


@needs_packing
def test_projections_of_one_input_are_one_matmul():
    model = tiny_model("qwen2").to(torch.bfloat16)  # with biases
    pack_linears(model)
    attention = model.model.layers[0].self_attn
    packed = attention.q_proj.packed
    assert packed is attention.k_proj.packed is attention.v_proj.packed
    x, y = (torch.randn(2, 3, attention.q_proj.in_features).to(torch.bfloat16) for _ in range(2))
    whole = linear(x, packed.weight, packed.bias, sum(packed.sizes)).split(packed.sizes, -1)
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    for order in ([0, 1, 2], [2, 0, 1], [1, 1, 0]):  # whoever asks, and whatever came between
        for part in order:
            assert torch.equal(layers[part](x), whole[part])
            layers[0](y)


def test_only_what_pays_is_packed(llama):
    model = copy.deepcopy(llama)
    before = dict(model.named_modules())
    assert pack_linears(model) == 0 and dict(model.named_modules()) == before  # float32

    class Own(torch.nn.Linear):
        pass

    odd = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(8, 8), "k_proj": Own(8, 8), "v_proj": torch.nn.Linear(4, 8)})
    odd = odd.to(torch.bfloat16)
    if _packs(odd["q_proj"]):
        assert pack_linears(odd) == 2  # apart: they have different inputs
        assert type(odd["k_proj"]) is Own and type(odd["q_proj"]) is PackedLinear
        assert odd["q_proj"].packed is not odd["v_proj"].packed


@needs_packing
def test_a_tied_embedding_keeps_its_weight():
    model = tiny_model("llama").to(torch.bfloat16)
    model.tie_weights()
    embedding = model.get_input_embeddings().weight.clone()
    pack_linears(model)
    assert torch.equal(model.get_input_embeddings().weight, embedding)
