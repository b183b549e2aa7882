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
"""The ``model`` of a response written by a person, and the ``judge`` of a human label."""

Decision = Literal["keep", "swap", "drop"]
FinishReason = Literal["stop", "length"]
TopLogprobs = tuple[tuple[int | str, float], ...]
"""Tokens and their log-probs under the model's own distribution (temperature 1, no filter), nats, likeliest first.
A token is given by its id, or by its text if a server reports no ids."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a conversation: ``Message(role="user", content="What is 2 plus 3?")``."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class Constraint:
    """A property of a response that a program can check: ``Constraint(id="detectable_format:title")``.

    ``Constraint(id="length_constraints:number_words", kwargs={"relation": "at least", "num_words": 300})``
    """

    id: str
    """Kind of constraint, a key of ``judges.constraints.TYPES``."""
    kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One task: ``Prompt(id="q1", prompt="What is 2 plus 3?", answer="5")``."""

    id: str
    prompt: str | tuple[Message, ...]
    human_responses: tuple[str, ...] = ()
    answer: str | None = None
    constraints: tuple[Constraint, ...] = ()
    prefix: tuple[int, ...] = ()
    """Token ids of the beginning of a response that is given: responses go on from there. Their ``token_ids`` come
    after it, their ``text`` is whole."""
    where: str = ""
    """Source as ``file:line``; empty: made in memory."""

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
    """Sampled tokens, end-of-sequence token included; None: only the text is known."""
    finish_reason: FinishReason | None = None
    seed: int | None = None
    weight_hash: str | None = None
    logprob: float | None = None
    """Log-prob of ``token_ids`` under the sampling distribution, nats; not a policy log-prob."""
    top_logprobs: TopLogprobs | None = None
    """Likeliest first tokens, if a judge requested them; never written to files."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Scores that came with the data, by scorer."""
    is_correct: bool | None = None
    """Correctness according to the data; never used as evidence, only to measure errors (``oracle``)."""

    @property
    def is_human(self) -> bool:
        return self.model == HUMAN


class Weights(NamedTuple):
    """Folders of a model: a LoRA adapter and its base model, or the same folder of full weights twice."""

    path: Path
    base: Path


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One model of the matrix: ``Cell(name="m.v3", path=..., base=..., size_b=0.0008, version_rank=3, ...)``."""

    name: str
    path: Path
    """Folder of the full weights or of a LoRA adapter."""
    base: Path
    """Folder of the full weights: ``path`` itself, or the adapter's base model."""
    size_b: float
    version_rank: int
    weight_hash: str
    """First 16 hex digits of the sha256 over the weight files; for an adapter, those of its base too."""
    architecture: str
    """Hash of the base's config.json; full weights of the same architecture can share an engine."""
    context: int | None
    """Maximum number of tokens in prompt and response together; None: no known limit."""
    lora_rank: int | None = None
    """Rank of an adapter; None: full weights."""
    has_weights: bool = True
    """False: only a server has the weights; ``weight_hash`` is then a hash of the server's name for them."""

    @property
    def is_adapter(self) -> bool:
        return self.path != self.base

    @property
    def weights(self) -> Weights:
        return Weights(self.path, self.base)


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """A prompt and all responses to it, in the order of the indices in ``Verdict.response``."""

    prompt: Prompt
    responses: tuple[Response, ...]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One judge's score of one response: ``Verdict(prompt_id="q1", response=0, judge="exact", score=1.0)``."""

    prompt_id: str
    response: int
    judge: str
    score: float | None
    """Higher is better; None: the judge abstains."""
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One judge's comparison of two responses to one prompt.

    ``Comparison(prompt_id="q1", responses=(0, 2), judge="llm", probability=0.9, orders=(0.95, 0.85))``
    """

    prompt_id: str
    responses: tuple[int, int]
    judge: str
    probability: float | None
    """Probability that the first of ``responses`` is better, in [0, 1]; 0.5: a tie; None: the judge abstains."""
    orders: tuple[float | None, float | None] | None = None
    """The same probability when the first response is shown first, and when it is shown second."""
    annotator: str | None = None
    """Name of the annotator, if the judge is ``human``."""
    hashes: tuple[str, str] | None = None
    """``text_hash`` of the two responses, so that a label cannot be applied to texts the annotator did not see."""
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class PairEvidence:
    """All evidence on two responses to one prompt before a decision; ``responses`` are in increasing order."""

    prompt_id: str
    responses: tuple[int, int]
    prior: int
    """Response that the matrix prefers: 1: the first, -1: the second, 0: neither."""
    rule: str
    """Rule of the matrix behind ``prior``: human, newer, larger, newer+larger, none."""
    votes: Mapping[str, float]
    """Vote of each judge: the gap of its scores, or 2 x probability - 1 of its comparison; positive for the first
    response, 0 for a tie. Judges that abstained are absent."""
    stated: float | None = None
    """Mean probability that the first is better, over the judges that compare responses; None: no judge did."""
    labels: Mapping[str, float | None]
    """Label of each annotator: 1: the first is better, -1: the second is, 0: a tie; None: the pair is bad."""
    is_same_text: bool = False
    """Whether both responses have the same text, apart from surrounding white space."""


@dataclass(frozen=True, kw_only=True)
class ScoreMatrix:
    """All scores of a set of candidates, the rows of one prompt adjacent."""

    scores: np.ndarray
    """[R, M] float32, NaN = no score."""
    offsets: np.ndarray
    """[P+1] int64; prompt p owns the rows offsets[p] : offsets[p + 1]."""
    scorers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class PreferencePair:
    """Two responses to one prompt, the better one ``chosen``."""

    prompt: Prompt
    chosen: Response
    rejected: Response
    score_chosen: float | None
    """Consensus score of the chosen response; None: no evidence."""
    score_rejected: float | None
    scale: float = 1.0
    soft_label: float = 1.0
    margin: float = 0.0
    prior: str = "none"
    """Rule of the matrix that ordered the pair: human, newer, larger, newer+larger; none: no prior order."""
    decision: Decision = "keep"
    reason: str = ""
    probability: float | None = None
    """Probability that chosen is better, as stated by judges or people; None: they give only the order."""
    win_rates: tuple[float, float] | None = None
    """Win rates of the chosen and the rejected response over the prompt's responses; None: they are not asked for."""
    extra: tuple[Response, ...] = ()
    """Further responses to the prompt that the loss uses beside the two."""


