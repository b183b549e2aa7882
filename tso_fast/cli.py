"""The command line: ``tso-fast COMMAND [CONFIG.yaml] [--key value ...]``."""

from __future__ import annotations

import atexit
import dataclasses
import itertools
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tso_fast.config.settings import TrainConfig

TASKS = ("skills", "writing")
"""Tasks of the quickstart."""
USAGE = """usage: tso-fast COMMAND [CONFIG.yaml] [--key value ...]

Self-Training with Scaled Preference Optimization, from a model family's own outputs.

  train      the whole loop; without a configuration: the quickstart, entire, in minutes (--task skills or writing)
  plan       what train would hold, do and write with the same settings, and what fits; loads nothing
  generate   prompts in, responses of every cell out
  score      responses in, verdicts out
  judges     how far each judge can be believed, and which labels would help
  pairs      responses in, preference pairs out
  eval       accuracy of models on prompts
  annotate   a local page on which people label pairs of responses
  report     write report.html of a run folder and print its table
  recipes    methods as settings, for train --recipe NAME
  bench      the benchmark suites, or one of them: bench methods
  env        what is installed and usable here, and what to install for the rest

  tso-fast COMMAND --help           every setting of a command, by stage; --help GROUP shows one of them
  tso-fast COMMAND --print_config   the resolved configuration as YAML
  tso-fast --version
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, 1 a fault of this program, 2 bad input, 3 stopped by an error that
    is not the input's, 128 + a signal's number."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    from tso_fast import interrupts
    from tso_fast.errors import IMPORTING, EngineError, InputError, OutputError, Paused, TrainingError
    from tso_fast.redact import redact

    if IMPORTING:  # else the program would start itself again and again
        raise InputError(
            f"{IMPORTING[-1]} runs tso-fast when it is imported; put the call of tso_fast.cli.main under "
            'if __name__ == "__main__":'
        )
    try:
        with interrupts.handled():
            status = _run(arguments)
            sys.stdout.flush()
            return status
    except (EngineError, InputError, OutputError, TrainingError) as error:
        print(f"error: {redact(str(error))}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 3
    except Paused as pause:
        print(f"paused: {pause}", file=sys.stderr)
        return 0
    except KeyboardInterrupt as stop:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        status = 128 + getattr(stop, "number", signal.SIGINT)
        if argv is None:
            _leave(status)
        return status
    except BrokenPipeError:  # whoever read the output has enough; what Python still holds of it must go nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        from tso_fast.crashes import explain

        print(f"error: {explain(error, arguments)}", file=sys.stderr)
        return 1


def _leave(status: int) -> None:
    """Ends this process at once: taking down what was imported, module by module, would take seconds."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from tso_fast import __version__

        print(__version__)
        return 0
    if arguments[0] not in COMMANDS:
        from tso_fast.errors import InputError, did_you_mean

        raise InputError(
            f"unknown command {arguments[0]!r}{did_you_mean(arguments[0], COMMANDS)}; "
            f"expected one of {', '.join(COMMANDS)}"
        )
    _show_log()
    return COMMANDS[arguments[0]](arguments[1:]) or 0


