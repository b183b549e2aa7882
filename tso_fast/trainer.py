"""The TSO loop (arXiv 2409.02118): a model matrix answers, evidence corrects, a dual-clip loss trains, T times.

    prompts -> T mini-batches; for each:
        every cell answers -> judges score -> the prior order is corrected -> pairs
        reference <- policy; policy <- dual clip(pairs); the policy joins the matrix as its newest version

Each stage writes its files and commits them, so that a run goes on from wherever it was stopped. Left out on
purpose: a reward model, a value function, sampling inside the optimiser loop. Weights travel between stages through
the disk, losslessly; that makes a resumed run bitwise the same as an uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed

import tso_fast
from tso_fast import judging, stages, store
from tso_fast.answering import answer, ask, max_tokens
from tso_fast.batching import encode_pairs
from tso_fast.config import EvalConfig, TrainConfig, VerifierConfig, check, to_dict, verifier_of
from tso_fast.errors import Paused, TrainingError
from tso_fast.judges.human import LABELS_FILE, read_labels
from tso_fast.matrix import ModelMatrix, check_fits, require_weights
from tso_fast.monitors import drift_warnings
from tso_fast.optimization import make_accelerator, optimise
from tso_fast.policy import free_gpu_memory, save_model
from tso_fast.progress import console, stage
from tso_fast.records import BadRows, candidates_row, pair_row, read_candidates, read_pairs, read_verdicts, verdict_row
from tso_fast.reference_policy import load_whole, reference_weights, save_ema
from tso_fast.response_store import ResponseStore
from tso_fast.store import Run, atomic_folder, write_jsonl
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
    accelerator = make_accelerator(config)
    bad = BadRows(config.on_bad_row)
    trained = [f"tso-{t}" for t in range(1, config.num_iterations + 1)]
    matrix = ModelMatrix(config.cells, config.policy, reserved=trained)
    require_weights(matrix.policy, "policy")
    judging.check_models(config, matrix)
    mini_batches = stages.split(_read(config.prompts, config, matrix, config, bad), config.num_iterations)
    held_out = _read(config.eval_prompts, verifier_of(config), matrix, config, bad) if config.eval_prompts else []
    with _open_run(config, matrix, accelerator) as run:
        if accelerator.is_main_process and bad.rows:
            write_jsonl(run / store.SKIPPED_FILE, bad.rows)
            console.print(f"{len(bad.rows)} bad rows set aside in {run / store.SKIPPED_FILE}")
        if config.report_to != "none":
            accelerator.init_trackers("tso-fast", to_dict(config))
        _evaluate(0, run, accelerator, matrix, held_out, config)
        for t, mini_batch in enumerate(mini_batches, start=1):
            _generate(t, run, accelerator, matrix, mini_batch, config)
            _score(t, run, accelerator, matrix, config)
            _pause(t, run, config)
            _pair(t, run, accelerator, config)
            _train(t, run, accelerator, matrix, config)
            matrix.add_version(run / f"iter-{t}/policy", trained[t - 1], config.max_versions)
            if accelerator.is_main_process:
                publish(run, matrix.policy.path)
            _evaluate(t, run, accelerator, matrix, held_out, config)
        accelerator.end_training()
    return run


def train_and_compare(config: TrainConfig) -> list[str]:
    """``train``, then with ``compare`` the same loop with plain DPO and chosen-only NLL; returns the run folders."""
    train(config)
    folders = [config.output_dir]
    for loss in ("dpo", "sft") if config.compare else ():
        if loss == config.loss_type:
            continue
        is_sft = loss == "sft"
        other = dataclasses.replace(
            config,
            loss_type=loss,
            output_dir=f"{config.output_dir}/compare-{loss}",
            beta=None if is_sft else config.beta,
            clip_chosen=None,
            clip_rejected=None,
            soft_label_kappa=None if is_sft else config.soft_label_kappa,
            margin_weight=0.0 if is_sft else config.margin_weight,
            compare=False,
            response_store=config.response_store or config.output_dir,  # what the same cells said to the same prompts
        )
        console.print(f"compare: the same loop with {loss}", highlight=False)
        train(other)
        folders.append(other.output_dir)
    return folders


def _read(
    path: str, judges: VerifierConfig, matrix: ModelMatrix, config: TrainConfig, bad: BadRows
) -> list[Candidates]:
    candidates = judging.judgeable(read_candidates(path, bad), judges, bad)
    return check_fits(candidates, matrix.tokenizer, matrix.context, max_tokens(matrix, config), bad)


def _open_run(config: TrainConfig, matrix: ModelMatrix, accelerator: Accelerator) -> Run:
    versions = {"tso_fast": tso_fast.__version__, "torch": torch.__version__, "accelerate": accelerate.__version__,
                "transformers": transformers.__version__, "python": platform.python_version()}  # fmt: skip
    inputs = {
        key: store.sha256_file(Path(path)) for key in ("prompts", "eval_prompts") if (path := getattr(config, key))
    }
    inputs |= {f"cells.{cell.name}": cell.weight_hash for cell in matrix.cells}
    if accelerator.is_main_process:
        run = Run.open(config.output_dir, to_dict(config), inputs, versions)
        if stages_done := run.state["stages"]:
            console.print(f"{run.folder}: going on after {stages_done[-1]['name']}", highlight=False)
    accelerator.wait_for_everyone()
    return run if accelerator.is_main_process else Run.follow(config.output_dir)


def _once(run: Run, accelerator: Accelerator, name: str, produce: Callable[[], Produced]) -> dict[str, Any]:
    """The info of a stage; unless it is complete, the main process produces and commits it first."""
    free_gpu_memory()  # of the training before, whose place on the GPUs engines take
    if accelerator.is_main_process and run.info(name) is None:
        paths, info = produce()
        run.commit(name, paths, info)
    while run.info(name) is None:  # hours, perhaps, and a barrier has a timeout
        time.sleep(1.0)
    accelerator.wait_for_everyone()
    info_now = run.info(name)
    assert info_now is not None
    return info_now


def _generate(
    t: int,
    run: Run,
    accelerator: Accelerator,
    matrix: ModelMatrix,
    mini_batch: Sequence[Candidates],
    config: TrainConfig,
) -> None:
    """The cells answer mini-batch t, the policy as it is now among them; human responses come with the data."""

    def produce() -> Produced:
        asked = [ask(cell, config, matrix.configs.get(cell.name),
                     config.policy_num_generations if cell is matrix.policy else None)
                 for cell in matrix.cells]  # fmt: skip
        asked = [a for a in asked if a.num_generations]
        total = sum(a.num_generations for a in asked) * len(mini_batch)
        statistics = stages.PolicyStatistics(matrix.policy.name)
        bad = BadRows(config.on_bad_row)
        files = [run / f"iter-{t}/responses.jsonl"]
        with stage(f"iteration {t}: generate, {len(asked)} cells", total) as advance, _store(config) as store:
            answered = answer(asked, mini_batch, matrix, config, store, bad, advance)
            write_jsonl(files[0], map(candidates_row, statistics.watch(answered)))
        if bad.rows:
            files.append(run / f"iter-{t}/refused.jsonl")
            write_jsonl(files[1], bad.rows)
        info = {"cells": [a.cell.name for a in asked], "refused_prompts": len(bad.rows)}
        return files, {**info, **statistics.to_dict()}

    _once(run, accelerator, f"iter-{t}/generate", produce)


def _store(config: TrainConfig) -> ResponseStore:
    return ResponseStore(config.response_store or config.output_dir)


def _score(t: int, run: Run, accelerator: Accelerator, matrix: ModelMatrix, config: TrainConfig) -> None:
    """The judges look at every response."""

    def produce() -> Produced:
        candidates = read_candidates(run / f"iter-{t}/responses.jsonl", BadRows())
        bad = BadRows(config.on_bad_row)
        title, steps = f"iteration {t}: judge", judging.num_steps(candidates, config) or len(candidates)
        with stage(title, steps) as advance, _store(config) as responses:
            models = judging.Models(matrix=matrix, settings=config, store=responses, advance=advance)
            verdicts, costs = judging.judge(candidates, config, bad, models)
        files = [run / f"iter-{t}/verdicts.jsonl"]
        write_jsonl(files[0], map(verdict_row, verdicts))
        if bad.rows:
            files.append(run / f"iter-{t}/{store.SKIPPED_FILE}")
            write_jsonl(files[1], bad.rows)
        return files, {"verdicts": len(verdicts), "skipped_prompts": len(bad.rows), "costs": costs}

    _once(run, accelerator, f"iter-{t}/score", produce)


def _pause(t: int, run: Run, config: TrainConfig) -> None:
    labels = run / f"iter-{t}/{LABELS_FILE}"
    if config.annotate and run.info(f"iter-{t}/pairs") is None and not labels.exists():
        raise Paused(f"iteration {t} waits for people: label pairs with `tso-fast annotate {run.folder}`, then run the "
                     f"same command again. It goes on as soon as {labels} exists")  # fmt: skip


def _pair(t: int, run: Run, accelerator: Accelerator, config: TrainConfig) -> None:
    """Evidence corrects the prior order of the matrix: keep, swap or drop; the selected pairs get their scale."""

    def produce() -> Produced:
        candidates = read_candidates(run / f"iter-{t}/responses.jsonl", BadRows())
        verdicts = read_verdicts(run / f"iter-{t}/verdicts.jsonl", candidates, BadRows(), may_be_empty=True)
        labels = run / f"iter-{t}/{LABELS_FILE}"
        verdicts += read_labels(labels, candidates, BadRows()) if labels.exists() else []
        pairs, info = stages.make_pairs(candidates, verdicts, config, config, config.seed)
        if not pairs:
            raise TrainingError(f"iteration {t}: none of {len(candidates)} prompts gave a pair: {info['reasons']}. See "
                                f"iter-{t}/responses.jsonl and verdicts.jsonl in {run.folder}")  # fmt: skip
        file = run / f"iter-{t}/pairs.jsonl"
        write_jsonl(file, map(pair_row, pairs))
        return [file], {**info, "pairs": len(pairs)}

    info = _once(run, accelerator, f"iter-{t}/pairs", produce)
    if accelerator.is_main_process:
        console.print(f"iteration {t}: {info['pairs']} pairs from {info['prompts']} prompts", highlight=False)


def _train(t: int, run: Run, accelerator: Accelerator, matrix: ModelMatrix, config: TrainConfig) -> None:
    """policy_t <- dual clip on the pairs, against the reference of iteration t."""
    folder = run / f"iter-{t}"
    if run.info(f"iter-{t}/train") is None:
        _optimise_and_save(t, folder, run, accelerator, matrix, config)
    if accelerator.is_main_process:
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)


def _optimise_and_save(
    t: int, folder: Path, run: Run, accelerator: Accelerator, matrix: ModelMatrix, config: TrainConfig
) -> None:
    pairs, too_long = encode_pairs(matrix.tokenizer, read_pairs(folder / "pairs.jsonl", BadRows()), matrix.context)
    if not pairs:
        raise TrainingError(f"iteration {t}: every pair is longer than the context of {matrix.context} tokens")
    reference = reference_weights(config, matrix, run.folder, t)
    set_seed(config.seed)
    model = load_whole(config, matrix.policy.weights, accelerator.device)
    info = optimise(t, model, pairs, reference if reference != matrix.policy.weights else None, run, accelerator,
                    matrix.tokenizer.pad_token_id or 0, config)  # fmt: skip
    if accelerator.is_main_process:
        files = [folder / "policy"]
        with atomic_folder(files[0]) as tmp:
            save_model(model, matrix.tokenizer, tmp)
        if config.reference == "ema":
            files.append(folder / "reference")
            with atomic_folder(files[1]) as tmp:
                save_ema(config, model, matrix.tokenizer, reference, tmp)
        generated = run.info(f"iter-{t}/generate")
        assert generated is not None
        info |= {"too_long": len(too_long), **{k: generated[k] for k in ("generated_tokens", "distinct_responses")}}
        history = [*(i for k in range(1, t) if (i := run.info(f"iter-{k}/train"))), info]
        info["warnings"] = drift_warnings(history)
        run.commit(f"iter-{t}/train", files, info)
        for warning in info["warnings"]:
            console.print(f"[yellow]warning[/]: iteration {t}: {warning}", highlight=False)
    accelerator.wait_for_everyone()


def _evaluate(
    t: int, run: Run, accelerator: Accelerator, matrix: ModelMatrix, held_out: Sequence[Candidates], config: TrainConfig
) -> None:
    """The policy answers held-out prompts greedily; t = 0 is before training."""
    if not held_out:
        return

    def produce() -> Produced:
        shared = {f.name: getattr(config, f.name) for f in dataclasses.fields(EvalConfig) if hasattr(config, f.name)}
        settings = EvalConfig(**{**shared, "num_generations": 1, "temperature": 0.0, "output": None})
        title = f"iteration {t}: evaluate {matrix.policy.name}"
        with stage(title, len(held_out)) as advance:
            asked = ask(matrix.policy, settings, matrix.configs.get(matrix.policy.name), is_own_sampling=False)
            with _store(config) as store:
                bad = BadRows(config.on_bad_row)
                (info,) = stages.evaluate([asked], held_out, matrix, settings, store, bad, advance)
        return [], info

    info = _once(run, accelerator, f"iter-{t}/eval", produce)
    if accelerator.is_main_process:
        console.print(f"iteration {t}: {info['model']} answers {info['accuracy']:.1%} of {info['responses']} held-out "
                      f"prompts (95 % interval {info['low']:.1%} to {info['high']:.1%})", highlight=False)  # fmt: skip


def publish(run: Run, policy: Path) -> None:
    """Puts the files of the newest policy at the top of the run, where ``from_pretrained`` looks."""
    for file in sorted(policy.iterdir()):
        store.place_file(file, run / file.name)
