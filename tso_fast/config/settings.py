"""Every setting, documented once beside its field. Names are TRL's where TRL has one.

A command's configuration is a dataclass; YAML and ``--key value`` set its fields. A field's type holds its range
(``ranges.py``); what several fields must have in common stands in ``checks.py``.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from tso_fast.config.ranges import (
    FREE,
    Bound,
    Count,
    Decay,
    NonNegativeFloat,
    Port,
    PositiveFloat,
    PositiveInt,
    Probability,
    Reliability,
    Seed,
    Share,
    Stop,
    Text,
    Url,
)
from tso_fast.redact import redacted

VERIFIER_TIMEOUT_S = 60.0


@dataclass(kw_only=True)
class CellConfig:
    """One cell of the model matrix: a version of a model of some size."""

    path: Annotated[str, FREE]
    """Local Hugging Face model folder with safetensors weights, or folder of a LoRA adapter; all cells share one
    vocabulary."""
    base: Annotated[str | None, FREE] = None
    """Folder of an adapter's base model; default: what the adapter's configuration names."""
    name: Text | None = None
    """Name in files and tables; default: the folder's name."""
    size_b: PositiveFloat | None = None
    """Size that orders cells, in billions of parameters; default: counted from the weights, an adapter's base's."""
    version_rank: int = 0
    """Age that orders cells: higher is newer."""
    num_gpus: Annotated[PositiveInt, FREE] = 1
    """GPUs that one engine of this cell takes, where there are any."""
    num_generations: Count | None = None
    """Responses of this cell to a prompt; default: as for all cells."""
    temperature: NonNegativeFloat | None = None
    """Sampling temperature of this cell; default: as for all cells."""
    top_p: Share | None = None
    """Nucleus of this cell; default: as for all cells."""
    top_k: Count | None = None
    """Likeliest tokens of this cell; default: as for all cells."""
    max_completion_length: PositiveInt | None = None
    """Most tokens of a response of this cell; default: as for all cells."""
    url: Annotated[Url | None, FREE] = None
    """Where `generator: openai` finds this cell, such as http://127.0.0.1:8000/v1; default: the `url` of all cells.
    With a `url` of its own and a `size_b`, the folder needs no weights, only configuration and tokenizer."""
    served_name: Annotated[str | None, FREE] = None
    """This cell's name on that server; default: `name`."""


@dataclass(kw_only=True)
class RowsConfig:
    """How input rows are read."""

    on_bad_row: Annotated[Literal["raise", "skip"], FREE] = "raise"
    """A row that cannot be used: `raise` stops with its file:line:field, `skip` sets it aside and counts it."""
    on_unknown_field: Annotated[Literal["raise", "warn", "ignore"], FREE] = "warn"
    """A field that is not read and looks like a misspelling of one that is, such as `human_reponse`: `raise` makes it a
    bad row, `warn` counts such rows."""
    prompt_field: str | None = None
    """Field of the prompt, a string or a conversation; default: `prompt`, else `messages` or `conversations`. A
    conversation that ends with an answer gives the human response too."""
    human_response_field: str | None = None
    """Field of the human response or of a list of them; default: `human_response`."""
    answer_field: str | None = None
    """Field of the answer that a verifier checks; default: `answer`."""
    id_field: str | None = None
    """Field of the row's id; default: `id`."""


@dataclass(kw_only=True)
class ModelConfig:
    """How models are loaded."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights and activations; training keeps its master weights in float32 when `bf16` is set instead."""
    attn_implementation: Annotated[Literal["auto", "eager", "sdpa", "flash_attention_2"], FREE] = "auto"
    """Attention of transformers; `auto`: flash_attention_2 where the package flash-attn and a GPU are and `dtype` is of
    16 bits, else sdpa."""
    use_cpu: Annotated[bool, FREE] = False
    """Stay on the CPU even where there is a GPU."""
    seed: Seed = 0
    """Seed of sampling, pairing and data order."""


@dataclass(kw_only=True)
class GenerationConfig:
    """How cells answer."""

    num_generations: Count = 2
    """Responses of each cell to a prompt."""
    temperature: NonNegativeFloat = 1.0
    """Sampling temperature; 0 is greedy."""
    top_p: Share = 1.0
    """Nucleus of this probability; 1 keeps all tokens."""
    top_k: Count = 0
    """The k likeliest tokens; 0 keeps all."""
    max_completion_length: PositiveInt = 256
    """Most tokens of a response; prompt and response together must fit the model's context."""
    stop: Stop | None = None
    """Texts that end a response; they are no part of it."""


