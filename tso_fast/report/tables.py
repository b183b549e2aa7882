"""Rows of the tables that the command line and the report show."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from tso_fast.types import Candidates, Comparison, Verdict

# ------------------------------------------------------------------------------------------------- for people

JUDGE_COLUMNS = ("voter", "verdicts", "abstained", "with the rest", "votes on pairs", "ties", "believed right")
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
    """What was asked of whom, how it correlates with the others and, if calibrated, how far it was believed."""
    for name, of in judges.items():
        verdicts, abstained, pairs = (
            f"{of[key]:,}" if key in of else "-" for key in ("verdicts", "abstained", "pairs")
        )
        rest = "-" if of.get("correlation") is None else f"{of['correlation']:.2f}"
        ties = f"{of['ties_share']:.1%}" if "ties_share" in of else "-"
        believed = "-" if "accuracy" not in of else f"{of['accuracy']:.1%}" + (" (given)" if of["is_given"] else "")
        yield name, verdicts, abstained, rest, pairs, ties, believed


def cost_rows(costs: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    """What judges that are models took, and how often the two orders of a pair contradict each other."""
    for name, of in costs.items():
        numbers = (
            f"{of[key]:,}" for key in ("requests", "new_requests", "prompt_tokens", "completion_tokens", "abstentions")
        )
        shares = (f"{of[key]:.0%}" if of[key] is not None else "-" for key in ("disagreement", "first_shown_share"))
        yield (name, *numbers, *shares)


def _scores_table(candidates: Sequence[Candidates], verdicts: Sequence[Verdict]) -> Table:
    model_of = {(c.prompt.id, i): r.model for c in candidates for i, r in enumerate(c.responses)}
    scores: dict[tuple[str, str], list[float | None]] = {}
    for verdict in verdicts:
        scores.setdefault((model_of[verdict.prompt_id, verdict.response], verdict.judge), []).append(verdict.score)
    table = Table("model", "judge", title="Verdicts on single responses")
    for name in ("responses", "mean score", "abstained"):
        table.add_column(name, justify="right")
    for (model, judge), values in sorted(scores.items()):
        given = [v for v in values if v is not None]
        mean = f"{sum(given) / len(given):.3f}" if given else "-"
        table.add_row(model, judge, str(len(values)), mean, str(len(values) - len(given)))
    return table


def _comparisons_table(comparisons: Sequence[Comparison]) -> Table:
    table = Table("judge", title="Verdicts on two responses")
    for name in ("pairs", "decided", "ties", "abstained", "mean certainty"):
        table.add_column(name, justify="right")
    for judge in sorted({c.judge for c in comparisons}):
        told = [c.probability for c in comparisons if c.judge == judge]
        given = [p for p in told if p is not None]
        certainty = f"{sum(max(p, 1 - p) for p in given) / len(given):.3f}" if given else "-"
        ties = sum(p == 0.5 for p in given)
        table.add_row(judge, str(len(told)), str(len(given) - ties), str(ties), str(len(told) - len(given)), certainty)
    return table


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Names in the first column, numbers in the others."""
    head, *rest = columns
    table = Table(head, title=title)
    for name in rest:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def errors_table(errors: dict[str, dict[str, int]], oracle: str) -> Table:
    """Errors of the prior and of what correction kept, and the least that the same evidence allows."""
    table = Table("prior order", title=f"Errors against {oracle}, on the pairs that it orders")
    for name in ("pairs", "prior", "corrected", "of pairs kept", "oracle's weights"):
        table.add_column(name, justify="right")

    def row(rule: str, of: dict[str, int], has_prior: bool) -> None:
        pairs, kept = of["pairs"], of["kept"]
        table.add_row(
            rule,
            f"{pairs:,}",
            f"{of['prior'] / pairs:.1%}" if has_prior else "-",
            f"{of['corrected'] / kept:.1%}" if kept else "-",
            f"{kept / pairs:.1%}",
            f"{of['best'] / kept:.1%}" if kept else "-",
        )

    for rule, of in sorted(errors.items()):
        row(rule, of, rule != "none")
    ordered = [of for rule, of in errors.items() if rule != "none"]
    if len(ordered) > 1:
        table.add_section()
        row("all ordered", {key: sum(of[key] for of in ordered) for key in ordered[0]}, True)
    return table


def decisions_table(info: dict[str, Any]) -> Table:
    """Pairs kept, swapped and dropped, by the rule that gave the prior order."""
    table = Table("prior order", title="Evaluation correction")
    for name in ("kept", "swapped", "dropped", "prior wrong"):
        table.add_column(name, justify="right")
    totals = {"keep": 0, "swap": 0, "drop": 0}
    for rule, counts in info["decisions"].items():
        kept, swapped, dropped = (counts.get(name, 0) for name in totals)
        for name in totals:
            totals[name] += counts.get(name, 0)
        wrong = f"{swapped / (kept + swapped):.1%}" if rule != "none" and kept + swapped else "-"
        table.add_row(rule, f"{kept:,}", f"{swapped:,}", f"{dropped:,}", wrong)
    table.add_section()
    table.add_row("all", *(f"{n:,}" for n in totals.values()), "")
    return table
