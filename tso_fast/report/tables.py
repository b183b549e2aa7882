"""Tables that the command line prints, and rows that the HTML report shares with them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text

from tso_fast.files.labels import Pair
from tso_fast.types import Candidates, Comparison, Verdict


@dataclass(frozen=True)
class TitledTable:
    """A table below a title that is not folded to the table's width; no line ends with spaces."""

    title: str
    table: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        yield Text(self.title, style="table.title")
        for segments in console.render_lines(self.table, options, pad=False):
            parts = ((segment.text, segment.style or "") for segment in segments)
            line = Text.assemble(*parts, no_wrap=True, overflow="ignore")
            line.rstrip()
            yield line


def make_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str | Text]],
    total: Sequence[str] | None = None,
    num_labels: int = 1,
) -> TitledTable:
    """A table in the common style.

    Args:
        total: last row, below a line.
        num_labels: number of text columns, at the left; the other columns hold right-aligned numbers.
    """
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
    for i, name in enumerate(columns):  # only labels shrink on a narrow terminal
        is_label = i < num_labels
        table.add_column(name, justify="left" if is_label else "right", no_wrap=not is_label, overflow="fold")
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in row))
    if total is not None:
        table.add_section()
        table.add_row(*map(Text, total))
    return TitledTable(title, table)


JUDGE_COLUMNS = (
    "voter",
    "verdicts",
    "abstained",
    "with the rest",
    "votes on pairs",
    "ties",
    "believed right",
    "95 %",
    "shown first",
    "longer",
    "shares errors with",
)
COST_COLUMNS = (
    "judge",
    "requests",
    "new",
    "prompt tokens",
    "tokens written",
    "abstained",
    "contradictions",
    "first shown",
)


