"""advance-step: the decode step of a paged KV cache, in place, on the device.

After each generation step of a language model whose keys and values lie in pages, the tensors that the next step reads
(the tokens, their positions, the lengths, the slots to write to) have to be advanced. The functions here do that in
one call, as `torch_npu.npu_advance_step_flashattn` and vLLM's `advance_step_flashattn` are documented to.
"""

from advance_step import _backends
from advance_step._backends import backend_info, check_device, warmup
from advance_step.errors import DtypeError

_backends.load()

from advance_step.ops import (  # noqa: E402  (ops binds the operators that load() completes)
    advance_step_flashattn,
    advance_step_flashinfer,
    advance_until_stop,
    compute_slot_mapping,
    eagle_step_update_slot_mapping_and_metadata,
    npu_advance_step_flashattn,
)
from advance_step.reference import PAD_SLOT, RowStatus  # noqa: E402
from advance_step.state import DecodeState  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "PAD_SLOT",
    "DecodeState",
    "DtypeError",
    "RowStatus",
    "advance_step_flashattn",
    "advance_step_flashinfer",
    "advance_until_stop",
    "backend_info",
    "check_device",
    "compute_slot_mapping",
    "eagle_step_update_slot_mapping_and_metadata",
    "npu_advance_step_flashattn",
    "warmup",
]
