"""Combinations of settings that no single field can check; those of a judge are checked by its class."""

from __future__ import annotations

import dataclasses
from typing import Any

from tso_fast.config.ranges import check_ranges, check_value
from tso_fast.config.settings import (
    VARYING,
    AdapterConfig,
    AnnotateConfig,
    CellConfig,
    EngineConfig,
    EvidenceConfig,
    ExplainConfig,
    GenerationConfig,
    PairingConfig,
    TrainConfig,
    of_iteration,
)
from tso_fast.errors import InputError, did_you_mean


def _require(condition: bool, key: str, value: object, expected: str) -> None:
    if not condition:
        raise InputError(f"{key}: got {value!r}, expected {expected}")


def check(config: Any) -> None:
    """Checks ranges and combinations that types cannot express.

    Raises:
        InputError: names the key, what was given and what was expected.
    """
    check_ranges(config)
    for i, cell in enumerate(getattr(config, "cells", None) or []):
        _check_greedy(cell, f"cells[{i}].")
    if isinstance(config, EngineConfig):
        _check_engine(config)
    if isinstance(config, GenerationConfig):
        _check_generation(config)
    if isinstance(config, EvidenceConfig):
        _check_evidence(config)
    if isinstance(config, PairingConfig):
        _check_pairing(config)
    if isinstance(config, ExplainConfig) and not config.explain:
        for key in ("explain_figure", "explain_output", "labels"):
            if getattr(config, key) is not None:
                raise InputError(f"{key}: it has no effect without explain; leave it out, or give --explain")
    if isinstance(config, TrainConfig):
        _check_train(config)
    if isinstance(config, AnnotateConfig):
        _check_annotate(config)


def _check_greedy(config: GenerationConfig | CellConfig, place: str = "") -> None:
    for key, neutral in (("top_p", 1), ("top_k", 0)):
        value = getattr(config, key)
        if config.temperature == 0 and value not in (None, neutral):
            raise InputError(f"{place}{key}: {value} has no effect with temperature 0, which is greedy; leave it out")


def _check_engine(config: EngineConfig) -> None:
    def no_effect(key: str, with_: str) -> None:
        raise InputError(f"{key}: it has no effect with {with_}; leave it out")

    if config.executor == "local" and config.ray_address is not None:
        no_effect("ray_address", "executor 'local'")
    if config.generator not in ("auto", "vllm"):
        for key in ("vllm_args", "batch_invariant"):
            if getattr(config, key):
                no_effect(key, f"generator {config.generator!r}")
    if config.url is not None and config.generator != "openai":
        no_effect("url", f"generator {config.generator!r}")


def _check_generation(config: GenerationConfig) -> None:
    if not isinstance(config, TrainConfig):  # which may train on responses that come with the prompts
        _require(config.num_generations >= 1, "num_generations", config.num_generations, "an integer >= 1")
    _check_greedy(config)


def _check_evidence(config: EvidenceConfig) -> None:
    if config.score_normalize != "none" and config.consensus in ("borda", "win_rate", "bradley_terry"):
        raise InputError(
            f"score_normalize: {config.score_normalize!r} has no effect on the ranks that consensus "
            f"{config.consensus!r} counts; leave it out"
        )
    if config.score_weights is not None:
        if config.consensus == "median":
            raise InputError("score_weights: they have no effect on consensus 'median'; leave them out")
        if config.evidence == "calibrated":
            raise InputError(
                "score_weights: they have no effect on calibrated evidence, which estimates weights; give "
                "judge_reliability, or leave them out"
            )
    if config.judge_reliability is not None and config.evidence in ("consensus", "prior"):
        raise InputError(
            f"judge_reliability: it has no effect with evidence {config.evidence!r}; set evidence to "
            "calibrated or auto, or leave it out"
        )


def _check_pairing(config: PairingConfig) -> None:
    for key, takers in (("diversity_band", ("diverse",)), ("diversity_ngram", ("diverse", "mate"))):
        if config.pair_strategy not in takers and getattr(config, key) != getattr(PairingConfig, key):
            raise InputError(f"{key}: it has no effect with pair_strategy {config.pair_strategy!r}; leave it out")
    if config.acceptance_beta is not None and config.accepted_responses is None:
        raise InputError("acceptance_beta: it has no effect without accepted_responses; leave it out")
    if (config.soft_label_by == "score_share") != (config.soft_label_score is not None):
        raise InputError(
            f"soft_label_score: got {config.soft_label_score!r} with soft_label_by {config.soft_label_by!r}; "
            "'score_share' needs it, and nothing else has an effect of it"
        )
    if config.soft_label_kappa is not None and config.soft_label_by in ("win_rate", "probability", "score_share"):
        raise InputError(
            f"soft_label_kappa: it has no effect with soft_label_by {config.soft_label_by!r}; leave it out"
        )


