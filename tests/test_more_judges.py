"""Judges that look at versions, dropout, people and rationales, each alone; and the recipes that are made of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import SMALL, run_recipe
from torch import nn
from transformers import AutoModelForCausalLM

from tso_fast.config.settings import (
    AnsweringConfig,
    CellConfig,
    EvidenceConfig,
    JudgeConfig,
    JudgesConfig,
    PairingConfig,
)
from tso_fast.correction.make_pairs import judgment_pairs, make_pairs
from tso_fast.errors import InputError
from tso_fast.files.atomic import write_jsonl
from tso_fast.files.labels import label_row, make_label
from tso_fast.files.rows import BadRows, candidates_row, read_candidates, read_pairs, read_verdicts
from tso_fast.files.run import Run
from tso_fast.judges import panel, template
from tso_fast.judges.consistency import kendall_tau
from tso_fast.judges.ideal_point import fit_tastes
from tso_fast.judges.judge import Bench
from tso_fast.judges.judgments import AGREEMENT, with_agreement
from tso_fast.judges.llm import LlmJudge
from tso_fast.judges.mc_dropout import bald
from tso_fast.judges.replies import read_rating
from tso_fast.matrix import ModelMatrix
from tso_fast.models.tokens import encode_prompt
from tso_fast.quickstart.build import build
from tso_fast.types import Candidates, Comparison, PreferencePair, Prompt, Response, Verdict


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the cells answered, for all recipes."""
    return tmp_path_factory.mktemp("recipes") / "store"


def pairs_of(run: Run, t: int = 1) -> list[PreferencePair]:
    return read_pairs(run.iteration(t).pairs, BadRows())


def judged(run: Run, t: int = 1) -> tuple[list[Candidates], list[Verdict | Comparison]]:
    candidates = read_candidates(run.iteration(t).responses, BadRows())
    return candidates, read_verdicts(run.iteration(t).verdicts, candidates, BadRows(), may_be_empty=True)


@pytest.fixture(scope="module")
def matrix() -> ModelMatrix:
    folder = build(SMALL)
    return ModelMatrix(
        [CellConfig(path=str(folder / n), version_rank=int(n[-1])) for n in ("s.v1", "s.v2", "m.v1", "m.v2")]
    )


def asked(matrix: ModelMatrix | None, candidates: list[Candidates], **judge: Any) -> list[Any]:
    """What one judge says."""
    judges = panel.make_judges(JudgesConfig(judges=[JudgeConfig(**judge)]))
    panel.check(judges, matrix)
    done: list[int] = []
    bench = Bench(bad=BadRows(), settings=AnsweringConfig(use_cpu=True), matrix=matrix, advance=done.append)
    verdicts, _ = panel.ask(judges, candidates, bench)
    assert sum(done) <= panel.num_steps(judges, candidates)
    return verdicts


def some_candidates(*texts: str, num_prompts: int = 2) -> list[Candidates]:
    return [
        Candidates(
            prompt=Prompt(id=f"q{k}", prompt=f"Add {k} and 2."),
            responses=tuple(Response(model="m", text=text, sample=i) for i, text in enumerate(texts)),
        )
        for k in range(num_prompts)
    ]


# --------------------------------------------------------------------------------------------------------- consistency


def test_kendalls_tau() -> None:
    rows = np.array([[1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 4.0], [4.0, 3.0, 2.0, 1.0]])
    assert kendall_tau(rows[0], rows[0]) == 1
    assert kendall_tau(rows[0], rows[1]) == pytest.approx(4 / 6)  # one of six pairs is turned round
    assert kendall_tau(rows[0], rows[2]) == -1
    assert kendall_tau(np.array([1.0, 1.0, 2.0]), np.array([1.0, 2.0, 3.0])) == pytest.approx(2 / np.sqrt(6))  # tau-b
    assert kendall_tau(np.array([1.0, np.nan, 2.0]), np.array([1.0, 2.0, 3.0])) == 1
    assert np.isnan(kendall_tau(np.array([1.0, 1.0]), np.array([1.0, 2.0])))
    assert np.isnan(kendall_tau(np.array([]), np.array([])))


