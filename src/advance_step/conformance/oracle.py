"""The contracts in plain Python: dicts of ints and lists in, lists out; no torch, and no code of the operators.

Every function takes the call's arguments by name, as ints and (nested) lists, and `int32`, the names of those arguments
that hold 32-bit cells. `slot` says how a table is read; `deviations` puts a known fault in its place.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

PAD_SLOT = -1
INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1
ANY = None  # stands in `written` for a cell that the contract leaves open
RUNNING, STOPPED, LENGTH, NO_PAGE, PADDING = range(5)

Values = dict[str, Any]
Slot = Callable[[list[list[int]], int, int, int], int | None]


@dataclass
class Outcome:
    """What the written arguments hold after the call, and the arguments whose data is at fault, with its first row.

    With `errors`, the CPU must raise for one of them and write nothing, and `written` is what an accelerator leaves.
    """

    written: dict[str, list[Any]]
    errors: dict[str, int | None] = field(default_factory=dict)


def slot(table: list[list[int]], row: int, position: int, block_size: int) -> int | None:
    """The slot of `position`; the pad slot if its page id is negative; None if the table has no such column."""
    column = position // block_size
    if not 0 <= column < len(table[row]):
        return None
    page = table[row][column]
    return page * block_size + position % block_size if page >= 0 else PAD_SLOT


def limit(name: str, int32: frozenset[str]) -> int:
    """The largest value that a cell of argument `name` holds."""
    return INT32_MAX if name in int32 else INT64_MAX


def column(values: list[Any]) -> list[int]:
    """[n] or [n, 1] as [n]."""
    return [cell[0] if isinstance(cell, list) else cell for cell in values]


def step(args: Values, int32: frozenset[str] = frozenset(), slot: Slot = slot) -> Outcome:
    """`advance_step_flashattn`, and `npu_advance_step_flashattn` in plain mode."""
    live, block_size = args["num_queries"], args["block_size"]
    tokens, positions = list(args["input_tokens"]), list(args["input_positions"])
    lengths, slots = list(args["seq_lens"]), list(args["slot_mapping"])
    sampled = column(args["sampled_token_ids"])
    errors: dict[str, int | None] = {}
    for i in range(args["num_seqs"]):
        if i >= live:
            tokens[i], positions[i], slots[i] = 0, 0, PAD_SLOT
            continue
        position = lengths[i]
        place = slot(args["block_tables"], i, position, block_size)
        if place is None or position + 1 > limit("seq_lens", int32):
            errors.setdefault("seq_lens", i)
            tokens[i] = positions[i] = lengths[i] = ANY
            slots[i] = PAD_SLOT
        else:
            tokens[i], positions[i], lengths[i], slots[i] = sampled[i], position, position + 1, place
    written = {"input_tokens": tokens, "input_positions": positions, "seq_lens": lengths, "slot_mapping": slots}
    return Outcome(written, errors)


def npu_step(args: Values, int32: frozenset[str] = frozenset(), slot: Slot = slot) -> Outcome:
    """`npu_advance_step_flashattn`, both modes."""
    return speculative_step(args, slot) if args.get("spec_token") is not None else step(args, int32, slot)


def speculative_step(args: Values, slot: Slot = slot) -> Outcome:
    """`npu_advance_step_flashattn` in speculative mode: T = 1 + S cells a row, as [num_seqs, T] or flat."""
    width = 1 + len(args["spec_token"][0])
    names = ("input_tokens", "input_positions", "seq_lens", "slot_mapping")
    flat = {name: not isinstance(args[name][0], list) for name in names}
    rows = {
        name: [list(args[name][i : i + width]) for i in range(0, len(args[name]), width)]
        if flat[name]
        else [list(row) for row in args[name]]
        for name in names
    }
    tokens, positions, lengths, slots = (rows[name] for name in names)
    errors: dict[str, int | None] = {}
    for i in range(args["num_seqs"]):
        sampled = args["sampled_token_ids"][i]
        accepted = sampled[: sampled.index(-1)] if -1 in sampled else sampled
        if not accepted:
            errors.setdefault("sampled_token_ids", i)
        moved = [position + 1 + args["accepted_num"][i] for position in positions[i]]
        places = [slot(args["block_tables"], i, position, args["block_size"]) for position in moved]
        if None in places:
            errors.setdefault("input_positions", i)
            tokens[i], positions[i], lengths[i] = [ANY] * width, [ANY] * width, [ANY] * width
            slots[i] = [PAD_SLOT if place is None else ANY for place in places]
        else:
            tokens[i] = [accepted[-1] if accepted else tokens[i][0], *args["spec_token"][i]]
            positions[i], lengths[i], slots[i] = moved, [position + 1 for position in moved], places
    written = {name: [cell for row in rows[name] for cell in row] if flat[name] else rows[name] for name in names}
    return Outcome(written, errors)


def flashinfer_step(args: Values, int32: frozenset[str] = frozenset(), slot: Slot = slot) -> Outcome:
    """`advance_step_flashinfer`."""
    outcome = step(args, int32, slot)
    live, block_size = args["num_queries"], args["block_size"]
    names = ("paged_kv_indices", "paged_kv_indptr", "paged_kv_last_page_len", "block_table_bound")
    if outcome.errors:
        outcome.written |= {name: [ANY] * len(args[name]) for name in names}
        return outcome
    indices, indptr, last_page_len, bound = (list(args[name]) for name in names)
    pages: list[int] = []
    indptr[0] = 0
    for i in range(args["num_seqs"]):
        if i < live:
            position = args["seq_lens"][i]
            bound[i] = -(-(position + 1) // block_size)
            last_page_len[i] = position % block_size + 1
            if last_page_len[i] > INT32_MAX:
                outcome.errors.setdefault("paged_kv_last_page_len", i)
            used = args["block_tables"][i][: bound[i]]
            pages += used
            if any(not -INT32_MAX - 1 <= page <= INT32_MAX for page in used):
                outcome.errors.setdefault("block_tables", i)
        indptr[i + 1] = len(pages)
    if len(pages) > len(indices):
        written = {name: [ANY] * len(args[name]) for name in (*outcome.written, *names)}
        return Outcome(written, outcome.errors | {"paged_kv_indices": None})
    indices[: len(pages)] = pages
    outcome.written |= dict(zip(names, (indices, indptr, last_page_len, bound), strict=True))
    return outcome


def eagle_step(args: Values, int32: frozenset[str] = frozenset(), slot: Slot = slot) -> Outcome:
    """`eagle_step_update_slot_mapping_and_metadata`."""
    positions, lengths = args["positions_1d"], list(args["seq_lens"])
    clamped, slots = list(args["out_clamped_positions"]), list(args["out_slot_mapping"])
    longest = args["max_model_len"]
    padded = args.get("input_batch_size")
    for i, position in enumerate(positions):
        if position + 1 >= longest or position + 1 > limit("positions_1d", int32):
            clamped[i], lengths[i], slots[i] = 0, 1, PAD_SLOT
        else:
            place = slot(args["block_table_tensor"], i, position + 1, args["block_size"])
            clamped[i], lengths[i] = position + 1, min(lengths[i] + 1, longest, limit("seq_lens", int32))
            slots[i] = PAD_SLOT if place is None else place
    for i in range(len(positions), len(positions) if padded is None else padded):
        slots[i] = PAD_SLOT
    return Outcome({"seq_lens": lengths, "out_clamped_positions": clamped, "out_slot_mapping": slots})


def until_stop(args: Values, int32: frozenset[str] = frozenset(), slot: Slot = slot) -> Outcome:
    """`advance_until_stop`."""
    names = ("input_tokens", "input_positions", "seq_lens", "status", "num_generated")
    tokens, positions, lengths, status, generated = (list(args[name]) for name in names)
    output = [list(row) for row in args["output_tokens"]]
    slots = [list(group) for group in args["slot_mappings"]]
    pad_slot = args.get("pad_slot", PAD_SLOT)
    errors: dict[str, int | None] = {}
    for i, token in enumerate(column(args["sampled_token_ids"])):
        places = [pad_slot] * len(slots)
        if status[i] == RUNNING:
            position = lengths[i]
            pages = [
                slot(table, i, position, block_size)
                for table, block_size in zip(args["block_tables"], args["block_sizes"], strict=True)
            ]
            room = 0 <= generated[i] < len(output[i])
            record = room
            if generated[i] < 0:
                errors.setdefault("num_generated", i)
            if not room:
                status[i] = LENGTH
            elif token in args["stop_token_ids"]:
                status[i] = STOPPED
            elif position + 1 >= args["max_seq_lens"][i]:
                status[i] = LENGTH
            elif None in pages or PAD_SLOT in pages:
                status[i], record = NO_PAGE, False
            elif position + 1 > limit("seq_lens", int32):
                status[i] = LENGTH
            else:
                tokens[i], positions[i], lengths[i], places = token, position, position + 1, pages
            if record:
                output[i][generated[i]] = token
                generated[i] += 1
        for group, place in zip(slots, places, strict=True):
            group[i] = place
    written = dict(zip(names, (tokens, positions, lengths, status, generated), strict=True))
    written |= {"output_tokens": output} | {f"slot_mappings[{g}]": group for g, group in enumerate(slots)}
    return Outcome(written, errors)


def slot_mapping(args: Values, int32: frozenset[str] = frozenset(), slot: Slot = slot) -> Outcome:
    """`compute_slot_mapping`."""
    starts, positions, slots = args["query_start_loc"], args["positions"], list(args["slot_mapping"])
    block_size, pad_slot = args["block_size"], args.get("pad_slot", PAD_SLOT)
    world_size, interleave = args.get("cp_world_size", 1), args.get("cp_interleave", 1)
    falls = [r for r in range(len(starts) - 1) if starts[r + 1] < starts[r]]
    if starts[0] != 0 or falls or starts[-1] > min(len(positions), len(slots)):
        row = falls[0] if starts[0] == 0 and falls else None
        return Outcome({"slot_mapping": [ANY] * len(slots)}, {"query_start_loc": row})
    errors: dict[str, int | None] = {}
    slots = [pad_slot] * len(slots)
    for r in range(len(starts) - 1):
        for t in range(starts[r], starts[r + 1]):
            page, offset = divmod(positions[t], block_size * world_size)
            turn, behind = divmod(offset, interleave)  # the turns go round the ranks
            rounds, rank = divmod(turn, world_size)
            place = slot(args["block_table"], r, page * block_size + rounds * interleave + behind, block_size)
            if place is None:
                errors.setdefault("positions", t)
            elif rank == args.get("cp_rank", 0) and place != PAD_SLOT:
                slots[t] = place
    return Outcome({"slot_mapping": slots}, errors)
