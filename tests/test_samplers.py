"""Samplers: each alone, and the recipes that are made of them by what is particular to each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import run_recipe

from tso_fast.config.settings import CellConfig, SamplerConfig, TrainConfig
from tso_fast.errors import InputError
from tso_fast.files.responses import ResponseStore
from tso_fast.files.rows import BadRows, read_pairs
from tso_fast.files.run import Iteration
from tso_fast.judges import panel
from tso_fast.matrix import ModelMatrix
from tso_fast.samplers.chain import check, make_samplers
from tso_fast.samplers.sampler import Desk, Sampled, Sampler, made, played
from tso_fast.types import HUMAN, Candidates, Prompt, Response


def config_of(*samplers: dict[str, Any], **settings: Any) -> TrainConfig:
    values: dict[str, Any] = {"output_dir": "-", "prompts": "-", "cells": [], "use_cpu": True, **settings}
    return TrainConfig(samplers=[SamplerConfig(**sampler) for sampler in samplers], **values)


@pytest.fixture(scope="module")
def matrix(tiny_matrix: Path) -> ModelMatrix:
    cells = {name: tiny_matrix / name for name in ("s.v1", "m.v2")}
    return ModelMatrix([CellConfig(path=str(path), version_rank=int(name[-1])) for name, path in cells.items()])


@pytest.fixture
def desk(matrix: ModelMatrix, tmp_path: Path) -> Iterator[Callable[..., Desk]]:
    """`desk(temperature=0.5)`: a desk in iteration 1 whose judge counts letters."""
    with ResponseStore(tmp_path) as store:

        def lay(t: int = 1, **settings: Any) -> Desk:
            config = config_of(**{"verifier": "toy_verifier:letters", "max_completion_length": 8, **settings})
            judges = panel.make_judges(config)
            return Desk(config=config, matrix=matrix, store=store, judges=judges, files=Iteration(tmp_path, t))

        yield lay


def only(**sampler: Any) -> Any:
    (found,) = make_samplers(config_of(sampler))
    return found


def item(*responses: Response, text: str = "Which words?", **prompt: Any) -> Candidates:
    return Candidates(prompt=Prompt(**{"id": "q1", "prompt": text, **prompt}), responses=responses)


PERSON = Response(model=HUMAN, text="the old red fox ran")
NEW, OLD = (Response(model=f"m.v{rank}", text=f"the dog {rank}", version_rank=rank, size_b=1.0) for rank in (2, 1))


class Shouting(Sampler):
    """A sampler of one's own, as a user writes it."""

    def sample(self, candidates: list[Candidates], desk: Desk) -> Sampled:
        loud = [[made(r, self.name, i, text=r.text.upper()) for i, r in enumerate(c.responses)] for c in candidates]
        return Sampled(
            [dataclasses.replace(c, responses=(*c.responses, *new)) for c, new in zip(candidates, loud, strict=True)]
        )


# ---- what all have in common


@pytest.mark.parametrize(
    ("samplers", "message"),
    [
        ([{"kind": "degrad"}], "samplers[0].kind: got 'degrad', expected one of degrade"),
        ([{"kind": "degrade", "cell": "policy"}], "samplers[0].cell: it has no effect on a sampler of kind 'degrade'"),
        ([{"kind": "degrade"}, {"kind": "degrade"}], "samplers[1].name: 'degrade' is taken"),
        ([{"kind": "test_samplers:config_of"}], "samplers[0].kind: 'test_samplers:config_of' is <function"),
        ([{"kind": "toy_judge:Shortest"}], "samplers[0].kind: 'toy_judge:Shortest' has no 'settle'"),
    ],
)
def test_a_sampler_that_cannot_be(samplers: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(InputError) as caught:
        make_samplers(config_of(*samplers))
    assert str(caught.value).startswith(message)


def test_names_are_known_and_distinct(matrix: ModelMatrix) -> None:
    with pytest.raises(InputError, match=r"the name 'm\.v2' is that of a cell or judge"):
        check([only(kind="degrade", name="m.v2")], matrix, [])


def test_who_is_worked_on() -> None:
    candidates = [item(PERSON, NEW, OLD), item(OLD, NEW)]
    assert played(candidates, None) == [[0], [1]]
    assert played(candidates, ["m.v1", "newest"]) == [[1, 2], [0, 1]]


def test_one_of_ones_own_takes_part(desk: Callable[..., Desk]) -> None:
    (found,) = only(kind="test_samplers:Shouting", name="loud").sample([item(NEW)], desk()).candidates
    loud = found.responses[1]
    assert (loud.model, loud.text, loud.version_rank, loud.token_ids) == ("loud", "THE DOG 2", 2, None)


# ---- degrade


def test_copies_lack_more_and_more_and_rare_words_first(desk: Callable[..., Desk]) -> None:
    sampled = only(kind="degrade", ratios=[0.2, 0.21, 0.6]).sample([item(PERSON, NEW, OLD)], desk())
    whole, _, _, *copies = sampled.candidates[0].responses
    assert [r.scores for r in (whole, *copies)] == [{"degrade": 0.0}, {"degrade": -1.0}, {"degrade": -2.0},
                                                    {"degrade": -3.0}]  # fmt: skip
    assert [len(r.text.split()) for r in copies] == [4, 3, 2]
    least, less = (set(r.text.split()) for r in copies[:0:-1])
    assert least < less < set(whole.text.split())
    assert "the" in least
    assert sampled.info == {"responses": 3}
    (alone,) = only(kind="degrade").sample([item(Response(model=HUMAN, text="word"))], desk()).candidates
    assert len(alone.responses) == 1


def test_spo_degree_trains_on_the_degree(tmp_path: Path) -> None:
    run = run_recipe("spo_degree", tmp_path, num_generations=1)
    pairs = read_pairs(run.iteration(1).pairs, BadRows())
    gaps = {(pair.score_chosen or 0) - (pair.score_rejected or 0) for pair in pairs}
    assert gaps >= {1.0, 2.0}
    assert all(pair.rejected.model == "degrade" for pair in pairs)
    assert len({round(pair.soft_label, 4) for pair in pairs}) == len(gaps)
    assert run.iteration(1).verdicts.read_text() == ""  # the verifier has no word in it, and is not asked
    assert (run.info("iter-1/generate") or {})["samplers"]["degrade"]["responses"] > 0
