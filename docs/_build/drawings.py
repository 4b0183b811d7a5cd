"""Draws docs/images/*.svg: the concepts. What is a number in them comes from the operators.

    python docs/_build/drawings.py [DIRECTORY]
"""

from __future__ import annotations

import sys
from pathlib import Path
from xml.sax.saxutils import escape

import torch

import advance_step

IMAGES = Path(__file__).parent.parent / "images"

# Okabe and Ito's colours, which colour-blind readers tell apart; ink and lines follow the reader's scheme.
STYLE = """
svg { --ink: #1d2433; --soft: #5b6475; --line: #9aa3b2; --cell: #ffffff; --pad: #e4e7ee; color-scheme: light dark }
@media (prefers-color-scheme: dark) {
  svg { --ink: #e8eaf0; --soft: #a9b1c0; --line: #5f6879; --cell: #1f2430; --pad: #343b4b }
}
text { font: 14px system-ui, "Noto Sans", "Noto Sans CJK SC", sans-serif; fill: var(--ink) }
.soft { fill: var(--soft); font-size: 13px } .mid { text-anchor: middle } .bold { font-weight: 600 }
.on { fill: #ffffff } rect { stroke: var(--line); fill: var(--cell) } .pad { fill: var(--pad) }
.a { fill: #0072b2 } .b { fill: #b8500a } .c { fill: #00795a }
path { stroke: var(--soft); fill: none; stroke-width: 1.5 } .head { fill: var(--soft); stroke: none }
"""

WORDS = {
    "en": {
        "cache": "the KV cache: pages of 4 tokens",
        "tables": "block_tables",
        "row": "row",
        "page": "page",
        "slot": "slot = page * 4 + offset",
        "before": "before",
        "after": "after",
        "live": "live",
        "padding": "padding",
        "names": ("input_tokens", "input_positions", "seq_lens", "slot_mapping"),
        "sampled": "sampled",
        "host": "host",
        "device": "device",
        "sync": "sync",
        "launch": "launch",
        "step": "step",
        "stopped": "stopped: stands still until the sync",
        "graph": "a graph captured for 4 rows, 2 of them live",
        "writes": "writes its keys and values to slot",
        "nothing": "writes nothing: slot -1",
    },
    "zh": {
        "cache": "KV cache：每页 4 个 token",
        "tables": "block_tables",
        "row": "行",
        "page": "页",
        "slot": "slot = 页号 * 4 + 页内偏移",
        "before": "之前",
        "after": "之后",
        "live": "有效行",
        "padding": "填充行",
        "names": ("input_tokens", "input_positions", "seq_lens", "slot_mapping"),
        "sampled": "采样结果",
        "host": "主机",
        "device": "设备",
        "sync": "同步",
        "launch": "下发",
        "step": "第",
        "stopped": "已停止：原地等到下一次同步",
        "graph": "为 4 行捕获的图，其中 2 行有效",
        "writes": "把键和值写入 slot",
        "nothing": "不写入：slot -1",
    },
}


