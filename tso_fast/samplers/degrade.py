"""Copies of a response that lack more and more of its words, so that their order is known without a judge."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tso_fast.config.settings import SamplerConfig
from tso_fast.samplers.sampler import Desk, Sampled, Sampler, made
from tso_fast.seeds import seed_of
from tso_fast.types import Candidates, Response

RATIOS = (0.25, 0.5, 0.75)


class DegradeSampler(Sampler):
    """Sampler of kind ``degrade``: its score of a response is 0 where it is whole, and one less for each ratio.

    The words that the fewest responses of the mini-batch have go first, as they are most likely what it is about; what
    one copy lacks, those of larger ratios lack too.
    """

    takes = ("of", "ratios")

    def __init__(self, config: SamplerConfig) -> None:
        super().__init__(config)
        self.ratios = sorted(config.ratios or RATIOS)

    def sample(self, candidates: list[Candidates], desk: Desk) -> Sampled:
        texts = (response.text for item in candidates for response in item.responses)
        frequency = Counter(word for text in texts for word in set(text.split()))
        out = [
            self._with_copies(item, numbers, frequency)
            for item, numbers in zip(candidates, desk.played(candidates, self.config.of), strict=True)
        ]
        added = sum(len(a.responses) - len(b.responses) for a, b in zip(out, candidates, strict=True))
        return Sampled(out, {"responses": added})

    def _with_copies(self, item: Candidates, numbers: Sequence[int], frequency: Mapping[str, int]) -> Candidates:
        responses, copies = list(item.responses), list[Response]()
        for i in numbers:
            whole = responses[i]
            responses[i] = dataclasses.replace(whole, scores={**whole.scores, self.name: 0.0})
            for level, text in self._degraded(whole.text, frequency):
                copies.append(made(whole, self.name, len(copies), text=text, scores={self.name: -float(level)}))
        return dataclasses.replace(item, responses=(*responses, *copies))

    def _degraded(self, text: str, frequency: Mapping[str, int]) -> list[tuple[int, str]]:
        """Levels and texts; a level that would lack no word more than the one before, or all of them, is left out."""
        words = re.findall(r"\s*\S+", text)

        def rank(k: int) -> Any:
            return frequency[words[k].strip()], seed_of(self.name, text, k)

        order, levels, before = sorted(range(len(words)), key=rank), [], 0
        for level, ratio in enumerate(self.ratios, start=1):
            count = min(math.ceil(ratio * len(words)), len(words) - 1)
            if count > before:
                kept = "".join(words[k] for k in sorted(order[count:]))
                levels.append((level, kept if text[:1].isspace() else kept.lstrip()))
                before = count
        return levels
