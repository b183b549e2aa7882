"""Judges that look at versions, dropout, people and rationales, each alone; and the recipes that are made of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_runs import run_recipe

from tso_fast.files.rows import BadRows, read_candidates, read_pairs, read_verdicts
from tso_fast.files.run import Run
from tso_fast.types import Candidates, Comparison, PreferencePair, Verdict


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the cells answered, for all recipes."""
    return tmp_path_factory.mktemp("recipes") / "store"


def pairs_of(run: Run, t: int = 1) -> list[PreferencePair]:
    return read_pairs(run.iteration(t).pairs, BadRows())


def judged(run: Run, t: int = 1) -> tuple[list[Candidates], list[Verdict | Comparison]]:
    candidates = read_candidates(run.iteration(t).responses, BadRows())
    return candidates, read_verdicts(run.iteration(t).verdicts, candidates, BadRows(), may_be_empty=True)


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
            scores[verdict.prompt_id].append(verdict.score)
        return [sum(s > pair.score_rejected for s in set(scores[pair.prompt.id])) for pair in pairs_of(run)]

    assert set(ranks(1e-9)) == {1}
    assert max(ranks(1e9)) > 1
