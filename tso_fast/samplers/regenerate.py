"""Responses that go another way from a random cut, each against the one that was cut; and a replay buffer of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tso_fast.config.settings import SamplerConfig
from tso_fast.files.atomic import write_jsonl
from tso_fast.files.rows import BadRows, candidates_row, parse_candidates
from tso_fast.files.run import Iteration
from tso_fast.files.sources import read_rows
from tso_fast.models.tokens import end_of_turn, response_ids
from tso_fast.samplers.sampler import Desk, Sampled, Sampler, own_prompt
from tso_fast.seeds import seed_of
from tso_fast.types import Candidates, Response


@dataclass(frozen=True)
class Kept:
    """A pair in the buffer, and how often it was drawn."""

    pair: Candidates
    count: int = 0


class RegenerateSampler(Sampler):
    """Sampler of kind ``regenerate``: its score is 1 for a response that was cut, 0 for one that went another way."""

    takes = (
        "of", "alone", "cell", "num_generations", "temperature", "top_p", "top_k", "max_completion_length",
        "segment_tokens", "buffer_size", "draws",
    )  # fmt: skip

    def __init__(self, config: SamplerConfig) -> None:
        super().__init__(config)
        if config.draws is not None and config.buffer_size is None:
            raise ValueError("draws: it has no effect without buffer_size, from which it draws; leave it out")

    def sample(self, candidates: list[Candidates], desk: Desk) -> Sampled:
        pairs = list(self._pairs(candidates, desk))
        others = [] if self.config.alone else candidates
        if self.config.buffer_size is None:
            return Sampled([*others, *pairs], {"pairs": len(pairs)})
        file = self._file(desk.files)
        before = read_buffer(self._file(Iteration(desk.files.run, desk.files.number - 1)))
        kept = [*before, *map(Kept, pairs)][-self.config.buffer_size :]
        number = len(pairs) if self.config.draws is None else self.config.draws
        drawn = draw(kept, number, desk.config.seed, self.name, desk.files.number)
        kept = [dataclasses.replace(item, count=item.count + (i in drawn)) for i, item in enumerate(kept)]
        write_jsonl(file, ({"count": item.count, **candidates_row(item.pair)} for item in kept))
        evicted = len(before) + len(pairs) - len(kept)
        info = {"pairs": len(pairs), "in_buffer": len(kept), "evicted": evicted, "drawn": len(drawn)}
        return Sampled([*others, *(kept[i].pair for i in sorted(drawn))], info, [file])

    def _file(self, files: Iteration) -> Path:
        return files.folder / f"buffer-{self.name}.jsonl"

    def _pairs(self, candidates: Sequence[Candidates], desk: Desk) -> Iterator[Candidates]:
        asked = dataclasses.replace(desk.ask(self.config), num_generations=1)
        tokenizer = desk.matrix.tokenizer
        cut: dict[str, tuple[Candidates, Response, tuple[int, ...]]] = {}
        prompts = []
        for item, i in self._originals(candidates, desk):
            ids = response_ids(tokenizer, item.prompt, item.responses[i])
            room = len(ids) - (ids[-1] in (end_of_turn(tokenizer), tokenizer.eos_token_id))
            room = min(room, asked.sampling.max_tokens - 1)
            for k in range(self.config.num_generations if room > 0 else 0):
                name = f"{self.name}-{desk.files.number}-{k}"
                at = seed_of(desk.config.seed, item.prompt.id, name, "cut") % room
                prompt = own_prompt(item.prompt, name, prefix=ids[:at])
                prompts.append(Candidates(prompt=prompt, responses=()))
                cut[prompt.id] = item, item.responses[i], ids
        for answered in desk.answer(asked, prompts, self.name):
            item, original, ids = cut[answered.prompt.id]
            (tail,) = answered.responses
            spliced = self._spliced(ids, len(answered.prompt.prefix), tail.token_ids or ())
            other = dataclasses.replace(
                tail,
                model=self.name,
                text=tokenizer.decode(list(spliced), skip_special_tokens=True),
                token_ids=spliced,
                logprob=None,
                scores={self.name: 0.0},
            )
            original = dataclasses.replace(original, scores={**original.scores, self.name: 1.0})
            prompt = dataclasses.replace(answered.prompt, prefix=())
            yield Candidates(prompt=prompt, responses=(original, other))

    def _originals(self, candidates: Sequence[Candidates], desk: Desk) -> Iterator[tuple[Candidates, int]]:
        """The best response of each prompt, among those that it works on."""
        worked_on = desk.played(candidates, self.config.of)
        is_free = any(len(numbers) > 1 for numbers in worked_on)
        scores = desk.scores(candidates) if is_free else None
        for p, (item, numbers) in enumerate(zip(candidates, worked_on, strict=True)):
            if numbers and scores is None:
                yield item, numbers[0]
            elif numbers and scores is not None:
                known = [-math.inf if score is None else score for score in scores[p]]
                yield item, max(numbers, key=known.__getitem__)

    def _spliced(self, ids: tuple[int, ...], at: int, tail: tuple[int, ...]) -> tuple[int, ...]:
        """The cut response with another tail, or with another segment after which it goes on."""
        most = self.config.segment_tokens
        return ids[:at] + tail if most is None or len(tail) <= most else ids[:at] + tail[:most] + ids[at + most :]


def read_buffer(file: Path) -> list[Kept]:
    """The buffer that an iteration left, oldest first; none if the iteration did not leave one."""
    if not file.exists():
        return []
    return [Kept(parse_candidates(row, where, ""), row["count"]) for where, row in read_rows(file, BadRows())]


def draw(kept: Sequence[Kept], number: int, seed: int, *names: object) -> set[int]:
    """Draws without replacement, each time with probabilities in proportion to 1 / (count + 1).

    Every item has a key log(u) (count + 1) with a u of its own, and the largest keys win (Efraimidis and Spirakis
    2006): what is drawn does not depend on an order of drawing.
    """
    uniform = [(seed_of(seed, *names, item.pair.prompt.id) + 1) / 2**63 for item in kept]
    keys = [math.log(u) * (item.count + 1) for u, item in zip(uniform, kept, strict=True)]
    return set(sorted(range(len(kept)), key=lambda i: (-keys[i], i))[:number])
