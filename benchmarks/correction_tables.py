"""Tables of ``bench_correction.py``: those it prints, and those in the README, which are made from its results."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from correction_panels import Row
from harness import table

Goal = tuple[str, bool]


def within(row: Row, factor: float) -> Goal:
    return f"≤ {factor} × limit", row["ratio"][0][0] <= factor


def calibrated(row: Row) -> Goal:
    return "ECE ≤ 0.05", row["ece"] <= 0.05


def percent(value: float) -> str:
    return f"{value:.1%}"


def spread_of(values: Sequence[float]) -> str:
    """A ratio with its range."""
    return "-" if math.isnan(values[0]) else "{:.2f} ({:.2f}–{:.2f})".format(*values)


COLUMNS: dict[str, Callable[[Row], str]] = {
    **{
        name: lambda row, name=name: percent(row[name])  # type: ignore[misc]
        for name in (
            "prior",
            "majority",
            "consensus",
            "single judge",
            "without it",
            "stated",
            "right",
            "used",
            "used, tie",
        )
    },
    "corrected": lambda row: percent(row["corrected"][0]),
    "limit": lambda row: percent(row["limit"][0]),
    "/ limit": lambda row: spread_of(row["ratio"][0]),
    "80 % kept": lambda row: percent(row["corrected"][1]),
    "its limit": lambda row: percent(row["limit"][1]),
    "/ its limit": lambda row: spread_of(row["ratio"][1]),
    "/ without": lambda row: spread_of(row["to_without"]),
    "no labels": lambda row: percent(row["before"]["corrected"][0]),
    "used before": lambda row: percent(row["before"]["used"]),
    "ECE before": lambda row: f"{row['before']['ece']:.3f}",
    "ECE": lambda row: f"{row['ece']:.3f}",
    "learned from": lambda row: counted(row["learn_from"]),
    "named": lambda row: counted(row["named"]),
    "alone": lambda row: listed(row["singles"], ".1%"),
    "believed right": lambda row: listed(row["believed"], ".0%"),
    "pairs": lambda row: f"{row['pairs']:,}",
    "auto": lambda row: row["auto"],
    "same prompt": lambda row: f"{row['same prompt']:.3f}",
    "other prompts": lambda row: f"{row['other prompts']:.3f}",
    "comparisons": lambda row: f"{row['comparisons']:,}",
    "make_pairs": lambda row: f"{row['seconds']:.1f} s",
    "of a core": lambda row: f"{row['cpu_seconds']:.1f} s",
    "input": lambda row: f"{row['input_gb']:.2f} GB",
    "peak": lambda row: f"{row['peak_gb']:.2f} GB",
    "goals": lambda row: ", ".join(text if is_met else f"**{text}**" for text, is_met in row["goals"]),
}
"""Cells of the tables; goals that are missed are bold, and counts in brackets are seeds."""


def counted(counts: Row) -> str:
    return ", ".join(f"{text} ({count})" for text, count in counts.items()) or "-"


def listed(shares: Row, form: str) -> str:
    return ", ".join(f"{name} {share:{form}}" for name, share in shares.items())


def show(rows: list[Row], columns: str) -> str:
    """A table of those columns that the rows are to have."""
    names = columns.split(" | ")
    return table(["", *names], ([row["name"], *(COLUMNS[name](row) for name in names)] for row in rows))


# --------------------------------------------------------------------------------------------------------- the README's

README_ROWS = (
    ("independent", "70, 70, 70 %, guess", "three, 70 % right"),
    ("independent", "85, 85, 85 %, guess", "three, 85 % right"),
    ("independent", "70, 70, 70 %, silent", "three, 70 % right, silent on ties"),
    ("independent", "60, 60, 60 %, guess", "three, 60 % right"),
    ("useless", "70, 70, 50 %, guess", "70 %, 70 %, one useless"),
    ("useless", "70, 70, 30 %, guess", "70 %, 70 %, one inverted"),
    ("useless", "85, 85, 50 %, guess", "85 %, 85 %, one useless"),
    ("useless", "85, 85, 15 %, guess", "85 %, 85 %, one inverted"),
    ("biased", "70%, and one that says first on 45%", 'three of 70 %, and one that says "first" on 45 %'),
    ("biased", "85%, and one that says first on 100%", 'three of 85 %, and one that always says "first"'),
    ("copies", "70%, 90% copied, guess", "70 %, two of three copy on 90 %"),
    ("copies", "85%, 100% copied, guess", "85 %, two of three are the same"),
    ("graded_votes", "three that state probabilities, 70% right", "three that state calibrated probabilities, 70 %"),
    ("graded_votes", "three that state probabilities, 85% right", "three that state calibrated probabilities, 85 %"),
    ("inverted_prior", "70 %, prior order inverted", "three, 70 % right, the prior order turned round"),
)
"""Section, name there, and name in the README."""


def readme(record: Row) -> str:
    """The README's table of panels; errors in %."""

    def cells(section: str, name: str, title: str) -> list[str]:
        row = next(row for row in record[section] if row["name"] == name)
        errors = (row["prior"], row["majority"], row["corrected"][0], row["limit"][0])
        missed = [text for text, is_met in row["goals"] if not is_met]
        goal = next(text for text, _ in row["goals"]) + (f"; missed: {', '.join(missed)}" if missed else "")
        return [title, *(f"{100 * e:.1f}" for e in errors), spread_of(row["ratio"][0]), goal, f"{row['ece']:.3f}"]

    columns = ["judges", "prior", "majority", "corrected", "joint limit", "ratio (seeds)", "goal", "calibration error"]
    return table(columns, [cells(*names) for names in README_ROWS])