def _show_log() -> None:
    """What was chosen and what went wrong on the way, beside the progress."""
    import logging

    class Shown(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            from tso_fast.progress import console
            from tso_fast.redact import redact

            kind = "note" if record.levelno < logging.WARNING else record.levelname.lower()
            console.print(f"{kind}: {redact(record.getMessage())}", soft_wrap=True)

    log = logging.getLogger("tso_fast")
    if not log.handlers:
        log.addHandler(Shown(logging.INFO))
        log.setLevel(logging.INFO)


def _train(arguments: list[str]) -> int | None:
    from tso_fast.config.parse import is_given, parse
    from tso_fast.config.settings import TrainConfig

    recipe, own = _option("recipe", arguments)
    settings = []
    if recipe is not None:
        from tso_fast import recipes

        settings = recipes.arguments(recipe)
    if is_given(own, "config", "cells", "prompts", "help"):
        file, own = (own[0], own[1:]) if own[:1] and not own[0].startswith("-") else _option("config", own)
        config = parse("train", TrainConfig, [*([] if file is None else ["--config", file]), *settings, *own])
    else:
        task, own = _option("task", own)
        config = quickstart_config([*settings, *own], task=_known_task(TASKS[0] if task is None else task))
    from tso_fast.launch import is_launched, launch

    if config.num_processes > 1 and not is_launched():
        return launch(config.num_processes, ["train", *arguments], config.use_cpu)
    from tso_fast import commands
    from tso_fast.crashes import noted_in

    with noted_in(config.output_dir):
        commands.train(config)
    return None


def _option(name: str, arguments: list[str]) -> tuple[str | None, list[str]]:
    """The value of ``--name VALUE``, if it is given, and the other arguments."""
    for i, argument in enumerate(arguments):
        if argument == f"--{name}" or argument.startswith(f"--{name}="):
            _, has_value, value = argument.partition("=")
            rest = arguments[i + 1 :]
            if not has_value:
                value, rest = "".join(rest[:1]), rest[1:]
            return value, [*arguments[:i], *rest]
    return None, arguments


def _known_task(task: str) -> str:
    from tso_fast.errors import InputError, did_you_mean

    if task not in TASKS:
        raise InputError(f"task: got {task!r}{did_you_mean(task, TASKS)}; expected one of {', '.join(TASKS)}")
    return task


def quickstart_config(arguments: list[str], eval_set: str = "held_out", task: str = "skills") -> TrainConfig:
    """The settings of a quickstart task with overrides, its matrix made or taken from the cache."""
    from pathlib import Path

    import tso_fast.quickstart
    from tso_fast.config.parse import parse
    from tso_fast.config.settings import TrainConfig

    settings = Path(tso_fast.quickstart.__file__).with_name(f"{task}.yaml")
    # Placeholders for what the quickstart makes itself.
    made = ["--cells", "[]", "--prompts", "", "--eval_prompts", "-", "--output_dir", ""]
    config = parse("train", TrainConfig, ["--config", str(settings), *made, *arguments])
    config.output_dir = (
        config.output_dir or f"tso-runs/quickstart{'' if task == 'skills' else f'-{task}'}-seed{config.seed}"
    )

    from tso_fast.quickstart.build import RECIPES, prepare

    prepare(config, dataclasses.replace(RECIPES[task], seed=config.seed), eval_set)
    return config


def _single(name: str, config_name: str, function: str = "") -> Callable[[list[str]], None]:
    """A command that is one stage: its configuration is read before anything heavy is imported."""

    def run(arguments: list[str]) -> None:
        from tso_fast import config
        from tso_fast.config.parse import parse

        settings = parse(name, getattr(config, config_name), arguments)
        from tso_fast import commands

        getattr(commands, function or name)(settings)

    return run


def _annotate(arguments: list[str]) -> None:
    from tso_fast.config.parse import parse
    from tso_fast.config.settings import AnnotateConfig

    if arguments and not arguments[0].startswith("-") and not arguments[0].endswith((".yaml", ".yml")):
        arguments = ["--run", *arguments]
    config = parse("annotate", AnnotateConfig, arguments)
    from tso_fast.annotate.command import annotate
    from tso_fast.crashes import noted_in

    with noted_in(config.run):
        annotate(config)


def _judges(arguments: list[str]) -> None:
    """``tso-fast judges RESPONSES VERDICTS``; a first argument that is YAML is a configuration."""
    from tso_fast.config.parse import parse
    from tso_fast.config.settings import AssessConfig

    is_file = (not a.startswith("-") and not a.endswith((".yaml", ".yml")) for a in arguments)
    files = [a for a, _ in zip(arguments[:2], itertools.takewhile(bool, is_file), strict=False)]
    named = [part for pair in zip(("--responses", "--verdicts"), files, strict=False) for part in pair]
    arguments = [*named, *arguments[len(files) :]]
    config = parse("judges", AssessConfig, arguments)
    from tso_fast import commands

    commands.judges(config)


def _report(arguments: list[str]) -> None:
    from tso_fast.errors import InputError

    if len(arguments) != 1 or arguments[0].startswith("-"):
        if arguments in (["-h"], ["--help"]):
            print("usage: tso-fast report RUN\n\nWrites RUN/report.html and prints the run's table.")
            return
        raise InputError(f"report: got {' '.join(arguments) or 'nothing'}, expected one run folder")
    from tso_fast import commands
    from tso_fast.crashes import noted_in

    with noted_in(arguments[0]):
        commands.report(arguments[0])


def _recipes(arguments: list[str]) -> None:
    """``tso-fast recipes`` lists them, ``tso-fast recipes NAME`` prints one."""
    if arguments in (["-h"], ["--help"]):
        print(
            "usage: tso-fast recipes [NAME]\n\nLists methods as settings, by family, or prints the file of one.\n"
            "tso-fast train --recipe NAME trains with one; NAME may be a YAML file of yours with the same head."
        )
        return
    from tso_fast.errors import InputError
    from tso_fast.recipes import find, recipes

    if len(arguments) > 1 or (arguments and arguments[0].startswith("-")):
        raise InputError(f"recipes: got {' '.join(arguments)}, expected nothing or one name")
    if arguments:
        print(find(arguments[0]).path.read_text(encoding="utf-8"), end="")
        return
    for family, of_family in itertools.groupby(recipes(), key=lambda recipe: recipe.family):
        print(family)
        for recipe in of_family:
            print(f"  {recipe.name:<26}{recipe.title}\n{'':<28}{recipe.source}; {recipe.status}")


def _bench(arguments: list[str]) -> None:
    from tso_fast.suites import bench

    bench(arguments)


def _env(arguments: list[str]) -> None:
    if arguments in (["-h"], ["--help"]):
        print(
            "usage: tso-fast env [--json]\n\nPrints what is installed and usable here, and what to install for the "
            "rest.\n--json: the same for programs and bug reports."
        )
        return
    from tso_fast.errors import InputError

    if arguments not in ([], ["--json"]):
        raise InputError(f"env: got {' '.join(arguments)}, expected nothing or --json")
    from tso_fast.environment import print_environment

    print_environment(as_json=bool(arguments))


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "train": _train,
    "plan": _single("plan", "PlanConfig"),
    "generate": _single("generate", "GenerateConfig"),
    "score": _single("score", "ScoreConfig"),
    "judges": _judges,
    "pairs": _single("pairs", "PairsConfig"),
    "eval": _single("eval", "EvalConfig", "evaluate"),
    "annotate": _annotate,
    "report": _report,
    "recipes": _recipes,
    "bench": _bench,
    "env": _env,
}

if __name__ == "__main__":
    sys.exit(main())
