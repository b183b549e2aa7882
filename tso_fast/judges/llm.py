"""The LLM judge: a cell of the matrix, or a model of its own, says which of two responses is better, or rates each.

    candidates -> questions -> answering.answer -> replies -> Judged: Comparison[] | Verdict[], Cost

Questions are prompts like any others: they run on any generator and executor, and what was asked once is in the
response store. Every comparison is asked for in both orders.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

from tso_fast.answering import answer, ask, warm_executor
from tso_fast.config.settings import AnsweringConfig, CellConfig, JudgeConfig
from tso_fast.errors import InputError, did_you_mean
from tso_fast.files.rows import BadRows, prompt_row
from tso_fast.judges import template as templates
from tso_fast.judges.judge import Bench, Cost, Judge, Judged
from tso_fast.judges.judgments import with_agreement
from tso_fast.judges.replies import Reading, read_label, read_logprobs, read_rating
from tso_fast.judges.template import Template
from tso_fast.matrix import ModelMatrix
from tso_fast.models.tokens import encode_prompt
from tso_fast.types import Candidates, Cell, Comparison, Prompt, Response, Verdict

logger = logging.getLogger(__name__)

TOP_LOGPROBS = 20
"""As many as vLLM tells unless it is told otherwise: room for A and B with and without white space."""
LABEL_TOKENS = 32
"""Most tokens of a reply that is a label, such as "The better response is B."; the rest would be paid for in vain."""


class LlmJudge(Judge):
    """Judge of kind ``llm``: a comparison of every pair that ``pairs`` wants, or a verdict on every response."""

    takes = (
        "cell",
        "model",
        "template",
        "role",
        "duties",
        "num_votes",
        "temperature",
        "max_completion_length",
        "trains",
        "pairs",
    )
    needs_models = shares_engines = True

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__(config)
        _check_settings(config)
        self.template = _load_template(config)

    def check(self, matrix: ModelMatrix | None) -> None:
        self.cell(matrix)

    def inputs(self, matrix: ModelMatrix) -> dict[str, str]:
        model = {"model": self.cell(matrix)[0].weight_hash} if self.config.model is not None else {}
        return model | templates.inputs(self.config.template, templates.FOLDER)

    def num_steps(self, candidates: Sequence[Candidates]) -> int:
        """Generations, those that it can do without included."""
        num_judged = [len(_judged(item, self.config, self.template)) for item in candidates]
        num_own = sum(map(bool, num_judged)) if "own" in self.template.placeholders else 0
        return num_own + sum(num_judged) * (2 if self.template.is_comparison else 1) * self.config.num_votes

    def judge(self, candidates: Sequence[Candidates], bench: Bench) -> Judged:
        """Comparisons or verdicts in the order of the candidates, and what they cost.

        Raises:
            InputError: a cell or model that cannot be used; a prompt that the judge cannot answer itself, where its
                template wants that.
            EngineError: engines died too often; what was answered is kept.
        """
        if bench.executor is None:  # one for its own answers and for the questions
            assert bench.settings is not None
            assert bench.store is not None
            with warm_executor(bench.settings, bench.store) as executor:
                return self.judge(candidates, dataclasses.replace(bench, executor=executor))
        config, template = self.config, self.template
        client = _Client(*self.cell(bench.matrix), bench)
        own = _own_answers(candidates, config, template, client, bench.bad) if "own" in template.placeholders else {}
        questions = self.questions(candidates, {number: answer.text for number, answer in own.items()})
        plan = [
            _planned(number, shown, item, own, questions)
            for number, item in enumerate(candidates)
            for shown in _judged(item, config, template)
        ]
        bench.advance(self.num_steps(candidates) - len(own) - len(questions) * config.num_votes)
        readings, unread, votes = _readings(questions, config, template, client)
        if config.trains:
            for judgments in _judgments(plan, candidates, questions, votes, self.name):
                bench.keep(judgments)
        results = [_result(planned, candidates, readings, self.name) for planned in plan]
        cost = _cost(self.name, results, client, unread)
        _warn(cost, results)
        return Judged(results, cost)

    def questions(self, candidates: Sequence[Candidates], own: Mapping[int, str]) -> _Questions:
        """The questions that can be asked of candidates, none added yet; ``own`` are the judge's own answers."""
        role = {"role": self.config.role or "", "duties": "\n".join(f"- {duty}" for duty in self.config.duties or ())}
        return _Questions(candidates, self.template, own, role)

    def cell(self, matrix: ModelMatrix | None) -> tuple[Cell, CellConfig | None, ModelMatrix]:
        """The cell that judges, how it was configured, and the matrix whose tokenizer it has."""
        config = self.config
        if config.model is not None:
            return self._own_matrix.policy, config.model, self._own_matrix
        if matrix is None:
            raise InputError(
                f"judge {self.name}: cell: got {config.cell!r}, but there are no cells; set cells, "
                "or give the judge a model of its own"
            )
        known = matrix.named
        if cell := known.get(config.cell or ""):
            return cell, matrix.configs.get(cell.name), matrix
        raise InputError(
            f"judge {self.name}: cell: no cell is called {config.cell!r}"
            f"{did_you_mean(config.cell or '', known)}; expected one of {', '.join(known)}"
        )

    @functools.cached_property
    def _own_matrix(self) -> ModelMatrix:
        assert self.config.model is not None
        try:
            return ModelMatrix([self.config.model])
        except InputError as error:
            raise InputError(f"judge {self.name}: model: {str(error).removeprefix('cells[0]: ')}") from error


