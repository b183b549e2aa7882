"""The figures of a run, version by version, from ``run.json`` and ``metrics.jsonl``; and the tables that show them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tso_fast.store import METRICS_FILE, REPORT_FILE, RUN_FILE, read_run

LOSS_NAMES = {"dual_clip": "dual clip (TSO)", "dpo": "plain DPO", "sft": "chosen-only NLL"}


@dataclass(frozen=True, kw_only=True)
class Version:
    """One version of the policy and the iteration that made it; None is what the run has not (yet) recorded.

    ``Version(name="tso-1", iteration=1, accuracy=0.49, low=0.45, high=0.53, decisions={"newer": {"keep": 5512, "swap":
    2618, "drop": 22590}}, used={"keep": 1853, "swap": 524}, loss=0.57, clip_chosen=0.05, clip_rejected=0.5, ...)``
    """

    name: str
    iteration: int
    """0: before training."""
    accuracy: float | None = None
    low: float | None = None
    high: float | None = None
    """Ends of the 95 % interval of the accuracy (Wilson)."""
    decisions: Mapping[str, Mapping[str, int]] | None = None
    """Candidate pairs by rule of the prior order, then by decision: keep, swap, drop."""
    used: Mapping[str, int] | None = None
    """Pairs that were trained on, by decision."""
    is_trained: bool = False
    loss: float | None = None
    """Mean over the iteration, as the clip fractions and token counts."""
    clip_chosen: float | None = None
    clip_rejected: float | None = None
    chosen_tokens: float | None = None
    rejected_tokens: float | None = None
    generated_tokens: float | None = None
    """Mean length of the policy's samples that this iteration paired: those of the version before."""
    skipped_steps: int | None = None
    warnings: tuple[str, ...] = ()

    def pairs(self, decision: str) -> int | None:
        """Candidate pairs with this decision, over all rules."""
        return None if self.decisions is None else sum(of.get(decision, 0) for of in self.decisions.values())

    @property
    def num_used(self) -> int | None:
        return None if self.used is None else sum(self.used.values())


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A run as far as it went."""

    folder: Path
    config: Mapping[str, Any]
    libraries: Mapping[str, str]
    """Version by package."""
    versions: tuple[Version, ...]
    """By iteration, from 0."""
    metrics: tuple[Mapping[str, Any], ...] = field(repr=False)
    """Rows of metrics.jsonl."""

    @property
    def loss_name(self) -> str:
        loss = str(self.config.get("loss_type"))
        return LOSS_NAMES.get(loss, loss)

    @property
    def trained(self) -> int:
        """Iterations that are complete."""
        return sum(v.is_trained for v in self.versions)

    @property
    def newest(self) -> Version:
        """The newest version that exists."""
        return [v for v in self.versions if v.is_trained or v.iteration == 0][-1]

    @property
    def before(self) -> Version | None:
        """Version 0, when it was evaluated."""
        return self.versions[0] if self.versions[0].accuracy is not None else None

    @property
    def after(self) -> Version | None:
        """The newest version that was evaluated after training."""
        return next((v for v in reversed(self.versions[1:]) if v.accuracy is not None), None)

    @property
    def gain_text(self) -> str | None:
        """Before and after in words, as they are: a loss is called a loss, and noise noise."""
        if (before := self.before) is None or (after := self.after) is None:
            return None
        text = (f"{before.name} {percent(before.accuracy)} -> {after.name} {percent(after.accuracy)}: "
                f"{points(before, after)} points; the 95 % intervals ")  # fmt: skip
        is_apart = _number(after.low) > _number(before.high) or _number(after.high) < _number(before.low)
        return text + ("do not overlap" if is_apart else "overlap")

    @property
    def warnings(self) -> list[str]:
        found = [f"iteration {v.iteration}: {w}" for v in self.versions for w in v.warnings]
        evaluated = [v for v in self.versions if v.accuracy is not None]
        if evaluated and (best := max(evaluated, key=lambda v: _number(v.accuracy))) is not evaluated[-1]:
            found.append(f"{best.name} answered more of the held-out prompts ({percent(best.accuracy)}) than the newest "
                         f"evaluated version, {evaluated[-1].name} ({percent(evaluated[-1].accuracy)})")  # fmt: skip
        planned = self.config.get("num_iterations", self.trained)
        if self.trained < planned:
            found.append(f"{self.trained} of {planned} iterations are complete; the command that started the run goes on")
        return found


def summarise(folder: str | Path) -> Summary:
    """Reads a run, complete or not.

    Raises:
        InputError: no run there.
    """
    folder = Path(folder)
    state = read_run(folder)
    infos: dict[int, dict[str, Any]] = {0: {}}
    for item in state["stages"]:
        iteration, stage = item["name"].removeprefix("iter-").split("/")
        infos.setdefault(int(iteration), {})[stage] = item["info"]
    policy = state["config"].get("policy") or "before training"
    versions = (_version(iteration, infos[iteration], policy) for iteration in sorted(infos))
    return Summary(
        folder=folder,
        config=state["config"],
        libraries=state["versions"],
        versions=tuple(versions),
        metrics=tuple(_read_metrics(folder / METRICS_FILE)),
    )


def _version(iteration: int, infos: Mapping[str, Mapping[str, Any]], policy: str) -> Version:
    evaluated, paired, trained = (infos.get(stage, {}) for stage in ("eval", "pairs", "train"))
    means = trained.get("means", {})
    asides = (
        (paired.get("abstained"), "verdicts abstained"),
        (infos.get("score", {}).get("skipped_prompts"), "prompts could not be judged and were set aside"),
        (trained.get("too_long"), "pairs were longer than the context and left out"),
    )
    return Version(
        name=evaluated.get("model") or (f"tso-{iteration}" if iteration else policy),
        iteration=iteration,
        **{key: evaluated.get(key) for key in ("accuracy", "low", "high")},
        decisions=paired.get("decisions"),
        used=paired.get("used"),
        is_trained="train" in infos,
        loss=means.get("loss"),
        clip_chosen=means.get("clip/chosen"),
        clip_rejected=means.get("clip/rejected"),
        chosen_tokens=means.get("num_tokens/chosen"),
        rejected_tokens=means.get("num_tokens/rejected"),
        generated_tokens=infos.get("generate", {}).get("generated_tokens"),
        skipped_steps=trained.get("skipped_steps"),
        warnings=(*trained.get("warnings", ()), *(f"{count:,} {what}" for count, what in asides if count)),
    )


def _read_metrics(file: Path) -> list[dict[str, Any]]:
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:  # a line that a kill cut off
            continue
    return rows


def comparisons(folder: str | Path) -> list[str]:
    """Run folders that ``compare`` made inside this one."""
    return [str(path.parent) for path in sorted(Path(folder).glob(f"compare-*/{RUN_FILE}"))]


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def points(before: Version, after: Version) -> str:
    """Gain in percentage points, signed."""
    return f"{100 * (_number(after.accuracy) - _number(before.accuracy)):+.1f}"


def interval(version: Version) -> str:
    if version.low is None or version.high is None:
        return "-"
    return f"{100 * version.low:.1f}–{100 * version.high:.1f}"


def comparison_rows(runs: Sequence[Summary]) -> list[tuple[str, str, str, str]]:
    """Loss, before, after, gain in points; one row a run, in the order given."""
    return [
        (
            run.loss_name,
            percent(run.before and run.before.accuracy),
            percent(run.after and run.after.accuracy),
            points(run.before, run.after) if run.before and run.after else "-",
        )
        for run in runs
    ]


def _number(value: float | None) -> float:
    assert value is not None
    return value


def _count(value: int | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if value < 1_000_000 else f"{value / 1e6:.2f}M"


def print_summary(folders: Sequence[str]) -> None:
    """Prints what the first run did, and how the others compare, on standard output.

    Raises:
        InputError: a folder holds no run.
    """
    runs = [summarise(folder) for folder in folders]
    run, console = runs[0], Console(highlight=False)
    iterations = f"{run.trained} iteration{'' if run.trained == 1 else 's'}"
    table = _table(f"{run.loss_name}, {iterations}", "version", "accuracy", "95 %\ninterval", "pairs\nkept", "swapped",
                   "dropped", "used", "clip %\nchosen", "clip %\nrejected", "loss")  # fmt: skip
    for v in run.versions:
        clips = ("-" if c is None else f"{100 * c:.1f}" for c in (v.clip_chosen, v.clip_rejected))
        counts = (_count(n) for n in (*map(v.pairs, ("keep", "swap", "drop")), v.num_used))
        table.add_row(Text(v.name), percent(v.accuracy), interval(v), *counts, *clips,
                      "-" if v.loss is None else f"{v.loss:.3f}")  # fmt: skip
    console.print(table)
    console.print(f"\ngain      {run.gain_text or 'not known: no evaluation before and after'}", markup=False)
    if len(runs) > 1:
        table = _table("Same loop, other losses", "loss", "before", "after", "gain, points")
        for row in comparison_rows(runs):
            table.add_row(*row)
        console.print("", table, "", sep="\n")
    for warning in run.warnings:
        console.print(f"warning   {warning}", markup=False, style="yellow")
    console.print(f"report: {run.folder / REPORT_FILE}", markup=False, soft_wrap=True)
    if run.trained:
        console.print(f'from_pretrained("{run.folder}") loads the newest policy, {run.newest.name}', markup=False,
                      soft_wrap=True)  # fmt: skip


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0, title_justify="left")
    table.add_column(first, overflow="fold")
    for name in others:  # only the first column gives way when the terminal is narrow
        table.add_column(name, justify="right", no_wrap=True)
    return table
