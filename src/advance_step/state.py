"""The batch as the device sees it: buffers that keep their addresses from the first step to the last.

An engine keeps one `DecodeState`. It admits a sequence when its prompt's keys and values are in their pages, writes
what it sampled into `sampled`, and advances; the operators do the rest on the device. The host reads the state in
`sync` and nowhere else, so that steps between two syncs can be queued, or captured in a graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from advance_step.ops import advance_step_flashattn, advance_until_stop
from advance_step.reference import PAD_SLOT, RowStatus

NO_PAGE_ID = -1  # in a block table: there is no page here yet


@dataclass
class DecodeState:
    """What a step reads and the operators advance. The live rows come first; the others are padding.

    A padding row is neutral: token 0 at position 0, pad slot, length 1, every page its group's pad page, status
    PADDING. A live row stands at its current token, the last that it has: `input_tokens` at `input_positions`, with
    `seq_lens` tokens up to and with it. Make one with `allocate`.

    Attributes (all on one device; n = num_seqs, G KV groups):
        input_tokens, input_positions: int64 [n], what the model reads.
        seq_lens: int32 or int64 [n].
        slot_mappings: G of int64 [n]; where the model writes the keys and values of the current token.
        block_tables: G of seq_lens' dtype, [n, W_g]; -1 where a live row has no page yet.
        block_sizes: G ints, tokens in a page.
        sampled: int64 [n]; the engine writes here the token that each row sampled.
        max_seq_lens: as seq_lens, [n]; prompt and new tokens together, at most.
        status: int32 [n], a `RowStatus` each.
        output_tokens: int64 [n, steps_per_sync]; what was sampled since the last sync, `num_generated` of it.
        num_generated: int32 [n].
        stop_token_ids: int64 [S]; a row that samples one of them is STOPPED.

    Captured in a CUDA graph, `advance_until_stop` and `advance_step` need no host value that changes between replays,
    as long as the range of rows is the captured one.

    Example:
        >>> import torch
        >>> from advance_step import DecodeState, RowStatus
        >>> state = DecodeState.allocate(num_seqs=4, max_seq_len=64, block_size=16, steps_per_sync=2)
        >>> row = state.admit(seq_len=16, max_seq_len=20, pages=[7], last_token=11)  # a prompt that fills its page
        >>> state.sampled[row] = 12
        >>> state.advance_until_stop()
        >>> state.sync()  # position 16 has no page
        [(<RowStatus.NO_PAGE: 3>, [])]
        >>> state.grow(row, [3])
        >>> state.advance_until_stop()
        >>> state.sync(), state.slot_mappings[0].tolist()
        ([(<RowStatus.RUNNING: 0>, [12])], [48, -1, -1, -1])
    """

    input_tokens: Tensor
    input_positions: Tensor
    seq_lens: Tensor
    slot_mappings: list[Tensor]
    block_tables: list[Tensor]
    block_sizes: list[int]
    sampled: Tensor
    max_seq_lens: Tensor
    status: Tensor
    output_tokens: Tensor
    num_generated: Tensor
    stop_token_ids: Tensor
    pad_pages: list[int]
    num_pages: list[list[int]] = field(default_factory=list)  # of each live row, by group; the host's own count
    _viewed_rows: slice | None = None
    _views: tuple[Any, ...] = ()

    @classmethod
    def allocate(
        cls,
        num_seqs: int,
        max_seq_len: int,
        block_size: int | Sequence[int],
        *,
        steps_per_sync: int = 1,
        stop_token_ids: Sequence[int] = (),
        pad_page: int | Sequence[int] = 0,
        dtype: torch.dtype = torch.int32,
        device: torch.device | str = "cpu",
    ) -> DecodeState:
        """A batch of `num_seqs` padding rows.

        Args:
            num_seqs: rows, > 0.
            max_seq_len: the longest sequence, in tokens; it gives the block tables their width.
            block_size: tokens in a page; a sequence has one for each KV group.
            steps_per_sync: steps that the batch may make between two syncs.
            stop_token_ids: as the attribute; the buffer keeps this size.
            pad_page: the page in the tables of padding rows, one for all groups or one each. What attends over tables
                may read it, so it must be a page that exists.
            dtype: of lengths and block tables, int32 or int64 (Ascend's operators take int64).
            device: where the buffers are.

        Raises ValueError for a size below 1 and another dtype.
        """
        block_sizes = [block_size] if isinstance(block_size, int) else list(block_size)
        pad_pages = [pad_page] * len(block_sizes) if isinstance(pad_page, int) else list(pad_page)
        sizes = {"num_seqs": num_seqs, "max_seq_len": max_seq_len, "steps_per_sync": steps_per_sync}
        sizes |= {f"block_size[{group}]": size for group, size in enumerate(block_sizes)}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}: expected {name} >= 1, got {size}")
        if not block_sizes or len(pad_pages) != len(block_sizes):
            raise ValueError(f"pad_page: expected one for each of {len(block_sizes)} KV groups, got {len(pad_pages)}")
        if dtype not in (torch.int32, torch.int64):
            raise ValueError(f"dtype: expected torch.int32 or torch.int64, got {dtype}")

        def full(value: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        return cls(
            input_tokens=full(0, num_seqs),
            input_positions=full(0, num_seqs),
            seq_lens=full(1, num_seqs, dtype=dtype),
            slot_mappings=[full(PAD_SLOT, num_seqs) for _ in block_sizes],
            block_tables=[
                full(page, num_seqs, -(-max_seq_len // size), dtype=dtype)
                for page, size in zip(pad_pages, block_sizes, strict=True)
            ],
            block_sizes=block_sizes,
            sampled=full(0, num_seqs),
            max_seq_lens=full(0, num_seqs, dtype=dtype),
            status=full(RowStatus.PADDING, num_seqs, dtype=torch.int32),
            output_tokens=full(0, num_seqs, steps_per_sync),
            num_generated=full(0, num_seqs, dtype=torch.int32),
            stop_token_ids=torch.tensor(list(stop_token_ids), dtype=torch.int64, device=device),
            pad_pages=pad_pages,
        )

    @property
    def num_seqs(self) -> int:
        """Rows, live and padding."""
        return self.status.shape[0]

    @property
    def num_rows(self) -> int:
        """Live rows: rows [0, num_rows)."""
        return len(self.num_pages)

    def admit(
        self, seq_len: int, max_seq_len: int, pages: Sequence[int] | Sequence[Sequence[int]], last_token: int
    ) -> int:
        """Make the first padding row a sequence, and return its number.

        Args:
            seq_len: its tokens so far, > 0; their keys and values are in `pages`.
            max_seq_len: the most that it may become, > seq_len.
            pages: its page ids in order, a list for each KV group (or the one list); at least those of its tokens.
            last_token: the token at position seq_len - 1.

        Nothing is read back from the device. Raises ValueError where there is no padding row, for lengths or numbers of
        pages that do not fit, and for a negative page id.
        """
        row = self.num_rows
        if row == self.num_seqs:
            raise ValueError(f"admit: expected a padding row, got {row} live rows of num_seqs={self.num_seqs}")
        if not 0 < seq_len < max_seq_len:
            raise ValueError(f"seq_len: expected 0 < seq_len < max_seq_len={max_seq_len}, got {seq_len}")
        grouped = self._grouped(pages)
        for group, (ids, size) in enumerate(zip(grouped, self.block_sizes, strict=True)):
            if len(ids) * size < seq_len:
                raise ValueError(f"pages[{group}]: expected at least {-(-seq_len // size)} pages, got {len(ids)}")
        self._check_pages(grouped, [0] * len(grouped))
        self.num_pages.append([0] * len(grouped))
        self.input_tokens[row] = last_token
        self.input_positions[row] = seq_len - 1
        self.seq_lens[row] = seq_len
        self.max_seq_lens[row] = max_seq_len
        for table in self.block_tables:
            table[row].fill_(NO_PAGE_ID)
        self.status[row] = RowStatus.RUNNING
        self.grow(row, grouped)
        return row

    def grow(self, row: int, pages: Sequence[int] | Sequence[Sequence[int]]) -> None:
        """Append page ids to live row `row`, a list for each KV group (or the one list); a NO_PAGE row runs again.

        Nothing is read back from the device. Raises ValueError for a row that is not live, for more pages than the
        table has columns, and for a negative page id.
        """
        self._check_live(row)
        grouped = self._grouped(pages)
        self._check_pages(grouped, self.num_pages[row])
        for group, (table, ids) in enumerate(zip(self.block_tables, grouped, strict=True)):
            had = self.num_pages[row][group]
            if ids:
                table[row, had : had + len(ids)] = torch.tensor(ids, dtype=table.dtype)
            self.num_pages[row][group] = had + len(ids)
        status = self.status[row]
        status.masked_fill_(status == RowStatus.NO_PAGE, RowStatus.RUNNING)

    def remove(self, *rows: int) -> None:
        """Drop live rows, looked at or not: in the order given, the last live row moves into each one's place.

        Their pages are the caller's to give back. Nothing is read back from the device. Raises ValueError for a row
        that is not live when its turn comes.
        """
        sources, num_pages = list(range(self.num_rows)), list(self.num_pages)
        for row in rows:
            if not 0 <= row < len(sources):
                raise ValueError(f"row: expected a live row, 0 <= row < {len(sources)}, got {row}")
            sources[row], num_pages[row] = sources[-1], num_pages[-1]
            sources.pop()
            num_pages.pop()
        moved = [(source, row) for row, source in enumerate(sources) if source != row]
        source, target = torch.tensor(moved, device=self.status.device).view(-1, 2).unbind(1)
        padding = slice(len(sources), self.num_rows)
        for buffer, value in self._padding():
            if moved:
                buffer[target] = buffer[source]
            buffer[padding] = value
        self.num_pages = num_pages

    def advance_until_stop(self, rows: slice = slice(None)) -> None:
        """Record what was `sampled` for `rows`, and turn each to its next token, by the operator of this name.

        A row that is done freezes as STOPPED or LENGTH, one that needs a page as NO_PAGE; `sync` tells which.
        """
        if rows != self._viewed_rows:  # views of buffers that never move: made when the rows change
            self._viewed_rows, self._views = rows, self._arguments(rows)
        advance_until_stop(*self._views)

    def advance_step(self) -> None:
        """Turn every live row to what it `sampled`, by `advance_step_flashattn`: for engines that stop rows themselves.

        Nothing is recorded and `status` is not looked at. Raises ValueError with more than one KV group, and on a CPU
        for a row that has no column left in its table; a row whose next page is missing gets the pad slot.
        """
        if len(self.block_tables) > 1:
            raise ValueError(f"advance_step: expected one KV group, got {len(self.block_tables)}: advance_until_stop")
        live = self.num_rows
        advance_step_flashattn(
            self.num_seqs,
            live,
            self.block_sizes[0],
            self.input_tokens,
            self.sampled[:live],
            self.input_positions,
            self.seq_lens,
            self.slot_mappings[0],
            self.block_tables[0],
        )

    def sync(self, rows: slice | None = None) -> list[tuple[RowStatus, list[int]]]:
        """The host's look at live rows: of each its status, and the tokens that it recorded since the last sync.

        Waits for the device. rows: those to look at, all live ones unless given.
        """
        rows = slice(self.num_rows) if rows is None else rows
        status, counts = self.status[rows].tolist(), self.num_generated[rows].tolist()
        tokens = self.output_tokens[rows, : max(counts, default=0)].tolist()
        self.num_generated[rows] = 0
        return [(RowStatus(s), row[:n]) for s, n, row in zip(status, counts, tokens, strict=True)]

    def _arguments(self, rows: slice) -> tuple[Any, ...]:
        """Of `advance_until_stop` for `rows`."""
        return (
            self.input_tokens[rows],
            self.sampled[rows],
            self.input_positions[rows],
            self.seq_lens[rows],
            [slots[rows] for slots in self.slot_mappings],
            [table[rows] for table in self.block_tables],
            self.block_sizes,
            self.status[rows],
            self.output_tokens[rows],
            self.num_generated[rows],
            self.stop_token_ids,
            self.max_seq_lens[rows],
        )

    def _padding(self) -> list[tuple[Tensor, int]]:
        """Every buffer with a row for each sequence, and what a padding row has in it."""
        return [
            (self.input_tokens, 0),
            (self.input_positions, 0),
            (self.seq_lens, 1),
            (self.sampled, 0),
            (self.max_seq_lens, 0),
            (self.status, RowStatus.PADDING),
            (self.output_tokens, 0),
            (self.num_generated, 0),
            *((slots, PAD_SLOT) for slots in self.slot_mappings),
            *zip(self.block_tables, self.pad_pages, strict=True),
        ]

    def _grouped(self, pages: Sequence[int] | Sequence[Sequence[int]]) -> list[list[int]]:
        """`pages` as a list for each KV group."""
        flat = all(isinstance(page, int) for page in pages)
        grouped = [list(pages)] if flat and len(self.block_tables) == 1 else [list(ids) for ids in pages]  # type: ignore[arg-type]
        if len(grouped) != len(self.block_tables):
            raise ValueError(f"pages: expected a list for each of {len(self.block_tables)} KV groups, got {pages}")
        return grouped  # type: ignore[return-value]

    def _check_pages(self, grouped: list[list[int]], had: list[int]) -> None:
        for group, (ids, table) in enumerate(zip(grouped, self.block_tables, strict=True)):
            if had[group] + len(ids) > table.shape[1]:
                expected = f"at most {table.shape[1]} pages, {had[group]} of which the row has"
                raise ValueError(f"pages[{group}]: expected {expected}, got {len(ids)} more")
            if any(page < 0 for page in ids):
                raise ValueError(f"pages[{group}]: expected page ids >= 0, got {min(ids)}")

    def _check_live(self, row: int) -> None:
        if not 0 <= row < self.num_rows:
            raise ValueError(f"row: expected a live row, 0 <= row < {self.num_rows}, got {row}")
