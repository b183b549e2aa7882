"""What each command does, once its configuration is read; ``cli`` reads it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tso_fast.config.settings import (
    AssessConfig,
    EvalConfig,
    GenerateConfig,
    JudgedConfig,
    PairsConfig,
    PlanConfig,
    ScoreConfig,
    TrainConfig,
)
from tso_fast.errors import InputError
from tso_fast.files.atomic import check_writable, write_json, write_jsonl, writing
from tso_fast.files.rows import BadRows, candidates_row, pair_row, read_candidates, read_verdicts, verdict_row
from tso_fast.files.run import SKIPPED_FILE
from tso_fast.progress import console, is_first_process, make_console, progress_bar
from tso_fast.report.tables import comparisons_table, decisions_table, errors_table, make_table, scores_table
from tso_fast.types import Candidates, Comparison, Verdict

stdout = make_console()


def _new_file(path: str) -> Path:
    """The output file; refuses early what could not be written after hours of work."""
    file = Path(path)
    if os.path.exists(file):
        raise InputError(f"output: {path} exists already; choose another name or remove it")
    check_writable(file)
    return file


def _finish(file: Path | None, what: str, bad: BadRows) -> None:
    if file is not None:
        console.print(f"{what} in {file}")
        for aside in bad.set_aside(file.with_name(f"{file.name}.{SKIPPED_FILE}")):
            console.print(f"{len(bad.rows)} bad rows set aside in {aside}")
    elif bad.rows:
        first = bad.rows[0]["error"]
        console.print(f"{len(bad.rows)} bad rows skipped, the first: {first}")


def train(config: TrainConfig) -> None:
    """The whole loop, its report, and the same loop with other losses where ``compare`` asks for them."""
    from tso_fast.report import print_summary, write_report

    runs = train_and_compare(config)
    if not is_first_process():
        return
    write_report(runs[0], runs[1:])
    print_summary(runs)


def train_and_compare(config: TrainConfig) -> list[str]:
    """``train``, then with ``compare`` the same loop with plain DPO and chosen-only NLL; returns the run folders."""
    from tso_fast.losses import LOSSES
    from tso_fast.trainer import train

    train(config)
    folders = [config.output_dir]
    for loss in ("dpo", "sft") if config.compare else ():
        if loss == config.loss_type:
            continue
        takes_labels = LOSSES[loss].takes_labels
        other = dataclasses.replace(
            config,
            loss_type=loss,
            output_dir=f"{config.output_dir}/compare-{loss}",
            beta=config.beta if LOSSES[loss].needs_reference else None,
            clip_chosen=None,
            clip_rejected=None,
            loss_args=None,
            loss_weights=None,
            soft_label_by=config.soft_label_by if takes_labels else None,
            soft_label_kappa=config.soft_label_kappa if takes_labels else None,
            margin_weight=config.margin_weight if takes_labels else 0.0,
            compare=False,
            response_store=config.response_store or config.output_dir,  # what the same cells said to the same prompts
        )
        console.print(f"compare: the same loop with {loss}")
        train(other)
        folders.append(other.output_dir)
    return folders


def report(run: str) -> None:
    """Writes the report of a run folder and prints its table, beside the runs that ``compare`` made in it."""
    from tso_fast.report import print_summary, write_report
    from tso_fast.report.summary import comparisons

    runs = [run, *comparisons(run)]
    write_report(runs[0], runs[1:])
    print_summary(runs)


def plan(config: PlanConfig) -> None:
    """What a run would hold, do and write, and the settings that fit where these do not."""
    from tso_fast.planning.tables import tables
    from tso_fast.planning.whole import make_plan

    for part in tables(make_plan(config), config):
        stdout.print(part, highlight=False, markup=False, soft_wrap=isinstance(part, str))


def generate(config: GenerateConfig) -> None:
    """Every cell answers every prompt; responses that the file holds already stay in front."""
    from tso_fast.answering import answer, ask, check_engines, max_tokens
    from tso_fast.files.responses import ResponseStore
    from tso_fast.matrix import ModelMatrix, check_fits

    bad = BadRows(config.on_bad_row)
    candidates = read_candidates(config.prompts, bad, config)
    file = _new_file(config.output)
    matrix = ModelMatrix(config.cells)
    candidates = check_fits(candidates, matrix.tokenizer, matrix.context, max_tokens(matrix, config), bad)
    asked = [ask(cell, config, matrix.configs[cell.name]) for cell in matrix.cells]
    check_engines(asked, config)
    total = sum(a.num_generations for a in asked) * len(candidates)
    with (
        ResponseStore(config.response_store or f"{config.output}.responses") as store,
        progress_bar(f"generate: {len(asked)} cells", total) as advance,
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
    from tso_fast.files.labels import read_labels
    from tso_fast.files.responses import ResponseStore
    from tso_fast.judges import panel
    from tso_fast.judges.judge import Bench
    from tso_fast.matrix import ModelMatrix
    from tso_fast.report.tables import COST_COLUMNS, cost_rows

    if config.verifier is None and not config.judges and not config.explain:
        raise InputError("verifier: missing; `tso-fast score` needs a judge: a verifier, or judges")
    judges = panel.make_judges(config)
    bad = BadRows(config.on_bad_row)
    candidates = read_candidates(config.responses, bad, config)
    file = _new_file(config.output)
    explained = [None if path is None else _new_file(path) for path in (config.explain_output, config.explain_figure)]
    matrix = ModelMatrix(config.cells, config.policy) if config.cells else None
    panel.check(judges, matrix)
    with contextlib.ExitStack() as stack:
        bench = Bench(bad=bad, settings=config, matrix=matrix, impl=config.impl)
        if panel.needs_models(judges):
            store = stack.enter_context(ResponseStore(config.response_store or f"{config.output}.responses"))
            bench = dataclasses.replace(bench, store=store)
        if steps := panel.num_steps(judges, candidates):
            bench = dataclasses.replace(bench, advance=stack.enter_context(progress_bar("judge", steps)))
        verdicts, costs = panel.ask(judges, candidates, bench)
    write_jsonl(file, map(verdict_row, verdicts))
    if any(isinstance(v, Verdict) for v in verdicts):
        stdout.print(scores_table(candidates, [v for v in verdicts if isinstance(v, Verdict)]), "")
    if comparisons := [v for v in verdicts if isinstance(v, Comparison)]:
        stdout.print(comparisons_table(comparisons), "")
    if costs:
        stdout.print(make_table("What judges that are models took", COST_COLUMNS, cost_rows(costs)), "")
    if config.explain:
        labels = [] if config.labels is None else read_labels(config.labels, candidates, bad, config.on_unknown_field)
        _explain(candidates, [*verdicts, *labels], *explained)
    _finish(file, f"{len(verdicts)} verdicts", bad)


def _explain(
    candidates: Sequence[Candidates], verdicts: Sequence[Verdict | Comparison], file: Path | None, drawing: Path | None
) -> None:
    """Prints what judges and people reward, and writes it where that is asked for."""
    from tso_fast.correction.explain import explain
    from tso_fast.report import figures
    from tso_fast.report.tables import explained_table

    found = explain(candidates, verdicts)
    if not found:
        raise InputError("explain: nobody judged the responses; give a verifier, judges, labels or scores in the data")
    stdout.print(explained_table(found), "")
    if drawing is not None:
        _draw(drawing, figures.explained(found), "no voter has pairs enough")
    if file is not None:
        write_json(file, found)
        console.print(f"what is rewarded in {file}")


def _judged(config: JudgedConfig, bad: BadRows) -> tuple[list[Candidates], list[Verdict | Comparison]]:
    """Responses, and verdicts on them: read from a file or made by judges that are no models; labels are the last."""
    from tso_fast.files.labels import read_labels

    judges = []
    if config.verifier is not None or config.judges:  # imports every kind of judge, which takes seconds
        from tso_fast.judges import panel
        from tso_fast.judges.judge import Bench

        judges = panel.make_judges(config)
        panel.refuse_models(judges)
    if config.verdicts is not None and judges:
        raise InputError("verdicts: give either a file of verdicts or judges (a verifier is one), not both")
    candidates = read_candidates(config.responses, bad, config)
    verdicts: list[Verdict | Comparison] = []
    if config.verdicts is not None:
        verdicts = read_verdicts(config.verdicts, candidates, bad, on_unknown_field=config.on_unknown_field)
    elif judges:
        panel.check(judges, None)
        verdicts, _ = panel.ask(judges, candidates, Bench(bad=bad))
    if config.labels is not None:
        verdicts += read_labels(config.labels, candidates, bad, config.on_unknown_field)
    return candidates, verdicts


def judges(config: AssessConfig) -> None:
    """How far each judge can be believed, how many labels would help, and on which pairs."""
    from tso_fast.annotate.order import gains_of, ordered
    from tso_fast.correction.beliefs import believe
    from tso_fast.report import figures
    from tso_fast.report.tables import judge_table, label_rows

    bad = BadRows(config.on_bad_row)
    candidates, verdicts = _judged(config, bad)
    file, drawing = (None if path is None else _new_file(path) for path in (config.output, config.figure))
    if not verdicts and not any(r.scores for c in candidates for r in c.responses):
        raise InputError(f"verdicts: nobody judged {config.responses}; give a file of verdicts, a verifier or judges")
    beliefs = believe(candidates, verdicts, config)
    panel, gains = beliefs.judges(), gains_of(beliefs)
    queue = ordered(gains, config.seed)
    stdout.print(make_table("Judges", *judge_table(panel)), "")
    rows = [] if beliefs.combination is None else list(label_rows(gains, queue))
    if beliefs.combination is not None:
        columns = ("labels", "best pairs", "random pairs")
        wrong = beliefs.combination.expected_wrong
        title = f"Pairs put right by labels; {wrong:,.0f} of {len(gains):,} are expected to be wrong"
        stdout.print(
            make_table(title, columns, ((f"{n:,}", f"{best:.1f}", f"{any_:.1f}") for n, best, any_ in rows)), ""
        )
    stdout.print(f"evidence  {beliefs.chosen.method}: {beliefs.chosen.why}")
    suggested = queue[: config.num_suggestions]
    for name, first, second in suggested:
        stdout.print(f"label     prompt {name}, responses {first} and {second}")
    if drawing is not None:
        _draw(drawing, figures.judges(panel), "no judge has votes of several strengths")
    if file is not None:
        content = {
            "evidence": {"method": beliefs.chosen.method, "why": beliefs.chosen.why},
            "judges": panel,
            "concordance": beliefs.concordance,
            "labels": [{"labels": n, "best_pairs": best, "random_pairs": any_} for n, best, any_ in rows],
            "suggested": [
                {"prompt_id": name, "responses": [first, second], "gain": gains[name, first, second]}
                for name, first, second in suggested
            ],
        }
        write_json(file, content)
    _finish(file, "figures of the judges", bad)


def _draw(file: Path, figure: Any, why_none: str) -> None:
    from tso_fast.report import figures

    if figure is None:
        console.print(f"no figure: {why_none}")
        return
    with writing(file):
        figures.save(file, *figure, dpi=150)
    console.print(f"figure in {file}")


def pairs(config: PairsConfig) -> None:
    """Corrects the prior order by the evidence, selects pairs, and prints what was kept, swapped and dropped."""
    from tso_fast.correction.make_pairs import make_pairs, reasons_text
    from tso_fast.correction.oracle import make_oracle
    from tso_fast.report.tables import judge_table

    bad = BadRows(config.on_bad_row)
    candidates, verdicts = _judged(config, bad)
    file = _new_file(config.output)
    oracle = None if config.oracle is None else make_oracle(config.oracle, candidates)
    made, info = make_pairs(candidates, verdicts, config, config, config.seed, oracle)
    write_jsonl(file, map(pair_row, made))
    stdout.print(decisions_table(info["decisions"]), "")
    if info["errors"] is not None:
        stdout.print(errors_table(info["errors"], config.oracle or ""), "")
    if info["evidence"]["method"] == "calibrated" or len(info["judges"]) > 1 or info["abstained"]:
        stdout.print(make_table("Evidence", *judge_table(info["judges"])), "")
    stdout.print(f"evidence  {info['evidence']['method']}: {info['evidence']['why']}")
    stdout.print(f"reasons   {reasons_text(info['reasons'])}")
    stdout.print(
        f"used      {len(made)} pairs of {info['prompts_with_pairs']} of {info['prompts']} prompts "
        f"({info['used']['keep']} kept, {info['used']['swap']} swapped)"
    )
    if (found := info["calibration"]) is not None:
        tempered = (
            ""
            if found["ece_tempered"] is None
            else (f"; tempered by {found['temperature']:.2f}: {found['ece_tempered']:.3f}")
        )
        measured = (
            "too few to measure" if found["ece"] is None else f"expected calibration error {found['ece']:.3f}{tempered}"
        )
        stdout.print(f"labels    soft labels against {found['labels']} human ones held back: {measured}")
    _finish(file, f"{len(made)} pairs", bad)


def evaluate(config: EvalConfig) -> None:
    """Accuracy of each cell with its 95 % interval."""
    from tso_fast.answering import ask, check_engines, max_tokens
    from tso_fast.evaluation import evaluate
    from tso_fast.files.responses import ResponseStore
    from tso_fast.judges import panel
    from tso_fast.matrix import ModelMatrix, check_fits

    if config.verifier is None:
        raise InputError("verifier: missing; `tso-fast eval` needs one")
    judges = panel.make_judges(config)
    bad = BadRows(config.on_bad_row)
    candidates = panel.usable(judges, read_candidates(config.prompts, bad, config), bad)
    file = None if config.output is None else _new_file(config.output)
    matrix = ModelMatrix(config.cells)
    candidates = check_fits(candidates, matrix.tokenizer, matrix.context, max_tokens(matrix, config), bad)
    candidates = [dataclasses.replace(c, responses=()) for c in candidates]
    asked = [ask(cell, config, matrix.configs[cell.name]) for cell in matrix.cells]
    check_engines(asked, config)
    total = sum(a.num_generations for a in asked) * len(candidates)
    with (
        tempfile.TemporaryDirectory() as scratch,
        ResponseStore(config.response_store or (f"{config.output}.responses" if config.output else scratch)) as store,
        progress_bar(f"evaluate: {len(asked)} cells", total) as advance,
    ):
        results = evaluate(asked, candidates, matrix, config, store, bad, advance)
    rows = (
        (
            info["model"],
            f"{info['accuracy']:.1%}",
            f"{info['low']:.1%} – {info['high']:.1%}",
            f"{info['mean_tokens']:.1f}",
        )
        for info in results
    )
    title = f"{len(candidates)} prompts, verifier {config.verifier}"
    stdout.print(make_table(title, ("model", "accuracy", "95 % interval", "tokens"), rows), "")
    if file is not None:
        write_json(file, results)
    _finish(file, "accuracies", bad)
