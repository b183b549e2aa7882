"""What is watched while training: means over real pairs, the first loss, non-finite steps, the log, and drift."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tso_fast.errors import TrainingError
from tso_fast.losses import LOSSES, weighted_sum
from tso_fast.training.batches import EncodedPair
from tso_fast.training.monitors import FirstStep, Meter, MetricsLog, NonFiniteGuard, drift_warnings, finite
from tso_fast.types import PairBatch, PreferenceOutput

LN2 = math.log(2)
NAN, INF = math.nan, math.inf


def encoded(scale: float = 1.0, soft_label: float = 1.0, margin: float = 0.0) -> EncodedPair:
    return EncodedPair(
        prompt=(5,),
        chosen=(6, 2),
        rejected=(7, 8, 2),
        scale=scale,
        soft_label=soft_label,
        margin=margin,
        prompt_id="q1",
    )


def output(**changes: Any) -> PreferenceOutput:
    """Three pairs whose means over the first two are easy."""
    values: dict[str, Any] = {
        "loss": torch.tensor(9.0),
        "losses": torch.tensor([0.5, 0.9, 77.0]),
        "logprobs": torch.tensor([-4.0, -6.0, -77.0, -8.0, -2.0, -77.0]),
        "ref_logprobs": torch.zeros(6),
        "num_tokens": torch.tensor([3, 5, 77, 2, 6, 77]),
        "chosen_rewards": torch.tensor([0.4, -0.2, 77.0]),
        "rejected_rewards": torch.tensor([0.1, -0.5, 77.0]),
        "clipped": torch.tensor([[True, False], [True, True], [True, True]]),
    }
    return PreferenceOutput(**{**values, **changes})


SCALE, PADDING = torch.tensor([1.0, 3.0, 0.0]), [False, False, True]
EXPECTED = {
    "loss": (0.5 + 3 * 0.9) / 4,
    "rewards/chosen": 0.1,
    "rewards/rejected": -0.2,
    "rewards/margins": 0.3,
    "rewards/accuracies": 1.0,
    "logps/chosen": -5.0,
    "logps/rejected": -5.0,
    "clip/chosen": 1.0,
    "clip/rejected": 0.5,
    "num_tokens/chosen": 4.0,
    "num_tokens/rejected": 4.0,
}


def test_meter_counts_real_pairs_and_weighs_the_loss() -> None:
    meter = Meter()
    assert all(math.isnan(value) for value in meter.means().values())
    meter.add(output(), SCALE, PADDING)
    assert meter.means() == pytest.approx(EXPECTED)
    meter.add(output(), SCALE, PADDING)
    assert meter.means() == pytest.approx(EXPECTED)
    # Means over pairs, not over batches.
    meter.add(output(), torch.tensor([0.0, 4.0, 0.0]), [True, False, True])
    means = meter.means()
    assert means["logps/chosen"] == pytest.approx((2 * (-4 - 6) - 6) / 5)
    assert means["loss"] == pytest.approx((2 * (0.5 + 2.7) + 3.6) / 12)
    meter.clear()
    assert all(math.isnan(value) for value in meter.means().values())


def test_padding_may_hold_nan() -> None:
    meter = Meter()
    meter.add(output(chosen_rewards=torch.tensor([0.4, -0.2, NAN])), SCALE, PADDING)
    assert meter.means() == pytest.approx(EXPECTED)


def test_meter_sums_over_processes() -> None:
    one, two = Meter(), Meter()
    one.add(output(), SCALE, PADDING)
    two.add(output(), SCALE, [True, False, True])
    together = SimpleNamespace(device=torch.device("cpu"), reduce=lambda sums: sums + two.sums)
    both = Meter()
    both.add(output(), SCALE, PADDING)
    both.add(output(), SCALE, [True, False, True])
    assert one.means(together) == both.means()
    assert one.means() == pytest.approx(EXPECTED)


# ----------------------------------------------------------------------------------------------------- first step


def means(loss: float, chosen: float = 0.0, rejected: float = 0.0) -> dict[str, float]:
    return {"loss": loss, "rewards/chosen": chosen, "rewards/rejected": rejected}


def first_step(loss: str, *pairs: tuple[float, float, float]) -> FirstStep:
    """Of pairs (scale, soft label, margin), whose responses have any log-probs."""
    scale, soft_label, margin = (torch.tensor(column) for column in zip(*pairs, strict=True))
    n = len(pairs)
    pairs = torch.arange(2 * n).reshape(2, n).T
    batch = PairBatch(layout=None, pairs=pairs, scale=scale, soft_label=soft_label, margin=margin)
    step = FirstStep(LOSSES[loss])
    step.add(output(logprobs=torch.linspace(-9, -2, 2 * n), num_tokens=torch.arange(1, 2 * n + 1)), batch)
    return step


@pytest.mark.parametrize("loss", ["dual_clip", "dpo"])
def test_first_loss_is_ln_2(loss: str) -> None:
    step = first_step(loss, (1.0, 1.0, 0.0), (3.0, 0.7, 0.0))
    step.check(means(LN2), is_exact=True)
    step.check(means(LN2 + 4e-2, 4e-2), is_exact=False)
    for wrong in (
        means(LN2 + 2e-3),  # something differs
        means(2 * LN2),  # a sum instead of a mean
        means(0.0),  # every label masked, or no reference
        means(LN2, 0.5, 0.5),  # a wrong reference that cancels
        means(LN2, 0.0, -2e-3),
    ):
        with pytest.raises(TrainingError, match=r"the first step has loss .* they must be 0\.693147 and 0"):
            step.check(wrong, is_exact=True)


def test_first_loss_follows_from_margin_soft_label_and_scale() -> None:
    step = first_step("dual_clip", (3.0, 0.9, 1.0), (1.0, 1.0, 0.0))
    first = 0.9 * math.log1p(math.exp(1)) + 0.1 * math.log1p(math.exp(-1))
    step.check(means((3 * first + LN2) / 4), is_exact=True)
    with pytest.raises(TrainingError):
        step.check(means(LN2), is_exact=True)


def test_first_loss_of_a_sum_of_losses_follows_from_the_log_probs() -> None:
    """A loss with an NLL in it has no constant first value; what the function says of log-ratios of 0 is expected."""
    step = FirstStep(weighted_sum(["dpo", "sft"], [1.0, 0.5], {}))
    one = torch.ones(1)
    batch = PairBatch(layout=None, pairs=torch.tensor([[0, 1]]), scale=one, soft_label=one, margin=0 * one)
    step.add(output(logprobs=torch.tensor([-6.0, -8.0]), num_tokens=torch.tensor([3, 2])), batch)
    step.check(means(LN2 + 0.5 * 6 / 3), is_exact=True)
    with pytest.raises(TrainingError):
        step.check(means(LN2), is_exact=True)


def test_first_step_leaves_what_is_not_finite_to_the_guard() -> None:
    first_step("dpo", (1.0, 1.0, 0.0)).check(means(NAN, NAN, NAN), is_exact=True)
    first_step("dpo", (0.0, 1.0, 0.0)).check(means(NAN), is_exact=True)


# -------------------------------------------------------------------------------------------------- non-finite steps


def test_guard_of_another_process_counts_and_stops_but_writes_nothing(tmp_path: Path) -> None:
    """The batch is that of all processes, and they would write one temporary file."""
    guard = NonFiniteGuard(tmp_path / "iter-1", 2, is_main_process=False)
    assert not guard.is_finite(1, NAN, 1.0, [encoded()])
    with pytest.raises(TrainingError, match="2 steps in a row"):
        guard.is_finite(2, NAN, 1.0, [encoded()])
    assert not list(tmp_path.iterdir())


def test_guard_counts_saves_and_stops(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    guard = NonFiniteGuard(tmp_path / "iter-1", 3)
    batch = [encoded(scale=0.5, margin=0.25)]
    assert guard.is_finite(1, 0.6, 0.7, batch)
    assert not (tmp_path / "iter-1").exists()
    assert [guard.is_finite(step, 0.6, norm, batch) for step, norm in ((2, NAN), (3, INF), (4, 1.0))] == [
        False,
        False,
        True,
    ]
    assert (guard.total, guard.in_a_row) == (2, 0)
    saved = json.loads((tmp_path / "iter-1/nonfinite-step-2.json").read_text())
    assert saved == {
        "step": 2,
        "loss": "0.6",
        "grad_norm": "nan",
        "pairs": [
            {
                "prompt": [5],
                "chosen": [6, 2],
                "rejected": [7, 8, 2],
                "scale": 0.5,
                "soft_label": 1.0,
                "margin": 0.25,
                "prompt_id": "q1",
                "win_rates": None,
                "extra": [],
            }
        ],
    }
    assert "step 3: loss 0.6, gradient norm inf: skipped" in caplog.text
    assert not guard.is_finite(5, INF, 1.0, batch)
    assert not guard.is_finite(6, 0.6, NAN, batch)
    with pytest.raises(TrainingError, match=r"3 steps in a row had a non-finite loss or gradient \(last: step 7\)"):
        guard.is_finite(7, NAN, NAN, batch)
    assert (tmp_path / "iter-1/nonfinite-step-7.json").exists()
    assert guard.total == 5


# ------------------------------------------------------------------------------------------------------ metrics.jsonl


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_are_json_without_nan(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.write({"iteration": 1, "step": 1, "loss": NAN, "grad_norm": INF, "skipped_steps": 1})
    assert rows(tmp_path) == [{"iteration": 1, "step": 1, "loss": None, "grad_norm": None, "skipped_steps": 1}]
    assert finite({"a": -INF, "b": 0.5, "c": "nan", "d": None}) == {"a": None, "b": 0.5, "c": "nan", "d": None}


@pytest.mark.parametrize(
    ("iteration", "step", "kept"), [(2, 3, 4), (2, 1, 2), (1, 2, 1), (1, 1, 0), (3, 1, 5), (9, 1, 5)]
)
@pytest.mark.parametrize("cut", ["", '{"iteration": 2, "st', '{"iteration": 3, "step": 1, "loss": 0.6'])
def test_rewind_keeps_what_came_before_and_drops_a_line_that_a_kill_cut(
    tmp_path: Path, iteration: int, step: int, kept: int, cut: str
) -> None:
    log = MetricsLog(tmp_path)
    log.rewind(1, 1)  # nothing there yet
    assert not log.path.exists()
    every = [{"iteration": t, "step": s, "loss": s / t} for t, s in ((1, 1), (1, 2), (2, 1), (2, 2), (2, 3))]
    for row in every:
        log.write(row)
    with open(log.path, "a") as handle:
        handle.write(cut)
    log.rewind(iteration, step)
    assert rows(tmp_path) == every[:kept]
    log.write({"iteration": iteration, "step": step})  # on a line of its own
    assert rows(tmp_path) == [*every[:kept], {"iteration": iteration, "step": step}]


# ------------------------------------------------------------------------------------------------------------- drift


def figures(
    reward: float | None = 0.1, tokens: float | None = 10.0, distinct: float | None = 0.8, skipped: int = 0
) -> Any:
    return {
        "final": {"rewards/chosen": reward},
        "generated_tokens": tokens,
        "distinct_responses": distinct,
        "skipped_steps": skipped,
    }


@pytest.mark.parametrize(
    ("newest", "warning"),
    [
        (figures(reward=-0.01), r"chosen responses became less likely .*-0\.01\).*: lower learning_rate"),
        (figures(tokens=15.1), r"responses grew from 10\.0 to 15\.1 tokens: look for a judge that likes length"),
        (figures(distinct=0.39), r"became alike \(0\.80 to 0\.39 distinct texts a sample\): raise temperature"),
        (figures(skipped=2), r"2 steps with a non-finite gradient were skipped"),
    ],
)
def test_drift_is_told(newest: Any, warning: str) -> None:
    (told,) = drift_warnings([figures(), figures(tokens=15.0, distinct=0.4), newest])
    assert re.search(warning, told)


def test_no_drift_no_warning() -> None:
    assert drift_warnings([figures()]) == []
    assert drift_warnings([figures(reward=-0.0004)]) == []  # rounding, not drift
    assert drift_warnings([figures(), figures(reward=0.0, tokens=15.0, distinct=0.4)]) == []
    assert drift_warnings([figures(tokens=None, distinct=None), figures(reward=None)]) == []
    assert drift_warnings([figures(), figures(tokens=None, distinct=None)]) == []
    assert len(drift_warnings([figures(), figures(-1.0, 99.0, 0.1, 3)])) == 4
