"""The figures of a report, each as one SVG element with real text: sharp, small and searchable."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tso_fast.report.summary import Summary

# Okabe and Ito's colours, which colour-blind readers can distinguish. Blue: chosen responses and pairs that were kept;
# vermilion: rejected responses and pairs that were dropped.
CHOSEN, SWAPPED, REJECTED, DROPPED = "#0072B2", "#7CC0EA", "#D55E00", "#F3D3BC"
THIRD, FOURTH, INK, SOFT, FAINT = "#009E73", "#CC79A7", "#333333", "#666666", "#9A9A9A"
LEAST_SPAN = 0.01
"""Least height of a panel of curves, as a share of their largest value."""
STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.formatter.useoffset": False,
    "axes.axisbelow": True,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "grid.color": "#E8E8E8",
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}


def draw(name: str, plot: Callable[[Any], None], height: float) -> str:
    """SVG markup of ``plot(figure)``, at most 7.6 inches wide; ``name`` makes its ids unique in the page."""
    out = io.StringIO()
    options = {"format": "svg", "metadata": dict.fromkeys(("Creator", "Date", "Format", "Type"))}
    save(out, plot, height, {"svg.hashsalt": name}, **options)
    svg = out.getvalue()[out.getvalue().index("<svg") :]
    # HTML parsers know SVG's namespaces, and unused ids would only collide between figures.
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", svg)
    return re.sub(r' width="[^"]*pt" height="[^"]*pt"', "", svg, count=1)


def save(file: Any, plot: Callable[[Any], None], height: float, style: Mapping[str, Any] = {}, **options: Any) -> None:
    """Draws ``plot(figure)`` in the common style into a file or a buffer.

    Args:
        style: matplotlib settings beside the common ones.
        options: of matplotlib's ``savefig``.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**STYLE, **style}):
        figure = Figure(figsize=(7.6, height), layout="constrained")
        plot(figure)
        figure.savefig(file, **options)


def accuracy(run: Summary, others: Sequence[Summary]) -> str | None:
    """Accuracy of each version with its 95 % interval; other runs are drawn as lines."""
    if all(v.accuracy is None for v in run.versions):
        return None

    def plot(figure: Any) -> None:
        axes = figure.add_subplot()
        styles = ((CHOSEN, "o-"), (THIRD, "s--"), (FOURTH, "^:"))
        for one, (color, form) in zip([run, *others], itertools.cycle(styles), strict=False):
            evaluated = [v for v in one.versions if v.accuracy is not None]
            x, y = [v.iteration for v in evaluated], [100 * (v.accuracy or 0) for v in evaluated]
            axes.plot(x, y, form, color=color, markersize=5, label=one.loss_name, zorder=4 if one is run else 3)
        for v in run.versions:
            if v.accuracy is not None and v.low is not None and v.high is not None:
                error = [[100 * (v.accuracy - v.low)], [100 * (v.high - v.accuracy)]]
                axes.errorbar(v.iteration, 100 * v.accuracy, yerr=error, color=CHOSEN, capsize=4, elinewidth=1.2)
                _note(
                    axes, f"{100 * v.accuracy:.1f}", (v.iteration, 100 * v.accuracy), (-7, 5), ha="right", color=CHOSEN
                )
        ticks = [v.iteration for v in run.versions]
        axes.set_xticks(ticks, [v.name if len(ticks) < 9 else str(v.iteration) for v in run.versions])
        axes.set_xlim(-0.4, max(ticks) + 0.4)
        axes.set_ylabel("held-out prompts answered, %")
        if others:
            axes.legend(loc="lower right")

    return draw("accuracy", plot, 3.0)


def decisions(run: Summary) -> str | None:
    """Share of candidate pairs kept, swapped and dropped, one panel per rule of the prior order."""
    by_iteration = {v.iteration: v.decisions for v in run.versions if v.decisions}
    rules = sorted({rule for row in by_iteration.values() for rule in row}, key=lambda rule: (rule == "none", rule))
    if not rules:
        return None

    def plot(figure: Any) -> None:
        panels = figure.subplots(1, len(rules), sharey=True, squeeze=False)[0]
        for axes, rule in zip(panels, rules, strict=True):
            counts = [row.get(rule, {}) for row in by_iteration.values()]
            totals = [sum(row.values()) for row in counts]
            bottom = [0.0] * len(counts)
            for key, label, color in (
                ("keep", "kept", CHOSEN),
                ("swap", "swapped", SWAPPED),
                ("drop", "dropped", DROPPED),
            ):
                share = [100 * row.get(key, 0) / (total or 1) for row, total in zip(counts, totals, strict=True)]
                axes.bar(range(len(share)), share, 0.72, bottom=bottom, color=color, edgecolor="white", label=label)
                bottom = [a + b for a, b in zip(bottom, share, strict=True)]
            for i, total in enumerate(totals):
                _note(axes, _short(total), (i, 100), (0, 2), ha="center", fontsize=7)
            axes.set_title("no prior" if rule == "none" else rule, pad=14)
            axes.set_xticks(range(len(counts)), list(by_iteration))
            axes.set_ylim(0, 100)
        panels[0].set_ylabel("candidate pairs, %")
        figure.supxlabel("iteration", fontsize=9)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=3)

    return draw("decisions", plot, 2.9)


