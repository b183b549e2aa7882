"""Rows to records and back, with errors that name file:line:field.

Formats are those of TRL where it has one: pairs load there unchanged.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from tso_fast.errors import InputError
from tso_fast.files.forms import Forms, RowSettings, Spelling, content_of, messages_of
from tso_fast.files.sources import BadRows, Row, kind_of, number_of, read_rows
from tso_fast.types import HUMAN, Candidates, Comparison, Constraint, Message, PreferencePair, Prompt, Response, Verdict

T = TypeVar("T")

FLOAT32_MAX = 3.4028234663852886e38


def _missing(row: Row, name: str, where: str, expected: str) -> InputError:
    close = difflib.get_close_matches(name, row, n=1)
    but = f", but there is {close[0]!r}" if close else ""
    return InputError(f"{where}: field {name!r} is missing{but}; expected {expected}")


def _get(row: Row, name: str, where: str, types: type | tuple[type, ...], expected: str, required: bool = False) -> Any:
    value = row.get(name)
    if value is None:
        if required:
            if name not in row:
                raise _missing(row, name, where, expected)
            raise InputError(f"{where}: field {name!r} is null; expected {expected}")
        return None
    is_bool = isinstance(value, bool) and bool not in (types if isinstance(types, tuple) else (types,))
    if is_bool or not isinstance(value, types):
        raise InputError(f"{where}: field {name!r} is {kind_of(value)}; expected {expected}")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{where}: field {name!r} is {value}; expected a finite number")
    return value


def _text(row: Row, name: str, where: str, required: bool = False) -> str | None:
    value: str | None = _get(row, name, where, str, "a string", required)
    if required and value is not None and not value.strip():
        raise InputError(f"{where}: field {name!r} is empty; expected some text")
    return value


def _number(row: Row, name: str, where: str, required: bool = False) -> float | None:
    value = _get(row, name, where, (int, float), "a number", required)
    if value is not None and abs(value) > FLOAT32_MAX:
        raise InputError(f"{where}: field {name!r} is {kind_of(value)}; expected a number that float32 can hold")
    return None if value is None else float(value)


def _prompt_value(row: Row, where: str) -> str | tuple[Message, ...]:
    value = _get(row, "prompt", where, (str, list), "a string or a list of messages", required=True)
    if isinstance(value, str):
        _text(row, "prompt", where, required=True)
        return value
    messages = messages_of(value, where, "prompt")
    if not messages or not any(m.content.strip() for m in messages):
        raise InputError(f"{where}: field 'prompt' is empty; expected at least one message with content")
    if messages[-1].role == "assistant":
        raise InputError(f"{where}: field 'prompt' ends with an assistant message; expected a turn to answer")
    return messages


def _constraints(row: Row, where: str) -> tuple[Constraint, ...]:
    """From ``constraints: [{"id", "kwargs"}, ...]``, or from IFEval's ``instruction_id_list`` and ``kwargs``."""
    given = _get(row, "constraints", where, list, "a list of constraints")
    ids = _get(row, "instruction_id_list", where, list, "a list of names of constraints")
    if ids is None:
        return tuple(_constraint_of(item, f"constraints[{i}]", where) for i, item in enumerate(given or []))
    if given is not None:
        raise InputError(f"{where}: field 'constraints' is given beside 'instruction_id_list'; expected one of them")
    kwargs = _get(row, "kwargs", where, list, "a list of objects", required=bool(ids)) or []
    if len(kwargs) != len(ids):
        raise InputError(
            f"{where}: field 'kwargs' has {len(kwargs)} items; expected {len(ids)}, one for each of "
            "'instruction_id_list'"
        )
    return tuple(
        _constraint(ids[i], f"instruction_id_list[{i}]", kwargs[i], f"kwargs[{i}]", where) for i in range(len(ids))
    )


def _constraint_of(item: Any, name: str, where: str) -> Constraint:
    if not isinstance(item, dict):
        raise InputError(f"{where}: field {name!r} is {kind_of(item)}; expected an object with 'id' and 'kwargs'")
    return _constraint(item.get("id"), f"{name}.id", item.get("kwargs"), f"{name}.kwargs", where)


def _constraint(given: Any, name: str, kwargs: Any, kwargs_name: str, where: str) -> Constraint:
    """Form only: what types there are and what they take is known to the judge."""
    if not isinstance(given, str):
        raise InputError(
            f"{where}: field {name!r} is {kind_of(given)}; expected a string such as 'punctuation:no_comma'"
        )
    if kwargs is not None and not isinstance(kwargs, dict):
        raise InputError(f"{where}: field {kwargs_name!r} is {kind_of(kwargs)}; expected an object")
    # One published form has the arguments of all types in every row, most of them null.
    return Constraint(id=given, kwargs=_no_none(kwargs or {}))


