"""The figures of a run, version by version, from ``run.json`` and ``metrics.jsonl``; and the tables that show them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tso_fast.files.run import REPORT_FILE, RUN_FILE, parse_stage, read_metrics, read_run
from tso_fast.progress import make_console
from tso_fast.report.tables import make_table

# Field of Version -> its name among the means of a train stage.
_MEANS = {
    "loss": "loss",
    "clip_chosen": "clip/chosen",
    "clip_rejected": "clip/rejected",
    "chosen_tokens": "num_tokens/chosen",
    "rejected_tokens": "num_tokens/rejected",
}


@dataclass(frozen=True, kw_only=True)
class Version:
    """One version of the policy and the iteration that made it; None is what the run has not (yet) recorded.

    ``Version(name="tso-1", iteration=1, accuracy=0.49, low=0.45, high=0.53, decisions={"newer": {"keep": 5512, "swap":
    2618, "drop": 22590}}, used={"keep": 1853, "swap": 524}, loss=0.57, clip_chosen=0.05, clip_rejected=0.5, ...)``
    """

    name: str
    iteration: int
    """Iteration number; 0: before training."""
    accuracy: float | None = None
    low: float | None = None
    high: float | None = None
    """``low`` and ``high`` are the ends of the accuracy's 95 % interval (Wilson)."""
    decisions: Mapping[str, Mapping[str, int]] | None = None
    """Candidate pairs by rule of the prior order, then by decision: keep, swap, drop."""
    judges: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Verdicts, abstentions and reliability by judge or rule of the prior order, see ``correction.make_pairs``."""
    costs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Requests, tokens and contradictions by judge that is a model, see ``judges.llm.Cost``."""
    evidence: Mapping[str, str] = field(default_factory=dict)
    """``method`` by which evidence was combined, and ``why``."""
    used: Mapping[str, int] | None = None
    """Pairs selected for training, by decision."""
    is_trained: bool = False
    loss: float | None = None
    """Mean over the iteration's pairs, like the clip fractions and token counts."""
    clip_chosen: float | None = None
    clip_rejected: float | None = None
    chosen_tokens: float | None = None
    rejected_tokens: float | None = None
    generated_tokens: float | None = None
    """Mean length of the policy's samples used in this iteration, which come from the previous version."""
    samplers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What samplers noted of this iteration, by name, see ``samplers.sampler.Sampled``."""
    skipped_steps: int | None = None
    warnings: tuple[str, ...] = ()

    def pairs(self, decision: str) -> int | None:
        """Candidate pairs with this decision, over all rules."""
        return None if self.decisions is None else sum(counts.get(decision, 0) for counts in self.decisions.values())

    @property
    def num_used(self) -> int | None:
        return None if self.used is None else sum(self.used.values())

    @property
    def interval(self) -> str:
        return "-" if self.low is None or self.high is None else f"{100 * self.low:.1f}–{100 * self.high:.1f}"


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A run, complete or not."""

    folder: Path
    config: Mapping[str, Any]
    libraries: Mapping[str, str]
    """Version by package."""
    versions: tuple[Version, ...]
    """Versions by iteration, from 0."""
    trained: Mapping[str, Any] = field(default_factory=dict)
    """Record of the newest iteration's training, see ``training.optimise.optimise``."""
    metrics: tuple[Mapping[str, Any], ...] = field(repr=False)
    """Rows of metrics.jsonl."""

    @property
    def loss_name(self) -> str:
        """Title of the loss as recorded by training."""
        if "loss" in self.trained:
            return str(self.trained["loss"])
        losses = self.config.get("loss_type")
        return " + ".join(losses) if isinstance(losses, list) else str(losses)

    @property
    def loss_options(self) -> Mapping[str, Any]:
        """Options of the loss as recorded by training; None stands for infinity."""
        return self.trained.get("loss_options") or {}

    @property
    def first_loss(self) -> float | None:
        """Loss that the first step of every iteration must have."""
        return self.trained.get("first_loss")

    @property
    def progress(self) -> str:
        """``3 of 4 iterations``."""
        return f"{sum(v.is_trained for v in self.versions)} of {self.config.get('num_iterations', '?')} iterations"

    @property
    def before(self) -> Version | None:
        """Version 0, if it was evaluated."""
        return self.versions[0] if self.versions[0].accuracy is not None else None

    @property
    def after(self) -> Version | None:
        """The newest version that was evaluated after training."""
        return next((v for v in reversed(self.versions[1:]) if v.accuracy is not None), None)

    @property
    def gain(self) -> float | None:
        """Gain in accuracy, percentage points."""
        before, after = self.before, self.after
        return 100 * (_known(after.accuracy) - _known(before.accuracy)) if before and after else None

    @property
    def warnings(self) -> list[str]:
        found = [f"iteration {v.iteration}: {warning}" for v in self.versions for warning in v.warnings]
        evaluated = [v for v in self.versions if v.accuracy is not None]
        if evaluated and (best := max(evaluated, key=lambda v: _known(v.accuracy))).accuracy != evaluated[-1].accuracy:
            found.append(
                f"{best.name} answered more held-out prompts ({percent(best.accuracy)}) than "
                f"{evaluated[-1].name}, which came after it ({percent(evaluated[-1].accuracy)})"
            )
        if sum(v.is_trained for v in self.versions) < self.config.get("num_iterations", 0):
            found.append(f"{self.progress} are complete; the command that started the run goes on from there")
        return found


