"""What ``--help`` prints: a usage of five lines, the settings that most runs need, and the others by stage."""

from __future__ import annotations

import dataclasses
import shutil
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union

import docstring_parser

from tso_fast.config.ranges import class_in
from tso_fast.errors import InputError, did_you_mean

GROUPS = {
    "what": "What and where",
    "matrix": "Model matrix",
    "generation": "Generation",
    "judging": "Judging",
    "correction": "Correction of the prior order",
    "pairs": "Pairs",
    "loss": "Loss",
    "optimisation": "Optimisation",
    "evaluation": "Evaluation",
    "engine": "Engine",
}
"""Groups of settings in the order of the loop, and their titles."""
OF_CLASS = {
    "RowsConfig": "what",
    "TrainConfig": "what",
    "PlanConfig": "what",
    "GenerateConfig": "what",
    "ScoreConfig": "what",
    "JudgedConfig": "what",
    "PairsConfig": "what",
    "AssessConfig": "what",
    "EvalConfig": "what",
    "AnnotateConfig": "what",
    "GenerationConfig": "generation",
    "VerifierConfig": "judging",
    "ExplainConfig": "judging",
    "JudgesConfig": "judging",
    "EvidenceConfig": "correction",
    "PairingConfig": "pairs",
    "ReferenceConfig": "loss",
    "OptimizationConfig": "optimisation",
    "AdapterConfig": "optimisation",
    "ShardConfig": "optimisation",
    "ModelConfig": "engine",
    "EngineConfig": "engine",
    "OpConfig": "engine",
}
"""Group of the settings of a class."""
OF_SETTING = {
    "seed": "what",
    **dict.fromkeys(("cells", "policy", "max_versions"), "matrix"),
    **dict.fromkeys(("policy_num_generations", "samplers"), "generation"),
    **dict.fromkeys(("annotate", "people"), "judging"),
    **dict.fromkeys(("loss_type", "loss_weights", "loss_args", "beta", "clip_chosen", "clip_rejected"), "loss"),
    **dict.fromkeys(("eval_prompts", "eval_verifier", "compare"), "evaluation"),
}
"""Group of a setting that is not that of its class."""
NEEDED = (
    "prompts",
    "responses",
    "run",
    "verdicts",
    "cells",
    "output_dir",
    "output",
    "verifier",
    "eval_prompts",
    "num_iterations",
    "num_generations",
    "max_completion_length",
    "learning_rate",
    "per_device_train_batch_size",
)
"""Settings that most runs need; ten of them are those of ``train``."""
COLUMN, WIDEST = 30, 120


@dataclasses.dataclass(frozen=True)
class _Setting:
    name: str
    group: str
    hint: Any
    default: Any
    """``dataclasses.MISSING``: it must be given."""
    text: str


def help_text(command: str, cls: type, about: str = "") -> str:
    """The help of a command, or of one group of its settings, of one setting, or of the items of a list.

    Raises:
        InputError: there is no such group or setting.
    """
    settings = list(_settings(cls))
    groups = [group for group in GROUPS if any(s.group == group for s in settings)]
    if not about:
        usage = (
            f"usage: tso-fast {command} [CONFIG.yaml] [--setting value ...]\n"
            f"       tso-fast {command} --help GROUP     one group of settings, or one setting; the groups are\n"
            f"         {', '.join(groups)}\n"
            f"       tso-fast {command} --print_config   the resolved settings, as YAML\n"
            "What the command line says wins over what the YAML file says.\n"
        )
        needed = [s for name in NEEDED for s in settings if s.name == name]
        parts = [usage, _paragraph(cls.__doc__ or ""), _section("Most needed", needed)]
        parts += [_section(GROUPS[g], [s for s in settings if s.group == g and s not in needed]) for g in groups]
        return "\n".join(filter(None, parts))
    if about in groups:
        return _section(GROUPS[about], [s for s in settings if s.group == about])
    found = [s for s in settings if s.name == about.lstrip("-")]
    if not found:
        known = [*groups, *(s.name for s in settings)]
        raise InputError(
            f"help: got {about!r}{did_you_mean(about, known)}; expected a setting or one of {', '.join(groups)}"
        )
    item = class_in(found[0].hint)
    own = _section(f"Settings of an item of {found[0].name}", list(_settings(item)), prefix="") if item else ""
    return "\n".join(filter(None, (_section(GROUPS[found[0].group], found), own)))


def _settings(cls: type) -> Iterator[_Setting]:
    hints = typing.get_type_hints(cls, include_extras=True)
    texts: dict[str, str] = {}
    home: dict[str, str] = {}
    for base in (base for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base)):
        texts |= {p.arg_name: p.description or "" for p in docstring_parser.parse_from_object(base).params}
        home = {**dict.fromkeys(base.__annotations__, base.__name__), **home}
    for field in dataclasses.fields(cls):
        group = OF_SETTING.get(field.name) or OF_CLASS.get(home[field.name], "what")
        yield _Setting(field.name, group, hints[field.name], field.default, " ".join(texts[field.name].split()))


def _paragraph(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), _width()) + "\n"


def _width() -> int:
    return min(shutil.get_terminal_size().columns, WIDEST)


def _section(title: str, settings: list[_Setting], prefix: str = "--") -> str:
    if not settings:
        return ""
    lines = [f"{title}:"]
    for setting in settings:
        head, text = f"  {prefix}{setting.name} {_kind(setting.hint)}", _described(setting)
        if len(head) + 2 > COLUMN:
            lines.append(head)
            head = ""
        lines.append(
            textwrap.fill(
                text,
                _width(),
                initial_indent=head.ljust(COLUMN),
                subsequent_indent=" " * COLUMN,
                break_long_words=False,
            )
        )
    return "\n".join(lines) + "\n"


def _described(setting: _Setting) -> str:
    value = setting.default
    if value is dataclasses.MISSING:
        return f"{setting.text} (required)"
    if value is None:
        return setting.text
    shown = str(value).lower() if isinstance(value, bool) else value
    return f"{setting.text} (default: {shown})"


def _kind(hint: Any) -> str:
    """What a value is: ``INT``, ``{raise,skip}``."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _kind(arguments[0])
    if origin in (Union, types.UnionType):
        return "|".join(_kind(argument) for argument in arguments if argument is not type(None))
    if origin is Literal:
        return "{" + ",".join(map(str, arguments)) + "}"
    kinds = {bool: "{true,false}", str: "TEXT", dict: "DICT", list: "LIST"}
    return kinds.get(origin or hint, (origin or hint).__name__.upper())
