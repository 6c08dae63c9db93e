"""Curves of one run or of several: what they show, in plain arrays, drawn as SVG. Expert maps: `maps.py`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fathom.report.read import Column, LayerLoad, RunTables
from fathom.report.summary import resume_steps
from fathom.report.svg import INK, MUTED, SERIES, axes, style, to_svg

BINS = 500  # points of a curve; where a table has more, a point is a mean, and a band shows what it hides
DOTS = 120  # of a curve, at most
WIDE, NARROW = (780.0, 300.0), (384.0, 216.0)
DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)))
MANY_LAYERS = 6
ROUND = [1, 2, 2.5, 5, 10]


@dataclass(frozen=True)
class Plot:
    """A drawing for the page. svg is safe to put there; title, caption and alt are plain text."""

    title: str
    caption: str
    svg: str
    wide: bool = False


@dataclass(frozen=True)
class Curve:
    """x, y (R,), NaN where not measured; color: a number, for good beyond the palette; dots: mark every point."""

    label: str
    x: Column
    y: Column
    color: int = 0
    dots: bool = False

    @property
    def measured(self) -> bool:
        return bool((np.isfinite(self.x) & np.isfinite(self.y)).any())


@dataclass(frozen=True)
class Figure:
    """What to draw. marks: (x, word) of moments worth a line; level: (y, word) of a value to compare with."""

    name: str
    title: str
    caption: str
    curves: Sequence[Curve]
    x_label: str = "step"
    wide: bool = False
    legend: bool = True
    log: bool = False
    from_zero: bool = False
    percent: bool = False
    marks: Sequence[tuple[float, str]] = ()
    level: tuple[float, str] | None = None
    bands: Sequence[tuple[Column, Column, Column]] = field(default_factory=tuple)
    top: tuple[Column, Column, str] | None = None
    """A second x axis: (x, its values there, their name)."""


def short(number: float, _: object = None) -> str:
    """1.2k, 3M, 0.5: for axes."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.4g}{letter}"
    return f"{number:.4g}"


def dash(color: int) -> int:
    """Which of the line patterns a series has: the next one when colours begin again."""
    return color // len(SERIES) % len(DASHES)


# --- what is drawn ------------------------------------------------------------


def learning(run: RunTables) -> list[Plot]:
    """Losses and bits per byte of one run."""
    m = run.metrics
    marks = [(float(step), "resumed") for step in resume_steps(run)]
    curves = [
        Curve("training", m.step, m.train_loss, 0),
        Curve("MTP", m.step, m.mtp_loss, 2),
        Curve("validation", m.step, m.val_loss, 1, dots=True),
    ]
    caption = "Nats a token of the main head; training is the mean since the row before."
    if curves[1].measured:
        caption += " MTP is the mean over its depths, which look further ahead."
    return draw_all(
        [
            Figure("loss", "Loss", caption, curves, wide=True, marks=marks, top=(m.step, m.tokens, "tokens")),
            _late("late", "Loss, second half", "The same, closer.", curves),
            Figure(
                "bpb",
                "Bits per byte",
                "Validation text; comparable between tokenizers.",
                [Curve("validation", m.step, m.val_bpb, 1, dots=True)],
            ),
        ]
    )


def machine(run: RunTables) -> list[Plot]:
    """Learning rate, gradient, speed and hardware of one run."""
    m, h = run.metrics, run.hardware
    hours, unit = _clock(_running(h.seconds))
    over = f"time of sessions ({unit})"
    byte = 1e-9
    wanted = [
        Figure("lr", "Learning rate", "Of the schedule.", [Curve("", m.step, m.lr)], from_zero=True),
        Figure(
            "norm",
            "Gradient norm",
            "Before clipping, mean over the steps that were taken.",
            [Curve("", m.step, m.grad_norm)],
            log=_spans(m.grad_norm, 30),
        ),
        Figure("balance", "Balance loss", "Mean a step, weighted.", [Curve("", m.step, m.balance_loss)]),
        Figure(
            "speed",
            "Tokens a second",
            "While training; evaluation and saving not counted.",
            [Curve("", m.step, m.tokens_per_second)],
            from_zero=True,
        ),
        Figure(
            "mfu",
            "Model FLOP utilisation",
            "Share of the peak that environment.json names.",
            [Curve("", m.step, m.mfu)],
            from_zero=True,
            percent=True,
        ),
        Figure(
            "cpu",
            "Processor and memory",
            "Percent of all cores, of a GPU, and of the machine's memory.",
            [
                Curve("CPU", hours, h.cpu_percent, 0),
                Curve("GPU", hours, h.gpu_percent, 1),
                Curve("memory", hours, h.memory_percent, 2),
            ],
            x_label=over,
            from_zero=True,
        ),
        Figure(
            "memory",
            "Memory of the process (GB)",
            "Resident memory; on a GPU, what the process holds there.",
            [
                Curve("resident", hours, h.process_bytes * byte, 0),
                Curve("GPU", hours, h.gpu_memory_bytes * byte, 1),
            ],
            x_label=over,
            from_zero=True,
        ),
        Figure("watts", "GPU power (W)", "As the driver tells.", [Curve("", hours, h.gpu_watts)], over, from_zero=True),
        Figure("celsius", "GPU temperature (°C)", "As the driver tells.", [Curve("", hours, h.gpu_celsius)], over),
    ]
    return draw_all(wanted)


