"""Policy on tiny models of several architectures: what enters the head, loading and saving, dropout, checkpointing."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from helpers import SHAPE
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from tso_fast.errors import InputError
from tso_fast.models import load
from tso_fast.models.load import (
    device_of,
    end_token_ids,
    load_config,
    load_model,
    load_tokenizer,
    resolve_attention,
    save_model,
)
from tso_fast.models.policy import Policy, disable_dropout
from tso_fast.quickstart.build import Recipe, make_tokenizer
from tso_fast.training.batches import EncodedPair, collate

VOCAB = SHAPE["vocab_size"]
GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SHAPE),
    "gpt2": ("GPT2Config", GPT2),
    "qwen2-tied": ("Qwen2Config", {**SHAPE, "tie_word_embeddings": True}),
    "gemma2-softcap": ("Gemma2Config", {**SHAPE, "head_dim": 8, "final_logit_softcapping": 0.5}),
    "granite-divided": ("GraniteConfig", {**SHAPE, "logits_scaling": 4.0}),
    "cohere-scaled": ("CohereConfig", {**SHAPE, "logit_scale": 0.25}),
    "phi-bias": ("PhiConfig", SHAPE),
    "opt-projected": (
        "OPTConfig",
        {
            "vocab_size": VOCAB,
            "hidden_size": 48,
            "word_embed_proj_dim": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
        },
    ),
}
LOAD: dict[str, Any] = {"dtype": "float32", "attn_implementation": "sdpa", "device": "cpu"}


def tiny(name: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """A random model whose logits spread over a few units, as those of a trained one do."""
    cls, fields = CONFIGS[name]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(getattr(transformers, cls)(**{**fields, **changes}))
    head = model.get_output_embeddings()
    nn.init.normal_(head.weight, std=0.4)
    if head.bias is not None:
        nn.init.normal_(head.bias)
    return model.eval()


def pair_batch() -> Any:
    pairs = [
        EncodedPair(
            prompt=(5, 6, 7), chosen=(8, 9, 2), rejected=(10, 2), scale=1.0, soft_label=1.0, margin=0.0, prompt_id="a"
        ),
        EncodedPair(
            prompt=(11,),
            chosen=(12, 2),
            rejected=(13, 14, 15, 16, 17, 2),
            scale=0.5,
            soft_label=0.8,
            margin=0.1,
            prompt_id="b",
        ),
    ]
    return pairs, collate(pairs, [0, 1], pad_token_id=0, device=torch.device("cpu"))


def own_sums(model: Any, pairs: list[EncodedPair]) -> torch.Tensor:
    """Sums of log-probs by the model's own logits, a sequence at a time and without padding."""
    sums = []
    for side in ("chosen", "rejected"):
        for pair in pairs:
            ids = torch.tensor([pair.prompt + getattr(pair, side)])
            logprobs = model(ids).logits.double().log_softmax(-1)[0, :-1]
            picked = logprobs.gather(1, ids[0, 1:, None])[len(pair.prompt) - 1 :]
            sums.append(picked.sum())
    return torch.stack(sums)


@pytest.mark.parametrize("name", CONFIGS)
def test_log_probs_are_those_of_the_models_own_logits(name: str) -> None:
    model = tiny(name)
    pairs, batch = pair_batch()
    policy = Policy(model)
    got = policy(batch, impl="auto")
    with torch.no_grad():
        torch.testing.assert_close(got.double(), own_sums(model, pairs), rtol=1e-5, atol=1e-5)
    rows = batch.layout
    assert policy.hidden_of(rows).shape == (4, rows.input_ids.shape[1], 32)
    logits = model(rows.input_ids, attention_mask=rows.attention_mask).logits
    assert logits.shape[-1] == VOCAB  # the head is itself again