@dataclass(frozen=True, kw_only=True)
class PairBatch:
    """Some pairs, ready for a model: their distinct sequences in rows, and which of them are pairs."""

    layout: Any
    """``models.layout.Layout`` of the S sequences."""
    pairs: torch.Tensor
    """[N, 2 + E] int64: the sequences that are the chosen and the rejected response of each pair, and its further
    ones."""
    scale: torch.Tensor
    """[N] float32."""
    soft_label: torch.Tensor
    """[N] float32."""
    margin: torch.Tensor
    """[N] float32."""
    ref_logprobs: torch.Tensor | None = None
    """[S] float32 sums under the reference, nats."""
    ref_token_logprobs: torch.Tensor | None = None
    """Like the layout's targets, float32: log-probs of the targets under the reference, instead of their sums; anything
    where ignored."""
    ref2_logprobs: torch.Tensor | None = None
    """[S] float32 sums under a second reference, nats."""
    win_rates: torch.Tensor | None = None
    """[N, 2] float32 in [0, 1], of the chosen and the rejected response."""
    token_values: torch.Tensor | None = None
    """Like the layout's targets, float32: numbers whose meaning is the loss's; 0 where ignored."""

    @property
    def sides(self) -> torch.Tensor:
        """[(2 + E) N] int64: the sequences of all chosen responses, of all rejected ones, then of all further ones."""
        return self.pairs.T.reshape(-1)


@dataclass(frozen=True, kw_only=True)
class PairLogprobs:
    """All inputs that a preference loss may use. Log-probs are sums over completion tokens, in nats."""

    chosen: torch.Tensor
    """[N] log-probs under the policy."""
    rejected: torch.Tensor
    ref_chosen: torch.Tensor
    """[N] log-probs under the reference."""
    ref_rejected: torch.Tensor
    num_chosen_tokens: torch.Tensor
    """[N] numbers of completion tokens."""
    num_rejected_tokens: torch.Tensor
    soft_label: torch.Tensor | None = None
    """[N] in [0, 1]; None: 1."""
    margin: torch.Tensor | None = None
    """[N] >= 0; None: 0."""
    win_rates: torch.Tensor | None = None
    """[N, 2] in [0, 1]: how often the chosen and the rejected response win against the samples of their prompt."""
    ref2_chosen: torch.Tensor | None = None
    """[N] log-probs under a second reference."""
    ref2_rejected: torch.Tensor | None = None
    extra: torch.Tensor | None = None
    """[N, E] log-probs of further sequences of a pair under the policy; their meaning is the loss's."""
    ref_extra: torch.Tensor | None = None
    num_extra_tokens: torch.Tensor | None = None
    chosen_terms: torch.Tensor | None = None
    """[N] sums over completion tokens of the loss's ``token_term``."""
    rejected_terms: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """All inputs that the term of a token may use, for R tokens, nats."""

    logprobs: torch.Tensor
    """[R] under the policy."""
    ref_logprobs: torch.Tensor | None
    """[R] under the reference; None: the loss needs none and none is given."""
    values: torch.Tensor | None
    """[R] detached numbers whose meaning is the loss's: marks, rewards."""


@dataclass(frozen=True, kw_only=True)
class PreferenceOutput:
    """Result of ``preference_loss``; everything but ``loss`` is detached."""

    loss: torch.Tensor
    """Scalar: sum of scale * losses / sum of scale."""
    losses: torch.Tensor
    """[N]"""
    logprobs: torch.Tensor
    """[S] log-probs of sequences under the policy, nats."""
    ref_logprobs: torch.Tensor
    """[S] the same under the reference; without a reference NaN, as are the rewards."""
    num_tokens: torch.Tensor
    """[S] int64 numbers of completion tokens."""
    chosen_rewards: torch.Tensor
    """[N] beta * (policy - reference) of the chosen side."""
    rejected_rewards: torch.Tensor
    clipped: torch.Tensor
    """[N, 2] bool: whether the chosen and the rejected side are clipped."""


@dataclass(frozen=True, kw_only=True)
class BalancedOutput(PreferenceOutput):
    """What a ``Policy`` whose experts are balanced returns: the loss with the auxiliary one in it, and that one."""

    aux_loss: torch.Tensor
    """Scalar: how unevenly the experts were used; at least the number that a token goes to."""