def _check_settings(config: JudgeConfig) -> None:
    if (config.cell is None) == (config.model is None):
        given = "neither" if config.cell is None else "both"
        raise InputError(f"cell: got {given} of cell and model; a judge of kind 'llm' needs one of them")
    if config.num_votes > 1 and config.temperature == 0:
        raise InputError(
            f"num_votes: {config.num_votes} has no effect with temperature 0, which gives the same "
            "reply each time; set a temperature above 0 or leave it out"
        )
    if config.trains and config.cell != "policy":
        given = "a model of its own" if config.cell is None else f"cell {config.cell!r}"
        raise InputError(
            f"trains: got it with {given}, whose judgments are no samples of the policy; set cell to policy, or leave "
            "it out"
        )
    if config.trains and config.num_votes == 1:
        raise InputError("trains: one judgment has no other to be paired with; set num_votes to 2 or more")
    for key in ("num_generations", "temperature", "top_p", "top_k", "max_completion_length"):
        if config.model is not None and getattr(config.model, key) is not None:
            raise InputError(
                f"model.{key}: it has no effect on a judge, which replies by its own settings such "
                "as temperature and max_completion_length; leave it out"
            )


def _load_template(config: JudgeConfig) -> Template:
    template = templates.load(config.template)
    if config.pairs != "all" and not template.is_comparison:
        raise InputError(
            f"pairs: {config.pairs!r} has no effect with template {config.template!r}, which rates single "
            "responses; leave it out"
        )
    for key in ("role", "duties"):
        if (key in template.placeholders) != bool(getattr(config, key)):
            raise InputError(
                f"{key}: got {getattr(config, key)!r} with template {config.template!r}; a template with {{{key}}} "
                "needs it, and another one makes no use of it"
            )
    return template


