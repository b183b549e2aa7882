"""The model matrix: cells by version and size, one of them the policy; it grows by one version per iteration."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from tso_fast.config.settings import CellConfig
from tso_fast.errors import InputError
from tso_fast.files.atomic import sha256_file
from tso_fast.files.rows import BadRows, prompt_row
from tso_fast.models.load import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    load_config,
    load_tokenizer,
    tensor_shapes,
    weight_files,
)
from tso_fast.models.tokens import encode_prompt, response_ids
from tso_fast.types import HUMAN, Candidates, Cell

# Configuration keys that do not change what a model or an adapter computes; hashes ignore them.
VOLATILE = frozenset(
    {
        "_name_or_path",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "use_cache",
        "base_model_name_or_path",
        "inference_mode",
        "revision",
        "peft_version",
        "auto_mapping",
    }
)


def open_cell(config: CellConfig, place: str = "cells") -> Cell:
    """Inspects the folder of a model or a LoRA adapter without loading it.

    The folder of a cell with its own ``url`` needs no weights, only configuration and tokenizer.

    Raises:
        InputError: the folder, its config or its safetensors weights are missing; an adapter's base is missing or its
            rank differs from its configuration; there are neither weights nor ``size_b``.
    """
    path = Path(config.path)
    if not os.path.isdir(path):
        raise InputError(
            f"{place}: path {config.path!r} is no folder; expected a local Hugging Face model or a LoRA adapter"
        )
    rank: int | None = None
    parts: list[str] = []
    if (path / ADAPTER_CONFIG).is_file():
        rank, parts, base = _open_adapter(path, config.base, place)
    elif config.base is not None:
        raise InputError(
            f"{place}: base {config.base!r} is given, but {path} holds no {ADAPTER_CONFIG}; leave it out "
            "or give an adapter's folder"
        )
    else:
        base = path
    name = config.name or os.path.basename(os.path.abspath(path))  # abspath, so that "." works too
    has_weights = config.url is None or rank is not None or any(path.glob("*.safetensors"))
    if has_weights:
        num_parameters, hashes = _open_weights(base, place)
    elif config.size_b is None:
        raise InputError(
            f"{place}: size_b is missing; {path} has no *.safetensors weights to count. A cell with a url "
            "needs none, but its size must be told"
        )
    else:
        num_parameters, hashes = 0, [f"served as {config.served_name or name}\n"]
    model_config = load_config(base)
    return Cell(
        name=name,
        path=path,
        base=base,
        size_b=num_parameters / 1e9 if config.size_b is None else config.size_b,
        version_rank=config.version_rank,
        weight_hash=hashlib.sha256("".join(hashes + parts).encode()).hexdigest()[:16],
        architecture=_hash_of(model_config.to_dict()),
        context=getattr(model_config.get_text_config(), "max_position_embeddings", None),
        lora_rank=rank,
        has_weights=has_weights,
    )


def require_weights(cell: Cell, what: str) -> None:
    """Raises InputError if only a server has the cell's weights."""
    if not cell.has_weights:
        raise InputError(
            f"{what}: cell {cell.name!r} has no weights in {cell.path}, only its server has; expected "
            "*.safetensors there, or another cell"
        )


def _hash_of(config: dict[str, Any]) -> str:
    kept = {key: value for key, value in config.items() if key not in VOLATILE}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _open_weights(path: Path, place: str) -> tuple[int, list[str]]:
    """Number of parameters, and one line per weight file for the hash."""
    with _named(place):
        weights = weight_files(path)
        num_parameters = sum(math.prod(shape) for file in weights for shape in tensor_shapes(file).values())
    return num_parameters, [_hash_line(file) for file in weights]


