"""Ideal points of people: a small head on a cell's embeddings that learns from labels what each annotator likes.

PAL (Chen et al. 2025, arXiv 2406.08469), its first model: an annotator's ideal point is a mixture of a few prototypes
that all annotators share, and a response is the better, the closer its embedding lies to it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tso_fast.config.settings import JudgeConfig
from tso_fast.errors import InputError
from tso_fast.files.atomic import sha256_file
from tso_fast.files.labels import read_labels
from tso_fast.files.rows import BadRows, read_candidates
from tso_fast.judges.implicit import TOO_LONG, batches, encoded, find_cell, loaded, loading
from tso_fast.judges.judge import Bench, Judge, Judged, Opinion, as_comparisons
from tso_fast.matrix import ModelMatrix
from tso_fast.models.layout import padded
from tso_fast.models.policy import Policy
from tso_fast.models.tokens import IGNORE, padding_id
from tso_fast.scoring.strengths import win_probability
from tso_fast.seeds import seed_of
from tso_fast.types import Candidates, Comparison

DIMENSIONS = 16
"""Most dimensions of the space of ideal points."""
STEPS, RATE, DECAY = 200, 0.05, 1e-3


class IdealPointJudge(Judge):
    """Judge of kind ``ideal_point``: comparisons by what annotators like, learnt from their labels.

    It learns from the labels of a file and from those of earlier iterations. The probability that a response is better
    is the mean over annotators of sigmoid(distance of the other - distance of this one), or that of one ``annotator``;
    one who never labelled has the mean of all mixtures. Without labels it abstains.
    """

    takes = ("cell", "labels", "responses", "annotator", "num_prototypes")
    needs_models = True

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__(config)
        if (config.labels is None) != (config.responses is None):
            given = "labels" if config.responses is None else "responses"
            raise ValueError(f"{given}: labels and the responses that they are about go together; give both or neither")

    @property
    def _cell(self) -> str:
        return self.config.cell or "policy"

    def check(self, matrix: ModelMatrix | None) -> None:
        find_cell(self._cell, self.name, matrix)
        self._labelled(())

    def inputs(self, matrix: ModelMatrix) -> dict[str, str]:
        files = {"responses": self.config.responses, "labels": self.config.labels}
        return {name: sha256_file(Path(file)) for name, file in files.items() if file is not None}

    def judge(self, candidates: Sequence[Candidates], bench: Bench) -> Judged:
        labelled = self._labelled(bench.labelled)
        if not labelled:
            return Judged(_comparisons(candidates, self.name, None))
        known = [item for item, _ in labelled]
        embedding_RD = self._embeddings([*known, *candidates], bench)
        starts = np.cumsum([0, *(len(item.responses) for item in [*known, *candidates])])
        won, lost, names = [], [], []
        for start, (_, labels) in zip(starts.tolist(), labelled, strict=False):
            for label in labels:
                if label.probability in (0.0, 1.0):
                    i, j = label.responses if label.probability else label.responses[::-1]
                    won.append(start + i)
                    lost.append(start + j)
                    names.append(label.annotator or "")
        is_known = ~np.isnan(embedding_RD[won, 0] + embedding_RD[lost, 0]) if won else np.zeros(0, dtype=bool)
        if not is_known.any():
            return Judged(_comparisons(candidates, self.name, None))
        assert bench.settings is not None
        taste = fit_tastes(
            embedding_RD[np.array(won)[is_known]],
            embedding_RD[np.array(lost)[is_known]],
            [name for name, is_used in zip(names, is_known, strict=True) if is_used],
            num_prototypes=self.config.num_prototypes,
            seed=bench.settings.seed,
        )
        liking_UR = taste.liking(embedding_RD[starts[len(known)] :], self.config.annotator)
        return Judged(_comparisons(candidates, self.name, liking_UR))

    def _labelled(self, files: Sequence[tuple[Path, Path]]) -> list[tuple[Candidates, list[Comparison]]]:
        """Candidates with their labels, of the judge's own file and of others."""
        own = [] if self.config.labels is None else [(Path(self.config.responses or ""), Path(self.config.labels))]
        found = []
        for responses, labels in [*own, *files]:
            try:
                candidates = read_candidates(responses, BadRows())
                by_prompt: dict[str, list[Comparison]] = {}
                for label in read_labels(labels, candidates, BadRows()):
                    by_prompt.setdefault(label.prompt_id, []).append(label)
            except OSError as error:
                raise InputError(
                    f"judges: {self.name!r}: {error}; expected JSONL of responses and of labels"
                ) from error
            found += [(item, by_prompt[item.prompt.id]) for item in candidates if item.prompt.id in by_prompt]
        return found

    def _embeddings(self, candidates: Sequence[Candidates], bench: Bench) -> np.ndarray:
        """[R, D] mean of the output head's input over each response's tokens; NaN = longer than the context."""
        assert bench.matrix is not None
        cell, tokenizer = find_cell(self._cell, self.name, bench.matrix), bench.matrix.tokenizer
        rows, is_scored = encoded(cell, candidates, tokenizer)
        with loaded(cell, **loading(bench)) as model:
            found = embeddings(model, rows, padding_id(tokenizer))
        fits_R = np.array(list(itertools.chain.from_iterable(is_scored)), dtype=bool)
        out = np.full((len(fits_R), found.shape[1]), np.nan)
        out[fits_R] = found
        return out


