"""Every setting, documented once beside its field. Names are TRL's where TRL has one.

A command's configuration is a dataclass; YAML and ``--key value`` set its fields.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from tso_fast.errors import InputError


@dataclass(kw_only=True)
class CellConfig:
    """One cell of the model matrix: a version of a model of some size."""

    path: str
    """Local Hugging Face model folder with safetensors weights; all cells share one vocabulary."""
    name: str | None = None
    """Name in files and tables; default: the folder's name."""
    size_b: float | None = None
    """Size that orders cells, in billions of parameters; default: counted from the weights."""
    version_rank: int = 0
    """Age that orders cells: higher is newer."""


@dataclass(kw_only=True)
class RowsConfig:
    """How input rows are read."""

    on_bad_row: Literal["raise", "skip"] = "raise"
    """A row that cannot be used: `raise` stops with its file:line:field, `skip` sets it aside and counts it."""


@dataclass(kw_only=True)
class ModelConfig:
    """How models are loaded."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights and activations; training keeps its master weights in float32 when `bf16` is set instead."""
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] = "sdpa"
    """Attention of transformers; `flash_attention_2` needs the package flash-attn."""
    use_cpu: bool = False
    """Stay on the CPU even where there is a GPU."""
    seed: int = 0
    """Seed of sampling, pairing and data order."""


@dataclass(kw_only=True)
class GenerationConfig:
    """How cells answer."""

    num_generations: int = 2
    """Responses of each cell to a prompt."""
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy."""
    top_p: float = 1.0
    """Nucleus of this probability; 1 keeps all tokens."""
    top_k: int = 0
    """The k likeliest tokens; 0 keeps all."""
    max_completion_length: int = 256
    """Most tokens of a response; prompt and response together must fit the model's context."""
    generation_batch_size: int = 64
    """Sequences generated at once."""


@dataclass(kw_only=True)
class VerifierConfig:
    """What program checks a response."""

    verifier: str | None = None
    """Program that checks a response: `exact`, `numeric`, `regex`, or `package.module:function`; none: no verifier."""
    verifier_pattern: str | None = None
    """Regular expression of `regex`: its last match in the response, or that match's first group, is the answer."""


@dataclass(kw_only=True)
class JudgeConfig(VerifierConfig):
    """How the verifier's verdicts and the scores in the data become one score."""

    consensus: Literal["mean", "median", "borda", "win_rate"] = "mean"
    """How the scores of several scorers become one."""
    score_normalize: Literal["none", "z", "rank", "minmax"] = "none"
    """Normalisation of each scorer within a prompt, before `mean` or `median`."""
    score_weights: dict[str, float] | None = None
    """Weight of a scorer by name (`verifier`, or a name in the data's `scores`); default: all 1."""


@dataclass(kw_only=True)
class PairingConfig:
    """How scores and the matrix's prior order become preference pairs."""

    min_margin: float = 0.0
    """Least difference of consensus scores that decides a pair; at or below it the pair is a tie."""
    on_no_evidence: Literal["prior", "drop"] = "prior"
    """A pair that no judge scored: believe the matrix's prior order, or drop it."""
    max_pairs: int = 1
    """Most pairs of a prompt."""
    pair_strategy: Literal["random", "best_worst"] = "random"
    """Which of the decided pairs are used: a random chosen response against a random rejected one, or the best
    against the worst. A response text is used in one pair at most while others are left."""
    scale_by: Literal["unit", "gap", "hardness"] = "unit"
    """Scale of a pair: 1, the gap of its consensus scores, or `hardness`: 2 x the share of the prompt's responses that
    score below the chosen one."""
    soft_label_kappa: float | None = None
    """Soft label sigmoid(kappa x score gap) (MMPO); default: hard labels."""
    margin_weight: float = 0.0
    """Margin inside the loss: this times the score gap."""


@dataclass(kw_only=True)
class OptimizationConfig:
    """How the policy is trained on the pairs of an iteration."""

    loss_type: Literal["dual_clip", "dpo", "sft"] = "dual_clip"
    """Loss: `dual_clip` (TSO), `dpo`, or `sft` (negative log-likelihood of the chosen response)."""
    beta: float | None = None
    """Reward per nat of policy-to-reference log-ratio; default: the loss's own, 0.1."""
    clip_chosen: float | None = None
    """Reward at which a chosen response is no longer pushed up, `.inf`: never; default: the loss's own, 0.5."""
    clip_rejected: float | None = None
    """Negated reward at which a rejected response is no longer pushed down, `.inf`: never; default: the loss's own,
    0.3."""
    impl: Literal["auto", "reference", "cpu", "triton"] = "auto"
    """Implementation of the log-prob and loss op."""
    learning_rate: float = 1e-6
    """Peak learning rate of AdamW."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """Schedule of the learning rate over one iteration."""
    warmup_steps: int = 0
    """Steps of linear warm-up in each iteration."""
    weight_decay: float = 0.0
    """Weight decay of AdamW."""
    adam_beta1: float = 0.9
    """First moment decay of AdamW."""
    adam_beta2: float = 0.999
    """Second moment decay of AdamW."""
    adam_epsilon: float = 1e-8
    """Denominator constant of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0: never."""
    num_train_epochs: int = 1
    """Passes over the pairs of an iteration."""
    per_device_train_batch_size: int = 8
    """Pairs in one forward pass on one device."""
    gradient_accumulation_steps: int = 1
    """Forward passes in one optimiser step."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    disable_dropout: bool = True
    """Train without dropout, so that policy and reference agree at the start."""
    bf16: bool = False
    """Autocast to bfloat16 while the weights stay in `dtype`."""
    max_skipped_steps: int = 5
    """Stop after this many steps in a row with a non-finite loss or gradient."""
    logging_steps: int = 10
    """Optimiser steps between rows of metrics.jsonl."""
    save_steps: int = 0
    """Optimiser steps between checkpoints inside an iteration; 0: an interrupted iteration trains again from its
    pairs."""
    report_to: str = "none"
    """Tracker of accelerate, such as `tensorboard` or `wandb`; `none`: only metrics.jsonl."""