def loss_and_margin(run: Summary) -> str | None:
    """Loss and reward margin over optimiser steps."""
    start = run.first_loss
    name = "ln 2" if start is not None and math.isclose(start, math.log(2), abs_tol=1e-3) else "first loss"
    loss = ("loss", [("loss", "", CHOSEN)], [(start, name)])
    return _curves(run, "loss", [loss, ("reward margin", [("rewards/margins", "", CHOSEN)], [])])


def rewards_and_clips(run: Summary) -> str | None:
    """Rewards of chosen and rejected responses, and how many were clipped, over optimiser steps."""
    rewards, clips = (
        [(f"{name}/chosen", "chosen", CHOSEN), (f"{name}/rejected", "rejected", REJECTED)]
        for name in ("rewards", "clip")
    )
    low = run.loss_options.get("clip_rejected")
    bounds = [(run.loss_options.get("clip_chosen"), "clip, chosen"), (low and -low, "clip, rejected")]
    return _curves(run, "rewards", [("reward", rewards, bounds), ("clipped, %", clips, [])])


Panel = tuple[str, list[tuple[str, str, str]], list[tuple[float | None, str]]]


def _curves(run: Summary, name: str, panels: Sequence[Panel]) -> str | None:
    """Panels of (title, [(metric, label, colour)], [(level, label)]) over the steps of the run."""
    if not run.metrics:
        return None
    by_iteration = {t: list(rows) for t, rows in itertools.groupby(run.metrics, key=lambda row: row["iteration"])}
    ends = list(itertools.accumulate(rows[-1]["step"] for rows in by_iteration.values()))
    starts = [0, *ends[:-1]]

    def plot(figure: Any) -> None:
        for axes, (title, curves, levels) in zip(figure.subplots(1, len(panels)), panels, strict=True):
            factor = 100 if "%" in title else 1
            for metric, label, color in curves:
                # One line per iteration, since each begins with a new reference.
                for start, rows in zip(starts, by_iteration.values(), strict=True):
                    x = [start + row["step"] for row in rows]
                    y = [math.nan if row.get(metric) is None else factor * row[metric] for row in rows]
                    axes.plot(x, y, "-" if len(rows) > 12 else ".-", color=color, label="" if start else label)
            for level, text in levels:
                if level is not None:
                    axes.axhline(level, color=FAINT, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
                    _note(axes, text, (ends[-1], level), (0, 2), ha="right", fontsize=7)
            axes.margins(y=0.14)
            _widen(axes)
            for t, start in zip(by_iteration, starts, strict=True):
                axes.axvline(start, color=FAINT, linewidth=0.6, zorder=1)
                axes.annotate(t, (start, 1), (3, -1), ("data", "axes fraction"), "offset points", va="top", color=SOFT)
            axes.set_title(title)
            axes.set_xlim(0, 1.02 * ends[-1])  # the last point whole
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set_xlabel("step; numbers at the top: iteration")
            if len(curves) > 1:
                axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.1)

    return draw(name, plot, 2.7)


