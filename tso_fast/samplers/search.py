"""A tree search over the steps of a response, by PUCT; the steps from one place are candidates that share a prefix.

    the tree is gone down to a place that is new -> whole responses go on from there -> the judges score them
    -> their first steps are the place's children -> visits and values go up to the root

A step's value is the mean score of the responses that went through it: with a verifier that is the outcome, with an
`llm` judge that rates, asked of the policy, its evaluation of itself. So every sampled token counts for the step it
begins with and for all before it, and no response is sampled only to be valued.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tso_fast.config.settings import SamplerConfig
from tso_fast.errors import InputError
from tso_fast.judges.judge import Judge
from tso_fast.matrix import ModelMatrix
from tso_fast.samplers.sampler import Desk, Sampled, Sampler, own_prompt
from tso_fast.types import Candidates, Response

VISITS = "visits"
"""Name in a step's ``scores`` of how many responses, or returns to an end, went through it."""


@dataclass(eq=False)
class Node:
    """A place in the tree: the beginning of a response."""

    prefix: tuple[int, ...] = ()
    depth: int = 0
    response: Response | None = None
    """The first response that went through it; None: the root."""
    is_end: bool = False
    """Whether nothing goes on from it: it is a whole response."""
    prior: float = 1.0
    """Share of the responses from its parent that went through it, which stands for the policy's probability."""
    visits: int = 0
    total: float = 0.0
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)
    """By the tokens of the step."""
    number: int | None = None
    """Number of the expansion; None: it is not expanded."""

    @property
    def value(self) -> float:
        return self.total / self.visits if self.visits else 0.0

    def path(self, exploration: float) -> list[Node]:
        """From here down to where the tree ends, each time to the child of the largest PUCT score."""
        path = [self]
        while path[-1].children:
            parent = path[-1]
            root = math.sqrt(parent.visits)
            path.append(
                max(parent.children.values(), key=lambda n: n.value + exploration * n.prior * root / (1 + n.visits))
            )
        return path

    def expand(
        self, responses: Sequence[Response], scores: Sequence[float], step_of: Callable[..., tuple[int, ...]]
    ) -> None:
        """Makes the first steps of responses that go on from here its children; unknown scores are left out before."""
        for response, score in zip(responses, scores, strict=True):
            ids = response.token_ids or ()
            step = step_of(ids, self.depth)
            child = self.children.setdefault(
                step, Node(prefix=self.prefix + step, depth=self.depth + 1, response=response, is_end=step == ids)
            )
            child.visits += 1
            child.total += score
        for child in self.children.values():
            child.prior = child.visits / len(responses)


@dataclass(eq=False)
class _Tree:
    item: Candidates
    root: Node = field(default_factory=Node)
    expanded: list[Node] = field(default_factory=list)

    def places(self) -> Iterator[Node]:
        """The places from which there are several ways on."""
        return (node for node in self.expanded if len(node.children) > 1)