class Drawing:
    """An SVG that grows by rectangles, words and arrows."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.size = width, height
        self.parts = [f"<title>{escape(title)}</title>"]

    def cell(self, x: float, y: float, width: float, height: float, text: object = "", kind: str = "") -> None:
        self.parts.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="3" class="{kind}"/>')
        colour = " on" if set(kind.split()) & {"a", "b", "c"} else ""
        if text != "":
            self.text(x + width / 2, y + height / 2 + 5, text, f"mid{colour}")

    def text(self, x: float, y: float, text: object, kind: str = "") -> None:
        self.parts.append(f'<text x="{x}" y="{y}" class="{kind}">{escape(str(text))}</text>')

    def arrow(self, x: float, y: float, to_x: float, to_y: float) -> None:
        self.parts.append(f'<path d="M{x} {y} L{to_x} {to_y}" marker-end="url(#head)"/>')

    def svg(self) -> str:
        width, height = self.size
        head = '<marker id="head" markerWidth="9" markerHeight="9" refX="7" refY="4" orient="auto">'
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img">',
                f"<style>{STYLE}</style>",
                f'<defs>{head}<path class="head" d="M0 0 L8 4 L0 8 z"/></marker></defs>',
                *self.parts,
                "</svg>\n",
            ]
        )


def paged_cache(words: dict[str, str]) -> Drawing:
    """Two rows, their tables, and where their tokens lie."""
    block_size, tables, lengths, kinds = 4, [[5, 2], [0, 3]], [6, 7], "ab"
    drawing = Drawing(760, 330, words["cache"])
    drawing.text(20, 30, words["tables"], "bold")
    held = {}
    for row, (table, length) in enumerate(zip(tables, lengths, strict=True)):
        y = 55 + row * 60
        drawing.text(20, y + 26, f"{words['row']} {row}")
        for column, page in enumerate(table):
            drawing.cell(75 + column * 50, y, 50, 40, page, kinds[row])
        for position in range(length):
            held[table[position // block_size], position % block_size] = (row, position)
    drawing.text(230, 30, words["cache"], "bold")
    for page in range(6):
        x, y = 230 + (page % 2) * 265, 55 + (page // 2) * 80
        drawing.text(x, y + 26, f"{words['page']} {page}", "soft")
        for offset in range(block_size):
            owner = held.get((page, offset))
            text = f"{owner[1]}" if owner else ""
            drawing.cell(x + 62 + offset * 46, y, 46, 40, text, kinds[owner[0]] if owner else "")
            drawing.text(x + 85 + offset * 46, y + 56, page * block_size + offset, "mid soft")
    drawing.text(20, 310, words["slot"], "soft")
    return drawing


def one_step(words: dict[str, str], num_seqs: int = 3) -> Drawing:
    """The four tensors before a step and after it."""
    state = [torch.zeros(num_seqs, dtype=torch.int64) for _ in range(4)]
    tokens, positions, seq_lens, slots = state
    tokens += torch.tensor([31, 47, 0])
    positions += torch.tensor([4, 15, 0])
    seq_lens += torch.tensor([5, 16, 0])
    slots += torch.tensor([7 * 16 + 4, 2 * 16 + 15, -1])
    tables, sampled = torch.tensor([[7, 3], [2, 9], [0, 0]]), torch.tensor([[11], [12]])
    before = [t.tolist() for t in state]
    advance_step.npu_advance_step_flashattn(tokens, sampled, positions, seq_lens, slots, tables, num_seqs, 2, 16)
    drawing = Drawing(760, 235, "npu_advance_step_flashattn")
    for side, (x, values) in enumerate([(75, before), (455, [t.tolist() for t in state])]):
        drawing.text(x, 24, words["after" if side else "before"], "bold")
        for row in range(num_seqs):
            kind = "pad" if row == 2 else "ab"[row]
            for name, column in enumerate(values):
                drawing.cell(x + name * 72, 62 + row * 52, 72, 40, column[row], kind)
        for name, label in enumerate(words["names"]):
            drawing.text(x + name * 72 + 36, 50, label.replace("input_", "").replace("slot_mapping", "slots"), "mid soft")
    for row in range(num_seqs):
        drawing.text(12, 87 + row * 52, f"{words['row']} {row}")
        if row < 2:
            drawing.text(407, 78 + row * 52, f"{words['sampled']} {sampled[row, 0]}", "mid soft")
        drawing.arrow(370, 88 + row * 52, 445, 88 + row * 52)
    drawing.text(75, 225, words["slot"].replace("4", "16"), "soft")
    return drawing


def padding(words: dict[str, str]) -> Drawing:
    """A captured batch with two live rows, and what each row writes."""
    drawing = Drawing(760, 225, words["graph"])
    drawing.text(20, 24, words["graph"], "bold")
    slots = torch.empty(4, dtype=torch.int64)
    rest = [torch.zeros(4, dtype=torch.int64) for _ in range(2)]
    lengths, tables = torch.tensor([5, 16, 0, 0]), torch.tensor([[7, 3], [2, 9], [0, 0], [0, 0]])
    advance_step.advance_step_flashattn(4, 2, 16, rest[0], torch.tensor([11, 12]), rest[1], lengths, slots, tables)
    for row, slot in enumerate(slots.tolist()):
        y, live = 40 + row * 45, slot >= 0
        drawing.cell(20, y, 190, 36, f"{words['row']} {row}: {words['live' if live else 'padding']}", "abpp"[row] if live else "pad")
        drawing.arrow(220, y + 18, 280, y + 18)
        drawing.text(292, y + 23, f"{words['writes']} {slot}" if live else words["nothing"], "" if live else "soft")
    return drawing


def sync(words: dict[str, str]) -> Drawing:
    """Four steps between two looks of the host; one row stops on the way."""
    drawing = Drawing(760, 215, words["sync"])
    drawing.text(15, 42, words["host"], "bold")
    drawing.text(15, 105, words["device"], "bold")
    for x in (80, 660):
        drawing.cell(x, 20, 62, 36, words["sync"], "c")
    for step in range(4):
        x = 150 + step * 126
        drawing.cell(x, 20, 66, 36, words["launch"])
        drawing.arrow(x + 33, 58, x + 33, 78)
        drawing.cell(x, 82, 120, 40, f"{words['step']} {step + 1}{' 步' if words is WORDS['zh'] else ''}")
        for row in range(2):
            stopped = row == 1 and step >= 2
            drawing.cell(x, 130 + row * 32, 120, 26, "" if stopped else f"{words['row']} {row}", "pad" if stopped else "ab"[row])
    drawing.arrow(650, 100, 690, 62)
    drawing.text(402, 207, words["stopped"], "soft")
    return drawing


DRAWINGS = {"paged_cache": paged_cache, "one_step": one_step, "padding": padding, "sync": sync}


def draw(directory: Path) -> list[Path]:
    """All drawings in both languages, into `directory`."""
    paths = []
    for language, words in WORDS.items():
        for name, drawing in DRAWINGS.items():
            paths.append(directory / f"{name}{'' if language == 'en' else f'.{language}'}.svg")
            paths[-1].write_text(drawing(words).svg(), encoding="utf-8")
    return paths


if __name__ == "__main__":
    print(*draw(Path(sys.argv[1]) if len(sys.argv) > 1 else IMAGES), sep="\n")
