"""Sets how the cells sample by what the policy explores and how much of it is right, as measured on some prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from tso_fast.config.settings import SamplerConfig, TrainConfig
from tso_fast.errors import InputError
from tso_fast.judges.judge import Judge
from tso_fast.matrix import ModelMatrix
from tso_fast.samplers.sampler import Desk, Sampler
from tso_fast.seeds import seed_of
from tso_fast.types import Candidates

TEMPERATURES, NUMBERS = (0.5, 0.7, 0.9, 1.1), (4, 8, 16)


class Balance(NamedTuple):
    """Means over prompts; the first decides."""

    balance: float
    """min(different right responses / wanted, 1) x different right responses / samples (B-STaR, equation 3)."""
    exploration: float
    """Its first factor."""
    exploitation: float
    """Its second factor."""


class ControllerSampler(Sampler):
    """Sampler of kind ``controller``: of all temperatures and numbers of samples it sets those of the best balance.

    All samples count as selected, where B-STaR selects by a reward model. Where nothing is right, nothing is changed.
    """

    takes = ("temperatures", "numbers", "num_wanted", "num_prompts", "threshold")

    def __init__(self, config: SamplerConfig) -> None:
        super().__init__(config)
        self.temperatures, self.numbers = config.temperatures or TEMPERATURES, config.numbers or NUMBERS

    def check(self, matrix: ModelMatrix, judges: Sequence[Judge]) -> None:
        super().check(matrix, judges)
        if not judges:
            raise InputError(
                f"sampler {self.name}: nobody tells which responses are right; set verifier, or judges of single ones"
            )
        own = matrix.configs.get(matrix.policy.name)
        for key in ("temperature", "num_generations"):
            if own is not None and getattr(own, key) is not None:
                raise InputError(f"sampler {self.name}: the policy's cell has a {key} of its own; leave it out")

    def settle(self, mini_batch: Sequence[Candidates], desk: Desk) -> tuple[TrainConfig, dict[str, Any]]:
        found = {
            (temperature, number): balance
            for temperature in self.temperatures
            for number, balance in self._measured(temperature, mini_batch, desk).items()
        }
        (temperature, number), best = max(found.items(), key=lambda item: item[1].balance)
        if best.balance == 0:
            return desk.config, {"temperature": desk.config.temperature, **best._asdict()}
        config = dataclasses.replace(desk.config, temperature=temperature, policy_num_generations=number)
        return config, {"temperature": temperature, "num_generations": number, **best._asdict()}

    def _measured(self, temperature: float, mini_batch: Sequence[Candidates], desk: Desk) -> dict[int, Balance]:
        """By number of samples. The requests are those of the loop, which will not generate them again."""
        seed, name = desk.config.seed, self.name
        order = sorted(mini_batch, key=lambda item: seed_of(seed, name, desk.files.number, item.prompt.id))
        prompts = [dataclasses.replace(item, responses=()) for item in order[: self.config.num_prompts]]
        tried = dataclasses.replace(self.config, temperature=temperature, num_generations=max(self.numbers))
        answered = desk.answer(desk.ask(tried), prompts, f"{name}, temperature {temperature:g}")
        right = [
            [
                response.text.strip() if score is not None and score >= self.config.threshold else None
                for response, score in zip(item.responses, scores, strict=True)
            ]
            for item, scores in zip(answered, desk.scores(answered), strict=True)
        ]
        return {
            number: balance_of([texts[:number] for texts in right], self.config.num_wanted) for number in self.numbers
        }


def balance_of(right: Sequence[Sequence[str | None]], num_wanted: int) -> Balance:
    """The balance of some samples of each prompt.

    Args:
        right: their texts; None: a sample is wrong.
    """
    if not right:
        return Balance(0.0, 0.0, 0.0)
    different = [len({text for text in texts if text is not None}) for texts in right]
    explored = [min(n / num_wanted, 1.0) for n in different]
    exploited = [n / len(texts) for n, texts in zip(different, right, strict=True)]
    products = [a * b for a, b in zip(explored, exploited, strict=True)]
    return Balance(*(sum(values) / len(right) for values in (products, explored, exploited)))