def routing(experts: Sequence[LayerLoad], prefix: str = "") -> list[Plot]:
    """MaxVio, entropy, bias and drops of the MoE layers over steps."""
    if not experts:
        return []
    fair = {math.log(layer.experts) for layer in experts}
    level = (fair.pop(), "uniform") if len(fair) == 1 else None
    bias = [(layer, _spread(layer.bias)) for layer in experts]
    figures = [
        _by_layer(
            prefix + "maxvio",
            "MaxVio",
            "(largest load - mean) / mean since the row before; 0 is perfect balance.",
            [(layer, layer.max_vio) for layer in experts],
            from_zero=True,
        ),
        _by_layer(
            prefix + "entropy",
            "Gate entropy (nats)",
            "Of the mean gate; a gate that likes all experts alike has ln E.",
            [(layer, layer.entropy) for layer in experts],
            level=level,
        ),
        _by_layer(
            prefix + "bias",
            "Spread of the selection bias",
            "Largest less smallest; it chooses experts and never weighs them.",
            bias if any(np.nanmax(b, initial=0) > 0 for _, b in bias) else [],
            from_zero=True,
        ),
    ]
    for name, title, caption in (
        ("dead", "Dead experts", "Without a token since the row before."),
        ("dropped", "Dropped assignments", "Beyond an expert's capacity, since the row before."),
    ):
        found = [(layer, getattr(layer, name)) for layer in experts]
        if any(np.nanmax(values, initial=0) > 0 for _, values in found):
            figures.append(_by_layer(prefix + name, title, caption, found, from_zero=True))
    return draw_all(figures)


def comparison(runs: Sequence[RunTables]) -> list[Plot]:
    """Curves of several runs, one colour a run, in their order; which is which, the page says (`parts.key`)."""

    def each(x: Callable[[RunTables], Column], y: str, dots: bool = False) -> list[Curve]:
        return [Curve(r.name, x(r), getattr(r.metrics, y), i, dots) for i, r in enumerate(runs)]

    def steps(r: RunTables) -> Column:
        return r.metrics.step

    longest = max((float(np.nanmax(r.metrics.seconds, initial=0)) for r in runs), default=0.0)
    size, unit = _unit(longest)
    train = each(steps, "train_loss")
    validated = any(np.isfinite(r.metrics.val_loss).any() for r in runs)
    what, said = ("val_loss", "Validation") if validated else ("train_loss", "Training")
    figures = [
        Figure("train", "Training loss", "Nats a token, mean since the row before.", train, wide=True),
        Figure("val", "Validation loss", "Nats a token.", each(steps, "val_loss", True), wide=True),
        _late("late", "Training loss, second half", "The same, closer.", train),
        Figure(
            "tokens",
            f"{said} loss by tokens",
            "What a token of training bought.",
            each(lambda r: r.metrics.tokens, what, validated),
            "tokens",
        ),
        Figure(
            "time",
            f"{said} loss by time",
            "What an hour bought, all sessions.",
            each(lambda r: r.metrics.seconds / size, what, validated),
            f"time ({unit})",
        ),
        Figure("bpb", "Bits per byte", "Validation; comparable between tokenizers.", each(steps, "val_bpb", True)),
        Figure("mtp", "MTP loss", "Nats a token, mean over depths.", each(steps, "mtp_loss")),
        Figure("lr", "Learning rate", "Of the schedule.", each(steps, "lr"), from_zero=True),
        Figure(
            "norm",
            "Gradient norm",
            "Before clipping.",
            each(steps, "grad_norm"),
            log=any(_spans(r.metrics.grad_norm, 30) for r in runs),
        ),
        Figure("speed", "Tokens a second", "While training.", each(steps, "tokens_per_second"), from_zero=True),
        Figure(
            "vio",
            "MaxVio",
            "Mean over layers, since the row before; 0 is perfect balance.",
            [Curve(r.name, *_mean_violation(r.experts), i) for i, r in enumerate(runs)],
            from_zero=True,
        ),
    ]
    return draw_all([replace(figure, legend=False) for figure in figures])


