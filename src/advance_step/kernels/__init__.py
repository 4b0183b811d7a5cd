"""The operators as Triton kernels: for ROCm, XPU and Ascend, and for CUDA without the native core.

For each operator a function of its name and arguments, which launches and neither checks, allocates nor waits. The rule
that each follows is that of the reference of the same name, down to what a value without a meaning costs: its slot.
"""

from advance_step.kernels.eagle import eagle_step_update_slot_mapping_and_metadata
from advance_step.kernels.flashinfer import advance_step_flashinfer
from advance_step.kernels.plain import advance_step_flashattn
from advance_step.kernels.precompile import warmup
from advance_step.kernels.slot_mapping import compute_slot_mapping
from advance_step.kernels.speculative import npu_advance_step_flashattn
from advance_step.kernels.until_stop import advance_until_stop

__all__ = [
    "advance_step_flashattn",
    "advance_step_flashinfer",
    "advance_until_stop",
    "compute_slot_mapping",
    "eagle_step_update_slot_mapping_and_metadata",
    "npu_advance_step_flashattn",
    "warmup",
]
