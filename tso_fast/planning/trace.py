"""What a training step allocates, from shapes alone: the model's own code runs on tensors that have no memory.

A few layers are traced and the others counted like them, so that a model of 80 layers takes no longer than one of 3.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoModelForCausalLM

from tso_fast.config.settings import OptimizationConfig
from tso_fast.errors import InputError
from tso_fast.models.layout import Layout, padded, shared
from tso_fast.models.policy import Policy, disable_dropout
from tso_fast.training.adapters import add_adapter
from tso_fast.types import Weights

TRACED = 3
"""Layers that are traced of a model whose layers are alike: the first, one like all others, the last."""


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """Most bytes that are live at once beside the weights, in each part of a step."""

    forward: int
    """In the forward pass with the loss, whose op computes the head's gradient."""
    last: int = 0
    """From there to the gradient that leaves the last layer."""
    middle: int = 0
    """The same of a layer in the middle; the least of them does not matter, since what is held changes evenly."""
    first: int = 0
    """The same of the first layer, and of the embeddings."""
    kept: int = 0
    """Of ``forward``: what is kept for the backward pass."""
    op: int = 0
    """Of ``forward``: what the op takes while it runs, its exponentials above all."""

    @property
    def peak(self) -> int:
        return max(self.forward, self.last, self.middle, self.first)


class Allocations(TorchDispatchMode):
    """A context that counts the bytes which tensors made in it hold, and the most at once.

    Args:
        before: tensors that do not count.
    """

    def __init__(self, before: Sequence[torch.Tensor] = ()) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}
        self.live = self.most = 0
        for tensor in before:
            self._sizes[tensor.untyped_storage()._cdata] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = _grouped_mm(*args, **kwargs) if func is _GROUPED_MM else func(*args, **kwargs)
        for value in tree_iter(out):
            if isinstance(value, torch.Tensor):
                self._hold(value.untyped_storage())
        return out

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.live += self._sizes[key]
        self.most = max(self.most, self.live)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self._sizes.pop(key)

    def most_since(self) -> int:
        """The most bytes at once since this was last asked."""
        most, self.most = self.most, self.live
        return most


_GROUPED_MM = torch.ops.aten._grouped_mm.default


