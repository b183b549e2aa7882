"""Configuration dataclasses from YAML and ``--key value``, with errors that name the key."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import typing
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jsonargparse
import yaml

from tso_fast.config.checks import check
from tso_fast.config.help import help_text
from tso_fast.config.settings import CellConfig, JudgeConfig, SamplerConfig
from tso_fast.errors import InputError, did_you_mean

T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    """YAML without dates, since a folder may be called 2026-01-31, and without keys that are given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.YAMLError(f"key {twice[0]!r} is given twice; line {node.value[0][0].start_mark.line + 1} ff.")
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}

LONG = 1000
"""Characters of a value from which on its nesting is looked at: what reads it later would overflow the stack."""

BUILT_IN = ("config", "help", "print_config")
LISTS: dict[str, tuple[type, str]] = {
    "cells": (CellConfig, "{path: FOLDER}"),
    "judges": (JudgeConfig, "{kind: llm, cell: policy}"),
    "samplers": (SamplerConfig, "{kind: degrade}"),
}
"""Settings that are lists, what an item is, and an example."""


ALIASES = {
    "lr": "learning_rate",
    "epochs num_epochs": "num_train_epochs",
    "batch_size micro_batch_size train_batch_size": "per_device_train_batch_size",
    "grad_accum accumulation_steps gradient_accumulation": "gradient_accumulation_steps",
    "lr_scheduler scheduler": "lr_scheduler_type",
    "warmup warmup_ratio": "warmup_steps",
    "wd": "weight_decay",
    "grad_clip clip_grad max_norm gradient_clipping": "max_grad_norm",
    "loss rl": "loss_type",
    "rl_beta": "beta",
    "max_new_tokens max_tokens": "max_completion_length",
    "max_seq_length sequence_len max_model_len": "max_length",
    "n num_samples num_return_sequences": "num_generations",
    "temp": "temperature",
    "model models base_model model_name model_name_or_path": "cells",
    "data dataset datasets dataset_name train_dataset train_file": "prompts",
    "eval_data eval_dataset eval_file val_file test_file": "eval_prompts",
    "output out run_dir save_dir": "output_dir",
    "out output_dir output_file": "output",
    "iterations num_iters rounds num_rounds": "num_iterations",
    "ref_model ref reference_model": "reference",
    "reward_model reward_fn reward_funcs judge": "judges",
    "engine backend": "generator",
    "workers num_workers": "num_engines",
    "precision torch_dtype fp16": "dtype",
    "attn attention flash_attn flash_attention": "attn_implementation",
    "device cpu no_cuda": "use_cpu",
    "tracker wandb tensorboard": "report_to",
    "random_seed": "seed",
    "lora use_peft": "peft",
    "lora_rank": "lora_r",
    "fsdp deepspeed zero": "shard",
}
"""What others call a setting, and what it is called here."""


def is_given(arguments: Sequence[str], *names: str) -> bool:
    """Whether one of these options is among the arguments; a leading file name is ``config``."""
    given = {re.split(r"[=.+]", a[2:])[0] for a in arguments if a.startswith("--")}
    given |= {"help"} if "-h" in arguments else set()
    given |= {"config"} if arguments and not arguments[0].startswith("-") else set()
    return bool(given & set(names))