@pytest.mark.parametrize("name", ["llama", "qwen2-tied", "gemma2-softcap", "granite-divided", "phi-bias"])
def test_gradients_reach_every_weight_as_through_full_logits(name: str) -> None:
    model = tiny(name).double()
    pairs, batch = pair_batch()
    weights = torch.tensor([1.0, -2.0, 0.5, 1.5])
    (Policy(model)(batch, impl="auto") * weights).sum().backward()
    got = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()
    (own_sums(model, pairs) * weights).sum().backward()
    assert got
    for key, p in model.named_parameters():
        torch.testing.assert_close(got[key], p.grad, rtol=1e-5, atol=1e-8)
        assert p.grad.any(), key


WINDOWS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2-window": ("Gemma2Config", {**SHAPE, "head_dim": 8, "sliding_window": 4}),
    "mistral-window": ("MistralConfig", {**SHAPE, "sliding_window": 4}),
    "mixtral": ("MixtralConfig", {**SHAPE, "num_local_experts": 4}),
    "qwen3": ("Qwen3Config", {**SHAPE, "head_dim": 8}),
}
"""Further architectures: windows shorter than a response, and experts."""


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [*CONFIGS, *WINDOWS])
def test_shared_prompts_and_packed_rows_give_the_gradients_of_padded_sequences(
    name: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four pairs of two prompts and six responses."""
    monkeypatch.setattr(sys.modules[__name__], "CONFIGS", CONFIGS | WINDOWS)
    model = tiny(name, attn_implementation=attention)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped product has no float64
    policy = Policy(model.double())
    assert policy.obstacle_to_sharing() is None
    can_pack = policy.obstacle_to_packing() is None
    assert can_pack == (name != "opt-projected")  # whose mask does not look at positions
    if attention == "eager" and "window" in name:
        return  # transformers gives NaN for padding beyond the window
    prompts, r = [(5, 6, 7, 8), (11,)], np.random.default_rng(0)
    pairs = [
        EncodedPair(
            prompt=prompts[i % 2],
            chosen=(12, 13, 2),
            rejected=tuple(r.integers(3, VOCAB, 1 + 2 * i).tolist()),
            scale=1.0 + i,
            soft_label=0.9,
            margin=0.0,
            prompt_id="",
        )
        for i in range(4)
    ]
    found = []
    for share_prompts, packs_rows in ((False, False), (True, False), (False, can_pack)):
        policy.packs_rows = packs_rows
        reference = -torch.arange(8.0).reshape(4, 2)
        batch = collate(
            pairs,
            range(4),
            pad_token_id=0,
            device=torch.device("cpu"),
            share_prompts=share_prompts,
            ref_logprobs=reference,
        )
        assert batch.layout.targets.shape[0] == 6
        out = policy(batch, impl="auto", loss="dpo")
        out.loss.backward()
        found.append([out.losses, out.logprobs, *(p.grad for p in model.parameters())])
        model.zero_grad()
    for one, *others in zip(*found, strict=True):
        for other in others:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)  # most norms compute in float32


@pytest.mark.parametrize(
    ("cls", "fields", "reason"),
    [
        (
            "MambaConfig",
            {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
            "it fails|differ",
        ),
        ("BloomConfig", {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4}, "attn|fails|differ"),
    ],
)
def test_what_cannot_share_prompts_or_pack_rows_says_why(cls: str, fields: dict[str, Any], reason: str) -> None:
    torch.manual_seed(0)
    policy = Policy(AutoModelForCausalLM.from_config(getattr(transformers, cls)(**fields)))
    for obstacle in (policy.obstacle_to_sharing(), policy.obstacle_to_packing()):
        assert obstacle is not None
        assert re.search(reason, obstacle), obstacle


def test_forward_is_the_loss_with_the_scalars_of_the_batch() -> None:
    policy = Policy(tiny())
    pairs, batch = pair_batch()
    sums = policy(batch, impl="auto").detach()
    reference = (sums + torch.tensor([-1.0, 2.0, 1.0, -2.0])).reshape(2, 2).T
    batch = collate(pairs, [0, 1], pad_token_id=0, device=torch.device("cpu"), ref_logprobs=reference)
    out = policy(batch, impl="auto", loss="dpo", beta=0.5)
    torch.testing.assert_close(out.logprobs, sums)
    # Log-ratios: chosen 1, -2; rejected -1, 2; so z = 1 and -2 - 0.1.
    losses = [
        torch.nn.functional.softplus(torch.tensor(-1.0)),
        0.8 * torch.nn.functional.softplus(torch.tensor(2.1)) + 0.2 * torch.nn.functional.softplus(torch.tensor(-2.1)),
    ]
    torch.testing.assert_close(out.loss, (losses[0] + 0.5 * losses[1]) / 1.5)


def test_in_bf16_and_under_autocast_the_reference_cancels() -> None:
    pairs, batch = pair_batch()
    # Under autocast what enters the head is float32 in most models, and bf16 where a projection precedes it.
    for model, dtype in ((tiny().bfloat16(), None), (tiny(), torch.bfloat16), (tiny("opt-projected"), torch.bfloat16)):
        policy = Policy(model)
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            sums = policy(batch, impl="auto").detach()
            again = collate(
                pairs, [0, 1], pad_token_id=0, device=torch.device("cpu"), ref_logprobs=sums.reshape(2, 2).T
            )
            out = policy(again, impl="auto", loss="dual_clip")
        assert sums.dtype == torch.float32
        torch.testing.assert_close(out.logprobs, sums, rtol=0, atol=1e-5)
        out.loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


class Changed(nn.Module):
    """A model whose logits are not softmax inputs of its head's output."""

    def __init__(self, model: Any, change: Any) -> None:
        super().__init__()
        self.model, self.change, self.config = model, change, model.config
        self.get_output_embeddings, self.device = model.get_output_embeddings, model.device

    def forward(self, **inputs: Any) -> Any:
        out = self.model(**inputs)
        out.logits = self.change(out.logits)
        return out


@pytest.mark.parametrize(
    "change",
    [
        lambda x: 1.1 * x,
        lambda x: x + torch.arange(VOCAB) / 50,
        lambda x: 5 * torch.tanh(x / 5),
        lambda x: x * torch.nan,
    ],
    ids=["scale", "offset", "softcap", "nan"],
)
@pytest.mark.parametrize("size", [1.0, 1e-4], ids=["trained", "untrained"])
def test_an_architecture_that_changes_its_logits_is_refused(change: Any, size: float) -> None:
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight *= size
    Policy(Changed(model, lambda x: x))
    with pytest.raises(InputError, match=r"Changed: its logits, of up to .* differ from head\(hidden\) by"):
        Policy(Changed(model, lambda x: size * change(x / size)))


def test_a_head_that_is_no_linear_layer_is_refused() -> None:
    model = tiny()
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(InputError, match="LlamaForCausalLM: its output head is Sequential, expected a Linear"):
        Policy(model)


def test_making_a_policy_leaves_the_mode_alone_and_an_error_restores_the_head() -> None:
    model = tiny()
    assert not Policy(model).model.training
    assert Policy(model.train()).model.training
    with pytest.raises(IndexError):
        Policy(model).hidden(torch.tensor([[VOCAB]]), torch.ones(1, 1, dtype=torch.int64))
    assert "forward" not in vars(model.get_output_embeddings())


DROPOUT = {
    "gpt2": ("GPT2Config", {**GPT2, "resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}),
    "llama": ("LlamaConfig", {**SHAPE, "attention_dropout": 0.5}),
    # OPT and Bloom keep probabilities as numbers of their modules, OPT drops whole layers too.
    "opt": (
        "OPTConfig",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 32,
            "dropout": 0.5,
            "attention_dropout": 0.5,
            "layerdrop": 0.5,
            "pad_token_id": 0,
        },
    ),
    "bloom": (
        "BloomConfig",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "n_layer": 2,
            "n_head": 4,
            "hidden_dropout": 0.5,
            "attention_dropout": 0.5,
        },
    ),
}


@pytest.mark.parametrize(
    ("name", "attention"), [(n, a) for n in DROPOUT for a in ("eager", "sdpa") if (n, a) != ("bloom", "sdpa")]
)
def test_without_dropout_training_is_deterministic(name: str, attention: str) -> None:
    cls, fields = DROPOUT[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, cls)(**fields), attn_implementation=attention)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    disable_dropout(model)
    trained = model(ids).logits
    assert all(torch.equal(trained, model(ids).logits) for _ in range(5))
    torch.testing.assert_close(model.eval()(ids).logits, trained)


@pytest.mark.parametrize("name", ["llama", "qwen2-tied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_save_and_load_round_trip_is_bitwise(name: str, dtype: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer([("a b c", "1")] * 3, Recipe(seed=0))
    model = tiny(name, vocab_size=len(tokenizer)).to(getattr(torch, dtype))
    save_model(model, tokenizer, tmp_path)
    again = load_model(tmp_path, **{**LOAD, "dtype": dtype})
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(
        torch.equal(value, state[key]) and value.dtype == state[key].dtype for key, value in model.state_dict().items()
    )
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == (name == "qwen2-tied")
    assert load_tokenizer(tmp_path)("a b")["input_ids"] == tokenizer("a b")["input_ids"]
    assert load_config(tmp_path).vocab_size == len(tokenizer)
    first = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    save_model(again, load_tokenizer(tmp_path), tmp_path / "again")
    assert first["model.safetensors"] == (tmp_path / "again/model.safetensors").read_bytes()


def test_loading_what_is_not_whole_is_refused(tmp_path: Path) -> None:
    for loader in (load_tokenizer, load_config, lambda path: load_model(path, **LOAD)):
        with pytest.raises(InputError, match="nowhere"):
            loader(tmp_path / "nowhere")
    tiny().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"1 of the model's weights are not in .* model\.layers\.1\.mlp\.up_proj"):
        load_model(tmp_path, **LOAD)
    tokenizer = make_tokenizer([("a", "1")], Recipe(seed=0))
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "no-eos")
    with pytest.raises(InputError, match="the tokenizer has no eos_token"):
        load_tokenizer(tmp_path / "no-eos")


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2-softcap"])
def test_gradient_checkpointing_gives_the_same_gradients(name: str) -> None:
    model = tiny(name)
    disable_dropout(model)
    policy = Policy(model.train())
    _, batch = pair_batch()

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        policy(batch, impl="auto").sum().backward()
        return [p.grad for p in model.parameters()]

    plain = gradients()
    passes: list[None] = []
    layers = model.get_decoder().h if name == "gpt2" else model.get_decoder().layers
    layers[0].register_forward_pre_hook(lambda *_: passes.append(None))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = gradients()
    assert len(passes) == 2  # it really computed the layer again
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_device_of() -> None:
    assert device_of(use_cpu=True).type == "cpu"
    assert device_of(use_cpu=False).type == ("cuda" if torch.cuda.is_available() else "cpu")