def judges(panel: Mapping[str, Mapping[str, Any]]) -> tuple[Callable[[Any], None], float] | None:
    """Share of right votes of each judge by their strength, as a plot and its height; None: nobody grades its votes.

    Args:
        panel: facts by judge, see ``correction.beliefs.Beliefs.judges``.
    """
    curves = {name: row["curve"] for name, row in panel.items() if len(row.get("curve", ())) > 1}
    if not curves:
        return None
    num_columns = min(max(len(curves), 2), 4)
    num_rows = -(-len(curves) // num_columns)

    def plot(figure: Any) -> None:
        grid = figure.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False)
        for axes in grid.flat[len(curves) :]:
            axes.set_axis_off()
        for axes, (name, curve) in zip(grid.flat, curves.items(), strict=False):
            # By rank, since a score's strengths may span orders of magnitude.
            ends = list(itertools.accumulate(count for *_, count in curve))
            middles = [100 * (end - count / 2) / ends[-1] for end, (*_, count) in zip(ends, curve, strict=True)]
            axes.plot(middles, [100 * right for _, right, _ in curve], "o-", color=CHOSEN, markersize=4)
            axes.axhline(50, color=FAINT, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
            axes.set_title(name if len(name) <= 22 else f"{name[:21]}…")
            axes.set_xlim(0, 100)
        low = min(50.0, *(100 * right for curve in curves.values() for _, right, _ in curve))
        grid[0][0].set_ylim(low - 5, 103)
        for row in grid:
            row[0].set_ylabel("right, %")
        figure.supxlabel("votes from weak to strong, %", fontsize=9)

    return plot, 0.3 + 1.9 * num_rows


def explained(found: Mapping[str, Mapping[str, Any]]) -> tuple[Callable[[Any], None], float] | None:
    """What each voter rewards, with intervals, as a plot and its height; None: nobody has pairs enough.

    Args:
        found: as ``correction.explain.explain`` gives it.
    """
    panels = {name: row["features"] for name, row in found.items() if row["features"]}
    if not panels:
        return None
    names = [name for name in next(iter(panels.values())) if any(of[name] for of in panels.values())]
    num_columns = min(len(panels), 3)
    num_rows = -(-len(panels) // num_columns)

    def plot(figure: Any) -> None:
        grid = figure.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.set_axis_off()
        for number, (axes, (name, features)) in enumerate(zip(grid.flat, panels.items(), strict=False)):
            axes.tick_params(labelbottom=number + num_columns >= len(panels))
            axes.axvline(0, color=FAINT, linewidth=0.9, zorder=1)
            for place, feature in enumerate(names):
                if (row := features[feature]) is None:
                    continue
                color = FAINT if row["low"] * row["high"] <= 0 else CHOSEN if row["weight"] > 0 else REJECTED
                axes.plot([row["low"], row["high"]], [place, place], color=color, solid_capstyle="round")
                axes.plot(row["weight"], place, "o", color=color, markersize=5)
            axes.set_title(name if len(name) <= 30 else f"{name[:29]}…")
            axes.grid(axis="x")
            axes.grid(visible=False, axis="y")
        grid[0][0].set_yticks(range(len(names)), names)
        grid[0][0].set_ylim(len(names) - 0.5, -0.5)
        figure.supxlabel("log-odds of being preferred for a standard deviation more, 95 % interval", fontsize=9)

    return plot, 0.5 + (0.5 + 0.23 * len(names)) * num_rows


def lengths(run: Summary) -> str | None:
    """Mean tokens of chosen, rejected and generated responses, by iteration."""
    forms = {"chosen": ("o-", CHOSEN), "rejected": ("s--", REJECTED), "generated": ("^:", THIRD)}
    series = {
        name: [(v.iteration, n) for v in run.versions if (n := getattr(v, f"{name}_tokens")) is not None]
        for name in forms
    }
    if not any(series.values()):
        return None

    def plot(figure: Any) -> None:
        axes = figure.add_subplot()
        for name, points in series.items():
            if points:
                axes.plot(*zip(*points, strict=True), forms[name][0], color=forms[name][1], markersize=5, label=name)
        axes.set_xticks([v.iteration for v in run.versions if v.iteration])
        axes.set_ylim(0, 1.15 * max(n for points in series.values() for _, n in points))
        axes.set_xlabel("iteration")
        axes.set_ylabel("mean tokens")
        axes.legend(loc="lower right", ncols=3)

    return draw("lengths", plot, 2.2)


def _widen(axes: Any) -> None:
    """Shows a curve that hardly moves as such: rounding does not fill the panel."""
    low, high = axes.get_ylim()
    least = LEAST_SPAN * max(abs(low), abs(high))
    if high - low < least:
        axes.set_ylim((low + high - least) / 2, (low + high + least) / 2)


def _note(axes: Any, text: str, point: tuple[float, float], offset: tuple[float, float], **options: Any) -> None:
    """Text beside a point, ``offset`` in points (1/72 inch)."""
    axes.annotate(text, point, offset, textcoords="offset points", **{"color": SOFT, **options})


def _short(count: int) -> str:
    return f"{count}" if count < 1000 else f"{count / 1000:.3g}k" if count < 999_500 else f"{count / 1e6:.3g}M"