def parse(command: str, cls: type[T], arguments: Sequence[str]) -> T:
    """The configuration of a command; ``--help`` and ``--print_config`` print and exit.

    Raises:
        InputError: an unknown key, with the nearest known one, or a value that does not fit.
    """
    arguments = list(arguments)
    if arguments and not arguments[0].startswith("-"):
        arguments.insert(0, "--config")
    for asks in {"-h", "--help"} & set(arguments):
        print(help_text(command, cls, "".join(arguments[arguments.index(asks) + 1 :][:1])), end="")
        raise SystemExit(0)
    known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for i, argument in enumerate(arguments):
        if argument.startswith("--"):
            name, _, value = argument[2:].partition("=")
            value = value or "".join(arguments[i + 1 : i + 2])
            root, *rest = re.split(r"[.+]", name)
            _check_known(root, [*known, *BUILT_IN], "")
            if len(value) > LONG:
                with contextlib.suppress(_NotYamlError):
                    _yaml(value, root)
            if root == "config":
                _check_file(Path(value), known)
            elif root in LISTS:
                _check_items(root, {rest[0]: value} if rest and rest[0] else _yaml(value, root), "")
    parser = jsonargparse.ArgumentParser(prog=f"tso-fast {command}", description=cls.__doc__, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file of these settings.")
    parser.add_class_arguments(cls, as_group=False)
    try:
        values = parser.instantiate(parser.parse_args(_join_booleans(cls, arguments)))
    except jsonargparse.ArgumentError as error:
        raise InputError(f"{_plain(str(error))}; see tso-fast {command} --help") from error
    except OverflowError as error:  # an integer of hundreds of digits where a float is expected
        raise InputError(f"a number is too large: {error}; see tso-fast {command} --help") from error
    config = cls(**{name: getattr(values, name) for name in known})
    check(config)
    return config


def _join_booleans(cls: type, arguments: list[str]) -> list[str]:
    """``--compare`` alone means ``--compare=true``."""
    switches = {f"--{name}" for name, hint in typing.get_type_hints(cls).items() if hint is bool}
    out = []
    for i, argument in enumerate(arguments):
        is_last = i + 1 == len(arguments) or arguments[i + 1].startswith("--")
        out.append(f"{argument}=true" if argument in switches and is_last else argument)
    return out


def _check_known(name: str, known: Collection[str], place: str) -> None:
    if name not in known:
        ours = [here for theirs, here in ALIASES.items() if name in theirs.split() and here in known]
        hint = f"; did you mean {ours[0]!r}?" if ours else did_you_mean(name, known)
        raise InputError(f"{place}unknown key {name!r}{hint}")


def _check_file(path: Path, known: Sequence[str]) -> None:
    if not os.path.isfile(path):
        raise InputError(f"config: {str(path)!r} is no file; expected YAML")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}; expected YAML in UTF-8") from error
    content = _yaml(text, str(path))
    if not isinstance(content, dict):
        given = "nothing" if content is None else f"a {type(content).__name__}"
        raise InputError(f"{path}: expected keys and values, got {given}")
    lines = text.splitlines()
    for key in content:
        line = next(
            (i for i, text in enumerate(lines, 1) if re.match(rf"""['"]?{re.escape(str(key))}['"]?\s*:""", text)), 1
        )
        _check_known(str(key), known, f"{path}:{line}: ")
    for name in LISTS:
        _check_items(name, content.get(name), f"{path}: ")


class _NotYamlError(InputError):
    pass


def _yaml(text: str, place: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except RecursionError as error:
        raise InputError(f"{place}: brackets or lists are nested too deeply; expected a few levels") from error
    except (yaml.YAMLError, ValueError) as error:  # of a value that looks like a number and is none, such as 0x_
        raise _NotYamlError(f"{place}: broken YAML: {error}") from error


def _check_items(name: str, items: Any, place: str) -> None:
    cls, example = LISTS[name]
    for i, item in enumerate(items if isinstance(items, list) else [] if items is None else [items]):
        if not isinstance(item, dict):
            raise InputError(f"{place}{name}[{i}]: got {item!r}, expected keys and values such as {example}")
        for key in item:
            _check_known(str(key), [f.name for f in dataclasses.fields(cls)], f"{place}{name}[{i}]: ")


# jsonargparse's phrases and ours, one applied after the other.
_PHRASES = (
    (r"\s*\n\s*", " "),
    (r"<class '(\w+)'>", r"\1"),
    (r"(?:typing\.)?Literal\[([^]]*)\]", r"one of \1"),
    (r'^Parser key "([^"]+)": ', r"\1: "),
    (r"Problem with given class_path '[^']+': (?:Parser key \"([^\"]+)\": )?", r"\1: "),
    (r"Does not validate .* Subtypes: \[(.+), NoneType\] Errors: .* Given value: (.*)", r"got \2, expected \1 or null"),
    (r"Expected an? (.+?)\. Got value: (.*)", r"got \2, expected \1"),
    (r"the following arguments are required: (.*)", r"\1: missing"),
    (r"^argument --", ""),
    (r": : ", ": "),
)


def _plain(message: str) -> str:
    for theirs, ours in _PHRASES:
        message = re.sub(theirs, ours, message.strip())
    return message
