"""TRL's trainer, a plain one of transformers and a hand-written loop take the steps that our own trainer takes."""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import math
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset, load_dataset
from helpers import ranks, write_rows
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from trl import DPOConfig, DPOTrainer

from tso_fast import FusedLinearTSOLoss
from tso_fast.config.settings import OptimizationConfig
from tso_fast.errors import InputError
from tso_fast.files.rows import pair_row, parse_pair
from tso_fast.integrations.transformers import PairCollator, with_preference_loss
from tso_fast.integrations.trl import TSOTrainer
from tso_fast.models.policy import Policy, disable_dropout
from tso_fast.quickstart.build import Recipe, make_tokenizer
from tso_fast.training import optimise
from tso_fast.training.batches import EncodedPair, MicroBatch, Step, collate, encode_pairs
from tso_fast.training.monitors import Meter
from tso_fast.training.reference import reference_logprobs

CPU = torch.device("cpu")
PROMPTS = ["sort 3 1 2 :", "sort 3 1 2 :", "add 4 and 5 :", "say the word cat"]
ROWS: list[dict[str, Any]] = [
    {"prompt": prompt, "chosen": chosen, "rejected": rejected, "scale": scale}
    for prompt, chosen, rejected, scale in zip(
        PROMPTS, [" 1 2 3", " 1 2 3", " 9", " cat"], [" 3 2 1", " 1 2", " 45 is it", " dog dog"], [1, 0.5, 2.5, 1],
        strict=True,
    )
]  # fmt: skip
"""Two pairs of one prompt, which share their chosen response too, and two others."""
TOKENIZER: Any = make_tokenizer([(row["prompt"], row["chosen"] + row["rejected"]) for row in ROWS] * 4, Recipe(seed=0))
TEMPLATE, TOKENIZER.chat_template = TOKENIZER.chat_template, None  # plain text stays plain
Gradients = dict[str, torch.Tensor]


def tiny(seed: int = 0) -> Any:
    """In float64, so that sums in another order differ by 1e-16."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(TOKENIZER), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=0, initializer_range=0.3, attention_dropout=0.1,
    )  # fmt: skip
    return LlamaForCausalLM(config).double()


ADAPTER = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
"""Of random weights, so that a new adapter does something already."""


def encoded(rows: Sequence[dict[str, Any]] = ROWS) -> list[EncodedPair]:
    """The rows in tokens, by our own code."""
    return [PairCollator(TOKENIZER)._encode(row, str(i)) for i, row in enumerate(rows)]


def own_step(
    model: Any, reference: Any, passes: Sequence[int] = (4,), disabled: Any = None, pairs: Any = None, **loss: Any
) -> tuple[float, Gradients]:
    """Loss and gradients of a step of our own trainer, with so many pairs in each of its passes."""
    pairs = encoded() if pairs is None else pairs
    policy = Policy(model)
    disable_dropout(policy)
    config = OptimizationConfig(**loss)
    given = {}
    bound = optimise.configured_loss(config)
    if bound.needs_reference:
        per_token = bound.token_term is not None
        with disabled or contextlib.nullcontext():
            logprobs = reference_logprobs(
                Policy(reference).eval(), pairs, batch_size=4, pad_token_id=0, device=CPU, rank=0, world=1, impl="auto",
                per_token=per_token,
            )  # fmt: skip
        lengths = [len(side) for pair in pairs for side in (pair.chosen, pair.rejected)]
        given = {"ref_tokens": logprobs.split(lengths)} if per_token else {"ref_logprobs": logprobs}
    run: Any = SimpleNamespace(
        accelerator=SimpleNamespace(device=CPU, num_processes=1, backward=lambda loss: loss.backward(),
                                    no_sync=lambda policy: contextlib.nullcontext()),
        policy=policy, pairs=pairs, inputs=given, pad_token_id=0, share_prompts=False, config=config, loss=bound,
    )  # fmt: skip
    order = iter(range(len(pairs)))
    shares = [[next(order) for _ in range(size)] for size in passes]
    micro_batches = [MicroBatch(index=share, is_padding=[False] * len(share)) for share in shares]
    meter = Meter()
    optimise.backward(run, Step(epoch=0, micro_batches=micro_batches, all_index=list(range(len(pairs)))), meter)
    return meter.means()["loss"], named_gradients(model)


def named_gradients(model: Any) -> Gradients:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class Keep(TrainerCallback):
    """Keeps the gradients of the first step, and what is logged of it."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.gradients = named_gradients(given["model"])

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **given: Any) -> None:
        if "loss" in logs:
            self.logs = dict(logs)


