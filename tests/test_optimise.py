"""The optimiser loop: how a step is shared out does not matter, and what it does with a bad one."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from helpers import encoded
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from tso_fast.config.settings import CellConfig, TrainConfig
from tso_fast.errors import InputError, TrainingError
from tso_fast.files.run import Run
from tso_fast.losses import LOSSES, Loss
from tso_fast.models.policy import Policy
from tso_fast.training import inputs, optimise
from tso_fast.training import reference as references
from tso_fast.training.batches import EncodedPair, completion_lengths, plan_steps
from tso_fast.training.monitors import Meter
from tso_fast.types import PairLogprobs, Weights

CPU = torch.device("cpu")


def tiny() -> Any:
    """In float64 throughout, so that sums in another order differ by 1e-16 and no step turns the other way."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=61,
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.2,
    )
    return GPT2LMHeadModel(config).double()


def settings(folder: Path | str = "", **changes: Any) -> TrainConfig:
    cell = CellConfig(path="-")
    return TrainConfig(
        output_dir=str(folder),
        prompts="-",
        cells=[cell],
        use_cpu=True,
        **{"learning_rate": 1e-2, "adam_epsilon": 1e-6, **changes},
    )


def gradients(
    pairs: list[EncodedPair], reference: Any, micro: int, accumulation: int, world: int, **changes: Any
) -> tuple[list[torch.Tensor], dict[str, float]]:
    """Of the first step, by ``world`` processes whose gradients are averaged as DDP does, and the step's means."""
    config = settings(**changes)
    total: list[torch.Tensor] = []
    meters = []
    for rank in range(world):
        policy = Policy(tiny())
        process = SimpleNamespace(
            device=CPU,
            num_processes=world,
            backward=lambda loss: loss.backward(),
            no_sync=lambda policy: contextlib.nullcontext(),
        )
        step = next(
            plan_steps(
                range(len(pairs)), epochs=1, micro_size=micro, accumulation=accumulation, rank=rank, world=world, seed=5
            )
        )
        meters.append(Meter())
        run: Any = SimpleNamespace(
            accelerator=process,
            policy=policy,
            pairs=pairs,
            inputs=reference if isinstance(reference, dict) else {"ref_logprobs": reference},
            pad_token_id=0,
            share_prompts=False,
            config=config,
            loss=optimise.configured_loss(config),
        )
        optimise.backward(run, step, meters[-1])
        grads = [p.grad / world for p in policy.parameters()]
        total = [a + b for a, b in zip(total, grads, strict=True)] if total else grads
    summed = Meter()
    summed.sums = sum(meter.sums for meter in meters)
    return total, summed.means()


# 8 pairs: as one batch, accumulated, shared out, both. 7 and 3: the last shares run short or are empty.
@pytest.mark.parametrize("num_pairs", [8, 7, 3, 1])
@pytest.mark.parametrize("loss", [{"loss_type": "dual_clip", "beta": 0.02}, {"loss_type": "sft"}], ids=str)
@pytest.mark.slow
def test_a_step_has_one_gradient_however_it_is_shared_out(num_pairs: int, loss: dict[str, Any]) -> None:
    pairs = encoded(num_pairs)
    reference = -torch.rand(num_pairs, 2, generator=torch.Generator().manual_seed(0)) * 40
    want, means = gradients(pairs, reference, 8, 1, 1, **loss)
    assert all(g.any() for g in want)
    for micro, accumulation, world in ((2, 4, 1), (1, 8, 1), (4, 1, 2), (1, 2, 4), (1, 1, 8), (2, 2, 2)):
        got, same = gradients(pairs, reference, micro, accumulation, world, **loss)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        assert same == pytest.approx(means, rel=1e-6)