def test_consistency_is_that_of_two_implicit_judges(matrix: ModelMatrix) -> None:
    """Of the policy and of the next older version of its size; a prompt without an order shifts no other's value."""
    candidates = some_candidates("3", "12", "Sam Sam", "5 4 1", num_prompts=3)
    candidates.insert(1, dataclasses.replace(candidates[0], prompt=Prompt(id="alone", prompt="Add 5 and 2.")))
    candidates[1] = dataclasses.replace(candidates[1], responses=candidates[1].responses[:1])
    options = {"length_normalized": True}
    new, old = (
        [
            np.array(
                [
                    v.score
                    for v in asked(matrix, candidates, kind="implicit", cell=name, **options)
                    if v.prompt_id == item.prompt.id
                ]
            )
            for item in candidates
        ]
        for name in ("m.v2", "m.v1")
    )
    taus = [kendall_tau(a, b) for a, b in zip(new, old, strict=True)]
    assert np.isnan(taus).tolist() == [False, True, False, False]
    for of in ("prompt", "dataset"):
        told = asked(matrix, candidates, kind="consistency", consistency_of=of, **options)
        place = {item.prompt.id: k for k, item in enumerate(candidates)}
        assert len(told) == 18
        for c in told:
            k, (i, j) = place[c.prompt_id], c.responses
            consistency = ((taus[k] if of == "prompt" else np.nanmean(taus)) + 1) / 2
            assert c.probability == pytest.approx(consistency if new[k][i] > new[k][j] else 1 - consistency)


def test_consistency_needs_an_older_version(matrix: ModelMatrix) -> None:
    config = matrix.configs["m.v1"]
    with pytest.raises(InputError, match=r"asks for cell 'previous'; .* no cell is older than the policy"):
        asked(ModelMatrix([config]), some_candidates("3"), kind="consistency")
    with pytest.raises(InputError, match="previous: got the cells policy, policy; expected different ones"):
        asked(matrix, some_candidates("3"), kind="consistency", previous="policy")
    long = some_candidates("3", "4 " * 600, num_prompts=1)
    (told,) = asked(matrix, long, kind="consistency")
    assert (told.probability, told.reason) == (None, "longer than the context")


def test_unanimous_pairs_are_those_on_which_all_agree() -> None:
    candidates = some_candidates("a", "b", "c", num_prompts=1)
    verdicts = [
        Verdict(prompt_id="q0", response=i, judge=judge, score=score)
        for judge, scores in (("one", (3.0, 2.0, 1.0)), ("two", (9.0, 1.0, 1.0)), ("three", (None, 1.0, None)))
        for i, score in enumerate(scores)
    ]
    settings = EvidenceConfig(evidence="consensus")
    for unanimous, want in ((False, {"ab", "ac", "bc"}), (True, {"ab", "ac"})):
        pairs, info = make_pairs(candidates, verdicts, settings, PairingConfig(max_pairs=9, unanimous=unanimous), 0)
        assert {pair.chosen.text + pair.rejected.text for pair in pairs} == want
        assert info["reasons"].get("drop", {}) == ({"judges disagree": 1} if unanimous else {})
    label = Comparison(prompt_id="q0", responses=(1, 2), judge="human", annotator="ann", probability=0.0)
    pairs, _ = make_pairs(candidates, [*verdicts, label], settings, PairingConfig(max_pairs=9, unanimous=True), 0)
    assert {pair.chosen.text + pair.rejected.text for pair in pairs} == {"ab", "ac", "cb"}  # a person's word stands


# ---------------------------------------------------------------------------------------------------------- mc_dropout


def test_bald() -> None:
    assert bald(np.full(10, 0.9)) == bald(np.full(10, 0.5)) == 0  # all passes say the same
    assert bald(np.array([0.0, 1.0])) == pytest.approx(np.log(2))
    p = np.array([0.2, 0.9, 0.6])
    entropy = -(p * np.log(p) + (1 - p) * np.log(1 - p))
    mean = p.mean()
    assert bald(p) == pytest.approx(-(mean * np.log(mean) + (1 - mean) * np.log(1 - mean)) - entropy.mean())