ARGUMENTS: dict[str, Any] = {
    "use_cpu": True, "per_device_train_batch_size": 4, "max_steps": 1, "logging_steps": 1, "max_grad_norm": 0.0,
    "save_strategy": "no", "report_to": [], "disable_tqdm": True, "dataloader_pin_memory": False,
    "train_sampling_strategy": "sequential", "bf16": False,
}  # fmt: skip


def trl_step(
    folder: Path, model: Any, ref_model: Any = None, trainer: Any = TSOTrainer, arguments: Any = None, **options: Any
) -> tuple[Keep, Any]:
    keep = Keep()
    made = trainer(
        model, ref_model, DPOConfig(str(folder), **{**ARGUMENTS, **(arguments or {})}),
        train_dataset=options.pop("train_dataset", Dataset.from_list(ROWS)),
        processing_class=options.pop("processing_class", TOKENIZER), callbacks=[keep], **options,
    )  # fmt: skip
    made.train()
    return keep, made


def assert_same(got: tuple[float, Gradients], want: tuple[float, Gradients], rtol: float = 2e-6) -> None:
    """Reference sums are kept in float32 by our own trainer, which is all that differs."""
    assert got[0] == pytest.approx(want[0], rel=rtol)
    assert got[1].keys() == want[1].keys()
    assert any(g.any() for g in want[1].values())
    largest = max(float(g.abs().max()) for g in want[1].values())
    for name, gradient in want[1].items():
        torch.testing.assert_close(got[1][name], gradient, rtol=1e-4, atol=rtol * largest, msg=name)


# -------------------------------------------------------------------------------------------------------------- TRL


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ("dual_clip", {"clip_chosen": 0.05, "nll_weight": 0.3}),
        (("dpo", "sft"), {}),
        ("humanline", {}),
        ("simpo", {"beta": 2.0}),
    ],
)
def test_trl_takes_our_steps(loss: Any, options: dict[str, Any], tmp_path: Path) -> None:
    model, reference = tiny(), tiny(1)
    names = loss if isinstance(loss, str) else list(loss)
    want = own_step(copy.deepcopy(model), reference, loss_type=names, loss_args={"beta": 0.1, **options})
    keep, trainer = trl_step(tmp_path, model, reference, loss=loss, loss_args=options)
    assert_same((keep.logs["loss"], keep.gradients), want)
    assert (trainer.ref_model is None) == (loss == "simpo")
    assert ("rewards/chosen" in keep.logs) == (loss != "simpo")


def test_trl_takes_our_steps_however_they_are_shared_out(tmp_path: Path) -> None:
    """The scales differ, so that a mean of the passes' means would be another loss."""
    model, reference = tiny(), tiny(1)
    want = own_step(copy.deepcopy(model), reference, (3, 1))
    arguments = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "gradient_checkpointing": False}
    keep, _ = trl_step(tmp_path, model, reference, arguments=arguments, share_prompt=False)
    assert_same((keep.logs["loss"], keep.gradients), want)


def test_trl_takes_a_file_of_our_pairs(tmp_path: Path) -> None:
    """Conversations, with scales, soft labels and margins."""
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = TEMPLATE
    labels = [{"soft_label": 0.8 + i / 20, "margin": i / 10} for i in range(len(ROWS))]
    found = [parse_pair({**row, **label}, "", "") for row, label in zip(ROWS, labels, strict=True)]
    file = write_rows(tmp_path / "pairs.jsonl", map(pair_row, found))
    dataset = load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path))
    model, reference = tiny(), tiny(1)
    want = own_step(copy.deepcopy(model), reference, pairs=encode_pairs(tokenizer, found, None).pairs)
    keep, _ = trl_step(tmp_path, model, reference, train_dataset=dataset, processing_class=tokenizer)
    assert_same((keep.logs["loss"], keep.gradients), want)


def test_columns_that_weigh_pairs_are_numbers(tmp_path: Path) -> None:
    whole = Dataset.from_list([{**row, "scale": 2} for row in ROWS])
    keep, _ = trl_step(tmp_path, tiny(), tiny(1), train_dataset=whole)
    plain = Dataset.from_list([{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in ROWS])
    same, _ = trl_step(tmp_path, tiny(), tiny(1), train_dataset=plain)
    assert keep.logs["loss"] == pytest.approx(same.logs["loss"], rel=1e-6)
    with pytest.raises(InputError, match=r"column 'margin' of the dataset.*give each row a number, or rename it"):
        trl_step(tmp_path, tiny(), tiny(1), train_dataset=plain.add_column("margin", ["wide"] * len(ROWS)))


def test_trl_takes_our_steps_in_two_processes(tmp_path: Path) -> None:
    model, reference = tiny(), tiny(1)
    want = own_step(copy.deepcopy(model), reference)

    def work(rank: int) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        arguments = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
        keep, _ = trl_step(tmp_path, model, reference, arguments=arguments)
        gradients = {name.removeprefix("module."): g for name, g in keep.gradients.items()}
        if rank == 0:  # only it logs
            assert_same((keep.logs["loss"], gradients), want)

    ranks(2, work)


def test_trl_shares_prompts_in_bfloat16_too(tmp_path: Path) -> None:
    """Accelerate rounds the reference's forward pass before we see it."""
    model, reference = tiny().float(), tiny(1).float()
    want = own_step(copy.deepcopy(model), reference)
    keep, trainer = trl_step(tmp_path, model, reference, arguments={"bf16": True}, share_prompt=True)
    assert keep.logs["loss"] == pytest.approx(want[0], rel=1e-2)
    assert len(trainer._policies) == 2


def test_trl_takes_our_steps_on_a_new_adapter(tmp_path: Path) -> None:
    """The reference is the model without it."""
    model = tiny()
    set_seed(42)  # as TRL does before it makes the adapter
    twin = get_peft_model(model, ADAPTER)
    want = own_step(twin, twin, disabled=twin.disable_adapter())
    keep, trainer = trl_step(tmp_path, tiny(), peft_config=ADAPTER)
    assert_same((keep.logs["loss"], keep.gradients), want, rtol=1e-5)
    assert trainer.ref_model is None
    assert abs(keep.logs["rewards/chosen"]) > 1e-3


def test_trl_takes_our_steps_on_an_adapter_that_is_there(tmp_path: Path) -> None:
    """The reference is the adapter as it was given, so that the first loss is ln 2."""
    model = get_peft_model(tiny(), ADAPTER).double()
    twin = copy.deepcopy(model)
    want = own_step(twin, copy.deepcopy(twin))
    keep, _ = trl_step(tmp_path, model)
    assert keep.logs["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert_same((keep.logs["loss"], keep.gradients), want)


def test_trl_keeps_our_log_probs_of_the_reference(tmp_path: Path) -> None:
    model, reference = tiny(), tiny(1)
    want = own_step(copy.deepcopy(model), reference)
    keep, trainer = trl_step(tmp_path, model, reference, arguments={"precompute_ref_log_probs": True})
    assert_same((keep.logs["loss"], keep.gradients), want)
    assert {"ref_chosen_logps", "ref_rejected_logps"} <= set(trainer.train_dataset.column_names)


def test_dpo_is_that_of_trl(tmp_path: Path) -> None:
    """Loss, gradients and what is logged under the same name, with responses cut off, in training and evaluation."""
    plain = Dataset.from_list([{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in ROWS])
    arguments = {"max_length": 8, "eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
    found = []
    for trainer, options in ((DPOTrainer, {}), (TSOTrainer, {"loss": "dpo"})):
        model, reference = tiny(), tiny(1)
        disable_dropout(model)
        disable_dropout(reference)
        keep, made = trl_step(
            tmp_path / trainer.__name__, model, reference, trainer, arguments, train_dataset=plain, eval_dataset=plain,
            **options,
        )  # fmt: skip
        found.append((keep, made.state.log_history[1]))
    (theirs, their_eval), (ours, our_eval) = found
    assert_same((ours.logs["loss"], ours.gradients), (theirs.logs["loss"], theirs.gradients), rtol=1e-5)
    own = {"clip/chosen", "clip/rejected", "num_tokens/chosen", "num_tokens/rejected"}
    left_out = {"entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected"}
    assert ours.logs.keys() - theirs.logs.keys() == own
    assert theirs.logs.keys() - ours.logs.keys() == left_out
    same = ours.logs.keys() & theirs.logs.keys()
    assert {name: ours.logs[name] for name in same} == pytest.approx({n: theirs.logs[n] for n in same}, rel=1e-5)
    for name in ("eval_loss", "eval_rewards/margins", "eval_logps/rejected"):
        assert our_eval[name] == pytest.approx(their_eval[name], rel=1e-4)


def test_prompts_and_responses_are_computed_once(tmp_path: Path) -> None:
    widths = []
    for share_prompt in ("auto", False):
        model = tiny()
        seen: list[int] = []
        model.model.embed_tokens.register_forward_hook(
            lambda module, args, out, seen=seen: seen.append(args[0].numel())
        )
        _, trainer = trl_step(tmp_path, model, tiny(1), share_prompt=share_prompt, arguments={"max_steps": 1})
        widths.append(seen[-1])
    rows = list(trainer.train_dataset)
    prompts = {tuple(row["prompt_ids"]) for row in rows}
    responses = {(*row["prompt_ids"], -1, *row[side]) for row in rows for side in ("chosen_ids", "rejected_ids")}
    needed = sum(map(len, prompts)) + sum(len(r) - r.index(-1) - 2 for r in responses)
    assert needed <= widths[0] <= 1.35 * needed  # rows are as long as the longest
    assert widths[1] >= 2 * needed


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ({"loss_type": ["ipo"]}, {}, r"loss_type is \['ipo'\].*pass loss= to TSOTrainer"),
        ({"ld_alpha": 0.5}, {}, "ld_alpha is 0.5.*use trl.DPOTrainer"),
        ({"f_divergence_type": "forward_kl"}, {}, "f_divergence_type.*use trl.DPOTrainer"),
        ({"use_weighting": True}, {}, "use_weighting is True"),
        ({"pad_to_multiple_of": 8}, {}, "pad_to_multiple_of is 8.*leave it out"),
        ({"truncation_mode": "keep_end"}, {}, "truncation_mode is 'keep_end'.*use 'keep_start'"),
        ({"label_smoothing": 0.2}, {}, "label_smoothing is 0.2 and has no effect on dual_clip"),
        ({"beta": 0.2}, {"loss_args": {"beta": 0.3}}, "beta is 0.2 and is given in loss_args too"),
        ({}, {"loss": "simpo"}, r"beta: DPOConfig's default is 0.1 and that of simpo 2.0; say which, as loss_args="),
        ({}, {"loss": "bmc", "loss_args": {"beta": 0.1}}, "needs a number for each token"),
        ({}, {"loss": "kto"}, "unknown loss 'kto'"),
        ({}, {"loss_args": {"clip": 1}}, "has no option 'clip'"),
        ({"precompute_ref_log_probs": True}, {"loss": "humanline"}, "keeps sums, but humanline DPO needs"),
        ({"sync_ref_model": True}, {"loss": "sft"}, "sync_ref_model is set, but chosen-only NLL needs no reference"),
    ],
)
@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode:FutureWarning")
def test_what_trl_can_say_and_we_cannot_do_is_refused(
    arguments: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = DPOConfig(str(tmp_path), **{**ARGUMENTS, **arguments})
    with pytest.raises(ValueError, match=message):
        TSOTrainer(None, None, config, **options)


def test_experts_and_learnt_prompts_are_refused(tmp_path: Path) -> None:
    fields = {
        "vocab_size": len(TOKENIZER),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_local_experts": 2,
        "pad_token_id": 0,
    }
    experts = MixtralForCausalLM(MixtralConfig(**fields))
    with pytest.raises(InputError, match=r"set router_aux_loss_coef=0.0"):
        trl_step(tmp_path, experts, MixtralForCausalLM(MixtralConfig(**fields)))
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(InputError, match="use LoRA or alike"):
        trl_step(tmp_path, tiny(), peft_config=prompts)
    with pytest.raises(InputError, match="use LoRA or alike"):
        with_preference_loss(get_peft_model(tiny(), prompts))


def test_without_trl_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match=r"needs TRL 1.16: pip install 'tso-fast\[trl\]'"):
        runpy.run_path(inspect.getfile(TSOTrainer))


# ----------------------------------------------------------------------------------------- a Trainer of transformers


def plain_step(
    folder: Path, model: Any, rows: Sequence[dict[str, Any]] = ROWS, max_length: int | None = None, **arguments: Any
) -> tuple[float, Gradients]:
    keep = Keep()
    given = {"remove_unused_columns": False, **ARGUMENTS, **arguments}
    trainer = Trainer(
        model, TrainingArguments(str(folder), label_names=["completion_mask"], **given), train_dataset=rows,
        eval_dataset=rows, data_collator=PairCollator(TOKENIZER, max_length), callbacks=[keep],
    )  # fmt: skip
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert before == pytest.approx(keep.logs["loss"], rel=1e-6)
    return keep.logs["loss"], keep.gradients


@pytest.mark.parametrize("loss", ["dual_clip", "humanline"])
def test_a_plain_trainer_takes_our_steps(loss: str, tmp_path: Path) -> None:
    model, reference = tiny(), tiny(1)
    want = own_step(copy.deepcopy(model), reference, loss_type=loss, loss_args={"beta": 0.2})
    got = plain_step(tmp_path, with_preference_loss(model, loss, reference=reference, beta=0.2))
    assert_same(got, want)


def test_a_plain_trainer_trains_an_adapter(tmp_path: Path) -> None:
    model = get_peft_model(tiny(), ADAPTER).double()
    twin = copy.deepcopy(model)
    want = own_step(twin, twin, disabled=twin.disable_adapter())
    assert_same(plain_step(tmp_path, with_preference_loss(model, share_prompt=True)), want)


def test_a_plain_trainer_takes_tokens_and_log_probs(tmp_path: Path) -> None:
    """Those of a reference, in the rows; and it is said when the rows lack them, or are taken away."""
    model, reference = tiny(), tiny(1)
    pairs = encoded()
    logprobs = reference_logprobs(
        Policy(reference).eval(), pairs, batch_size=4, pad_token_id=0, device=CPU, rank=0, world=1, impl="auto"
    )
    rows = [
        {"prompt_ids": pair.prompt, "chosen_ids": pair.chosen, "rejected_ids": pair.rejected, "scale": pair.scale}
        for pair in pairs
    ]
    known = [{**row, "ref_chosen_logps": float(c), "ref_rejected_logps": float(r)}
             for row, (c, r) in zip(rows, logprobs, strict=True)]  # fmt: skip
    want = own_step(copy.deepcopy(model), reference)
    model = with_preference_loss(model)
    assert_same(plain_step(tmp_path, model, known), want)
    with pytest.raises(InputError, match="needs a reference: give reference=copy"):
        plain_step(tmp_path, model, rows)
    with pytest.raises(InputError, match="set remove_unused_columns=False"):
        plain_step(tmp_path, model, ROWS, remove_unused_columns=True)
    with pytest.raises(InputError, match="max_length 6 leaves no room"):
        plain_step(tmp_path, model, ROWS, max_length=6)


def test_a_model_is_what_it_was_but_for_pairs() -> None:
    model = tiny().eval()
    ids = torch.tensor([[5, 6, 7]])
    before, said = model(ids).logits, model.generate(ids, max_new_tokens=4, do_sample=False)
    with_preference_loss(model, reference=tiny(1))
    assert torch.equal(model(ids).logits, before)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), said)
    batch = PairCollator(TOKENIZER)(ROWS)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(ids).logits, before)
    with pytest.raises(RuntimeError, match="copy it before, not after"):
        twin(**batch)
    with pytest.raises(InputError, match="it is the model that is trained"):
        with_preference_loss(model, reference=model)


