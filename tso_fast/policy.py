"""Models on disk and in memory: loading, saving, and the hidden states that enter the output head."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tso_fast.batching import end_of_turn
from tso_fast.errors import InputError
from tso_fast.logprob import linear_logprobs, preference_loss
from tso_fast.types import PairBatch

logger = logging.getLogger(__name__)

transformers.utils.logging.disable_progress_bar()  # stages show their own


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Raises InputError when the folder has no usable tokenizer."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise InputError(f"{path}: no tokenizer can be loaded from here: {error}") from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"{path}: the tokenizer has no eos_token; responses could not end. Set it in "
                         "tokenizer_config.json")  # fmt: skip
    return tokenizer


def load_model(
    path: str | Path,
    *,
    dtype: str,
    attn_implementation: str,
    device: torch.device | str,
    base: str | Path | None = None,
    merge: bool = False,
) -> PreTrainedModel:
    """A causal language model from a local folder of safetensors, on ``device``.

    Args:
        path: folder of the weights, or of a LoRA adapter for those in ``base``.
        attn_implementation: transformers' name of it, or ``auto``, see ``resolve_attention``.
        base: folder of the full weights; None or ``path``: ``path`` is no adapter.
        merge: add the adapter to the weights, which leaves a plain model; the sum is rounded to ``dtype``, so where
            only the results count the adapter's layers stay apart.

    Raises:
        InputError: no model there, or one that cannot be loaded, or weights that are not all there or do not fit.
    """
    full = path if base is None else base
    attention = attn_implementation
    if attention == "auto":
        attention = resolve_attention(attention, device, dtype, model_class_of(full))
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            str(full),
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:
        raise InputError(f"{full}: no causal language model can be loaded from here: {error}") from error
    if missing := sorted(loading["missing_keys"]):  # transformers would go on with random ones
        raise InputError(f"{full}: {len(missing)} of the model's weights are not in its safetensors files, such as "
                         f"{missing[0]}; expected all of them")  # fmt: skip
    model = model.to(device)
    if Path(full) != Path(path):
        model = _add_adapter(model, Path(path), merge)
        model.name_or_path = str(path)
    return model


def _add_adapter(model: PreTrainedModel, path: Path, merge: bool) -> PreTrainedModel:
    try:
        import peft
    except ImportError as error:
        raise InputError(f"{path}: a LoRA adapter needs peft: {error}; pip install 'tso-fast[lora]'") from error
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (path / name).is_file():  # peft would look for a pickle, then on the hub
            raise InputError(f"{path}: no {name} here; expected a LoRA adapter as peft saves it, in safetensors")
    try:
        config = peft.PeftConfig.from_pretrained(str(path))
        if config.peft_type != "LORA":
            raise ValueError(f"it is of the type {config.peft_type}, expected LORA")
        config.inference_mode = True
        adapted = peft.PeftModel(model, config)
        loading = adapted.load_adapter(str(path), "default", torch_device=str(model.device))
    except Exception as error:
        raise InputError(f"{path}: the LoRA adapter cannot be put on {model.name_or_path}: {error}") from error
    # peft passes over both.
    for what, keys in (("are not in adapter_model.safetensors", loading.missing_keys),
                       ("have no place in the model", loading.unexpected_keys)):  # fmt: skip
        if keys:
            raise InputError(f"{path}: {len(keys)} weights of the LoRA adapter {what}, such as {sorted(keys)[0]}; "
                             f"expected an adapter of {model.name_or_path} with all of its weights")  # fmt: skip
    if merge:
        try:
            # peft froze the weights.
            return adapted.merge_and_unload(safe_merge=True).requires_grad_(True)
        except ValueError as error:  # not finite
            raise InputError(f"{path}: the LoRA adapter cannot be merged into {model.name_or_path}: {error}") from error
    model = adapted.base_model.model
    head = model.get_output_embeddings()
    if isinstance(head, peft.utils.ModulesToSaveWrapper):  # a head that was trained whole is just another Linear
        model.set_output_embeddings(head.modules_to_save["default"])
    return model


def resolve_attention(
    name: str, device: torch.device | str, dtype: str, model_class: type[PreTrainedModel] | None = None
) -> str:
    """What ``auto`` stands for: flash_attention_2 where it can run, else sdpa, else eager; other names as they are."""
    if name != "auto":
        return name
    device = torch.device(device).type
    if model_class is None or model_class._supports_flash_attn:
        obstacle = _flash_obstacle(device, dtype)
    else:
        obstacle = f"{model_class.__name__} does not support it"
    has_sdpa = model_class is None or model_class._supports_sdpa
    chosen = ("sdpa" if has_sdpa else "eager") if obstacle else "flash_attention_2"
    _log_attention(device, dtype, chosen, f"; no flash_attention_2: {obstacle}" if obstacle else "")
    return chosen


def _flash_obstacle(device: str, dtype: str) -> str:
    if device != "cuda":
        return f"it needs a GPU, the model is on {device}"
    if dtype not in ("float16", "bfloat16"):
        return f"it needs float16 or bfloat16, dtype is {dtype}"
    try:
        importlib.import_module("flash_attn")
    except Exception as error:  # of a build for another torch: undefined symbols
        return f"{error}; pip install flash-attn"
    return ""


@functools.cache
def _log_attention(device: str, dtype: str, chosen: str, reason: str) -> None:
    logger.info("attn_implementation='auto' chose %r for %s on %s%s", chosen, dtype, device, reason)


def model_class_of(path: str | Path) -> type[PreTrainedModel]:
    """The class of the causal language model in a folder."""
    config = load_config(path)
    try:
        return AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError as error:
        raise InputError(f"{path}: config.json names the model type {config.model_type!r}, of which transformers has "
                         "no causal language model") from error  # fmt: skip


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Of every tensor in a safetensors file, from its header; raises whatever safetensors does of a damaged one."""
    with safe_open(file, "pt") as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


