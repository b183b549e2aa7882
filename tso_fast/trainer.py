"""The TSO loop (arXiv 2409.02118): a model matrix answers, evidence corrects, a dual-clip loss trains, T times.

    prompts -> T mini-batches; for each:
        every cell answers -> judges score -> the prior order is corrected -> pairs
        reference <- policy; policy <- dual clip(pairs); the policy joins the matrix as its newest version

Each stage writes its files and commits them, so that a run goes on from wherever it was stopped. Left out on
purpose: a reward model, a value function, sampling inside the optimiser loop. Weights travel between stages through
the disk, losslessly; that makes a resumed run bitwise the same as an uninterrupted one.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from tso_fast.answering import ask, check_engines, max_tokens
from tso_fast.config.checks import check
from tso_fast.config.ranges import without_free
from tso_fast.config.settings import TrainConfig, evaluation_of, of_iteration, to_dict
from tso_fast.correction.make_pairs import judgment_pairs, make_pairs, reasons_text
from tso_fast.errors import Paused, TrainingError, import_named
from tso_fast.evaluation import evaluate
from tso_fast.files.atomic import sha256_file, write_jsonl
from tso_fast.files.labels import Label, label_row, read_labels
from tso_fast.files.responses import ResponseStore
from tso_fast.files.rows import (
    BadRows,
    candidates_row,
    pair_row,
    read_candidates,
    read_verdicts,
    verdict_row,
)
from tso_fast.files.run import SKIPPED_FILE, Run, library_versions, remove_run
from tso_fast.judges import panel
from tso_fast.judges.judge import Bench, Judge
from tso_fast.matrix import ModelMatrix, check_fits, require_weights
from tso_fast.models.memory import free_gpu_memory
from tso_fast.progress import confirm, console, progress_bar
from tso_fast.samplers import chain
from tso_fast.samplers.sampler import Desk, Sampler
from tso_fast.training.iteration import train_iteration
from tso_fast.training.optimise import configured_loss, make_accelerator, tracker_settings
from tso_fast.training.reference import check_others, reference_weights
from tso_fast.types import Candidates

Produced = tuple[Iterable[Path], dict[str, Any]]


def train(config: TrainConfig) -> Run:
    """Runs or resumes the whole loop; the newest policy is at the top of ``output_dir``.

    Raises:
        InputError: bad configuration or data; nothing is trained.
        OutputError: the run folder cannot be written; what is complete is kept.
        TrainingError: training was stopped because going on would waste the run.
    """
    check(config)
    judges, samplers = panel.make_judges(config), chain.make_samplers(config)
    people = None if config.people is None else import_named(config.people, f"people: {config.people!r}", "function")
    for t in range(1, config.num_iterations + 1):
        configured_loss(of_iteration(config, t))
    accelerator = make_accelerator(config, config.output_dir)
    bad = BadRows(config.on_bad_row)
    trained = [f"tso-{t}" for t in range(1, config.num_iterations + 1)]
    matrix = ModelMatrix(config.cells, config.policy, reserved=trained)
    require_weights(matrix.policy, "policy")
    for t in range(1, config.num_iterations + 1):
        check_others(of_iteration(config, t), matrix)
    panel.check(judges, matrix)
    chain.check(samplers, matrix, judges)
    check_engines([*chain.ask_cells(matrix, config), ask(matrix.policy, config)], config)
    prompts = _read(config.prompts, judges, matrix, config, bad)
    verifier = panel.make_judges(evaluation_of(config))
    held_out = _read(config.eval_prompts, verifier, matrix, config, bad) if config.eval_prompts else []
    with _open_run(config, matrix, judges, samplers, prompts, accelerator) as run:
        if accelerator.is_main_process and bad.set_aside(run / SKIPPED_FILE):
            console.print(f"{len(bad.rows)} bad rows set aside in {run / SKIPPED_FILE}")
        if config.report_to != "none":
            accelerator.init_trackers("tso-fast", tracker_settings(config))
        loop = Loop(
            run=run,
            accelerator=accelerator,
            matrix=matrix,
            config=config,
            judges=judges,
            samplers=samplers,
            people=people,
        )
        loop.evaluate(0, held_out)
        for t, (first, end) in enumerate(run.mini_batches, start=1):
            loop.generate(t, prompts[first:end])
            loop.score(t)
            loop.pause_for_people(t)
            loop.pair(t)
            loop.train(t)
            matrix.add_version(run.iteration(t).policy, trained[t - 1], config.max_versions)
            if accelerator.is_main_process:
                run.publish(matrix.policy.path)
            loop.evaluate(t, held_out)
        accelerator.end_training()
    return run


@dataclass(frozen=True, kw_only=True)
class Loop:
    """The stages of an iteration; each leaves its files in the run and what it counted in ``run.json``."""

    run: Run
    accelerator: Accelerator
    matrix: ModelMatrix
    config: TrainConfig
    judges: Sequence[Judge]
    samplers: Sequence[Sampler] = ()
    people: Callable[[Sequence[Candidates], int], Iterable[Label]] | None = None

    def generate(self, t: int, mini_batch: Sequence[Candidates]) -> None:
        """The cells answer mini-batch t, the policy as it is now among them, and samplers add to it.

        Human responses come with the data.
        """
        config, matrix, files = of_iteration(self.config, t), self.matrix, self.run.iteration(t)

        def produce() -> Produced:
            reference = reference_weights(config, matrix, self.run, t)
            with self._store() as store:
                desk = Desk(
                    config=config, matrix=matrix, store=store, judges=self.judges, files=files, reference=reference
                )
                return chain.generate(self.samplers, mini_batch, desk)

        self._once(files.stage("generate"), produce)

    def score(self, t: int) -> None:
        """The judges look at every response."""
        config, matrix, files = self.config, self.matrix, self.run.iteration(t)

        def produce() -> Produced:
            candidates = read_candidates(files.responses, BadRows())
            bad = BadRows(config.on_bad_row)
            judges = panel.counted(self.judges, of_iteration(config, t))
            judgments: list[Candidates] = []
            steps = panel.num_steps(judges, candidates) or len(candidates)
            with progress_bar(f"iteration {t}: judge", steps) as advance, self._store() as store:
                bench = Bench(
                    bad=bad, settings=config, store=store, matrix=matrix, advance=advance, impl=config.impl,
                    keep=judgments.append, labelled=self.run.labelled(t),
                )  # fmt: skip
                verdicts, costs = panel.ask(judges, candidates, bench)
            write_jsonl(files.verdicts, map(verdict_row, verdicts))
            written = [files.verdicts, *bad.set_aside(files.skipped)]
            info = {"verdicts": len(verdicts), "skipped_prompts": len(bad.rows), "costs": costs}
            if judgments:
                write_jsonl(files.judgments, map(candidates_row, judgments))
                written.append(files.judgments)
                info["judgments"] = sum(len(item.responses) for item in judgments)
            return written, info

        self._once(files.stage("score"), produce)

    def pause_for_people(self, t: int) -> None:
        """With ``annotate``, ends the run until there are labels."""
        files = self.run.iteration(t)
        if self.config.annotate and self.run.info(files.stage("pairs")) is None and not files.labels.exists():
            raise Paused(
                f"iteration {t} waits for people: label pairs with `tso-fast annotate {self.run.folder}`, then run the "
                f"same command again. It goes on as soon as {files.labels} exists"
            )

    def pair(self, t: int) -> None:
        """Evidence corrects the prior order of the matrix: keep, swap or drop; the selected pairs get their scale."""
        config, files = of_iteration(self.config, t), self.run.iteration(t)

        def produce() -> Produced:
            candidates = read_candidates(files.responses, BadRows())
            verdicts = read_verdicts(files.verdicts, candidates, BadRows(), may_be_empty=True)
            if self.people is not None and not files.labels.exists():
                write_jsonl(files.labels, map(label_row, self.people(candidates, config.seed)))
            if files.labels.exists():
                verdicts += read_labels(files.labels, candidates, BadRows(), config.on_unknown_field)
            pairs, info = make_pairs(candidates, verdicts, config, config, config.seed)
            if "judgments" in (self.run.info(files.stage("score")) or {}):
                own = judgment_pairs(read_candidates(files.judgments, BadRows()), config, config.seed)
                pairs, info["judgment_pairs"] = pairs + own, len(own)
            if not pairs:
                raise TrainingError(
                    f"iteration {t}: none of {len(candidates)} prompts gave a pair: {reasons_text(info['reasons'])}. "
                    f"See {files.responses} and {files.verdicts.name}"
                )
            write_jsonl(files.pairs, map(pair_row, pairs))
            return [files.pairs], {**info, "pairs": len(pairs)}

        info = self._once(files.stage("pairs"), produce)
        if self.accelerator.is_main_process:
            console.print(f"iteration {t}: {info['pairs']} pairs from {info['prompts']} prompts")

    def train(self, t: int) -> None:
        """policy_t <- dual clip on the pairs, against the reference of iteration t."""
        files = self.run.iteration(t)
        if self.run.info(files.stage("train")) is None:
            train_iteration(of_iteration(self.config, t), self.matrix, self.run, t, self.accelerator)
        if self.accelerator.is_main_process:
            shutil.rmtree(files.checkpoint, ignore_errors=True)

    def evaluate(self, t: int, held_out: Sequence[Candidates]) -> None:
        """The policy answers held-out prompts greedily; t = 0 is before training."""
        config, matrix = self.config, self.matrix
        if not held_out:
            return

        def produce() -> Produced:
            settings = evaluation_of(config)
            asked = ask(matrix.policy, settings, matrix.configs.get(matrix.policy.name), is_own_sampling=False)
            bad = BadRows(config.on_bad_row)
            title = f"iteration {t}: evaluate {matrix.policy.name}"
            with progress_bar(title, len(held_out)) as advance, self._store() as store:
                (info,) = evaluate([asked], held_out, matrix, settings, store, bad, advance)
            return [], info

        info = self._once(self.run.iteration(t).stage("eval"), produce)
        if self.accelerator.is_main_process:
            console.print(
                f"iteration {t}: {info['model']} {'scores' if info.get('is_graded') else 'answers'} "
                f"{info['accuracy']:.1%} of {info['responses']} held-out prompts "
                f"(95 % interval {info['low']:.1%} to {info['high']:.1%})",
            )

    def _store(self) -> ResponseStore:
        return ResponseStore(self.config.response_store or self.config.output_dir)

    def _once(self, name: str, produce: Callable[[], Produced]) -> dict[str, Any]:
        """The info of a stage; unless it is complete, the main process produces and commits it first."""
        run, accelerator = self.run, self.accelerator
        free_gpu_memory()  # frees training memory before engines start
        if accelerator.is_main_process and run.info(name) is None:
            paths, info = produce()
            run.commit(name, paths, info)
        while (complete := run.info(name)) is None:  # hours, perhaps, and a barrier has a timeout
            time.sleep(1.0)
        accelerator.wait_for_everyone()
        return complete


def _read(
    path: str, judges: Sequence[Judge], matrix: ModelMatrix, config: TrainConfig, bad: BadRows
) -> list[Candidates]:
    candidates = panel.usable(judges, read_candidates(path, bad, config), bad)
    return check_fits(candidates, matrix.tokenizer, matrix.context, max_tokens(matrix, config), bad)


def _open_run(
    config: TrainConfig,
    matrix: ModelMatrix,
    judges: Sequence[Judge],
    samplers: Sequence[Sampler],
    prompts: Sequence[Candidates],
    accelerator: Accelerator,
) -> Run:
    if accelerator.is_main_process:
        if config.overwrite:
            remove_run(Path(config.output_dir), confirm)
        inputs = {f"cells.{cell.name}": cell.weight_hash for cell in matrix.cells}
        inputs |= panel.inputs(judges, matrix) | chain.inputs(samplers)
        if config.eval_prompts:
            inputs["eval_prompts"] = sha256_file(Path(config.eval_prompts))
        settings = to_dict(config) | {"num_processes": accelerator.num_processes}
        run = Run.open(
            config.output_dir, settings, inputs, library_versions(), _fixed, prompts, may_resume=config.resume
        )
        if stages_done := run.state["stages"]:
            console.print(f"{run.folder}: going on after {stages_done[-1]['name']}")
    accelerator.wait_for_everyone()
    return run if accelerator.is_main_process else Run.follow(config.output_dir)


def _fixed(settings: dict[str, Any]) -> dict[str, Any]:
    """What may not change when a run is resumed: among others the pairs of a step, however they are shared out."""
    shares = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_processes")
    return without_free(TrainConfig, settings) | {
        "pairs in a step": math.prod(settings.get(key) or 1 for key in shares)
    }