def _by_layer(
    name: str,
    title: str,
    caption: str,
    found: Sequence[tuple[LayerLoad, Column]],
    from_zero: bool = False,
    level: tuple[float, str] | None = None,
) -> Figure:
    """A curve a layer; where there are many, their median and range."""
    if len(found) <= MANY_LAYERS:
        curves = [Curve(f"layer {layer.layer}", layer.step, y, i) for i, (layer, y) in enumerate(found)]
        return Figure(name, title, caption, curves, from_zero=from_zero, level=level)
    step = np.unique(np.concatenate([layer.step for layer, _ in found]))
    grid = np.full((len(found), len(step)), math.nan)
    for row, (layer, y) in enumerate(found):
        grid[row, np.searchsorted(step, layer.step)] = y
    kept = np.isfinite(grid).any(axis=0)
    step, grid = step[kept], grid[:, kept]
    caption += f" Line: the median of {len(found)} layers; band: from the lowest to the highest."
    return Figure(
        name,
        title,
        caption,
        [Curve("", step, np.nanmedian(grid, axis=0) if len(step) else step)],
        from_zero=from_zero,
        level=level,
        bands=[(step, np.nanmin(grid, axis=0), np.nanmax(grid, axis=0))] if len(step) else (),
    )


def _mean_violation(experts: Sequence[LayerLoad]) -> tuple[Column, Column]:
    """(step, mean MaxVio) of the steps that all layers have."""
    if not experts:
        return np.empty(0), np.empty(0)
    shared = experts[0].step
    for layer in experts[1:]:
        shared = np.intersect1d(shared, layer.step)
    each = [layer.max_vio[np.searchsorted(layer.step, shared)] for layer in experts]
    return shared, np.asarray(np.mean(each, axis=0))


def _late(name: str, title: str, caption: str, curves: Sequence[Curve]) -> Figure:
    """The second half of curves that are long enough to have one."""
    ends = [float(c.x[-1]) for c in curves if len(c.x) >= 8]
    if not ends:
        return Figure(name, title, caption, ())
    after = max(ends) / 2
    cut = [Curve(c.label, c.x[c.x >= after], c.y[c.x >= after], c.color, c.dots) for c in curves]
    return Figure(name, title, caption, cut)


def _spread(bias: Column) -> Column:
    """Largest less smallest (R,), NaN where there is no bias."""
    return np.asarray(bias.max(axis=1) - bias.min(axis=1)) if bias.size else np.empty(len(bias))


def _running(seconds: Column) -> Column:
    """A clock that begins again in every session, as one that runs through."""
    if not len(seconds):
        return seconds
    gone = np.diff(seconds, prepend=0.0)
    return np.asarray(np.cumsum(np.where(gone < 0, seconds, gone)))


def _unit(longest: float) -> tuple[float, str]:
    for size, unit in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if longest > 3 * size:
            return size, unit
    return 1.0, "seconds"


def _clock(seconds: Column) -> tuple[Column, str]:
    size, unit = _unit(float(np.nanmax(seconds, initial=0)))
    return seconds / size, unit


def _spans(values: Column, factor: float) -> bool:
    """Whether values are so far apart that only a logarithm shows them all."""
    measured = values[np.isfinite(values)]
    return bool(len(measured) and measured.min() > 0 and measured.max() > factor * measured.min())


# --- drawing ------------------------------------------------------------


def draw_all(figures: Sequence[Figure]) -> list[Plot]:
    """The figures of which anything was measured."""
    with style():
        return [draw(figure) for figure in figures if any(curve.measured for curve in figure.curves)]