def test_passes_that_disagree_make_unsure(matrix: ModelMatrix) -> None:
    candidates = some_candidates("3", "12", "Sam Sam", "5 4 1")
    options = {"kind": "mc_dropout", "beta": 20.0, "length_normalized": True, "num_passes": 6}
    scores = {
        (v.prompt_id, v.response): v.score for v in asked(matrix, candidates, kind="implicit", length_normalized=True)
    }
    sure, unsure, again = (asked(matrix, candidates, **options, dropout=p) for p in (0.0, 0.5, 0.5))
    for c in sure:  # without dropout as the implicit judge orders them
        first, second = (scores[c.prompt_id, i] for i in c.responses)
        assert c.probability == pytest.approx(float(first > second))
    assert unsure == again
    assert all(0 <= c.probability <= 1 for c in unsure)
    assert min(abs(c.probability - 0.5) for c in unsure) < 0.499
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    asked(matrix, candidates[:1], **options, dropout=0.5, reference="previous")
    assert torch.equal(torch.random.get_rng_state(), before)


# --------------------------------------------------------------------------------------------------------- ideal points


def test_ideal_points_are_found_and_mixed() -> None:
    """Two people want opposite ends of a line; a third agrees with the first, and a stranger lies between."""
    r = np.random.default_rng(0)
    first, second = r.normal(size=(2, 120, 6))
    names = ["ann", "bob", "cas"] * 40
    likes = np.array([-1.0 if name == "bob" else 1.0 for name in names])
    is_first = (first[:, 0] - second[:, 0]) * likes > 0
    won, lost = (np.where(choice[:, None], first, second) for choice in (is_first, ~is_first))
    tastes = fit_tastes(won, lost, names, num_prototypes=2, seed=0)
    line = np.zeros((5, 6))
    line[:, 0] = np.linspace(-1, 1, 5)
    order = {name: np.argsort(tastes.liking(line, name)[0]).tolist() for name in ("ann", "bob", "cas")}
    assert order["ann"] == order["cas"] == [0, 1, 2, 3, 4]
    assert order["bob"] == [4, 3, 2, 1, 0]
    assert tastes.liking(line).shape == (3, 5)
    stranger = tastes.liking(line, "dan")[0]
    assert np.ptp(stranger) < min(np.ptp(tastes.liking(line, name)) for name in ("ann", "bob"))
    again = fit_tastes(won, lost, names, num_prototypes=2, seed=0)
    assert (again.projection_Dd == tastes.projection_Dd).all()


def test_an_ideal_point_needs_labels_and_their_responses(matrix: ModelMatrix) -> None:
    with pytest.raises(
        InputError, match=r"judges\[0\].labels: labels and the responses that they are about go together"
    ):
        asked(matrix, some_candidates("3"), kind="ideal_point", labels="x")
    told = asked(matrix, some_candidates("3", "4"), kind="ideal_point")
    assert {(c.probability, c.reason) for c in told} == {(None, "nobody labelled anything yet")}


def test_an_ideal_point_learns_from_a_file_of_labels(matrix: ModelMatrix, tmp_path: Path) -> None:
    """Ann likes the first kind of response and bob the second; a run goes on with the same files only."""
    labelled = some_candidates("Sam Sam Sam", "3", num_prompts=12)
    write_jsonl(tmp_path / "responses.jsonl", map(candidates_row, labelled))
    labels = [make_label(item, (0, 1), name, p) for item in labelled for name, p in (("ann", 1.0), ("bob", 0.0))]
    write_jsonl(tmp_path / "labels.jsonl", map(label_row, labels))
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("responses", "labels")}
    ann, bob, stranger = (
        asked(matrix, some_candidates("3", "Sam Sam Sam"), kind="ideal_point", annotator=name, **files)
        for name in ("ann", "bob", "cas")
    )
    assert max(c.probability for c in ann) < 0.3 < 0.7 < min(c.probability for c in bob)
    assert [c.probability for c in stranger] == pytest.approx([0.5] * len(stranger), abs=0.25)

    judges = panel.make_judges(JudgesConfig(judges=[JudgeConfig(kind="ideal_point", **files)]))
    before = panel.inputs(judges, matrix)
    assert before.keys() == {"judges.ideal_point.responses", "judges.ideal_point.labels"}
    write_jsonl(tmp_path / "labels.jsonl", map(label_row, labels[1:]))
    changed = panel.inputs(judges, matrix)
    assert [name for name in before if before[name] != changed[name]] == ["judges.ideal_point.labels"]


# --------------------------------------------------------------------------------------------------------------- roles


