"""Compiles every kernel ahead, so that serving compiles nothing."""

from __future__ import annotations

import itertools

import torch

from advance_step.kernels.common import same_memory
from advance_step.kernels.eagle import eagle_step_update_slot_mapping_and_metadata
from advance_step.kernels.flashinfer import advance_step_flashinfer
from advance_step.kernels.plain import advance_step_flashattn
from advance_step.kernels.slot_mapping import compute_slot_mapping
from advance_step.kernels.speculative import npu_advance_step_flashattn
from advance_step.kernels.until_stop import advance_until_stop

INTS = (torch.int32, torch.int64)


def warmup(device: torch.device | str | int) -> None:
    """Compiles and loads the binary of every kernel for every mix of dtypes, by a call of one row each.

    Call it once on each device, before a graph is captured there. Triton keeps the binaries in its cache on disk, so
    that the next process only loads them. It allocates a few bytes and does not wait for the device.
    """

    def zeros(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    def longs() -> torch.Tensor:
        return zeros(torch.int64, 1)

    def pairs(written: torch.dtype, read: torch.dtype, *shape: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """A tensor to write and one to read; and one memory for both, where kernels have a binary for that."""
        apart = zeros(written, *shape), zeros(read, *shape)
        both = apart[0], apart[0]
        return [apart, both] if written == read and same_memory(*both) else [apart]

    # Named by what their dtypes are of: lengths, page ids, sampled tokens, and so on.
    for length, page, token in itertools.product(INTS, repeat=3):
        for tokens, sampled in pairs(torch.int64, token, 1):
            step = (tokens, sampled, longs(), zeros(length, 1), longs(), zeros(page, 1, 1))
            indices, indptr, last_page_len, bound = (zeros(torch.int32, n) for n in (1, 2, 1, 1))
            advance_step_flashattn(1, 1, 1, *step)
            advance_step_flashinfer(1, 1, 1, *step, indices, indptr, last_page_len, bound)

    for tokens, sampled in pairs(torch.int64, torch.int64, 1, 2):
        positions, lengths, slots, table = (zeros(torch.int64, 1, 2) for _ in range(4))
        npu_advance_step_flashattn(
            tokens,
            sampled,
            positions,
            lengths,
            slots,
            table,
            1,
            1,
            1,
            spec_token=zeros(torch.int64, 1, 1),
            accepted_num=longs(),
        )

    for length, page, position in itertools.product(INTS, repeat=3):
        for clamped, positions in pairs(position, position, 1):
            eagle_step_update_slot_mapping_and_metadata(
                positions, zeros(page, 1, 1), zeros(length, 1), 1, 1, clamped, longs()
            )

    for start, position, page in itertools.product(INTS, repeat=3):
        compute_slot_mapping(zeros(start, 2), zeros(position, 1), zeros(page, 1, 1), longs(), 1)

    for length, page, token, count, limit in itertools.product(INTS, repeat=5):
        for num_groups in (1, 2):  # the first group's kernel, and those of every further one
            for tokens, sampled in pairs(torch.int64, token, 1):
                advance_until_stop(
                    tokens,
                    sampled,
                    longs(),
                    zeros(length, 1),
                    [longs() for _ in range(num_groups)],
                    [zeros(page, 1, 1)] * num_groups,
                    [1] * num_groups,
                    zeros(torch.int32, 1),
                    zeros(torch.int64, 1, 1),
                    zeros(count, 1),
                    longs(),
                    zeros(limit, 1),
                )
