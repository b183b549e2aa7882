"""Second answers: a cell reads a response, and perhaps a better one, and writes it anew."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tso_fast.config.settings import SamplerConfig
from tso_fast.errors import InputError
from tso_fast.judges import template as templates
from tso_fast.judges.template import Template
from tso_fast.samplers.sampler import Desk, Sampled, Sampler, own_prompt
from tso_fast.types import Candidates, Prompt, Response

FOLDER = Path(__file__).parent / "templates"
EXPECTED = "{prompt} and {response}; {better} besides where it is wanted"


@dataclass(frozen=True)
class _Revision:
    number: int
    """Which of the candidates."""
    response: int
    """Which of their responses is revised."""
    prompt: Prompt
    """What is asked."""


class ReviseSampler(Sampler):
    """Sampler of kind ``revise``."""

    takes = (
        "of", "alone", "template", "better", "into", "scored", "cell", "num_generations", "temperature", "top_p",
        "top_k", "max_completion_length",
    )  # fmt: skip

    def __init__(self, config: SamplerConfig) -> None:
        super().__init__(config)
        text, where = templates.read(config.template, FOLDER)
        found = templates.placeholders_of(text, ("prompt", "response", "better"), EXPECTED, where)
        if not {"prompt", "response"} <= set(found):
            raise InputError(f"{where}: it lacks {{prompt}} or {{response}}; expected {EXPECTED}")
        if config.better is not None and "better" not in found:
            raise InputError(f"better: it has no effect, as {where} has no {{better}}; leave it out")
        if config.scored and config.into == "revision":
            raise InputError("scored: it has no effect with into 'revision', which leaves the first answer out")
        if config.alone and config.into == "prompt":
            raise InputError("alone: it has no effect with into 'prompt', which adds no candidates; leave it out")
        self.template = Template(text=text.strip(), placeholders=frozenset(found))

    def inputs(self) -> dict[str, str]:
        return templates.inputs(self.config.template, FOLDER)

    def sample(self, candidates: list[Candidates], desk: Desk) -> Sampled:
        revisions = list(self._revisions(candidates, desk))
        asked = [Candidates(prompt=revision.prompt, responses=()) for revision in revisions]
        answered = {item.prompt.id: item.responses for item in desk.answer(desk.ask(self.config), asked, self.name)}
        out, added = [] if self.config.alone else list(candidates), list[Candidates]()
        for revision in revisions:
            seconds = answered.get(revision.prompt.id)
            if not seconds:
                continue
            if self.config.into == "revision":
                own = [dataclasses.replace(r, model=self.name) for r in seconds]
                added.append(Candidates(prompt=revision.prompt, responses=tuple(own)))
            elif self.config.into == "pair":
                first = candidates[revision.number]
                alone = dataclasses.replace(first, responses=(first.responses[revision.response],))
                pair = self._joined(alone, 0, seconds)
                prompt = own_prompt(first.prompt, f"{self.name}-{revision.response}")
                added.append(dataclasses.replace(pair, prompt=prompt))
            else:
                out[revision.number] = self._joined(out[revision.number], revision.response, seconds)
        count = sum(map(len, answered.values()))
        return Sampled([*out, *added], {"revised": len(answered), "responses": count})

    def _joined(self, item: Candidates, number: int, seconds: Sequence[Response]) -> Candidates:
        """The candidates with second answers to the response of that number."""
        responses = list(item.responses)
        start = sum(response.model == self.name for response in responses)
        scores = {self.name: 1.0} if self.config.scored else {}
        if self.config.scored:
            first = responses[number]
            responses[number] = dataclasses.replace(first, scores={**first.scores, self.name: 0.0})
        for k, second in enumerate(seconds, start=start):
            responses.append(dataclasses.replace(second, model=self.name, sample=k, scores=scores))
        return dataclasses.replace(item, responses=tuple(responses))

    def _revisions(self, candidates: Sequence[Candidates], desk: Desk) -> Iterator[_Revision]:
        worked_on = desk.played(candidates, self.config.of or ["policy"])
        needs_better = "better" in self.template.placeholders
        betters = desk.played(candidates, self.config.better) if needs_better else [[] for _ in candidates]
        scores = desk.scores(candidates) if needs_better else [[] for _ in candidates]
        for number, (item, own, better, scores_R) in enumerate(
            zip(candidates, worked_on, betters, scores, strict=True)
        ):
            best = max(better, key=lambda i: _known(scores_R[i]), default=None)
            if needs_better and best is None:
                continue
            for i in own:
                if best is not None and not _is_worse(item, scores_R, i, best):
                    continue
                text = self.template.render(
                    prompt=item.prompt.text,
                    response=item.responses[i].text,
                    better="" if best is None else item.responses[best].text,
                )
                yield _Revision(number, i, own_prompt(item.prompt, f"{self.name}-{i}", prompt=text))


def _known(score: float | None) -> float:
    return float("-inf") if score is None else score


def _is_worse(item: Candidates, scores_R: Sequence[float | None], i: int, best: int) -> bool:
    """Whether a response may be worse than the best one: it is another text, and no judge says that it is no worse."""
    score, most = scores_R[i], scores_R[best]
    is_other = item.responses[i].text.strip() != item.responses[best].text.strip()
    return is_other and (score is None or most is None or score < most)