def test_a_role_and_its_duties_are_in_the_question() -> None:
    shown = template.load("role")
    assert shown.read == "label"
    with pytest.raises(InputError, match="role: got None with template 'role'"):
        panel.make_judges(JudgesConfig(judges=[JudgeConfig(kind="llm", cell="policy", template="role")]))
    with pytest.raises(InputError, match=r"duties: got \['be kind'\] with template 'pairwise'"):
        panel.make_judges(JudgesConfig(judges=[JudgeConfig(kind="llm", cell="policy", duties=["be kind"])]))
    duties = ["explains each step", "never gives the answer away"]
    config = JudgeConfig(kind="llm", cell="policy", template="role", role="tutor", duties=duties)
    (judge,) = panel.make_judges(JudgesConfig(judges=[config]))
    assert isinstance(judge, LlmJudge)
    text = judge.questions(some_candidates("3", "4", num_prompts=1), {}).about(0, (1, 0))
    assert "in this role: tutor. " in text
    assert "[Duties]\n- explains each step\n- never gives the answer away\n[End of duties]" in text
    assert "[Response A]\n4\n" in text


# ----------------------------------------------------------------------------------------------------------- judgments


def judgments(*questions: list[float | None]) -> list[list[tuple[str, float]]]:
    """By question, the judgments that are kept and their scores."""
    asked = [
        Candidates(
            prompt=Prompt(id=f"o{k}", prompt="?"),
            responses=tuple(Response(model="m", text=str(value), sample=i) for i, value in enumerate(values)),
        )
        for k, values in enumerate(questions)
    ]
    return [[(r.text, r.scores[AGREEMENT]) for r in item.responses] for item in with_agreement(asked, questions)]


def test_judgments_agree_with_the_majority_or_not() -> None:
    assert judgments([1.0, 0.0, None, 1.0]) == [[("1.0", 1.0), ("0.0", 0.0), ("1.0", 1.0)]]
    assert judgments([7.0, 3.0, 9.0, 3.0]) == [[("7.0", 0.0), ("3.0", 1.0), ("9.0", 0.0), ("3.0", 1.0)]]
    assert judgments([1.0, 0.0]) == judgments([7.0, 3.0, 9.0]) == []  # a tie is no majority
    assert judgments([1.0, None]) == judgments([1.0, 1.0]) == judgments([None, None]) == []
    # Both orders have one majority; one in which all agree has no pair.
    assert judgments([1.0, 0.0], [1.0, 1.0]) == [[("1.0", 1.0), ("0.0", 0.0)]]
    assert judgments([1.0, 1.0], [0.0, 0.0]) == []  # always the one shown first


def test_pairs_of_judgments_do_not_hang_on_roles_and_margins() -> None:
    scored = with_agreement(some_candidates("yes", "no", "yes!", num_prompts=1), [[1.0, 0.0, 1.0]])
    config = PairingConfig(max_pairs=9, min_margin=5.0, chosen_from=["largest"], rejected_from=["human"])
    pairs = judgment_pairs(scored, config, 0)
    assert {(pair.chosen.text, pair.rejected.text) for pair in pairs} == {("yes", "no"), ("yes!", "no")}
    assert {(pair.decision, pair.score_chosen, pair.score_rejected) for pair in pairs} == {("keep", 1.0, 0.0)}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cell": "m.v1"}, "trains: got it with cell 'm.v1', whose judgments are no samples of the policy"),
        ({"model": CellConfig(path="m")}, "trains: got it with a model of its own"),
        ({"cell": "policy", "num_votes": 1}, "trains: one judgment has no other to be paired with"),
    ],
)
def test_only_several_judgments_of_the_policy_train(given: dict[str, Any], message: str) -> None:
    config = JudgeConfig(**{"kind": "llm", "num_votes": 2, "temperature": 1.0, "trains": True, **given})
    with pytest.raises(InputError, match=rf"judges\[0\]\.{message}"):
        panel.make_judges(JudgesConfig(judges=[config]))


# ------------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.slow
def test_rso_pairs_what_its_beta_accepts(tmp_path: Path, store: Path) -> None:
    """With a small beta the two best responses; with a large one, others too."""

    def ranks(beta: float) -> list[int]:
        changes = {"acceptance_beta": beta, "accepted_responses": 2}
        run = run_recipe("rso", tmp_path / str(beta), store=store, **changes)
        candidates, verdicts = judged(run)
        scores = {item.prompt.id: [] for item in candidates}
        for verdict in verdicts:
            scores[verdict.prompt_id].append(np.float32(verdict.score))  # as pairs have it
        return [sum(s > pair.score_rejected for s in set(scores[pair.prompt.id])) for pair in pairs_of(run)]

    assert set(ranks(1e-9)) == {1}
    assert max(ranks(1e9)) > 1


