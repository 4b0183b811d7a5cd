"""The operators' contracts, a line per demand.

`check_<contract>_arguments` refuses shapes, dtypes, devices and scalars, on every device and without a wait for it.
`check_<contract>_values` refuses values in tensors, on the CPU, and on an accelerator when ``ADVANCE_STEP_CHECK=1``;
where that is not asked for, the kernels write the pad slot instead.
"""

from __future__ import annotations

import torch

from advance_step.errors import Call, first

INT32 = (torch.int32,)
INT64 = (torch.int64,)
INTS = (torch.int32, torch.int64)
MAX_GROUPS = 16  # as kMaxGroups in csrc/advance.h


def check_npu_arguments(call: Call) -> None:
    call.scalar("num_seqs", at_least=1)
    call.scalar("num_queries", at_least=1)
    call.scalar("block_size", at_least=1)
    num_seqs, num_queries = call.sizes["num_seqs"], call.sizes["num_queries"]
    if call.arguments["spec_token"] is None and call.arguments["accepted_num"] is None:
        call.demand("num_queries", num_queries < num_seqs, f"num_queries < num_seqs with num_seqs={num_seqs}")
        state: tuple[str, ...] = ("[num_seqs]",)
        call.tensor("input_tokens", INT64, *state)
        call.tensor("sampled_token_ids", INT64, "[num_queries, 1]")
    else:
        for name, other in (("spec_token", "accepted_num"), ("accepted_num", "spec_token")):
            call.demand(name, call.arguments[name] is not None, f"a tensor, since {other} is given")
        expected = f"num_queries == num_seqs, since spec_token is given, with num_seqs={num_seqs}"
        call.demand("num_queries", num_queries == num_seqs, expected)
        call.tensor("spec_token", INT64, "[num_seqs, S]")
        call.demand("spec_token", call.sizes["S"] >= 1, "S >= 1")
        call.tensor("accepted_num", INT64, "[num_seqs]")
        call.sizes["T"] = 1 + call.sizes["S"]
        call.sizes["num_seqs * T"] = call.sizes["num_seqs"] * call.sizes["T"]
        state = ("[num_seqs, T]", "[num_seqs * T]")
        call.tensor("input_tokens", INT64, *state)
        call.tensor("sampled_token_ids", INT64, "[num_seqs, T]")
    call.tensor("input_positions", INT64, *state)
    call.tensor("seq_lens", INT64, *state)
    call.tensor("slot_mapping", INT64, *state)
    call.tensor("block_tables", INT64, "[num_seqs, W]")
    call.demand("block_tables", call.sizes["W"] >= 1, "W >= 1")
    call.one_device()


def check_npu_values(call: Call) -> None:
    if call.arguments["spec_token"] is None:
        call.positions("seq_lens", call.sizes["num_queries"], "block_tables")
        return
    if (at := first(call["sampled_token_ids"][:, 0] == -1)) is not None:
        raise call.refusal("sampled_token_ids", "a token before the first -1 in every row", f"-1 first in row {at[0]}")
    call.positions("input_positions", call.sizes["num_seqs"], "block_tables", steps="accepted_num")


def check_vllm_arguments(call: Call) -> None:
    call.scalar("num_seqs", at_least=0)
    call.scalar("num_queries", at_least=0)
    call.scalar("block_size", at_least=1)
    num_seqs, num_queries = call.sizes["num_seqs"], call.sizes["num_queries"]
    call.demand("num_queries", num_queries <= num_seqs, f"num_queries <= num_seqs with num_seqs={num_seqs}")
    call.tensor("input_tokens", INT64, "[num_seqs]")
    call.tensor("sampled_token_ids", INTS, "[num_queries]", "[num_queries, 1]")
    call.tensor("input_positions", INT64, "[num_seqs]")
    call.tensor("seq_lens", INTS, "[num_seqs]")
    call.tensor("slot_mapping", INT64, "[num_seqs]")
    call.tensor("block_tables", INTS, "[num_seqs, W]")
    call.one_device()


def check_vllm_values(call: Call) -> None:
    call.positions("seq_lens", call.sizes["num_queries"], "block_tables")


def check_flashinfer_arguments(call: Call) -> None:
    check_vllm_arguments(call)
    call.sizes["num_seqs + 1"] = call.sizes["num_seqs"] + 1
    call.tensor("paged_kv_indices", INT32, "[N]")
    call.tensor("paged_kv_indptr", INT32, "[num_seqs + 1]")
    call.tensor("paged_kv_last_page_len", INT32, "[num_seqs]")
    call.tensor("block_table_bound", INT32, "[num_seqs]")
    call.one_device()


def check_flashinfer_values(call: Call) -> None:
    check_vllm_values(call)
    live = call["seq_lens"][: call.sizes["num_queries"]].to(torch.int64)
    needed = int((live.div(call.sizes["block_size"], rounding_mode="floor") + 1).sum())
    if needed > call.sizes["N"]:
        expected = f"int32 [N] with N >= {needed}, the pages in use after this step"
        raise call.refusal("paged_kv_indices", expected, f"N={call.sizes['N']}")
    on_last_page = live % call.sizes["block_size"]
    if (at := first(on_last_page >= 2**31 - 1)) is not None:
        got = f"{int(on_last_page[at])} in row {at[0]}"
        raise call.refusal("paged_kv_last_page_len", "seq_lens % block_size < 2**31 - 1", got)
    pages = call["block_tables"][: call.sizes["num_queries"]]
    column = torch.arange(call.sizes["W"], device=pages.device)
    in_use = column <= live[:, None].div(call.sizes["block_size"], rounding_mode="floor")
    if (at := first(in_use & (pages != pages.to(torch.int32)))) is not None:
        raise call.refusal("block_tables", "page ids that fit int32", f"{int(pages[at])} in row {at[0]}")


