"""The LLM judge: planted judges behind a real server, and real models, from candidates to comparisons and back."""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
import re
import shutil
import signal
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import fork, status_of, write_rows
from test_openai_server import FakeServer, Handler
from tiny_cells import TOKENIZER, check_digits, digits, judge_digits, make_judge
from transformers import LlamaConfig, LlamaForCausalLM

from tso_fast.config.checks import check
from tso_fast.config.settings import AnsweringConfig, CellConfig, JudgeConfig, JudgesConfig, PairsConfig
from tso_fast.errors import InputError
from tso_fast.files.responses import ResponseStore
from tso_fast.files.rows import BadRows, read_verdicts, verdict_row
from tso_fast.judges import panel, replies, template
from tso_fast.judges.judge import Bench, Cost
from tso_fast.judges.llm import LlmJudge, baseline, of_both_orders
from tso_fast.judges.replies import read_label, read_logprobs, read_rating
from tso_fast.matrix import ModelMatrix
from tso_fast.quickstart.build import Recipe, make_tokenizer
from tso_fast.types import HUMAN, Candidates, Message, Prompt, Response

CONTEXT = 1600
Say = Callable[[str], str]


def save_model(model: Any, folder: Path, tokenizer: Any = TOKENIZER) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_model(tokenizer: Any = TOKENIZER, context: int = CONTEXT) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(  # a head of 32: vLLM's attention on CPUs takes multiples of it
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=context,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
        )
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose words do not count: the server speaks for it."""
    return save_model(tiny_model(), tmp_path_factory.mktemp("cells") / "judge")


def additions(n: int) -> list[Candidates]:
    """Each with its right answer at another place among two wrong ones, the last of which is long."""
    out = []
    for i in range(n):
        texts = [str(i + 7), str(i + 1), f"It is {i + 2}, after all that I know of numbers."]
        texts[0], texts[i % 3] = texts[i % 3], texts[0]
        responses = tuple(Response(model=f"m{j}", text=text) for j, text in enumerate(texts))
        out.append(Candidates(prompt=Prompt(id=f"q{i}", prompt=f"What is {i} plus 7?"), responses=responses))
    return out


def is_right(item: Candidates, i: int) -> bool:
    return int(item.prompt.id[1:]) + 7 == int(item.responses[i].text) if item.responses[i].text.isdigit() else False


def run(
    candidates: list[Candidates],
    config: JudgeConfig,
    store: Path,
    matrix: Any = None,
    bad: BadRows | None = None,
    keep: Callable[[Candidates], None] = lambda judgments: None,
    **settings: Any,
) -> tuple[list[Any], Cost]:
    given = {"use_cpu": True, "engine_timeout_s": 60.0, "max_completion_length": 8, **settings}
    (judge,) = panel.make_judges(JudgesConfig(judges=[config]))
    judge.check(matrix)
    progress: list[int] = []
    with ResponseStore(store) as opened:
        answering = AnsweringConfig(**given)
        bench = Bench(
            bad=bad or BadRows(), settings=answering, store=opened, matrix=matrix, advance=progress.append, keep=keep
        )
        out, cost = judge.judge(candidates, bench)
    assert sum(progress) == judge.num_steps(candidates)
    assert cost is not None
    assert cost.results == len(out)
    return list(out), cost


# ----------------------------------------------------------------------------------------------- planted judges


def answers(say: Say, logprobs: dict[str, float] | None = None) -> Any:
    """A reply to the text of the request, as tokens; ``logprobs`` by what is said, of the first token."""

    def reply(handler: Handler, body: dict[str, Any]) -> None:
        said = say(TOKENIZER.decode(body["prompt"]))
        ids = [*TOKENIZER.encode(said, add_special_tokens=False), TOKENIZER.eos_token_id][: body["max_tokens"]]
        reason = "stop" if ids[-1] == TOKENIZER.eos_token_id else "length"
        told = None
        if logprobs is not None:
            top = {"A": logprobs["other"], "B": logprobs["other"], "?": -9.0}
            top[said if said in top else "x"] = logprobs["said"]
            told = {"token_logprobs": [0.0] * len(ids), "top_logprobs": [top] + [None] * (len(ids) - 1)}
        text = TOKENIZER.decode(ids, skip_special_tokens=True)
        handler.send(
            200,
            {
                "choices": [
                    {
                        "text": text,
                        "finish_reason": reason,
                        "token_ids": ids,
                        "logprobs": told,
                        "prompt_token_ids": body["prompt"],
                    }
                ]
            },
        )

    return reply


class JudgesServer(FakeServer):
    request_queue_size = 256
    """All connections of an engine at once: where only five may wait, the others are tried again after a second."""


@pytest.fixture
def server() -> Iterator[FakeServer]:
    made = JudgesServer(models=("judge",))
    yield made
    made.close()


def part(text: str, name: str) -> str:
    """What the templates put between two marks."""
    found = re.search(rf"\[{name}\]\n(.*)\n\[End of {name[0].lower()}{name[1:]}\]", text, re.DOTALL)
    assert found is not None, text
    return found[1]


def better(text: str) -> str | None:
    """The right one of A and B, None: neither is."""
    number = re.search(r"What is (\d+) plus 7", part(text, "Prompt"))
    assert number is not None
    for label in "AB":
        if part(text, f"Response {label}") == str(int(number[1]) + 7):
            return label
    return None


def good(text: str) -> str:
    return better(text) or "[[C]]"


def random_label(text: str) -> str:
    return random.Random(text).choice("AB")


def longer(text: str) -> str:
    return "A" if len(part(text, "Response A")) > len(part(text, "Response B")) else "B"


def odd(text: str) -> str:
    label = good(text)
    if "C" in label:
        return "None. [[ tie ]]"
    return random.Random(text).choice(
        [
            f"**{label}**",
            label.lower(),
            f"\n  {label}. \n",
            f"Answer: {label}",
            f"({label})",
            f"[[{label}]]",
            f"Response {label} is better.",
            f"The better response is {label}",
        ]
    )


def reasoned(text: str) -> str:
    return (
        f"I would say [[A]] or [[B]], and [[C]] for a tie.\nOne of them is wrong.\n\nSo: **[[{better(text) or 'C'}]]**"
    )


def llm_config(folder: Path, server: FakeServer, **options: Any) -> JudgeConfig:
    return JudgeConfig(kind="llm", model=CellConfig(path=str(folder), url=server.url), **options)


def check_good(out: list[Any], candidates: list[Candidates]) -> None:
    by_id = {item.prompt.id: item for item in candidates}
    assert [(c.prompt_id, c.responses) for c in out] == [
        (item.prompt.id, pair) for item in candidates for pair in ((0, 1), (0, 2), (1, 2))
    ]
    for c in out:
        first, second = (is_right(by_id[c.prompt_id], i) for i in c.responses)
        want = 0.5 + 0.5 * (first - second)
        assert c.probability == pytest.approx(want, abs=0.02), c
        assert c.orders == pytest.approx((want, want), abs=0.02)
        assert c.judge == "llm"


@pytest.mark.slow
def test_a_judge_whose_weights_only_the_server_has(folder: Path, server: FakeServer, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors")))
    server.reply = answers(good)
    candidates = additions(4)
    model = CellConfig(path=str(bare), url=server.url, size_b=70.0, served_name=folder.name)
    out, cost = run(candidates, JudgeConfig(kind="llm", model=model), tmp_path)
    check_good(out, candidates)
    assert cost.requests == len(server.asked) == 24


@pytest.mark.parametrize("say", [good, odd])
@pytest.mark.slow
def test_a_good_judge_is_right_whichever_side_the_answer_is_on(
    say: Say, folder: Path, server: FakeServer, tmp_path: Path
) -> None:
    server.reply = answers(say)
    candidates = additions(24)
    out, cost = run(candidates, llm_config(folder, server), tmp_path)
    check_good(out, candidates)
    assert {c.probability for c in out} == {0.0, 0.5, 1.0}  # read from texts
    assert (cost.results, cost.abstentions, cost.refused, cost.unread) == (72, 0, 0, 0)
    assert (cost.requests, cost.new_requests, len(server.asked)) == (144, 144, 144)
    assert (cost.decided, cost.disagreements, cost.first_shown, cost.first_shown_share) == (48, 0, 48, 0.5)
    assert cost.prompt_tokens == sum(len(body["prompt"]) for body in server.asked)
    assert {body["max_tokens"] for body in server.asked} == {32}
    # Both orders, the responses themselves in their places.
    shown = {
        (part(t, "Prompt"), part(t, "Response A"), part(t, "Response B"))
        for t in (TOKENIZER.decode(body["prompt"]) for body in server.asked)
    }
    assert shown == {
        (item.prompt.prompt, a.text, b.text)
        for item in candidates
        for a in item.responses
        for b in item.responses
        if a is not b
    }


@pytest.mark.slow
def test_a_verdict_after_reasons(folder: Path, server: FakeServer, tmp_path: Path) -> None:
    server.reply = answers(reasoned)
    candidates = additions(6)
    out, cost = run(candidates, llm_config(folder, server, template="pairwise_reasoned"), tmp_path)
    check_good(out, candidates)
    assert {body["max_tokens"] for body in server.asked} == {256}
    assert {body["logprobs"] for body in server.asked} == {0}
    server.reply = answers(lambda text: "One of them is wrong, " * 20 + good(text))
    out, cost = run(
        candidates, llm_config(folder, server, template="pairwise_reasoned", max_completion_length=30), tmp_path / "cut"
    )
    assert cost.abstentions == 18
    assert out[0].reason.endswith(", which was cut after 30 tokens")


@pytest.mark.slow
def test_how_sure_a_judge_is(folder: Path, server: FakeServer, tmp_path: Path) -> None:
    server.reply = answers(lambda text: better(text) or "A", {"said": -0.2, "other": -1.8})
    out, cost = run(additions(6), llm_config(folder, server), tmp_path)
    sure = 1 / (1 + 2.718281828459045 ** (-1.8 + 0.2))
    by_id = {item.prompt.id: item for item in additions(6)}
    for c in out:
        first, second = (is_right(by_id[c.prompt_id], i) for i in c.responses)
        if first == second:  # always A
            assert (c.probability, c.reason) == (0.5, "orders disagree")
            assert c.orders == pytest.approx((sure, 1 - sure))
        else:
            assert c.probability == pytest.approx(sure if first else 1 - sure)
            assert c.orders == pytest.approx((c.probability, c.probability))
    assert {body["logprobs"] for body in server.asked} == {5}
    assert (cost.decided, cost.disagreements, cost.first_shown) == (18, 6, 24)


@pytest.mark.parametrize(
    ("say", "logprobs", "share"),
    [
        (lambda text: "A", None, 1.0),
        (lambda text: "B", None, 0.0),
        (lambda text: "A", {"said": -0.1, "other": -3.0}, 1.0),
    ],
    ids=["A", "B", "A with log-probs"],
)
@pytest.mark.slow
def test_a_position_bias_gives_ties_and_a_warning(
    say: Say,
    logprobs: Any,
    share: float,
    folder: Path,
    server: FakeServer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server.reply = answers(say, logprobs)
    out, cost = run(additions(20), llm_config(folder, server), tmp_path)
    assert {(c.probability, c.reason) for c in out} == {(0.5, "orders disagree")}
    assert (cost.abstentions, cost.decided, cost.disagreements) == (0, 60, 60)
    assert (cost.disagreement, cost.first_shown_share) == (1.0, share)
    assert (
        "judge llm contradicts itself between the two orders in 60 of 60 decided comparisons (100 %), which count "
        f"as ties; it prefers the response shown first in {100 * share:.0f} %"
    ) in caplog.text


@pytest.mark.slow
def test_a_judge_at_random(folder: Path, server: FakeServer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server.reply = answers(random_label)
    out, cost = run(additions(40), llm_config(folder, server, name="coin"), tmp_path)
    assert 0.35 < (cost.disagreement or 0) < 0.65
    assert 0.4 < (cost.first_shown_share or 0) < 0.6
    assert sum(c.probability == 0.5 for c in out) == cost.disagreements
    assert "judge coin contradicts itself" in caplog.text
    assert {c.judge for c in out} == {"coin"}


@pytest.mark.slow
def test_a_judge_that_loves_length_is_consistent(
    folder: Path, server: FakeServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.reply = answers(longer)
    candidates = [dataclasses.replace(item, responses=item.responses[:2]) for item in additions(30)]
    out, cost = run(candidates, llm_config(folder, server), tmp_path)
    for c, item in zip(out, candidates, strict=True):
        lengths = [len(r.text) for r in item.responses]
        assert c.probability == (0.5 if lengths[0] == lengths[1] else float(lengths[0] > lengths[1]))
    assert cost.disagreements == sum(len({len(r.text) for r in item.responses}) == 1 for item in candidates)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("", "an empty reply"),
        ("Both have merits.", "no verdict in 'Both have merits.'"),
        ("[[A]] [[B]]", "two verdicts in '[[A]] [[B]]'"),
    ],
)
@pytest.mark.slow
def test_what_says_nothing_is_an_abstention(
    said: str, reason: str, folder: Path, server: FakeServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.reply = answers(lambda text: said)
    out, cost = run(additions(3), llm_config(folder, server), tmp_path)
    assert {(c.probability, c.orders, c.reason) for c in out} == {(None, (None, None), reason)}
    assert (cost.abstentions, cost.unread, cost.decided, cost.first_shown_share) == (9, 18, 0, None)
    assert f"judge llm abstains on 9 of 9; 9 times for: {reason}" in caplog.text


@pytest.mark.slow
def test_log_probs_of_something_else_than_a_label_are_not_read(
    folder: Path, server: FakeServer, tmp_path: Path
) -> None:
    server.reply = answers(lambda text: "Both", {"said": -0.5, "other": -2.0})
    out, cost = run(additions(2), llm_config(folder, server), tmp_path / "a")
    assert {(c.probability, c.reason) for c in out} == {(None, "no verdict in 'Both'")}
    server.reply = answers(lambda text: f"**{better(text) or 'A'}**", {"said": -0.5, "other": -2.0})
    out, cost = run(additions(2), llm_config(folder, server), tmp_path / "b")
    assert (cost.abstentions, {c.probability for c in out}) == (0, {0.0, 0.5, 1.0})  # from the text


def test_one_order_without_a_verdict_is_an_abstention(folder: Path, server: FakeServer, tmp_path: Path) -> None:
    candidates = [dataclasses.replace(item, responses=item.responses[:2]) for item in additions(3)]
    server.reply = answers(lambda text: good(text) if good(text) == "A" else "hm")
    out, cost = run(candidates, llm_config(folder, server), tmp_path)
    told = [(c.probability, c.orders) for c in out]
    assert told == [(None, (1.0, None)), (None, (None, 0.0)), (None, (None, None))]
    assert {c.reason for c in out} == {"no verdict in 'hm'"}
    assert (cost.abstentions, cost.unread) == (3, 4)


@pytest.mark.slow
def test_votes_are_counted(folder: Path, server: FakeServer, tmp_path: Path) -> None:
    said = {0: "A", 1: "A", 2: "hm", 3: "B"}
    seen: dict[str, int] = {}

    def vote(text: str) -> str:
        with server.lock:
            seen[text] = seen.get(text, -1) + 1
            number = seen[text]
        return said[number] if better(text) == "A" else {**said, 1: "B", 0: "B"}[number]

    server.reply = answers(vote)
    candidates = [dataclasses.replace(item, responses=item.responses[:2]) for item in additions(2)]
    out, cost = run(candidates, llm_config(folder, server, num_votes=4, temperature=0.7), tmp_path)
    assert [c.orders for c in out] == [pytest.approx((2 / 3, 1.0)), pytest.approx((0.0, 1 / 3))]
    assert [c.probability for c in out] == [pytest.approx(5 / 6), pytest.approx(1 / 6)]
    assert (cost.requests, len(server.asked), cost.unread) == (16, 16, 4)
    assert len({body["seed"] for body in server.asked}) == 16
    assert {(body["temperature"], body["logprobs"]) for body in server.asked} == {(0.7, 0)}


@pytest.mark.slow
def test_judgments_are_kept_with_what_was_asked(folder: Path, server: FakeServer, tmp_path: Path) -> None:
    """The majority of both orders prefers the right response, whichever letter it has; who says nothing is left out."""
    seen: dict[str, int] = {}

    def vote(text: str) -> str:
        with server.lock:
            seen[text] = seen.get(text, -1) + 1
            number = seen[text]
        return ["A", "hm", "A", "B"][number] if better(text) == "A" else "B"

    server.reply = answers(vote)
    (item,) = additions(1)
    item = dataclasses.replace(item, responses=item.responses[:2])
    matrix = ModelMatrix([CellConfig(path=str(folder), url=server.url)])
    config = JudgeConfig(kind="llm", cell="policy", num_votes=4, temperature=0.7, trains=True)
    kept: list[Candidates] = []
    twice = [item, dataclasses.replace(item, prompt=dataclasses.replace(item.prompt, id="again"))]
    run(twice, config, tmp_path, matrix, keep=kept.append)
    (judgments,) = kept  # in the other order all agree; the second prompt is asked the same
    assert judgments.prompt.id == "q0/llm-0-1"
    assert part(judgments.prompt.text, "Response A") == "7"
    assert sorted((r.text, r.scores["majority"]) for r in judgments.responses) == [("A", 1.0), ("A", 1.0), ("B", 0.0)]
    assert all(r.token_ids for r in judgments.responses)


@pytest.mark.slow
def test_nothing_is_asked_twice(folder: Path, server: FakeServer, tmp_path: Path) -> None:
    server.reply = answers(good)
    candidates = additions(8)
    first, cost = run(candidates, llm_config(folder, server), tmp_path)
    again, cost_again = run(candidates, llm_config(folder, server), tmp_path)
    assert again == first
    assert cost_again == dataclasses.replace(cost, new_requests=0)
    assert len(server.asked) == 48
    # Nor are the same texts under other names, in another order, beside others.
    more = [
        dataclasses.replace(
            item,
            prompt=dataclasses.replace(item.prompt, id=f"q{i}"),
            responses=(*item.responses[::-1], item.responses[0]),
        )
        for i, item in enumerate(candidates)
    ]
    out, _ = run(more, llm_config(folder, server, name="again"), tmp_path)
    assert len(server.asked) == 48
    same = [c for c in out if c.responses == (2, 3)]
    assert {(c.probability, c.orders, c.reason) for c in same} == {(0.5, None, "the same text")}
    assert [c.probability for c in out if c.responses == (1, 2)] == [
        1 - c.probability for c in first if c.responses == (0, 1)
    ]


def test_every_response_against_a_middle_one(folder: Path, server: FakeServer, tmp_path: Path) -> None:
    server.reply = answers(good)
    ranks = [(3, 1.0), (1, 1.0), (2, 1.0)]
    candidates = [
        dataclasses.replace(
            item,
            responses=tuple(
                dataclasses.replace(r, version_rank=v, size_b=s)
                for r, (v, s) in zip(item.responses, ranks, strict=True)
            ),
        )
        for item in additions(4)
    ]
    out, cost = run(candidates, llm_config(folder, server, pairs="baseline"), tmp_path)
    assert [c.responses for c in out] == [(0, 2), (1, 2)] * 4
    assert cost.requests == 16


def test_which_one_is_the_middle() -> None:
    def made(*items: tuple[str, int | None, float | None]) -> list[Response]:
        return [Response(model=m, text="", version_rank=v, size_b=s) for m, v, s in items]

    assert baseline(made(("m", 1, 1.0), ("m", 2, 1.0), ("m", 3, 1.0))) == 1
    assert baseline(made((HUMAN, None, None), ("m", 1, 2.0), ("m", 1, 1.0))) == 1
    assert baseline(made(("m", 2, 1.0), ("m", 1, 1.0), ("m", 1, 2.0), (HUMAN, None, None))) == 2
    assert baseline(made(("m", None, None))) == 0
    assert baseline(made(("m", None, None), ("m", None, None), ("m", None, None))) == 1


def test_ratings(folder: Path, server: FakeServer, tmp_path: Path) -> None:
    def rate(text: str) -> str:
        number = re.search(r"What is (\d+) plus 7", text)
        assert number is not None
        response = part(text, "Response")
        if not response.isdigit():
            return "Rating: 11"
        return "It is right.\n[[9]]" if int(response) == int(number[1]) + 7 else "Wrong. Rating: **2**/10"

    server.reply = answers(rate)
    candidates = additions(6)
    out, cost = run(candidates, llm_config(folder, server, template="pointwise"), tmp_path)
    assert [(v.prompt_id, v.response) for v in out] == [(f"q{i}", j) for i in range(6) for j in range(3)]
    for v in out:
        item = candidates[int(v.prompt_id[1:])]
        is_number = item.responses[v.response].text.isdigit()
        assert v.score == ((9.0 if is_right(item, v.response) else 2.0) if is_number else None)
        assert v.reason == ("" if is_number else "a rating outside 1 to 10 in 'Rating: 11'")
    assert (cost.results, cost.abstentions, cost.unread, cost.requests, cost.decided) == (18, 6, 6, 18, 0)
    with pytest.raises(InputError, match="pairs: 'baseline' has no effect with template 'pointwise'"):
        run(candidates, llm_config(folder, server, template="pointwise", pairs="baseline"), tmp_path)


@pytest.mark.slow
def test_its_own_answer_is_the_reference(folder: Path, server: FakeServer, tmp_path: Path) -> None:
    def say(text: str) -> str:
        if "[Response A]" not in text:
            number = re.search(r"What is (\d+) plus 7", text)
            assert number is not None
            return str(int(number[1]) + 7)
        own = part(text, "Your own answer")
        right = [label for label in "AB" if part(text, f"Response {label}") == own]
        return f"As I said, {own}.\n[[{right[0] if right else 'C'}]]"

    server.reply = answers(say)
    candidates = additions(5)
    alone = Candidates(prompt=Prompt(id="alone", prompt="What is 1 plus 7?"), responses=candidates[0].responses[:1])
    out, cost = run([*candidates, alone], llm_config(folder, server, template="self_reference"), tmp_path)
    check_good(out, candidates)
    assert (cost.requests, len(server.asked)) == (35, 35)
    assert sorted({(body["max_tokens"], body["temperature"]) for body in server.asked}) == [(8, 0.0), (256, 0.0)]


def test_a_conversation_without_a_chat_template(folder: Path, server: FakeServer, tmp_path: Path) -> None:
    """What the judge cannot answer itself is a bad row, and abstained on."""
    bare = tmp_path / "bare"
    plain = make_tokenizer([("What is 3 plus 4?", "7")] * 4, Recipe(seed=0))
    plain.chat_template = None
    save_model(tiny_model(), bare, plain)
    server.models = ["bare"]
    server.reply = answers(lambda text: "[[A]]")
    talk = Candidates(
        prompt=Prompt(id="t", prompt=(Message(role="user", content="What is 1 plus 7?"),), where="f:3"),
        responses=additions(1)[0].responses,
    )
    config = llm_config(bare, server, template="self_reference")
    with pytest.raises(InputError, match=r"f:3: field 'prompt' is a conversation, but the tokenizer has no chat"):
        run([talk], config, tmp_path / "a")
    bad = BadRows("skip")
    out, _ = run([talk, *additions(1)], config, tmp_path / "b", bad=bad)
    assert [row["row"]["id"] for row in bad.rows] == ["t"]
    assert [c.probability for c in out] == [None] * 3 + [0.5] * 3
    assert out[0].reason.startswith("f:3: field 'prompt' is a conversation")
    out, _ = run([talk], llm_config(bare, server), tmp_path / "c")  # who only compares reads it as a text
    assert {c.reason for c in out} == {"orders disagree"}
    assert "user: What is 1 plus 7?" in plain.decode(server.asked[-1]["prompt"])


def test_what_does_not_fit_the_context_is_abstained_on(folder: Path, server: FakeServer, tmp_path: Path) -> None:
    server.reply = answers(good)
    long = dataclasses.replace(additions(1)[0].responses[1], text="9 " * CONTEXT)
    candidates = additions(2)
    candidates[0] = dataclasses.replace(candidates[0], responses=(*candidates[0].responses[:1], long))
    out, cost = run(candidates, llm_config(folder, server), tmp_path)
    assert (out[0].probability, out[0].orders) == (None, (None, None))
    assert re.match(rf"cell judge: a prompt of \d+ tokens and .* exceed its context of {CONTEXT}", out[0].reason)
    assert all(c.probability is not None for c in out[1:])
    assert (cost.abstentions, cost.refused, cost.unread, cost.requests) == (1, 2, 0, 8)
    own = dataclasses.replace(candidates[1], prompt=Prompt(id="long", prompt="What is 9 plus 7? " * CONTEXT))
    out, cost = run([own], llm_config(folder, server, template="self_reference"), tmp_path)
    assert {c.probability for c in out} == {None}
    assert out[0].reason.startswith("no answer of its own: cell judge: a prompt of")
    assert (cost.requests, cost.refused) == (1, 1)


def test_comparisons_survive_a_file(folder: Path, server: FakeServer, tmp_path: Path) -> None:
    server.reply = answers(good)
    candidates = additions(3)
    out, _ = run(candidates, llm_config(folder, server), tmp_path)
    rows = [verdict_row(c) for c in out]
    assert read_verdicts(write_rows(tmp_path / "verdicts.jsonl", rows), candidates, BadRows()) == out


def test_an_empty_matrix_of_candidates(folder: Path, server: FakeServer, tmp_path: Path) -> None:
    lonely = [dataclasses.replace(item, responses=item.responses[:1]) for item in additions(2)]
    for candidates in ([], lonely):
        out, cost = run(candidates, llm_config(folder, server), tmp_path)
        assert (out, cost.requests, server.asked) == ([], 0, [])


# ------------------------------------------------------------------------------------------------------ real models


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a small model that is a good judge of digits."""
    return make_judge(tmp_path_factory.mktemp("trained")).parent


