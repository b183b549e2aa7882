"""Checks generation and log-probs of tiny random models of many architectures against transformers in float64.

    python benchmarks/check_architectures.py [NAME ...] [--out FILE]

Ours runs as it does in a run: float32, prompts of unequal length in a batch whose rows leave and join, responses padded
on the right for training. The truth is the same weights in float64, one sequence at a time, without padding or cache.
Every architecture must be right or refused; the exit status is 1 if one is neither. About half a minute.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import logging
import math
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from tso_fast.errors import InputError
from tso_fast.files.atomic import write_json
from tso_fast.generators import Completion, Request, Sampling
from tso_fast.generators.hf import BatchGenerator
from tso_fast.models.layout import padded
from tso_fast.models.policy import Policy
from tso_fast.progress import make_console
from tso_fast.quickstart.build import Recipe, make_tokenizer
from tso_fast.report.tables import make_table

VOCAB = 101
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "initializer_range": 0.15,  # attention then has a say, as in a trained model
}
HEADS = {"head_dim": 8}
WINDOW = {**HEADS, "sliding_window": 6}
EXPERTS = {
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4, "n_ctx": 64}
LINEAR = {
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
STATE = {"state_size": 4, "num_key_value_heads": 4}
DECODER = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    # attention over keys and values
    "Apertus": HEADS,
    "Arcee": HEADS,
    "BioGpt": {},
    "BitNet": HEADS,
    "Bloom": {"n_layer": 2, "n_head": 4},
    "CTRL": {"n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 48, "n_positions": 64},
    "CodeGen": GPT,
    "Cohere": {},
    "Cohere2": WINDOW,
    "Cwm": WINDOW,
    "DiffLlama": HEADS,
    "Doge": HEADS,
    "Ernie4_5": HEADS,
    "Exaone4": WINDOW,
    "Falcon": {"new_decoder_architecture": False},
    "GPT2": GPT,
    "GPTBigCode": GPT,
    "GPTJ": GPT,
    "GPTNeo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 6},
    "GPTNeoX": {},
    "Gemma": HEADS,
    "Gemma2": WINDOW,
    "Gemma3Text": WINDOW,
    "Glm": HEADS,
    "Glm4": HEADS,
    "Granite": {},
    "Helium": HEADS,
    "HunYuanDenseV1": HEADS,
    "Jais2": HEADS,
    "Llama": {},
    "Llama4Text": {**HEADS, **EXPERTS, "attention_chunk_size": 6, "intermediate_size_mlp": 48},
    "MiniCPM3": LATENT,
    "Ministral": WINDOW,
    "Mistral": WINDOW,
    "ModernBertDecoder": {"local_attention": 6},
    "Mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "NanoChat": HEADS,
    "Nemotron": HEADS,
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "Olmo": {},
    "Olmo2": {},
    "Olmo3": WINDOW,
    "OpenAIGPT": GPT,
    "Persimmon": {},
    "Phi": {},
    "Phi3": {"sliding_window": 7},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "Qwen3": HEADS,
    "SeedOss": HEADS,
    "SmolLM3": {},
    "StableLm": {},
    "Starcoder2": {"sliding_window": 6},
    "VaultGemma": WINDOW,
    # experts
    "DeepseekV2": {**EXPERTS, **LATENT},
    "DeepseekV3": {**EXPERTS, **LATENT},
    "Dots1": {**HEADS, **EXPERTS},
    "Ernie4_5_Moe": {**EXPERTS, "moe_num_experts": 4, "moe_k": 2},
    "FlexOlmo": EXPERTS,
    "Glm4Moe": {**HEADS, **EXPERTS},
    "GptOss": {**WINDOW, **EXPERTS},
    "GraniteMoe": EXPERTS,
    "JetMoe": {"kv_channels": 8, "num_local_experts": 4},
    "MiniMaxM2": {**HEADS, **EXPERTS, "rotary_dim": 4},
    "Mixtral": EXPERTS,
    "Olmoe": EXPERTS,
    "Phimoe": EXPERTS,
    "Qwen2Moe": {**EXPERTS, "shared_expert_intermediate_size": 16},
    "Qwen3Moe": {**HEADS, **EXPERTS},
    # states, beside attention or instead of it
    "Bamba": {
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_n_groups": 1,
        "mamba_d_state": 4,
        "attn_layer_indices": [1],
    },
    "FalconH1": {**HEADS, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_d_ssm": 32},
    "FalconMamba": STATE,
    "GraniteMoeHybrid": {
        **EXPERTS,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_n_groups": 1,
        "mamba_d_state": 4,
        "shared_intermediate_size": 16,
        "layer_types": ["mamba", "attention"],
    },
    "Jamba": {**EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4},
    "Lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    "Mamba": STATE,
    "Mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 4, "n_groups": 1},
    "MiniMax": {**HEADS, **EXPERTS, "layer_types": ["linear_attention", "full_attention"], "block_size": 4},
    "OlmoHybrid": {**LINEAR, "layer_types": ["linear_attention"] * 3 + ["full_attention"]},
    "Qwen3Next": {**HEADS, **EXPERTS, **LINEAR, "shared_expert_intermediate_size": 16},
    "Qwen3_5Text": {**HEADS, **LINEAR},
    "RecurrentGemma": {"lru_width": 32, "attention_window_size": 6, "num_hidden_layers": 3},
    "Rwkv": {"attention_hidden_size": 32},
    # made for something else
    "Bart": {**DECODER, "is_decoder": True},
    "Bert": {},
    "Electra": {"embedding_size": 32},
    "Roberta": {},
    "TrOCR": DECODER,
    "XLMRoberta": {},
}
"""Names of transformers' configurations, and what each takes beside ``COMMON``."""

