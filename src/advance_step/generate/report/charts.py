"""The charts of a report: SVG whose colours are the page's, so that it follows the reader's scheme."""

import io
import re
from collections.abc import Sequence
from math import nan

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import EngFormatter, FixedLocator, Locator, MaxNLocator, MultipleLocator

from advance_step.generate.report.recorder import Recorder, Stay

# What stands for a variable of the page's style until the SVG is written.
INK, GRID, FIRST, SECOND, SURFACE = "#010101", "#020202", "#030303", "#040404", "#050505"
VARIABLES = {INK: "--muted", GRID: "--grid", FIRST: "--first", SECOND: "--second", SURFACE: "--surface"}
MIDDLE = "#3b8bd0"  # of an image, which has no variables: to be seen on a light and on a dark surface

STYLE = {
    "svg.fonttype": "none",
    "font.size": 13,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "figure.facecolor": "none",
    "figure.constrained_layout.use": True,
    "grid.color": GRID,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.pad": 7,
    "ytick.major.pad": 7,
    "ytick.left": False,
}

HALF, WHOLE = 640, 880  # widths of a chart, in pixels of the page where it is not scaled

MIN_LENGTHS = 12  # a distribution of lengths shows so many, however few there are

Unit = tuple[float, str]  # seconds, name


def unit_of(seconds: float) -> Unit:
    """The unit for times up to so many seconds."""
    if seconds < 1:
        return 1e-3, "ms"
    return (1, "s") if seconds < 180 else (60, "min") if seconds < 3 * 3600 else (3600, "h")