@pytest.mark.slow
def test_a_real_judge(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of hf; vLLM's is in test_engine_contract.py."""
    judged = judge_digits(trained / "judge", tmp_path)
    check_digits(trained / "judge", judged)
    monkeypatch.setattr("tso_fast.executors.local.open_engine", lambda *args, **kwargs: pytest.fail("an engine"))
    again = judge_digits(trained / "judge", tmp_path)
    assert again.verdicts == judged.verdicts
    assert judged.cost is not None
    assert again.cost == dataclasses.replace(judged.cost, new_requests=0)


@pytest.mark.slow
def test_a_judge_with_another_vocabulary(trained: Path, tiny_matrix: Path, tmp_path: Path) -> None:
    """Its digits have other ids than the matrix's."""
    matrix = ModelMatrix([CellConfig(path=str(tiny_matrix / "s.v1")), CellConfig(path=str(tiny_matrix / "m.v2"))])
    own = CellConfig(path=str(trained / "judge"))
    with pytest.raises(InputError, match="has another vocabulary"):
        ModelMatrix([CellConfig(path=str(tiny_matrix / "s.v1")), own])
    config = JudgeConfig(kind="llm", model=own, template=str(trained / "compare.txt"))
    # What the cells sampled is read as text: their token ids mean nothing here.
    candidates = [
        dataclasses.replace(item, responses=tuple(dataclasses.replace(r, token_ids=(9999,)) for r in item.responses))
        for item in digits()
    ]
    out, cost = run(candidates, config, tmp_path, matrix)
    for c in out:
        first, second = (candidates[int(c.prompt_id[1:])].responses[i].text for i in c.responses)
        assert ((c.probability or 0) > 0.5) == (first > second)
    assert cost.abstentions == 0


def test_the_cell_that_judges(trained: Path, tiny_matrix: Path, tmp_path: Path) -> None:
    names = ("s.v1", "m.v1", "m.v2")
    matrix = ModelMatrix([CellConfig(path=str(tiny_matrix / name), version_rank=i) for i, name in enumerate(names)])
    template = str(trained / "compare.txt")

    def who(**given: Any) -> str:
        return LlmJudge(JudgeConfig(kind="llm", template=template, **given)).cell(matrix)[0].name

    assert who(cell="policy") == "m.v2"
    assert who(cell="s.v1") == "s.v1"
    assert who(model=CellConfig(path=str(trained / "judge"))) == "judge"
    with pytest.raises(InputError, match=r"judge llm: cell: no cell is called 'm.v3'; did you mean 'm.v[12]'"):
        who(cell="m.v3")
    with pytest.raises(InputError, match=r"^judge big: model: path '/nowhere' is no folder"):
        who(model=CellConfig(path="/nowhere"), name="big")
    out, cost = run(digits()[:1], JudgeConfig(kind="llm", cell="s.v1", template=template), tmp_path, matrix)
    assert len(out) == 3
    assert cost.requests == 6


@pytest.mark.slow
def test_a_killed_judge_goes_on(trained: Path, tmp_path: Path) -> None:
    own = CellConfig(path=str(trained / "judge"))
    config = JudgeConfig(kind="llm", model=own, template=str(trained / "compare.txt"))
    whole, cost = run(digits(), config, tmp_path / "whole", shard_size=2)
    add, calls = ResponseStore.add, itertools.count(1)

    def killing(self: ResponseStore, rows: Any) -> None:
        add(self, rows)
        if next(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    def judge() -> None:
        ResponseStore.add = killing  # type: ignore[method-assign]
        run(digits(), config, tmp_path / "parts", shard_size=2)

    assert status_of(fork(judge)) == -signal.SIGKILL
    out, cost_again = run(digits(), config, tmp_path / "parts", shard_size=2)
    assert out == whole
    assert 0 < cost_again.new_requests < cost.new_requests
    assert dataclasses.replace(cost_again, new_requests=cost.new_requests) == cost


# ------------------------------------------------------------------------------------------------------- templates


def test_the_templates_of_the_package() -> None:
    assert template.names() == ["pairwise", "pairwise_reasoned", "pointwise", "role", "self_reference"]
    kinds = {name: template.load(name) for name in template.names()}
    assert [kinds[name].is_comparison for name in template.names()] == [True, True, False, True, True]
    assert [kinds[name].read for name in template.names()] == ["label", "text", "text", "label", "text"]
    assert "own" in kinds["self_reference"].placeholders
    assert (kinds["pointwise"].low, kinds["pointwise"].high) == (1.0, 10.0)
    for made in kinds.values():
        assert "---" not in made.text
        assert made.text == made.text.strip()


def test_placeholders_are_replaced_at_once() -> None:
    made = template.parse('{prompt}|{first}|{second}|{{first}}|{"a": {"b": 1}} { first }', "t")
    shown = made.render(prompt="{first}", first="{second} {{own}}", second="{prompt}\\1", own="no")
    assert shown == '{first}|{second} {{own}}|{prompt}\\1|{first}|{"a": {"b": 1}} { first }'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{prompt}", r"it has the placeholders \{prompt\}; expected \{prompt\} with \{first\} and \{second\}, or with"),
        ("", "it has the placeholders none; expected"),
        ("{prompt} {first}", r"it has the placeholders \{prompt\}, \{first\}; expected"),
        ("{first} {second}", r"it has the placeholders \{first\}, \{second\}; expected"),
        ("{prompt} {first} {second} {response}", "it has the placeholders .*; expected"),
        (
            "{prompt} {respnse}",
            r"the placeholder \{respnse\} is unknown; did you mean 'response'\?; expected .*"
            r"\{\{respnse\}\} stands for the text",
        ),
        ("---\nreed: label\n---\n{prompt} {first} {second}", "the setting 'reed: label' is unknown; did you mean"),
        ("---\nlabel\n---\n{prompt} {first} {second}", "the setting 'label' is unknown"),
        ("---\nread: labels\n---\n{prompt} {first} {second}", "read: got 'labels', expected label or text"),
        ("---\nread: label\n---\n{prompt} {response}", "read has no effect on a rating; leave it out"),
        ("---\nrange: 1-5\n---\n{prompt} {first} {second}", "range has no effect on a comparison; leave it out"),
        ("---\nrange: 5\n---\n{prompt} {response}", "range: got '5', expected the lowest and the highest rating"),
        ("---\nrange: 5-1\n---\n{prompt} {response}", "range: got '5-1', expected"),
    ],
)
def test_a_template_that_cannot_be_used_is_named(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text(content)
    with pytest.raises(InputError, match=f"^template {re.escape(str(file))}: {message}"):
        template.load(str(file))


def test_a_template_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("---\nrange: 0-2.5\n---\n\n{prompt}\n---\n{response}\n", encoding="utf-8-sig")
    assert template.load(str(file)) == template.Template(
        text="{prompt}\n---\n{response}", placeholders=frozenset({"prompt", "response"}), low=0.0, high=2.5
    )
    file.write_bytes("{prompt} {response} ü".encode("latin-1"))
    with pytest.raises(InputError, match=r"cannot be read: .*expected a text in UTF-8"):
        template.load(str(file))
    with pytest.raises(
        InputError,
        match=r"template: 'pairwize' is neither a file nor one of pairwise, pairwise_reas"
        r"oned, pointwise, role, self_reference; did you mean 'pairwise'\?",
    ):
        template.load("pairwize")


# --------------------------------------------------------------------------------------------------------- replies


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        (
            1.0,
            [
                "A",
                " a\n",
                "A.",
                "**A**",
                "(A)",
                "A)",
                "[A]",
                "`A`",
                '"A"',
                "[[A]]",
                "Answer: A",
                "answer is A",
                "**Answer:** A",
                "Response A",
                "Response A is better.",
                "A is better",
                "Final answer: **A**",
                "[[ a ]]",
                "The better response is A.",
                "If B were right, [[B]].\nBut [[A]]",
                "My verdict: [[A]] because ...",
                "<think>B? [[B]]</think>\n\nA",
                "[[Response A]]",
                "Answer:\n\nA",
            ],
        ),
        (0.0, ["B", "b!", "Verdict: B", "Assistant B", "*B*", "The answer is B", "Choice: (B)"]),
        (0.5, ["[[C]]", "[[tie]]", "Tie", "a tie.", "Verdict: tie", "[[Tie]]"]),
        (
            None,
            [
                "",
                " \n",
                "C",
                "AB",
                "A B",
                "A/B",
                "A or B",
                "A and B",
                "both",
                "neither",
                "A careful reading",
                "I",
                "[[A]] or [[B]]",
                "[A] [B]",
                "B, since A is wrong",
                "Not A",
                "A is not better",
                "I prefer A",
                "A is better than B",
                "<think>[[A]]",
                "[[D]]",
                "A\nB",
                "Apple",
                "A?",
                "1",
                "Ä",
                "Answer: A or B",
                "As an AI language model I cannot judge.",
            ],
        ),
    ],
)
def test_labels(value: float | None, texts: list[str]) -> None:
    for text in texts:
        got, reason = read_label(text)
        assert (got, text) == (value, text)
        assert (reason == "") == (value is not None)


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        (
            7.0,
            [
                "7",
                " 7.\n",
                "[[7]]",
                "**7**",
                "Rating: 7",
                "rating = 7",
                "Rating: [[7]]",
                "Score: 7/10",
                "7/10",
                "7 / 10",
                "7 out of 10",
                "I give it 7/10.",
                "The rating is 7.",
                "**Rating:** 7",
                "Rating (1-10): 7",
                "Rating: 7.0",
                "Overall score: 7/10, clear.",
                "[[7/10]]",
                "[[rating: 7]]",
                "Use [[1]] to [[10]].\nSo: [[7]]",
                "Score: 3, then 5.\n[[7]]",
                "Rating: 7\n\n\nRationale: 3 mistakes, 2 of them grave.",
                "rating of 7",
                "Rating: 7. I thought of 7/10 at once.",
                "<think>Rating: 2</think>Rating: 7",
                "Grade: 7",
                "Rating: 7\n- 3 mistakes",
                "Right on 2 of 3 points: 7/10",
            ],
        ),
        (7.5, ["[[7.5]]", "Rating: 7.5/10", "7.5"]),
        (10.0, ["10", "10/10", "Rating: 10"]),
        (
            None,
            [
                "",
                "seven",
                "Rating: seven",
                "[[11]]",
                "0",
                "-3",
                "Rating: -3",
                "Rating: −3",
                "100",
                "Rating: 7-8",
                "Rating: 7 to 8",
                "7/10 or 8/10",
                "Rating: 7. Score: 8",
                "[[7]] [[8]]",
                "3.5/5",
                "Score: 4/5",
                "70%",
                "Rating: 70%",
                "Rating: 7,5",
                "Rating: N/A",
                "7/10/2024",
                "I found 3 errors.",
                "Rating: 7th",
                "1e1",
                "nan",
                "inf",
                "Rating: 1-10",
                "7 8",
                "٧",
                "Rating:\n1. Right\n2. Clear",
                "9" * 400,
                "Rating: 7-8. Score: 5",
                "7 or 8 out of 10",
                "between 7 and 8/10",
                "Rating: 7/10 to 9/10",
            ],
        ),
    ],
)
def test_ratings_of_every_form(value: float | None, texts: list[str]) -> None:
    for text in texts:
        got, reason = read_rating(text, 1, 10)
        assert (got, text) == (value, text)
        assert (reason == "") == (value is not None)


