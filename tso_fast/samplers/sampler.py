"""What every sampler is, what it works with, and what it gives back."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Protocol

from tso_fast.answering import Asked, answer, ask
from tso_fast.config.settings import CellConfig, SamplerConfig, TrainConfig, sampler_name
from tso_fast.correction.pairing import plays
from tso_fast.errors import InputError, did_you_mean
from tso_fast.executors.warm import WarmExecutor
from tso_fast.files.responses import ResponseStore
from tso_fast.files.rows import BadRows
from tso_fast.files.run import Iteration
from tso_fast.judges import panel
from tso_fast.judges.judge import Bench, Judge
from tso_fast.matrix import ModelMatrix, open_cell
from tso_fast.progress import progress_bar
from tso_fast.types import Candidates, Cell, Prompt, Response, Verdict, Weights

REFERENCE = "reference"
"""What samplers call the iteration's reference policy."""


class Sampled(NamedTuple):
    """What a sampler gives back: the candidates that the iteration goes on with, and what is noted of its work."""

    candidates: list[Candidates]
    info: Mapping[str, Any] = MappingProxyType({})
    """Goes into run.json, the output and the report."""
    files: Sequence[Path] = ()
    """What it wrote in the iteration's folder for the next one; it counts once the stage is complete."""


@dataclass(frozen=True, kw_only=True)
class Desk:
    """What samplers work with."""

    config: TrainConfig
    """The settings of the iteration."""
    matrix: ModelMatrix
    store: ResponseStore
    judges: Sequence[Judge]
    """The judges of the run."""
    files: Iteration
    """Where the iteration keeps its files."""
    reference: Weights | None = None
    """The iteration's reference policy; None: the policy as it is."""
    executor: WarmExecutor | None = None
    """Keeps engines open between the samplers' questions; None: each opens its own."""
    sampled: Counter[str] = field(default_factory=Counter)
    """Number of ``tokens`` of the responses that samplers asked for, those that were in the store too."""
    bad: BadRows = field(default_factory=lambda: BadRows("skip"))
    """Where a prompt goes that an engine refused: one that a sampler wrote may exceed the context."""

    def ask(self, config: SamplerConfig) -> Asked:
        """How a sampler's cell answers: like in the loop, by the sampler's own settings where it has some."""
        cell = self.cell(config.cell or "policy")
        asked = ask(cell, self.config, self.matrix.configs.get(cell.name), config.num_generations)
        own: dict[str, Any] = {
            "temperature": config.temperature,
            "top_p": config.top_p,
            "top_k": config.top_k,
            "max_tokens": config.max_completion_length,
        }
        own = {name: value for name, value in own.items() if value is not None}
        sampling = dataclasses.replace(asked.sampling, **own)
        if sampling.temperature == 0:
            sampling = dataclasses.replace(sampling, top_p=1.0, top_k=0)
        return dataclasses.replace(asked, sampling=sampling)

    def cell(self, name: str) -> Cell:
        """A cell of the matrix, ``policy``, or ``reference``."""
        if name == REFERENCE:
            return self._reference
        return self.matrix.named[name]

    @functools.cached_property
    def _reference(self) -> Cell:
        policy = self.matrix.policy
        if self.reference is None or self.reference == policy.weights:
            return policy
        path, base = map(str, self.reference)
        config = CellConfig(path=path, base=None if path == base else base, name=REFERENCE, size_b=policy.size_b)
        return dataclasses.replace(open_cell(config, REFERENCE), version_rank=policy.version_rank)

    def played(self, candidates: Sequence[Candidates], roles: Sequence[str] | None) -> list[list[int]]:
        """Numbers of the responses that play one of the roles, prompt by prompt.

        Args:
            roles: as in ``chosen_from``, and ``policy``; None: ``human`` where there are any, else ``policy``.
        """
        if roles is None:
            human, own = self.played(candidates, ["human"]), self.played(candidates, ["policy"])
            return [of_people or of_model for of_people, of_model in zip(human, own, strict=True)]
        names = [self.matrix.policy.name if role == "policy" else role for role in roles]
        is_played = iter(plays(candidates, names).tolist())
        return [[i for i in range(len(item.responses)) if next(is_played)] for item in candidates]

    def progress(self, what: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Shows progress over so many responses; yields ``advance(n)``."""
        return progress_bar(f"iteration {self.files.number}: {what}", total)

    def answer(
        self,
        asked: Asked,
        prompts: Sequence[Candidates],
        title: str,
        advance: Callable[[int], None] | None = None,
    ) -> list[Candidates]:
        """The prompts with the cell's responses, from the store or generated; those that an engine refuses are left
        out, and are in ``bad``.

        Args:
            title: of the progress that is shown.
            advance: is told how many responses there are more, instead.
        """
        if advance is None:
            with self.progress(title, len(prompts) * asked.num_generations) as shown:
                return self.answer(asked, prompts, title, shown)
        found = answer([asked], prompts, self.matrix, self.config, self.store, self.bad, advance, self.executor)
        answered = list(found)
        self.sampled["tokens"] += sum(len(r.token_ids or ()) for item in answered for r in item.responses)
        return answered

    def scores(self, candidates: Sequence[Candidates]) -> list[list[float | None]]:
        """What the run's judges of single responses say of each response, on average; None: all of them abstain."""
        bench = Bench(
            bad=BadRows("skip"),
            settings=self.config,
            store=self.store,
            matrix=self.matrix,
            executor=self.executor,
            impl=self.config.impl,
        )
        verdicts, _ = panel.ask(self.judges, candidates, bench)
        told: dict[tuple[str, int], list[float]] = defaultdict(list)
        for verdict in verdicts:
            if isinstance(verdict, Verdict) and verdict.score is not None:
                told[verdict.prompt_id, verdict.response].append(verdict.score)
        return [
            [sum(own) / len(own) if (own := told[item.prompt.id, i]) else None for i in range(len(item.responses))]
            for item in candidates
        ]


class Sampler(Protocol):
    """Adds responses to candidates, or candidates with prompts of their own.

    A sampler of your own is a class in a module on PYTHONPATH, with ``kind: mine:Shouting`` in the settings. What it
    does not say itself it inherits::

        class Shouting(Sampler):
            def sample(self, candidates, desk):
                return Sampled([with_responses(item, [self.made(r, r.text.upper()) for r in item.responses])
                                for item in candidates])

    Its constructor gets the ``SamplerConfig``, and the setting ``args`` as keyword arguments. Whatever it generates it
    asks of the desk, and every choice takes its seed from names (``seeds.py``): an interrupted stage is done again, and
    must come out the same.
    """

    takes: ClassVar[tuple[str, ...]] = ("args",)
    """Fields of ``SamplerConfig`` that it reads, beside ``kind`` and ``name``; any other one is refused."""
    config: SamplerConfig
    name: str
    """Its name in files and tables, and the ``model`` of its responses."""

    def __init__(self, config: SamplerConfig) -> None:
        """Does no work yet.

        Raises:
            ValueError: a setting that cannot be; the message starts with the field, ``ratios: got ...``.
        """
        self.config = config
        self.name = sampler_name(config)

    def inputs(self) -> dict[str, str]:
        """Hashes of the files that it reads, by the setting that names them; a run goes on with the same."""
        return {}

    def check(self, matrix: ModelMatrix, judges: Sequence[Judge]) -> None:
        """Called before anything is generated; raises InputError where a cell or the judges cannot be used."""
        if self.config.cell == REFERENCE and REFERENCE in matrix.named:
            raise InputError(
                f"sampler {self.name}: cell: a cell is called {REFERENCE!r} too, which is the iteration's reference; "
                "set another name"
            )
        known = {REFERENCE, *matrix.named}
        if self.config.cell is not None and self.config.cell not in known:
            raise InputError(
                f"sampler {self.name}: cell: no cell is called {self.config.cell!r}"
                f"{did_you_mean(self.config.cell, known)}; expected one of {', '.join(sorted(known))}"
            )

    def settle(self, mini_batch: Sequence[Candidates], desk: Desk) -> tuple[TrainConfig, dict[str, Any]]:
        """Called before the cells answer: the settings that the iteration goes on with, and what is noted of them."""
        return desk.config, {}

    def sample(self, candidates: list[Candidates], desk: Desk) -> Sampled:
        """The candidates with what it adds; called after the cells, and the samplers before it, have answered."""
        return Sampled(candidates)


def own_prompt(origin: Prompt, name: str, /, **changes: Any) -> Prompt:
    """A prompt of a sampler's own, made of another one; ``name`` tells it from others of that prompt."""
    return dataclasses.replace(origin, id=f"{origin.id}/{name}", human_responses=(), **changes)


def made(response: Response, name: str, sample: int, **changes: Any) -> Response:
    """A sampler's own response in the place of another one in the matrix: size and version are the same."""
    unknown = dict.fromkeys(("token_ids", "finish_reason", "seed", "weight_hash", "logprob", "is_correct"))
    return dataclasses.replace(response, **{**unknown, "model": name, "sample": sample, "scores": {}, **changes})