def summarise(folder: str | Path) -> Summary:
    """Reads a run, complete or not.

    Raises:
        InputError: the folder is not a run.
    """
    folder = Path(folder)
    state = read_run(folder)
    stages: dict[int, dict[str, Any]] = {0: {}}
    for item in state["stages"]:
        iteration, stage = parse_stage(item["name"])
        stages.setdefault(iteration, {})[stage] = item["info"]
    start = state["config"].get("policy") or "before training"
    return Summary(
        folder=folder,
        config=state["config"],
        libraries=state["versions"],
        trained=next((stages[t]["train"] for t in sorted(stages, reverse=True) if "train" in stages[t]), {}),
        versions=tuple(_version(t, stages[t], f"tso-{t}" if t else start) for t in sorted(stages)),
        metrics=tuple(read_metrics(folder)),
    )


def _version(iteration: int, stages: Mapping[str, Mapping[str, Any]], name: str) -> Version:
    evaluated, paired, trained = (stages.get(stage, {}) for stage in ("eval", "pairs", "train"))
    asides = (
        (stages.get("generate", {}).get("refused_by_samplers"), "prompts of samplers were refused"),
        (stages.get("score", {}).get("skipped_prompts"), "prompts could not be judged and were set aside"),
        (paired.get("abstained"), "verdicts abstained"),
        (trained.get("too_long"), "pairs were longer than the context or max_length and left out"),
        (trained.get("truncated"), "pairs had a response cut to max_length"),
    )
    return Version(
        name=evaluated.get("model", name),
        iteration=iteration,
        **{key: evaluated.get(key) for key in ("accuracy", "low", "high")},
        **{key: paired.get(key) for key in ("decisions", "used")},
        judges=paired.get("judges") or {},
        evidence=paired.get("evidence") or {},
        costs=stages.get("score", {}).get("costs") or {},
        **{key: trained.get("means", {}).get(mean) for key, mean in _MEANS.items()},
        is_trained="train" in stages,
        generated_tokens=stages.get("generate", {}).get("generated_tokens"),
        samplers=stages.get("generate", {}).get("samplers") or {},
        skipped_steps=trained.get("skipped_steps"),
        warnings=(
            *trained.get("warnings", ()),
            *(f"{count:,} {what}" for count, what in asides if count),
            *(cost["bias"] for cost in (stages.get("score", {}).get("costs") or {}).values() if cost["bias"]),
        ),
    )


def comparisons(folder: str | Path) -> list[str]:
    """Folders of runs that ``compare`` made inside this one."""
    if not os.path.isdir(folder):
        return []
    return [str(path.parent) for path in sorted(Path(folder).glob(f"compare-*/{RUN_FILE}"))]


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def gain_text(run: Summary) -> str:
    """Accuracy before and after in words; says plainly if it fell or the change is noise."""
    before, after = run.before, run.after
    if before is None or after is None:
        return "not known: there is no evaluation both before and after training"
    is_apart = _known(after.low) > _known(before.high) or _known(after.high) < _known(before.low)
    change = (
        f"{before.name} {percent(before.accuracy)} -> {after.name} {percent(after.accuracy)}, {run.gain:+.1f} points"
    )
    return f"{change} (95 % intervals {'do not overlap' if is_apart else 'overlap'})"


VERSION_COLUMNS = (
    "version",
    "accuracy",
    "95 %\ninterval",
    "pairs\nkept",
    "swapped",
    "dropped",
    "used",
    "clip %\nchosen",
    "clip %\nrejected",
    "loss",
)


def version_rows(run: Summary) -> list[list[str]]:
    """One row per version under ``VERSION_COLUMNS``."""
    return [
        [v.name, percent(v.accuracy), v.interval]
        + [_count(n) for n in (v.pairs("keep"), v.pairs("swap"), v.pairs("drop"), v.num_used)]
        + ["-" if clip is None else f"{100 * clip:.1f}" for clip in (v.clip_chosen, v.clip_rejected)]
        + ["-" if v.loss is None else f"{v.loss:.3f}"]
        for v in run.versions
    ]


COMPARISON_COLUMNS = ("loss", "before", "after", "95 %\ninterval", "gain,\npoints")


def comparison_rows(runs: Sequence[Summary]) -> list[list[str]]:
    """One row per run under ``COMPARISON_COLUMNS``, in the order given."""
    rows = []
    for run in runs:
        before, after = (v or Version(name="", iteration=0) for v in (run.before, run.after))
        gain = "-" if run.gain is None else f"{run.gain:+.1f}"
        rows.append([run.loss_name, percent(before.accuracy), percent(after.accuracy), after.interval, gain])
    return rows


def _known(value: float | None) -> float:
    assert value is not None
    return value


def _count(value: int | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if value < 1_000_000 else f"{value / 1e6:.2f}M"


def print_summary(folders: Sequence[str | Path]) -> None:
    """Prints a summary of the first run, and how the others compare, on standard output.

    Raises:
        InputError: a folder is not a run.
    """
    runs = [summarise(folder) for folder in folders]
    run, console = runs[0], make_console()
    console.print(make_table(f"{run.loss_name}, {run.progress}", VERSION_COLUMNS, version_rows(run)))
    console.print(f"\ngain: {gain_text(run)}")
    if len(runs) > 1:
        console.print("", make_table("The same loop by loss", COMPARISON_COLUMNS, comparison_rows(runs)), "", sep="\n")
    for warning in run.warnings:
        console.print(f"warning: {warning}", style="yellow")
    console.print(f"report: {run.folder / REPORT_FILE}", soft_wrap=True)
    if trained := [v.name for v in run.versions if v.is_trained]:
        console.print(f'from_pretrained("{run.folder}") loads the newest policy, {trained[-1]}', soft_wrap=True)