def test_replies_of_any_kind_are_read_fast_or_not_at_all() -> None:
    """Parts that mean something, in any order: no error, nothing out of range, no two verdicts at once."""
    parts = [
        "[[",
        "]]",
        "A",
        "B",
        "7",
        "10",
        "/",
        " ",
        "\n",
        "Rating",
        ":",
        ".",
        "-",
        "**",
        "Answer",
        "is",
        "better",
        "out of",
        "(",
        ")",
        "tie",
        "[[A]]",
        "[[B]]",
        "[[7]]",
        "[[3]]",
        "<think>",
        "</think>",
        "ü",
        "\ud800",
        "9" * 30,
        "1.5",
        ",",
        "%",
        "\x00",
    ]
    r = random.Random(0)
    for n in range(20_000):
        text = "".join(r.choices(parts, k=r.randint(0, 12)))
        label, _ = read_label(text)
        assert label in (None, 0.0, 0.5, 1.0)
        if label == 1.0:
            assert "A" in text
        if label == 0.0:
            assert "B" in text
        rating, _ = read_rating(text, 1, 10)
        if rating is not None:
            assert 1 <= rating <= 10
            assert rating in map(float, re.findall(r"\d+(?:\.\d+)?", text.replace("*", ""))), text
        if n % 1000 == 0:  # what regular expressions may choke on
            for long in (text * 2000, f"Rating{' ' * 20_000}{text}", f"The answer{' ' * 20_000}is", "[[" * 20_000):
                read_label(long)
                read_rating(long, 1, 10)


