"""Weights shared out over processes by torch's ``fully_shard``: of each weight a process keeps a part.

The layers of a model, its tail (the output head, with the embeddings where they are tied) and the rest are gathered one
group at a time, when they are used. Weights are read from disk part by part, so that no process ever holds all of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed.checkpoint as dcp
from accelerate import init_empty_weights
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM

from tso_fast.errors import InputError
from tso_fast.models.load import load_config, load_model, model_class_of, resolve_attention, weight_shapes
from tso_fast.models.policy import Policy, blocks_of
from tso_fast.types import Weights

Shard = Literal["none", "full", "hybrid"]


def make_mesh(shard: Shard, device_type: str, world: int, per_node: int) -> DeviceMesh | None:
    """The processes that share weights: all of them (``full``), or those of a node, with a replica on every node
    (``hybrid``); None: every process has all weights.

    Raises:
        InputError: the nodes of ``hybrid`` have different numbers of processes.
    """
    if shard == "none" or world == 1:
        return None
    if shard == "full":
        return init_device_mesh(device_type, (world,), mesh_dim_names=("shard",))
    if world % per_node:
        raise InputError(
            f"shard: hybrid wants as many processes on every node; got {world} in all and {per_node} on this one"
        )
    return init_device_mesh(device_type, (world // per_node, per_node), mesh_dim_names=("replicate", "shard"))


def empty_model(weights: Weights, *, dtype: str, attn_implementation: str, device: torch.device) -> Any:
    """The model of a folder with its buffers but without memory for its weights, to be sharded and then filled."""
    full = weights.base
    attention = resolve_attention(attn_implementation, device, dtype, model_class_of(full))
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(
            load_config(full), dtype=getattr(torch, dtype), attn_implementation=attention, trust_remote_code=False
        )
    model.tie_weights()
    model.name_or_path = str(full)
    return model


def shard_policy(policy: Policy, mesh: DeviceMesh, *, bf16: bool) -> None:
    """Shards a policy in place.

    Args:
        bf16: compute in bfloat16 and sum gradients in float32, whatever the dtype of the weights. Inputs are never
            cast: among them are reference log-probs, of which bfloat16 would keep less than a nat.

    Raises:
        InputError: the architecture does not say what its layers are.
    """
    model = policy.model
    blocks = blocks_of(model)
    if not blocks:
        raise InputError(
            f"shard: {type(model).__name__} does not name its layers (_no_split_modules) and cannot be sharded; use "
            "shard: none"
        )
    precision = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=precision)
    embeddings, tail = model.get_input_embeddings(), [policy.head]
    if embeddings.weight is policy.head.weight:
        tail = [embeddings, policy.head]
    else:  # apart, so that they are let go of until the backward pass
        fully_shard(embeddings, mesh=mesh, mp_policy=precision)
    # The loss uses the head's weight after the head was called, so that it must stay gathered.
    fully_shard(tail, mesh=mesh, mp_policy=precision, reshard_after_forward=False)
    fully_shard(policy, mesh=mesh, mp_policy=precision)
    for name in ("check_head", "obstacle_to_sharing", "obstacle_to_packing"):
        register_fsdp_forward_method(policy, name)


def fill(policy: Policy, weights: Weights, device: torch.device, *, merge: bool) -> None:
    """Gives memory to the weights of a sharded ``empty_model`` and reads them.

    Each process reads its parts of the files. Where the files do not hold the model's weights one to one, as of a
    mixture of experts, or an adapter is to be merged, the first process reads all and sends the parts.
    """
    policy._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    model = policy.model
    named = dict(model.named_parameters())
    in_files = weight_shapes(Path(weights.base))
    names = {key: _name_in_file(key) for key in named if ".lora_" not in key}
    is_plain = all(in_files.get(name) == tuple(named[key].shape) for key, name in names.items())
    is_merged = merge and weights.path != weights.base
    if is_plain and not is_merged:
        dcp.load(
            {name: named[key].detach() for key, name in names.items()},
            storage_reader=HuggingFaceStorageReader(str(weights.base)),
        )
        return
    whole: dict[str, torch.Tensor] = {}
    if torch.distributed.get_rank() == 0:
        dtype = str(next(iter(named.values())).dtype).removeprefix("torch.")
        base = load_model(
            weights.path if is_merged else weights.base,
            base=weights.base,
            merge=is_merged,
            dtype=dtype,
            attn_implementation="eager",
            device="cpu",
        )
        read = dict(base.named_parameters())
        whole = {key: read[name].detach() for key, name in names.items()}
    for key in names:  # in the same order everywhere
        _send(named[key], whole.get(key))


def _name_in_file(name: str) -> str:
    """A weight's name without what peft puts around it."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _send(target: torch.Tensor, whole: torch.Tensor | None) -> None:
    """The parts of a weight that the first process has, to those who keep them."""
    assert isinstance(target, DTensor)
    full = torch.empty(target.shape, dtype=target.dtype, device=target.device) if whole is None else whole
    full = full.to(target.device)
    torch.distributed.broadcast(full, src=0)
    set_weight(target, full)


@torch.no_grad()
def set_weight(target: torch.Tensor, value: torch.Tensor) -> None:
    """Copies a whole weight, which every process has, into one that may be sharded."""
    if isinstance(target, DTensor):
        value = distribute_tensor(value.to(target), target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(value)


def reshard(model: nn.Module) -> None:
    """Lets go of weights that a forward pass left gathered, so that the model's parameters are its parts again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local_part(value: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor that may be sharded."""
    return value.to_local() if isinstance(value, DTensor) else value


def whole_weights(model: nn.Module, *, only_trained: bool = False) -> dict[str, torch.Tensor]:
    """The state dict of a sharded model, gathered in main memory; empty on all processes but the first."""
    reshard(model)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=only_trained)
    state: dict[str, Any] = get_model_state_dict(model, options=options)
    once = dict(model.named_parameters())
    repeated = dict(model.named_parameters(remove_duplicate=False)).keys() - once.keys()  # tied weights
    return {name: value for name, value in state.items() if name not in repeated}


def is_sharded(module: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())