def test_the_gradient_is_that_of_the_scaled_mean() -> None:
    """Against autograd through full logits, pair by pair."""
    pairs = encoded(6)
    model = tiny()
    reference = -torch.rand(6, 2, generator=torch.Generator().manual_seed(0)) * 40

    def logprob(pair: EncodedPair, completion: tuple[int, ...]) -> torch.Tensor:
        ids = torch.tensor([pair.prompt + completion])
        logprobs = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
        return logprobs[len(pair.prompt) - 1 :].sum()

    total = 0.0
    for pair, (ref_w, ref_l) in zip(pairs, reference, strict=True):
        u = (0.02 * (logprob(pair, pair.chosen) - ref_w)).clamp(max=0.5)
        v = (0.02 * (logprob(pair, pair.rejected) - ref_l)).clamp(min=-0.3)
        z = u - v - pair.margin
        total = total + pair.scale * (
            pair.soft_label * nn.functional.softplus(-z) + (1 - pair.soft_label) * nn.functional.softplus(z)
        )
    loss = total / sum(pair.scale for pair in pairs)
    want = torch.autograd.grad(loss, list(model.parameters()))
    got, means = gradients(pairs, reference, 2, 3, 1, beta=0.02)
    assert means["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)  # soft labels are float32


def test_a_step_of_scale_0_moves_nothing() -> None:
    pairs = [dataclasses.replace(pair, scale=0.0) for pair in encoded(4)]
    got, means = gradients(pairs, torch.zeros(4, 2), 2, 2, 1)
    assert not any(g.any() for g in got)
    assert math.isnan(means["loss"])


def trained(folder: Path, pairs: list[EncodedPair], **changes: Any) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Weights after ``optimise``, and its figures."""
    config = settings(folder, **changes)
    model = tiny()
    with Run.open(folder, {}, {}, {}) as run:
        figures = optimise.optimise(
            Policy(model),
            pairs,
            config,
            files=run.iteration(1),
            accelerator=Accelerator(cpu=True),
            reference=None,
            pad_token_id=0,
        )
        run.commit("iter-1/train", [], figures)  # they can be written
    return [p.detach() for p in model.parameters()], figures


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_trajectories_do_not_depend_on_accumulation(tmp_path: Path) -> None:
    pairs = [dataclasses.replace(pair, margin=0.0) for pair in encoded(19)]
    common = {"logging_steps": 1, "num_train_epochs": 2, "warmup_steps": 2, "weight_decay": 0.1}
    want, figures = trained(tmp_path / "8", pairs, per_device_train_batch_size=8, **common)
    assert figures["steps"] == 6
    assert rows(tmp_path / "8")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert figures["final"]["rewards/margins"] > 0.05  # it learns
    assert not any(torch.equal(a, b) for a, b in zip(want, tiny().parameters(), strict=True))
    for micro in (1, 2, 4):
        folder = tmp_path / str(micro)
        got, same = trained(
            folder, pairs, per_device_train_batch_size=micro, gradient_accumulation_steps=8 // micro, **common
        )
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        for row, other in zip(rows(folder), rows(tmp_path / "8"), strict=True):
            assert row == pytest.approx(other, rel=1e-3, abs=1e-5)
        assert same["means"] == pytest.approx(figures["means"], rel=1e-3, abs=1e-5)
        again, _ = trained(
            tmp_path / f"{micro} again",
            pairs,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=8 // micro,
            **common,
        )
        assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


def spoil(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Makes the log-probs of these steps NaN, and with them the loss and the gradient."""
    real, count = optimise.backward, iter(range(1, 1000))

    def backward(run: Any, *rest: Any) -> None:
        handle = None
        if next(count) in steps:
            handle = run.policy.model.base_model.register_forward_hook(
                lambda module, args, out: setattr(out, "last_hidden_state", out.last_hidden_state * math.nan)
            )
        real(run, *rest)
        if handle is not None:
            handle.remove()

    monkeypatch.setattr(optimise, "backward", backward)


def test_a_non_finite_step_is_skipped_and_counted_and_in_no_mean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [dataclasses.replace(pair, scale=1.0) for pair in encoded(12)]
    common = {"logging_steps": 1, "per_device_train_batch_size": 2, "lr_scheduler_type": "constant"}
    plain, _ = trained(tmp_path / "plain", pairs, **common)
    spoil(monkeypatch, {2, 5, 6})  # the last two are all of the last fifth
    weights, figures = trained(tmp_path / "run", pairs, **common)
    assert all(w.isfinite().all() for w in weights)
    assert not all(torch.equal(a, b) for a, b in zip(weights, plain, strict=True))
    assert figures["skipped_steps"] == 3
    log = rows(tmp_path / "run")
    assert [row["skipped_steps"] for row in log] == [0, 1, 1, 1, 2, 3]
    assert [row["loss"] is None for row in log] == [False, True, False, False, True, True]
    assert [row["grad_norm"] is None for row in log] == [False, True, False, False, True, True]
    whole = figures["means"]
    assert all(math.isfinite(value) for value in whole.values())
    real = [row["logps/chosen"] for row in log if row["loss"] is not None]
    assert whole["logps/chosen"] == pytest.approx(sum(real) / 3)
    assert set(figures["final"].values()) == {None}
    saved = {file.name for file in (tmp_path / "run/iter-1").glob("nonfinite-*")}
    assert saved == {f"nonfinite-step-{step}.json" for step in (2, 5, 6)}
    assert len(json.loads((tmp_path / "run/iter-1/nonfinite-step-2.json").read_text())["pairs"]) == 2


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_too_many_non_finite_steps_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, {1, 3, 4, 5})
    with pytest.raises(TrainingError, match=r"3 steps in a row had a non-finite loss or gradient \(last: step 5\)"):
        trained(tmp_path, encoded(12), per_device_train_batch_size=2, max_skipped_steps=3)