def test_random_text_is_hardly_ever_a_verdict() -> None:
    r = random.Random(1)
    texts = ["".join(r.choices(string.printable, k=40)) for _ in range(5000)]
    assert all(read_label(text)[0] is None for text in texts)
    assert all(read_rating(text, 1, 10)[0] is None for text in texts)


def test_label_log_probs() -> None:
    words = {1: "A", 2: " A", 3: "B", 4: "\n", 5: "An", 6: "a"}
    decode = words.__getitem__
    log = lambda *p: tuple((i, float(torch.tensor(x).log())) for i, x in p)  # noqa: E731
    assert read_logprobs(log((1, 0.5), (2, 0.1), (3, 0.2), (4, 0.2)), decode) == pytest.approx(0.75)
    assert read_logprobs(log((3, 0.9), (4, 0.1)), decode) == 0.0
    assert read_logprobs(log((5, 0.3), (6, 0.3), (1, 0.2), (3, 0.2)), decode) is None
    assert read_logprobs((("A", -0.1), (" B", -3.0), ("▁B", -4.0), ("Ġ", -5.0)), decode) == pytest.approx(
        0.9048 / (0.9048 + 0.0498 + 0.0183), abs=1e-3
    )
    assert read_logprobs((), decode) is None
    assert read_logprobs((("A", float("nan")), ("B", float("-inf"))), decode) is None
    assert replies.MIN_LABEL_MASS == 0.5