@dataclass(kw_only=True)
class EngineConfig:
    """What runs the cells, and where."""

    generator: Annotated[Literal["auto", "hf", "vllm", "openai"], FREE] = "auto"
    """`hf`: transformers; `vllm`: its offline engine in processes of its own; `openai`: any OpenAI-compatible server;
    `auto`: vllm where it and a GPU are, else hf."""
    generation_batch_size: Annotated[PositiveInt, FREE] = 64
    """Sequences that `hf` generates at once."""
    url: Annotated[Url | None, FREE] = None
    """Base of the API that `openai` asks, for cells without their own; the key is read from OPENAI_API_KEY."""
    max_concurrency: Annotated[PositiveInt, FREE] = 64
    """Requests that `openai` has in flight."""
    max_retries: Annotated[Count, FREE] = 5
    """Times that `openai` repeats a request that failed."""
    vllm_args: Annotated[dict[str, Any] | None, FREE] = None
    """More arguments of vLLM's `LLM`, such as {gpu_memory_utilization: 0.8}."""
    batch_invariant: bool = False
    """vLLM on GPUs: kernels whose results do not depend on the batch, slower."""
    engine_start_timeout_s: Annotated[PositiveFloat, FREE] = 600.0
    """Longest start of an engine."""
    engine_timeout_s: Annotated[PositiveFloat, FREE] = 300.0
    """Longest silence of an engine at work, or of a server asked once; then it counts as dead."""
    executor: Annotated[Literal["local", "ray"], FREE] = "local"
    """Where engines run: this machine, or a Ray cluster."""
    ray_address: Annotated[str | None, FREE] = None
    """Address of the Ray cluster; default: the one that RAY_ADDRESS names or that this machine runs, else a new one."""
    num_engines: Annotated[Count, FREE] = 0
    """Most engines at once; 0: as many as fit the GPUs, one where there are none."""
    shard_size: Annotated[PositiveInt, FREE] = 256
    """Prompts in a shard, the unit of work and of retry."""
    max_shard_retries: Annotated[Count, FREE] = 3
    """Times that a shard is given to another engine when its engine died; then the run stops."""
    response_store: Annotated[str | None, FREE] = None
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
    verifier_timeout_s: Annotated[PositiveFloat, FREE] = VERIFIER_TIMEOUT_S
    """Longest time that `regex` or a function of your own takes for one response; then the row cannot be used."""


@dataclass(kw_only=True)
class JudgeConfig:
    """One judge beside `verifier`."""

    kind: str
    """`llm`: a language model reads two responses in both orders, or rates one; `implicit`: log-probs of a cell;
    `consistency`: the order of these log-probs, as sure as an older version has the same one (CREAM); `mc_dropout`:
    the same, as sure as passes with dropout agree (UPO); `ideal_point`: what each annotator likes, learnt from human
    labels (PAL); `agreement`: the share of a prompt's other responses that end in the same number; `verifier`: one
    more program; or a judge of your own, `package.module:Class`."""
    name: Text | None = None
    """Name in files and tables; default: its kind."""
    cell: str | None = None
    """Cell of the matrix that judges, `policy` for the current one. `llm` has either this or `model`."""
    model: CellConfig | None = None
    """Or a model of its own, whose vocabulary may differ from the matrix's; with a `url` it is asked there."""
    template: str = "pairwise"
    """Prompt of `llm`: `pairwise`, `pairwise_reasoned`, `self_reference`, `pointwise`, `role`, or a file. `{prompt}`
    with `{first}` and `{second}` makes it a comparison, with `{response}` a rating; `{own}` is the judge's own answer,
    written first."""
    role: Text | None = None
    """Role in which the responses were given, such as `tutor of a beginner`, for templates with `{role}`, such as
    `role`."""
    duties: list[Text] | None = None
    """What is owed in that role, for templates with `{duties}`: the rubric of the comparison."""
    num_votes: PositiveInt = 1
    """Times that `llm` is asked the same, in each order; with a temperature above 0."""
    temperature: NonNegativeFloat = 0.0
    """Sampling temperature of `llm`. At 0 a template whose reply begins with a label is read from its log-probs; above,
    the votes are counted."""
    max_completion_length: PositiveInt = 256
    """Most tokens that `llm` writes; of a reply that is a label, 32 at most."""
    trains: bool = False
    """`llm` of cell `policy`, in `train`: whether its judgments become pairs too, the prompt being what it was asked,
    those that say what most of its votes say against the others (self-rationalization)."""
    pairs: Literal["all", "baseline"] = "all"
    """Which pairs of a prompt `llm` compares: all, or every response against a middle one (OSP), the median in the
    matrix's order."""
    reference: str | None = None
    """Cell whose log-probs `implicit`, `consistency` and `mc_dropout` subtract: a score is then the DPO reward over
    beta; `previous` for the version before the policy."""
    length_normalized: bool = False
    """`implicit`, `consistency` and `mc_dropout`: log-probs a token."""
    previous: str | None = None
    """Cell whose ranking `consistency` compares with that of `cell`; default: the newest one that is older than the
    policy, of its size where there is one."""
    beta: PositiveFloat = 0.1
    """`mc_dropout`: reward per nat of log-prob."""
    labels: str | None = None
    """JSONL of human labels that `ideal_point` learns from, beside those of earlier iterations."""
    responses: str | None = None
    """JSONL of the responses that `labels` are about."""
    annotator: Text | None = None
    """Annotator whose taste `ideal_point` has; one who never labelled has the mean one; default: all, their
    probabilities averaged."""
    num_prototypes: PositiveInt = 2
    """`ideal_point`: tastes that those of all annotators are mixed of."""
    dropout: Decay = 0.1
    """`mc_dropout`: share of the cell's activations that a pass leaves out, wherever its architecture has dropout."""
    num_passes: PositiveInt = 10
    """`mc_dropout`: passes."""
    consistency_of: Literal["prompt", "dataset"] = "prompt"
    """What the probabilities of `consistency` follow: the agreement on the prompt's responses, or its mean over all
    prompts."""
    verifier: str | None = None
    """Program of a judge of kind `verifier`."""
    verifier_pattern: str | None = None
    """Its regular expression."""
    verifier_timeout_s: PositiveFloat = VERIFIER_TIMEOUT_S
    """Its longest time for one response."""
    args: dict[str, Any] | None = None
    """Arguments of a judge of your own."""


