"""The recurrent cells that torch leaves to the device, as it computes them on a CPU.

`torch.lstm`, `torch.gru` and their cells ask where their input is, and call operators on a device that no CPU has.
These are in differentiable operators, so they serve with and without autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def lstm_cell(
    input_gates: Tensor,
    hidden_gates: Tensor,
    cx: Tensor,
    input_bias: Tensor | None = None,
    hidden_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`_thnn_fused_lstm_cell`: [rows, 4 * hidden] gates and the cell's state to the next hidden and cell states."""
    gates = _biased(input_gates, input_bias) + _biased(hidden_gates, hidden_bias)
    ingate, forgetgate, cellgate, outgate = gates.chunk(4, 1)
    cy = forgetgate.sigmoid() * cx + ingate.sigmoid() * cellgate.tanh()
    return outgate.sigmoid() * cy.tanh(), cy, gates.new_empty(0)  # the last is workspace for a backward of its own


def gru_cell(
    input_gates: Tensor,
    hidden_gates: Tensor,
    hx: Tensor,
    input_bias: Tensor | None = None,
    hidden_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`_thnn_fused_gru_cell`: [rows, 3 * hidden] gates and the hidden state to the next one."""
    input_reset, input_update, input_new = _biased(input_gates, input_bias).chunk(3, 1)
    hidden_reset, hidden_update, hidden_new = _biased(hidden_gates, hidden_bias).chunk(3, 1)
    update = (hidden_update + input_update).sigmoid()
    new = (input_new + hidden_new * (hidden_reset + input_reset).sigmoid()).tanh()
    return (hx - new) * update + new, input_gates.new_empty(0)


def _biased(gates: Tensor, bias: Tensor | None) -> Tensor:
    return gates if bias is None else gates + bias


CELLS: dict[Any, Callable[..., tuple[Tensor, ...]]] = {
    aten._thnn_fused_lstm_cell.default: lstm_cell,
    aten._thnn_fused_gru_cell.default: gru_cell,
}