def _check_train(config: TrainConfig) -> None:
    _check_reference(config)
    if config.lr_scheduler_type == "constant" and config.warmup_steps:
        raise InputError(
            f"warmup_steps: {config.warmup_steps} has no effect with lr_scheduler_type 'constant'; leave "
            "it out or use 'constant_with_warmup'"
        )
    if config.verifier is None and config.eval_verifier is None and config.eval_prompts is not None:
        raise InputError("eval_prompts: evaluation needs a verifier; set verifier or eval_verifier too")
    if config.eval_verifier is not None and config.eval_prompts is None:
        raise InputError("eval_verifier: it has no effect without eval_prompts; leave it out")
    if config.extra_from is not None and any(judge.trains for judge in config.judges or []):
        raise InputError(
            f"extra_from: {config.extra_from!r} has no response among judgments, which a judge with trains makes pairs "
            "of; leave out one of the two"
        )
    _check_adapter(config)
    _check_by_iteration(config)
    if config.annotate and config.people is not None:
        raise InputError("annotate: nobody is waited for where a function labels; leave out annotate or people")
    if config.eval_prompts is not None and config.eval_prompts == config.prompts:
        raise InputError(f"eval_prompts: {config.eval_prompts} is the training file; expected held-out prompts")


def _check_reference(config: TrainConfig) -> None:
    every, mixed_every = config.ref_model_sync_steps, config.ref_model_mixup_steps
    if config.ref_model_mixup_alpha is not None and config.reference != "ema" and every is None:
        raise InputError(
            f"ref_model_mixup_alpha: it has no effect with reference {config.reference!r}; leave it out, set reference "
            "to ema, or set ref_model_sync_steps"
        )
    if every is not None and config.reference == "initial":
        raise InputError(
            "ref_model_sync_steps: reference 'initial' never changes; set it to previous or ema, or leave this out"
        )
    is_copy = config.reference != "ema" and config.ref_model_mixup_alpha in (None, 1.0)
    if mixed_every is not None and (every is None or is_copy):
        raise InputError(
            "ref_model_mixup_steps: it has no effect without ref_model_sync_steps, and a ref_model_mixup_alpha below 1 "
            "or reference ema; leave it out or set them"
        )
    if mixed_every is not None and every is not None and mixed_every > every:
        raise InputError(f"ref_model_mixup_steps: got {mixed_every}, expected at most ref_model_sync_steps, {every}")
    if every is not None and not is_copy and config.peft == "lora":
        raise InputError(
            "ref_model_mixup_alpha: the mean of two adapters' factors is not the mean of what they add; set it to 1 "
            "with peft 'lora'"
        )
    if (config.token_values == "rewards") != (config.token_reward_cell is not None):
        raise InputError("token_reward_cell: it goes with token_values 'rewards'; give both or neither")
    if config.token_values == "rewards" and every is not None:
        raise InputError(
            "ref_model_sync_steps: rewards of tokens are log-ratios to a reference that stays; leave it out"
        )
    if config.revision_template is not None and "{response}" not in config.revision_template:
        raise InputError(
            f"revision_template: got {config.revision_template!r}, expected {{response}} and {{prompt}} in it"
        )


def _check_by_iteration(config: TrainConfig) -> None:
    entries = config.by_iteration or []
    if entries and config.compare:
        raise InputError("compare: by_iteration may have losses of its own; leave out one of them")
    for t, entry in enumerate(entries, start=1):
        place = f"by_iteration[{t - 1}]."
        for key, value in entry.items():
            if key not in VARYING:
                known = f"; it takes {', '.join(sorted(VARYING))}"
                raise InputError(f"{place}{key}: it cannot differ by iteration{did_you_mean(key, VARYING) or known}")
            check_value(TrainConfig, key, value, place)
        try:
            check(dataclasses.replace(of_iteration(config, t), by_iteration=None))
        except InputError as error:
            raise InputError(f"by_iteration[{t - 1}]: {error}") from error


def _check_adapter(config: TrainConfig) -> None:
    defaults = AdapterConfig()
    if config.peft == "none":
        for field in dataclasses.fields(AdapterConfig):
            if getattr(config, field.name) != getattr(defaults, field.name):
                raise InputError(f"{field.name}: it has no effect with peft 'none'; leave it out or set peft to lora")
    if config.lora_dropout and config.disable_dropout:
        raise InputError("lora_dropout: it has no effect with disable_dropout true; set disable_dropout to false")
    if config.peft == "lora" and config.reference == "ema":
        raise InputError(
            "reference: the mean of two adapters' factors is not the mean of what they add; with peft 'lora' set it to "
            "previous or initial"
        )
    if config.load_in_4bit and config.shard != "none":
        raise InputError("load_in_4bit: weights of 4 bits cannot be shared out over processes; set shard to none")
    if config.use_dora and config.shard != "none":
        raise InputError("use_dora: its magnitudes start from whole weights, which no process has; set shard to none")


def _check_annotate(config: AnnotateConfig) -> None:
    if config.export_to is not None and config.import_from is not None:
        raise InputError("export_to: give either export_to or import_from, not both")
    if config.format != "jsonl" and config.export_to is None and config.import_from is None:
        raise InputError(f"format: {config.format!r} has no effect without export_to or import_from; leave it out")
