"""Linear layers of a model on a CPU as an operator of the native core, over weights laid out once for it.

    packed_linear(Tensor input, Tensor weight, Tensor? bias, SymInt out_features) -> Tensor

It is torch.nn.functional.linear(input [..., in_features], w [out_features, in_features], bias [out_features]) with
weight = pack_weight(w). All are bfloat16; sums are in float32, to which the bias is added before they are rounded.
Returns [..., out_features], contiguous. ValueError for what does not fit together.

At few rows a layer takes as long as its weight takes to be read, and a step is little else. torch's own linear lays the
weight out anew in every call, or multiplies from a layout that is slower to read; oneDNN, with its weights laid out
ahead, took 1.4 to 1.6 times as long up to 32 rows. Layers of other dtypes stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from advance_step.decode import huge_pages

LIBRARY = torch.library.Library("advance_step_decode", "FRAGMENT")
LIBRARY.define("packed_linear(Tensor input, Tensor weight, Tensor? bias, SymInt out_features) -> Tensor")

linear = torch.ops.advance_step_decode.packed_linear.default  # looked up once: a step calls it in every layer

# Projections of one input in one module, by the names that transformers' models give them: a single matmul.
TOGETHER = ("q_proj", "k_proj", "v_proj")

OUTS, INS = 16, 32  # of a block of weights; the core's kLanes and kBlock


@torch.library.register_fake("advance_step_decode::packed_linear", lib=LIBRARY)
def _fake(input: Tensor, weight: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    return input.new_empty(*input.shape[:-1], out_features)


def packed_shape(outs: int, ins: int) -> tuple[int, int, int, int]:
    """The shape of a weight [outs, ins] that is packed."""
    return -(-outs // OUTS), -(-ins // INS) * INS // 2, OUTS, 2


def pack_weight(weight: Tensor) -> Tensor:
    """A linear layer's weight [out_features, in_features] as the core reads it: [out blocks, in pairs, 16, 2].

    A block is 16 outputs; of them come the first two inputs, then the next two, and so on. Zeros fill up the last block
    of outputs, and the inputs to a multiple of 32.
    """
    return _in_blocks(weight).contiguous()


def _in_blocks(weight: Tensor) -> Tensor:
    """`pack_weight`, not yet contiguous."""
    outs, ins = weight.shape
    if ins % INS or outs % OUTS:
        weight = pad(weight, (0, -ins % INS, 0, -outs % OUTS))
    return weight.unflatten(1, (-1, 2)).unflatten(0, (-1, OUTS)).transpose(1, 2)


class PackedWeight:
    """The weight [sum of sizes, in_features] of linear layers that are given the same input, and their biases.

    Each asks for its part of the product; the first one has it computed, and the parts of the others are kept for them.
    """

    def __init__(self, layers: Sequence[nn.Linear], room: Tensor) -> None:
        """room: the tensor that the packed weight goes into."""
        self.sizes = [layer.out_features for layer in layers]
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        weights = [layer.weight.detach() for layer in layers]
        self.weight = room.copy_(_in_blocks(weights[0] if len(weights) == 1 else torch.cat(weights)))
        self.bias = torch.cat(biases) if biases else None
        self._kept: tuple[Tensor | None, dict[int, Tensor]] = None, {}

    def part(self, part: int, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The product of layer `part` with input [..., in_features]; weight, bias: these, or a tracer's of them."""
        if len(self.sizes) == 1:
            return linear(input, weight, bias, self.sizes[0])
        of, parts = self._kept
        if of is not input or part not in parts:
            parts = dict(enumerate(linear(input, weight, bias, sum(self.sizes)).split(self.sizes, -1)))
            self._kept = input, parts
        out = parts.pop(part)
        if not parts:
            self._kept = None, {}
        return out


class PackedLinear(nn.Module):
    """One of the layers of a `PackedWeight`, in the place of the linear layer that it was."""

    packed_weight: Tensor
    packed_bias: Tensor | None

    def __init__(self, layer: nn.Linear, packed: PackedWeight, part: int) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.packed, self.part = packed, part
        self.weight = torch.empty_like(layer.weight, device="meta")  # what models ask: its dtype, its shape
        self.register_buffer("packed_weight", packed.weight, persistent=False)
        self.register_buffer("packed_bias", packed.bias, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        return self.packed.part(self.part, input, self.packed_weight, self.packed_bias)


def pack_linears(model: nn.Module) -> int:
    """Replace the model's linear layers by packed ones, where that pays; returns how many were replaced.

    That is in bfloat16 on an x86 CPU with AVX2 or more, where there is the native core; elsewhere nothing is changed,
    and 0 returned. q_proj, k_proj and v_proj of one module become one matmul. The results are the same up to the order
    of sums. The layers' own weights are given up (a tied embedding keeps its own), so that the model can be run as
    before but neither saved nor trained.
    """
    groups = [(module, names) for module in model.modules() for names in _together(module)]
    shapes = [packed_shape(*_joined_shape(module, names)) for module, names in groups]
    room = huge_pages.zeros((sum(map(prod, shapes)),), torch.bfloat16)
    for (module, names), shape in zip(groups, shapes, strict=True):
        layers = [getattr(module, name) for name in names]
        here, room = room[: prod(shape)], room[prod(shape) :]
        packed = PackedWeight(layers, here.view(shape))
        for part, (name, layer) in enumerate(zip(names, layers, strict=True)):
            setattr(module, name, PackedLinear(layer, packed, part))
    return sum(len(names) for _, names in groups)


def _together(module: nn.Module) -> list[list[str]]:
    """The names of the module's linear layers that can be packed, those that become one matmul together."""
    layers = {name: layer for name, layer in module.named_children() if _packs(layer)}
    found = [name for name in TOGETHER if name in layers]
    inputs = {layers[name].in_features for name in found}
    biases = {layers[name].bias is None for name in found}
    if len(found) == len(TOGETHER) and len(inputs) == len(biases) == 1:
        return [found, *([name] for name in layers if name not in found)]
    return [[name] for name in layers]


def _joined_shape(module: nn.Module, names: list[str]) -> tuple[int, int]:
    """The outputs and the inputs of these layers as one."""
    layers = [getattr(module, name) for name in names]
    return sum(layer.out_features for layer in layers), layers[0].in_features


def _packs(layer: nn.Module) -> bool:
    """A plain linear layer in bfloat16, on a CPU whose vectors the core has loops for."""
    if type(layer) is not nn.Linear or layer.weight.device.type != "cpu" or layer.weight.dtype != torch.bfloat16:
        return False
    fast = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return fast and torch._C._dispatch_has_kernel_for_dispatch_key("advance_step_decode::packed_linear", "CPU")
