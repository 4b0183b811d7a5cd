"""The public operators: one function each, documented, and the call.

All write their arguments in place and return nothing. None allocates on the native core, none waits for a device, and
all can be captured in a CUDA graph and compiled (``torch.compile(fullgraph=True)``). They are for inference: integers,
no gradient. ``torch.ops.advance_step.<name>`` are the same operators; the functions here add that a refused dtype is a
`DtypeError` (a TypeError) on every executor.

Common to all:
    Errors: ``ValueError`` or `DtypeError`, before anything is written, as
    ``<operator>: <argument>: expected <dtype> <shape> with <sizes>, got <what came>``, followed by the whole call.
    Sharing: an argument that is written may share memory with no other argument, except where noted.
    Data: on the CPU a value without a meaning (a position past its table, a negative length) is such an error too,
    with its first row. On an accelerator it costs the row its slot (-1) and nothing else; set ``ADVANCE_STEP_CHECK=1``
    before the import to wait for the device and raise there as well. A negative page id means "no page": slot -1.
    Not checked: that page ids lie in the cache, that sampled ids lie in the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from advance_step._schema import explained
from advance_step.reference import PAD_SLOT

# fmt: off
_npu = torch.ops.advance_step.npu_advance_step_flashattn.default
_flashattn = torch.ops.advance_step.advance_step_flashattn.default
_flashinfer = torch.ops.advance_step.advance_step_flashinfer.default
_eagle = torch.ops.advance_step.eagle_step_update_slot_mapping_and_metadata.default
_until_stop = torch.ops.advance_step.advance_until_stop.default
_slot_mapping = torch.ops.advance_step.compute_slot_mapping.default
ONE, ZERO = 1, 0  # defaults, which double the cost of a call where they are passed on; by identity: 1.0 is refused


def npu_advance_step_flashattn(
    input_tokens: Tensor,
    sampled_token_ids: Tensor,
    input_positions: Tensor,
    seq_lens: Tensor,
    slot_mapping: Tensor,
    block_tables: Tensor,
    num_seqs: int,
    num_queries: int,
    block_size: int,
    *,
    spec_token: Tensor | None = None,
    accepted_num: Tensor | None = None,
) -> None:
    """One generation step to the contract of ``torch_npu.npu_advance_step_flashattn``, on any device.

    Plain mode, for each live row ``i < num_queries``, with ``p = seq_lens[i]`` before the call::

        input_tokens[i], input_positions[i], seq_lens[i] = sampled_token_ids[i, 0], p, p + 1
        slot_mapping[i] = block_tables[i, p // block_size] * block_size + p % block_size

    and for each padding row ``num_queries <= i < num_seqs``: token 0, position 0, slot -1, length as it was.

    Speculative mode (`spec_token` and `accepted_num` given), for each row i and each j of its T = 1 + S entries::

        input_tokens[i]       = [the last sampled token before the first -1, *spec_token[i]]
        input_positions[i, j] += 1 + accepted_num[i]
        seq_lens[i, j]        = input_positions[i, j] + 1
        slot_mapping[i, j]    = the slot of input_positions[i, j]

    Args:
        input_tokens: int64 [num_seqs], written. Speculative: [num_seqs, T] or [num_seqs * T].
        sampled_token_ids: int64 [num_queries, 1], read. Speculative: [num_seqs, T], rejected entries -1.
        input_positions: int64, written; as input_tokens (speculative: each may have either form).
        seq_lens: int64, written; as input_tokens. Lengths of padding rows are not read.
        slot_mapping: int64, written; as input_tokens.
        block_tables: int64 [num_seqs, W], read: page ids. W > max(seq_lens) // block_size.
        num_seqs: rows in all, > 0.
        num_queries: live rows, > 0 and < num_seqs; == num_seqs in speculative mode.
        block_size: tokens per page, > 0.
        spec_token: int64 [num_seqs, S], S > 0, read: the tokens that a draft proposes next.
        accepted_num: int64 [num_seqs], read: how many of the last proposals were accepted.

    Raises:
        ValueError, DtypeError: as the module says; and in speculative mode, on the CPU, for a row that starts with -1
            (on an accelerator such a row keeps its first token).

    Sharing: in plain mode sampled_token_ids may be the very memory of input_tokens[:num_queries].
    Source: the operator's public page (plain mode), its public kernels (speculative mode).

    Example:
        >>> state = [torch.zeros(3, dtype=torch.int64) for _ in range(4)]
        >>> tokens, positions, seq_lens, slots = state
        >>> seq_lens += torch.tensor([5, 16, 0])
        >>> block_tables = torch.tensor([[7, 3], [2, 9], [0, 0]])
        >>> sampled = torch.tensor([[11], [12]])
        >>> npu_advance_step_flashattn(tokens, sampled, positions, seq_lens, slots, block_tables, 3, 2, 16)
        >>> tokens.tolist(), positions.tolist(), seq_lens.tolist(), slots.tolist()
        ([11, 12, 0], [5, 16, 0], [6, 17, 0], [117, 144, -1])
    """
    try:
        if spec_token is None and accepted_num is None:  # keywords would cost a tenth of the call
            _npu(
                input_tokens, sampled_token_ids, input_positions, seq_lens, slot_mapping, block_tables, num_seqs,
                num_queries, block_size,
            )
        else:
            _npu(
                input_tokens, sampled_token_ids, input_positions, seq_lens, slot_mapping, block_tables, num_seqs,
                num_queries, block_size, spec_token=spec_token, accepted_num=accepted_num,
            )
    except (RuntimeError, ValueError) as error:
        raise explained(error, "npu_advance_step_flashattn", locals()) from None


def advance_step_flashattn(
    num_seqs: int,
    num_queries: int,
    block_size: int,
    input_tokens: Tensor,
    sampled_token_ids: Tensor,
    input_positions: Tensor,
    seq_lens: Tensor,
    slot_mapping: Tensor,
    block_tables: Tensor,
) -> None:
    """One generation step to vLLM's contract: `npu_advance_step_flashattn`'s plain mode for what engines really hold.

    The arguments come in vLLM's order; seq_lens, block_tables and sampled_token_ids may each be int32 or int64 and are
    not copied; every row may be live, or none.

    Args:
        num_seqs: rows in all.
        num_queries: live rows, 0 to num_seqs.
        block_size: tokens per page, > 0.
        input_tokens: int64 [num_seqs], written.
        sampled_token_ids: int32 or int64, [num_queries] or [num_queries, 1], read.
        input_positions: int64 [num_seqs], written.
        seq_lens: int32 or int64 [num_seqs], written. Lengths of padding rows are not read.
        slot_mapping: int64 [num_seqs], written.
        block_tables: int32 or int64 [num_seqs, W], any strides, read. Slots are 64-bit whatever its dtype.

    Raises:
        ValueError, DtypeError: as the module says.

    Sharing: sampled_token_ids may be the very memory of input_tokens[:num_queries].
    Source: vLLM's advance_step kernel (csrc/prepare_inputs, version 0.9 and before).

    Example:
        >>> tokens, positions, slots = (torch.zeros(2, dtype=torch.int64) for _ in range(3))
        >>> seq_lens = torch.tensor([5, 16], dtype=torch.int32)
        >>> block_tables = torch.tensor([[7, 3], [2, 9]], dtype=torch.int32)
        >>> sampled = torch.tensor([11, 12])
        >>> advance_step_flashattn(2, 2, 16, tokens, sampled, positions, seq_lens, slots, block_tables)
        >>> slots.tolist(), seq_lens.tolist()
        ([117, 144], [6, 17])
    """
    try:
        _flashattn(
            num_seqs, num_queries, block_size, input_tokens, sampled_token_ids, input_positions, seq_lens,
            slot_mapping, block_tables
        )
    except (RuntimeError, ValueError) as error:
        raise explained(error, "advance_step_flashattn", locals()) from None


def advance_step_flashinfer(
    num_seqs: int,
    num_queries: int,
    block_size: int,
    input_tokens: Tensor,
    sampled_token_ids: Tensor,
    input_positions: Tensor,
    seq_lens: Tensor,
    slot_mapping: Tensor,
    block_tables: Tensor,
    paged_kv_indices: Tensor,
    paged_kv_indptr: Tensor,
    paged_kv_last_page_len: Tensor,
    block_table_bound: Tensor,
) -> None:
    """`advance_step_flashattn`, and in the same call the page metadata that FlashInfer's decode kernels read.

    With p the position of live row i after the step, and indptr[0] = 0::

        block_table_bound[i]      = p // block_size + 1
        paged_kv_last_page_len[i] = p % block_size + 1
        paged_kv_indptr[i + 1]    = paged_kv_indptr[i] + block_table_bound[i]
        paged_kv_indices[paged_kv_indptr[i] : paged_kv_indptr[i + 1]] = block_tables[i, : block_table_bound[i]]

    A padding row repeats the last live indptr; its bound and last page length stay as they were, as do the indices
    past the last live page.

    Args:
        num_seqs ... block_tables: as in `advance_step_flashattn`.
        paged_kv_indices: int32 [N], written. N must hold every live row's pages: fewer are an error on the CPU, on an
            accelerator the rest is not written.
        paged_kv_indptr: int32 [num_seqs + 1], written.
        paged_kv_last_page_len: int32 [num_seqs], written.
        block_table_bound: int32 [num_seqs], written.

    Raises:
        ValueError, DtypeError: as the module says; on the CPU also for page ids or last page lengths that do not fit
            int32 (an accelerator cuts them).

    Sharing: sampled_token_ids may be the very memory of input_tokens[:num_queries].
    Source: vLLM's advance_step_flashinfer (csrc/prepare_inputs, version 0.9 and before).
    """
    try:
        _flashinfer(
            num_seqs, num_queries, block_size, input_tokens, sampled_token_ids, input_positions, seq_lens,
            slot_mapping, block_tables, paged_kv_indices, paged_kv_indptr, paged_kv_last_page_len, block_table_bound
        )
    except (RuntimeError, ValueError) as error:
        raise explained(error, "advance_step_flashinfer", locals()) from None


def eagle_step_update_slot_mapping_and_metadata(
    positions_1d: Tensor,
    block_table_tensor: Tensor,
    seq_lens: Tensor,
    block_size: int,
    max_model_len: int,
    out_clamped_positions: Tensor,
    out_slot_mapping: Tensor,
    input_batch_size: int | None = None,
) -> None:
    """One step of a draft model (EAGLE, MTP): the next position, length and slot of each row.

    With p = positions_1d[i] + 1, for i < batch_size::

        p <  max_model_len: position p, slot of p,  seq_lens[i] = min(seq_lens[i] + 1, max_model_len)
        p >= max_model_len: position 0, slot -1,    seq_lens[i] = 1

    and slot -1 for batch_size <= i < input_batch_size. A position past the table gets slot -1 on every device (vLLM
    writes the last column's page there).

    Args:
        positions_1d: int32 or int64 [batch_size], read.
        block_table_tensor: int32 or int64 [>= batch_size, W], any strides, read.
        seq_lens: int32 or int64 [>= batch_size], written.
        block_size: tokens per page, > 0.
        max_model_len: > 0.
        out_clamped_positions: as positions_1d, [>= batch_size], written.
        out_slot_mapping: int64 [>= input_batch_size], written.
        input_batch_size: rows of a padded batch, >= batch_size; None: batch_size.

    Raises:
        ValueError, DtypeError: as the module says. No value is an error.

    Sharing: out_clamped_positions may be positions_1d itself.
    Source: vLLM's function of this name (vllm/v1/spec_decode/utils.py).

    Example:
        >>> positions, seq_lens = torch.tensor([4, 7]), torch.tensor([5, 8])
        >>> slots = torch.zeros(3, dtype=torch.int64)
        >>> table = torch.tensor([[6, 1], [3, 2]])
        >>> eagle_step_update_slot_mapping_and_metadata(positions, table, seq_lens, 4, 8, positions, slots, 3)
        >>> positions.tolist(), seq_lens.tolist(), slots.tolist()
        ([5, 0], [6, 1], [5, -1, -1])
    """
    try:
        _eagle(
            positions_1d, block_table_tensor, seq_lens, block_size, max_model_len, out_clamped_positions,
            out_slot_mapping, input_batch_size
        )
    except (RuntimeError, ValueError) as error:
        raise explained(error, "eagle_step_update_slot_mapping_and_metadata", locals()) from None


def advance_until_stop(
    input_tokens: Tensor,
    sampled_token_ids: Tensor,
    input_positions: Tensor,
    seq_lens: Tensor,
    slot_mappings: Sequence[Tensor],
    block_tables: Sequence[Tensor],
    block_sizes: Sequence[int],
    status: Tensor,
    output_tokens: Tensor,
    num_generated: Tensor,
    stop_token_ids: Tensor,
    max_seq_lens: Tensor,
    *,
    pad_slot: int = -1,
) -> None:
    """The step that knows when to stop: the host looks at `status` and `output_tokens` once in many steps.

    Every row that is not RUNNING is frozen: its slots become `pad_slot`, nothing else changes. For a running row with
    sampled token t, the first that holds::

        its row of output_tokens is full       -> LENGTH;  nothing recorded
        t is one of stop_token_ids             -> STOPPED; t recorded
        seq_lens[i] + 1 >= max_seq_lens[i]     -> LENGTH;  t recorded
        the next position has no page          -> NO_PAGE; nothing recorded
        seq_lens[i] is its dtype's largest     -> LENGTH;  t recorded
        otherwise                              -> RUNNING; t recorded, and the row advances as in advance_step_flashattn

    "Recorded": ``output_tokens[i, num_generated[i]] = t; num_generated[i] += 1``. A row that does not advance gets
    `pad_slot` and keeps its token, position and length, so a NO_PAGE row that is given a page and set RUNNING again
    loses nothing.

    Args:
        input_tokens, input_positions: int64 [B], written.
        sampled_token_ids: int32 or int64, [B] or [B, 1], read.
        seq_lens: int32 or int64 [B], written.
        slot_mappings: for each KV group int64 [B], written.
        block_tables: for each KV group int32 or int64 [B, W_g], any strides, read.
        block_sizes: for each KV group its tokens per page, > 0.
        status: int32 [B], written: a `RowStatus`.
        output_tokens: int64 [B, M], written.
        num_generated: int32 or int64 [B], written. Negative in a running row: an error on the CPU, else as if full.
        stop_token_ids: int64 [S], read; S may be 0.
        max_seq_lens: int32 or int64 [B], read: prompt and generated tokens together.
        pad_slot: the slot of a row that does not advance.

    Raises:
        ValueError, DtypeError: as the module says. A position without a page is no error here, but NO_PAGE.

    Sharing: sampled_token_ids may be the very memory of input_tokens.
    """
    try:
        _until_stop(
            input_tokens, sampled_token_ids, input_positions, seq_lens, slot_mappings, block_tables, block_sizes,
            status, output_tokens, num_generated, stop_token_ids, max_seq_lens, pad_slot=pad_slot
        )
    except (RuntimeError, ValueError) as error:
        raise explained(error, "advance_until_stop", locals()) from None


def compute_slot_mapping(
    query_start_loc: Tensor,
    positions: Tensor,
    block_table: Tensor,
    slot_mapping: Tensor,
    block_size: int,
    *,
    cp_world_size: int = 1,
    cp_rank: int = 0,
    cp_interleave: int = 1,
    pad_slot: int = -1,
) -> None:
    """The slots of any tokens of a batch: prefill, decode, or both in one step.

    With ``N = query_start_loc[R]``, for each request r, each token t in
    ``[query_start_loc[r], query_start_loc[r + 1])``, and p = positions[t]::

        slot_mapping[t] = block_table[r, p // block_size] * block_size + p % block_size

    and `pad_slot` for each further entry, t in [N, M), and for a token whose page id is negative.

    Context parallel (cp_world_size > 1): the tokens of a sequence are dealt out over the ranks, `cp_interleave` at a
    time, and a page holds block_size tokens on each rank. With ``v = block_size * cp_world_size`` and ``o = p % v``,
    the page is ``block_table[r, p // v]``. A token with ``o // cp_interleave % cp_world_size == cp_rank`` lies in it at
    ``o // (cp_world_size * cp_interleave) * cp_interleave + o % cp_interleave``; another rank's gets `pad_slot`.

    Args:
        query_start_loc: int32 or int64 [R + 1], read: where each request's tokens begin, and N. R may be 0.
        positions: int32 or int64 [P], read: each token's index in its sequence. P >= N; what follows is not read.
        block_table: int32 or int64 [>= R, W], any strides, read.
        slot_mapping: int64 [M], M >= N, written.
        block_size: tokens per page (on one rank), > 0.
        cp_world_size: ranks that share the KV cache, > 0.
        cp_rank: which of them this is, 0 to cp_world_size - 1.
        cp_interleave: consecutive tokens of one rank; a divisor of block_size.
        pad_slot: the slot of an entry that has none.

    Raises:
        ValueError, DtypeError: as the module says; and on the CPU for a query_start_loc that does not begin with 0,
            falls, or passes P or M. On an accelerator a token that no request has gets `pad_slot` then.

    Sharing: slot_mapping has memory of its own.
    Source: vLLM's ``BlockTable.compute_slot_mapping`` (vllm/v1/worker/block_table.py).

    Example:
        >>> query_start_loc = torch.tensor([0, 3, 4])  # three tokens of a prompt, and one of a sequence that decodes
        >>> positions = torch.tensor([3, 4, 5, 9])
        >>> block_table = torch.tensor([[6, 1, 0], [3, 2, 7]])
        >>> slots = torch.zeros(6, dtype=torch.int64)
        >>> compute_slot_mapping(query_start_loc, positions, block_table, slots, 4)
        >>> slots.tolist()
        [27, 4, 5, 29, -1, -1]
    """
    try:
        if cp_world_size is ONE and cp_rank is ZERO and cp_interleave is ONE and pad_slot is PAD_SLOT:
            _slot_mapping(query_start_loc, positions, block_table, slot_mapping, block_size)
        else:
            _slot_mapping(
                query_start_loc, positions, block_table, slot_mapping, block_size, cp_world_size=cp_world_size,
                cp_rank=cp_rank, cp_interleave=cp_interleave, pad_slot=pad_slot
            )
    except (RuntimeError, ValueError) as error:
        raise explained(error, "compute_slot_mapping", locals()) from None