PROMPTS, LENGTH, BATCH, MAX_TOKENS = 7, 13, 3, 10
TOLERANCE = 1e-4
"""Nats a token; rounding in float32 makes some 1e-6."""
TEXTS = [("Add 1 and 2.", "3"), ("Write Sam twice.", "Sam Sam")] * 4


@dataclass(frozen=True, kw_only=True)
class Checked:
    """How an architecture does: ``Checked(generation="right", error=2e-7, training="right", training_error=1e-7)``."""

    generation: str
    """``right``, ``right, one at a time``, ``WRONG``, or ``refused: ...``."""
    error: float | None = None
    """Largest difference of a log-prob from float64's, or distance of a greedy token below the best, nats a token."""
    training: str
    training_error: float | None = None

    @property
    def is_wrong(self) -> bool:
        return "WRONG" in (self.generation, self.training)


def make_model(name: str) -> Any:
    """A random model whose logits spread over a few units, as those of a trained one do."""
    made = getattr(transformers, f"{name}Config")
    fields = {key: value for key, value in COMMON.items() if not _is_fixed(made, key)}
    config = made(**{**fields, **ARCHITECTURES[name]})
    with torch.device("meta"):
        size = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(config).parameters())
    assert size < 3e6, f"{name}: {size} parameters; something in its configuration is not tiny yet"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    if (head := model.get_output_embeddings()) is not None:
        nn.init.normal_(head.weight, std=0.4)
    return model


def _is_fixed(made: type, key: str) -> bool:
    """Whether a field follows from others."""
    found = getattr(made, key, None)
    return isinstance(found, property) and found.fset is None


@functools.cache
def tokenizer() -> Any:
    return make_tokenizer(TEXTS, Recipe(seed=0))


def requests(temperature: float) -> list[Request]:
    r = np.random.default_rng(0)
    return [
        Request(
            key=f"{temperature} {i}".encode(),
            cell="",
            token_ids=tuple(r.integers(3, VOCAB, 1 + (5 * i) % LENGTH).tolist()),
            seed=2**62 + i,
            sampling=Sampling(temperature=temperature, max_tokens=MAX_TOKENS),
        )
        for i in range(PROMPTS)
    ]


