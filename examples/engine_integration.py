"""A small engine twice: its step built from Python lists, as small engines do, and on `advance_step.DecodeState`.

    python examples/engine_integration.py [--rows 1 32 256] [--steps 64]

Both decode the same prompts with the same model over the same paged cache, and must give the same tokens. Printed is
the time of a step, and the part of it that is not the model: sampling's result to the next step's inputs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from advance_step import DecodeState, RowStatus

BLOCK_SIZE, VOCABULARY, HIDDEN, STOP = 16, 97, 32, 0
Step = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class TinyModel(nn.Module):
    """One layer of attention over paged keys and values; enough that a wrong slot or position gives other tokens."""

    def __init__(self, num_pages: int, max_len: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(VOCABULARY, HIDDEN), nn.Embedding(max_len, HIDDEN)
        self.query, self.key, self.value = (nn.Linear(HIDDEN, HIDDEN) for _ in range(3))
        self.head = nn.Linear(HIDDEN, VOCABULARY)
        self.keys = torch.zeros((num_pages + 1) * BLOCK_SIZE, HIDDEN)  # the last page takes what has no slot
        self.values = torch.zeros_like(self.keys)

    def forward(self, tokens: Tensor, positions: Tensor, slots: Tensor, tables: Tensor, seq_lens: Tensor) -> Tensor:
        """The next token of each row: tokens, positions, slots, seq_lens [rows], tables [rows, pages]."""
        x = self.token(tokens) + self.position(positions)  # [rows, hidden]
        slots = torch.where(slots < 0, self.keys.shape[0] - 1, slots)
        self.keys[slots], self.values[slots] = self.key(x), self.value(x)
        place = torch.arange(tables.shape[1] * BLOCK_SIZE)
        history = tables.clamp(min=0).long()[:, place // BLOCK_SIZE] * BLOCK_SIZE + place % BLOCK_SIZE
        scores = (self.keys[history] @ self.query(x)[:, :, None])[:, :, 0]  # [rows, pages * block_size]
        weights = scores.masked_fill(place >= seq_lens[:, None], -torch.inf).softmax(-1)
        return self.head(x + (weights[:, None] @ self.values[history])[:, 0]).argmax(-1)


def on_lists(model: TinyModel, prompts: list[int], steps: int) -> tuple[list[list[int]], float]:
    """Every step the host reads the tokens, walks its lists, and makes the tensors anew."""
    pages_a_row = -(-(steps + 1) // BLOCK_SIZE)
    texts = [[prompt] for prompt in prompts]
    pages = [[row * pages_a_row + page for page in range(pages_a_row)] for row in range(len(prompts))]
    live, bookkeeping = list(range(len(prompts))), 0.0
    while live:
        begin = time.perf_counter()
        tokens = torch.tensor([texts[row][-1] for row in live])
        positions = torch.tensor([len(texts[row]) - 1 for row in live])
        slots = []
        for row in live:
            last = len(texts[row]) - 1
            slots.append(pages[row][last // BLOCK_SIZE] * BLOCK_SIZE + last % BLOCK_SIZE)
        slot_mapping = torch.tensor(slots)
        seq_lens = torch.tensor([len(texts[row]) for row in live], dtype=torch.int32)
        tables = torch.tensor([pages[row] for row in live], dtype=torch.int32)
        bookkeeping += time.perf_counter() - begin
        sampled = model(tokens, positions, slot_mapping, tables, seq_lens)
        begin = time.perf_counter()
        for row, token in zip(live, sampled.tolist(), strict=True):
            texts[row].append(token)
        live = [row for row in live if texts[row][-1] != STOP and len(texts[row]) <= steps]
        bookkeeping += time.perf_counter() - begin
    return [text[1:] for text in texts], bookkeeping


def on_state(
    model: TinyModel, prompts: list[int], steps: int, steps_per_sync: int = 8
) -> tuple[list[list[int]], float]:
    """The operators turn every row to its next token; the host looks once in `steps_per_sync` steps."""
    pages_a_row = -(-(steps + 1) // BLOCK_SIZE)
    state = DecodeState.allocate(
        len(prompts), steps + 1, BLOCK_SIZE, steps_per_sync=steps_per_sync, stop_token_ids=[STOP]
    )
    texts: list[list[int]] = [[] for _ in prompts]
    live = []  # which text each row of the batch is
    for number, prompt in enumerate(prompts):
        row = state.admit(1, steps + 1, list(range(number * pages_a_row, (number + 1) * pages_a_row)), prompt)
        state.slot_mappings[0][row] = number * pages_a_row * BLOCK_SIZE  # one token: it is fed, not prefilled
        live.append(number)
    bookkeeping = 0.0
    while live:
        rows = slice(state.num_rows)
        for _ in range(steps_per_sync):
            sampled = model(
                state.input_tokens[rows],
                state.input_positions[rows],
                state.slot_mappings[0][rows],
                state.block_tables[0][rows],
                state.seq_lens[rows],
            )
            begin = time.perf_counter()
            state.sampled[rows] = sampled
            state.advance_until_stop(rows)
            bookkeeping += time.perf_counter() - begin
        begin = time.perf_counter()
        done = []
        for row, (status, tokens) in enumerate(state.sync()):
            texts[live[row]] += tokens
            if status is not RowStatus.RUNNING:
                done.insert(0, row)
        state.remove(*done)
        for row in done:
            live[row] = live[-1]
            live.pop()
        bookkeeping += time.perf_counter() - begin
    return texts, bookkeeping


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--steps", type=int, default=64)
    options = parser.parse_args()
    print("| rows | lists: bookkeeping, us a step | DecodeState: bookkeeping, us a step | lists / DecodeState |")
    print("| ---: | ---: | ---: | ---: |")
    for rows in options.rows:
        torch.manual_seed(0)
        model = TinyModel(rows * -(-(options.steps + 1) // BLOCK_SIZE), options.steps + 1).eval()
        prompts = torch.randint(1, VOCABULARY, (rows,)).tolist()
        seconds: dict[str, list[float]] = {"lists": [], "state": []}
        with torch.inference_mode():
            for _ in range(5):
                listed, took = on_lists(model, prompts, options.steps)
                seconds["lists"].append(took / options.steps)
                stated, took = on_state(model, prompts, options.steps)
                seconds["state"].append(took / options.steps)
                if listed != stated:
                    raise SystemExit(f"{rows} rows: the two engines' tokens differ")
        lists, state = (statistics.median(found) * 1e6 for found in seconds.values())
        print(f"| {rows} | {lists:.0f} | {state:.0f} | {lists / state:.1f} |")


if __name__ == "__main__":
    main()
