"""Records that pass between the stages.

    Prompt -> Response[] -> Verdict[] -> ScoreMatrix -> PreferencePair[] -> PairBatch -> PairLogprobs -> loss

Letters in shapes: P prompts, R responses of all prompts, M scorers, N pairs, S sequences, L padded length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import torch

HUMAN = "human"
"""The ``model`` of a response that a person wrote."""

Decision = Literal["keep", "swap", "drop"]
FinishReason = Literal["stop", "length"]
TopLogprobs = tuple[tuple[int | str, float], ...]
"""Tokens and their log-probs under the model's own distribution (temperature 1, no filter), nats, the likeliest first.
A token is its id, or its text where a server tells no ids."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a conversation: ``Message(role="user", content="What is 2 plus 3?")``."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class Constraint:
    """What a program can check of a response: ``Constraint(id="detectable_format:title")``.

    ``Constraint(id="length_constraints:number_words", kwargs={"relation": "at least", "num_words": 300})``
    """

    id: str
    """A key of ``judges.constraints.TYPES``."""
    kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One task: ``Prompt(id="q1", prompt="What is 2 plus 3?", answer="5")``."""

    id: str
    prompt: str | tuple[Message, ...]
    human_response: str | None = None
    answer: str | None = None
    constraints: tuple[Constraint, ...] = ()
    where: str = ""
    """``file:line`` it was read from; empty when it was made in memory."""

    @property
    def messages(self) -> tuple[Message, ...]:
        if isinstance(self.prompt, str):
            return (Message(role="user", content=self.prompt),)
        return self.prompt

    @property
    def text(self) -> str:
        """The prompt as one string, for identity and display."""
        return self.prompt if isinstance(self.prompt, str) else "\n".join(f"{m.role}: {m.content}" for m in self.prompt)


@dataclass(frozen=True, kw_only=True)
class Response:
    """One answer to a prompt, by a cell of the matrix or by a person.

    ``Response(model="m.v3", size_b=0.0008, version="v3", version_rank=3, sample=0, text=" 5", token_ids=(23, 1),
    finish_reason="stop")``
    """

    model: str
    text: str
    size_b: float | None = None
    """Parameters of the model in billions."""
    version: str | None = None
    version_rank: int | None = None
    """Higher is newer; only the order counts."""
    sample: int = 0
    """Index among this model's responses to this prompt."""
    token_ids: tuple[int, ...] | None = None
    """What was sampled, end-of-sequence token included; None when only the text is known."""
    finish_reason: FinishReason | None = None
    seed: int | None = None
    weight_hash: str | None = None
    logprob: float | None = None
    """Log-prob of ``token_ids`` under the sampling distribution, nats. Not a policy log-prob."""
    top_logprobs: TopLogprobs | None = None
    """The likeliest first tokens, where they were asked for, as judges do; in no file."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Scores that came with the data, by scorer."""
    is_correct: bool | None = None
    """What the data know of it; never evidence, only measured against (``oracle``)."""

    @property
    def is_human(self) -> bool:
        return self.model == HUMAN


class Weights(NamedTuple):
    """Where a model is: a folder of full weights, twice, or that of a LoRA adapter and that of its base model."""

    path: Path
    base: Path


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One model of the matrix: ``Cell(name="m.v3", path=..., base=..., size_b=0.0008, version_rank=3, ...)``."""

    name: str
    path: Path
    """Folder of the weights, or of a LoRA adapter."""
    base: Path
    """Folder of the full weights: ``path`` itself, or the adapter's base model."""
    size_b: float
    version_rank: int
    weight_hash: str
    """First 16 hex digits of the sha256 over the weight files, an adapter's and its base's."""
    architecture: str
    """Hash of what the base's config.json says of shapes: full weights of one architecture fit one engine."""
    context: int | None
    """Most tokens of prompt and response together; None: no limit known."""
    lora_rank: int | None = None
    """Of an adapter."""
    has_weights: bool = True
    """False: only a server has them; ``weight_hash`` is then that of the server's name for them."""

    @property
    def is_adapter(self) -> bool:
        return self.path != self.base

    @property
    def weights(self) -> Weights:
        return Weights(self.path, self.base)


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """A prompt and every response to it, in the order that ``Verdict.response`` counts."""

    prompt: Prompt
    responses: tuple[Response, ...]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What one judge says of one response: ``Verdict(prompt_id="q1", response=0, judge="exact", score=1.0)``."""

    prompt_id: str
    response: int
    judge: str
    score: float | None
    """Higher is better; None: the judge abstains."""
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What one judge says of two responses to one prompt.

    ``Comparison(prompt_id="q1", responses=(0, 2), judge="llm", probability=0.9, orders=(0.95, 0.85))``
    """

    prompt_id: str
    responses: tuple[int, int]
    judge: str
    probability: float | None
    """That the first of ``responses`` is the better, in [0, 1]; 0.5: a tie; None: the judge abstains."""
    orders: tuple[float | None, float | None] | None = None
    """The same probability as said with the first response shown first, and with it shown second."""
    annotator: str | None = None
    """Who said so, where the judge is ``human``."""
    hashes: tuple[str, str] | None = None
    """``text_hash`` of the two responses, so that a label cannot reach other texts than were seen."""
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class PairEvidence:
    """All that is known of two responses to one prompt before a decision, ``responses`` in increasing order."""

    prompt_id: str
    responses: tuple[int, int]
    prior: int
    """Which one the matrix prefers: 1 the first, -1 the second, 0 neither."""
    rule: str
    """Rule of the matrix that says so: human, newer, larger, newer+larger, none."""
    votes: Mapping[str, float]
    """By judge: the gap of its scores, or 2 x probability - 1 of its comparison; positive for the first response, 0 for
    a tie. A judge that abstained is absent."""
    stated: float | None = None
    """Mean probability that the first is better, of the judges that compare two responses; None: none did."""
    labels: Mapping[str, float | None]
    """By annotator: 1 the first is better, -1 the second, 0 a tie; None: the pair is bad."""
    is_same_text: bool = False
    """Both responses say the same, white space around them aside."""

    @property
    def label(self) -> float | None:
        """What people say together: the mean of their labels; None: nobody labelled it, or most call the pair bad."""
        given = [label for label in self.labels.values() if label is not None]
        return sum(given) / len(given) if 2 * len(given) > len(self.labels) else None