def test_sequences_that_are_no_pairs_are_refused() -> None:
    good = PairCollator(TOKENIZER)(ROWS)
    model = with_preference_loss(tiny(), "sft")
    assert torch.isfinite(model(**good)["loss"])
    width = good["input_ids"].shape[1]
    gap = good["completion_mask"].clone()
    gap[1, 0] = 1
    with pytest.raises(InputError, match=r"pair 1 of a batch, chosen: completion_mask marks 5 of 10 tokens"):
        model(**{**good, "completion_mask": gap})
    other = good["input_ids"].clone()
    other[6, 0] += 1
    with pytest.raises(InputError, match="pair 2 of a batch: its chosen and rejected sequences have different prompts"):
        model(**{**good, "input_ids": other})
    left = {name: value.clone() for name, value in good.items()}
    for row in range(8):  # padding on the left is the same batch
        shift = width - int(good["attention_mask"][row].sum())
        for name in ("input_ids", "attention_mask", "completion_mask"):
            left[name][row] = good[name][row].roll(shift)
    assert torch.equal(model(**left)["loss"], model(**good)["loss"])


# -------------------------------------------------------------------------------------------------- a loop of one's own


def test_a_hand_written_loop_takes_our_steps() -> None:
    model, reference = tiny(), tiny(1)
    want = own_step(copy.deepcopy(model), reference, loss_type="dual_clip", loss_args={"clip_chosen": 0.05})
    batch = PairCollator(TOKENIZER)(ROWS)
    tokens, mask = batch["input_ids"], batch["attention_mask"]
    targets = tokens.masked_fill(batch["completion_mask"] == 0, -100).roll(-1, dims=1)
    targets[:, -1] = -100
    loss_fn = FusedLinearTSOLoss(beta=0.1, clip_chosen=0.05)
    hidden = model.eval().model(tokens, attention_mask=mask).last_hidden_state
    with torch.no_grad():
        ref_hidden = reference.eval().model(tokens, attention_mask=mask).last_hidden_state
    loss, aux = loss_fn(
        model.lm_head.weight, hidden, targets, None, ref_hidden, reference.lm_head.weight, scale=batch["scale"]
    )
    loss.backward()
    assert_same((float(loss), named_gradients(model)), want)
    assert len(aux) == 7


# ------------------------------------------------------------------------------------------------------- the benchmark


@pytest.mark.skipif(sys.platform != "linux", reason="it reads peak memory from /proc")
def test_the_benchmark_counts_what_must_be_computed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its floor's tokens are those of our own layout, and each of its runners runs."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    cases = importlib.import_module("train_step_cases")
    case = next(case for case in cases.CASES if case.name == "4 pairs")
    setting = cases.Setting(case=case, pairs=case.make(8, 1000, 5), llama="tiny", device="cpu", folder=tmp_path)
    layout = collate(setting.pairs, range(8), pad_token_id=0, device=CPU, share_prompts=True).layout
    assert cases.needed_tokens(setting) == (int(layout.attention_mask.sum()), int((layout.targets >= 0).sum()))
    assert layout.attention_mask.sum() == 2 * (5 + 5 * 4)
    for name, runner in cases.RUNNERS.items():
        if "compiled" not in name:
            assert runner(setting)["seconds"] > 0
