"""LoRA: an adapter is trained, and the weights under it are not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tso_fast.config.settings import AdapterConfig
from tso_fast.errors import InputError
from tso_fast.models.load import ADAPTER_WEIGHTS, tensor_shapes
from tso_fast.seeds import seed_of
from tso_fast.training.shard import reshard, set_weight
from tso_fast.types import Weights


def add_adapter(model: Any, config: AdapterConfig, weights: Weights) -> Any:
    """A peft model of ``model`` whose adapter alone is trained, in float32: that of ``weights``, or a new one.

    The weights of the adapter are set by ``fill_adapter``.

    Raises:
        InputError: peft is not installed, or the model has no place for the adapter.
    """
    try:
        import peft
    except ImportError as error:
        raise InputError(f"peft: lora needs peft: {error}; pip install 'tso-fast[lora]'") from error
    if weights.path != weights.base:
        settings = peft.LoraConfig.from_pretrained(str(weights.path))
        settings.inference_mode = False
    else:
        settings = peft.LoraConfig(
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=config.lora_target_modules or "all-linear",
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            task_type="CAUSAL_LM",
        )
    model.name_or_path = str(Path(weights.base).resolve())  # what peft writes as the adapter's base
    try:
        return peft.get_peft_model(model, settings)
    except ValueError as error:
        raise InputError(f"lora_target_modules: {error}") from error


def adapter_weights(model: Any) -> dict[str, torch.nn.Parameter]:
    """The trained weights of a peft model by their names in an adapter's file; they may be sharded."""
    return {
        name.replace(".default", "", 1).replace("lora_magnitude_vector.weight", "lora_magnitude_vector"): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


@torch.no_grad()
def fill_adapter(model: Any, weights: Weights, seed: int) -> None:
    """Sets an adapter to that of ``weights``, or to what adds nothing: A random by name and seed, B zero.

    Raises:
        InputError: the file has other weights than the adapter.
    """
    if weights.path != weights.base:
        _read_adapter(model, weights.path)
        return
    for name, parameter in adapter_weights(model).items():
        if ".lora_A." in name:  # as peft draws it, but alike however the weights are shared out
            generator = torch.Generator().manual_seed(seed_of(seed, name))
            bound = 1 / math.sqrt(parameter.shape[1])
            set_weight(parameter, torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
        elif ".lora_B." in name:
            set_weight(parameter, torch.zeros(parameter.shape))


def _read_adapter(model: Any, path: Path) -> None:
    read = load_file(path / ADAPTER_WEIGHTS)
    wanted = adapter_weights(model)
    if differing := read.keys() ^ wanted.keys():
        raise InputError(
            f"{path}: {len(differing)} weights of the adapter and of the model that is trained do not match, such as "
            f"{min(differing)}"
        )
    for name, parameter in wanted.items():
        set_weight(parameter, read[name])


def takes_adapter(model: Any, weights: Weights) -> bool:
    """Whether a peft model has the base of ``weights`` and an adapter of the same shapes, or these are its base's."""
    if Path(weights.base).resolve() != Path(model.peft_config["default"].base_model_name_or_path):
        return False
    if weights.path == weights.base:
        return True
    own = {name: tuple(value.shape) for name, value in adapter_weights(model).items()}
    return tensor_shapes(Path(weights.path) / ADAPTER_WEIGHTS) == own


@contextmanager
def another_adapter(model: Any, weights: Weights) -> Iterator[None]:
    """A context in which a model has the adapter of ``weights``, or none if these are full weights.

    The adapter that is trained is put back at the end. There is never a second model.
    """
    if weights.path == weights.base:
        with model.disable_adapter():
            yield
        reshard(model)
        return
    kept = {name: parameter.detach().clone() for name, parameter in adapter_weights(model).items()}
    with torch.no_grad():
        _read_adapter(model, weights.path)
    try:
        yield
    finally:
        reshard(model)
        with torch.no_grad():
            for name, parameter in adapter_weights(model).items():
                parameter.copy_(kept[name])
