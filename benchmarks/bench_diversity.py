"""Distances between responses by shared n-grams: ours against Python sets.

    python benchmarks/bench_diversity.py                       a minute or two on two cores
    python benchmarks/bench_diversity.py --prompts 500 --rounds 3 --out trial.json

The data are 10 000 prompts x 16 responses x about 300 tokens, Zipf-like over 32 000, with stretches that responses of a
prompt share. Python sets are timed on some of the prompts and scaled to all; each of their rounds uses other prompts.
Times are medians of interleaved rounds with quartiles, and ratios are taken within a round. Correctness comes first: on
a sample ours must equal Python sets bit for bit, otherwise nothing is timed and the exit status is 1.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from harness import RESULTS, commit, interleave, machine, spread, table, versions, write_json

from tso_fast.scoring import distinct_n, distinct_n_reference, pairwise_distances, self_bleu, self_bleu_reference

OUT = RESULTS / "diversity-cpu.json"
VOCABULARY = 32_000
GOAL = 50.0

Texts = tuple[np.ndarray, np.ndarray, np.ndarray]


def make(num_prompts: int, responses: int, length: int, seed: int = 0) -> Texts:
    """Random texts: responses consist of stretches of 5 to 40 tokens, 60 % of them from a pool per prompt."""
    rng = np.random.default_rng(seed)
    shares = 1 / np.arange(1, VOCABULARY + 1)
    cumulative = np.cumsum(shares / shares.sum())

    def zipf(count: int) -> np.ndarray:
        return np.minimum(np.searchsorted(cumulative, rng.random(count)), VOCABULARY - 1).astype(np.int32)

    tokens, lengths = [], []
    for _ in range(num_prompts):
        pool = zipf(1600)
        for size in rng.integers(int(0.9 * length), int(1.1 * length) + 1, responses):
            response, filled = zipf(size), 0
            while filled < size:
                stretch = int(rng.integers(5, 41))
                if rng.random() < 0.6:
                    start = int(rng.integers(0, 40)) * 40
                    piece = pool[start : start + min(stretch, size - filled)]
                    response[filled : filled + len(piece)] = piece
                filled += stretch
            tokens.append(response)
            lengths.append(size)
    return (
        np.concatenate(tokens),
        np.concatenate([[0], np.cumsum(lengths)]),
        np.arange(num_prompts + 1) * responses,
    )


def some(texts: Texts, first: int, last: int) -> Texts:
    """The prompts [first, last)."""
    tokens, token_offsets, offsets = texts
    responses = token_offsets[offsets[first] : offsets[last] + 1]
    return tokens[responses[0] : responses[-1]], responses - responses[0], offsets[first : last + 1] - offsets[first]


def python_sets(responses: list[list[list[int]]], n: int) -> list[list[float]]:
    """The obvious implementation: computes each pair of a prompt once."""
    blocks = []
    for prompt in responses:
        sets = [set(zip(*(response[i:] for i in range(n)), strict=False)) for response in prompt]
        block = [0.0] * len(sets) ** 2
        for i, a in enumerate(sets):
            for j in range(i + 1, len(sets)):
                b = sets[j]
                both = len(a & b)
                either = len(a) + len(b) - both
                block[i * len(sets) + j] = block[j * len(sets) + i] = 1 - both / either if either else 0.0
        blocks.append(block)
    return blocks


def as_lists(texts: Texts) -> list[list[list[int]]]:
    tokens, token_offsets, offsets = texts
    responses = [tokens[a:b].tolist() for a, b in pairwise(token_offsets)]
    return [responses[a:b] for a, b in pairwise(offsets)]


def is_right(texts: Texts, n: int, threads: int) -> bool:
    expected = np.array([value for block in python_sets(as_lists(texts), n) for value in block], np.float32)
    few = some(texts, 0, 5)
    return (
        np.array_equal(pairwise_distances(*texts, n=n, num_threads=threads), expected)
        and np.array_equal(distinct_n(*texts, n=n), distinct_n_reference(*texts, n=n))
        and np.allclose(self_bleu(*few), self_bleu_reference(*few), rtol=1.2e-7, atol=0)
    )


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=10_000)
    parser.add_argument("--responses", type=int, default=16)
    parser.add_argument("--length", type=int, default=300, help="tokens of a response, within 10 %%")
    parser.add_argument("--n", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--python_prompts", type=int, default=100, help="prompts a round of Python sets takes")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(argv)

    texts = make(args.prompts, args.responses, args.length)
    sample = min(args.python_prompts, args.prompts)
    if not is_right(some(texts, 0, min(50, sample)), args.n, args.threads):
        print("wrong: ours differs from Python sets on the sample; nothing was timed", file=sys.stderr)
        return 1

    next_sample = 0

    def python_round() -> float:
        nonlocal next_sample
        first = next_sample % max(1, args.prompts - sample + 1)
        next_sample += sample
        lists = as_lists(some(texts, first, first + sample))
        return seconds(lambda: python_sets(lists, args.n)) * args.prompts / sample

    def ours(threads: int) -> Callable[[], float]:
        return lambda: seconds(lambda: pairwise_distances(*texts, n=args.n, num_threads=threads))

    name = f"distances, {args.threads} threads"
    calls = {
        "Python sets": python_round,
        "distances, 1 thread": ours(1),
        name: ours(args.threads),
        f"distinct_n, {args.threads} threads": lambda: seconds(
            lambda: distinct_n(*texts, n=args.n, num_threads=args.threads)
        ),
        f"self_bleu to 4, {args.threads} threads": lambda: seconds(lambda: self_bleu(*texts, num_threads=args.threads)),
    }
    times = interleave(calls, dict.fromkeys(calls, args.rounds))
    ratios = {
        what: spread([base / own for base, own in zip(times["Python sets"], times[what], strict=True)])
        for what in ("distances, 1 thread", name)
    }
    spreads = {what: spread(values) for what, values in times.items()}
    distances = pairwise_distances(*some(texts, 0, sample), n=args.n)
    ngrams = int(np.maximum(np.diff(texts[1]) - args.n + 1, 0).sum())
    record = {
        "command": " ".join(["python benchmarks/bench_diversity.py", *(sys.argv[1:] if argv is None else argv)]),
        "machine": machine(),
        "versions": versions("numpy", "tso-fast"),
        "commit": commit(),
        "shape": {
            "prompts": args.prompts,
            "responses": args.responses,
            "tokens": len(texts[0]),
            "n": args.n,
            "ngrams": ngrams,
            "mean_distance": float(distances[distances > 0].mean()),
        },
        "python_prompts": sample,
        "python_is_scaled_by": args.prompts / sample,
        "seconds": spreads,
        "ratio_to_python_sets": ratios,
        "goal_ratio": GOAL,
        "all_seconds": times,
    }
    write_json(args.out, record)
    print(
        f"{args.prompts} prompts x {args.responses} responses, {len(texts[0]):,} tokens, n = {args.n}; mean distance "
        f"{record['shape']['mean_distance']:.2f}; Python sets on {sample} prompts a round, scaled\n"
    )

    def row(what: str, value: dict[str, float]) -> list[str]:
        ratio = ratios.get(what)
        return [
            what,
            f"{value['median']:.3f} ({value['q1']:.3f} to {value['q3']:.3f})",
            f"{value['median'] / args.prompts * 1e6:.1f}",
            f"{ratio['median']:.0f} x ({ratio['q1']:.0f} to {ratio['q3']:.0f})" if ratio else "",
        ]

    print(table(["", "seconds", "us a prompt", "faster than Python sets"], [row(*item) for item in spreads.items()]))
    if ratios[name]["median"] < GOAL:
        print(f"\ngoal missed: {GOAL:.0f} x with {args.threads} threads")
    return 0


if __name__ == "__main__":
    sys.exit(main())