# -------------------------------------------------------------------------------------------------------- LoRA cells


def adapter(folder: Path, name: str = "llama", **config: Any) -> Any:
    """Full weights in folder/base, an adapter of them in folder/adapter; peft's own model of both."""
    tiny(name).save_pretrained(folder / "base")
    torch.manual_seed(1)
    options = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False, **config}
    adapted = peft.get_peft_model(tiny(name), peft.LoraConfig(**options))
    adapted.save_pretrained(folder / "adapter")
    return adapted.eval()


def load_adapter(folder: Path, **options: Any) -> Any:
    return load_model(folder / "adapter", base=folder / "base", **{**LOAD, **options}).eval()


IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


@pytest.mark.parametrize(
    "config", [{}, {"use_dora": True}, {"use_rslora": True, "lora_alpha": 3}, {"modules_to_save": ["lm_head"]}], ids=str
)
def test_a_lora_cell_is_what_peft_makes_of_it(config: dict[str, Any], tmp_path: Path) -> None:
    want = adapter(tmp_path, **config)
    model = load_adapter(tmp_path)
    assert isinstance(model, transformers.PreTrainedModel)
    assert model.name_or_path == str(tmp_path / "adapter")
    with torch.no_grad():
        if "modules_to_save" in config:  # as training would have changed it
            weights = load_file(tmp_path / "adapter/adapter_model.safetensors")
            weights["base_model.model.lm_head.weight"] *= 1.5
            save_file(weights, tmp_path / "adapter/adapter_model.safetensors")
            want.base_model.model.lm_head.modules_to_save["default"].weight *= 1.5
            model = load_adapter(tmp_path)
        logits = want(IDS).logits
        assert torch.equal(model(IDS).logits, logits)
        assert (logits - tiny()(IDS).logits).abs().max() > 0.1
        generated = model.generate(IDS, max_new_tokens=5, do_sample=False)
        assert torch.equal(generated, want.generate(input_ids=IDS, max_new_tokens=5, do_sample=False))
        merged = load_adapter(tmp_path, merge=True)
        torch.testing.assert_close(merged(IDS).logits, logits, rtol=1e-4, atol=1e-4)
    assert merged.state_dict().keys() == tiny().state_dict().keys()
    assert not [type(m) for m in merged.modules() if type(m).__module__.startswith("peft")]
    save_model(merged, make_tokenizer([("a", "1")], Recipe(seed=0)), tmp_path / "merged")
    again = load_model(tmp_path / "merged", **LOAD)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), merged.parameters(), strict=True))
    pairs, batch = pair_batch()
    with torch.no_grad():
        torch.testing.assert_close(
            Policy(model)(batch, impl="auto").double(), own_sums(model, pairs), rtol=1e-5, atol=1e-5
        )