class Charts:
    """Charts of a recorder, each an <svg> as text."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.unit = unit_of(recorder.seconds)

    def rate(self, name: str, label: str, wide: bool) -> str:
        """What was done each second, over time; `wide`: for the width of the page."""
        return self._over_time(self._per("seconds", name), label, width=WHOLE if wide else HALF)

    def level(self, name: str, label: str, capacity: int) -> str:
        """How much was in use, over time, below a line for all that there is."""
        return self._over_time(self._per("seconds", name), label, capacity)

    def preemptions(self) -> str:
        """How many requests were put back, over time."""
        return self._over_time(self.recorder.timeline.sums("preemptions"), "Requests put back")

    def acceptance(self) -> str:
        """Which share of the draft tokens was right, over time."""
        shares = [100 * share for share in self._per("draft_tokens", "accepted_tokens")]
        return self._over_time(shares, "Accepted (%)", ticks=MultipleLocator(25), top=100)

    def histogram(self, values: Sequence[float], label: str, seconds: bool) -> str:
        """How many requests have which value; `seconds`: in a fitting unit of time, otherwise whole numbers."""
        with matplotlib.style.context(STYLE, after_reset=True):
            figure, axes = _axes(HALF, 220)
            if seconds:
                size, unit = unit_of(max(values))
                values, label = [value / size for value in values], f"{label} ({unit})"
                bins: int | list[float] = 40
            else:
                low, high = int(min(values)), int(max(values)) + 1
                width = -(-(high - low) // 40)
                middle, span = (low + high - 1) / 2, max(high - low, MIN_LENGTHS)
                axes.set_xlim(middle - 0.55 * span, middle + 0.55 * span)
                bins = [edge - 0.5 for edge in range(low, high + width, width)]
                axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.hist(values, bins=bins, color=FIRST, edgecolor=SURFACE, linewidth=0.6)
            axes.set_xlabel(label)
            axes.set_ylabel("Requests")
            axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))
            return _svg(figure, f"Distribution: {label}")

    def places(self) -> str:
        """Each kept stay as a bar in its place of the batch."""
        recorder = self.recorder
        until = recorder.seconds if recorder.stays_until is None else recorder.stays_until
        with matplotlib.style.context(STYLE, after_reset=True):
            figure, axes = self._places_axes(until, 22)
            size = unit_of(until)[0]
            prefilling, decoding, marks = [], [], []
            for stay in recorder.stays:
                end = min(until, recorder.seconds if stay.end is None else stay.end)
                turn = min(end, end if stay.decoding_from is None else stay.decoding_from)
                prefilling.append(_bar(stay.place, stay.begin / size, turn / size))
                decoding.append(_bar(stay.place, turn / size, end / size))
                if stay.put_back and end < until:
                    marks.append(stay)
            for bars, colour in ((prefilling, SECOND), (decoding, FIRST)):
                path = Path.make_compound_path(*bars)
                axes.add_patch(PathPatch(path, facecolor=colour, edgecolor="none", snap=False))
            self._gaps(axes, size, until)
            _mark(axes, marks, size)
            return _svg(figure, "Each request in its place of the batch, over time")

    def busy(self) -> str:
        """For each place of the batch, how much of each moment of the whole run it had a request."""
        recorder = self.recorder
        width, bins = recorder.busy.width, recorder.busy.num_bins
        rows = [recorder.busy.sums(place) for place in range(recorder.batch_size)]
        image = [[(*to_rgb(MIDDLE), min(1.0, seconds / width)) for seconds in row] for row in rows]
        with matplotlib.style.context(STYLE, after_reset=True):
            figure, axes = self._places_axes(recorder.seconds, 8)
            extent = (0, bins * width / self.unit[0], recorder.batch_size - 0.5, -0.5)
            axes.imshow(image, aspect="auto", extent=extent, interpolation="nearest")
            axes.set_xlim(0, recorder.seconds / self.unit[0])
            return _svg(figure, "How busy each place of the batch was, over time")

    def _places_axes(self, until: float, height: int) -> tuple[Figure, Axes]:
        """height: of a place, as far as there is room."""
        places, (size, unit) = self.recorder.batch_size, unit_of(until)
        figure, axes = _axes(WHOLE, 70 + max(110, min(25 * height, height * places)))
        axes.grid(False)
        axes.set_xlim(0, until / size)
        axes.set_ylim(places - 0.5, -0.5)
        axes.yaxis.set_major_locator(MaxNLocator(12, integer=True) if places > 12 else FixedLocator(range(places)))
        axes.set_xlabel(f"Time ({unit})")
        axes.set_ylabel("Place in the batch")
        return figure, axes

    def _gaps(self, axes: Axes, size: float, until: float) -> None:
        """A line of the surface's colour where a request ends, so that the next one is told from it."""
        ends = [(stay.end / size, stay.place) for stay in self.recorder.stays if stay.end and stay.end < until]
        lines = [Path([(x, y - 0.42), (x, y + 0.42)]) for x, y in ends]
        if lines:
            path = Path.make_compound_path(*lines)
            axes.add_patch(PathPatch(path, facecolor="none", edgecolor=SURFACE, linewidth=0.9, snap=False))

    def _per(self, whole: str, name: str) -> list[float]:
        """Sums of an amount over those of another one; not a number where there is nothing of that."""
        sums = self.recorder.timeline.sums
        return [part / of if of else nan for of, part in zip(sums(whole), sums(name), strict=True)]

    def _over_time(
        self,
        values: Sequence[float],
        label: str,
        capacity: int = 0,
        width: int = HALF,
        ticks: Locator | None = None,
        top: float = 1,
    ) -> str:
        """top: what the axis reaches at least."""
        size, unit = self.unit
        step = self.recorder.timeline.width / size
        edges = [index * step for index in range(len(values))] + [self.recorder.seconds / size]
        with matplotlib.style.context(STYLE, after_reset=True):
            figure, axes = _axes(width, 220)
            axes.stairs(values, edges, fill=True, color=FIRST, alpha=0.18, linewidth=0)
            axes.stairs(values, edges, color=FIRST, linewidth=1.6, baseline=None)
            if capacity:
                axes.axhline(capacity, color=SECOND, linewidth=1.6, linestyle=(0, (5, 4)))
            axes.set_xlim(0, edges[-1])
            axes.set_ylim(0, 1.08 * max(top, capacity, *(value for value in values if value == value)))
            axes.set_xlabel(f"Time ({unit})")
            axes.set_ylabel(label)
            axes.yaxis.set_major_locator(ticks or MaxNLocator(4, integer=True))
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))
            return _svg(figure, f"{label} over time")


def _axes(width: int, height: int) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width / 72, height / 72))
    return figure, figure.add_subplot()


def _bar(place: int, begin: float, end: float) -> Path:
    corners = [(begin, place - 0.42), (end, place - 0.42), (end, place + 0.42), (begin, place + 0.42), (begin, place)]
    return Path(corners, [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY])


def _mark(axes: Axes, stays: Sequence[Stay], size: float) -> None:
    """A stroke at the end of each stay."""
    ends = [(stay.end / size, stay.place) for stay in stays if stay.end is not None]
    lines = [[(x, y - 0.5), (x, y + 0.5)] for x, y in ends]
    axes.add_collection(LineCollection(lines, colors=INK, linewidths=2))


def _svg(figure: Figure, label: str) -> str:
    """The figure as an <svg> that scales with its place on the page, and says to a screen reader what it is."""
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": label}):  # ids that no other chart of the page has
        figure.savefig(stream, format="svg", dpi=144)
    svg = stream.getvalue()
    head, body = svg[svg.index("<svg") :].split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    svg = f'{head} role="img" aria-label="{label}">{body}'
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg
