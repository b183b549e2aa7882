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
    """Local Hugging Face model folder with safetensors weights, or folder of a LoRA adapter; all cells share one
    vocabulary."""
    base: str | None = None
    """Folder of an adapter's base model; default: what the adapter's configuration names."""
    name: str | None = None
    """Name in files and tables; default: the folder's name."""
    size_b: float | None = None
    """Size that orders cells, in billions of parameters; default: counted from the weights, an adapter's base's."""
    version_rank: int = 0
    """Age that orders cells: higher is newer."""
    num_gpus: int = 1
    """GPUs that one engine of this cell takes, where there are any."""
    num_generations: int | None = None
    """Responses of this cell to a prompt; default: as for all cells."""
    temperature: float | None = None
    """Sampling temperature of this cell; default: as for all cells."""
    top_p: float | None = None
    """Nucleus of this cell; default: as for all cells."""
    top_k: int | None = None
    """Likeliest tokens of this cell; default: as for all cells."""
    max_completion_length: int | None = None
    """Most tokens of a response of this cell; default: as for all cells."""
    url: str | None = None
    """Where `generator: openai` finds this cell, such as http://127.0.0.1:8000/v1; default: the `url` of all cells.
    With a `url` of its own and a `size_b`, the folder needs no weights, only configuration and tokenizer."""
    served_name: str | None = None
    """This cell's name on that server; default: `name`."""


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
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """Attention of transformers; `auto`: flash_attention_2 where the package flash-attn and a GPU are and `dtype` is of
    16 bits, else sdpa."""
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
    stop: list[str] | None = None
    """Texts that end a response; they are no part of it."""


@dataclass(kw_only=True)
class EngineConfig:
    """What runs the cells, and where."""

    generator: Literal["auto", "hf", "vllm", "openai"] = "auto"
    """`hf`: transformers; `vllm`: its offline engine in processes of its own; `openai`: any OpenAI-compatible server;
    `auto`: vllm where it and a GPU are, else hf."""
    generation_batch_size: int = 64
    """Sequences that `hf` generates at once."""
    url: str | None = None
    """Base of the API that `openai` asks, for cells without their own; the key is read from OPENAI_API_KEY."""
    max_concurrency: int = 64
    """Requests that `openai` has in flight."""
    max_retries: int = 5
    """Times that `openai` repeats a request that failed."""
    vllm_args: dict[str, Any] | None = None
    """More arguments of vLLM's `LLM`, such as {gpu_memory_utilization: 0.8}."""
    batch_invariant: bool = False
    """vLLM on GPUs: kernels whose results do not depend on the batch, slower."""
    engine_start_timeout_s: float = 600.0
    """Longest start of an engine."""
    engine_timeout_s: float = 300.0
    """Longest silence of an engine at work, or of a server asked once; then it counts as dead."""
    executor: Literal["local", "ray"] = "local"
    """Where engines run: this machine, or a Ray cluster."""
    ray_address: str | None = None
    """Address of the Ray cluster; default: the one that RAY_ADDRESS names or that this machine runs, else a new one."""
    num_engines: int = 0
    """Most engines at once; 0: as many as fit the GPUs, one where there are none."""
    shard_size: int = 256
    """Prompts in a shard, the unit of work and of retry."""
    max_shard_retries: int = 3
    """Times that a shard is given to another engine when its engine died; then the run stops."""
    response_store: str | None = None
    """Folder of responses that are never generated twice; default: in the run folder, or beside the output."""


@dataclass(kw_only=True)
class AnsweringConfig(GenerationConfig, EngineConfig, ModelConfig, RowsConfig):
    """How cells answer prompts."""


@dataclass(kw_only=True)
class VerifierConfig:
    """What program checks a response."""

    verifier: str | None = None
    """Program that checks a response: `exact`, `numeric`, `regex`, or `package.module:function`; none: no verifier.
    `ifeval` is the share of the prompt's constraints that hold, `ifeval_loose` the same in IFEval's loose reading."""
    verifier_pattern: str | None = None
    """Regular expression of `regex`: its last match in the response, or that match's first group, is the answer."""


@dataclass(kw_only=True)
class JudgeConfig:
    """One judge beside `verifier`."""

    kind: Literal["llm", "implicit", "agreement", "verifier"]
    """`llm`: a language model reads two responses in both orders, or rates one; `implicit`: log-probs of a cell;
    `agreement`: the share of a prompt's other responses that end in the same number; `verifier`: one more program."""
    name: str | None = None
    """Name in files and tables; default: its kind."""
    cell: str | None = None
    """Cell of the matrix that judges, `policy` for the current one. `llm` has either this or `model`."""
    model: CellConfig | None = None
    """Or a model of its own, whose vocabulary may differ from the matrix's; with a `url` it is asked there."""
    template: str = "pairwise"
    """Prompt of `llm`: `pairwise`, `pairwise_reasoned`, `self_reference`, `pointwise`, or a file. `{prompt}` with
    `{first}` and `{second}` makes it a comparison, with `{response}` a rating; `{own}` is the judge's own answer,
    written first."""
    num_votes: int = 1
    """Times that `llm` is asked the same, in each order; with a temperature above 0."""
    temperature: float = 0.0
    """Sampling temperature of `llm`. At 0 a template whose reply begins with a label is read from its log-probs; above,
    the votes are counted."""
    max_completion_length: int = 256
    """Most tokens that `llm` writes; of a reply that is a label, 32 at most."""
    pairs: Literal["all", "baseline"] = "all"
    """Which pairs of a prompt `llm` compares: all, or every response against a middle one (OSP), the median in the
    matrix's order."""
    reference: str | None = None
    """Cell whose log-probs `implicit` subtracts: its score is then the DPO reward over beta."""
    length_normalized: bool = False
    """`implicit`: log-probs a token."""
    verifier: str | None = None
    """Program of a judge of kind `verifier`."""
    verifier_pattern: str | None = None
    """Its regular expression."""


@dataclass(kw_only=True)
class JudgesConfig(VerifierConfig):
    """Who judges."""

    judges: list[JudgeConfig] | None = None
    """Judges beside `verifier`."""


@dataclass(kw_only=True)
class EvidenceConfig(JudgesConfig):
    """How verdicts, comparisons, labels and the scores in the data become one belief."""

    evidence: Literal["consensus", "calibrated"] = "consensus"
    """`consensus`: scores are put together as told below; `calibrated`: reliabilities of the judges and of the prior
    order are estimated from their agreement and from human labels (Dawid-Skene), and weigh every vote."""
    judge_reliability: dict[str, float] | None = None
    """Share of right verdicts that `calibrated` takes as given, by judge, or by rule of the prior order, such as
    `prior: human`; default: 0.99 for `verifier`, the others are estimated."""
    comparison_scores: Literal["win_rate", "bradley_terry"] = "win_rate"
    """What a judge that compares two responses says of each, for `consensus`: its mean probability of winning, or its
    Bradley-Terry strength, which also counts whom it met."""

    consensus: Literal["mean", "median", "borda", "win_rate", "bradley_terry"] = "mean"
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
    min_confidence: float = 0.5
    """Least stated probability that the chosen response is the better one; below it the pair is dropped."""
    on_no_evidence: Literal["prior", "drop"] = "prior"
    """A pair that no judge scored: believe the matrix's prior order, or drop it."""
    max_pairs: int = 1
    """Most pairs of a prompt."""
    pair_strategy: Literal[
        "random", "best_worst", "best_random", "baseline", "tournament", "first_round", "diverse", "all"
    ] = "random"
    """Which of the decided pairs are used: drawn at `random`; `best_worst`; `best_random`: the best against random
    ones; `baseline`: every response against the middle one (OSP); `tournament` and `first_round` (RSO); `diverse`: the
    best against the response of the most different n-grams; `all`, the widest gap first. `random` and `best_worst`
    use a text in one pair at most while others are left."""
    diversity_band: float | None = None
    """`diverse`: most difference of consensus scores within which the most different response is looked for; default:
    any."""
    diversity_ngram: int = 3
    """`diverse`: length of the n-grams."""
    chosen_from: list[str] | None = None
    """Models whose responses may be chosen: names, `human`, `newest` or `largest`; default: all."""
    rejected_from: list[str] | None = None
    """Models whose responses may be rejected; default: all."""
    scale_by: Literal["unit", "gap", "hardness", "confidence"] = "unit"
    """Scale of a pair: 1, the gap of its consensus scores, `hardness`: 2 x the share of the prompt's responses that
    score below the chosen one, or `confidence`: 2 x soft label - 1."""
    soft_label_by: Literal["score_gap", "rank_gap", "win_rate", "probability"] | None = None
    """Soft label: sigmoid(kappa x gap of scores) (MMPO), sigmoid(kappa x gap of ranks in [0, 1]), 1/2 + half the gap of
    win rates, or the probability that judges state; default: `score_gap` with a `soft_label_kappa`, else labels are
    hard."""
    soft_label_kappa: float | None = None
    """Kappa of `score_gap` and `rank_gap`; default 1."""
    calibrate_soft_labels: bool = True
    """With 50 human labels or more, temper soft labels so that they match them."""
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
class TrainConfig(OptimizationConfig, PairingConfig, EvidenceConfig, AnsweringConfig):
    """The whole loop."""

    output_dir: str
    """Run folder; a run that was interrupted there goes on."""
    prompts: str
    """JSONL of prompts: {id?, prompt, human_response?, answer?, constraints?, responses?}."""
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
    annotate: bool = False
    """Pause after the judges of each iteration, for people to label pairs with `tso-fast annotate`; the same command
    goes on with their labels."""
    compare: bool = False
    """Also run plain DPO and chosen-only NLL (`sft`) with the same settings and print all three."""


@dataclass(kw_only=True)
class GenerateConfig(AnsweringConfig):
    """Prompts in, responses out."""

    prompts: str
    """JSONL of prompts."""
    cells: list[CellConfig]
    """Models that answer."""
    output: str
    """JSONL of responses to write."""


@dataclass(kw_only=True)
class ScoreConfig(JudgesConfig, AnsweringConfig):
    """Responses in, verdicts out."""

    responses: str
    """JSONL of responses."""
    output: str
    """JSONL of verdicts to write."""
    cells: list[CellConfig] | None = None
    """Models that judges name as their `cell`."""
    policy: str | None = None
    """Cell that judges call `policy`; default: the newest version of the largest size."""


@dataclass(kw_only=True)
class PairsConfig(PairingConfig, EvidenceConfig, RowsConfig):
    """Responses in, preference pairs out."""

    responses: str
    """JSONL of responses."""
    verdicts: str | None = None
    """JSONL of verdicts, from `tso-fast score` or elsewhere; default: verifiers and `agreement` are run here."""
    labels: str | None = None
    """JSONL of human labels, from `tso-fast annotate` or elsewhere; they overrule every judge."""
    oracle: str | None = None
    """What the errors of the prior and of the correction are measured against, and is no evidence: `is_correct` of the
    responses, a name in the data's `scores`, or a verifier."""
    output: str
    """JSONL of pairs to write."""
    seed: int = 0
    """Seed of random pairing."""


@dataclass(kw_only=True)
class EvalConfig(VerifierConfig, AnsweringConfig):
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


@dataclass(kw_only=True)
class AnnotateConfig(RowsConfig):
    """A page on which people say which of two responses is better, or labels from and for other tools."""

    run: str
    """Run folder, or JSONL of responses; `tso-fast annotate RUN`."""
    iteration: int | None = None
    """Iteration of the run folder; default: its newest."""
    verdicts: str | None = None
    """JSONL of verdicts, which put the pairs in order; default: those of the iteration, if it has any."""
    labels: str | None = None
    """JSONL that labels are appended to; default: iter-K/labels.jsonl of the run, or beside the responses."""
    annotator: str | None = None
    """Who labels; default: the page asks. With `import_from`: whose labels those are that name nobody."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is everywhere, and wants a password."""
    port: int = 7860
    """Port to listen on; 0 takes a free one."""
    password: str | None = None
    """Asked for before anything is shown, and the name with it; better given as the environment variable
    TSO_FAST_PASSWORD, which the list of processes does not show."""
    max_pairs: int | None = None
    """Most pairs to label, the most informative ones; default: all."""
    overlap: float = 0.1
    """Share of everybody's labels that fall on pairs which others labelled too, to see how far people agree."""
    seed: int = 0
    """Seed of the order of equally informative pairs, and of which response is at the left."""
    export_to: str | None = None
    """File to write labels to, instead of the page."""
    import_from: str | None = None
    """File to add labels from, instead of the page."""
    format: Literal["jsonl", "label_studio", "argilla"] = "jsonl"
    """Format of `export_to` and `import_from`."""


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


def judge_name(config: JudgeConfig) -> str:
    """In files and tables."""
    return config.name or config.kind


def verifier_of(config: VerifierConfig) -> VerifierConfig:
    """The verifier alone, without the judges beside it."""
    return VerifierConfig(verifier=config.verifier, verifier_pattern=config.verifier_pattern)


def _require(condition: bool, key: str, value: object, expected: str) -> None:
    if not condition:
        raise InputError(f"{key}: got {value!r}, expected {expected}")


VERIFIERS = ("exact", "numeric", "regex", "ifeval", "ifeval_loose")
"""Built in."""
POSITIVE = frozenset({
    "generation_batch_size", "max_completion_length", "num_iterations", "max_pairs", "per_device_train_batch_size",
    "gradient_accumulation_steps", "num_train_epochs", "logging_steps", "max_skipped_steps", "num_gpus",
    "max_concurrency", "shard_size", "diversity_ngram", "num_votes", "iteration",
})  # fmt: skip
AT_LEAST_ZERO = frozenset({
    "num_generations", "policy_num_generations", "temperature", "top_k", "min_margin", "margin_weight", "warmup_steps",
    "weight_decay", "max_grad_norm", "max_versions", "save_steps", "soft_label_kappa", "learning_rate", "adam_epsilon",
    "max_retries", "max_shard_retries", "num_engines",
})  # fmt: skip
ABOVE_ZERO = frozenset({"beta", "diversity_band", "size_b", "engine_start_timeout_s", "engine_timeout_s"})


def check(config: Any) -> None:
    """Checks ranges and combinations that types cannot express.

    Raises:
        InputError: names the key, what was given and what was expected.
    """
    _check_fields(config)
    if isinstance(config, EngineConfig):
        _check_engine(config)
    if isinstance(config, GenerationConfig):
        _check_generation(config)
    if isinstance(config, VerifierConfig):
        _check_verifier(config)
    if isinstance(config, JudgesConfig):
        _check_judges(config)
    if isinstance(config, EvidenceConfig):
        _check_evidence(config)
    if isinstance(config, PairingConfig):
        _check_pairing(config)
    if isinstance(config, TrainConfig):
        _check_train(config)
    if isinstance(config, AnnotateConfig):
        _check_annotate(config)


def _check_fields(config: Any, place: str = "") -> None:
    for f in dataclasses.fields(config):
        value, name = getattr(config, f.name), f"{place}{f.name}"
        if value is None:  # YAML's null also reaches fields that have no such value
            _require("None" in str(f.type), name, None, str(f.type))
        elif f.name in POSITIVE:
            _require(value >= 1, name, value, "an integer >= 1")
        elif f.name in AT_LEAST_ZERO:
            _require(0 <= value < float("inf"), name, value, "a finite number >= 0")
        elif f.name in ABOVE_ZERO:
            _require(0 < value < float("inf"), name, value, "a finite number > 0")
        elif f.name in ("adam_beta1", "adam_beta2"):
            _require(0 <= value < 1, name, value, "a number in [0, 1)")
        elif f.name == "top_p":
            _require(0 < value <= 1, name, value, "a number in (0, 1]")
        elif f.name == "seed":
            _require(0 <= value < 2**32, name, value, "an integer in [0, 2**32)")
        elif f.name in ("clip_chosen", "clip_rejected"):
            _require(value >= 0, name, value, "a number >= 0, .inf for no clip")
        elif f.name == "stop":
            _require(all(value), name, value, "texts that are not empty")
        elif f.name == "url":
            _require(value.startswith(("http://", "https://")), name, value, "an address such as http://host:8000/v1")
        elif f.name == "cells":
            for i, cell in enumerate(value):
                _check_fields(cell, f"cells[{i}].")
                _check_greedy(cell, f"cells[{i}].")
        elif f.name == "model" and isinstance(value, CellConfig):
            _check_fields(value, f"{name}.")


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


def _check_verifier(config: VerifierConfig, place: str = "") -> None:
    if config.verifier is not None and ":" not in config.verifier:
        _require(config.verifier in VERIFIERS, f"{place}verifier", config.verifier,
                 f"one of {', '.join(VERIFIERS)}, or package.module:function")  # fmt: skip
    if (config.verifier == "regex") != (config.verifier_pattern is not None):
        raise InputError(f"{place}verifier_pattern: it goes with verifier 'regex', and regex needs it; "
                         f"got verifier {config.verifier!r}, verifier_pattern {config.verifier_pattern!r}")  # fmt: skip


def _check_evidence(config: EvidenceConfig) -> None:
    if config.score_normalize != "none" and config.consensus in ("borda", "win_rate", "bradley_terry"):
        raise InputError(f"score_normalize: {config.score_normalize!r} has no effect on the ranks that consensus "
                         f"{config.consensus!r} counts; leave it out")  # fmt: skip
    if config.score_weights is not None:
        if config.consensus == "median":
            raise InputError("score_weights: they have no effect on consensus 'median'; leave them out")
        for name, weight in config.score_weights.items():
            _require(0 <= weight < float("inf"), f"score_weights.{name}", weight, "a finite number >= 0")
        if config.evidence == "calibrated":
            raise InputError("score_weights: they have no effect on calibrated evidence, which estimates weights; give "
                             "judge_reliability, or leave them out")  # fmt: skip
    if config.judge_reliability is not None:
        if config.evidence != "calibrated":
            raise InputError(f"judge_reliability: it has no effect with evidence {config.evidence!r}; set evidence to "
                             "calibrated, or leave it out")  # fmt: skip
        for name, share in config.judge_reliability.items():
            _require(0 < share < 1, f"judge_reliability.{name}", share, "a share of right verdicts in (0, 1)")


def _check_judges(config: JudgesConfig) -> None:
    names = ["verifier"] if config.verifier is not None else []
    for i, judge in enumerate(config.judges or []):
        _check_fields(judge, f"judges[{i}].")
        name = judge_name(judge)
        if name in names or name == "human":
            raise InputError(f"judges[{i}].name: {name!r} is taken; set a name of its own")
        names.append(name)
        _check_judge(judge, f"judges[{i}].")


def _check_judge(judge: JudgeConfig, place: str) -> None:
    own = {
        "llm": ("cell", "model", "template", "num_votes", "temperature", "max_completion_length", "pairs"),
        "implicit": ("cell", "reference", "length_normalized"),
        "verifier": ("verifier", "verifier_pattern"),
        "agreement": (),
    }[judge.kind]
    for f in dataclasses.fields(JudgeConfig):
        if f.name not in ("kind", "name", *own) and getattr(judge, f.name) != f.default:
            raise InputError(f"{place}{f.name}: it has no effect on a judge of kind {judge.kind!r}; leave it out")
    if judge.kind == "verifier":
        if judge.verifier is None:
            raise InputError(f"{place}verifier: missing; a judge of kind 'verifier' needs a program")
        _check_verifier(VerifierConfig(verifier=judge.verifier, verifier_pattern=judge.verifier_pattern), place)
    if judge.kind == "llm":
        _check_llm(judge, place)


def _check_llm(config: JudgeConfig, place: str) -> None:
    if (config.cell is None) == (config.model is None):
        given = "neither" if config.cell is None else "both"
        raise InputError(f"{place}cell: got {given} of cell and model; a judge of kind 'llm' needs one of them")
    if config.num_votes > 1 and config.temperature == 0:
        raise InputError(f"{place}num_votes: {config.num_votes} has no effect with temperature 0, which gives the same "
                         "reply each time; set a temperature above 0 or leave it out")  # fmt: skip
    for key in ("num_generations", "temperature", "top_p", "top_k", "max_completion_length"):
        if config.model is not None and getattr(config.model, key) is not None:
            raise InputError(f"{place}model.{key}: it has no effect on a judge, which replies by its own settings such "
                             "as temperature and max_completion_length; leave it out")  # fmt: skip


def _check_pairing(config: PairingConfig) -> None:
    if config.pair_strategy != "diverse":
        for key in ("diversity_band", "diversity_ngram"):
            if getattr(config, key) != getattr(PairingConfig, key):
                raise InputError(f"{key}: it has no effect with pair_strategy {config.pair_strategy!r}; leave it out")
    _require(0 <= config.min_confidence <= 1, "min_confidence", config.min_confidence, "a probability in [0, 1]")
    if config.soft_label_kappa is not None and config.soft_label_by in ("win_rate", "probability"):
        raise InputError(
            f"soft_label_kappa: it has no effect with soft_label_by {config.soft_label_by!r}; leave it out"
        )


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


def _check_annotate(config: AnnotateConfig) -> None:
    _require(0 <= config.port < 2**16, "port", config.port, "an integer in [0, 65535]")
    _require(0 <= config.overlap <= 1, "overlap", config.overlap, "a share in [0, 1]")
    for key in ("annotator", "password"):
        value = getattr(config, key)
        _require(value is None or bool(value.strip()), key, value, "some text, or leave it out")
    if config.export_to is not None and config.import_from is not None:
        raise InputError("export_to: give either export_to or import_from, not both")
    if config.format != "jsonl" and config.export_to is None and config.import_from is None:
        raise InputError(f"format: {config.format!r} has no effect without export_to or import_from; leave it out")
