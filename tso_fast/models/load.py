"""Models on disk: loading, adapters, attention and saving."""

from __future__ import annotations

import functools
import importlib.util
import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tso_fast.errors import InputError
from tso_fast.models.tokens import end_of_turn

logger = logging.getLogger(__name__)

transformers.utils.logging.disable_progress_bar()  # stages show their own progress

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Shapes = dict[str, tuple[int, ...]]


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Loads a tokenizer; raises InputError if the folder has no usable one."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise InputError(f"{path}: no tokenizer can be loaded from here: {error}") from error
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"{path}: the tokenizer has no eos_token; responses could not end. Set it in tokenizer_config.json"
        )
    return tokenizer


def load_model(
    path: str | Path,
    *,
    dtype: str,
    attn_implementation: str,
    device: torch.device | str,
    base: str | Path | None = None,
    merge: bool = False,
    in_4bit: bool = False,
) -> PreTrainedModel:
    """A causal language model from a local folder of safetensors, on ``device``.

    Args:
        path: folder of the weights, or of a LoRA adapter for the weights in ``base``.
        attn_implementation: transformers' name of an attention implementation, or ``auto``, see ``resolve_attention``.
        base: folder of the full weights; None or ``path``: ``path`` is not an adapter.
        merge: add the adapter to the weights, which gives a plain model but rounds the sum to ``dtype``.
        in_4bit: hold the linear layers, but not the head, in bitsandbytes' NF4.

    Raises:
        InputError: the folder has no model, or it cannot be loaded, or weights are missing or do not fit.
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
            **(_four_bits(dtype, device) if in_4bit else {}),
        )
    except Exception as error:
        raise InputError(f"{full}: no causal language model can be loaded from here: {error}") from error
    if missing := sorted(loading["missing_keys"]):  # transformers would fill them with random numbers
        raise InputError(
            f"{full}: {len(missing)} of the model's weights are not in its safetensors files, such as "
            f"{missing[0]}; expected all of them"
        )
    if in_4bit:
        for module in model.modules():  # else a pass without gradients repacks weights on CPUs, and rounds them again
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    else:
        model = model.to(device)
    if Path(full) != Path(path):
        model = _add_adapter(model, Path(path), merge)
        model.name_or_path = str(path)
    return model


def _four_bits(dtype: str, device: torch.device | str) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for QLoRA's weights (arXiv 2305.14314): NF4, its constants quantised again."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError("load_in_4bit: it needs bitsandbytes; pip install 'tso-fast[optim]'")
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
    return {"quantization_config": quantization, "device_map": {"": device}}


def _add_adapter(model: PreTrainedModel, path: Path, merge: bool) -> PreTrainedModel:
    try:
        import peft
    except ImportError as error:
        raise InputError(f"{path}: a LoRA adapter needs peft: {error}; pip install 'tso-fast[lora]'") from error
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (path / name).is_file():  # peft would try a pickle, then the hub
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
    # peft ignores both.
    for what, keys in (
        ("are not in adapter_model.safetensors", loading.missing_keys),
        ("have no place in the model", loading.unexpected_keys),
    ):
        if keys:
            raise InputError(
                f"{path}: {len(keys)} weights of the LoRA adapter {what}, such as {sorted(keys)[0]}; "
                f"expected an adapter of {model.name_or_path} with all of its weights"
            )
    if merge:
        try:
            # peft froze the weights.
            return adapted.merge_and_unload(safe_merge=True).requires_grad_(True)
        except ValueError as error:  # not finite
            raise InputError(f"{path}: the LoRA adapter cannot be merged into {model.name_or_path}: {error}") from error
    model = adapted.base_model.model
    head = model.get_output_embeddings()
    if isinstance(head, peft.utils.ModulesToSaveWrapper):  # a fully trained head is just another Linear
        model.set_output_embeddings(head.modules_to_save["default"])
    return model


def resolve_attention(
    name: str, device: torch.device | str, dtype: str, model_class: type[PreTrainedModel] | None = None
) -> str:
    """Resolves ``auto`` to flash_attention_2 if it can run, else sdpa, else eager; returns other names as given."""
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
    except Exception as error:  # such as undefined symbols in a build for another torch
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
        raise InputError(
            f"{path}: config.json names the model type {config.model_type!r}, of which transformers has "
            "no causal language model"
        ) from error


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a folder with full weights.

    Raises:
        InputError: the folder has no configuration or no safetensors weights.
    """
    weights = sorted(path.glob("*.safetensors"))
    if not (path / "config.json").is_file() or not weights:
        missing = "config.json" if weights else "*.safetensors weights"
        hint = "; it has pickled *.bin weights: save them with safe_serialization" if [*path.glob("*.bin")] else ""
        raise InputError(f"{path} has no {missing}; expected config.json and *.safetensors{hint}")
    return weights


def weight_shapes(path: Path) -> Shapes:
    """Shapes of all weights in a folder, from the headers of their files.

    Raises:
        InputError: the folder has no model, or a file is truncated or damaged.
    """
    return {name: shape for file in weight_files(path) for name, shape in tensor_shapes(file).items()}


def tensor_shapes(file: Path) -> Shapes:
    """Shape of every tensor in a safetensors file, from its header.

    Raises:
        InputError: the file is truncated or damaged.
    """
    try:
        return _tensor_shapes(file)
    except Exception as error:
        raise InputError(f"{file} is no readable safetensors file: {error}") from error


def _tensor_shapes(file: Path) -> Shapes:
    with safe_open(file, "pt") as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


def load_config(path: str | Path) -> Any:
    try:
        return AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise InputError(f"{path}: config.json cannot be read: {error}") from error


def end_token_ids(path: str | Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a response: those of the tokenizer, its chat template and the model's generation config."""
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