def test_a_reference_of_other_weights_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = inputs.reference_logprobs
    monkeypatch.setattr(inputs, "reference_logprobs", lambda *args, **kwargs: real(*args, **kwargs) - 0.1)
    with pytest.raises(TrainingError, match="Policy and reference see different weights or tokens"):
        trained(tmp_path, encoded(4))


def test_a_wrong_reduction_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Meter.add
    monkeypatch.setattr(
        Meter,
        "add",
        lambda self, output, scale, is_padding: real(
            self, dataclasses.replace(output, losses=output.losses * 6), scale, is_padding
        ),
    )
    with pytest.raises(TrainingError, match="the first step has loss 4"):
        trained(tmp_path, [dataclasses.replace(pair, margin=0.0) for pair in encoded(4)])


@pytest.mark.slow
def test_settings_of_the_optimiser_are_really_used(tmp_path: Path) -> None:
    """Turning a setting changes the weights, or for those that must not, leaves them as they are."""
    pairs = encoded(6)
    common: dict[str, Any] = {"per_device_train_batch_size": 2}

    def weights(name: str, **changes: Any) -> list[torch.Tensor]:
        return trained(tmp_path / name, pairs, **{**common, **changes})[0]

    before = weights("base")
    changing = {
        "beta": 0.5,
        "clip_chosen": 0.0,
        "clip_rejected": 0.0,
        "loss_args": {"clip_chosen": 0.0},
        "loss_type": "sft",
        "loss_weights": [0.5],
        "learning_rate": 2e-3,
        "weight_decay": 0.5,
        "adam_beta1": 0.5,
        "adam_beta2": 0.9,
        "adam_epsilon": 1e-3,
        "max_grad_norm": 0.01,
        "warmup_steps": 3,
        "lr_scheduler_type": "constant",
        "num_train_epochs": 2,
        "seed": 1,
        "impl": "reference",
    }
    unchanged = {"gradient_checkpointing": True, "logging_steps": 7, "save_steps": 4}
    for name, value in {**changing, **unchanged}.items():
        after = weights(name, **{name: value})
        is_same = all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
        assert is_same == (name in unchanged), name


# ---- the loss, the reference, the tracker