def test_an_unmerged_adapter_keeps_what_bf16_weights_would_round_away(tmp_path: Path) -> None:
    adapted = adapter(tmp_path)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p *= 1e-3
    adapted.save_pretrained(tmp_path / "adapter")
    layer = load_adapter(tmp_path, dtype="bfloat16").model.layers[0].self_attn.q_proj
    assert layer.base_layer.weight.dtype == torch.bfloat16
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    want = adapted.base_model.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        delta = want(x) - want.base_layer(x)
        lora = layer.lora_B["default"](layer.lora_A["default"](x)) * layer.scaling["default"]
        torch.testing.assert_close(lora, delta, rtol=1e-3, atol=1e-7)
        base, merged = (load_adapter(tmp_path, dtype="bfloat16", merge=m) for m in (False, True))
        kept = merged.model.layers[0].self_attn.q_proj.weight - base.model.layers[0].self_attn.q_proj.base_layer.weight
        assert ((x @ kept.float().T) - delta).abs().max() > 0.2 * delta.abs().max()


def break_adapter(folder: Path, how: str) -> None:
    file, config = folder / "adapter/adapter_model.safetensors", folder / "adapter/adapter_config.json"
    if how == "no weights":
        file.rename(folder / "adapter/adapter_model.bin")
    elif how == "no config":
        config.unlink()
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "config no JSON":
        config.write_text("{")
    elif how == "other type":
        config.write_text(config.read_text().replace('"LORA"', '"IA3"'))
    else:
        weights = load_file(file)
        key = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
        value = weights.pop(key)
        if how == "extra":
            weights |= {key: value, key.replace("layers.1", "layers.7"): value.clone()}
        elif how == "shape":
            weights[key] = value[:, :16].clone()
        save_file(weights, file)


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no weights", "no adapter_model.safetensors here"),
        ("no config", "no adapter_config.json here"),
        ("cut", "the LoRA adapter cannot be put on .*base"),
        ("config no JSON", "the LoRA adapter cannot be put on .*base"),
        ("other type", "cannot be put on .*base: .*IA3"),
        ("missing", r"1 weights of the LoRA adapter are not in adapter_model.safetensors, such as .*layers\.1.*lora_A"),
        ("extra", r"1 weights of the LoRA adapter have no place in the model, such as .*layers\.7"),
        ("shape", "cannot be put on .*base: (.|\n)*size mismatch"),
    ],
)
def test_an_adapter_that_is_not_whole_or_does_not_fit_is_refused(
    how: str, message: str, merge: bool, tmp_path: Path
) -> None:
    adapter(tmp_path)
    break_adapter(tmp_path, how)
    with pytest.raises(InputError, match=f"^{tmp_path / 'adapter'}: (.|\n)*{message}"):
        load_adapter(tmp_path, merge=merge)


