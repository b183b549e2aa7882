"""Programs that check a response against the known answer, or against the constraints of its prompt."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from typing import NamedTuple

from tso_fast.errors import InputError
from tso_fast.files.rows import FLOAT32_MAX, BadRows, prompt_row
from tso_fast.judges.constraints import NO_DETECTOR, holds
from tso_fast.types import Candidates, Constraint, Prompt, Response, Verdict


class Opinion(NamedTuple):
    """What a verifier says of one response."""

    score: float | None
    """Higher is better; None: it abstains."""
    reason: str = ""


Check = Callable[[Prompt, Response], Opinion]

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


def _expected(prompt: Prompt, verifier: str) -> str:
    if prompt.answer is None:
        raise InputError(f"{prompt.where or prompt.id}: field 'answer' is missing; verifier {verifier!r} needs it")
    return prompt.answer


def _exact(prompt: Prompt, response: Response) -> Opinion:
    return Opinion(float(response.text.strip() == _expected(prompt, "exact").strip()))


def _expected_number(prompt: Prompt) -> Decimal:
    expected = final_number(_expected(prompt, "numeric"))
    if expected is None:
        raise InputError(
            f"{prompt.where or prompt.id}: field 'answer' is {prompt.answer!r}; verifier 'numeric' expects a number"
        )
    return expected


def _numeric(prompt: Prompt, response: Response) -> Opinion:
    expected = _expected_number(prompt)
    return Opinion(float(final_number(response.text) == expected))


def _regex(pattern: str) -> Check:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError(f"verifier_pattern: {pattern!r} is no regular expression: {error}") from error

    def check(prompt: Prompt, response: Response) -> Opinion:
        expected = _expected(prompt, "regex").strip()
        matches = list(compiled.finditer(response.text))
        if not matches:
            return Opinion(0.0)
        found = matches[-1].group(1 if compiled.groups else 0)
        return Opinion(float(found is not None and found.strip() == expected))

    return check


IFEVAL = ("ifeval", "ifeval_loose")


def _constraints(prompt: Prompt, verifier: str) -> tuple[Constraint, ...]:
    if not prompt.constraints:
        raise InputError(
            f"{prompt.where or prompt.id}: field 'constraints' is missing; verifier {verifier!r} needs "
            "it, or IFEval's 'instruction_id_list' and 'kwargs'"
        )
    return prompt.constraints


def _ifeval(name: str) -> Check:
    """Share of the prompt's constraints that hold; 1.0 is where IFEval's prompt-level accuracy counts a success.

    The reason names those that do not hold. A constraint that cannot be told is left out of the share; the verifier
    abstains where none can be told.
    """

    def check(prompt: Prompt, response: Response) -> Opinion:
        constraints = _constraints(prompt, name)
        verdicts = [holds(constraint, response.text, loose=name == "ifeval_loose") for constraint in constraints]
        told = [verdict for verdict in verdicts if verdict is not None]
        reasons = []
        for what, verdict, why in (("failed", False, ""), ("not told", None, f" ({NO_DETECTOR})")):
            if ids := [c.id for c, v in zip(constraints, verdicts, strict=True) if v is verdict]:
                reasons.append(f"{what}: {', '.join(ids)}{why}")
        return Opinion(sum(told) / len(told) if told else None, "; ".join(reasons))

    return check


def _callable(name: str) -> Check:
    module_name, _, function_name = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # whatever the module does when it is imported
        raise InputError(
            f"verifier: {name!r} cannot be imported: {type(error).__name__}: {error}; expected "
            "package.module:function, with the package's folder on PYTHONPATH"
        ) from error
    if not callable(function):
        raise InputError(f"verifier: {name!r} is {function!r:.60}; expected a function")

    def check(prompt: Prompt, response: Response) -> Opinion:
        place = f"{prompt.where or prompt.id}: verifier {name!r}"
        value = prompt.prompt if isinstance(prompt.prompt, str) else [vars(m) for m in prompt.prompt]
        try:
            score = function(value, response.text, prompt.answer)
        except Exception as error:
            raise InputError(
                f"{place} raised {type(error).__name__}: {error} on response "
                f"{response.text[:60]!r}; expected a number, a boolean or None"
            ) from error
        if score is None:
            return Opinion(None)
        if not isinstance(score, bool | int | float) or not abs(score) <= FLOAT32_MAX:
            raise InputError(f"{place} returned {score!r:.60}; expected a finite number, a boolean or None")
        return Opinion(float(score))

    return check


def make_verifier(name: str, pattern: str | None = None) -> Check:
    """``exact``, ``numeric``, ``regex``, ``ifeval``, ``ifeval_loose``, or ``package.module:function``.

    The last is called as f(prompt, response, answer).

    Raises:
        InputError: unknown, or cannot be imported.
    """
    if name == "exact":
        return _exact
    if name == "numeric":
        return _numeric
    if name == "regex":
        return _regex(pattern or "")
    if name in IFEVAL:
        return _ifeval(name)
    return _callable(name)


def with_answers(candidates: Sequence[Candidates], name: str, bad: BadRows) -> list[Candidates]:
    """Those whose ``answer``, or ``constraints``, a built-in verifier can use; the others are bad rows."""
    usable = []
    for item in candidates:
        try:
            if name == "numeric":
                _expected_number(item.prompt)
            elif name in ("exact", "regex"):
                _expected(item.prompt, name)
            elif name in IFEVAL:
                _constraints(item.prompt, name)
            usable.append(item)
        except InputError as error:
            bad.handle(error, prompt_row(item.prompt))
    if not usable:
        what = "constraints" if name in IFEVAL else "an answer"
        raise InputError(f"verifier: none of {len(candidates)} prompts has {what} that {name!r} can use")
    return usable


def verify(candidates: Sequence[Candidates], check: Check, bad: BadRows, name: str = "verifier") -> list[Verdict]:
    """One verdict a response, 1.0 right to 0.0 wrong; a prompt that cannot be judged is a bad row, and abstained on."""
    verdicts = []
    for item in candidates:
        try:
            opinions = [check(item.prompt, response) for response in item.responses]
        except InputError as error:
            bad.handle(error, prompt_row(item.prompt))
            opinions = [Opinion(None, str(error))] * len(item.responses)
        verdicts += [
            Verdict(prompt_id=item.prompt.id, response=i, judge=name, score=opinion.score, reason=opinion.reason)
            for i, opinion in enumerate(opinions)
        ]
    return verdicts