def parse_candidates(row: Row, where: str, default_id: str) -> Candidates:
    """A row of a prompts file or of a responses file; the human response is a candidate like any other."""
    row_id = row.get("id")
    if isinstance(row_id, int) and not isinstance(row_id, bool):
        row_id = str(row_id)
    if row_id is not None and (not isinstance(row_id, str) or not row_id):
        raise InputError(f"{where}: field 'id' is {kind_of(row_id)}; expected a non-empty string")
    answer = row.get("answer")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = json.dumps(answer)
    elif answer is not None and not isinstance(answer, str):
        raise InputError(f"{where}: field 'answer' is {kind_of(answer)}; expected a string or a number")
    prompt = Prompt(
        id=row_id or default_id,
        prompt=_prompt_value(row, where),
        human_responses=_human_responses(row, where),
        answer=answer,
        constraints=_constraints(row, where),
        prefix=_token_ids(row, "prefix", where) or (),
        where=where,
    )
    given = _get(row, "responses", where, list, "a list of responses") or []
    responses = [_response(item, f"{where}: field 'responses[{i}]'") for i, item in enumerate(given)]
    keys: dict[tuple[str, int], int] = {}
    for i, response in enumerate(responses):
        count = sum(key[0] == response.model for key in keys)
        if "sample" not in given[i] and count:  # several samples of a model, not numbered in the file
            responses[i] = response = replace(response, sample=count)
        if (key := (response.model, response.sample)) in keys:
            raise InputError(
                f"{where}: field 'responses[{i}]' repeats model {key[0]!r}, sample {key[1]} of "
                f"responses[{keys[key]}]; expected distinct samples"
            )
        keys[key] = i
    if not any(r.is_human for r in responses):
        responses += [Response(model=HUMAN, text=text, sample=i) for i, text in enumerate(prompt.human_responses)]
    return Candidates(prompt=prompt, responses=tuple(responses))


def _human_responses(row: Row, where: str) -> tuple[str, ...]:
    """From a string, a list of strings, or a list of one assistant message."""
    name, expected = "human_response", "a string, a list of strings, or a list of one assistant message"
    value = _get(row, name, where, (str, list), expected)
    if not isinstance(value, list):
        text = _text(row, name, where, required=value is not None)
        return () if text is None else (text,)
    if value and all(isinstance(item, dict) for item in value):
        if len(value) != 1 or messages_of(value, where, name)[0].role != "assistant":
            raise InputError(f"{where}: field {name!r} is {kind_of(value)}; expected {expected}")
        value = [content_of(value[0], f"{where}: field '{name}[0]'")]
    for i, item in enumerate(value):
        if not isinstance(item, str) or not item.strip():
            raise InputError(f"{where}: field '{name}[{i}]' is {kind_of(item)}; expected some text")
    return tuple(value)


def _token_ids(row: Row, name: str, where: str) -> tuple[int, ...] | None:
    ids = _get(row, name, where, list, "a list of token ids")
    if ids is not None and not all(type(token) is int and token >= 0 for token in ids):
        raise InputError(f"{where}: field {name!r} has an item that is no token id; expected integers >= 0")
    return None if ids is None else tuple(ids)


def _response(item: Any, where: str) -> Response:
    if not isinstance(item, dict):
        raise InputError(f"{where} is {kind_of(item)}; expected an object with 'model' and 'text'")
    scores = _get(item, "scores", where, dict, "an object of name: number") or {}
    model = _text(item, "model", where, required=True)
    text = _get(item, "text", where, str, "a string", required=True)
    assert model is not None
    finish_reason = _text(item, "finish_reason", where)
    if finish_reason not in (None, "stop", "length"):
        raise InputError(f"{where}: field 'finish_reason' is {finish_reason!r}; expected 'stop' or 'length'")
    return Response(
        model=model,
        text=text,
        size_b=_number(item, "size_b", where),
        version=_text(item, "version", where),
        version_rank=_get(item, "version_rank", where, int, "an integer"),
        sample=_get(item, "sample", where, int, "an integer") or 0,
        token_ids=_token_ids(item, "token_ids", where),
        finish_reason=finish_reason,  # type: ignore[arg-type]
        seed=_get(item, "seed", where, int, "an integer"),
        weight_hash=_text(item, "weight_hash", where),
        logprob=_number(item, "logprob", where),
        is_correct=_get(item, "is_correct", where, bool, "true or false"),
        scores={name: value for name in scores if (value := _number(scores, name, f"{where}, 'scores'")) is not None},
    )


