"""Methods as settings: one YAML file each, whose head says what it is, where it comes from and what is not faithful.

A recipe names a loss, a choice of pairs, a reference and what else makes the method; nothing in the loop knows it by
name. The head is a comment of ``field: text`` lines, each field of ``Recipe`` once.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from tso_fast.errors import InputError, did_you_mean

FOLDER = Path(__file__).parent
METHOD = {
    "loss_type": "dual_clip",
    "loss_weights": "null",
    "loss_args": "null",
    "beta": "null",
    "clip_chosen": "null",
    "clip_rejected": "null",
    "unanimous": "false",
    "pair_strategy": "random",
    "accepted_responses": "null",
    "acceptance_beta": "null",
    "scale_by": "unit",
    "soft_label_by": "null",
    "soft_label_kappa": "null",
    "margin_weight": "0",
    "win_rates": "null",
    "extra_from": "null",
    "revision_template": "null",
    "token_values": "null",
    "token_reward_cell": "null",
    "second_reference": "null",
    "ref_model_mixup_alpha": "null",
    "ref_model_sync_steps": "null",
    "ref_model_mixup_steps": "null",
    "chosen_from": "null",
    "rejected_from": "null",
    "reference": "previous",
    "samplers": "null",
    "evidence_from": "null",
    "soft_label_score": "null",
    "by_iteration": "null",
}
"""Settings that make a method, and what a recipe that does not give one means."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The head of a recipe's file."""

    title: str
    """What it is, in a line."""
    family: str
    """`matrix`, `losses`, `self-judging`, `self-play`, `sampling` or `many people`."""
    source: str
    status: str
    """How far its formula was read: `read`, `summary`, or `derived`."""
    ours: str
    """What is decided here and not by the source."""
    missing: str
    """What the source does and this does not."""
    path: Path

    @property
    def name(self) -> str:
        return self.path.stem


def recipes() -> list[Recipe]:
    """All recipes, by family and name."""
    return sorted(map(read_head, FOLDER.glob("*.yaml")), key=lambda recipe: (recipe.family, recipe.name))


def find(name: str) -> Recipe:
    """The recipe of a name, or of a file of one's own.

    Raises:
        InputError: no recipe is called so, or the file has no such head.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = [file.stem for file in FOLDER.glob("*.yaml")]
        hint = did_you_mean(name, known)
        raise InputError(
            f"recipe: got {name!r}{hint}; `tso-fast recipes` lists them, and a file of yours ends in .yaml"
        )
    return read_head(path)


def read_head(path: Path) -> Recipe:
    """The head of a recipe's file.

    Raises:
        InputError: a field is missing or unknown.
    """
    head: dict[str, str] = {}
    name = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if found := re.match(r"# (\w+): (.*)", line):
            name = found[1]
            head[name] = found[2].strip()
        elif name:
            head[name] += " " + line.lstrip("# ").strip()
    wanted = [field.name for field in dataclasses.fields(Recipe) if field.name != "path"]
    if differing := sorted({*wanted} ^ head.keys()):
        raise InputError(
            f"{path}: its head lacks or has too much of {', '.join(differing)}; expected lines `# field: text` of "
            f"{', '.join(wanted)} before the settings"
        )
    return Recipe(**head, path=path)


def arguments(name: str) -> list[str]:
    """A recipe as arguments of ``train``, which later ones override: no setting of a method stays from before it.

    Raises:
        InputError: no recipe is called so, or the file has no such head.
    """
    cleared = [part for key, value in METHOD.items() for part in (f"--{key}", value)]
    return [*cleared, "--config", str(find(name).path)]


def table() -> str:
    """The recipes as Markdown, a table a family: what `docs/recipes.md` says of them, as its test sees to."""
    lines: list[str] = []
    family = ""
    for recipe in recipes():
        if recipe.family != family:
            family = recipe.family
            lines += ["", f"## {family.capitalize()}", "", "| recipe | source, and how it was read | ours | not here |"]
            lines.append("| --- | --- | --- | --- |")
        name = f"[`{recipe.name}`](../tso_fast/recipes/{recipe.path.name})"
        cells = (f"{name}: {recipe.title}", f"{recipe.source}; {recipe.status}", recipe.ours, recipe.missing)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines).strip() + "\n"