def draw(figure: Figure) -> Plot:
    """One figure; within `svg.style`."""
    drawn, ax = axes(*(WIDE if figure.wide else NARROW))
    for across, low, high in figure.bands:
        ax.fill_between(across, low, high, color=SERIES[0], alpha=0.18, linewidth=0)
    shown = [curve for curve in figure.curves if curve.measured]
    for curve in shown:
        _line(ax, curve)
    if figure.level is not None:
        y, word = figure.level
        ax.axhline(y, color=MUTED, linewidth=1, linestyle=DASHES[1])
        ax.annotate(word, (1, y), (0, 3), xycoords=("axes fraction", "data"), textcoords="offset points", ha="right",
                    va="bottom", fontsize=9, color=MUTED)  # fmt: skip
    for number, (x, word) in enumerate(figure.marks):
        ax.axvline(x, color=MUTED, linewidth=1, linestyle=DASHES[2])
        said = word if number == 0 or len(figure.marks) < 4 else ""  # many words would lie on each other
        ax.annotate(said, (x, 1), (3, -2), xycoords=("data", "axes fraction"), textcoords="offset points", ha="left",
                    va="top", fontsize=9, color=MUTED)  # fmt: skip
    _dress(ax, figure, shown)
    alt = f"{figure.title}. " + "; ".join(map(_words, shown)) + "."
    return Plot(figure.title, figure.caption, to_svg(drawn, figure.name, alt), figure.wide)


def _line(ax: Axes, curve: Curve) -> None:
    kept = np.isfinite(curve.x) & np.isfinite(curve.y)
    x, y = curve.x[kept], curve.y[kept]
    color, pattern = SERIES[curve.color % len(SERIES)], DASHES[dash(curve.color)]
    if len(x) > BINS:
        x, y, low, high = binned(x, y)
        ax.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
    marker = "o" if len(x) == 1 or (curve.dots and len(x) <= DOTS) else ""
    ax.plot(x, y, color=color, linestyle=pattern, marker=marker, markersize=3.5, label=curve.label or None)


def binned(x: Column, y: Column, bins: int = BINS) -> tuple[Column, Column, Column, Column]:
    """(mean x, mean y, lowest y, highest y) of `bins` runs of neighbours, x rising."""
    starts = np.unique(np.linspace(0, len(x), bins, endpoint=False).astype(int))
    sizes = np.diff(np.append(starts, len(x)))
    mean_x, mean_y = np.add.reduceat(x, starts) / sizes, np.add.reduceat(y, starts) / sizes
    return mean_x, mean_y, np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)


def _dress(ax: Axes, figure: Figure, shown: Sequence[Curve]) -> None:
    """Axes, ticks and the legend."""
    ax.set_xlabel(figure.x_label)
    ax.xaxis.set_major_locator(
        MaxNLocator(8 if figure.wide else 5, integer=figure.x_label in ("step", "tokens"), steps=ROUND)
    )
    ax.xaxis.set_major_formatter(FuncFormatter(short))
    if figure.log:
        ax.set_yscale("log")
    else:
        ax.yaxis.set_major_locator(MaxNLocator(5, steps=ROUND))
    _y_labels(ax, figure.percent)
    if figure.from_zero and not figure.log:
        ax.set_ylim(bottom=0)
    if figure.top is not None:
        _second_axis(ax, *figure.top)
    labels = [curve.label for curve in shown if curve.label]
    if len(labels) > 1 and figure.legend:
        ax.legend(loc="best", ncols=1 + len(labels) // 5, labelcolor=INK, handlelength=1.6)


def _y_labels(ax: Axes, percent: bool) -> None:
    def label(value: float, _: object) -> str:
        return f"{100 * value:.4g}%" if percent else short(value)

    ax.yaxis.set_major_formatter(FuncFormatter(label))


def _second_axis(ax: Axes, x: Column, values: Column, name: str) -> None:
    """Round values of another measure along the top. They rise with x, evenly or not."""
    kept = np.isfinite(values)
    x, values = x[kept], values[kept]
    if len(values) < 2 or not (np.diff(values) > 0).all():
        return
    left, right = ax.get_xlim()
    ticks = MaxNLocator(6, integer=True, steps=ROUND).tick_values(values[0], values[-1])
    ticks = ticks[(ticks >= values[0]) & (ticks <= values[-1])]
    twin = ax.twiny()
    twin.set_xlim(left, right)
    twin.set_xticks(np.interp(ticks, values, x), [short(tick) for tick in ticks])
    twin.set_xlabel(name)
    twin.grid(visible=False)


def _words(curve: Curve) -> str:
    """A curve, for those who cannot see it."""
    y = curve.y[np.isfinite(curve.y)]
    name = f"{curve.label}: " if curve.label else ""
    if len(y) == 1:
        return f"{name}{y[0]:.4g}"
    return f"{name}from {y[0]:.4g} to {y[-1]:.4g}, lowest {y.min():.4g}, highest {y.max():.4g}"