def baseline(responses: Sequence[Response]) -> int:
    """The middle one in the matrix's order (human, version, size, place), of an even number the lower one.

    Every response against it takes R - 1 comparisons instead of R (R - 1) / 2 (OSP, arXiv 2405.14103); a middle one
    rather than the best or the worst, so that both sides of it are told apart.
    """
    unknown = -math.inf

    def rank(i: int) -> tuple[bool, float, float]:
        r = responses[i]
        version = unknown if r.version_rank is None else r.version_rank
        return r.is_human, version, unknown if r.size_b is None else r.size_b

    return sorted(range(len(responses)), key=rank)[(len(responses) - 1) // 2]


def of_both_orders(orders: tuple[Reading, Reading]) -> Reading:
    """The probability that the first response is better, from those said with it shown first and shown second."""
    (first, why_first), (second, why_second) = orders
    if first is None or second is None:
        return None, why_first if first is None else why_second
    if (first - 0.5) * (second - 0.5) < 0:
        return 0.5, "orders disagree"
    return (first + second) / 2, ""


# ---- details


def _judged(item: Candidates, config: JudgeConfig, template: Template) -> list[tuple[int, ...]]:
    """What is judged of a prompt: single responses or pairs of them, by number."""
    count = len(item.responses)
    if not template.is_comparison:
        return [(i,) for i in range(count)]
    if config.pairs == "all" or count < 2:
        return list(itertools.combinations(range(count), 2))
    middle = baseline(item.responses)
    return [(min(i, middle), max(i, middle)) for i in range(count) if i != middle]


@dataclass(frozen=True)
class _Planned:
    """One result to be: responses of the candidates of that number, and the questions to read it from."""

    number: int
    responses: tuple[int, ...]
    questions: tuple[int, ...]
    known: Reading | None = None
    """What is known without a question."""


@dataclass(frozen=True)
class _OwnAnswer:
    text: str
    why_none: str = ""
    """Why there is none, where there is none."""


def _planned(
    number: int, shown: tuple[int, ...], item: Candidates, own: Mapping[int, _OwnAnswer], questions: _Questions
) -> _Planned:
    if number in own and own[number].why_none:
        return _Planned(number, shown, (), (None, own[number].why_none))
    if len(shown) == 2 and len({item.responses[i].text for i in shown}) == 1:
        return _Planned(number, shown, (), (0.5, "the same text"))
    orders = (shown, shown[::-1]) if len(shown) == 2 else (shown,)
    return _Planned(number, shown, tuple(questions.add(number, order) for order in orders))


class _Questions(Sequence[Candidates]):
    """Distinct prompts to the judge, written when they are read: all their texts at once would fill the memory.

    A prompt's id is the hash of its text: it is asked once, whatever responses and iterations it comes from.
    """

    def __init__(
        self,
        candidates: Sequence[Candidates],
        template: Template,
        own: Mapping[int, str],
        role: Mapping[str, str],
    ) -> None:
        self._candidates, self._template, self._own, self._role = candidates, template, own, role
        self._shown: list[tuple[int, tuple[int, ...]]] = []
        self.numbers: dict[str, int] = {}
        """Numbers of the questions by their ids."""

    def add(self, number: int, shown: tuple[int, ...]) -> int:
        """The number of the question about these responses, in this order."""
        name = _text_id(self.about(number, shown))
        if name not in self.numbers:
            self.numbers[name] = len(self._shown)
            self._shown.append((number, shown))
        return self.numbers[name]

    def about(self, number: int, shown: tuple[int, ...]) -> str:
        """The text of a question about some responses of the candidates of that number, in this order."""
        item = self._candidates[number]
        names = ("first", "second") if self._template.is_comparison else ("response",)
        texts = {name: item.responses[i].text for name, i in zip(names, shown, strict=True)}
        return self._template.render(prompt=item.prompt.text, own=self._own.get(number, ""), **self._role, **texts)

    def __len__(self) -> int:
        return len(self._shown)

    @overload
    def __getitem__(self, number: int) -> Candidates: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Candidates]: ...
    def __getitem__(self, number: int | slice) -> Candidates | Sequence[Candidates]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        text = self.about(*self._shown[number])
        return Candidates(prompt=Prompt(id=_text_id(text), prompt=text), responses=())


def _text_id(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


class _Client:
    """Asks the judge's cell, and counts."""

    def __init__(self, cell: Cell, own: CellConfig | None, matrix: ModelMatrix, bench: Bench) -> None:
        assert bench.settings is not None
        assert bench.store is not None
        self.cell, self.own, self.matrix, self.store, self.advance = cell, own, matrix, bench.store, bench.advance
        self.executor = bench.executor
        is_own_server = own is not None and own.url is not None
        self.settings = dataclasses.replace(bench.settings, generator="openai") if is_own_server else bench.settings
        self.requests = self.new_requests = self.refused = self.prompt_tokens = self.completion_tokens = 0
        self.decode = functools.lru_cache(maxsize=4096)(lambda token: str(self.matrix.tokenizer.decode([token])))

    def ask(
        self, asked: Sequence[Candidates], settings: AnsweringConfig, top_logprobs: int = 0
    ) -> tuple[Iterable[Candidates], dict[str, str]]:
        """Those that were answered, and by id why the others were not."""
        bare = ask(self.cell, settings, self.own, settings.num_generations, is_own_sampling=False)
        sampling = dataclasses.replace(bare.sampling, top_logprobs=top_logprobs)
        refused, before = BadRows("skip"), len(self.store)
        answered = answer(
            [dataclasses.replace(bare, sampling=sampling)],
            asked,
            self.matrix,
            settings,
            self.store,
            refused,
            self.advance,
            self.executor,
        )
        self.new_requests += len(self.store) - before
        self.requests += len(asked) * settings.num_generations
        self.refused += len(refused.rows) * settings.num_generations
        why = {row["row"]["id"]: row["error"].partition(" was refused: ")[2] or row["error"] for row in refused.rows}
        return map(self._count, answered), why

    def _count(self, item: Candidates) -> Candidates:
        self.prompt_tokens += len(encode_prompt(self.matrix.tokenizer, item.prompt)) * len(item.responses)
        self.completion_tokens += sum(len(response.token_ids or ()) for response in item.responses)
        return item


def _own_answers(
    candidates: Sequence[Candidates], config: JudgeConfig, template: Template, client: _Client, bad: BadRows
) -> dict[int, _OwnAnswer]:
    """The judge's greedy answer to each prompt of which something is judged."""
    out: dict[int, _OwnAnswer] = {}
    asked: dict[int, Candidates] = {}
    for number, item in enumerate(candidates):
        if _judged(item, config, template):
            try:
                encode_prompt(client.matrix.tokenizer, item.prompt)
                asked[number] = dataclasses.replace(item, responses=())
            except InputError as error:
                bad.handle(error, prompt_row(item.prompt))
                out[number] = _OwnAnswer("", str(error))
    client.advance(len(out))
    greedy = dataclasses.replace(client.settings, num_generations=1, temperature=0.0, top_p=1.0, top_k=0)
    answered, refused = client.ask(list(asked.values()), greedy)
    texts = {item.prompt.id: item.responses[0].text for item in answered}
    for number, item in asked.items():
        name = item.prompt.id
        out[number] = (
            _OwnAnswer("", f"no answer of its own: {refused[name]}") if name in refused else _OwnAnswer(texts[name])
        )
    return out


def _readings(
    questions: _Questions, config: JudgeConfig, template: Template, client: _Client
) -> tuple[list[Reading], int, dict[int, _Votes]]:
    """What was said to each question, how many replies said nothing, and, if they are wanted, the replies."""
    most = config.max_completion_length
    settings = dataclasses.replace(
        client.settings,
        num_generations=config.num_votes,
        temperature=config.temperature,
        top_p=1.0,
        top_k=0,
        stop=None,
        max_completion_length=min(most, LABEL_TOKENS) if template.read == "label" else most,
    )
    # With a temperature the votes are samples of just that probability.
    uses_logprobs = template.read == "label" and config.temperature == 0
    answered, refused = client.ask(questions, settings, TOP_LOGPROBS if uses_logprobs else 0)
    readings: list[Reading] = [(None, "not answered")] * len(questions)
    kept: dict[int, _Votes] = {}
    unread = 0
    for item in answered:
        votes = [_read(response, template, client) for response in item.responses]
        told = [value for value, _ in votes if value is not None]
        unread += len(votes) - len(told)
        number = questions.numbers[item.prompt.id]
        readings[number] = (sum(told) / len(told), "") if told else votes[0]
        if config.trains:
            kept[number] = _Votes(item.responses, [value for value, _ in votes])
    for name, reason in refused.items():
        readings[questions.numbers[name]] = (None, reason)
    return readings, unread, kept


class _Votes(NamedTuple):
    """The replies to one question, and what each says."""

    replies: tuple[Response, ...]
    values: list[float | None]


def _judgments(
    plan: Iterable[_Planned],
    candidates: Sequence[Candidates],
    questions: _Questions,
    votes: Mapping[int, _Votes],
    name: str,
) -> Iterable[Candidates]:
    """Questions with judgments that can be told apart, in the order of the plan, each once."""
    seen: set[int] = set()
    for planned in plan:
        asked, told = [], []
        for number, shown in zip(planned.questions, (planned.responses, planned.responses[::-1]), strict=False):
            if number in votes and number not in seen:
                seen.add(number)
                about = "-".join(map(str, shown))
                prompt_id = f"{candidates[planned.number].prompt.id}/{name}-{about}"
                prompt = dataclasses.replace(questions[number].prompt, id=prompt_id)
                asked.append(Candidates(prompt=prompt, responses=votes[number].replies))
                turned = shown != planned.responses
                told.append([1 - v if turned and v is not None else v for v in votes[number].values])
        yield from with_agreement(asked, told)


def _read(response: Response, template: Template, client: _Client) -> Reading:
    if response.top_logprobs is not None:
        probability = read_logprobs(response.top_logprobs, client.decode)
        if probability is not None:
            return probability, ""
    if template.is_comparison:
        value, reason = read_label(response.text)
    else:
        value, reason = read_rating(response.text, template.low, template.high)
    if value is None and response.finish_reason == "length":
        reason += f", which was cut after {len(response.token_ids or ())} tokens"
    return value, reason


def _result(
    planned: _Planned, candidates: Sequence[Candidates], readings: Sequence[Reading], name: str
) -> Verdict | Comparison:
    prompt_id = candidates[planned.number].prompt.id
    said = [readings[question] for question in planned.questions]
    if len(planned.responses) == 1:
        score, reason = planned.known or said[0]
        return Verdict(prompt_id=prompt_id, response=planned.responses[0], judge=name, score=score, reason=reason)
    orders: tuple[float | None, float | None] | None = None
    if planned.known is not None:
        probability, reason = planned.known
    else:
        # Shown second, the first response is called B.
        second = None if said[1][0] is None else 1 - said[1][0]
        orders = (said[0][0], second)
        probability, reason = of_both_orders((said[0], (second, said[1][1])))
    first, other = planned.responses
    return Comparison(
        prompt_id=prompt_id,
        responses=(first, other),
        judge=name,
        probability=probability,
        orders=orders,
        reason=reason,
    )


def _cost(name: str, results: Sequence[Verdict | Comparison], client: _Client, unread: int) -> Cost:
    orders = [r.orders for r in results if isinstance(r, Comparison) and r.orders is not None]
    decided = [(a, b) for a, b in orders if a is not None and b is not None and a != 0.5 and b != 0.5]
    return Cost(
        judge=name,
        results=len(results),
        abstentions=sum(_value(result) is None for result in results),
        requests=client.requests,
        new_requests=client.new_requests,
        prompt_tokens=client.prompt_tokens,
        completion_tokens=client.completion_tokens,
        refused=client.refused,
        unread=unread,
        decided=len(decided),
        disagreements=sum((a > 0.5) != (b > 0.5) for a, b in decided),
        first_shown=sum((a > 0.5) + (b < 0.5) for a, b in decided),
    )


def _value(result: Verdict | Comparison) -> float | None:
    return result.probability if isinstance(result, Comparison) else result.score


def _warn(cost: Cost, results: Sequence[Verdict | Comparison]) -> None:
    if cost.bias is not None:
        logger.warning("%s", cost.bias)
    if 2 * cost.abstentions > cost.results:
        (reason, count), *_ = Counter(r.reason for r in results if _value(r) is None).most_common(1)
        logger.warning(
            "judge %s abstains on %d of %d; %d times for: %s", cost.judge, cost.abstentions, cost.results, count, reason
        )