@dataclass(kw_only=True)
class JudgesConfig(VerifierConfig):
    """Who judges."""

    judges: list[JudgeConfig] | None = None
    """Judges beside `verifier`."""


@dataclass(kw_only=True)
class EvidenceConfig(JudgesConfig):
    """How verdicts, comparisons, labels and the scores in the data become one belief."""

    evidence: Literal["auto", "consensus", "calibrated", "prior"] = "auto"
    """`consensus`: scores are put together as told below; `calibrated`: reliabilities of the judges and of the prior
    order are estimated from their agreement and from human labels, and weigh every vote; `prior`: the matrix's order
    alone; `auto`: `consensus` where nothing is to be estimated, else `calibrated`, unless 50 human labels or more
    contradict it."""
    judge_reliability: dict[str, Reliability] | None = None
    """Share of right verdicts that `calibrated` takes as given, by judge, or by rule of the prior order, such as
    `prior: human`; default: 0.99 for `verifier`, the others are estimated."""
    comparison_scores: Literal["win_rate", "bradley_terry"] = "win_rate"
    """What a judge that compares two responses says of each, for `consensus`: its mean probability of winning, or its
    Bradley-Terry strength, which also counts whom it met."""

    consensus: Literal["mean", "median", "borda", "win_rate", "bradley_terry"] = "mean"
    """How the scores of several scorers become one."""
    score_normalize: Literal["none", "z", "rank", "minmax"] = "none"
    """Normalisation of each scorer within a prompt, before `mean` or `median`."""
    score_weights: dict[str, NonNegativeFloat] | None = None
    """Weight of a scorer by name (`verifier`, or a name in the data's `scores`); default: all 1."""
    evidence_from: list[str] | None = None
    """Judges, and names in the responses' `scores` (samplers write some there), whose word counts beside people's; the
    other judges are not asked. Default: all."""


@dataclass(kw_only=True)
class PairingConfig:
    """How scores and the matrix's prior order become preference pairs."""

    min_margin: NonNegativeFloat = 0.0
    """Least difference of consensus scores that decides a pair; at or below it the pair is a tie."""
    min_confidence: Probability = 0.5
    """Least stated probability that the chosen response is the better one; below it the pair is dropped."""
    on_no_evidence: Literal["prior", "drop"] = "prior"
    """A pair that no judge scored: believe the matrix's prior order, or drop it."""
    unanimous: bool = False
    """Drop a pair on which a judge or a score in the data contradicts the decision, or says that neither is better
    (SCIR's mask); who abstains has no say."""
    max_tie_probability: Probability = 0.9
    """Largest probability that neither response is better, of a pair that is used; a more certain tie is dropped."""
    max_pairs: PositiveInt = 1
    """Most pairs of a prompt."""
    pair_strategy: Literal[
        "random", "best_worst", "best_random", "baseline", "tournament", "first_round", "diverse", "mate", "all"
    ] = "random"
    """Which of the decided pairs are used: drawn at `random`; `best_worst`; `best_random`: the best against random
    ones; `baseline`: every response against the middle one (OSP); `tournament` and `first_round` (RSO); `diverse`: the
    best against the response of the most different n-grams; `mate`: each response, the best first, against the most
    different one that it was decided to be better than, of another cell while there is one; `all`, the widest gap
    first. `random`, `best_worst` and `mate` use a text in one pair at most while others are left."""
    diversity_band: PositiveFloat | None = None
    """`diverse`: most difference of consensus scores within which the most different response is looked for; default:
    any."""
    diversity_ngram: PositiveInt = 3
    """`diverse` and `mate`: length of the n-grams."""
    accepted_responses: PositiveInt | None = None
    """Responses of a prompt that may be in pairs, drawn by rejection sampling so that they follow the cells' own
    distribution times exp(score / `acceptance_beta`) (RSO); default: all."""
    acceptance_beta: PositiveFloat | None = None
    """`accepted_responses`: the smaller, the more the best scores are preferred; default 0.5."""
    chosen_from: list[str] | None = None
    """Models whose responses may be chosen: names, `human`, `newest` or `largest`; default: all."""
    rejected_from: list[str] | None = None
    """Models whose responses may be rejected; default: all."""
    scale_by: Literal["unit", "gap", "hardness", "confidence"] = "unit"
    """Scale of a pair: 1, the gap of its consensus scores, `hardness`: 2 x the share of the prompt's responses that
    score below the chosen one, or `confidence`: 2 x soft label - 1."""
    soft_label_by: Literal["score_gap", "rank_gap", "win_rate", "probability", "score_share"] | None = None
    """Soft label: sigmoid(kappa x gap of scores) (MMPO), sigmoid(kappa x gap of ranks in [0, 1]), 1/2 + half the gap of
    win rates, the probability that judges state, or the chosen response's share of two `soft_label_score`s, at least
    1/2 (MCTS-DPO); default: `score_gap` with a `soft_label_kappa`, else labels are hard."""
    soft_label_score: str | None = None
    """Name in the responses' `scores` that `score_share` reads, such as `visits`."""
    soft_label_kappa: NonNegativeFloat | None = None
    """Kappa of `score_gap` and `rank_gap`; default 1."""
    calibrate_soft_labels: bool = True
    """With 50 human labels or more, temper soft labels so that they match them."""
    margin_weight: NonNegativeFloat = 0.0
    """Margin inside the loss: this times the score gap."""
    win_rates: Literal["others", "all"] | None = None
    """Give the loss the win rate of each response of a pair, from the evidence: over the prompt's `others`, or over
    `all` of its responses, itself a tie (SPPO); default: it gets the pair's labels. `sppo` takes them."""
    extra_from: Text | None = None
    """Model, or sampler, whose first response to a prompt is a further sequence of the prompt's pairs; `selm` needs
    one: a greedy response."""


