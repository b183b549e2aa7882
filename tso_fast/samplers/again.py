"""One more answer of a cell, by settings of its own."""

from __future__ import annotations

import dataclasses

from tso_fast.samplers.sampler import Desk, Sampled, Sampler
from tso_fast.types import Candidates


class AgainSampler(Sampler):
    """Sampler of kind ``again``: a cell answers every prompt by the sampler's settings, such as greedily.

    Its responses are those of the sampler, so that ``extra_from``, ``chosen_from`` and ``rejected_from`` can name them.
    """

    takes = ("cell", "num_generations", "temperature", "top_p", "top_k", "max_completion_length")

    def sample(self, candidates: list[Candidates], desk: Desk) -> Sampled:
        bare = [dataclasses.replace(item, responses=()) for item in candidates]
        answered = {item.prompt.id: item.responses for item in desk.answer(desk.ask(self.config), bare, self.name)}
        out = []
        for item in candidates:
            own = [dataclasses.replace(response, model=self.name) for response in answered.get(item.prompt.id, ())]
            if own:
                out.append(dataclasses.replace(item, responses=(*item.responses, *own)))
        return Sampled(out, {"responses": sum(map(len, answered.values()))})