class SearchSampler(Sampler):
    """Sampler of kind ``search``: its scores of a step are its value, under its name, and ``visits``."""

    takes = (
        "alone", "cell", "num_generations", "temperature", "top_p", "top_k", "max_completion_length", "num_rounds",
        "depth", "step_tokens", "step_separator", "exploration",
    )  # fmt: skip

    def __init__(self, config: SamplerConfig) -> None:
        super().__init__(config)
        if config.step_tokens is not None and config.step_separator is not None:
            raise ValueError("step_separator: it has no effect with step_tokens; leave one of them out")
        if config.step_separator == "":
            raise ValueError("step_separator: got '', expected some text")
        if config.num_generations < 2:
            raise ValueError(f"num_generations: got {config.num_generations}, expected 2 or more ways to go on")

    def check(self, matrix: ModelMatrix, judges: Sequence[Judge]) -> None:
        super().check(matrix, judges)
        if not judges:
            raise InputError(
                f"sampler {self.name}: nobody tells the value of a response; set verifier, or judges of single ones"
            )

    def sample(self, candidates: list[Candidates], desk: Desk) -> Sampled:
        trees = [_Tree(dataclasses.replace(item, responses=())) for item in candidates]
        most = len(trees) * self.config.num_rounds * self.config.num_generations
        with desk.progress(self.name, most) as advance:
            for _ in range(self.config.num_rounds):
                self._round(trees, desk, advance)
        places = [self._candidates(tree, node, desk) for tree in trees for node in tree.places()]
        others = [] if self.config.alone else candidates
        return Sampled([*others, *places], self._info(trees, len(places)))

    def _round(self, trees: Sequence[_Tree], desk: Desk, advance: Callable[[int], None]) -> None:
        """Goes down every tree once: ends count once more, and new places are expanded, all together."""
        new = {}
        for tree in trees:
            path = tree.root.path(self.config.exploration)
            last = path[-1]
            if last.is_end:
                back_up(path, last.value, 1)
            elif last.number is None:
                last.number = len(tree.expanded)
                tree.expanded.append(last)
                prompt = own_prompt(tree.item.prompt, self._name_of(last), prefix=last.prefix)
                new[prompt.id] = Candidates(prompt=prompt, responses=()), path
        advance((len(trees) - len(new)) * self.config.num_generations)
        if not new:
            return
        step_of = self._steps(desk.matrix.tokenizer)
        answered = desk.answer(desk.ask(self.config), [item for item, _ in new.values()], self.name, advance)
        for item, scores in zip(answered, desk.scores(answered), strict=True):
            known = [(r, s) for r, s in zip(item.responses, scores, strict=True) if s is not None]
            path = new[item.prompt.id][1]
            path[-1].expand([r for r, _ in known], [s for _, s in known], step_of)
            back_up(path, sum(s for _, s in known), len(known))

    def _info(self, trees: Sequence[_Tree], places: int) -> dict[str, Any]:
        deepest = max((node.depth for tree in trees for node in tree.expanded), default=0)
        expanded = sum(len(tree.expanded) for tree in trees)
        return {
            "trees": len(trees),
            "expanded": expanded,
            "responses": expanded * self.config.num_generations,
            "places": places,
            "deepest": deepest,
        }

    def _name_of(self, node: Node) -> str:
        return f"{self.name}-{node.number}"

    def _steps(self, tokenizer: Any) -> Callable[[tuple[int, ...], int], tuple[int, ...]]:
        """The first step of some tokens at a depth."""
        config, separator = self.config, self.config.step_separator or "\n"
        piece = functools.lru_cache(maxsize=65536)(lambda token: str(tokenizer.decode([token])))

        def step_of(ids: tuple[int, ...], depth: int) -> tuple[int, ...]:
            if depth + 1 >= config.depth:
                return ids
            if config.step_tokens is not None:
                return ids[: config.step_tokens]
            text = ""
            for i, token in enumerate(ids, start=1):
                text += piece(token)
                if separator in text:
                    return ids[:i]
            return ids

        return step_of

    def _candidates(self, tree: _Tree, node: Node, desk: Desk) -> Candidates:
        """The steps from one place."""
        responses = []
        for i, (step, child) in enumerate(node.children.items()):
            assert child.response is not None
            responses.append(
                dataclasses.replace(
                    child.response,
                    model=self.name,
                    sample=i,
                    text=desk.matrix.tokenizer.decode(list(child.prefix), skip_special_tokens=True),
                    token_ids=step,
                    finish_reason=child.response.finish_reason if child.is_end else None,
                    logprob=None,
                    scores={self.name: child.value, VISITS: float(child.visits)},
                )
            )
        prompt = own_prompt(tree.item.prompt, self._name_of(node), prefix=node.prefix)
        return Candidates(prompt=prompt, responses=tuple(responses))


def back_up(path: Sequence[Node], total: float, visits: int) -> None:
    """Adds visits and their scores to all places on a path."""
    for node in path:
        node.total += total
        node.visits += visits
