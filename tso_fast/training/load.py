"""The model that is trained: loaded, given an adapter, sharded; and saved again as one folder."""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator

from tso_fast.config.settings import ModelConfig, OptimizationConfig
from tso_fast.errors import InputError
from tso_fast.files.atomic import atomic_folder
from tso_fast.models.load import load_model
from tso_fast.models.policy import Policy, blocks_of
from tso_fast.training.adapters import add_adapter, fill_adapter
from tso_fast.training.shard import empty_model, fill, is_sharded, make_mesh, reshard, shard_policy, whole_weights
from tso_fast.types import Weights

logger = logging.getLogger(__name__)

BACKEND = "inductor"
"""Of ``torch.compile``."""


def load_policy(
    config: OptimizationConfig, weights: Weights, accelerator: Accelerator, *, has_adapter: bool = False
) -> Policy:
    """A policy on this process's device, sharded if the configuration says so.

    Args:
        has_adapter: train an adapter. Otherwise one that is there is merged, so that policy and reference start as the
            same model.
    """
    device = accelerator.device
    mesh = make_mesh(config.shard, device.type, accelerator.num_processes, _per_node(accelerator))
    if mesh is None:
        whole = Weights(weights.base, weights.base) if has_adapter else weights
        model = load_whole(config, whole, device, in_4bit=has_adapter and config.load_in_4bit)
        if has_adapter:
            model = add_adapter(model, config, weights)
            fill_adapter(model, weights, config.seed)
        policy = Policy(model)
        compile_blocks(policy, config)
    else:
        model = empty_model(weights, dtype=config.dtype, attn_implementation=config.attn_implementation, device=device)
        if has_adapter:
            model = add_adapter(model, config, weights)
        policy = Policy(model, is_checked=False)
        compile_blocks(policy, config)
        shard_policy(policy, mesh, bf16=config.bf16 or config.dtype == "bfloat16")
        fill(policy, weights, device, merge=not has_adapter)
        if has_adapter:
            fill_adapter(model, weights, config.seed)
        policy.check_head()
    share_prompts(balance_experts(policy, config.router_aux_loss_coef), config.share_prompt)
    pack_rows(policy)
    reshard(policy)
    return policy


def compile_blocks(policy: Policy, config: OptimizationConfig) -> None:
    """Compiles each block of the policy for any lengths, if the configuration says so: once, as all are alike.

    Before sharding, whose gathering stays outside, and inside of what checkpointing computes again.
    """
    if not config.torch_compile:
        return
    blocks = blocks_of(policy.model)
    if not blocks:
        name = type(policy.model).__name__
        raise InputError(f"torch_compile: {name} does not name its blocks (_no_split_modules); set it to false")
    for block in blocks:
        block.compile(dynamic=True, backend=BACKEND)


def balance_experts(policy: Policy, coefficient: float | None) -> Policy:
    """The policy, told the weight of a mixture's auxiliary loss; None: what its configuration says, if it says any."""
    own = getattr(policy.model.config.get_text_config(), "router_aux_loss_coef", None)
    if coefficient and own is None:
        name = type(policy.model).__name__
        raise InputError(f"router_aux_loss_coef: {name} is no mixture of experts with such a loss; leave it out")
    policy.aux_weight = float((own if coefficient is None else coefficient) or 0.0)
    return policy


def share_prompts(policy: Policy, wanted: bool | Literal["auto"]) -> Policy:
    """The policy, told whether to compute a prompt once for all of its responses."""
    if wanted is False:
        return policy
    obstacle = "the experts' auxiliary loss counts padded rows" if policy.aux_weight else policy.obstacle_to_sharing()
    name = type(policy.model).__name__
    if obstacle and wanted is True:
        raise InputError(f"share_prompt: {name} cannot share prompts: {obstacle}; set share_prompt to auto or false")
    policy.shares_prompts = not obstacle
    how = f"off, {obstacle}" if obstacle else "on: a prompt is computed once for all of its responses"
    _tell_once(f"share_prompt for {name}: {how}")
    return policy


def pack_rows(policy: Policy) -> None:
    """Tells a policy to compute rows without their padding, where attention finds its sequences by itself."""
    model = policy.model
    if policy.shares_prompts or model.config.get_text_config()._attn_implementation != "flash_attention_2":
        return
    obstacle = "the experts' auxiliary loss counts padded rows" if policy.aux_weight else policy.obstacle_to_packing()
    policy.packs_rows = not obstacle
    _tell_once(f"padding of {type(model).__name__}: {f'computed, {obstacle}' if obstacle else 'left out'}")


@functools.cache
def _tell_once(message: str) -> None:
    logger.info(message)


def _per_node(accelerator: Accelerator) -> int:
    """Processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))


def load_whole(config: ModelConfig, weights: Weights, device: torch.device | str, *, in_4bit: bool = False) -> Any:
    """A whole model on one device; an adapter is merged."""
    return load_model(
        weights.path,
        base=weights.base,
        merge=True,
        dtype=config.dtype,
        attn_implementation=config.attn_implementation,
        device=device,
        in_4bit=in_4bit,
    )


def save_policy(policy: Policy, tokenizer: Any, folder: Path, accelerator: Accelerator) -> None:
    """Writes a policy as a Hugging Face folder, or its adapter as peft's; all processes take part, the first writes."""
    model = policy.model
    has_adapter = hasattr(model, "peft_config")
    state = whole_weights(model, only_trained=has_adapter) if is_sharded(policy) else None
    if accelerator.is_main_process:
        with atomic_folder(folder) as tmp:
            options = {"save_embedding_layers": False} if has_adapter else {}
            model.save_pretrained(tmp, state_dict=state, **options)
            (tmp / "README.md").unlink(missing_ok=True)  # peft's model card, to be filled in
            tokenizer.save_pretrained(tmp)