def test_two_orders() -> None:
    def of(first: float | None, second: float | None) -> tuple[float | None, str]:
        return of_both_orders(((first, "x"), (second, "y")))

    assert of(0.75, 1.0) == (0.875, "")
    assert of(0.0, 0.0) == (0.0, "")
    assert of(0.9, 0.2) == (0.5, "orders disagree")
    assert of(0.2, 0.9) == (0.5, "orders disagree")
    assert of(0.5, 1.0) == (0.75, "")
    assert of(None, 1.0) == (None, "x")
    assert of(0.0, None) == (None, "y")
    assert of(None, None) == (None, "x")


# --------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "judges[0].cell: got neither of cell and model; a judge of kind 'llm' needs one of them"),
        ({"cell": "policy", "model": CellConfig(path="x")}, "judges[0].cell: got both of cell and model"),
        ({"cell": "policy", "num_votes": 0}, "judges[0].num_votes: got 0, expected an integer >= 1"),
        ({"cell": "policy", "num_votes": 3}, "judges[0].num_votes: 3 has no effect with temperature 0"),
        ({"cell": "policy", "temperature": -1.0}, "judges[0].temperature: got -1.0, expected a finite number >= 0"),
        ({"cell": "policy", "max_completion_length": 0}, "judges[0].max_completion_length: got 0"),
        ({"cell": "policy", "reference": "m"}, "judges[0].reference: it has no effect on a judge of kind 'llm'"),
        ({"model": CellConfig(path="x", top_p=0.5)}, "judges[0].model.top_p: it has no effect on a judge"),
        ({"model": CellConfig(path="x", num_gpus=0)}, "judges[0].model.num_gpus: got 0, expected an integer >= 1"),
        ({"model": CellConfig(path="x", url="host")}, "judges[0].model.url: got 'host', expected an address"),
    ],
)
def test_settings_that_cannot_be(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        config = PairsConfig(responses="-", output="-", judges=[JudgeConfig(kind="llm", **given)])
        check(config)
        panel.make_judges(config)
    assert str(caught.value).startswith(message)
