"""Programs that check a response against the known answer, or against the constraints of its prompt."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, NamedTuple

from tso_fast.config.settings import VERIFIER_TIMEOUT_S, JudgeConfig
from tso_fast.errors import InputError, did_you_mean, import_named
from tso_fast.files.rows import FLOAT32_MAX, BadRows, prompt_row
from tso_fast.judges.constraints import NO_DETECTOR, check_constraint, holds
from tso_fast.judges.judge import Bench, Judge, Judged, Opinion, as_verdicts
from tso_fast.judges.worker import Failed, worker
from tso_fast.types import Candidates, Constraint, Prompt, Response, Verdict

Check = Callable[[Prompt, Response], Opinion]
"""Raises InputError where the prompt lacks what the verifier needs."""


class VerifierJudge(Judge):
    """Judge of kind ``verifier``."""

    takes = ("verifier", "verifier_pattern", "verifier_timeout_s")

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__(config)
        if config.verifier is None:
            raise InputError("verifier: missing; a judge of kind 'verifier' needs a program")
        self.verifier = config.verifier
        self.says = make_verifier(config.verifier, config.verifier_pattern, config.verifier_timeout_s)

    def usable(self, candidates: Sequence[Candidates], bad: BadRows) -> list[Candidates]:
        return usable(candidates, self.verifier, bad)

    def judge(self, candidates: Sequence[Candidates], bench: Bench) -> Judged:
        return Judged(verify(candidates, self.says, bench.bad, self.name))


# ---- what a verifier needs of a prompt


class Need(NamedTuple):
    """What a verifier needs of a prompt."""

    what: str
    find: Callable[[Prompt, str], Any]
    """Takes the verifier's name for messages; raises InputError where the prompt does not have it."""


def _answer(prompt: Prompt, verifier: str) -> str:
    if prompt.answer is None:
        raise InputError(f"{prompt.where or prompt.id}: field 'answer' is missing; verifier {verifier!r} needs it")
    return prompt.answer


def _number(prompt: Prompt, verifier: str) -> Decimal:
    number = final_number(_answer(prompt, verifier))
    if number is None:
        raise InputError(
            f"{prompt.where or prompt.id}: field 'answer' is {prompt.answer!r}; verifier {verifier!r} expects a number"
        )
    return number


def _constraints(prompt: Prompt, verifier: str) -> tuple[Constraint, ...]:
    place = prompt.where or prompt.id
    if not prompt.constraints:
        raise InputError(
            f"{place}: field 'constraints' is missing; verifier {verifier!r} needs "
            "it, or IFEval's 'instruction_id_list' and 'kwargs'"
        )
    for number, constraint in enumerate(prompt.constraints, start=1):
        try:
            check_constraint(constraint)
        except InputError as error:
            raise InputError(f"{place}: constraint {number} of {len(prompt.constraints)}: {error}") from error
    return prompt.constraints


ANSWER = Need("an answer", _answer)
NUMBER = Need("an answer", _number)
CONSTRAINTS = Need("constraints", _constraints)

# ---- the verifiers

# A currency sign may stand before the number and thousands may be grouped: "-$1,234.50".
_NUMBER = re.compile(r"(?<![\w.])[-−]?(?:[$€£]\s?)?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|(?<![\w.])[-−]?\.\d+")
_MARKERS = re.compile(r"####|\bA:|\b[Aa]nswer(?: is|:)")
_CALCULATOR = re.compile(r"<<[^<>]*>>")


def final_number(text: str) -> Decimal | None:
    """The number that a text ends in: the first after the last ``####``, ``A:`` or ``answer is``, else the last one.

    Calculator annotations ``<<48/2=24>>`` are not read. A minus sign touches its number. ``1/2``, ``1 000`` and
    ``1.000,50`` are several numbers; a percent sign and an exponent are passed over.
    """
    text = _CALCULATOR.sub("", text)
    markers = list(_MARKERS.finditer(text))
    tail = text[markers[-1].end() :] if markers else ""
    found = _NUMBER.search(tail) or next(reversed(list(_NUMBER.finditer(text))), None)
    if found is None:
        return None
    digits = re.sub(r"[\s$€£,]", "", found.group()).replace("−", "-")
    try:
        return Decimal(digits)
    except InvalidOperation:
        return None


def _exact(answer: str, text: str) -> Opinion:
    return Opinion(float(text.strip() == answer.strip()))


def _numeric(answer: Decimal, text: str) -> Opinion:
    return Opinion(float(final_number(text) == answer))


def _regex(answer: str, text: str, *, pattern: re.Pattern[str]) -> Opinion:
    matches = list(pattern.finditer(text))
    if not matches:
        return Opinion(0.0)
    found = matches[-1].group(1 if pattern.groups else 0)
    return Opinion(float(found is not None and found.strip() == answer.strip()))


def _ifeval(constraints: Sequence[Constraint], text: str, *, loose: bool = False) -> Opinion:
    """Share of the prompt's constraints that hold; 1.0 is where IFEval's prompt-level accuracy counts a success.

    The reason names those that do not hold. A constraint that cannot be told is left out of the share; the verifier
    abstains where none can be told.
    """
    found = [holds(constraint, text, loose=loose) for constraint in constraints]
    told = [is_held for is_held in found if is_held is not None]
    reasons = []
    for what, state, why in (("failed", False, ""), ("not told", None, f" ({NO_DETECTOR})")):
        if ids := [c.id for c, is_held in zip(constraints, found, strict=True) if is_held is state]:
            reasons.append(f"{what}: {', '.join(ids)}{why}")
    return Opinion(sum(told) / len(told) if told else None, "; ".join(reasons))


@dataclass(frozen=True, kw_only=True)
class Verifier:
    """A built-in verifier: ``Verifier(needs=ANSWER, says=lambda answer, text: Opinion(float(answer in text)))``."""

    needs: Need
    says: Callable[..., Opinion]
    """Its opinion, from what it needs of the prompt and a response's text."""
    takes_pattern: bool = False
    """Whether ``says`` also takes ``verifier_pattern``, compiled, as ``pattern``; it then runs in the worker."""


VERIFIERS: dict[str, Verifier] = {
    "exact": Verifier(needs=ANSWER, says=_exact),
    "numeric": Verifier(needs=NUMBER, says=_numeric),
    "regex": Verifier(needs=ANSWER, says=_regex, takes_pattern=True),
    "ifeval": Verifier(needs=CONSTRAINTS, says=_ifeval),
    "ifeval_loose": Verifier(needs=CONSTRAINTS, says=functools.partial(_ifeval, loose=True)),
}
"""The built-in verifiers by name."""


def check_settings(name: str | None, pattern: str | None) -> None:
    """Raises InputError for a name that is not known, and for a pattern without a verifier that takes one."""
    row = VERIFIERS.get(name or "")
    if name is not None and row is None and ":" not in name:
        raise InputError(
            f"verifier: got {name!r}, expected one of {', '.join(VERIFIERS)}, or package.module:function"
            f"{did_you_mean(name, VERIFIERS)}"
        )
    if (row is not None and row.takes_pattern) != (pattern is not None):
        takers = " or ".join(name for name, row in VERIFIERS.items() if row.takes_pattern)
        raise InputError(
            f"verifier_pattern: it goes with verifier {takers!r}, and {takers} needs it; "
            f"got verifier {name!r}, verifier_pattern {pattern!r}"
        )


def make_verifier(name: str, pattern: str | None = None, timeout_s: float = VERIFIER_TIMEOUT_S) -> Check:
    """A row of ``VERIFIERS``, or ``package.module:function``, which is called as f(prompt, response, answer).

    What a user wrote, a function or a pattern, runs in the worker and has ``timeout_s`` for one response.

    Raises:
        InputError: unknown, or cannot be imported; a pattern that is missing, without effect or no regular expression.
    """
    check_settings(name, pattern)
    row = VERIFIERS.get(name)
    if row is not None and not row.takes_pattern:
        return lambda prompt, response: row.says(row.needs.find(prompt, name), response.text)
    made = ("tso_fast.judges.verifier:_program", (name, pattern))
    try:
        worker.load(made)
    except Failed as error:
        raise InputError(f"verifier: {name!r} cannot be imported: its module {error}") from error

    def check(prompt: Prompt, response: Response) -> Opinion:
        if row is not None:
            given: tuple[Any, ...] = (row.needs.find(prompt, name), response.text)
        else:
            value = prompt.prompt if isinstance(prompt.prompt, str) else [vars(m) for m in prompt.prompt]
            given = (value, response.text, prompt.answer)
        try:
            return Opinion(*worker.call(made, given, timeout_s))
        except Failed as error:
            hint = "; mend it, or raise verifier_timeout_s" if "longer" in str(error) else ""
            raise InputError(
                f"{prompt.where or prompt.id}: verifier {name!r} {error} on response {response.text[:60]!r}; "
                f"expected a number, a boolean or None{hint}"
            ) from error
        except InputError as error:
            raise InputError(f"{prompt.where or prompt.id}: verifier {name!r} {error}") from error

    return check


def _program(name: str, pattern: str | None) -> Callable[..., Opinion]:
    """What the worker calls for each response."""
    if name in VERIFIERS:
        try:
            return functools.partial(VERIFIERS[name].says, pattern=re.compile(pattern or ""))
        except re.error as error:
            raise InputError(f"verifier_pattern: {pattern!r} is no regular expression: {error}") from error
    function = import_named(name, f"verifier: {name!r}", "function")
    if not callable(function):
        raise InputError(f"verifier: {name!r} is {function!r:.60}; expected a function")
    return lambda *given: Opinion(_score(function(*given)))


def _score(value: Any) -> float | None:
    """The score that a user's function gave; scalars of numpy and torch are numbers."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    if value is None:
        return None
    if not isinstance(value, bool | int | float) or not abs(value) <= FLOAT32_MAX:
        raise InputError(f"returned {value!r:.60}; expected a finite number, a boolean or None")
    return float(value)


def usable(candidates: Sequence[Candidates], name: str, bad: BadRows) -> list[Candidates]:
    """The candidates whose prompt has what a built-in verifier needs; the others are bad rows."""
    if name not in VERIFIERS:
        return list(candidates)
    needs = VERIFIERS[name].needs
    found = []
    for item in candidates:
        try:
            needs.find(item.prompt, name)
            found.append(item)
        except InputError as error:
            bad.handle(error, prompt_row(item.prompt))
    if not found:
        raise InputError(f"verifier: none of {len(candidates)} prompts has {needs.what} that {name!r} can use")
    return found


def verify(candidates: Sequence[Candidates], check: Check, bad: BadRows, name: str = "verifier") -> list[Verdict]:
    """One verdict a response, 1.0 right to 0.0 wrong; a prompt that cannot be judged is a bad row, and abstained on."""
    verdicts = []
    for item in candidates:
        try:
            opinions = [check(item.prompt, response) for response in item.responses]
        except InputError as error:
            bad.handle(error, prompt_row(item.prompt))
            opinions = [Opinion(None, str(error))] * len(item.responses)
        verdicts += as_verdicts(item, name, opinions)
    return verdicts