@dataclass(kw_only=True)
class OpConfig:
    """How log-probs are computed."""

    impl: Annotated[Literal["auto", "reference", "cpu", "triton"], FREE] = "auto"
    """Implementation of the log-prob and loss op."""


@dataclass(kw_only=True)
class AdapterConfig:
    """What of the policy is trained: all weights, or a LoRA adapter."""

    peft: Literal["none", "lora"] = "none"
    """`lora`: train an adapter alone, which joins the matrix over the weights that it was trained on; a policy that is
    an adapter already goes on with it. `none`: train all weights; an adapter is merged into them."""
    lora_r: PositiveInt = 16
    """Rank of a new adapter."""
    lora_alpha: PositiveInt = 32
    """What a new adapter adds is multiplied by this over its rank, or over its root with `use_rslora`."""
    lora_dropout: Probability = 0.0
    """Dropout of a new adapter's input; wants `disable_dropout: false`."""
    lora_target_modules: list[str] | None = None
    """Names of the layers that a new adapter adapts, such as [q_proj, v_proj]; default: all linear layers but the
    head."""
    use_rslora: bool = False
    """Scale a new adapter by `lora_alpha` over the root of its rank."""
    use_dora: bool = False
    """Let a new adapter learn direction and magnitude apart (DoRA)."""
    load_in_4bit: bool = False
    """Train an adapter over weights of 4 bits (QLoRA: bitsandbytes' NF4; embeddings, norms and head stay as they are).
    Cells answer with the weights as they are stored."""


@dataclass(kw_only=True)
class ShardConfig:
    """How training is shared out over processes."""

    num_processes: Annotated[PositiveInt, FREE] = 1
    """Processes on this machine, each with its GPU, that the command starts; with `torchrun` or `accelerate launch` it
    is they who say."""
    shard: Annotated[Literal["none", "full", "hybrid"], FREE] = "none"
    """What of weights, gradients and optimizer a process holds: `none`: all; `full`: its part, of as many as there are
    processes; `hybrid`: its part of a node's, with a replica on every node."""


