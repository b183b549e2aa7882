"""Small parts, timed by pytest-benchmark and compared with the last time: op, packing, batching, scoring, pairs, store.

    make bench                                      saves the figures in .benchmarks, with the commit, and compares them
    make bench BENCH="-k op"                        some of them
    .venv/bin/pytest-benchmark compare              all that were saved

Machines differ and are noisy: figures of one machine are compared, and a difference is looked at once more.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tso_fast import preference_loss
from tso_fast.config.settings import EvidenceConfig, PairingConfig
from tso_fast.correction.make_pairs import make_pairs
from tso_fast.files.responses import ResponseStore, prompt_hash, response_key, settings_hash
from tso_fast.models.layout import padded, shared
from tso_fast.scoring import consensus, select_pairs
from tso_fast.training.batches import EncodedPair, collate, plan_steps
from tso_fast.types import Candidates, Prompt, Response, Verdict

PAIRS = 64


@pytest.fixture(scope="module")
def pairs() -> list[EncodedPair]:
    """Four pairs a prompt, as the loop makes them: one chosen response and four rejected ones."""
    rng = random.Random(0)

    def tokens(most: int) -> tuple[int, ...]:
        return tuple(rng.randrange(32000) for _ in range(rng.randrange(most // 2, most)))

    out: list[EncodedPair] = []
    for p in range(PAIRS // 4):
        prompt, chosen = tokens(256), tokens(256)
        out += [
            EncodedPair(
                prompt=prompt, chosen=chosen, rejected=tokens(256), scale=1.0, soft_label=1.0, margin=0.0,
                prompt_id=str(p),
            )
            for _ in range(4)
        ]  # fmt: skip
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_op(benchmark: Any, dtype: torch.dtype) -> None:
    """Forward and backward of the dual clip on 8 pairs of 2 x 64 tokens, D 512, V 8192."""
    torch.manual_seed(0)
    hidden = torch.randn(16, 64, 512).to(dtype).requires_grad_()
    weight = torch.randn(8192, 512).mul(0.05).to(dtype).requires_grad_()
    target, reference = torch.randint(0, 8192, (16, 64)), torch.full((16,), -500.0)

    def step() -> None:
        preference_loss(hidden, weight, target, ref_logprobs=reference).loss.backward()

    benchmark(step)


@pytest.mark.parametrize("layout", [padded, shared])
def test_packing(benchmark: Any, pairs: list[EncodedPair], layout: Any) -> None:
    """Rows of 64 pairs' sequences."""
    sequences = list(dict.fromkeys((pair.prompt, side) for pair in pairs for side in (pair.chosen, pair.rejected)))
    benchmark(layout, sequences, 0)


def test_batching(benchmark: Any, pairs: list[EncodedPair]) -> None:
    """Batches of an epoch of 64 pairs, 8 at a time, with prompts shared."""

    def epoch() -> None:
        shares = {"epochs": 1, "micro_size": 8, "accumulation": 1, "rank": 0, "world": 1, "seed": 0}
        for step in plan_steps([pair.prompt for pair in pairs], **shares):
            for micro in step.micro_batches:
                collate(pairs, micro.index, pad_token_id=0, device=torch.device("cpu"), share_prompts=True)

    benchmark(epoch)


@pytest.fixture(scope="module")
def scores() -> tuple[np.ndarray, np.ndarray]:
    """Of 20,000 prompts with 8 responses each by 4 scorers, and where each prompt's begin."""
    values = np.random.default_rng(0).normal(size=(160_000, 4)).astype(np.float32)
    return values, np.arange(0, 160_001, 8)


def test_scoring(benchmark: Any, scores: tuple[np.ndarray, np.ndarray]) -> None:
    benchmark(consensus, *scores, method="mean", normalize="z")


def test_selection(benchmark: Any, scores: tuple[np.ndarray, np.ndarray]) -> None:
    values, offsets = scores
    benchmark(select_pairs, values[:, 0], offsets, strategy="best_random", max_pairs=2)


def test_pairing(benchmark: Any) -> None:
    """Pairs of 500 prompts with 8 responses of four cells, judged by a program."""
    rng = random.Random(0)
    candidates = [
        Candidates(
            prompt=Prompt(id=str(p), prompt="?"),
            responses=tuple(
                Response(model=f"m{i % 4}", text=str(rng.randrange(9)), size_b=1.0, version_rank=i % 4, sample=i // 4)
                for i in range(8)
            ),
        )
        for p in range(500)
    ]
    verdicts = [
        Verdict(prompt_id=item.prompt.id, response=i, judge="exact", score=float(response.text == "7"))
        for item in candidates
        for i, response in enumerate(item.responses)
    ]
    benchmark(make_pairs, candidates, verdicts, EvidenceConfig(), PairingConfig(max_pairs=4), 0)


def test_store(benchmark: Any, tmp_path: Path) -> None:
    """2,000 responses of 100 tokens, written and read."""
    settings = settings_hash(weights="0", engine="hf")
    keys = [response_key(prompt_hash([i]), settings, 0) for i in range(2000)]
    rows: list[Any] = [(key, tuple(range(100)), "text " * 50, "stop", -1.0, None) for key in keys]

    def write_and_read(folder: Path) -> None:
        with ResponseStore(folder) as store:
            store.add(rows)
            store.get(keys)

    numbers = iter(range(10**6))
    benchmark.pedantic(write_and_read, setup=lambda: ((tmp_path / str(next(numbers)),), {}), rounds=20)