def _grouped_mm(first: torch.Tensor, second: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The product of a mixture of experts; without memory torch knows it in bfloat16 only."""
    return _GROUPED_MM(first.bfloat16(), second.bfloat16(), *args, **kwargs).to(first.dtype)


# ------------------------------------------------------------------------------------------------------------- models


def empty(config: Any, *, dtype: torch.dtype, attention: str = "sdpa") -> Any:
    """A model without memory for its weights, of a transformers configuration."""
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
        )
    model.tie_weights()
    return model


def with_adapter(model: Any, settings: OptimizationConfig, weights: Weights) -> Any:
    """The same with the adapter that is trained, as its settings, or those in its folder, say."""
    with init_empty_weights():
        return add_adapter(model, settings, weights)


def number_of_layers(config: Any) -> int:
    """Layers of a model, 0 if its configuration does not say."""
    return getattr(config.get_text_config(), "num_hidden_layers", 0)


def layers_of(model: Any) -> list[nn.Module]:
    """The layers of a model: the longest list of modules as long as its configuration says."""
    count = number_of_layers(model.config)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    return []


def are_alike(layers: Sequence[nn.Module]) -> bool:
    """Whether all layers have weights of the same names and shapes."""
    shapes = [[(name, tuple(p.shape)) for name, p in layer.named_parameters()] for layer in layers]
    return all(other == shapes[0] for other in shapes)


def shortened(config: Any, num_layers: int) -> Any:
    """A configuration with fewer layers, and positions that do not depend on the values of a batch."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    before = text.num_hidden_layers
    text.num_hidden_layers = num_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == before:
            setattr(text, name, value[:num_layers])
    rope = getattr(text, "rope_parameters", None)
    if isinstance(rope, dict) and rope.get("rope_type") in ("dynamic", "longrope"):
        text.rope_parameters = {"rope_type": "default", "rope_theta": rope.get("rope_theta", 1e4)}
    return config


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A batch of pairs as its rows and lengths."""

    pairs: int
    per_prompt: int
    """Pairs that have a prompt in common."""
    prompt: int
    """Tokens of a prompt."""
    response: int
    """Tokens of a response."""

    def sequences(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Sequences of these lengths, all different."""
        prompts = [((i // self.per_prompt) + 1, *[0] * (self.prompt - 1)) for i in range(self.pairs)]
        return [(prompts[i // 2], ((i + 1), *[0] * (self.response - 1))) for i in range(2 * self.pairs)]

    def layout(self, is_shared: bool) -> Layout:
        """The layout of the batch. A padded one has its mask written out too, as models do where there is padding."""
        if is_shared:
            return shared(self.sequences(), 0)
        layout = padded(self.sequences(), 0)
        rows, length = layout.input_ids.shape
        return dataclasses.replace(
            layout,
            position_ids=torch.arange(length).expand(rows, length),
            groups=torch.arange(rows)[:, None].expand(rows, length),
            branches=torch.zeros_like(layout.input_ids),
        )

    @functools.lru_cache(maxsize=64)  # noqa: B019 - a few numbers each
    def tensors(self, is_shared: bool) -> list[tuple[str, torch.Size, torch.dtype]]:
        """Name, shape and dtype of the tensors of the layout."""
        made = vars(self.layout(is_shared)).items()
        return [(name, value.shape, value.dtype) for name, value in made if value is not None]


@dataclass(frozen=True, kw_only=True)
class Traced:
    """A step to be traced."""

    model_config: Any
    settings: OptimizationConfig
    weights: Weights
    """Folders; of an adapter its settings are read, nothing else."""
    dtype: torch.dtype
    """Of the weights that are computed with."""
    attention: str
    sizes: Sizes
    is_shared: bool
    op_bytes: Callable[[tuple[int, int], bool], int]
    """What the op takes beside its inputs and their gradients, of the head's [V, D] and of whether it is trained."""
    num_more: int = 0
    """Layers that are not traced but like the last one."""
    is_autocast: bool = False
    is_sharded: bool = False
    """Gradients are given away as soon as they are there."""
    has_gradients: bool = False
    """There are gradients already, of batches before this one of the same step."""
    needs_gradients: bool = True
    """Else the batch is only scored, without an op that keeps anything."""


def trace(step: Traced) -> Peaks:
    """The peaks of a step.

    Raises:
        InputError: the model's code wants to know what is in its tensors.
    """
    try:
        return _trace(step)
    except (NotImplementedError, RuntimeError) as error:
        raise InputError(
            f"{step.weights.base}: what a {step.model_config.model_type} allocates cannot be told from shapes: "
            f"{str(error).splitlines()[0]}"
        ) from error


def _trace(step: Traced) -> Peaks:
    model = empty(step.model_config, dtype=step.dtype, attention=step.attention)
    if step.settings.peft == "lora":
        model = with_adapter(model, step.settings, step.weights)
        if step.is_sharded:
            model = model.to(step.dtype)
    policy = Policy(model, is_checked=False)
    if step.settings.disable_dropout:
        disable_dropout(policy)
    if step.settings.gradient_checkpointing and step.needs_gradients:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    policy.train(step.needs_gradients)
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # errors are told as such
    fake = FakeTensorMode()
    with fake:
        policy._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device="cpu"))
        layout = Layout(**{n: torch.empty(shape, dtype=t) for n, shape, t in step.sizes.tensors(step.is_shared)})
    head = policy.head.weight
    room = step.op_bytes(tuple(head.shape), head.requires_grad)
    before = [*policy.parameters(), *policy.buffers()]
    with fake, Allocations(before) as seen:
        return _Pass(step, policy, layout, room, seen).peaks()


@dataclass
class _Pass:
    """A forward pass, and a backward pass, over the traced layers."""

    step: Traced
    policy: Policy
    layout: Layout
    room: int
    """Bytes that the op takes."""
    seen: Allocations
    ends: list[int] = field(default_factory=list)
    """Live bytes at the end of each layer's forward pass."""
    marks: list[int] = field(default_factory=list)
    """Peaks of the parts of the backward pass, the last layer's first."""

    def peaks(self) -> Peaks:
        """The peaks of both passes over all layers, traced or not."""
        step, layers = self.step, layers_of(self.policy.model)
        loss, forward, kept = self._forward(layers)
        passed = step.num_more * (self.ends[-1] - self.ends[-2]) if len(self.ends) > 1 else 0
        if not step.needs_gradients:
            return Peaks(forward=forward + passed, kept=kept + passed, op=self.room)
        saved = passed - step.num_more * self._cast(layers)
        loss.backward()
        self.marks.append(self.seen.most_since())
        gradients = 0 if step.is_sharded or not layers else step.num_more * _size_of(layers[-1])
        before, new = (gradients, 0) if step.has_gradients else (0, gradients)
        # What is saved shrinks and gradients grow layer by layer, so that one of the ends has the most.
        return Peaks(
            forward=forward + passed + before,
            last=max(self.marks[:2]) + saved + before,
            middle=max(self.marks[2:-1], default=0) + max(saved, new) + before,
            first=self.marks[-1] + new + before,
            kept=kept + passed,
            op=self.room,
        )

    def _cast(self, layers: Sequence[nn.Module]) -> int:
        """Bytes of a layer's weights that autocast keeps in bfloat16 to the end of the forward pass, and then nobody: a
        layer that is computed again casts them again."""
        if not (self.step.is_autocast and self.step.settings.gradient_checkpointing and layers):
            return 0
        return sum(2 * p.numel() for p in layers[-1].parameters() if p.requires_grad and p.dim() > 1)

    def _forward(self, layers: Sequence[nn.Module]) -> tuple[torch.Tensor, int, int]:
        """The loss, the peak on the way to it, and what is kept of it; after that, gradients are watched."""
        step, seen = self.step, self.seen
        hooks = [layer.register_forward_hook(self._after_layer) for layer in layers]
        trained = [p for p in self.policy.parameters() if p.requires_grad]
        if step.has_gradients and step.needs_gradients and not step.is_sharded:
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
        for parameter in trained if step.is_sharded else ():
            parameter.register_post_accumulate_grad_hook(_forget)
        before = seen.live
        with (
            torch.set_grad_enabled(step.needs_gradients),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=step.is_autocast),
        ):
            hidden, weight = self.policy.hidden_of(self.layout), self.policy.head.weight
            kept = seen.live - before
            if step.is_autocast:
                hidden, weight = hidden.bfloat16(), weight.bfloat16()
            loss: torch.Tensor = _Op.apply(hidden, weight, self.room)
        for hook in hooks:  # checkpointing comes by again
            hook.remove()
        return loss, seen.most_since(), kept

    def _after_layer(self, module: nn.Module, args: Any, out: Any) -> None:
        self.ends.append(self.seen.live)
        hidden = out[0] if isinstance(out, tuple) else out
        if hidden.requires_grad:
            hidden.register_hook(self._mark)

    def _mark(self, gradient: torch.Tensor) -> None:
        self.marks.append(self.seen.most_since())


def _forget(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _size_of(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)


class _Op(torch.autograd.Function):
    """A preference loss as far as memory goes: gradients are computed in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, num_bytes: int) -> torch.Tensor:
        needed = zip((hidden, weight), ctx.needs_input_grad, strict=False)
        made = [torch.empty_like(tensor) if is_needed else None for tensor, is_needed in needed]
        room = torch.empty(num_bytes, dtype=torch.uint8)
        ctx.save_for_backward(*made)
        del room
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return (*ctx.saved_tensors, None)