@dataclass(kw_only=True)
class OptimizationConfig(AdapterConfig, ShardConfig, OpConfig, ModelConfig):
    """How the policy is trained on the pairs of an iteration."""

    loss_type: str | list[str] = "dual_clip"
    """Loss: `dual_clip` (TSO), `dpo`, `sft` (negative log-likelihood of the chosen response), `ipo`, `simpo`, `sppo`,
    `nca`, … (docs/losses.md has all); one of your own, `package.module:function`; or a list, whose weighted sum is
    trained on."""
    loss_weights: list[NonNegativeFloat] | None = None
    """Weights of the losses in the list; default: 1 each."""
    loss_args: dict[str, Any] | None = None
    """Options of the loss by their names, such as {beta: 0.1, clip_chosen: 0.5}. Of several losses each takes those
    that it has; {sft: {...}} is for one of them."""
    beta: PositiveFloat | None = None
    """Reward per nat of policy-to-reference log-ratio, short for `loss_args: {beta: ...}`; default: the loss's own,
    0.1."""
    clip_chosen: Bound | None = None
    """Reward at which a chosen response is no longer pushed up, `.inf`: never; short for an entry of `loss_args`;
    default: the loss's own, 0.5."""
    clip_rejected: Bound | None = None
    """Negated reward at which a rejected response is no longer pushed down, `.inf`: never; short for an entry of
    `loss_args`; default: the loss's own, 0.3."""
    optim: Literal["adamw", "adamw_8bit", "adamw_bf16"] = "adamw"
    """Optimizer: `adamw`, fused; `adamw_8bit`: bitsandbytes', whose moments have 8 bits; `adamw_bf16`: weights and
    moments of bfloat16, rounded at random; wants `dtype: bfloat16`."""
    keep_optimizer: bool = False
    """Start an iteration with the moments that the one before ended with; else with none."""
    learning_rate: NonNegativeFloat = 1e-6
    """Peak learning rate of AdamW."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """Schedule of the learning rate."""
    lr_scheduler_span: Literal["iteration", "run"] = "iteration"
    """What the schedule, and its warm-up, goes over: each iteration, or the whole run."""
    warmup_steps: Count = 0
    """Steps of linear warm-up."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay of AdamW."""
    adam_beta1: Decay = 0.9
    """First moment decay of AdamW."""
    adam_beta2: Decay = 0.999
    """Second moment decay of AdamW."""
    adam_epsilon: NonNegativeFloat = 1e-8
    """Denominator constant of AdamW."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradients are scaled down to this global norm; 0: never."""
    max_length: PositiveInt | None = None
    """Most tokens of prompt and response in training: the end of a longer response is cut off, and a pair whose prompt
    leaves no room is left out; both are counted. Default: nothing is cut, and what exceeds the context is left out."""
    num_train_epochs: PositiveInt = 1
    """Passes over the pairs of an iteration."""
    per_device_train_batch_size: Annotated[PositiveInt, FREE] = 8
    """Pairs in one forward pass on one device. This times `gradient_accumulation_steps` times processes are the pairs
    of a step, which stay as many when a run is resumed."""
    max_tokens_per_batch: Annotated[PositiveInt | None, FREE] = None
    """Most tokens in one forward pass on one device, padding left out: a step whose pairs have more is made in more
    passes. Default: any."""
    gradient_accumulation_steps: Annotated[PositiveInt, FREE] = 1
    """Forward passes in one optimiser step."""
    share_prompt: bool | Literal["auto"] = "auto"
    """Compute a prompt once for all of its responses in a forward pass, and a response once for all of its pairs:
    `auto` where the architecture allows it, as is tried on a few tokens."""
    group_pairs: bool = False
    """Have all pairs of a prompt in the same step, where they share its prompt and the chosen response: faster the more
    pairs a prompt has, but a step sees fewer prompts."""
    gradient_checkpointing: Annotated[bool, FREE] = False
    """Recompute activations in the backward pass: less memory, more time."""
    torch_compile: Annotated[bool, FREE] = False
    """Compile the model's blocks with torch's inductor: a minute or more at the start of each iteration, then faster
    steps where the blocks, not their matrix products, take the time."""
    disable_dropout: bool = True
    """Train without dropout, so that policy and reference agree at the start."""
    bf16: bool = False
    """Autocast to bfloat16 while the weights stay in `dtype`."""
    router_aux_loss_coef: NonNegativeFloat | None = None
    """Weight of the auxiliary loss that balances a mixture's experts; default: what the model's configuration says.
    With one, prompts are not shared."""
    cache_reference: Annotated[bool, FREE] = True
    """Keep an iteration's reference log-probs in the run folder, so that a resumed run need not compute them again."""
    max_skipped_steps: Annotated[PositiveInt, FREE] = 5
    """Stop after this many steps in a row with a non-finite loss or gradient."""
    logging_steps: Annotated[PositiveInt, FREE] = 10
    """Optimiser steps between rows of metrics.jsonl."""
    save_steps: Annotated[Count, FREE] = 0
    """Optimiser steps between checkpoints inside an iteration; 0: an interrupted iteration trains again from its
    pairs."""
    report_to: Annotated[str, FREE] = "none"
    """Tracker of accelerate, such as `tensorboard` or `wandb`; `none`: only metrics.jsonl."""