def test_a_loss_from_outside_is_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three lines add a loss that needs no reference; a configuration names it, and the model learns from it."""
    monkeypatch.setattr(inputs, "reference_logprobs", lambda *args, **kwargs: pytest.fail("it needs no reference"))

    def toy(pairs: PairLogprobs, *, sharpness: float = 1.0) -> torch.Tensor:
        return nn.functional.softplus(sharpness * (pairs.rejected - pairs.chosen))

    monkeypatch.setitem(LOSSES, "toy", Loss(toy, title="a toy", needs_reference=False))
    common: dict[str, Any] = {"num_train_epochs": 8, "logging_steps": 1, "lr_scheduler_type": "constant"}
    _, figures = trained(tmp_path, encoded(8), loss_type="toy", loss_args={"sharpness": 0.5}, **common)
    log = rows(tmp_path)
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]
    assert figures["loss"] == "a toy"
    assert log[0]["rewards/chosen"] is None  # there is no reference, and so no reward
    assert log[0]["logps/chosen"] < 0


def test_several_losses_are_trained_on_as_their_weighted_sum(tmp_path: Path) -> None:
    pairs = [dataclasses.replace(pair, margin=0.0, soft_label=1.0) for pair in encoded(8)]
    settings = {"loss_type": ["dual_clip", "sft"], "loss_weights": [1.0, 0.3], "beta": 0.2, "logging_steps": 1}
    _, figures = trained(tmp_path / "both", pairs, **settings)
    trained(tmp_path / "sft", pairs, loss_type="sft", logging_steps=1)
    assert figures["loss"] == "dual clip (TSO) + 0.3 x chosen-only NLL"
    (both, *_), (nll, *_) = rows(tmp_path / "both"), rows(tmp_path / "sft")
    assert both["loss"] == pytest.approx(math.log(2) + 0.3 * nll["loss"], rel=1e-6)
    assert both["clip/chosen"] == 0


@pytest.mark.parametrize("loss", [name for name, row in LOSSES.items() if not (row.needs or row.num_extra)])
def test_every_loss_that_reads_a_pair_is_trained_on(loss: str, tmp_path: Path) -> None:
    """The first step has the loss that it must have, and the weights move."""
    weights, figures = trained(tmp_path, encoded(4), loss_type=loss, logging_steps=1)
    (row,) = rows(tmp_path)
    assert not all(torch.equal(a, b) for a, b in zip(weights, tiny().parameters(), strict=True))
    if LOSSES[loss].needs_reference:
        assert figures["first_loss"] == pytest.approx(row["loss"], rel=1e-5)
        assert row["rewards/chosen"] == pytest.approx(0, abs=1e-6)
    else:
        assert row["rewards/chosen"] is None


@pytest.mark.parametrize("loss", ["ipo", "sppo", "humanline", "robust"])
def test_a_wrong_reduction_of_a_steep_loss_stops_the_run(
    loss: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Meter.add
    monkeypatch.setattr(
        Meter,
        "add",
        lambda self, output, *rest: real(self, dataclasses.replace(output, losses=output.losses * 1.1), *rest),
    )
    with pytest.raises(TrainingError, match="the first step has loss"):
        trained(tmp_path, encoded(4), loss_type=loss)


def test_humanline_is_trained_on_clamped_ratios_of_tokens() -> None:
    """Against autograd through full logits, pair by pair."""
    pairs, model = encoded(5), tiny()
    g = torch.Generator().manual_seed(1)
    tokens = [-4 * torch.rand(length, generator=g) for length in completion_lengths(pairs)]

    def terms(pair: EncodedPair, completion: tuple[int, ...], reference: torch.Tensor) -> torch.Tensor:
        ids = torch.tensor([pair.prompt + completion])
        logprobs = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        return (logprobs[len(pair.prompt) - 1 :] - reference).clamp(-1.0, 1.5).sum()

    total = 0.0
    for i, pair in enumerate(pairs):
        sides = zip((pair.chosen, pair.rejected), tokens[2 * i : 2 * i + 2], strict=True)
        chosen, rejected = (terms(pair, completion, reference) for completion, reference in sides)
        z = 0.3 * (chosen - rejected) - pair.margin
        p = pair.soft_label
        total = total + pair.scale * (p * nn.functional.softplus(-z) + (1 - p) * nn.functional.softplus(z))
    loss = total / sum(pair.scale for pair in pairs)
    want = torch.autograd.grad(loss, list(model.parameters()))
    got, means = gradients(pairs, {"ref_tokens": tokens}, 2, 2, 2, loss_type="humanline", beta=0.3)
    assert means["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_type": "mrpo"}, "MRPO needs log-probs under a second reference; set second_reference, or train on"),
        ({"loss_type": "bmc"}, "BMC needs a number for each token; set token_values, or train on"),
        ({"loss_type": ["dpo", "selm"]}, r"needs 1 further sequence for each pair; set extra_from \(1\) or revision_"),
        ({"loss_type": "srpo", "extra_from": "m"}, "needs 4 further sequences for each pair, and extra_from make"),
        ({"loss_type": "dpo", "extra_from": "m"}, "extra_from: it has no effect on loss_type 'dpo'"),
        ({"loss_type": "dpo", "token_values": "differences"}, "token_values: it has no effect on loss_type 'dpo'"),
        ({"loss_type": "dpo", "win_rates": "all"}, "win_rates: it has no effect on loss_type 'dpo'"),
        ({"loss_type": "sft", "ref_model_sync_steps": 2}, "ref_model_sync_steps: loss_type 'sft' has no reference"),
        ({"loss_type": "soft_ce", "margin_weight": 1.0}, "margin_weight: it has no effect on loss_type 'soft_ce'"),
        (
            {"loss_type": "margin_dpo", "soft_label_kappa": 1.0},
            "soft_label_kappa: it has no effect on loss_type 'margin",
        ),
        ({"loss_type": "nmae"}, "loss_type: unknown loss 'nmae'"),
        ({"loss_type": "dpo", "clip_chosen": 1.0}, "loss_type: loss 'dpo' has no option 'clip_chosen'"),
        ({"beta": 0.1, "loss_args": {"beta": 0.1}}, "loss_args.beta: beta is given beside loss_args too"),
        ({"loss_type": "sft", "margin_weight": 1.0}, "margin_weight: it has no effect on loss_type 'sft'"),
        ({"loss_type": "sft", "soft_label_kappa": 1.0}, "soft_label_kappa: it has no effect on loss_type 'sft'"),
        ({"loss_type": "sft", "soft_label_by": "win_rate"}, "soft_label_by: it has no effect on loss_type 'sft'"),
        ({"loss_type": ["dpo", "sft"], "loss_weights": [1.0]}, "loss_type: loss_weights has 1 items for 2 losses"),
    ],
    ids=str,
)
def test_a_loss_that_cannot_be_trained_on(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        optimise.configured_loss(settings(**changes))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with the tiny model in float32, as a reference of its own."""
    model = tiny().float()
    model.save_pretrained(tmp_path / "reference")
    return tmp_path / "reference"


