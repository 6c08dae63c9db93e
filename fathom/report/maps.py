"""What every expert did: a strip a MoE layer, experts as rows, steps as columns, and what it came to beside it.

The colour is E x load: 1.0, a fair share, is the page's own colour; more is warm, less is cold, and the strength is
how far from fair. One drawing therefore suits light and dark.
"""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from fathom.report.plots import ROUND, Plot, short
from fathom.report.read import Column, LayerLoad
from fathom.report.summary import late_load, late_steps, violation
from fathom.report.svg import MUTED, SERIES, figure, style, to_svg

WARM, COLD, UNKNOWN = (227, 94, 32), (38, 110, 224), (128, 128, 128)
COLUMNS = 480  # of a strip
LEFT, RIGHT, TOP, BOTTOM = 46.0, 16.0, 4.0, 42.0  # margins of a drawing


def strength(ratio: Column) -> Column:
    """Opacity of E x load: 0 at a fair share, 1 at none or at twice and more; small differences are lifted."""
    return np.asarray(np.minimum(1.0, np.abs(ratio - 1)) ** 0.75)


def colors(ratio: Column) -> NDArray[np.uint8]:
    """RGBA (..., 4) of E x load; a share that was not measured is a pale grey."""
    known = np.isfinite(ratio)
    value = np.where(known, ratio, 1.0)
    rgb = np.where((value > 1)[..., None], WARM, COLD)
    rgb = np.where(known[..., None], rgb, UNKNOWN)
    alpha = np.where(known, strength(value), 0.25)
    return np.concatenate([rgb, np.round(255 * alpha)[..., None]], axis=-1).astype(np.uint8)


def over_steps(layer: LayerLoad, columns: int = COLUMNS) -> tuple[Column, float]:
    """(E x load (E, columns), steps that a column covers).

    A row of the table tells of the steps since the row before, so a column is the mean over its steps whether rows are
    many or few, evenly spaced or not.
    """
    edges = np.concatenate([[0.0], layer.step])
    cuts = np.linspace(0.0, layer.step[-1], columns + 1)
    known = np.isfinite(layer.ratio)
    steps = np.diff(edges)[:, None]

    def integral(rows: Column) -> Column:
        total = np.concatenate([np.zeros((1, layer.experts)), np.cumsum(rows * steps, axis=0)])
        return np.stack([np.diff(np.interp(cuts, edges, total[:, e])) for e in range(layer.experts)])

    amount, weight = integral(np.where(known, layer.ratio, 0.0)), integral(known.astype(float))
    full = layer.step[-1] / columns
    return np.where(weight > 1e-6 * full, amount / np.maximum(weight, 1e-12), math.nan), full


def expert_maps(experts: tuple[LayerLoad, ...], prefix: str = "") -> list[Plot]:
    """A drawing a layer; bars have one scale in all of them."""
    loads = [np.abs(late_load(layer) * layer.experts - 1) for layer in experts]
    reach = _reach(loads, 0.05), _reach([np.abs(layer.bias[-1]) for layer in experts], 1e-4)
    with style():
        return [_map(layer, f"{prefix}layer{layer.layer}", reach) for layer in experts]


def _reach(found: list[Column], least: float) -> float:
    """1, 2 or 5 times a power of ten that no bar is longer than; `least` at least."""
    longest = max([least, *(float(np.nanmax(each, initial=0)) for each in found)])
    power = 10.0 ** math.floor(math.log10(longest))
    return next(size * power for size in (1, 2, 5, 10) if size * power >= longest * (1 - 1e-9))


def _map(layer: LayerLoad, name: str, reach: tuple[float, float]) -> Plot:
    biased = bool(np.isfinite(layer.bias[-1]).any() and np.ptp(layer.bias[-1]) > 0)
    width, height = 780.0, max(54.0, min(layer.experts, 32) * 8.0)
    whole = height + TOP + BOTTOM
    drawn = figure(width, whole, fitted=False)  # equal margins, so that the maps stand in one line
    parts = drawn.subplots(
        1,
        3 if biased else 2,
        sharey=True,
        width_ratios=[6, 1.3, 1.3] if biased else [6, 1.3],
        gridspec_kw={
            "left": LEFT / width,
            "right": 1 - RIGHT / width,
            "bottom": BOTTOM / whole,
            "top": 1 - TOP / whole,
            "wspace": 0.1,
        },
    )
    _strip(parts[0], layer)
    load = late_load(layer) * layer.experts
    _bars(parts[1], load - 1, 1.0, reach[0], "load", SERIES[0])
    if biased:
        _bars(parts[2], layer.bias[-1], 0.0, reach[1], "bias", MUTED)
    caption, alt = _told(layer, load)
    return Plot(f"Layer {layer.layer}", caption, to_svg(drawn, name, alt), wide=True)


def _strip(ax: Axes, layer: LayerLoad) -> None:
    ratio, _ = over_steps(layer)
    ax.imshow(
        colors(ratio),
        aspect="auto",
        interpolation="nearest",
        extent=(0, float(layer.step[-1]), layer.experts - 0.5, -0.5),
    )
    ax.grid(visible=False)
    for side in ("top", "right", "left", "bottom"):
        ax.spines[side].set_visible(True)
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=ROUND))
    ax.xaxis.set_major_formatter(FuncFormatter(short))
    ax.yaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 4, 8, 10]))
    ax.set_xlabel("step")
    ax.set_ylabel("expert", labelpad=2)


def _bars(ax: Axes, values: Column, base: float, reach: float, name: str, color: str) -> None:
    """Bars beside the strip's rows, from `base`, at most `reach` long."""
    half = 0.4 if len(values) <= 32 else 0.5
    edges = (np.arange(len(values))[:, None] + [-half, half]).ravel()
    ends = np.full(2 * len(values) - 1, base)  # bars and the gaps between them: one path, not hundreds
    ends[::2] += np.nan_to_num(values)
    ax.stairs(ends, edges, baseline=base, orientation="horizontal", fill=True, color=color)
    ax.axvline(base, color=MUTED, linewidth=1)
    ax.set_xlim(base - 1.1 * reach, base + 1.1 * reach)
    ax.set_xticks([base - reach, base, base + reach])
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="x", labelsize=8.5)
    ax.tick_params(axis="y", labelleft=False)
    ax.set_xlabel(name)


def _told(layer: LayerLoad, load: Column) -> tuple[str, str]:
    """(caption, alternative text)."""
    steps = late_steps(layer)
    vio = violation(load)
    if vio is None:
        return "No load was measured in the last steps.", f"Loads of {layer.experts} experts in layer {layer.layer}."
    most, least = int(np.argmax(load)), int(np.argmin(load))
    said = (
        f"{layer.experts} experts. In the last {steps:,} steps expert {most} took {load[most]:.2f} and expert {least} "
        f"{load[least]:.2f} of a fair share; MaxVio {vio:.3f}"
    )
    dead = int((load == 0).sum())
    if dead:
        said += f"; {dead} dead"
    alt = f"Layer {layer.layer}: load of every expert over {int(layer.step[-1]):,} steps as a heat map, then as bars. "
    return said + ".", alt + said + "."