@dataclass(kw_only=True)
class ReferenceConfig:
    """Which policy the loss compares with, and what else it reads."""

    reference: Literal["previous", "initial", "ema"] = "previous"
    """Reference policy of an iteration: the policy at its start (TSO), the first policy, or a running mean."""
    ref_model_mixup_alpha: Share | None = None
    """Share of the current policy in what the reference becomes: with `reference: ema` the running mean, updated at
    each iteration, default 0.6; with `ref_model_sync_steps` and `previous` too, default 1, a copy."""
    ref_model_sync_steps: PositiveInt | None = None
    """Optimiser steps after which the reference follows the policy inside an iteration too (TR-DPO); default: it stays.
    `reference: previous` begins each iteration with the policy as it is then, and counts anew; `ema` goes on with what
    it became, and counts on. Each pair costs a forward pass of the reference whenever it is trained on, and a share
    below 1, or `ema`, the memory of the weights once more."""
    ref_model_mixup_steps: PositiveInt | None = None
    """Optimiser steps after which the share is mixed in, at most `ref_model_sync_steps`, which is the default: 1 makes
    the reference a copy of the policy's running mean over steps (SAPO)."""
    second_reference: Text | None = None
    """A second reference, for losses such as `mrpo` that need one: `previous`, the policy at the iteration's start,
    `initial`, `largest`, or the name of a cell."""
    token_values: Literal["differences", "rewards"] | None = None
    """A number for each token, for losses that need one: `differences`, 1 where chosen and rejected response differ,
    else 0 (`bmc`); or `rewards`, the log-ratio of `token_reward_cell` to the reference, times the loss's beta
    (`inverse_q`)."""
    token_reward_cell: Text | None = None
    """Whose log-probs `token_values: rewards` compares with the reference: named like `second_reference`."""
    revision_template: Text | None = None
    """A pair gets four further sequences, which `srpo` needs: each of its responses after the other one and after
    itself. This is the prompt then, with `{prompt}` and `{response}` in it."""


@dataclass(kw_only=True)
class SamplerConfig:
    """One sampler: what adds responses, or prompts of its own, to what the cells answered."""

    kind: str
    """`again`: a cell answers once more, by the settings below; `degrade`: copies that lack content; `revise`: second
    answers, by a template; `regenerate`: a response that goes another way from a random cut, against the one that was
    cut (SAPO); `search`: a tree search over the steps of a response, valued by the judges (MCTS-DPO); `controller` adds
    nothing, but sets how the cells sample in each iteration (B-STaR); or a sampler of your own,
    `package.module:Class`."""
    name: Text | None = None
    """Name in files and tables, and the `model` of its responses; default: its kind."""
    of: list[str] | None = None
    """Whose responses it works on: names of models, `policy`, `human`, `newest` or `largest`; default: `human` where
    there are any, else `policy`, which is the default of `revise`."""
    alone: bool = False
    """Whether only the candidates that it adds go on to judges and pairs: the responses of cells were its material."""
    template: str = "improve"
    """What `revise` asks: `improve`, `review`, `rewrite`, or a file, with `{prompt}` and `{response}`, the response to
    be revised; `{better}` is the best one of `better`, and what is no worse than that is not revised."""
    better: list[str] | None = None
    """Whose responses `{better}` comes from; default: `human` where there are any, else `policy`."""
    into: Literal["prompt", "pair", "revision"] = "prompt"
    """Where second answers of `revise` go: to the other responses to the prompt; into candidates of their own with the
    response that they revise; or into candidates of their own whose prompt is the template as it was asked."""
    segment_tokens: PositiveInt | None = None
    """`regenerate`: most tokens that are replaced, after which the original goes on, unless an end was sampled;
    default: all up to the end."""
    buffer_size: PositiveInt | None = None
    """`regenerate`: most pairs that a replay buffer keeps over the iterations, the newest; an iteration draws from it,
    with a probability in proportion to 1 / (times drawn + 1). Default: no buffer."""
    draws: PositiveInt | None = None
    """Pairs that an iteration draws from the buffer; default: as many as it added."""
    num_rounds: PositiveInt = 8
    """`search`: times that each tree is gone down and, where it ends in something new, responses are sampled."""
    depth: PositiveInt = 3
    """`search`: most steps; the last one is all that is left."""
    step_tokens: PositiveInt | None = None
    """`search`: tokens of a step; default: a step ends with a `step_separator`."""
    step_separator: str | None = None
    """`search`: text that ends a step; default: a new line."""
    exploration: NonNegativeFloat = 1.0
    """`search`: weight of what was visited little, against what was good so far (PUCT)."""
    temperatures: list[NonNegativeFloat] | None = None
    """`controller`: temperatures that it tries, of which it sets the best for all cells without one of their own;
    default: [0.5, 0.7, 0.9, 1.1]."""
    numbers: list[PositiveInt] | None = None
    """`controller`: numbers of samples of the policy to a prompt that it tries; default: [4, 8, 16]."""
    num_wanted: PositiveInt = 8
    """`controller`: different right responses to a prompt that are enough."""
    num_prompts: PositiveInt = 64
    """`controller`: prompts of the mini-batch that it tries them on."""
    threshold: float = 1.0
    """`controller`: least score, the mean of the judges of single responses, of a right response."""
    scored: bool = False
    """`revise`: second answers count as better than what they revise, by a score under the sampler's name."""
    ratios: list[Share] | None = None
    """`degrade`: shares of the words that are removed; default: [0.25, 0.5, 0.75]."""
    cell: str | None = None
    """Cell of the matrix that answers, `policy` for the current one, which is the default, or `reference`: the
    iteration's, with `reference: ema` the running mean."""
    num_generations: PositiveInt = 1
    """Responses to each of its prompts; of `regenerate`, cuts; of `search`, responses that go on from a step."""
    temperature: NonNegativeFloat | None = None
    """Sampling temperature; default: the cell's in the loop."""
    top_p: Share | None = None
    """Nucleus; default: the cell's in the loop."""
    top_k: Count | None = None
    """Likeliest tokens; default: the cell's in the loop."""
    max_completion_length: PositiveInt | None = None
    """Most tokens of a response; default: the cell's in the loop."""
    args: dict[str, Any] | None = None
    """Arguments of a sampler of your own."""