def judge_rows(judges: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Rows of verdicts per judge, correlation with the others and, if calibrated, its reliability."""
    for name, row in judges.items():
        verdicts, abstained, pairs = (
            f"{row[key]:,}" if key in row else "-" for key in ("verdicts", "abstained", "pairs")
        )
        rest = "-" if row.get("correlation") is None else f"{row['correlation']:.2f}"
        ties = f"{row['ties_share']:.1%}" if "ties_share" in row else "-"
        believed = "-" if "accuracy" not in row else f"{row['accuracy']:.1%}" + (" (given)" if row["is_given"] else "")
        low, high = row.get("interval", (0.0, 0.0))
        interval = f"{100 * low:.0f}–{100 * high:.0f}" if high > low else "-"
        first = f"{row['shown_first']:+.1f}" if abs(row.get("shown_first", 0)) >= 0.1 else "-"
        longer = f"{row['longer']:+.2f}" if abs(row.get("longer", 0)) >= 0.05 else "-"
        copies = row.get("shares_errors_with") or "-"
        yield name, verdicts, abstained, rest, pairs, ties, believed, interval, first, longer, copies


def judge_table(judges: Mapping[str, Mapping[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows of the table of judges, without the columns in which nothing is told."""
    rows = list(judge_rows(judges))
    used = [k for k in range(len(JUDGE_COLUMNS)) if any(row[k] != "-" for row in rows)]
    return tuple(JUDGE_COLUMNS[k] for k in used), [tuple(row[k] for k in used) for row in rows]


NUM_LABELS = (10, 30, 100, 300, 1000, 3000)


def label_rows(gains: Mapping[Pair, float], queue: Sequence[Pair]) -> Iterator[tuple[int, float, float]]:
    """(Number of labels, pairs that they put right if they go to the first pairs of the queue, or to random ones).

    Gains of labels on different prompts add up, so only as many labels are told of as there are prompts.
    """
    num_prompts = len({name for name, *_ in gains})
    best = list(itertools.accumulate(gains[pair] for pair in queue[:num_prompts]))
    mean = sum(gains.values()) / max(len(gains), 1)
    for count in (n for n in NUM_LABELS if n <= num_prompts):
        yield count, best[count - 1], count * mean


def cost_rows(costs: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Rows of the cost of judges that are models, and how often the two orders of a pair contradict each other."""
    for name, row in costs.items():
        numbers = (
            f"{row[key]:,}" for key in ("requests", "new_requests", "prompt_tokens", "completion_tokens", "abstentions")
        )
        shares = (f"{row[key]:.0%}" if row[key] is not None else "-" for key in ("disagreement", "first_shown_share"))
        yield (name, *numbers, *shares)


def explained_table(explained: Mapping[str, Mapping[str, Any]]) -> TitledTable:
    """What each voter rewards; a star where the interval leaves 0 out."""

    def rows() -> Iterator[tuple[str, ...]]:
        for name, row in explained.items():
            predicted = "-" if row["predicted"] is None else f"{row['predicted']:.0%}"
            facts = (name, f"{row['pairs']:,}", predicted)
            for feature, told in row["features"].items() or [("too few pairs", None)]:
                weight, interval = "-", "-" if row["features"] else ""
                if told is not None:
                    weight = f"{told['weight']:+.2f}" + ("*" if told["low"] * told["high"] > 0 else " ")
                    interval = f"{told['low']:+.2f} – {told['high']:+.2f}"
                yield facts[0], feature, weight, interval, *facts[1:]
                facts = ("", "", "")

    title = "What is rewarded: log-odds of being preferred for a standard deviation more (-: does not vary)"
    columns = ("voter", "feature", "weight", "95 % interval", "pairs", "predicted")
    return make_table(title, columns, rows(), num_labels=2)


def scores_table(candidates: Sequence[Candidates], verdicts: Sequence[Verdict]) -> TitledTable:
    """Mean score of each model by each judge of single responses."""
    model_of = {(c.prompt.id, i): r.model for c in candidates for i, r in enumerate(c.responses)}
    scores: dict[tuple[str, str], list[float | None]] = {}
    for verdict in verdicts:
        scores.setdefault((model_of[verdict.prompt_id, verdict.response], verdict.judge), []).append(verdict.score)

    def row(model: str, judge: str, values: Sequence[float | None]) -> tuple[str, ...]:
        given = [v for v in values if v is not None]
        mean = f"{sum(given) / len(given):.3f}" if given else "-"
        return model, judge, f"{len(values):,}", mean, f"{len(values) - len(given):,}"

    columns = ("model", "judge", "responses", "mean score", "abstained")
    rows = (row(model, judge, values) for (model, judge), values in sorted(scores.items()))
    return make_table("Verdicts on single responses", columns, rows, num_labels=2)


def comparisons_table(comparisons: Sequence[Comparison]) -> TitledTable:
    """Decisions of each judge that compares two responses."""

    def row(judge: str) -> tuple[str, ...]:
        probabilities = [c.probability for c in comparisons if c.judge == judge]
        given = [p for p in probabilities if p is not None]
        certainty = f"{sum(max(p, 1 - p) for p in given) / len(given):.3f}" if given else "-"
        ties = sum(p == 0.5 for p in given)
        counts = (len(probabilities), len(given) - ties, ties, len(probabilities) - len(given))
        return (judge, *(f"{count:,}" for count in counts), certainty)

    columns = ("judge", "pairs", "decided", "ties", "abstained", "mean certainty")
    return make_table("Verdicts on two responses", columns, map(row, sorted({c.judge for c in comparisons})))


def errors_table(errors: Mapping[str, Mapping[str, int]], oracle: str) -> TitledTable:
    """Errors of the prior and of the pairs kept by correction, and the smallest error the same evidence allows."""

    def row(rule: str, counts: Mapping[str, int], has_prior: bool) -> tuple[str, ...]:
        pairs, kept = counts["pairs"], counts["kept"]
        return (
            rule,
            f"{pairs:,}",
            f"{counts['prior'] / pairs:.1%}" if has_prior else "-",
            f"{counts['corrected'] / kept:.1%}" if kept else "-",
            f"{kept / pairs:.1%}",
            f"{counts['best'] / kept:.1%}" if kept else "-",
        )

    ordered = [counts for rule, counts in errors.items() if rule != "none"]
    summed = {key: sum(counts[key] for counts in ordered) for key in ordered[0]} if len(ordered) > 1 else None
    return make_table(
        f"Errors against {oracle}, on the pairs that it orders",
        ("prior order", "pairs", "prior", "corrected", "of pairs kept", "oracle's weights"),
        (row(rule, counts, rule != "none") for rule, counts in sorted(errors.items())),
        None if summed is None else row("all ordered", summed, True),
    )


def decisions_table(decisions: Mapping[str, Mapping[str, int]]) -> TitledTable:
    """Pairs kept, swapped and dropped, by the rule that gave the prior order."""
    names = ("keep", "swap", "drop")

    def row(rule: str, counts: Mapping[str, int]) -> tuple[str, ...]:
        kept, swapped, dropped = (counts.get(name, 0) for name in names)
        wrong = f"{swapped / (kept + swapped):.1%}" if rule != "none" and kept + swapped else "-"
        return rule, f"{kept:,}", f"{swapped:,}", f"{dropped:,}", wrong

    totals = (sum(counts.get(name, 0) for counts in decisions.values()) for name in names)
    return make_table(
        "Evaluation correction",
        ("prior order", "kept", "swapped", "dropped", "prior wrong"),
        (row(rule, counts) for rule, counts in decisions.items()),
        ("all", *(f"{n:,}" for n in totals), ""),
    )
