"""Linear layers of a model on a CPU with their weights laid out once as oneDNN's matmuls want them.

torch's own linear lays a 16-bit weight out anew in every call, or multiplies from a layout that is slower to read; at
few rows, where a step's time is that of reading the weights, this is most of it. Float32 layers stay as they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

LIBRARY = torch.library.Library("advance_step_decode", "FRAGMENT")
LIBRARY.define("packed_linear(Tensor input, Tensor handle, int out_features) -> Tensor")

# Projections of one input in one module, by the names that transformers' models give them: a single matmul.
TOGETHER = ("q_proj", "k_proj", "v_proj")

ROWS = 32  # that oneDNN is told to lay a weight out for; it serves any number


class PackedWeight:
    """The weight [sum of sizes, in_features] of linear layers that are given the same input, and their biases.

    Each asks for its part of the product; the first one has it computed, and the parts of the others are kept for them.
    """

    def __init__(self, layers: Iterable[nn.Linear]) -> None:
        layers = list(layers)
        self.sizes = [layer.out_features for layer in layers]
        weights = [layer.weight.detach() for layer in layers]
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        weight = weights[0] if len(layers) == 1 else torch.cat(weights)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS)
        self.bias = torch.cat(biases) if biases else None
        self.multiply = torch.ops.mkldnn._linear_pointwise.default  # looked up once: a step calls it a hundred times
        # A compiler takes no tensor of oneDNN's layout. It sees this number, and an operator that looks the weight up.
        handle = next(_handles)
        self.handle = torch.tensor(handle)
        _PACKED[handle] = self
        self._kept: tuple[Tensor | None, dict[int, Tensor]] = None, {}

    def part(self, part: int, input: Tensor, handle: Tensor) -> Tensor:
        """The product of layer `part` with input [..., in_features]; handle: this weight's, or a tracer's of it."""
        if len(self.sizes) == 1:
            return self.product(input, handle)
        of, parts = self._kept
        if of is not input or part not in parts:
            parts = dict(enumerate(self.product(input, handle).split(self.sizes, -1)))
            self._kept = input, parts
        out = parts.pop(part)
        if not parts:
            self._kept = None, {}
        return out

    def product(self, input: Tensor, handle: Tensor) -> Tensor:
        """All layers' products with the input, one after the other in the last dimension."""
        if type(input) is not Tensor:  # traced
            return torch.ops.advance_step_decode.packed_linear(input, handle, sum(self.sizes))
        return self.multiply(input, self.weight, self.bias, "none", [], "")


class PackedLinear(nn.Module):
    """One of the layers of a `PackedWeight`, in the place of the linear layer that it was."""

    handle: Tensor

    def __init__(self, layer: nn.Linear, packed: PackedWeight, part: int) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.packed, self.part = packed, part
        self.weight = torch.empty_like(layer.weight, device="meta")  # what models ask: its dtype, its shape
        self.register_buffer("handle", packed.handle, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        return self.packed.part(self.part, input, self.handle)


_handles = itertools.count()
_PACKED: WeakValueDictionary[int, PackedWeight] = WeakValueDictionary()


@torch.library.impl("advance_step_decode::packed_linear", "CPU", lib=LIBRARY)
def _packed_linear(input: Tensor, handle: Tensor, out_features: int) -> Tensor:
    packed = _PACKED[int(handle)]
    return packed.multiply(input, packed.weight, packed.bias, "none", [], "")


@torch.library.register_fake("advance_step_decode::packed_linear", lib=LIBRARY)
def _fake(input: Tensor, handle: Tensor, out_features: int) -> Tensor:
    return input.new_empty(*input.shape[:-1], out_features)


def pack_linears(model: nn.Module) -> int:
    """Replace the model's linear layers by packed ones, where that pays; returns how many were replaced.

    That is in bfloat16 and float16 on a CPU whose oneDNN multiplies in them; elsewhere nothing is changed, and 0
    returned. q_proj, k_proj and v_proj of one module become one matmul. The results are the same up to the order of
    sums. The layers' own weights are given up (a tied embedding keeps its own), so that the model can be run as before
    but neither saved nor trained.
    """
    replaced = 0
    for module in list(model.modules()):
        layers = {name: layer for name, layer in module.named_children() if isinstance(layer, nn.Linear)}
        layers = {name: layer for name, layer in layers.items() if _packs(layer)}
        groups = [[name] for name in layers if name not in TOGETHER]
        if (attention := [name for name in TOGETHER if name in layers]) and _read_the_same(layers, attention):
            groups.append(attention)
        else:
            groups += [[name] for name in attention]
        for names in groups:
            packed = PackedWeight(layers[name] for name in names)
            for part, name in enumerate(names):
                setattr(module, name, PackedLinear(layers[name], packed, part))
            replaced += len(names)
    return replaced


def _packs(layer: nn.Linear) -> bool:
    """A plain linear layer, on a CPU that multiplies in its dtype."""
    if type(layer) is not nn.Linear or layer.weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if layer.weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return layer.weight.dtype == torch.float16 and bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def _read_the_same(layers: dict[str, nn.Linear], names: list[str]) -> bool:
    """Whether these can be one matmul: as many inputs, and either all a bias or none."""
    inputs = {layers[name].in_features for name in names}
    biases = {layers[name].bias is None for name in names}
    return len(names) == len(TOGETHER) and len(inputs) == len(biases) == 1