@dataclass(kw_only=True)
class TrainConfig(OptimizationConfig, ReferenceConfig, PairingConfig, EvidenceConfig, AnsweringConfig):
    """The whole loop."""

    output_dir: Annotated[str, FREE]
    """Run folder; a run that was interrupted there goes on."""
    resume: Annotated[bool, FREE] = True
    """Go on with the run that is in `output_dir`; false: refuse a folder that has one."""
    overwrite: Annotated[bool, FREE] = False
    """Delete the run that is in `output_dir`, and begin anew; asks first."""
    prompts: Annotated[str, FREE]
    """Prompts: {id?, prompt, human_response?, answer?, constraints?, responses?} in JSONL, a JSON array, CSV, parquet
    or a folder of a `datasets` save."""
    cells: list[CellConfig]
    """The model matrix."""
    policy: str | None = None
    """Cell that is trained; default: the newest version of the largest size."""
    policy_num_generations: Count | None = None
    """Responses of the current policy to a prompt; default: `num_generations`."""
    samplers: list[SamplerConfig] | None = None
    """What adds to the cells' responses, one after the other."""
    num_iterations: Annotated[PositiveInt, FREE] = 3
    """Mini-batches the prompts are split into; each one refreshes the reference and the responses. Raised for a run
    that is there, it goes on: with the prompts that no iteration had yet, else with the mini-batches over again."""
    max_versions: Count = 0
    """Trained versions that stay in the matrix, the newest first; 0: all."""
    by_iteration: list[dict[str, Any]] | None = None
    """Settings of sampling, evidence, pairing and loss that differ by iteration, such as [{loss_type: sft}, {}] for a
    warm-up: an entry an iteration, the last one for all that follow, those after `num_iterations` for none."""
    eval_prompts: Annotated[str | None, FREE] = None
    """JSONL of held-out prompts; the policy answers them greedily before training and after each iteration."""
    eval_verifier: str | None = None
    """Program that checks held-out answers and judges nothing else; default: `verifier`."""
    annotate: bool = False
    """Pause after the judges of each iteration, for people to label pairs with `tso-fast annotate`; the same command
    goes on with their labels."""
    people: str | None = None
    """Function that labels pairs in place of people, `package.module:function`, called as f(candidates, seed) in each
    iteration; it returns labels (`tso_fast.files.labels.make_label`)."""
    compare: Annotated[bool, FREE] = False
    """Also run plain DPO and chosen-only NLL (`sft`) with the same settings and print all three."""


@dataclass(kw_only=True)
class PlanConfig(TrainConfig):
    """What `tso-fast train` would hold, do and write with the same settings, from shapes alone: nothing is loaded, and
    folders of models need no more than their config.json."""

    gpu_memory_gb: PositiveFloat = 80.0
    """Memory of a GPU, in 10^9 bytes; with `use_cpu` main memory for each process."""
    num_nodes: PositiveInt = 1
    """Machines of `num_processes` GPUs each."""
    prompt_tokens: PositiveInt | None = None
    """Tokens of the longest prompt; default: counted with the policy's tokenizer where file and tokenizer are here,
    else what `max_length`, or the context, leaves beside a response."""


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
class ExplainConfig:
    """What judges and people reward."""

    explain: bool = False
    """Tell what each judge, score in the data and annotator rewards: length, format, lists, hedging, confidence,
    agreement with the prompt and similarity to it, by a Bradley-Terry model on their differences."""
    explain_figure: str | None = None
    """PNG, SVG or PDF to draw with `explain`."""
    explain_output: str | None = None
    """JSON to write with `explain`; default: it is only printed."""


@dataclass(kw_only=True)
class ScoreConfig(ExplainConfig, JudgesConfig, OpConfig, AnsweringConfig):
    """Responses in, verdicts out."""

    responses: str
    """JSONL of responses."""
    output: str
    """JSONL of verdicts to write."""
    cells: list[CellConfig] | None = None
    """Models that judges name as their `cell`."""
    policy: str | None = None
    """Cell that judges call `policy`; default: the newest version of the largest size."""
    labels: str | None = None
    """JSONL of human labels, which `explain` looks at too; with them, or scores in the data, no judge is needed."""


@dataclass(kw_only=True)
class JudgedConfig(EvidenceConfig, RowsConfig):
    """Responses and what was said of them."""

    responses: str
    """JSONL of responses."""
    verdicts: str | None = None
    """JSONL of verdicts, from `tso-fast score` or elsewhere; default: verifiers and `agreement` are run here."""
    labels: str | None = None
    """JSONL of human labels, from `tso-fast annotate` or elsewhere; they overrule every judge."""