def test_an_adapter_of_other_modules_is_refused(tmp_path: Path) -> None:
    adapter(tmp_path)
    tiny("gpt2").save_pretrained(tmp_path / "base")
    with pytest.raises(InputError, match=r"the LoRA adapter cannot be put on .*base"):
        load_adapter(tmp_path)


def test_without_peft_its_installation_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter(tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"needs peft: .*pip install 'tso-fast\[lora\]'"):
        load_adapter(tmp_path)


# --------------------------------------------------------------------------------------------------------- attention


def test_auto_attention_is_the_best_that_can_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tso_fast.models.load")
    load._log_attention.cache_clear()
    assert resolve_attention("auto", "cpu", "bfloat16") == "sdpa"
    assert resolve_attention("auto", "cpu", "bfloat16") == "sdpa"
    assert caplog.messages == [
        "attn_implementation='auto' chose 'sdpa' for bfloat16 on cpu; no flash_attention_2: "
        "it needs a GPU, the model is on cpu"
    ]
    assert resolve_attention("eager", "cuda", "bfloat16") == "eager"
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert resolve_attention("auto", "cuda:1", "bfloat16") == "sdpa"
    assert "pip install flash-attn" in caplog.messages[-1]
    monkeypatch.setitem(sys.modules, "flash_attn", sys)
    assert resolve_attention("auto", "cuda", "float32") == "sdpa"
    assert "dtype is float32" in caplog.messages[-1]
    assert resolve_attention("auto", torch.device("cuda", 0), "float16") == "flash_attention_2"
    assert resolve_attention("auto", "cuda", "float16", transformers.LlamaForCausalLM) == "flash_attention_2"
    assert resolve_attention("auto", "cuda", "float16", transformers.BloomForCausalLM) == "eager"
    assert "BloomForCausalLM does not support it" in caplog.messages[-1]
    tiny().save_pretrained(tmp_path)
    auto = {**LOAD, "attn_implementation": "auto"}
    assert load_model(tmp_path, **auto).config._attn_implementation == "sdpa"
    config = transformers.BloomConfig(vocab_size=101, hidden_size=32, n_layer=1, n_head=4)
    transformers.BloomForCausalLM(config).save_pretrained(tmp_path / "bloom")
    assert load_model(tmp_path / "bloom", **auto).config._attn_implementation == "eager"


def test_auto_attention_of_what_is_no_causal_language_model(tmp_path: Path) -> None:
    transformers.T5Config().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="model type 't5', of which transformers has no causal language model"):
        load_model(tmp_path, **{**LOAD, "attn_implementation": "auto"})


def test_end_tokens_are_those_of_tokenizer_template_and_generation_config(tmp_path: Path) -> None:
    tokenizer = make_tokenizer([("a b c", "1")] * 3, Recipe(seed=0))
    assert end_token_ids(tmp_path, tokenizer) == [tokenizer.eos_token_id]  # the file is optional
    transformers.GenerationConfig(eos_token_id=[7, tokenizer.eos_token_id]).save_pretrained(tmp_path)
    assert end_token_ids(tmp_path, tokenizer) == [tokenizer.eos_token_id, 7]
    # As <end_of_turn> in Gemma's template, where the tokenizer's own end-of-sequence token is another.
    tokenizer.chat_template = tokenizer.chat_template.replace("eos_token", "'<bos>'")
    assert end_token_ids(tmp_path, tokenizer) == [tokenizer.eos_token_id, tokenizer.bos_token_id, 7]
