"""Samplers: each alone, and the recipes that are made of them by what is particular to each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import interrupt_store
from tiny_runs import run_recipe

from tso_fast.answering import warm_executor
from tso_fast.config.settings import CellConfig, JudgeConfig, SamplerConfig, TrainConfig
from tso_fast.errors import InputError
from tso_fast.executors import local
from tso_fast.files.atomic import write_jsonl
from tso_fast.files.responses import ResponseStore
from tso_fast.files.rows import BadRows, read_candidates, read_pairs
from tso_fast.files.run import Iteration
from tso_fast.generators import open_engine
from tso_fast.judges import panel
from tso_fast.matrix import ModelMatrix, open_cell
from tso_fast.models.tokens import encode_prompt, response_ids, whole_text
from tso_fast.samplers import regenerate
from tso_fast.samplers.chain import check, make_samplers
from tso_fast.samplers.controller import balance_of
from tso_fast.samplers.regenerate import Kept, draw, read_buffer
from tso_fast.samplers.sampler import Desk, Sampled, Sampler, made
from tso_fast.samplers.search import Node, back_up
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
        ([{"kind": "degrad"}], "samplers[0].kind: got 'degrad', expected one of again, degrade"),
        ([{"kind": "degrade", "cell": "policy"}], "samplers[0].cell: it has no effect on a sampler of kind 'degrade'"),
        ([{"kind": "degrade"}, {"kind": "degrade"}], "samplers[1].name: 'degrade' is taken"),
        ([{"kind": "test_samplers:config_of"}], "samplers[0].kind: 'test_samplers:config_of' is <function"),
        ([{"kind": "toy_judge:Shortest"}], "samplers[0].kind: 'toy_judge:Shortest' has no 'settle'"),
        ([{"kind": "degrade", "name": "a/b"}], "samplers[0].name: got 'a/b', expected printable text without '/'"),
    ],
)
def test_a_sampler_that_cannot_be(samplers: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(InputError) as caught:
        make_samplers(config_of(*samplers))
    assert str(caught.value).startswith(message)


def test_names_are_known_and_distinct(matrix: ModelMatrix) -> None:
    with pytest.raises(InputError, match=r"the name 'm\.v2' is that of a cell or judge"):
        check([only(kind="degrade", name="m.v2")], matrix, [])
    with pytest.raises(InputError, match=r"sampler revise: cell: no cell is called 'm\.v3'; did you mean 'm\.v2'"):
        check([only(kind="revise", cell="m.v3")], matrix, [])
    named = ModelMatrix([CellConfig(path=str(matrix.policy.path), name="reference")])
    with pytest.raises(InputError, match="sampler revise: cell: a cell is called 'reference' too"):
        check([only(kind="revise", cell="reference")], named, [])


def test_who_is_worked_on(desk: Callable[..., Desk]) -> None:
    candidates, at = [item(PERSON, NEW, OLD), item(OLD, NEW)], desk()
    assert at.played(candidates, None) == [[0], [1]]
    assert at.played(candidates, ["m.v1", "newest"]) == [[1, 2], [0, 1]]


def test_one_of_ones_own_takes_part(desk: Callable[..., Desk]) -> None:
    (found,) = only(kind="test_samplers:Shouting", name="loud").sample([item(NEW)], desk()).candidates
    loud = found.responses[1]
    assert (loud.model, loud.text, loud.version_rank, loud.token_ids) == ("loud", "THE DOG 2", 2, None)


def test_a_prefix_is_the_beginning_of_every_response(desk: Callable[..., Desk], matrix: ModelMatrix) -> None:
    tokenizer, at = matrix.tokenizer, desk()
    whole = response_ids(tokenizer, item().prompt, PERSON)
    prompt = dataclasses.replace(item().prompt, prefix=whole[:3])
    assert encode_prompt(tokenizer, prompt) == (*encode_prompt(tokenizer, item().prompt), *whole[:3])
    assert response_ids(tokenizer, prompt, PERSON) == whole[3:]
    with pytest.raises(InputError, match=r"q1: the text 'the dog 2' does not go on from field 'prefix'"):
        response_ids(tokenizer, prompt, NEW)
    (answered,) = at.answer(
        at.ask(SamplerConfig(kind="x", num_generations=3)), [Candidates(prompt=prompt, responses=())], ""
    )
    for response in answered.responses:
        assert response.token_ids is not None
        assert len(response.token_ids) <= 8 - 3
        assert response.text == tokenizer.decode(whole[:3] + response.token_ids, skip_special_tokens=True)
    assert whole_text(tokenizer, whole[:3], whole[3:5], tokenizer.decode(whole[3:5])[:1]) == (
        tokenizer.decode(whole[:3]) + tokenizer.decode(whole[3:5])[:1]
    )


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


# ---- revise


@pytest.fixture
def template(tmp_path: Path) -> str:
    """A template that models which know nothing else can be asked with: a file of a short text."""
    file = tmp_path / "again.txt"
    file.write_text("{prompt} Not {response}.")
    return str(file)


def test_second_answers_go_where_they_are_told(template: str, desk: Callable[..., Desk]) -> None:
    candidates = [item(PERSON, NEW, OLD, human_responses=("the old red fox ran",), answer="5")]
    settings = {"kind": "revise", "template": template, "num_generations": 2}
    (joined,) = only(**settings, scored=True).sample(candidates, desk()).candidates
    seconds = [r for r in joined.responses if r.model == "revise"]
    assert [(r.sample, r.version_rank, r.scores) for r in seconds] == [(0, 2, {"revise": 1.0}), (1, 2, {"revise": 1.0})]
    assert [r.scores for r in joined.responses[:3]] == [{}, {"revise": 0.0}, {}]
    before, pair = only(**settings, into="pair").sample(candidates, desk()).candidates
    assert before == candidates[0]
    assert (pair.prompt.id, pair.prompt.prompt, pair.prompt.human_responses) == ("q1/revise-1", "Which words?", ())
    assert [r.text for r in pair.responses] == [NEW.text, *(r.text for r in seconds)]
    (asked,) = only(**settings, into="revision", alone=True).sample(candidates, desk()).candidates
    assert (asked.prompt.prompt, asked.prompt.answer) == ("Which words? Not the dog 2.", "5")
    assert [r.token_ids for r in asked.responses] == [r.token_ids for r in seconds]


def test_what_is_no_worse_than_the_better_one_is_not_revised(
    template: str, desk: Callable[..., Desk], tmp_path: Path
) -> None:
    towards = tmp_path / "towards.txt"
    towards.write_text("{prompt} {better} not {response}")
    settings = {"kind": "revise", "template": str(towards), "of": ["m.v2", "m.v1"], "into": "revision", "alone": True}
    numbers, best = dataclasses.replace(OLD, text="1 2 3"), dataclasses.replace(PERSON, text="fox")
    (asked,) = only(**settings).sample([item(best, NEW, numbers)], desk(verifier=None)).candidates[:1]
    assert asked.prompt.prompt == "Which words? fox not the dog 2"
    sampled = only(**settings, better=["m.v1"]).sample([item(best, NEW, numbers)], desk())  # more letters than 1 2 3
    assert sampled.candidates == []
    sampled = only(**settings, better=["m.v2"]).sample([item(best, NEW, numbers)], desk())
    assert [c.prompt.prompt for c in sampled.candidates] == ["Which words? the dog 2 not 1 2 3"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "reviews"}, "template: 'reviews' is neither a file nor one of improve, review, rewrite; did"),
        ({"template": "review", "better": ["human"]}, "better: it has no effect, as template"),
        ({"into": "revision", "scored": True}, "scored: it has no effect with into 'revision'"),
        ({"alone": True}, "alone: it has no effect with into 'prompt'"),
    ],
)
def test_a_revision_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        only(kind="revise", **settings)
    assert str(caught.value).startswith(f"samplers[0].{message}")


def test_what_does_not_fit_the_context_is_counted(desk: Callable[..., Desk], template: str) -> None:
    long = item(NEW, text="Sam has 2 pears. " * 100)
    at = desk()
    sampled = only(kind="revise", template=template, into="pair").sample([long], at)
    assert sampled.candidates == [long]
    assert [row["row"]["id"] for row in at.bad.rows] == ["q1/revise-0"]


def test_scl_pairs_a_right_turn_with_a_wrong_one(template: str, tmp_path: Path) -> None:
    """By a shorter template, after which more responses of these models end."""
    samplers = [SamplerConfig(kind="revise", template=template, into="pair", alone=True)]
    settings: dict[str, Any] = {"num_generations": 1, "max_completion_length": 40, "samplers": samplers}
    run = run_recipe("scl", tmp_path, verifier="toy_verifier:even", **settings)
    questions = {c.prompt.id: c.prompt.prompt for c in read_candidates(run.state["config"]["prompts"], BadRows())}
    pairs = read_pairs(run.iteration(1).pairs, BadRows())
    for pair in pairs:
        assert {pair.chosen.model, pair.rejected.model} == {"m.v2", "revise"}
        assert (pair.score_chosen, pair.score_rejected) == (1.0, 0.0)
        name, _, turn = pair.prompt.id.partition("/")
        assert turn.startswith("revise-")
        assert pair.prompt.prompt == questions[name]  # the first turn is no part of it


def test_pit_asks_for_an_improvement_of_what_is_in_the_prompt(tmp_path: Path) -> None:
    run = run_recipe("pit", tmp_path, num_generations=0, num_iterations=1)
    pairs = read_pairs(run.iteration(1).pairs, BadRows())
    for pair in pairs:
        assert "[A first answer]" in pair.prompt.text
        assert {pair.chosen.model, pair.rejected.model} == {"revise"}


def test_bmc_pairs_a_response_with_itself_rewritten_towards_a_better_one(tmp_path: Path) -> None:
    run = run_recipe("bmc", tmp_path, num_generations=2)
    pairs = read_pairs(run.iteration(1).pairs, BadRows())
    assert {(pair.chosen.model, pair.rejected.model) for pair in pairs} == {("revise", "m.v2")}
    noted, candidates = run.info("iter-1/generate") or {}, read_candidates(run.iteration(1).responses, BadRows())
    rewritten = sum(len(r.token_ids or ()) for c in candidates for r in c.responses if r.model == "revise")
    assert noted["sampled_tokens"] > noted["samplers"]["revise"]["responses"] + rewritten
    assert {(pair.score_chosen, pair.score_rejected) for pair in pairs} == {(1.0, 0.0)}


# ---- regenerate


def test_a_response_goes_another_way_from_a_cut(desk: Callable[..., Desk]) -> None:
    at = desk()
    tokenizer = at.matrix.tokenizer
    candidates = [item(PERSON, NEW, id=f"q{i}") for i in range(6)]
    ids = response_ids(tokenizer, candidates[0].prompt, PERSON)
    found = only(kind="regenerate", num_generations=2, alone=True).sample(candidates, at).candidates
    assert [c.prompt.id for c in found[:3]] == ["q0/regenerate-1-0", "q0/regenerate-1-1", "q1/regenerate-1-0"]
    shared = []
    for pair in found:
        original, other = pair.responses
        assert (original.text, original.scores, other.scores) == (PERSON.text, {"regenerate": 1.0}, {"regenerate": 0.0})
        assert (other.model, other.version_rank, pair.prompt.prefix) == ("regenerate", 2, ())
        assert other.token_ids is not None
        assert len(other.token_ids) <= 8  # max_completion_length counts the beginning too
        assert other.text == tokenizer.decode(other.token_ids, skip_special_tokens=True)
        shared.append(next(i for i, (a, b) in enumerate(zip(ids, (*other.token_ids, -1), strict=False)) if a != b))
    assert len(set(shared)) > 2  # cuts fall anywhere
    short = only(kind="regenerate", segment_tokens=1).sample(candidates, at).candidates[len(candidates) :]
    tails = [pair.responses[1].token_ids or () for pair in short]
    assert any(len(tail) == len(ids) and sum(map(int.__ne__, tail, ids)) <= 1 for tail in tails)


def test_the_best_response_is_cut_where_there_are_several(desk: Callable[..., Desk]) -> None:
    sampler = only(kind="regenerate", of=["m.v1", "m.v2"], alone=True)
    (pair,) = sampler.sample([item(dataclasses.replace(NEW, text="1 2 3"), OLD)], desk()).candidates
    assert pair.responses[0].model == "m.v1"


def test_the_buffer_prefers_what_was_seen_least_and_drops_the_oldest(desk: Callable[..., Desk]) -> None:
    pairs = [Kept(item(PERSON, id=f"q{i}"), count=9 * (i < 50)) for i in range(100)]
    times = [0] * 100
    for t in range(200):
        for i in draw(pairs, 10, 0, t):
            times[i] += 1
    assert sum(times) == 2000
    assert 5 < sum(times[50:]) / sum(times[:50]) < 12  # 10 times as likely, and none twice in a draw
    sampler = only(kind="regenerate", buffer_size=5, draws=3, alone=True)
    for t in (1, 2, 3):
        candidates = [item(PERSON, id=f"t{t}-{i}") for i in range(3)]
        sampled = sampler.sample(candidates, desk(t))
        (file,) = sampled.files
        kept = read_buffer(file)
        assert len(sampled.candidates) == 3
        assert sampled.info["evicted"] == (0, 1, 3)[t - 1]
    assert [k.pair.prompt.id[:2] for k in kept] == ["t2"] * 2 + ["t3"] * 3
    drawn = {c.prompt.id for c in sampled.candidates}
    assert all(k.count >= (k.pair.prompt.id in drawn) for k in kept)
    again = sampler.sample(candidates, desk(3))
    assert (again.candidates, read_buffer(file)) == (sampled.candidates, kept)


def test_sapo_goes_on_with_the_same_bytes_and_uses_its_average(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while the second iteration writes its buffer."""
    settings = {"num_iterations": 2, "store": tmp_path / "store"}
    whole = run_recipe("sapo", tmp_path / "whole", **settings)
    pairs = read_pairs(whole.iteration(2).pairs, BadRows())
    assert {(pair.chosen.model, pair.rejected.model) for pair in pairs} == {(HUMAN, "regenerate")}
    kept = read_buffer(whole.iteration(2).folder / "buffer-regenerate.jsonl")
    noted = [(whole.info(f"iter-{t}/generate") or {})["samplers"]["regenerate"] for t in (1, 2)]
    assert sum(item.count for item in kept) == sum(info["drawn"] for info in noted)
    hashes = {item.pair.responses[1].weight_hash for item in kept}
    policies = {open_cell(CellConfig(path=str(path))).weight_hash for path in
                (whole.iteration(1).policy, Path(whole.state["config"]["cells"][-1]["path"]))}  # fmt: skip
    assert len(hashes - policies) == 1  # neither the first policy nor the second: the mean of both

    def failing(file: Path, rows: Any) -> None:
        if file.parent.name == "iter-2":
            raise KeyboardInterrupt
        write_jsonl(file, rows)

    monkeypatch.setattr(regenerate, "write_jsonl", failing)
    with pytest.raises(KeyboardInterrupt):
        run_recipe("sapo", tmp_path / "parts", **settings)
    monkeypatch.undo()
    parts = run_recipe("sapo", tmp_path / "parts", **settings)
    for name in ("iter-2/responses.jsonl", "iter-2/buffer-regenerate.jsonl", "model.safetensors"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()


# ---- search


def grown() -> Node:
    """A root with a good step, a bad one, and a good one that was sampled once."""
    root = Node()
    tokens = [(1, 2), (1, 3), (4, 5), (6, 7), (1, 2)]
    responses = [Response(model="m", text="", token_ids=ids) for ids in tokens]
    root.expand(responses, [1.0, 0.5, 0.0, 1.0, 1.0], lambda ids, depth: ids[:1])
    back_up([root], 3.5, 5)
    return root


def test_a_tree_is_gone_down_by_value_and_by_what_was_visited_little() -> None:
    root = grown()
    assert [(node.prefix, node.visits, node.value, node.prior) for node in root.children.values()] == [
        ((1,), 3, pytest.approx(2.5 / 3), 0.6),
        ((4,), 1, 0.0, 0.2),
        ((6,), 1, 1.0, 0.2),
    ]
    for weight, wanted in ((0.0, (6,)), (1.0, (6,)), (5.0, (1,))):  # 1.22 to 1.17, then 2.12 to 2.51
        assert [node.prefix for node in root.path(weight)] == [(), wanted]
    back_up(root.path(0.0), 0.0, 9)  # what was good is bad
    assert (root.visits, root.path(0.0)[-1].prefix) == (14, (1,))


def test_steps_from_a_place_share_its_prefix_and_have_value_and_visits(desk: Callable[..., Desk]) -> None:
    settings = {"kind": "search", "num_generations": 4, "num_rounds": 6, "step_tokens": 2, "alone": True}
    sampled = only(**settings).sample([item(NEW, id=f"q{i}") for i in range(3)], desk())
    decode = desk().matrix.tokenizer.decode
    assert {c.prompt.id for c in sampled.candidates} >= {"q0/search-0", "q1/search-0"}
    assert len({c.prompt.prefix for c in sampled.candidates}) > 2
    for place in sampled.candidates:
        prefix = place.prompt.prefix
        assert len(prefix) in (0, 2, 4)
        for step in place.responses:
            assert step.token_ids is not None
            assert step.text == decode(prefix + step.token_ids, skip_special_tokens=True)
            assert (step.finish_reason is None) == (len(prefix) < 4 and len(step.token_ids) == 2 and not ended(step))
            assert len(prefix + step.token_ids) <= 8
        assert sum(r.scores["visits"] for r in place.responses) >= 4
    assert sampled.info["deepest"] == 2
    wider = only(**settings, exploration=100.0).sample([item(NEW)], desk()).candidates
    deeper = only(**settings, exploration=0.0).sample([item(NEW)], desk()).candidates
    assert max(len(c.prompt.prefix) for c in deeper) >= max(len(c.prompt.prefix) for c in wider)


def ended(step: Response) -> bool:
    return step.finish_reason == "stop"


def test_a_search_and_the_judge_of_its_steps_share_an_engine(
    desk: Callable[..., Desk], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over all rounds, as both ask the policy; one that loads weights in this process has them make room."""
    (tmp_path / "rate.txt").write_text("{prompt} {response}")
    opened: list[Any] = []
    monkeypatch.setattr(local, "open_engine", lambda spec, **o: opened.append(spec) or open_engine(spec, **o))
    own = JudgeConfig(kind="llm", cell="policy", template=str(tmp_path / "rate.txt"), max_completion_length=2)
    search = only(kind="search", num_generations=2, num_rounds=3, step_tokens=2)
    for judges in ([own], [own, JudgeConfig(kind="implicit", cell="policy")]):
        laid = desk(judges=judges)
        with warm_executor(laid.config, laid.store) as executor:
            sampled = search.sample([item(NEW)], dataclasses.replace(laid, executor=executor))
        assert sampled.info["responses"] >= 2
        assert (len(opened) == 1) == (judges == [own])
        opened.clear()


def test_steps_end_with_a_separator(desk: Callable[..., Desk]) -> None:
    tokenizer = desk().matrix.tokenizer
    ids = tuple(tokenizer(" the old red fox", add_special_tokens=False)["input_ids"])
    step_of = only(kind="search", num_generations=2, step_separator="d r")._steps(tokenizer)
    first = step_of(ids, 0)
    assert "d r" in tokenizer.decode(first)
    assert "d r" not in tokenizer.decode(first[:-1])
    assert step_of(ids, 2) == ids


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_generations": 1}, "num_generations: got 1, expected 2 or more"),
        ({"step_tokens": 2, "step_separator": ";"}, "step_separator: it has no effect with step_tokens"),
    ],
)
def test_a_search_that_cannot_be(settings: dict[str, Any], message: str, matrix: ModelMatrix) -> None:
    with pytest.raises(InputError) as caught:
        only(**{"kind": "search", "num_generations": 2, **settings})
    assert str(caught.value).startswith(f"samplers[0].{message}")
    with pytest.raises(InputError, match="sampler search: nobody tells the value of a response"):
        check([only(kind="search", num_generations=2)], matrix, [])


def test_mcts_dpo_pairs_share_a_prefix_and_a_killed_search_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samplers = [SamplerConfig(kind="search", num_generations=3, num_rounds=5, step_tokens=2, depth=3, alone=True)]
    settings: dict[str, Any] = {"samplers": samplers, "num_iterations": 1}
    opened: list[Any] = []
    monkeypatch.setattr(local, "open_engine", lambda spec, **o: opened.append(spec) or open_engine(spec, **o))
    whole = run_recipe("mcts_dpo", tmp_path / "whole", **settings)
    assert len(opened) == 1  # for all rounds
    pairs = read_pairs(whole.iteration(1).pairs, BadRows())
    assert len({pair.prompt.prefix for pair in pairs}) > 3
    for pair in pairs:
        assert pair.score_chosen > pair.score_rejected  # type: ignore[operator]
        assert 0.5 <= pair.soft_label < 1
    assert any(pair.soft_label > 0.5 for pair in pairs)
    interrupt_store(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        run_recipe("mcts_dpo", tmp_path / "parts", **settings)
    monkeypatch.undo()
    parts = run_recipe("mcts_dpo", tmp_path / "parts", **settings)
    for name in ("iter-1/responses.jsonl", "iter-1/pairs.jsonl", "model.safetensors"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()


# ---- controller


def test_balance_is_that_of_b_star() -> None:
    """Of 4 samples 2 different right ones where 4 are wanted, and none at another prompt."""
    assert balance_of([["a", "b", "a", None], [None] * 4], 4) == (0.125, 0.25, 0.25)
    assert balance_of([["a", "b"]], 1) == (1.0, 1.0, 1.0)
    assert balance_of([], 1) == (0.0, 0.0, 0.0)


class Imagined(Desk):
    """A desk whose policy says more different things, and fewer right ones, the hotter it is.

    ``config.seed`` is how far it has collapsed: so many things that it would have said it says no more.
    """

    def answer(self, asked: Any, prompts: Any, title: str) -> list[Candidates]:
        various = max(1, round(10 * asked.sampling.temperature) - self.config.seed)
        texts = [f"{k % various}" for k in range(asked.num_generations)]
        responses = tuple(Response(model="m.v2", text=text, sample=k) for k, text in enumerate(texts))
        return [dataclasses.replace(c, responses=responses) for c in prompts]

    def scores(self, candidates: Any) -> list[list[float | None]]:
        """The first six things that can be said are right."""
        return [[float(int(r.text) < 6) for r in c.responses] for c in candidates]


def test_temperature_rises_when_exploration_falls(matrix: ModelMatrix, tmp_path: Path) -> None:
    sampler = only(kind="controller", temperatures=[0.3, 0.6, 0.9, 1.2], numbers=[4, 8], num_wanted=6)
    settled = []
    for collapsed in (0, 3, 6, 99):
        config = config_of(seed=collapsed, temperature=0.8)
        at = Imagined(config=config, matrix=matrix, store=None, judges=[], files=Iteration(tmp_path, 1))  # type: ignore[arg-type]
        settled.append(sampler.settle([item(NEW)], at))
    assert [config.temperature for config, _ in settled] == [0.6, 0.9, 1.2, 0.3]
    assert settled[0][0].policy_num_generations == 8
    assert settled[0][1] == {
        "temperature": 0.6, "num_generations": 8, "balance": 0.75, "exploration": 1.0, "exploitation": 0.75
    }  # fmt: skip


def test_a_controller_needs_judges_and_a_policy_that_it_can_set(tiny_matrix: Path) -> None:
    own = ModelMatrix([CellConfig(path=str(tiny_matrix / "m.v2"), temperature=0.5)])
    with pytest.raises(InputError, match="nobody tells which responses are right"):
        check([only(kind="controller")], own, [])
    with pytest.raises(InputError, match="the policy's cell has a temperature of its own"):
        check([only(kind="controller")], own, panel.make_judges(config_of(verifier="toy_verifier:even")))


def test_bstar_samples_as_its_controller_says_also_when_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samplers = [SamplerConfig(kind="controller", temperatures=[0.6, 1.2], numbers=[2, 3], num_prompts=6, num_wanted=2)]
    settings: dict[str, Any] = {"samplers": samplers, "verifier": "toy_verifier:even", "num_generations": 0,
                                "num_iterations": 1, "max_completion_length": 40}  # fmt: skip
    interrupt_store(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        run_recipe("bstar", tmp_path, **settings)
    monkeypatch.undo()
    run = run_recipe("bstar", tmp_path, **settings)
    info = (run.info("iter-1/generate") or {})["samplers"]["controller"]
    assert info["temperature"] in (0.6, 1.2)
    own = [
        [r for r in c.responses if r.model == "m.v2"] for c in read_candidates(run.iteration(1).responses, BadRows())
    ]
    assert {len(responses) for responses in own} == {info["num_generations"]}
    with ResponseStore(tmp_path / "store") as store:  # the tried prompts at the other temperature, and no prompt twice
        assert len(store) == 6 * 2 * 3 + 18 * info["num_generations"]
    assert {pair.chosen.model for pair in read_pairs(run.iteration(1).pairs, BadRows())} <= {"m.v2", HUMAN}


def test_west_of_n_has_more_samples_in_each_iteration(tmp_path: Path) -> None:
    numbers = [{"policy_num_generations": 2}, {"policy_num_generations": 3}]
    settings = {"num_generations": 0, "num_iterations": 2, "max_completion_length": 40}
    run = run_recipe("west_of_n", tmp_path, **settings, by_iteration=numbers)
    answered = [read_candidates(run.iteration(t).responses, BadRows()) for t in (1, 2)]
    for t, candidates in enumerate(answered, start=1):
        tokens = sum(len(r.token_ids or ()) for item in candidates for r in item.responses)
        assert (run.info(f"iter-{t}/generate") or {})["sampled_tokens"] == tokens
    own = [{sum(not r.is_human for r in item.responses) for item in candidates} for candidates in answered]
    assert own == [{2}, {3}]
    pairs = read_pairs(run.iteration(2).pairs, BadRows())
    assert {(pair.chosen.model, pair.rejected.model) for pair in pairs} == {("tso-1", "tso-1")}
