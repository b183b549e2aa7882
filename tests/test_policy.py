"""Policy on tiny models of several architectures: what enters the head, loading and saving, dropout, checkpointing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from tso_fast.batching import EncodedPair, collate
from tso_fast.errors import InputError
from tso_fast.policy import Policy, device_of, disable_dropout, load_config, load_model, load_tokenizer, save_model
from tso_fast.quickstart.build import Recipe, make_tokenizer

VOCAB = 101
SHAPE = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
         "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1,
        "eos_token_id": 2}  # fmt: skip
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
        EncodedPair(prompt=(5, 6, 7), chosen=(8, 9, 2), rejected=(10, 2), scale=1.0, soft_label=1.0, margin=0.0,
                    prompt_id="a"),
        EncodedPair(prompt=(11,), chosen=(12, 2), rejected=(13, 14, 15, 16, 17, 2), scale=0.5, soft_label=0.8,
                    margin=0.1, prompt_id="b"),
    ]  # fmt: skip
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
    hidden = policy.hidden(batch.input_ids, batch.attention_mask)
    assert hidden.shape == (4, batch.input_ids.shape[1], 32)
    logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits
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


def test_forward_is_the_loss_with_the_scalars_of_the_batch() -> None:
    policy = Policy(tiny())
    pairs, batch = pair_batch()
    sums = policy(batch, impl="auto").detach()
    reference = (sums + torch.tensor([-1.0, 2.0, 1.0, -2.0])).reshape(2, 2).T
    batch = collate(pairs, [0, 1], pad_token_id=0, device=torch.device("cpu"), ref_logprobs=reference)
    out = policy(batch, impl="auto", loss="dpo", beta=0.5)
    torch.testing.assert_close(out.logprobs, sums)
    # Log-ratios: chosen 1, -2; rejected -1, 2; so z = 1 and -2 - 0.1.
    losses = [torch.nn.functional.softplus(torch.tensor(-1.0)),
              0.8 * torch.nn.functional.softplus(torch.tensor(2.1))
              + 0.2 * torch.nn.functional.softplus(torch.tensor(-2.1))]  # fmt: skip
    torch.testing.assert_close(out.loss, (losses[0] + 0.5 * losses[1]) / 1.5)


def test_in_bf16_and_under_autocast_the_reference_cancels() -> None:
    pairs, batch = pair_batch()
    # Under autocast what enters the head is float32 in most models, and bf16 where a projection precedes it.
    for model, dtype in ((tiny().bfloat16(), None), (tiny(), torch.bfloat16), (tiny("opt-projected"), torch.bfloat16)):
        policy = Policy(model)
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            sums = policy(batch, impl="auto").detach()
            again = collate(pairs, [0, 1], pad_token_id=0, device=torch.device("cpu"),
                            ref_logprobs=sums.reshape(2, 2).T)  # fmt: skip
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
    "opt": ("OPTConfig", {"vocab_size": VOCAB, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3,
                          "num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 32,
                          "dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5, "pad_token_id": 0}),
    "bloom": ("BloomConfig", {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4,
                              "hidden_dropout": 0.5, "attention_dropout": 0.5}),
}  # fmt: skip


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
    for load in (load_tokenizer, load_config, lambda path: load_model(path, **LOAD)):
        with pytest.raises(InputError, match="nowhere"):
            load(tmp_path / "nowhere")
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