def check_eagle_arguments(call: Call) -> None:
    call.scalar("block_size", at_least=1)
    call.scalar("max_model_len", at_least=1)
    call.tensor("positions_1d", INTS, "[batch_size]")
    if call.arguments["input_batch_size"] is None:
        call.sizes["input_batch_size"] = call.sizes["batch_size"]
    call.scalar("input_batch_size", at_least=0)
    batch_size, padded = call.sizes["batch_size"], call.sizes["input_batch_size"]
    call.demand(
        "input_batch_size", padded >= batch_size, f"input_batch_size >= batch_size with batch_size={batch_size}"
    )
    call.tensor("block_table_tensor", INTS, "[>= batch_size, W]")
    call.tensor("seq_lens", INTS, "[>= batch_size]")
    call.tensor("out_clamped_positions", INTS, "[>= batch_size]")
    call.same_dtype("out_clamped_positions", "positions_1d")
    call.tensor("out_slot_mapping", INT64, "[>= input_batch_size]")
    call.one_device()


def check_until_stop_arguments(call: Call) -> None:
    grouped = ("slot_mappings", "block_tables", "block_sizes")
    counts = [call.list(kind) for kind in grouped]
    for kind, count in zip(grouped, counts, strict=True):
        if not 1 <= count == max(counts) <= MAX_GROUPS:
            groups = min(max(1, *counts), MAX_GROUPS)
            raise call.refusal(kind, f"one for each of {groups} KV groups (1 to {MAX_GROUPS})", count)
    call.tensor("input_tokens", INT64, "[B]")
    call.tensor("sampled_token_ids", INTS, "[B]", "[B, 1]")
    call.tensor("input_positions", INT64, "[B]")
    call.tensor("seq_lens", INTS, "[B]")
    for g in range(counts[0]):
        call.tensor(f"slot_mappings[{g}]", INT64, "[B]")
        call.tensor(f"block_tables[{g}]", INTS, f"[B, W_{g}]")
        call.scalar(f"block_sizes[{g}]", at_least=1)
    call.tensor("status", INT32, "[B]")
    call.tensor("output_tokens", INT64, "[B, M]")
    call.tensor("num_generated", INTS, "[B]")
    call.tensor("stop_token_ids", INT64, "[S]")
    call.tensor("max_seq_lens", INTS, "[B]")
    call.scalar("pad_slot", at_least=-(2**63))
    call.one_device()


def check_until_stop_values(call: Call) -> None:
    if (at := first((call["status"] == 0) & (call["num_generated"] < 0))) is not None:
        got = f"{int(call['num_generated'][at])} in row {at[0]}"
        raise call.refusal("num_generated", "num_generated >= 0 in every running row", got)


def check_slot_mapping_arguments(call: Call) -> None:
    call.scalar("block_size", at_least=1)
    call.scalar("cp_world_size", at_least=1)
    call.scalar("cp_rank", at_least=0)
    call.scalar("cp_interleave", at_least=1)
    call.scalar("pad_slot", at_least=-(2**63))
    block_size, world_size = call.sizes["block_size"], call.sizes["cp_world_size"]
    expected = f"block_size * cp_world_size < 2**63 with block_size={block_size}"
    call.demand("cp_world_size", block_size * world_size <= 2**63 - 1, expected)
    call.demand(
        "cp_rank", call.sizes["cp_rank"] < world_size, f"cp_rank < cp_world_size with cp_world_size={world_size}"
    )
    expected = f"a divisor of block_size with block_size={block_size}"
    call.demand("cp_interleave", block_size % call.sizes["cp_interleave"] == 0, expected)
    call.tensor("query_start_loc", INTS, "[R + 1]")
    call.sizes["R"] = call.sizes["R + 1"] - 1
    call.demand("query_start_loc", call.sizes["R"] >= 0, "[R + 1] with R >= 0")
    call.tensor("positions", INTS, "[P]")
    call.tensor("block_table", INTS, "[>= R, W]")
    call.tensor("slot_mapping", INT64, "[M]")
    call.one_device()


def check_slot_mapping_values(call: Call) -> None:
    starts, sizes = call["query_start_loc"], call.sizes
    if (start := int(starts[0])) != 0:
        raise call.refusal("query_start_loc", "0 first", start)
    if (at := first(starts[1:] < starts[:-1])) is not None:
        got = f"{int(starts[at])} and {int(starts[at[0] + 1])} in request {at[0]}"
        raise call.refusal("query_start_loc", "query_start_loc[r] <= query_start_loc[r + 1] in every request r", got)
    num_tokens = int(starts[-1])
    for name, size in (("positions", "P"), ("slot_mapping", "M")):
        if num_tokens > sizes[size]:
            expected = f"query_start_loc[R] <= {size} with {name} [{size}], {size}={sizes[size]}"
            raise call.refusal("query_start_loc", expected, num_tokens)
    block_size, world_size, columns = sizes["block_size"], sizes["cp_world_size"], sizes["W"]
    positions = call["positions"][:num_tokens].to(torch.int64)
    bad = (positions < 0) | (positions > min(columns * block_size * world_size - 1, 2**63 - 1))
    if (at := first(bad)) is not None:
        request = int((starts <= at[0]).sum()) - 1
        bound, known = "W * block_size", f"W={columns}, block_size={block_size}"
        if world_size > 1:
            bound, known = f"{bound} * cp_world_size", f"{known}, cp_world_size={world_size}"
        expected = (
            f"0 <= position < {bound} with block_table [{call['block_table'].size(0)}, W], {known} for every token"
        )
        got = f"position {int(positions[at])} for token {at[0]}, in request {request}"
        raise call.refusal("positions", expected, got)