@dataclass(frozen=True, kw_only=True)
class ScoreMatrix:
    """All scores of a set of candidates, the rows of one prompt adjacent."""

    scores: np.ndarray
    """[R, M] float32, NaN = no score."""
    offsets: np.ndarray
    """[P+1] int64: prompt p owns the rows offsets[p] : offsets[p + 1]."""
    scorers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class PreferencePair:
    """Two responses to one prompt, the better one ``chosen``."""

    prompt: Prompt
    chosen: Response
    rejected: Response
    score_chosen: float | None
    """Consensus scores; None without evidence."""
    score_rejected: float | None
    scale: float = 1.0
    soft_label: float = 1.0
    margin: float = 0.0
    prior: str = "none"
    """Rule of the matrix that ordered the pair: human, newer, larger, newer+larger; none: the matrix gives no order."""
    decision: Decision = "keep"
    reason: str = ""
    probability: float | None = None
    """That chosen is the better, as judges or people state it; None: they say only which one."""


@dataclass(frozen=True, kw_only=True)
class PairBatch:
    """Right-padded sequences of some pairs, ready for a model; the chosen rows first, then the rejected ones."""

    input_ids: torch.Tensor
    """[S, L] int64."""
    attention_mask: torch.Tensor
    """[S, L] int64."""
    targets: torch.Tensor
    """[S, L] int64, shifted: targets[s, t] is predicted from position t; -100 outside the completion."""
    scale: torch.Tensor
    """[N] float32."""
    soft_label: torch.Tensor
    """[N] float32."""
    margin: torch.Tensor
    """[N] float32."""
    ref_logprobs: torch.Tensor | None = None
    """[S] float32 sums under the reference, nats."""


@dataclass(frozen=True, kw_only=True)
class PairLogprobs:
    """All that a preference loss may depend on. Log-probs are sums over completion tokens, in nats."""

    chosen: torch.Tensor
    """[N] under the policy."""
    rejected: torch.Tensor
    ref_chosen: torch.Tensor
    """[N] under the reference."""
    ref_rejected: torch.Tensor
    num_chosen_tokens: torch.Tensor
    """[N] completion tokens."""
    num_rejected_tokens: torch.Tensor
    soft_label: torch.Tensor | None = None
    """[N] in [0, 1]; None: 1."""
    margin: torch.Tensor | None = None
    """[N] >= 0; None: 0."""


@dataclass(frozen=True, kw_only=True)
class PreferenceOutput:
    """Result of ``preference_loss``; everything but ``loss`` is detached."""

    loss: torch.Tensor
    """Scalar: sum of scale * losses / sum of scale."""
    losses: torch.Tensor
    """[N]"""
    logprobs: torch.Tensor
    """[S] policy sums, nats."""
    ref_logprobs: torch.Tensor
    """[S]; NaN without a reference, as are the rewards."""
    num_tokens: torch.Tensor
    """[S] int64 completion tokens."""
    chosen_rewards: torch.Tensor
    """[N] beta * (policy - reference) of the chosen side."""
    rejected_rewards: torch.Tensor
    clipped: torch.Tensor
    """[N, 2] bool: chosen side, rejected side."""