@dataclass(kw_only=True)
class PairsConfig(PairingConfig, JudgedConfig):
    """Responses in, preference pairs out."""

    oracle: str | None = None
    """What the errors of the prior and of the correction are measured against, and is no evidence: `is_correct` of the
    responses, a name in the data's `scores`, or a verifier."""
    output: str
    """JSONL of pairs to write."""
    seed: Seed = 0
    """Seed of random pairing."""


@dataclass(kw_only=True)
class AssessConfig(JudgedConfig):
    """How far each judge can be believed, from its verdicts, and which labels would help; `tso-fast judges RESPONSES
    VERDICTS`."""

    num_suggestions: Count = 5
    """Pairs to name that people should label first."""
    seed: Seed = 0
    """Seed of the order of pairs that would help equally."""
    figure: str | None = None
    """PNG, SVG or PDF to draw: how often each judge is right, by the strength of its votes."""
    output: str | None = None
    """JSON of all figures to write; default: they are only printed."""


@dataclass(kw_only=True)
class EvalConfig(VerifierConfig, AnsweringConfig):
    """Accuracy of models on prompts, greedy unless told."""

    prompts: str
    """JSONL of prompts with answers."""
    cells: list[CellConfig]
    """Models to evaluate."""
    num_generations: Count = 1
    """Responses of each model to a prompt."""
    temperature: NonNegativeFloat = 0.0
    """Sampling temperature; 0 is greedy."""
    output: str | None = None
    """JSON of the accuracies to write; default: only printed."""


@dataclass(kw_only=True)
class AnnotateConfig(RowsConfig):
    """A page on which people say which of two responses is better, or labels from and for other tools."""

    run: str
    """Run folder, or JSONL of responses; `tso-fast annotate RUN`."""
    iteration: PositiveInt | None = None
    """Iteration of the run folder; default: its newest."""
    verdicts: str | None = None
    """JSONL of verdicts, which put the pairs in order; default: those of the iteration, if it has any."""
    labels: str | None = None
    """JSONL that labels are appended to; default: iter-K/labels.jsonl of the run, or beside the responses."""
    annotator: Text | None = None
    """Who labels; default: the page asks. With `import_from`: whose labels those are that name nobody."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is everywhere, and wants a password."""
    port: Port = 7860
    """Port to listen on; 0 takes a free one."""
    public_name: Text | None = None
    """Another name under which the page is reached, such as that of a proxy; requests under other names are refused."""
    password: Text | None = None
    """Asked for before anything is shown, and the name with it; better given as the environment variable
    TSO_FAST_PASSWORD, which the list of processes does not show."""
    max_pairs: PositiveInt | None = None
    """Most pairs to label, the most informative ones; default: all."""
    overlap: Probability = 0.1
    """Share of everybody's labels that fall on pairs which others labelled too, to see how far people agree."""
    seed: Seed = 0
    """Seed of the order of equally informative pairs, and of which response is at the left."""
    export_to: str | None = None
    """File to write labels to, instead of the page."""
    import_from: str | None = None
    """File to add labels from, instead of the page."""
    format: Literal["jsonl", "label_studio", "argilla"] = "jsonl"
    """Format of `export_to` and `import_from`."""


def to_dict(config: Any) -> dict[str, Any]:
    """For files: JSON has no infinity, so it is written out; secrets are not."""
    return {
        key: str(value) if isinstance(value, float) and math.isinf(value) else redacted(value)
        for key, value in dataclasses.asdict(config).items()
    }


def judge_name(config: JudgeConfig) -> str:
    """A judge's name in files and tables."""
    return config.name or config.kind


def sampler_name(config: SamplerConfig) -> str:
    """A sampler's name in files and tables."""
    return config.name or config.kind


VARYING = {
    field.name
    for cls, base in ((GenerationConfig, object), (PairingConfig, object), (EvidenceConfig, JudgesConfig))
    for field in dataclasses.fields(cls)
    if field.name not in ("max_completion_length", *getattr(base, "__dataclass_fields__", ()))
} | {
    "policy_num_generations", "loss_type", "loss_weights", "loss_args", "beta", "clip_chosen", "clip_rejected",
    "second_reference", "token_values", "token_reward_cell", "revision_template",
    "learning_rate", "warmup_steps", "num_train_epochs",
}  # fmt: skip
"""What may stand in `by_iteration`."""


def of_iteration(config: TrainConfig, t: int) -> TrainConfig:
    """The settings of iteration ``t``, from 1, with what `by_iteration` says of it."""
    entries = config.by_iteration
    return dataclasses.replace(config, **entries[min(t, len(entries)) - 1]) if entries else config


def evaluation_of(config: TrainConfig) -> EvalConfig:
    """How the loop evaluates: greedily, by a verifier alone."""
    names = [f.name for f in dataclasses.fields(EvalConfig) if hasattr(config, f.name)]
    settings = {name: getattr(config, name) for name in names} | {"num_generations": 1, "temperature": 0.0}
    if config.eval_verifier is not None:
        settings |= {"verifier": config.eval_verifier, "verifier_pattern": None}
    return EvalConfig(**settings)