@pytest.mark.slow
def test_creams_labels_follow_the_consistency(tmp_path: Path, store: Path) -> None:
    """One value for all prompts, which is that of the rankings of the policy and of the version before it."""
    run = run_recipe("cream", tmp_path, store=store, num_iterations=2)
    for t in (1, 2):
        _, verdicts = judged(run, t)
        sure = {round(max(v.probability, 1 - v.probability), 6) for v in verdicts if v.probability != 0.5}
        assert {v.judge for v in verdicts} == {"consistency"}
        assert {round(pair.soft_label, 6) for pair in pairs_of(run, t)} == sure
        assert len(sure) == 1


@pytest.mark.slow
def test_scirs_mask_drops_what_two_rewards_disagree_on(tmp_path: Path, store: Path) -> None:
    """The policy cannot judge in words yet: another judge stands for its judgments."""
    judges = [
        JudgeConfig(kind="toy_judge:Shortest", name="llm"),
        JudgeConfig(kind="implicit", cell="policy", reference="previous"),
    ]
    run = run_recipe("scir", tmp_path, store=store, num_iterations=1, judges=judges)
    _, verdicts = judged(run)
    scores = {(v.judge, v.prompt_id, v.response): v.score for v in verdicts}
    candidates, pairs = judged(run)[0], pairs_of(run)
    texts = {item.prompt.id: [response.text for response in item.responses] for item in candidates}
    for pair in pairs:
        i, j = (texts[pair.prompt.id].index(response.text) for response in (pair.chosen, pair.rejected))
        assert all(scores[judge, pair.prompt.id, i] > scores[judge, pair.prompt.id, j] for judge in ("llm", "implicit"))
    info = run.info("iter-1/pairs")
    assert info is not None
    assert info["reasons"]["drop"]["judges disagree"] > len(pairs) > 0


@pytest.mark.slow
def test_upos_labels_are_the_lower_the_more_passes_disagree(tmp_path: Path, store: Path) -> None:
    judges = [JudgeConfig(kind="mc_dropout", reference="previous", beta=2.0, dropout=0.3, num_passes=4)]
    run = run_recipe("upo", tmp_path, store=store, num_iterations=1, judges=judges)
    candidates, verdicts = judged(run)
    texts = {item.prompt.id: [response.text for response in item.responses] for item in candidates}
    told = {(v.prompt_id, *v.responses): v.probability for v in verdicts}
    labels = set()
    for pair in pairs_of(run):
        i, j = (texts[pair.prompt.id].index(response.text) for response in (pair.chosen, pair.rejected))
        probability = told[pair.prompt.id, min(i, j), max(i, j)]
        assert pair.soft_label == pytest.approx(max(probability, 1 - probability))
        labels.add(pair.soft_label)
    assert 0.5 < min(labels) < max(labels) <= 1.0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["osp", "self_reference"])
def test_where_the_policy_cannot_judge_the_matrix_decides(name: str, tmp_path: Path, store: Path) -> None:
    """The questions exceed the context of a tiny model: all of them are refused, and the run goes on.

    OSP asks of each response against a middle one, self-reference for an answer of the judge's own to each prompt.
    """
    run = run_recipe(name, tmp_path, store=store, num_iterations=1)
    _, verdicts = judged(run)
    assert {v.judge for v in verdicts} == {"llm"}
    info = run.info("iter-1/score")
    assert info is not None
    pairs, cost = pairs_of(run), info["costs"]["llm"]
    assert {v.probability for v in verdicts} <= {None, 0.5}
    assert {(pair.reason, pair.margin) for pair in pairs} == {("prior alone", 0.0)}
    asked_of: dict[str, list[set[int]]] = {}
    for v in verdicts:
        asked_of.setdefault(v.prompt_id, []).append(set(v.responses))
    if name == "osp":
        assert all(set.intersection(*compared) for compared in asked_of.values())
        assert {pair.soft_label for pair in pairs} == {0.5}
    else:
        assert cost["requests"] - cost["refused"] == len(asked_of)