def read_candidates(path: str | Path, bad: BadRows, settings: RowSettings | None = None) -> list[Candidates]:
    """Reads prompts or responses; ids are unique, and a file without a usable row is an error.

    Args:
        settings: names of fields and what happens to misspelt ones; None: the file is our own.
    """
    seen: dict[str, str] = {}
    forms = None if settings is None else Forms(str(path), settings)

    def parse(row: Row, where: str) -> Candidates:
        row = row if forms is None else forms.ours(row, where)
        candidates = parse_candidates(row, where, default_id=f"row-{number_of(where)}")
        if (first := seen.setdefault(candidates.prompt.id, where)) != where:
            raise InputError(f"{where}: field 'id' is {candidates.prompt.id!r}, as at {first}; expected unique ids")
        return candidates

    found = _read(path, parse, bad, "prompts")
    if forms is not None:
        forms.finish()
    return found


def _read(
    path: str | Path, parse: Callable[[Row, str], T], bad: BadRows, what: str, may_be_empty: bool = False
) -> list[T]:
    out, skipped = [], len(bad.rows)
    for where, row in read_rows(path, bad):
        try:
            out.append(parse(row, where))
        except InputError as error:
            bad.handle(error, row)
    if not out and not may_be_empty:
        errors = [row["error"] for row in bad.rows[skipped:]]
        skipped_too = f" ({len(errors)} bad rows were skipped, the first: {errors[0]})" if errors else ""
        raise InputError(f"{path}: holds no {what}{skipped_too}; expected at least one row")
    return out


def _no_none(row: Row) -> Row:
    return {key: value for key, value in row.items() if value is not None}


def prompt_row(prompt: Prompt) -> Row:
    value = prompt.prompt
    return _no_none(
        {
            "id": prompt.id,
            "prompt": value if isinstance(value, str) else [{"role": m.role, "content": m.content} for m in value],
            "human_response": list(humans) if len(humans := prompt.human_responses) > 1 else "".join(humans) or None,
            "answer": prompt.answer,
            "constraints": [{"id": c.id, "kwargs": dict(c.kwargs)} for c in prompt.constraints] or None,
            "prefix": list(prompt.prefix) or None,
        }
    )


def candidates_row(candidates: Candidates) -> Row:
    return {**prompt_row(candidates.prompt), "responses": [_response_row(r) for r in candidates.responses]}


def _response_row(response: Response) -> Row:
    row = {name: getattr(response, name) for name in response.__dataclass_fields__}
    row["token_ids"] = None if response.token_ids is None else list(response.token_ids)
    row["scores"] = dict(response.scores) or None
    del row["top_logprobs"]
    return _no_none(row)