def load_config(path: str | Path) -> Any:
    try:
        return AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise InputError(f"{path}: config.json cannot be read: {error}") from error


def end_token_ids(path: str | Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a response of this model: the tokenizer's, its chat template's, its generation config's."""
    try:
        configured = GenerationConfig.from_pretrained(str(path), local_files_only=True).eos_token_id
    except OSError:  # the file is optional
        configured = None
    listed = configured if isinstance(configured, list) else [configured]
    ids = dict.fromkeys([tokenizer.eos_token_id, end_of_turn(tokenizer), *listed])
    return [i for i in ids if i is not None]


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def device_of(use_cpu: bool) -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() and not use_cpu else "cpu")


def release(model: nn.Module) -> None:
    """Gives back the memory of a model that is not used again.

    Models hold themselves in cycles, and a collection takes a quarter of a second with these libraries loaded; their
    weights are let go of here and now.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.new_empty(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def free_gpu_memory() -> None:
    """Gives what was let go of back to other processes."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


class Policy(nn.Module):
    """A language model whose forward pass is a preference loss.

    The loss is computed inside ``forward``, so that wrappers which gather weights there (DDP, FSDP) also gather
    the output head. Logits are not computed by the model: its head only hands over what enters it.

    Raises:
        InputError: the model does something between head and logits that the op does not know.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model: Any = model
        config = model.config.get_text_config()
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        # Granite divides its logits, Cohere multiplies them.
        divisor, factor = getattr(config, "logits_scaling", None), getattr(config, "logit_scale", None)
        self.temperature = float(divisor or 1.0) / float(factor or 1.0)
        self._check_head()

    @property
    def head(self) -> Any:
        return self.model.get_output_embeddings()

    def hidden(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """What enters the output head, [S, L, D]."""
        with _capture_head_input(self.head) as captured:
            self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return captured[0]

    def logprobs(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, targets: torch.Tensor, *, impl: str
    ) -> torch.Tensor:
        """Log-probs of the targets, [S, L] nats, 0 where they are ignored."""
        hidden = self.hidden(input_ids, attention_mask)
        return linear_logprobs(hidden, self.head.weight, targets, impl=impl, **self._head_options())

    def forward(self, batch: PairBatch, *, impl: str, loss: str | None = None, **options: Any) -> Any:
        """The loss of a batch as ``PreferenceOutput``, or, without a ``loss``, its sums of log-probs, [S] nats."""
        if loss is None:
            logprobs = self.logprobs(batch.input_ids, batch.attention_mask, batch.targets, impl=impl)
            # As preference_loss sums them: where policy and reference are the same, so are their sums.
            return logprobs.sum(dim=1, dtype=torch.float64).to(logprobs.dtype)
        return preference_loss(
            self.hidden(batch.input_ids, batch.attention_mask),
            self.head.weight,
            batch.targets,
            loss=loss,
            ref_logprobs=batch.ref_logprobs,
            scale=batch.scale,
            soft_label=batch.soft_label,
            margin=batch.margin,
            impl=impl,
            **self._head_options(),
            **options,
        )

    def _head_options(self) -> dict[str, Any]:
        return {"bias": self.head.bias, "softcap": self.softcap, "temperature": self.temperature}

    @torch.no_grad()
    def _check_head(self) -> None:
        name = type(self.model).__name__
        if not isinstance(self.head, nn.Linear):
            raise InputError(f"{name}: its output head is {type(self.head).__name__}, expected a Linear")
        ids = torch.tensor([[1, 2, 3]], device=self.model.device) % self.head.weight.shape[0]
        was_training = self.model.training
        self.model.eval()
        logits = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float()
        ours = self.head(self.hidden(ids, torch.ones_like(ids))).float()
        self.model.train(was_training)
        if self.softcap is not None:
            ours = self.softcap * torch.tanh(ours / self.softcap)
        ours = ours / self.temperature
        # Against the largest logit: those of untrained weights are all near 0. The model rounds to its dtype, twice.
        error, largest = float((ours - logits).abs().max()), float(logits.abs().max())
        if not error <= max(1e-4, 4 * torch.finfo(self.head.weight.dtype).eps) * largest:
            raise InputError(f"{name}: its logits, of up to {largest:.3g}, differ from head(hidden) by {error:.3g}; "
                             "this architecture changes its logits in a way that is not supported")  # fmt: skip


@contextlib.contextmanager
def _capture_head_input(head: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Within, the head keeps its input and returns one column, so that no full logits exist."""
    captured: list[torch.Tensor] = []

    def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        captured.append(hidden)
        return hidden[..., :1]

    head.forward = forward
    try:
        yield captured
    finally:
        del head.forward


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout probability to 0, those that modules pass to functions included."""
    module: Any
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or name == "layerdrop"):
                setattr(module, name, 0.0)
