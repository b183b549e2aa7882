"""Annotation of one labels file: who sees which pair, what they answered, and their progress."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Literal, get_args

from tso_fast.annotate.agreement import Agreement, between_people, with_judges
from tso_fast.annotate.order import draw, gains_of, ordered, sides
from tso_fast.correction.beliefs import Beliefs
from tso_fast.files.labels import Label, LabelFile, Pair, make_label, standing
from tso_fast.types import Candidates

Choice = Literal["left", "right", "tie", "bad"]
CHOICES: tuple[str, ...] = get_args(Choice)

AWAY_S = 900
"""Seconds for which a pair that one annotator is looking at is not shown to others."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A pair as one annotator sees it."""

    pair: Pair
    candidates: Candidates
    shown: tuple[int, int]
    """Indices of the responses at the left and at the right."""

    @property
    def key(self) -> str:
        """Name of the pair on the page; opaque, since the index of a response reveals which model wrote it."""
        return f"{draw('key', *self.pair, *self.shown):016x}"


@dataclass(frozen=True, kw_only=True)
class View:
    """Content of an annotator's page."""

    task: Task | None
    """The pair to label; None: nothing is left for this annotator."""
    labelled: int
    """Number of pairs that anybody has labelled."""
    total: int
    own: int
    """Number of labels by this annotator."""
    people: int
    """Number of annotators with a label."""
    among_people: Agreement | None
    with_judges: Agreement | None


@dataclass
class _Seat:
    """The pair an annotator is looking at."""

    pair: Pair
    since: float


class Desk:
    """One set of pairs, one labels file, any number of annotators; safe to use from several threads.

    Args:
        overlap: share of an annotator's labels that go to pairs which others labelled too, to measure agreement; 1:
            everybody labels everything.
        max_pairs: length at which the queue is cut.
    """

    def __init__(
        self,
        beliefs: Beliefs,
        labels: LabelFile,
        *,
        seed: int = 0,
        overlap: float = 0.1,
        max_pairs: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.labels, self.seed, self.overlap, self.clock = labels, seed, overlap, clock
        self.queue = ordered(gains_of(beliefs), seed)[:max_pairs]
        self._place = {pair: place for place, pair in enumerate(self.queue)}
        self._candidates = {c.prompt.id: c for c in beliefs.candidates}
        self._votes = {(pair.prompt_id, *pair.responses): pair.votes for pair in beliefs.pairs()}
        self._seats: dict[str, _Seat] = {}
        self._mutex = threading.RLock()

    def view(self, annotator: str) -> View:
        with self._mutex:
            newest = standing(self.labels.history())
            pair = self._next(annotator, newest)
            if pair is None:
                self._seats.pop(annotator, None)
            else:
                self._seats[annotator] = _Seat(pair, self.clock())
            people = {name for _, name in newest}
            values = {key: label.value for key, label in newest.items()}
            return View(
                task=None if pair is None else self._task(pair, annotator),
                labelled=len({pair for pair, _ in newest if pair in self._place}),
                total=len(self.queue),
                own=sum(name == annotator for _, name in newest),
                people=len(people),
                among_people=between_people(values),
                with_judges=with_judges({k: v for k, v in values.items() if k[1] == annotator}, self._votes),
            )

    def label(self, annotator: str, key: str, choice: str) -> bool:
        """Writes a label to disk; returns False if ``key`` is no longer the annotator's current pair.

        This happens when a key is pressed twice or the page is open in two tabs; the label would go to a pair that the
        annotator has not seen.
        """
        if choice not in CHOICES:
            raise ValueError(f"choice: got {choice!r}, expected one of {', '.join(CHOICES)}")
        with self._mutex:
            seat = self._seats.get(annotator)
            if seat is None or (task := self._task(seat.pair, annotator)).key != key:
                return False
            left, right = task.shown
            probability = {"left": 1.0, "right": 0.0, "tie": 0.5, "bad": None}[choice]
            self.labels.append(
                make_label(
                    task.candidates,
                    (left, right),
                    annotator,
                    probability,
                    self._now(),
                    seconds=self.clock() - seat.since,
                    shown=task.shown,
                )
            )
            del self._seats[annotator]
            return True

    def undo(self, annotator: str) -> bool:
        """Withdraws the annotator's newest label and shows its pair again; returns False if there is none."""
        with self._mutex:
            own = [label for (_, name), label in standing(self.labels.history()).items() if name == annotator]
            if not own:
                return False
            oldest = datetime.min.replace(tzinfo=UTC)
            last = max(enumerate(own), key=lambda item: (item[1].time or oldest, item[0]))[1]
            self.labels.append(replace(last, time=self._now(), seconds=None, withdrawn=True))
            self._seats[annotator] = _Seat(last.pair, self.clock())
            return True

    def _now(self) -> datetime:
        """A time later than every label in the file, even if the clock was set back: the newest label counts."""
        times = [label.time for label in self.labels.history() if label.time is not None]
        now = datetime.now(UTC)
        return max(now, max(times) + timedelta(microseconds=1)) if times else now

    def _task(self, pair: Pair, annotator: str) -> Task:
        return Task(pair=pair, candidates=self._candidates[pair[0]], shown=sides(pair, annotator, self.seed))

    def _next(self, annotator: str, newest: dict[tuple[Pair, str], Label]) -> Pair | None:
        own = {pair for pair, name in newest if name == annotator}
        others = {pair for pair, name in newest if name != annotator}
        seat = self._seats.get(annotator)
        if seat is not None and seat.pair not in own:
            return seat.pair
        now = self.clock()
        looked_at = {s.pair for name, s in self._seats.items() if name != annotator and now - s.since < AWAY_S}
        fresh = (pair for pair in self.queue if pair not in own and pair not in others)
        again = min((others - own) & self._place.keys(), key=self._place.__getitem__, default=None)
        common = len(own & others)
        if again is not None and common + 1 <= self.overlap * (len(own) + 1):
            return again
        if (first := next(fresh, None)) is not None:
            return first if first not in looked_at else next((p for p in fresh if p not in looked_at), first)
        return again if common < math.ceil(self.overlap * len(self.queue)) else None