def text_hash(text: str) -> str:
    """8 hex digits that tell the responses of a prompt apart."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def fields_of(kind: type) -> tuple[str, ...]:
    """The fields of a row that holds a record."""
    return tuple(kind.__dataclass_fields__)  # type: ignore[attr-defined]


def verdict_row(verdict: Verdict | Comparison) -> Row:
    row = {name: getattr(verdict, name) for name in verdict.__dataclass_fields__}
    if isinstance(verdict, Verdict):
        return row
    for name in ("responses", "orders", "hashes"):
        row[name] = None if row[name] is None else list(row[name])
    optional = ("orders", "annotator", "hashes")
    return {name: value for name, value in row.items() if value is not None or name not in optional}


def read_verdicts(
    path: str | Path,
    candidates: Iterable[Candidates],
    bad: BadRows,
    may_be_empty: bool = False,
    on_unknown_field: str = "ignore",
) -> list[Verdict | Comparison]:
    """Reads verdicts, on single responses and on two; each must name responses of ``candidates``.

    A judge gives one verdict on a response, and one on two of them, in either order; so does an annotator. A labels
    file, where later labels replace earlier ones and may be withdrawn, is read by ``files.labels.read_labels``.
    """
    texts, spelling = texts_of(candidates), Spelling(str(path), on_unknown_field)
    seen: dict[tuple[Any, ...], str] = {}

    def parse(row: Row, where: str) -> Verdict | Comparison:
        verdict = parse_verdict(row, where, texts)
        spelling.check(row, fields_of(type(verdict)), where)
        key: tuple[Any, ...] = (
            (verdict.prompt_id, verdict.response, verdict.judge)
            if isinstance(verdict, Verdict)
            else (verdict.prompt_id, frozenset(verdict.responses), verdict.judge, verdict.annotator)
        )
        if (first := seen.setdefault(key, where)) != where:
            annotator = None if isinstance(verdict, Verdict) else verdict.annotator
            who = f"judge {verdict.judge!r}" if annotator is None else f"annotator {annotator!r}"
            what = (
                f"response {verdict.response}"
                if isinstance(verdict, Verdict)
                else f"responses {list(verdict.responses)}"
            )
            raise InputError(
                f"{where}: {who} has a verdict on {what} of {verdict.prompt_id!r} already at {first}; expected one"
            )
        return verdict

    verdicts = _read(path, parse, bad, "verdicts", may_be_empty)
    spelling.finish()
    return verdicts


def texts_of(candidates: Iterable[Candidates]) -> dict[str, list[str]]:
    """The texts of the responses, by id of the prompt."""
    return {c.prompt.id: [r.text for r in c.responses] for c in candidates}


def parse_verdict(row: Row, where: str, texts: Mapping[str, Sequence[str]]) -> Verdict | Comparison:
    """A row of a verdicts file; ``texts`` are those of the responses, by id of the prompt."""
    prompt_id = _text(row, "prompt_id", where, required=True)
    assert prompt_id is not None
    if prompt_id not in texts:
        raise InputError(f"{where}: field 'prompt_id' is {prompt_id!r}; no such prompt among the responses")
    parse = _comparison if "responses" in row else _verdict
    return parse(row, where, prompt_id, texts[prompt_id])


def _verdict(row: Row, where: str, prompt_id: str, texts: Sequence[str]) -> Verdict:
    index = _get(row, "response", where, int, "the index of a response", required=True)
    judge = _text(row, "judge", where, required=True)
    assert judge is not None
    if not 0 <= index < len(texts):
        raise InputError(f"{where}: field 'response' is {index}; prompt {prompt_id!r} has {len(texts)} responses")
    if judge == HUMAN:
        raise InputError(
            f"{where}: field 'judge' is {HUMAN!r} in a verdict on one response; expected another name, since {HUMAN!r} "
            "is reserved for labels, which name two 'responses': rename the judge, or write labels"
        )
    if "score" not in row:
        raise _missing(row, "score", where, "a number, or null where the judge abstains")
    return Verdict(
        prompt_id=prompt_id,
        response=index,
        judge=judge,
        score=_number(row, "score", where),
        reason=_text(row, "reason", where) or "",
    )


def _comparison(row: Row, where: str, prompt_id: str, texts: Sequence[str]) -> Comparison:
    pair = _get(row, "responses", where, list, "the indices of two responses", required=True)
    if len(pair) != 2 or not all(type(i) is int and 0 <= i < len(texts) for i in pair) or pair[0] == pair[1]:
        raise InputError(
            f"{where}: field 'responses' is {json.dumps(pair)}; expected two different indices of the "
            f"{len(texts)} responses of prompt {prompt_id!r}"
        )
    judge = _text(row, "judge", where, required=True)
    assert judge is not None
    if "probability" not in row:
        raise _missing(
            row,
            "probability",
            where,
            "the probability in [0, 1] that the first response is better, or null where the judge abstains",
        )
    orders = _get(row, "orders", where, list, "two probabilities")
    if orders is not None:
        if len(orders) != 2:
            raise InputError(f"{where}: field 'orders' has {len(orders)} items; expected two probabilities or nulls")
        orders = tuple(_probability({"orders": item}, "orders", where) for item in orders)
    hashes = _get(row, "hashes", where, list, "the hashes of two texts")
    if hashes is not None and hashes != (found := [text_hash(texts[i]) for i in pair]):
        raise InputError(
            f"{where}: field 'hashes' is {json.dumps(hashes)}, but the responses {pair} of prompt "
            f"{prompt_id!r} have {json.dumps(found)}: it was said of other texts"
        )
    return Comparison(
        prompt_id=prompt_id,
        responses=(pair[0], pair[1]),
        judge=judge,
        probability=_probability(row, "probability", where),
        orders=orders,
        annotator=_text(row, "annotator", where),
        hashes=None if hashes is None else (hashes[0], hashes[1]),
        reason=_text(row, "reason", where) or "",
    )


def _probability(row: Row, name: str, where: str) -> float | None:
    value = _number(row, name, where)
    if value is not None and not 0 <= value <= 1:
        raise InputError(f"{where}: field {name!r} is {value}; expected a probability in [0, 1]")
    return value


_SIDE_FIELDS = ("model", "sample", "version_rank", "size_b", "finish_reason", "token_ids")
"""What a row of pairs knows of each of its responses beside the text, as ``chosen_model`` and alike."""
_WIN_RATES = "win_rate_chosen", "win_rate_rejected"


def pair_row(pair: PreferencePair) -> Row:
    """TRL's explicit conversational form, plus flat columns."""
    row: Row = {
        "prompt": [{"role": m.role, "content": m.content} for m in pair.prompt.messages],
        "chosen": [{"role": "assistant", "content": pair.chosen.text}],
        "rejected": [{"role": "assistant", "content": pair.rejected.text}],
        "score_chosen": pair.score_chosen,
        "score_rejected": pair.score_rejected,
        "margin": pair.margin,
        "scale": pair.scale,
        "soft_label": pair.soft_label,
        "prompt_id": pair.prompt.id,
        # Two pairs files load alike in TRL, but not alike here: a plain string prompt is not a chat of one message.
        "prompt_text": pair.prompt.prompt if isinstance(pair.prompt.prompt, str) else None,
        "answer": pair.prompt.answer,
        "prior": pair.prior,
        "decision": pair.decision,
        "reason": pair.reason,
        "probability": pair.probability,
    }
    for side, response in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        row |= {f"{side}_{name}": getattr(response, name) for name in _SIDE_FIELDS}
        row[f"{side}_token_ids"] = None if response.token_ids is None else list(response.token_ids)
    if pair.win_rates is not None:
        row |= dict(zip(_WIN_RATES, pair.win_rates, strict=True))
    if pair.extra:
        row["extra"] = [_response_row(response) for response in pair.extra]
    return row | ({"prefix": list(pair.prompt.prefix)} if pair.prompt.prefix else {})