@contextlib.contextmanager
def _named(place: str) -> Iterator[None]:
    """Prefixes errors about a folder with the setting that names it."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{place}: {error}") from error


def _hash_line(file: Path) -> str:
    stat = file.stat()
    return f"{file.name} {_sha256(file, stat.st_size, stat.st_mtime_ns)}\n"


@functools.lru_cache(maxsize=1024)
def _sha256(file: Path, size: int, mtime_ns: int) -> str:
    """Cached, since all adapters of a base share its files."""
    return sha256_file(file)


def _open_adapter(path: Path, base: str | None, place: str) -> tuple[int, list[str], Path]:
    """Rank, lines for the hash, folder of the base model."""
    try:
        config = json.loads((path / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        kind, rank = config["peft_type"], config["r"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{place}: {path / ADAPTER_CONFIG} cannot be read: {error!r}; expected peft's") from error
    if kind != "LORA" or not isinstance(rank, int):
        raise InputError(f"{place}: {path} is an adapter of type {kind!r}; expected LORA")
    weights = path / ADAPTER_WEIGHTS
    if not weights.is_file():
        raise InputError(f"{place}: {path} has no {ADAPTER_WEIGHTS}; expected a LoRA adapter saved as safetensors")
    ranks = {rank, *(config.get("rank_pattern") or {}).values()}
    with _named(place):
        shapes = tensor_shapes(weights)
    for name, shape in shapes.items():
        side = 0 if ".lora_A." in name else 1 if ".lora_B." in name else None
        if side is not None and shape[side] not in ranks:
            raise InputError(
                f"{place}: {weights} has {name} of rank {shape[side]}, but {ADAPTER_CONFIG} says "
                f"r {rank}; the two files do not belong together"
            )
    named = base or config.get("base_model_name_or_path")
    if not named or not os.path.isdir(named):
        raise InputError(
            f"{place}: the base model of {path}, {named!r}, is no folder; set {place}.base to its local folder"
        )
    return max(ranks), [f"adapter {_hash_of(config)}\n", _hash_line(weights)], Path(named)


class ModelMatrix:
    """Cells that share a vocabulary, one of them the policy."""

    def __init__(
        self, configs: Sequence[CellConfig], policy: str | None = None, reserved: Collection[str] = ()
    ) -> None:
        if not configs:
            raise InputError("cells: got none, expected at least one {path: ...}")
        self.cells = [open_cell(config, f"cells[{i}]") for i, config in enumerate(configs)]
        names = [cell.name for cell in self.cells]
        self.configs = dict(zip(names, configs, strict=True))
        """Configuration by cell name; trained versions have none."""
        if repeated := {name for name in names if names.count(name) > 1}:
            raise InputError(f"cells: the name {min(repeated)!r} is given twice; set distinct names")
        for i, name in enumerate(names):
            if name == HUMAN or "/" in name or not name.strip() or not name.isprintable():
                raise InputError(
                    f"cells[{i}]: got a cell named {name!r}; expected printable text without '/' and not {HUMAN!r}"
                )
        if taken := set(names) & set(reserved):
            raise InputError(f"cells: the name {min(taken)!r} will be that of a trained version; set another name")
        if policy is not None and policy not in names:
            raise InputError(f"policy: got {policy!r}, expected one of the cells {', '.join(names)}")
        trainable = [cell for cell in self.cells if cell.has_weights] or self.cells
        newest = max(trainable, key=lambda cell: (cell.size_b, cell.version_rank))
        self.initial = self.policy = newest if policy is None else self.cells[names.index(policy)]
        self.tokenizer: Any = load_tokenizer(self.policy.base)
        self._check_vocabularies()
        self.trained: list[Cell] = []

    @property
    def context(self) -> int | None:
        return min((cell.context for cell in self.cells if cell.context is not None), default=None)

    @property
    def previous(self) -> Cell | None:
        """The newest of the cells that are older than the policy, of its size where there is one; None: there is none.

        Versions that left the matrix count too.
        """
        known = {cell.name: cell for cell in [*self.cells, self.initial, *self.trained]}.values()
        older = [cell for cell in known if cell.version_rank < self.policy.version_rank and cell.has_weights]
        return max(
            older, key=lambda cell: (cell.size_b == self.policy.size_b, cell.version_rank, cell.size_b), default=None
        )

    @property
    def named(self) -> dict[str, Cell]:
        """The cells by name, the current policy as ``policy``, and as ``previous`` the version before it, if there is
        one and no cell of that name.

        Raises:
            InputError: another cell is called ``policy``.
        """
        found = {cell.name: cell for cell in self.cells}
        if (previous := self.previous) is not None:
            found.setdefault("previous", previous)
        if found.get("policy", self.policy) is not self.policy:
            raise InputError(
                f"cells: got a cell named 'policy' ({found['policy'].path}), which is what judges call the current "
                "policy; set another name"
            )
        return {"policy": self.policy, **found}

    def _check_vocabularies(self) -> None:
        vocabulary = self.tokenizer.get_vocab()
        seen = {self.policy.base}
        for i, cell in enumerate(self.cells):
            where = f"cells[{i}]: {cell.base}"
            if cell.base not in seen and (other := load_tokenizer(cell.base).get_vocab()) != vocabulary:
                differing = {token for token, _ in other.items() ^ vocabulary.items()}
                raise InputError(
                    f"{where} has another vocabulary ({len(other)} tokens) than {self.policy.base} "
                    f"({len(vocabulary)} tokens); {len(differing)} differ, such as {min(differing)!r}. "
                    "All cells need the policy's tokenizer"
                )
            seen.add(cell.base)
            size = load_config(cell.base).get_text_config().vocab_size
            if size <= max(vocabulary.values()):
                raise InputError(
                    f"{where} has embeddings for {size} tokens, but the tokenizer has ids up to "
                    f"{max(vocabulary.values())}"
                )

    def add_version(self, path: Path, name: str, max_versions: int = 0) -> None:
        """Adds the trained policy as the newest version of its size; it becomes the policy."""
        rank = max(cell.version_rank for cell in self.cells) + 1
        config = CellConfig(path=str(path), name=name, size_b=self.initial.size_b, version_rank=rank)
        cell = open_cell(config)
        self.trained.append(cell)
        self.cells.append(cell)
        if max_versions and len(self.trained) > max_versions:
            self.cells.remove(self.trained[-1 - max_versions])
        self.policy = cell


def check_fits(
    candidates: Sequence[Candidates], tokenizer: Any, context: int | None, max_tokens: int, bad: BadRows
) -> list[Candidates]:
    """Candidates whose prompt, answers to be sampled and written answers fit the context; others are bad rows.

    Raises:
        InputError: no prompt can fit, or none does.
    """
    if context is not None and max_tokens >= context:
        raise InputError(
            f"max_completion_length: got {max_tokens}, but the context of {context} tokens holds the prompt too; "
            "expected less"
        )
    fitting = []
    for item in candidates:
        prompt = item.prompt
        try:
            length = len(encode_prompt(tokenizer, prompt))
            if context is not None and length + max_tokens > context:
                raise InputError(
                    f"{prompt.where or prompt.id}: field 'prompt' has {length} tokens; with "
                    f"max_completion_length {max_tokens} that exceeds the context of {context}; expected "
                    f"at most {context - max_tokens}"
                )
            for response in item.responses:
                field = "human_response" if response.is_human else f"responses[{response.model}]"
                if response.token_ids and max(response.token_ids) >= len(tokenizer):
                    raise InputError(
                        f"{prompt.where or prompt.id}: field {field!r} has token id "
                        f"{max(response.token_ids)}; the tokenizer has {len(tokenizer)}"
                    )
                tokens = len(response_ids(tokenizer, prompt, response))
                if context is not None and length + tokens > context:
                    raise InputError(
                        f"{prompt.where or prompt.id}: field {field!r} has {tokens} tokens; with the "
                        f"prompt's {length} that exceeds the context of {context}"
                    )
            fitting.append(item)
        except InputError as error:
            bad.handle(error, prompt_row(prompt))
    if not fitting:
        raise InputError(f"prompts: none of {len(candidates)} can be used; the last: {bad.rows[-1]['error']}")
    return fitting
