"""Whole preference steps, ours and the peers': models, pairs, and what runs a number of pairs through each.

A runner gets a ``Setting`` and returns seconds and peak memory of one pass over its pairs, reference included, after a
step on one of them. All runners start from the same weights and take the same pairs in batches of the same size.
"""

from __future__ import annotations

import copy
import functools
import gzip
import json
import re
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from harness import ROOT, resident_mib
from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from tso_fast.config.settings import CellConfig, TrainConfig
from tso_fast.files.run import Run
from tso_fast.integrations.trl import TSOTrainer
from tso_fast.models.policy import Policy
from tso_fast.models.tokens import pad_sequences
from tso_fast.training import optimise
from tso_fast.training.batches import EncodedPair
from tso_fast.training.load import share_prompts

GSM8K = ROOT.parent / "shared/data/gsm8k_matrix/matrix_dev.jsonl.gz"
EOS = 2

LLAMAS: dict[str, dict[str, int]] = {
    "60M": {"vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8,
            "num_attention_heads": 8, "num_key_value_heads": 8},
    "8 layers of Llama-3-8B": {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
                               "num_hidden_layers": 8, "num_attention_heads": 32, "num_key_value_heads": 8},
    "tiny": {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 2},
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Case:
    """``Case(name="full", what="pairs of 2 x 256, half prompt", pairs=synthetic)``"""

    name: str
    what: str
    make: Callable[[int, int, int], list[EncodedPair]]
    """Pairs, from their number, the vocabulary's size, and the tokens of a prompt and of a response where they are all
    alike."""
    batch: int = 4
    lora: bool = False
    bf16: bool = False
    """Autocast; the weights stay in float32."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a runner runs, in which folder, and where."""

    case: Case
    pairs: Sequence[EncodedPair]
    llama: str
    device: str
    folder: Path


def _pair(prompt: Iterable[int], chosen: Iterable[int], rejected: Iterable[int], name: str) -> EncodedPair:
    sides = {"prompt": tuple(prompt), "chosen": tuple(chosen), "rejected": tuple(rejected)}
    return EncodedPair(**sides, scale=1.0, soft_label=1.0, margin=0.0, prompt_id=name)


def synthetic(num: int, vocab: int, length: int, *, per_prompt: int = 1) -> list[EncodedPair]:
    """Random pairs; those of a prompt share their chosen response."""
    random = np.random.default_rng(0)

    def tokens() -> list[int]:
        return random.integers(3, vocab, length).tolist()

    pairs = []
    for n in range(-(-num // per_prompt)):
        prompt, chosen = tokens(), tokens()
        pairs += [_pair(prompt, chosen, tokens(), str(n)) for _ in range(per_prompt)]
    return pairs[:num]


def gsm8k(num: int, vocab: int, length: int) -> list[EncodedPair]:
    """GSM8K questions, a person's solution against a wrong one by GPT-3; words, digits and signs stand for tokens."""

    def tokens(text: str) -> list[int]:
        pieces = re.findall(r"\d|[^\W\d]+|[^\w\s]|\n", text)
        return [3 + zlib.crc32(piece.encode()) % (vocab - 3) for piece in pieces]

    pairs: list[EncodedPair] = []
    with gzip.open(GSM8K, "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            wrong = [r["text"] for r in row["responses"] if not r["is_correct"]]
            if wrong and len(pairs) < num:
                chosen, rejected = tokens(row["human_response"]), tokens(wrong[len(pairs) % len(wrong)])
                pairs.append(_pair(tokens(row["prompt"]), [*chosen, EOS], [*rejected, EOS], row["id"]))
    return pairs


CASES = [
    Case(name="full", what="pairs of 2 x 256, half prompt, float32", make=synthetic),
    Case(name="lora", what="the same, LoRA r 16", make=synthetic, lora=True),
    Case(name="bf16", what="the same in bf16 (autocast)", make=synthetic, bf16=True),
    Case(
        name="4 pairs", what="4 pairs a prompt: 1 chosen, 4 rejected", make=functools.partial(synthetic, per_prompt=4),
        batch=8,
    ),
    Case(name="gsm8k", what="GSM8K's lengths, batches of 8 pairs", make=gsm8k, batch=8),
]  # fmt: skip


# ---------------------------------------------------------------------------------------------------- what all share


def make_model(setting: Setting) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        **LLAMAS[setting.llama], max_position_embeddings=8192, pad_token_id=0, bos_token_id=1, eos_token_id=EOS,
        attn_implementation="sdpa",
    )  # fmt: skip
    with torch.device(setting.device):
        model = LlamaForCausalLM(config)
    return model if setting.device == "cpu" else model.to(torch.bfloat16)


def lora_config() -> LoraConfig:
    return LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def measured(setting: Setting, run: Callable[[Sequence[EncodedPair]], Any], *, warm: int = 1) -> dict[str, float]:
    """Seconds of ``run`` on all pairs, after ``warm`` of them, and the peak of memory over both, model included.

    On a CPU the peak is counted from before the model, see ``start_memory``.
    """
    run(setting.pairs[:warm])
    if setting.device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    extra = run(setting.pairs)
    if setting.device != "cpu":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = resident_mib("VmHWM") if setting.device == "cpu" else torch.cuda.max_memory_allocated() / 2**20
    return {"seconds": seconds, "peak_mib": peak, **(extra or {})}


def start_memory(device: str) -> float:
    """Resets the peak of resident memory, and returns the MiB that the libraries take."""
    if device != "cpu":
        return 0.0
    Path("/proc/self/clear_refs").write_text("5")
    return resident_mib("VmRSS")


# --------------------------------------------------------------------------------------------------------------- ours


def ours(setting: Setting, *, share_prompt: bool, clocked: bool = False) -> dict[str, float]:
    """``training.optimise.optimise``, as the loop calls it: reference, steps, metrics."""
    case = setting.case
    config = TrainConfig(
        output_dir="", prompts="-", cells=[CellConfig(path="-")], use_cpu=setting.device == "cpu", bf16=case.bf16,
        per_device_train_batch_size=case.batch, learning_rate=1e-6, share_prompt=share_prompt,
    )  # fmt: skip
    accelerator = optimise.make_accelerator(config, str(setting.folder))
    model = make_model(setting)
    if case.lora:
        model = get_peft_model(model, lora_config())
    policy = share_prompts(Policy(model), share_prompt)

    def run(pairs: Sequence[EncodedPair]) -> dict[str, float]:
        with Run.open(setting.folder / f"run-{len(pairs)}", {}, {}, {}) as files, Clocks() as clocks:
            optimise.optimise(
                policy, pairs, config, files=files.iteration(1), accelerator=accelerator, reference=None, pad_token_id=0
            )
        return {f"{name}_s": seconds for name, seconds in clocks.seconds.items()} if clocked else {}

    return measured(setting, run)


class Clocks:
    """Seconds inside the model with its op, its backward pass, and the optimizer with the clipping of gradients."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.places: list[tuple[Any, str, str]] = [
            (Policy, "forward", "forward"),
            (torch.Tensor, "backward", "backward"),
            (torch.optim.AdamW, "step", "optimizer"),
            (optimise, "clip_gradients", "optimizer"),
        ]

    def __enter__(self) -> Clocks:
        self.before = [getattr(owner, name) for owner, name, _ in self.places]
        for (owner, name, part), call in zip(self.places, self.before, strict=True):
            setattr(owner, name, self._clocked(call, part))
        return self

    def __exit__(self, *error: object) -> None:
        for (owner, name, _), call in zip(self.places, self.before, strict=True):
            setattr(owner, name, call)

    def _clocked(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        @functools.wraps(call)
        def clocked(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args, **options)
            finally:
                self.seconds[part] += time.perf_counter() - start

        return clocked


# ---------------------------------------------------------------------------------------------------------------- TRL


def trl(setting: Setting, *, is_ours: bool = False, precompute: bool = False) -> dict[str, float]:
    """``DPOTrainer`` without what costs time, or our ``TSOTrainer`` with the same arguments."""

    class Timed(TSOTrainer if is_ours else DPOTrainer):  # type: ignore[misc]
        """Takes tokens as they are, and tells how long the reference took before the steps."""

        reference_s = 0.0

        def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, *args: Any) -> Any:
            start = time.perf_counter()
            out = super()._precompute_ref_logps(*args)
            self.reference_s += time.perf_counter() - start
            return out

    def rows(pairs: Sequence[EncodedPair]) -> Any:
        fields = ("prompt", "chosen", "rejected")
        return Dataset.from_list([{f"{f}_ids": list(getattr(p, f)) for f in fields} | {"prompt": ""} for p in pairs])

    case = setting.case
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>")),
        pad_token="<pad>", bos_token="<s>", eos_token="</s>",
    )  # fmt: skip
    arguments = DPOConfig(
        str(setting.folder), use_cpu=setting.device == "cpu", bf16=case.bf16, gradient_checkpointing=False,
        per_device_train_batch_size=case.batch, num_train_epochs=1, max_length=None, optim="adamw_torch_fused",
        precompute_ref_log_probs=precompute, precompute_ref_batch_size=4 * case.batch, save_strategy="no",
        logging_strategy="no", report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    model = make_model(setting)
    has_model = not (case.lora or precompute)
    trainer = Timed(
        model, copy.deepcopy(model) if has_model else None, arguments, train_dataset=rows(setting.pairs),
        processing_class=tokenizer, peft_config=lora_config() if case.lora else None,
    )  # fmt: skip
    whole = trainer.train_dataset

    def run(pairs: Sequence[EncodedPair]) -> None:
        trainer.train_dataset = whole.select(range(len(pairs)))
        trainer.train()

    found = measured(setting, run)
    return {**found, "seconds": found["seconds"] + trainer.reference_s}


# -------------------------------------------------------------------------------------------------------------- Liger


def liger(setting: Setting, *, compiled: bool) -> dict[str, float]:
    """A hand-written loop around Liger's fused DPO loss, on padded batches."""
    case = setting.case
    model: Any = make_model(setting)
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    if case.lora:
        get_peft_model(model, lora_config())  # in place
    loss_fn = LigerFusedLinearDPOLoss(beta=0.1, compiled=compiled)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)

    def run(pairs: Sequence[EncodedPair]) -> None:
        for start in range(0, len(pairs), case.batch):
            batch = pairs[start : start + case.batch]
            sides = [(p.prompt, p.chosen) for p in batch] + [(p.prompt, p.rejected) for p in batch]
            ids, mask, targets = (t.to(setting.device) for t in pad_sequences(sides, 0))
            with torch.autocast(setting.device, torch.bfloat16, enabled=case.bf16):
                hidden = model.model(ids, attention_mask=mask, use_cache=False).last_hidden_state
                with torch.no_grad():
                    other = reference.model(ids, attention_mask=mask, use_cache=False).last_hidden_state
                # Autocast does not reach into the loss.
                head, other_head = (m.lm_head.weight.to(hidden.dtype) for m in (model, reference))
                loss, _ = loss_fn(head, hidden, targets, None, other, other_head)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return measured(setting, run, warm=case.batch)  # it compiles for each shape


# -------------------------------------------------------------------------------------------------------------- floor


def needed_tokens(setting: Setting) -> tuple[int, int]:
    """Tokens that go through the model, and those that are predicted: each prompt and each response of a batch once."""
    through = predicted = 0
    for start in range(0, len(setting.pairs), setting.case.batch):
        batch = setting.pairs[start : start + setting.case.batch]
        prompts = {pair.prompt for pair in batch}
        responses = {(pair.prompt, side) for pair in batch for side in (pair.chosen, pair.rejected)}
        through += sum(map(len, prompts)) + sum(len(side) - 1 for _, side in responses)
        predicted += sum(len(side) for _, side in responses)
    return through, predicted


def products(setting: Setting) -> list[tuple[int, int, int, int]]:
    """(tokens, inputs, outputs, how often) of the products with weights: forward, reference, gradients of inputs, and
    of weights where they are trained. Attention and the adapter's own small products are not counted."""
    llama = LLAMAS[setting.llama]
    through, predicted = needed_tokens(setting)
    width, inner = llama["hidden_size"], llama["intermediate_size"]
    narrow = width * llama["num_key_value_heads"] // llama["num_attention_heads"]
    per_weight = 3 if setting.case.lora else 4
    layers = llama["num_hidden_layers"] * per_weight
    return [
        (through, width, width, 2 * layers),
        (through, width, narrow, 2 * layers),
        (through, width, inner, 2 * layers),
        (through, inner, width, layers),
        (predicted, width, llama["vocab_size"], per_weight),
    ]


def floor(setting: Setting) -> dict[str, float]:
    """Those products alone, by ``torch.mm``, batch by batch."""
    num_batches = -(-len(setting.pairs) // setting.case.batch)
    dtype = torch.bfloat16 if setting.case.bf16 or setting.device != "cpu" else torch.float32
    options: Any = {"dtype": dtype, "device": setting.device}
    made = [
        (torch.randn(-(-rows // num_batches), n, **options), torch.randn(n, m, **options), times)
        for rows, n, m, times in products(setting)
    ]

    def run(pairs: Sequence[EncodedPair]) -> None:
        for _ in range(-(-len(pairs) // setting.case.batch)):
            for a, b, times in made:
                for _ in range(times):
                    torch.mm(a, b)

    return measured(setting, run)


RUNNERS: dict[str, Callable[[Setting], dict[str, float]]] = {
    "floor": floor,
    "tso-fast": functools.partial(ours, share_prompt=True),
    "tso-fast, padded": functools.partial(ours, share_prompt=False),
    "tso-fast, clocked": functools.partial(ours, share_prompt=True, clocked=True),
    "TSOTrainer": functools.partial(trl, is_ours=True),
    "TRL": trl,
    "TRL, reference before": functools.partial(trl, precompute=True),
    "Liger": functools.partial(liger, compiled=False),
    "Liger, compiled": functools.partial(liger, compiled=True),
}
PEERS = ("TRL", "TRL, reference before")
"""Whichever of these is faster is the peer of the ratios."""