def with_reference(folder: Path, saved: Path, **changes: Any) -> dict[str, Any]:
    with Run.open(folder, {}, {}, {}) as run:
        return optimise.optimise(
            Policy(tiny().float()),
            encoded(8),
            settings(folder, logging_steps=1, **changes),
            files=run.iteration(2),
            accelerator=Accelerator(cpu=True, mixed_precision="bf16" if changes.get("bf16") else "no"),
            reference=Weights(saved, saved),
            pad_token_id=0,
        )


@pytest.mark.parametrize("bf16", [False, True])
def test_a_separate_reference_rounds_like_the_policy(bf16: bool, tmp_path: Path, saved: Path) -> None:
    """The same weights loaded apart: log-ratios of the first step are 0 up to the order of sums, under autocast too."""
    AcceleratorState._reset_state(reset_partial_state=True)
    with_reference(tmp_path / "run", saved, bf16=bf16, beta=1.0)
    AcceleratorState._reset_state(reset_partial_state=True)
    first = rows(tmp_path / "run")[0]
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    assert first["rewards/rejected"] == pytest.approx(0, abs=1e-5)


def test_a_separate_reference_is_given_back_before_training(
    tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Any] = []
    load, backward = references.load_policy, optimise.backward
    monkeypatch.setattr(references, "load_policy", lambda *args: loaded.append(load(*args)) or loaded[-1])

    def check(run: Any, *rest: Any) -> None:
        assert [sum(p.numel() for p in model.parameters()) for model in loaded] == [0]
        backward(run, *rest)

    monkeypatch.setattr(optimise, "backward", check)
    with_reference(tmp_path / "run", saved)


def test_steps_of_a_tracker_go_on_over_iterations_of_unequal_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[int] = []
    monkeypatch.setattr(Accelerator, "log", lambda self, row, step: logged.append(step))
    steps = 0
    for t, count in enumerate((6, 2, 4), start=1):
        with Run.open(tmp_path / str(t), {}, {}, {}) as run:
            figures = optimise.optimise(
                Policy(tiny()),
                encoded(count),
                settings(logging_steps=1, per_device_train_batch_size=2),
                files=run.iteration(t),
                accelerator=Accelerator(cpu=True),
                reference=None,
                pad_token_id=0,
                steps_before=steps,
            )
        steps += figures["steps"]
    assert logged == [1, 2, 3, 4, 5, 6]


def test_a_resume_with_dropout_is_bitwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What dropout draws from is part of a checkpoint."""

    def make() -> Any:
        model = tiny()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.3
        return model

    def train(folder: Path) -> list[torch.Tensor]:
        model = make()
        torch.manual_seed(7)
        with Run.open(folder, {}, {}, {}) as run:
            optimise.optimise(
                Policy(model),
                encoded(12),
                settings(save_steps=1, per_device_train_batch_size=2, disable_dropout=False),
                files=run.iteration(1),
                accelerator=Accelerator(cpu=True),
                reference=None,
                pad_token_id=0,
            )
        return [p.detach() for p in model.parameters()]

    whole = train(tmp_path / "whole")
    real, calls = optimise.backward, iter(range(1, 100))
    with monkeypatch.context() as patch:
        patch.setattr(optimise, "backward", lambda *args: real(*args) if next(calls) < 4 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(tmp_path / "cut")
    assert all(torch.equal(a, b) for a, b in zip(train(tmp_path / "cut"), whole, strict=True))