@dataclass(kw_only=True)
class TrainConfig(OptimizationConfig, PairingConfig, JudgeConfig, GenerationConfig, ModelConfig, RowsConfig):
    """The whole loop."""

    output_dir: str
    """Run folder; a run that was interrupted there goes on."""
    prompts: str
    """JSONL of prompts: {id?, prompt, human_response?, answer?, responses?}."""
    cells: list[CellConfig]
    """The model matrix."""
    policy: str | None = None
    """Cell that is trained; default: the newest version of the largest size."""
    policy_num_generations: int | None = None
    """Responses of the current policy to a prompt; default: `num_generations`."""
    num_iterations: int = 3
    """Mini-batches the prompts are split into; each one refreshes the reference and the responses."""
    max_versions: int = 0
    """Trained versions that stay in the matrix, the newest first; 0: all."""
    reference: Literal["previous", "initial", "ema"] = "previous"
    """Reference policy of an iteration: the policy at its start (TSO), the first policy, or a running mean."""
    ref_model_mixup_alpha: float | None = None
    """Share of the current policy in the running mean of `reference: ema`, updated at each iteration; default 0.6."""
    eval_prompts: str | None = None
    """JSONL of held-out prompts; the policy answers them greedily before training and after each iteration."""
    compare: bool = False
    """Also run plain DPO and chosen-only NLL (`sft`) with the same settings and print all three."""


@dataclass(kw_only=True)
class GenerateConfig(GenerationConfig, ModelConfig, RowsConfig):
    """Prompts in, responses out."""

    prompts: str
    """JSONL of prompts."""
    cells: list[CellConfig]
    """Models that answer."""
    output: str
    """JSONL of responses to write."""


@dataclass(kw_only=True)
class ScoreConfig(VerifierConfig, RowsConfig):
    """Responses in, verdicts out."""

    responses: str
    """JSONL of responses."""
    output: str
    """JSONL of verdicts to write."""


@dataclass(kw_only=True)
class PairsConfig(PairingConfig, JudgeConfig, RowsConfig):
    """Responses in, preference pairs out."""

    responses: str
    """JSONL of responses."""
    verdicts: str | None = None
    """JSONL of verdicts, from `tso-fast score` or elsewhere; default: the verifier is run here."""
    output: str
    """JSONL of pairs to write."""
    seed: int = 0
    """Seed of random pairing."""


@dataclass(kw_only=True)
class EvalConfig(GenerationConfig, VerifierConfig, ModelConfig, RowsConfig):
    """Accuracy of models on prompts, greedy unless told."""

    prompts: str
    """JSONL of prompts with answers."""
    cells: list[CellConfig]
    """Models to evaluate."""
    num_generations: int = 1
    """Responses of each model to a prompt."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""
    output: str | None = None
    """JSON of the accuracies to write; default: only printed."""


def to_dict(config: Any) -> dict[str, Any]:
    """For files: JSON has no infinity, so it is written out."""
    return {
        key: str(value) if isinstance(value, float) and math.isinf(value) else value
        for key, value in dataclasses.asdict(config).items()
    }


def loss_options_of(config: OptimizationConfig) -> dict[str, float]:
    """The loss options that were set; an option that the loss does not take is the loss's error to raise."""
    names = ("beta", "clip_chosen", "clip_rejected")
    return {name: value for name in names if (value := getattr(config, name)) is not None}


def _require(condition: bool, key: str, value: object, expected: str) -> None:
    if not condition:
        raise InputError(f"{key}: got {value!r}, expected {expected}")