def parse_pair(row: Row, where: str, default_id: str) -> PreferencePair:
    """A row of a pairs file, ours or any in TRL's explicit form (conversational or plain strings)."""
    prompt_value = _prompt_value({**row, "prompt": row.get("prompt_text") or row.get("prompt")}, where)
    prompt = Prompt(
        id=_text(row, "prompt_id", where) or default_id,
        prompt=prompt_value,
        answer=_text(row, "answer", where),
        prefix=_token_ids(row, "prefix", where) or (),
        where=where,
    )

    def side(name: str) -> Response:
        value = _get(row, name, where, (str, list), "a string or a list of one assistant message", required=True)
        if isinstance(value, list):
            messages = messages_of(value, where, name)
            if len(messages) != 1 or messages[0].role != "assistant":
                raise InputError(
                    f"{where}: field {name!r} has {len(messages)} messages; expected one assistant message"
                )
            value = messages[0].content
        item = {key: row[f"{name}_{key}"] for key in _SIDE_FIELDS if row.get(f"{name}_{key}") is not None}
        return _response({"model": name, **item, "text": value}, f"{where}: field {name!r}")

    def scalar(name: str, default: float, high: float) -> float:
        value = _number(row, name, where)
        if value is not None and not 0 <= value <= high:
            raise InputError(f"{where}: field {name!r} is {value}; expected a number in [0, {high:g}]")
        return default if value is None else value

    return PreferencePair(
        prompt=prompt,
        chosen=side("chosen"),
        rejected=side("rejected"),
        score_chosen=_number(row, "score_chosen", where),
        score_rejected=_number(row, "score_rejected", where),
        scale=scalar("scale", 1.0, math.inf),
        soft_label=scalar("soft_label", 1.0, 1.0),
        margin=scalar("margin", 0.0, math.inf),
        prior=_text(row, "prior", where) or "none",
        decision=_text(row, "decision", where) or "keep",  # type: ignore[arg-type]
        reason=_text(row, "reason", where) or "",
        probability=_probability(row, "probability", where),
        win_rates=_win_rates(row, where),
        extra=tuple(
            _response(item, f"{where}: field 'extra[{i}]'")
            for i, item in enumerate(_get(row, "extra", where, list, "a list of responses") or [])
        ),
    )


def _win_rates(row: Row, where: str) -> tuple[float, float] | None:
    chosen, rejected = (_probability(row, name, where) for name in _WIN_RATES)
    if (chosen is None) != (rejected is None):
        missing = _WIN_RATES[chosen is not None]
        raise InputError(f"{where}: field {missing!r} is missing; expected both of {' and '.join(_WIN_RATES)}, or none")
    return None if chosen is None or rejected is None else (chosen, rejected)


def read_pairs(path: str | Path, bad: BadRows) -> list[PreferencePair]:
    return _read(path, lambda row, where: parse_pair(row, where, f"row-{number_of(where)}"), bad, "pairs")