@torch.inference_mode()
def true_logprobs(truth: Any, tokens: Sequence[int], start: int) -> torch.Tensor:
    """Of all tokens at the positions from ``start`` on, [T, V] float64."""
    ids = torch.tensor([list(tokens)])
    logits = truth(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return logits[0, start - 1 : -1].double().log_softmax(dim=-1)


def generation_error(truth: Any, request: Request, completion: Completion) -> float:
    tokens = torch.tensor(completion.token_ids)
    logprobs = true_logprobs(truth, [*request.token_ids, *completion.token_ids], len(request.token_ids))
    chosen = logprobs.gather(-1, tokens[:, None])[:, 0]
    error = abs(float(chosen.sum()) - (completion.logprob or 0.0)) / len(tokens)
    gap = float((logprobs.max(dim=-1).values - chosen).max()) if request.sampling.temperature == 0 else 0.0
    return max(error, gap)


def training_error(model: Any, truth: Any, rows: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> float:
    layout = padded(rows, 0)
    policy = Policy(model)
    with torch.no_grad():
        ours = policy.logprobs(layout, impl="auto").double()
    errors = []
    for row, (prompt, completion) in enumerate(rows):
        logprobs = true_logprobs(truth, [*prompt, *completion], len(prompt))
        chosen = logprobs.gather(-1, torch.tensor(completion)[:, None])[:, 0]
        found = ours[row, len(prompt) - 1 : len(prompt) - 1 + len(completion)]
        errors.append(float((found - chosen).abs().max()))
    return max(errors)


def check(name: str) -> Checked:
    model = make_model(name)
    truth = copy.deepcopy(model).double()
    if hasattr(truth, "set_experts_implementation"):
        truth.set_experts_implementation("eager")  # the grouped product has no float64
    asked = requests(0.0) + requests(1.0)
    r = np.random.default_rng(1)
    rows = [(request.token_ids, tuple(r.integers(3, VOCAB, 2 + i).tolist())) for i, request in enumerate(asked[:4])]
    generation, error = _generation(model, truth, asked, name)
    try:
        worst = training_error(model, truth, rows)
        training = "right" if worst <= TOLERANCE else "WRONG"
    except InputError as refusal:
        worst, training = None, f"refused: {refusal}"
    return Checked(generation=generation, error=error, training=training, training_error=worst)


def _generation(model: Any, truth: Any, asked: Sequence[Request], name: str) -> tuple[str, float | None]:
    generator = BatchGenerator(model, tokenizer(), [COMMON["eos_token_id"]], batch_size=BATCH, name=name)
    try:
        generator.prove()
    except InputError as refusal:
        return f"refused: {refusal}", None
    errors = []
    for _, group in itertools.groupby(asked, key=lambda request: request.sampling):
        of_group = {request.key: request for request in group}
        for completion in itertools.chain.from_iterable(generator.run(list(of_group.values()))):
            errors.append(generation_error(truth, of_group[completion.key], completion))
    worst = max(errors)
    right = "right" if generator.batch_size > 1 else "right, one at a time"
    return (right if math.isfinite(worst) and worst <= TOLERANCE else "WRONG"), worst


def quiet() -> None:
    """Not what transformers says of tiny configurations."""
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("tso_fast").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ARCHITECTURES)}")
    parser.add_argument("--out", type=Path, help="JSON to write")
    given = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    found = {}
    for name in given.names or ARCHITECTURES:
        found[name] = check(name)
        print(f"{name}: {found[name]}", file=sys.stderr, flush=True)
    columns = ("architecture", "generation", "error", "training", "error ")
    rows = [
        (name, c.generation.partition(":")[0], _shown(c.error), c.training.partition(":")[0], _shown(c.training_error))
        for name, c in found.items()
    ]
    make_console().print(make_table(f"{len(found)} architectures; errors in nats a token", columns, rows))
    wrong = [name for name, c in found.items() if c.is_wrong]
    print(f"{len(found) - len(wrong)} of {len(found)} right or refused" + "".join(f"; WRONG: {name}" for name in wrong))
    if given.out is not None:
        write_json(given.out, {name: vars(c) for name, c in found.items()})
    return 1 if wrong else 0


def _shown(error: float | None) -> str:
    return "-" if error is None else f"{error:.0e}"


if __name__ == "__main__":
    sys.exit(main())
