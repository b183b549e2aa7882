"""Why a loss does what it does: what happens to log-probs, gradients, entropy and samples while it trains.

    python benchmarks/bench_mechanism.py                        dual clip, with NLL, DPO and chosen-only, three seeds
    python benchmarks/bench_mechanism.py --figure docs/mechanism.png --seeds 1
    python benchmarks/bench_mechanism.py --table                from the JSON that is there

All losses train on the same pairs, those of the first iteration of the quickstart's first task, from the same start.
Every few steps the policy is looked at: on pairs of training, and by samples on prompts of the development set.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from accelerate import Accelerator
from harness import RESULTS, ROOT, commit, machine, table, versions, write_json

from tso_fast.cli import quickstart_config
from tso_fast.files.rows import BadRows, read_candidates, read_pairs
from tso_fast.files.run import Run
from tso_fast.judges.verifier import make_verifier
from tso_fast.matrix import ModelMatrix
from tso_fast.models.layout import padded
from tso_fast.models.policy import Policy
from tso_fast.models.tokens import encode_prompt
from tso_fast.report.figures import save as save_figure
from tso_fast.trainer import train
from tso_fast.training import optimise as optimise_module
from tso_fast.training.batches import EncodedPair, collate, encode_pairs
from tso_fast.training.load import load_policy
from tso_fast.training.monitors import MetricsLog
from tso_fast.types import PairLogprobs, Response

SEEDS = (200, 201, 202)
LOSSES: dict[str, dict[str, Any]] = {
    "dual clip": {"loss_args": {"nll_weight": 0.0}},
    "dual clip + NLL": {"loss_args": {"nll_weight": 1.0}},
    "DPO": {"loss_type": "dpo", "clip_chosen": None, "clip_rejected": None},
    "chosen-only": {"loss_type": "sft", "beta": None, "clip_chosen": None, "clip_rejected": None},
}
COLOURS = ("#0072B2", "#009E73", "#D55E00", "#333333")
SAMPLES = 8
PANELS = {
    "chosen": "log-prob of the chosen, nats",
    "rejected": "log-prob of the rejected, nats",
    "chosen_share": "gradient on the chosen, share",
    "clipped": "sides that are clipped",
    "entropy": "entropy of a response, nats",
    "kl": "KL to the start, nats",
    "pass@1": "samples that are right",
    f"pass@{SAMPLES}": f"prompts with one of {SAMPLES} right",
    "mass": "mass on chosen and rejected",
}
"""What is measured, and its name."""
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watched:
    """What a policy is looked at with: the same for all losses of a seed."""

    start: Policy
    pairs: Sequence[EncodedPair]
    reference: torch.Tensor
    """[pairs, 2] log-probs at the start, nats."""
    prompts: Sequence[Any]
    tokenizer: Any
    max_tokens: int


def watch(policy: Policy, loss: Any, watched: Watched) -> Row:
    """All figures of a policy as it is now."""
    policy.eval()
    with torch.no_grad():
        row = {**_of_pairs(policy, loss, watched), **_of_samples(policy, watched)}
    policy.train()
    return row


def _of_pairs(policy: Policy, loss: Any, watched: Watched) -> Row:
    """Log-probs of both sides, and who gets the gradient of the loss."""
    batch = collate(watched.pairs, range(len(watched.pairs)), pad_token_id=0, device=torch.device("cpu"))
    chosen, rejected = policy(batch, impl="auto").double().reshape(2, -1)
    sides = [side.clone().requires_grad_() for side in (chosen, rejected)]
    reference = watched.reference.double().T
    lengths = [torch.tensor([len(getattr(p, side)) for p in watched.pairs]) for side in ("chosen", "rejected")]
    given = PairLogprobs(
        chosen=sides[0],
        rejected=sides[1],
        ref_chosen=reference[0],
        ref_rejected=reference[1],
        num_chosen_tokens=lengths[0],
        num_rejected_tokens=lengths[1],
    )
    with torch.enable_grad():
        losses = loss(given)
        slopes = torch.autograd.grad(losses.sum(), sides, materialize_grads=True)
    pull = [float(slope.abs().sum()) for slope in slopes]
    options, beta = loss.options, loss.options.get("beta", 0.3)
    clipped = torch.stack(
        [
            beta * (chosen - reference[0]) > options.get("clip_chosen", torch.inf),
            beta * (reference[1] - rejected) > options.get("clip_rejected", torch.inf),
        ]
    )
    return {
        "chosen": float(chosen.mean()),
        "rejected": float(rejected.mean()),
        "mass": float((chosen.exp() + rejected.exp()).mean()),
        "chosen_share": pull[0] / (sum(pull) or 1.0),
        "clipped": float(clipped.double().mean()),
        "both_clipped": float(clipped.all(dim=0).double().mean()),
    }


def _of_samples(policy: Policy, watched: Watched) -> Row:
    """Entropy and KL divergence to the start, estimated from samples, and how many of them are right."""
    check = make_verifier("exact")
    torch.manual_seed(0)
    sequences, right = [], []
    end = watched.tokenizer.eos_token_id
    for item in watched.prompts:
        ids = encode_prompt(watched.tokenizer, item.prompt)
        out = policy.model.generate(
            torch.tensor([ids]),
            do_sample=True,
            num_return_sequences=SAMPLES,
            max_new_tokens=watched.max_tokens,
            pad_token_id=0,
            eos_token_id=end,
        )
        for response in out[:, len(ids) :].tolist():
            kept = tuple(response[: response.index(end) + 1] if end in response else response)
            sequences.append((ids, kept))
            text = watched.tokenizer.decode(kept, skip_special_tokens=True)
            right.append(check(item.prompt, Response(model="policy", text=text)).score or 0.0)
    layout = padded(sequences, 0)
    own, start = (p.logprobs(layout, impl="auto").sum(dim=1) for p in (policy, watched.start))
    best = [max(right[i : i + SAMPLES]) for i in range(0, len(right), SAMPLES)]
    return {
        "entropy": -float(own.mean()),
        "kl": float((own - start).mean()),
        "pass@1": mean(right),
        f"pass@{SAMPLES}": mean(best),
    }


def run_seed(seed: int, every: int, num_pairs: int, num_prompts: int) -> list[Row]:
    """Rows of all losses of a seed: the pairs of its first iteration are made once."""
    with tempfile.TemporaryDirectory() as scratch:
        config = quickstart_config(["--seed", str(seed), "--output_dir", f"{scratch}/pairs"], "development")
        # One iteration of a third of the prompts, and no training to speak of: only its pairs are wanted.
        held_out, config.eval_prompts = config.eval_prompts, None
        few = dataclasses.replace(config, num_train_epochs=1, learning_rate=0.0, num_iterations=1)
        lines = Path(config.prompts).read_text(encoding="utf-8").splitlines(keepends=True)
        few.prompts = f"{scratch}/prompts.jsonl"
        Path(few.prompts).write_text("".join(lines[: len(lines) // 3]), encoding="utf-8")
        run = train(few)
        matrix = ModelMatrix(config.cells, config.policy)
        pairs = encode_pairs(
            matrix.tokenizer, read_pairs(run.folder / "iter-1/pairs.jsonl", BadRows()), matrix.context
        ).pairs
        accelerator = Accelerator(cpu=True)
        start = load_policy(config, matrix.policy.weights, accelerator).eval()
        some = pairs[:: max(1, len(pairs) // num_pairs)][:num_pairs]
        batch = collate(some, range(len(some)), pad_token_id=0, device=accelerator.device)
        with torch.no_grad():
            reference = start(batch, impl="auto").reshape(2, -1).T
        watched = Watched(
            start=start,
            pairs=some,
            reference=reference,
            prompts=read_candidates(str(held_out), BadRows())[:num_prompts],
            tokenizer=matrix.tokenizer,
            max_tokens=config.max_completion_length,
        )
        rows = []
        for name, changes in LOSSES.items():
            settings = dataclasses.replace(config, **changes, logging_steps=every)
            rows += run_loss(name, seed, settings, matrix, pairs, watched, Path(scratch), accelerator)
        return rows


def run_loss(
    name: str,
    seed: int,
    config: Any,
    matrix: ModelMatrix,
    pairs: Sequence[EncodedPair],
    watched: Watched,
    scratch: Path,
    accelerator: Accelerator,
) -> list[Row]:
    """Trains with one loss and looks at the policy whenever a row of metrics is due."""
    policy, loss = load_policy(config, matrix.policy.weights, accelerator), optimise_module.configured_loss(config)
    rows: list[Row] = []

    def see(step: int) -> None:
        rows.append({"loss": name, "seed": seed, "step": step, **watch(policy, loss, watched)})
        print(json.dumps(rows[-1]), flush=True)

    see(0)
    real = MetricsLog.write
    MetricsLog.write = lambda self, row: see(row["step"])  # type: ignore[method-assign]
    try:
        optimise_module.optimise(
            policy,
            pairs,
            config,
            files=Run(scratch / name, {}, None).iteration(1),
            accelerator=accelerator,
            reference=None,
            pad_token_id=0,
        )
    finally:
        MetricsLog.write = real  # type: ignore[method-assign]
    return rows


def draw(rows: Sequence[Row], file: Path) -> None:
    """One panel for each figure, one curve for each loss: the mean over seeds."""

    def plot(figure: Any) -> None:
        axes = figure.subplots(3, 3, sharex=True).flat
        for axis, (key, title) in zip(axes, PANELS.items(), strict=True):
            for colour, name in zip(COLOURS, LOSSES, strict=True):
                of_loss = [row for row in rows if row["loss"] == name]
                steps = sorted({row["step"] for row in of_loss})
                axis.plot(
                    steps,
                    [mean(row[key] for row in of_loss if row["step"] == step) for step in steps],
                    color=colour,
                    label=name,
                )
            axis.set_title(title)
        figure.supxlabel("optimiser step", fontsize=9)
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(LOSSES))

    save_figure(file, plot, 6.4, dpi=150)


def ends(rows: Sequence[Row]) -> str:
    """A table of every loss at its last step, beside the start."""
    last = max(row["step"] for row in rows)
    lines = []
    for name, step in [("start", 0), *((name, last) for name in LOSSES)]:
        found = [row for row in rows if row["step"] == step and (name == "start" or row["loss"] == name)]
        lines.append([name, *(f"{mean(row[key] for row in found):.2f}" for key in PANELS)])
    return table(["loss", *PANELS], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many of the seeds")
    parser.add_argument("--every", type=int, default=20, help="optimiser steps between looks")
    parser.add_argument("--pairs", type=int, default=256, help="pairs that are looked at")
    parser.add_argument("--prompts", type=int, default=150, help="prompts that are sampled on")
    parser.add_argument("--output", type=Path, default=RESULTS / "mechanism.json")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs/mechanism.png")
    parser.add_argument("--table", action="store_true", help="only draw and print what is there")
    arguments = parser.parse_args()
    if not arguments.table:
        rows = [
            row
            for seed in SEEDS[: arguments.seeds]
            for row in run_seed(seed, arguments.every, arguments.pairs, arguments.prompts)
        ]
        facts = {"machine": machine(), "versions": versions("torch", "transformers"), "commit": commit()}
        write_json(arguments.output, {**facts, "rows": rows})
    rows = json.loads(arguments.output.read_text())["rows"]
    draw(rows, arguments.figure)
    print(ends(rows))


if __name__ == "__main__":
    main()