def check(config: Any) -> None:
    """Checks ranges and combinations that types cannot express.

    Raises:
        InputError: names the key, what was given and what was expected.
    """
    positive = ("generation_batch_size", "max_completion_length", "num_iterations", "max_pairs",
                "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "logging_steps",
                "max_skipped_steps")  # fmt: skip
    at_least_zero = ("num_generations", "policy_num_generations", "temperature", "top_k", "min_margin",
                     "margin_weight", "warmup_steps", "weight_decay", "max_grad_norm", "max_versions", "save_steps",
                     "soft_label_kappa", "learning_rate", "adam_epsilon")  # fmt: skip
    _check_none(config)
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if value is None:
            continue
        if f.name in positive:
            _require(value >= 1, f.name, value, "an integer >= 1")
        elif f.name in at_least_zero:
            _require(0 <= value < float("inf"), f.name, value, "a finite number >= 0")
        elif f.name in ("adam_beta1", "adam_beta2"):
            _require(0 <= value < 1, f.name, value, "a number in [0, 1)")
        elif f.name == "top_p":
            _require(0 < value <= 1, f.name, value, "a number in (0, 1]")
        elif f.name == "seed":
            _require(0 <= value < 2**32, f.name, value, "an integer in [0, 2**32)")
        elif f.name == "beta":
            _require(0 < value < float("inf"), f.name, value, "a finite number > 0")
        elif f.name in ("clip_chosen", "clip_rejected"):
            _require(value >= 0, f.name, value, "a number >= 0, .inf for no clip")
        elif f.name == "cells":
            for i, cell in enumerate(value):
                _check_none(cell, f"cells[{i}].")
                _require(cell.size_b is None or 0 < cell.size_b < float("inf"), f"cells[{i}].size_b", cell.size_b,
                         "a finite number > 0")  # fmt: skip
    if isinstance(config, GenerationConfig):
        _check_generation(config)
    if isinstance(config, VerifierConfig):
        _check_verifier(config)
    if isinstance(config, JudgeConfig):
        _check_judge(config)
    if isinstance(config, TrainConfig):
        _check_train(config)


def _check_none(config: Any, place: str = "") -> None:
    """YAML's null reaches fields that have no such value."""
    for f in dataclasses.fields(config):
        if "None" not in str(f.type):
            _require(getattr(config, f.name) is not None, f"{place}{f.name}", None, str(f.type))


def _check_generation(config: GenerationConfig) -> None:
    if not isinstance(config, TrainConfig):  # which may train on responses that come with the prompts
        _require(config.num_generations >= 1, "num_generations", config.num_generations, "an integer >= 1")
    if config.temperature == 0:
        for key, value, neutral in (("top_p", config.top_p, 1), ("top_k", config.top_k, 0)):
            if value != neutral:
                raise InputError(f"{key}: {value} has no effect with temperature 0, which is greedy; leave it out")


def _check_verifier(config: VerifierConfig) -> None:
    known = ("exact", "numeric", "regex")
    if config.verifier is not None and ":" not in config.verifier:
        _require(config.verifier in known, "verifier", config.verifier,
                 f"one of {', '.join(known)}, or package.module:function")  # fmt: skip
    if (config.verifier == "regex") != (config.verifier_pattern is not None):
        raise InputError("verifier_pattern: it goes with verifier 'regex', and regex needs it; "
                         f"got verifier {config.verifier!r}, verifier_pattern {config.verifier_pattern!r}")  # fmt: skip


def _check_judge(config: JudgeConfig) -> None:
    if config.score_normalize != "none" and config.consensus in ("borda", "win_rate"):
        raise InputError(f"score_normalize: {config.score_normalize!r} has no effect on the ranks that consensus "
                         f"{config.consensus!r} counts; leave it out")  # fmt: skip
    if config.score_weights is not None:
        if config.consensus == "median":
            raise InputError("score_weights: they have no effect on consensus 'median'; leave them out")
        for name, weight in config.score_weights.items():
            _require(0 <= weight < float("inf"), f"score_weights.{name}", weight, "a finite number >= 0")


def _check_train(config: TrainConfig) -> None:
    if config.ref_model_mixup_alpha is not None:
        if config.reference != "ema":
            raise InputError(f"ref_model_mixup_alpha: it has no effect with reference {config.reference!r}; "
                             "leave it out or set reference to ema")  # fmt: skip
        _require(0 < config.ref_model_mixup_alpha <= 1, "ref_model_mixup_alpha", config.ref_model_mixup_alpha,
                 "a number in (0, 1]")  # fmt: skip
    if config.loss_type == "sft" and (config.soft_label_kappa is not None or config.margin_weight):
        key = "margin_weight" if config.margin_weight else "soft_label_kappa"
        raise InputError(f"{key}: it has no effect on loss_type 'sft'; leave it out")
    if config.lr_scheduler_type == "constant" and config.warmup_steps:
        raise InputError(f"warmup_steps: {config.warmup_steps} has no effect with lr_scheduler_type 'constant'; leave "
                         "it out or use 'constant_with_warmup'")  # fmt: skip
    if config.verifier is None and config.eval_prompts is not None:
        raise InputError("eval_prompts: evaluation needs a verifier; set verifier too")
    if config.eval_prompts is not None and config.eval_prompts == config.prompts:
        raise InputError(f"eval_prompts: {config.eval_prompts} is the training file; expected held-out prompts")