@torch.inference_mode()
def embeddings(model: nn.Module, rows: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], pad: int) -> np.ndarray:
    """[R, D] float64: mean over the completion's tokens of what they are predicted from."""
    policy = Policy(model.eval())
    out: dict[int, np.ndarray] = {}
    for index in batches([len(prompt) + len(completion) for prompt, completion in rows], 16384):
        layout = padded([rows[i] for i in index], pad).to(policy.model.device)
        is_target = (layout.targets != IGNORE)[..., None]
        hidden = policy.hidden_of(layout).double()
        mean = (hidden * is_target).sum(dim=1) / is_target.sum(dim=1)
        out |= dict(zip(index, mean.cpu().numpy(), strict=True))
    return np.stack([out[i] for i in range(len(rows))])


@dataclass(frozen=True, kw_only=True)
class Tastes:
    """What annotators like: a projection of embeddings, and an ideal point for each of them."""

    mean_D: np.ndarray
    std_D: np.ndarray
    projection_Dd: np.ndarray
    prototypes_Kd: np.ndarray
    mixture_UK: np.ndarray
    """Shares of the prototypes in each annotator's ideal point."""
    annotators: tuple[str, ...]

    def liking(self, embedding_RD: np.ndarray, annotator: str | None = None) -> np.ndarray:
        """[U, R] negated distances to the ideal points of all annotators, or [1, R] to that of one.

        One who is not known has the mean of all mixtures.
        """
        mixture_UK = self.mixture_UK
        if annotator in self.annotators:
            mixture_UK = mixture_UK[[self.annotators.index(annotator or "")]]
        elif annotator is not None:
            mixture_UK = mixture_UK.mean(axis=0, keepdims=True)
        point_Rd = (embedding_RD - self.mean_D) / self.std_D @ self.projection_Dd
        ideal_Ud = mixture_UK @ self.prototypes_Kd
        return -np.sqrt(((point_Rd[None] - ideal_Ud[:, None]) ** 2).sum(axis=-1))


def fit_tastes(
    won_ND: np.ndarray, lost_ND: np.ndarray, annotators: Sequence[str], *, num_prototypes: int, seed: int
) -> Tastes:
    """Ideal points under which annotators are likely to have preferred what they did.

    The logistic loss of differences of distance with weight decay, by Adam over all labels at once, in float64.
    """
    names = tuple(dict.fromkeys(annotators))
    user_N = torch.tensor([names.index(name) for name in annotators])
    both = np.concatenate([won_ND, lost_ND])
    mean_D, std_D = both.mean(axis=0), both.std(axis=0) + 1e-6
    won, lost = (torch.from_numpy((x - mean_D) / std_D) for x in (won_ND, lost_ND))
    size = min(won.shape[1], DIMENSIONS)
    generator = torch.Generator().manual_seed(seed_of("ideal_point", seed))

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

    projection, prototypes = drawn(won.shape[1], size), drawn(num_prototypes, size)
    mixture = drawn(len(names), num_prototypes)
    with torch.no_grad():
        projection /= won.shape[1] ** 0.5
        mixture *= 0.1
    optimizer = torch.optim.Adam([projection, prototypes, mixture], lr=RATE)
    for _ in range(STEPS):
        ideal = (mixture.softmax(dim=1) @ prototypes)[user_N]
        gap = torch.linalg.vector_norm(lost @ projection - ideal, dim=1)
        gap = gap - torch.linalg.vector_norm(won @ projection - ideal, dim=1)
        weights = sum((p**2).sum() for p in (projection, prototypes, mixture))
        optimizer.zero_grad()
        (nn.functional.softplus(-gap).mean() + DECAY * weights).backward()
        optimizer.step()
    return Tastes(
        mean_D=mean_D,
        std_D=std_D,
        projection_Dd=projection.detach().numpy(),
        prototypes_Kd=prototypes.detach().numpy(),
        mixture_UK=mixture.detach().softmax(dim=1).numpy(),
        annotators=names,
    )


def _comparisons(candidates: Sequence[Candidates], name: str, liking_UR: np.ndarray | None) -> list[Comparison]:
    """Every two responses of each prompt; None: nobody has labelled anything."""
    found, end = list[Comparison](), 0
    for item in candidates:
        start, end = end, end + len(item.responses)
        own_UR = None if liking_UR is None else liking_UR[:, start:end]
        found += as_comparisons(item, name, functools.partial(_compared, own_UR))
    return found


def _compared(liking_UR: np.ndarray | None, i: int, j: int) -> Opinion:
    if liking_UR is None:
        return Opinion(None, "nobody labelled anything yet")
    mean = float(win_probability(liking_UR[:, i] - liking_UR[:, j]).mean())
    return TOO_LONG if np.isnan(mean) else Opinion(mean)
