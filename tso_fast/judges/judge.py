"""What every judge is, what it works with, and what it gives back."""

from __future__ import annotations

import dataclasses
import itertools
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from tso_fast.config.settings import AnsweringConfig, JudgeConfig, judge_name
from tso_fast.files.rows import BadRows
from tso_fast.types import Candidates, Comparison, Verdict

if TYPE_CHECKING:
    from tso_fast.executors.warm import WarmExecutor
    from tso_fast.files.responses import ResponseStore
    from tso_fast.matrix import ModelMatrix

MIN_DECIDED, MAX_DISAGREEMENT = 50, 0.3
"""A warning is due where, of so many comparisons or more, a greater share contradicts itself between the orders. It is
a half of a judge that tosses a coin, and all of one that always says A."""


class Opinion(NamedTuple):
    """What a judge says of one response."""

    score: float | None
    """Higher is better; None: the judge abstains."""
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a judge that is a model was asked, what it took, and how far it is to be trusted."""

    judge: str
    results: int
    """Comparisons or verdicts, abstentions included."""
    abstentions: int = 0
    requests: int = 0
    """Generations, the judge's own answers included; identical ones count once."""
    new_requests: int = 0
    """Requests that were not in the store before."""
    prompt_tokens: int = 0
    """Tokens of the requests that were answered."""
    completion_tokens: int = 0
    refused: int = 0
    """Requests that the engine did not take, such as prompts beyond the context."""
    unread: int = 0
    """Replies from which nothing could be told."""
    decided: int = 0
    """Comparisons in which each order prefers one of the two."""
    disagreements: int = 0
    """Decided comparisons in which the orders prefer different responses; they are ties."""
    first_shown: int = 0
    """How many of the ``2 * decided`` orders prefer the response shown first."""

    @property
    def disagreement(self) -> float | None:
        """Share of the decided comparisons that contradict themselves."""
        return self.disagreements / self.decided if self.decided else None

    @property
    def first_shown_share(self) -> float | None:
        """Share of the orders that prefer the response shown first: 0.5 without position bias."""
        return self.first_shown / (2 * self.decided) if self.decided else None

    @property
    def bias(self) -> str | None:
        """A warning, where one is due."""
        if self.decided < MIN_DECIDED or (self.disagreement or 0) <= MAX_DISAGREEMENT:
            return None
        contradicts, first = 100 * (self.disagreement or 0), 100 * (self.first_shown_share or 0)
        return (
            f"judge {self.judge} contradicts itself between the two orders in {self.disagreements} of "
            f"{self.decided} decided comparisons ({contradicts:.0f} %), which count as ties; it prefers the "
            f"response shown first in {first:.0f} % of its replies. Expected: a judge whose word does not depend "
            "on the order; use a stronger model or another template"
        )

    def to_dict(self) -> dict[str, Any]:
        """The row of ``costs`` in run.json."""
        derived = {name: getattr(self, name) for name in ("disagreement", "first_shown_share", "bias")}
        return {**dataclasses.asdict(self), **derived}


class Judged(NamedTuple):
    """What a judge gives back: ``Judged([Verdict(prompt_id="q1", response=0, judge="exact", score=1.0)])``."""

    verdicts: Sequence[Verdict | Comparison]
    cost: Cost | None = None
    """None: the judge asks no model."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What judges work with: ``Bench(bad=BadRows())`` is enough for programs."""

    bad: BadRows
    """Where a prompt goes that a judge cannot use."""
    settings: AnsweringConfig | None = None
    """The run's engines, seed, and length of an answer; None, as in ``tso-fast pairs``: models are not run."""
    store: ResponseStore | None = None
    """Where the replies of models are kept; None together with ``settings``."""
    matrix: ModelMatrix | None = None
    """The cells of the run; None: there are none, and a model is the judge's own."""
    executor: WarmExecutor | None = None
    """Keeps engines open from one question to the next; None: a judge that asks opens its own."""
    advance: Callable[[int], None] = lambda count: None
    """Is told how many more of ``Judge.num_steps`` are done."""
    impl: str = "auto"
    """Implementation of the log-prob op."""
    keep: Callable[[Candidates], None] = lambda judgments: None
    """Is given the judgments that may become pairs: a question as it was asked, with the replies to it."""
    labelled: Sequence[tuple[Path, Path]] = ()
    """Files of responses and of human labels on them, from earlier iterations of the run."""


class Judge(Protocol):
    """Looks at candidates and gives verdicts on one or two responses.

    A judge of your own is a class in a module on PYTHONPATH, with ``kind: mine:Shortest`` in the settings. What it does
    not say itself it inherits::

        class Shortest(Judge):
            def judge(self, candidates, bench):
                found = []
                for item in candidates:
                    found += as_verdicts(item, self.name, [Opinion(-len(r.text)) for r in item.responses])
                return Judged(found)

    Its constructor gets the ``JudgeConfig``, and the setting ``args`` as keyword arguments.
    """

    takes: ClassVar[tuple[str, ...]] = ("args",)
    """Fields of ``JudgeConfig`` that it reads, beside ``kind`` and ``name``; any other one is refused."""
    needs_models: ClassVar[bool] = False
    """Whether it generates or loads weights, so that it needs ``Bench.settings`` and ``Bench.store``."""
    shares_engines: ClassVar[bool] = False
    """Whether all that its models do is answering, through ``Bench.executor``; for others, engines that wait make room.
    """
    config: JudgeConfig
    name: str
    """Its name in verdicts, files and tables."""

    def __init__(self, config: JudgeConfig) -> None:
        """Does no work yet.

        Raises:
            ValueError: a setting that cannot be; the message starts with the field, ``cell: got ...``.
        """
        self.config = config
        self.name = judge_name(config)

    def check(self, matrix: ModelMatrix | None) -> None:
        """Called before anything is generated; raises InputError where a cell or model cannot be used."""
        return None  # not abstract: a program has nothing to look at

    def inputs(self, matrix: ModelMatrix) -> dict[str, str]:
        """Hashes of the weights and files that it reads, by the setting that names them; a run goes on with the same.

        The weights of the run's cells are not among them.
        """
        return {}

    def usable(self, candidates: Sequence[Candidates], bad: BadRows) -> list[Candidates]:
        """The candidates whose prompt it can judge; the others are bad rows."""
        return list(candidates)

    def num_steps(self, candidates: Sequence[Candidates]) -> int:
        """What ``Bench.advance`` is told in all; 0: it takes no time worth showing."""
        return 0

    @abstractmethod
    def judge(self, candidates: Sequence[Candidates], bench: Bench) -> Judged:
        """Verdicts under its name. Where it cannot tell it abstains; it never guesses."""
        ...


def as_comparisons(item: Candidates, name: str, tell: Callable[[int, int], Opinion]) -> list[Comparison]:
    """Every two responses of a prompt compared.

    Args:
        tell: of two responses by their numbers, the probability that the first is better.
    """
    return [
        Comparison(prompt_id=item.prompt.id, responses=pair, judge=name, probability=told.score, reason=told.reason)
        for pair in itertools.combinations(range(len(item.responses)), 2)
        for told in [tell(*pair)]
    ]


def as_verdicts(item: Candidates, name: str, opinions: Sequence[Opinion]) -> list[Verdict]:
    """One opinion on each response of a prompt, as verdicts."""
    assert len(opinions) == len(item.responses)
    return [
        Verdict(prompt_id=item.prompt.id, response=i, judge=name, score=opinion.score, reason=opinion.reason)
        for i, opinion in enumerate(opinions)
    ]
