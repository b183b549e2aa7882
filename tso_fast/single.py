"""Single stages from the command line: a file in, a file out."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tso_fast.config import EvalConfig, GenerateConfig, PairsConfig, ScoreConfig
from tso_fast.errors import InputError
from tso_fast.progress import console, stage
from tso_fast.records import BadRows, candidates_row, pair_row, read_candidates, read_verdicts, verdict_row
from tso_fast.store import SKIPPED_FILE, check_writable, write_json, write_jsonl
from tso_fast.types import Candidates, Comparison, Verdict

stdout = Console()


def _new_file(path: str) -> Path:
    """The output file; refuses early what could not be written after hours of work."""
    file = Path(path)
    if file.exists():
        raise InputError(f"output: {path} exists already; choose another name or remove it")
    check_writable(file)
    return file


def _finish(file: Path | None, what: str, bad: BadRows) -> None:
    if file is not None:
        console.print(f"{what} in {file}", highlight=False)
    if bad.rows and file is not None:
        aside = file.with_name(f"{file.name}.{SKIPPED_FILE}")
        write_jsonl(aside, bad.rows)
        console.print(f"{len(bad.rows)} bad rows set aside in {aside}", highlight=False)
    elif bad.rows:
        console.print(f"{len(bad.rows)} bad rows skipped, the first: {bad.rows[0]['error']}", highlight=False)


def generate(config: GenerateConfig) -> None:
    """Every cell answers every prompt; responses that the file holds already stay in front."""
    from tso_fast.answering import answer, ask, max_tokens
    from tso_fast.matrix import ModelMatrix, check_fits
    from tso_fast.response_store import ResponseStore

    bad = BadRows(config.on_bad_row)
    candidates = read_candidates(config.prompts, bad)
    file = _new_file(config.output)
    matrix = ModelMatrix(config.cells)
    candidates = check_fits(candidates, matrix.tokenizer, matrix.context, max_tokens(matrix, config), bad)
    asked = [ask(cell, config, matrix.configs[cell.name]) for cell in matrix.cells]
    total = sum(a.num_generations for a in asked) * len(candidates)
    with (
        ResponseStore(config.response_store or f"{config.output}.responses") as store,
        stage(f"generate: {len(asked)} cells", total) as advance,
    ):
        answered = answer(asked, candidates, matrix, config, store, bad, advance)
        num_responses, num_prompts = 0, 0

        def rows() -> Iterator[dict[str, Any]]:
            nonlocal num_responses, num_prompts
            for item in answered:
                num_responses += len(item.responses)
                num_prompts += 1
                yield candidates_row(item)

        write_jsonl(file, rows())
    _finish(file, f"{num_responses} responses to {num_prompts} prompts", bad)


def score(config: ScoreConfig) -> None:
    """Verdicts of every judge, the mean score of each model, and what the judges cost."""
    from tso_fast import judging
    from tso_fast.evidence import COST_COLUMNS, cost_rows
    from tso_fast.matrix import ModelMatrix
    from tso_fast.response_store import ResponseStore

    if config.verifier is None and not config.judges:
        raise InputError("verifier: missing; `tso-fast score` needs a judge: a verifier, or judges")
    bad = BadRows(config.on_bad_row)
    candidates = read_candidates(config.responses, bad)
    file = _new_file(config.output)
    matrix = ModelMatrix(config.cells, config.policy) if config.cells else None
    judging.check_models(config, matrix)
    with contextlib.ExitStack() as stack:
        models = None
        if judging.needs_models(config):
            store = stack.enter_context(ResponseStore(config.response_store or f"{config.output}.responses"))
            advance = stack.enter_context(stage("judge", judging.num_steps(candidates, config)))
            models = judging.Models(matrix=matrix, settings=config, store=store, advance=advance)
        verdicts, costs = judging.judge(candidates, config, bad, models)
    write_jsonl(file, map(verdict_row, verdicts))
    if any(isinstance(v, Verdict) for v in verdicts):
        stdout.print(_scores_table(candidates, [v for v in verdicts if isinstance(v, Verdict)]))
    if comparisons := [v for v in verdicts if isinstance(v, Comparison)]:
        stdout.print(_comparisons_table(comparisons))
    if costs:
        stdout.print(_table("What judges that are models took", COST_COLUMNS, cost_rows(costs)))
    _finish(file, f"{len(verdicts)} verdicts", bad)


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


def pairs(config: PairsConfig) -> None:
    """Corrects the prior order by the evidence, selects pairs, and prints what was kept, swapped and dropped."""
    from tso_fast import evidence, judging, stages
    from tso_fast.judges.human import read_labels

    bad = BadRows(config.on_bad_row)
    candidates = read_candidates(config.responses, bad)
    if config.verdicts is not None and (config.verifier is not None or config.judges):
        raise InputError("verdicts: give either a file of verdicts or judges (a verifier is one), not both")
    file = _new_file(config.output)
    verdicts: list[Verdict | Comparison]
    if config.verdicts is None:
        verdicts, _ = judging.judge(candidates, config, bad)
    else:
        verdicts = read_verdicts(config.verdicts, candidates, bad)
    if config.labels is not None:
        verdicts += read_labels(config.labels, candidates, bad)
    oracle = None if config.oracle is None else evidence.make_oracle(config.oracle, candidates)
    made, info = stages.make_pairs(candidates, verdicts, config, config, config.seed, oracle)
    write_jsonl(file, map(pair_row, made))
    stdout.print(decisions_table(info))
    if info["errors"] is not None:
        stdout.print(errors_table(info["errors"], config.oracle or ""))
    if config.evidence == "calibrated" or len(info["judges"]) > 1 or info["abstained"]:
        stdout.print(_table("Evidence", evidence.JUDGE_COLUMNS, evidence.judge_rows(info["judges"])))
    reasons = [f"{d}: {r} {n}" for d, of in info["reasons"].items() for r, n in of.items()]
    stdout.print(f"reasons   {'; '.join(reasons)}", highlight=False)
    stdout.print(f"used      {len(made)} pairs of {info['prompts_with_pairs']} of {info['prompts']} prompts "
                 f"({info['used']['keep']} kept, {info['used']['swap']} swapped)", highlight=False)  # fmt: skip
    if (found := info["calibration"]) is not None:
        tempered = "" if found["ece_tempered"] is None else (
            f"; tempered by {found['temperature']:.2f}: {found['ece_tempered']:.3f}")  # fmt: skip
        stdout.print(f"labels    soft labels against {found['labels']} human ones held back: expected calibration "
                     f"error {found['ece']:.3f}{tempered}", highlight=False)  # fmt: skip
    _finish(file, f"{len(made)} pairs", bad)


def errors_table(errors: dict[str, dict[str, int]], oracle: str) -> Table:
    """Errors of the prior and of what correction kept, and the least that the same evidence allows."""
    table = Table("prior order", title=f"Errors against {oracle}, on the pairs that it orders")
    for name in ("pairs", "prior", "corrected", "of pairs kept", "oracle's weights"):
        table.add_column(name, justify="right")

    def row(rule: str, of: dict[str, int], has_prior: bool) -> None:
        pairs, kept = of["pairs"], of["kept"]
        table.add_row(
            rule, f"{pairs:,}", f"{of['prior'] / pairs:.1%}" if has_prior else "-",
            f"{of['corrected'] / kept:.1%}" if kept else "-", f"{kept / pairs:.1%}",
            f"{of['best'] / kept:.1%}" if kept else "-",
        )  # fmt: skip

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


def evaluate(config: EvalConfig) -> None:
    """Accuracy of each cell with its 95 % interval."""
    from tso_fast import judging, stages
    from tso_fast.answering import ask, max_tokens
    from tso_fast.matrix import ModelMatrix, check_fits
    from tso_fast.response_store import ResponseStore

    if config.verifier is None:
        raise InputError("verifier: missing; `tso-fast eval` needs one")
    bad = BadRows(config.on_bad_row)
    candidates = judging.judgeable(read_candidates(config.prompts, bad), config, bad)
    file = None if config.output is None else _new_file(config.output)
    matrix = ModelMatrix(config.cells)
    candidates = check_fits(candidates, matrix.tokenizer, matrix.context, max_tokens(matrix, config), bad)
    candidates = [dataclasses.replace(c, responses=()) for c in candidates]
    asked = [ask(cell, config, matrix.configs[cell.name]) for cell in matrix.cells]
    total = sum(a.num_generations for a in asked) * len(candidates)
    with (
        tempfile.TemporaryDirectory() as scratch,
        ResponseStore(config.response_store or (f"{config.output}.responses" if config.output else scratch)) as store,
        stage(f"evaluate: {len(asked)} cells", total) as advance,
    ):
        results = stages.evaluate(asked, candidates, matrix, config, store, bad, advance)
    table = Table("model", title=f"{len(candidates)} prompts, verifier {config.verifier}")
    for name in ("accuracy", "95 % interval", "tokens"):
        table.add_column(name, justify="right")
    for info in results:
        interval = f"{info['low']:.1%} – {info['high']:.1%}"
        table.add_row(info["model"], f"{info['accuracy']:.1%}", interval, f"{info['mean_tokens']:.1f}")
    stdout.print(table)
    if file is not None:
        write_json(file, results)
    _finish(file, "accuracies", bad)