@pytest.mark.slow
def test_pals_annotators_have_orders_of_their_own(tmp_path: Path, store: Path) -> None:
    """From the second iteration on, by their labels of the first."""
    judges = [JudgeConfig(kind="ideal_point", name=name, annotator=name) for name in ("long", "short")]
    changes: dict[str, Any] = {"judges": judges, "evidence_from": ["long", "short"], "max_completion_length": 40}
    people = "toy_judge:two_tastes"
    run = run_recipe("pal", tmp_path, num_iterations=2, on_no_evidence="prior", people=people, **changes)
    assert {v.probability for v in judged(run, 1)[1]} == {None}
    candidates, verdicts = judged(run, 2)
    lengths = {(item.prompt.id, i): len(r.text) for item in candidates for i, r in enumerate(item.responses)}
    told = {(v.judge, v.prompt_id, *v.responses): v.probability for v in verdicts}
    towards_longer = []
    for (judge, prompt_id, i, j), probability in told.items():
        longer = np.sign(lengths[prompt_id, i] - lengths[prompt_id, j])
        if judge == "long" and longer:
            towards_longer.append(longer * (probability - told["short", prompt_id, i, j]))
    assert np.mean(towards_longer) > 0.05  # who likes long responses prefers the longer one more often


def teach_ratings(matrix: ModelMatrix, folder: Path) -> Path:
    """A copy of m.v2 that replies 7, or else 3: it can give no reasons."""
    model: Any = AutoModelForCausalLM.from_pretrained(matrix.named["m.v2"].path)
    digits = [matrix.tokenizer.encode(digit, add_special_tokens=False)[-1] for digit in "73"]
    want = torch.zeros(2, model.config.vocab_size)
    want[0, digits], want[1, matrix.tokenizer.eos_token_id] = torch.tensor([0.7, 0.3]), 1.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for k, item in enumerate(3 * read_candidates(build(SMALL) / "prompts.jsonl", BadRows())):
        asked = Prompt(id="-", prompt=f"{k} {item.prompt.text} Rate")
        ids = torch.tensor([[*encode_prompt(matrix.tokenizer, asked), digits[k % 2]]])
        nn.functional.cross_entropy(model(ids).logits[0, -2:], want).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    matrix.tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_self_rationalizations_judgments_are_pairs(matrix: ModelMatrix, tmp_path: Path, store: Path) -> None:
    (tmp_path / "rate.txt").write_text("---\nrange: 0-9\n---\n{prompt} {response} Rate")
    judge = JudgeConfig(
        kind="llm",
        cell="policy",
        template=str(tmp_path / "rate.txt"),
        num_votes=4,
        temperature=1.0,
        max_completion_length=2,
        trains=True,
    )
    cells = [
        CellConfig(path=str(matrix.named["m.v1"].path), version_rank=1),
        CellConfig(path=str(teach_ratings(matrix, tmp_path / "m.v9")), version_rank=9),
    ]
    run = run_recipe("self_rationalization", tmp_path, store=store, num_iterations=1, judges=[judge], cells=cells)
    candidates, _ = judged(run)
    asked = {
        f"{item.prompt.id}/llm-{i}": f"{item.prompt.text} {response.text} Rate"
        for item in candidates
        for i, response in enumerate(item.responses)
    }
    kept = {item.prompt.id: item for item in read_candidates(run.iteration(1).judgments, BadRows())}
    own = [pair for pair in pairs_of(run) if "/llm-" in pair.prompt.id]
    info = run.info("iter-1/pairs")
    assert info is not None
    assert 0 < len(own) == info["judgment_pairs"] < info["pairs"]
    assert "iter-1/judgments.jsonl" in run.state["manifest"]
    for pair in own:
        assert pair.prompt.prompt == asked[pair.prompt.id]
        assert pair.chosen.model == pair.rejected.model == "m.v9"
        assert pair.chosen.token_ids
        values = [read_rating(response.text, 0, 9)[0] for response in kept[pair.prompt.id].responses]
        chosen, rejected = (read_rating(side.text, 0, 9)[0] for side in (pair.chosen, pair.rejected))
        assert values.count(chosen) > max(values.count(value) for value in values if value != chosen)
        assert rejected is not None
        assert rejected != chosen
