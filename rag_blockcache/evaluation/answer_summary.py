"""From predictions to a table: every measure of every arm, with intervals, by benchmark and on average."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from rag_blockcache.evaluation.arms import FULL_ARM, NO_PASSAGES, Arm
from rag_blockcache.evaluation.bootstrap import FEWEST, Draws, Interval, Resamples
from rag_blockcache.evaluation.environment import Environment
from rag_blockcache.evaluation.perplexity import Perplexity
from rag_blockcache.evaluation.predictions import Prediction, PredictionLog
from rag_blockcache.evaluation.qa_examples import QaExample
from rag_blockcache.evaluation.variants import without_number, without_order

AVERAGE = "average"
_COMPARED = ("accuracy", "fidelity", "agreement")  # between any two arms

Answers = Sequence[Prediction]


@dataclass(frozen=True)
class _Measure:
    """A ratio of two sums over the questions of which it was measured, and what is made of it."""

    numerator: Callable[[Prediction], float | None]
    denominator: Callable[[Prediction], float | None] = lambda _: 1.0
    finish: Callable[[Draws], Draws] = lambda ratio: ratio

    def draws(self, answers: Answers, resamples: Resamples) -> Draws | None:
        """Return its draws; None where it was measured of no question."""
        above, below = zip(*map(self.parts, answers), strict=True)
        return self.finish(resamples.ratio(above, below)) if any(below) else None

    def parts(self, answer: Prediction) -> tuple[float, float]:
        """Return what a question adds to each sum; nothing where it was not measured."""
        above, below = self.numerator(answer), self.denominator(answer)
        return (0.0, 0.0) if above is None or below is None else (above, below)


_MEASURES = {
    "accuracy": _Measure(lambda each: each.is_correct),
    "exact_match": _Measure(lambda each: each.is_exact),
    "f1": _Measure(lambda each: each.f1),
    "agreement": _Measure(lambda each: each.num_same_tokens, lambda each: each.num_answer_tokens),
    "divergence": _Measure(lambda each: each.divergence, lambda each: each.num_answer_tokens),
    "first_agreement": _Measure(lambda each: each.first_is_same),
    "first_divergence": _Measure(lambda each: each.first_divergence),
    "answer_perplexity": _Measure(
        lambda each: -each.answer_log_likelihood, lambda each: each.num_answer_tokens, np.exp
    ),
    "gold_perplexity": _Measure(
        lambda each: None if each.gold_log_likelihood is None else -each.gold_log_likelihood,
        lambda each: each.num_gold_tokens,
        np.exp,
    ),
    "recomputed": _Measure(lambda each: each.num_recomputed_tokens, lambda each: each.num_passage_tokens),
}


@dataclass(frozen=True)
class AnswerReport:
    """What an evaluation found.

    Attributes:
        environment: Where it was measured.
        max_new_tokens: Longest answer.
        passage_format: How passages were shown.
        num_skipped: Questions that did not fit the context window.
        arms: Names of what was compared.
        rows: A row for each arm and benchmark (and variant of it), with an average over benchmarks.
        comparisons: Differences between any two arms on the same questions.
        by_gold_position: Accuracy of each arm by the place of the first gold passage; questions of all
            benchmarks and orders together, but apart by the number and length of passages.
        by_num_passages: Accuracy and fidelity of each arm by the number of passages, likewise.
        text: Perplexity of a text under full attention, if one was given.
    """

    environment: Environment
    max_new_tokens: int
    passage_format: str
    num_skipped: int
    arms: tuple[str, ...]
    rows: tuple[Mapping[str, Any], ...]
    comparisons: tuple[Mapping[str, Any], ...]
    by_gold_position: tuple[Mapping[str, Any], ...]
    by_num_passages: tuple[Mapping[str, Any], ...]
    text: Perplexity | None

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values, with the headings of a table of ``rows``."""
        shown = {name: value for name, value in _COLUMNS.items() if any(name in row for row in self.rows)}
        rest = dataclasses.asdict(self)
        rows = [{**dict.fromkeys(shown), **row} for row in self.rows]
        return {**rest.pop("environment"), "columns": shown, **rest, "rows": rows}


_COLUMNS = {
    "dataset": "benchmark",
    "variant": "passages",
    "arm": "policy",
    "num_questions": "questions",
    "fidelity": "fidelity",
    "fidelity_interval": "95 %",
    "agreement": "same token",
    "accuracy": "accuracy",
    "accuracy_interval": "95 %",
    "accuracy_gain_interval": "less full, 95 %",
    "exact_match": "exact match",
    "f1": "F1",
    "divergence": "KL a token",
    "first_divergence": "KL, first token",
    "first_agreement": "same first token",
    "answer_perplexity": "perplexity of full's answer",
    "gold_perplexity": "perplexity of gold answer",
    "recomputed": "computed again",
    "ttft_seconds": "first token",
}


def summarize(
    examples: Sequence[QaExample],
    arms: Sequence[Arm],
    log: PredictionLog,
    *,
    environment: Environment,
    max_new_tokens: int,
    passage_format: str,
    num_skipped: int = 0,
    text: Perplexity | None = None,
) -> AnswerReport:
    """Summarise the predictions of all arms on examples.

    Args:
        examples: What was asked.
        arms: What was compared.
        log: Has a prediction of every arm for every example.
        environment: Where it was measured.
        max_new_tokens: Longest answer.
        passage_format: How passages were shown.
        num_skipped: Questions that did not fit the context window.
        text: Perplexity of a text, if one was measured.
    """
    names = [arm.name for arm in arms]
    groups = _grouped(examples, names, log)
    tables = {group: _Table(answers, seed) for seed, (group, answers) in enumerate(groups.items())}
    for variant in dict.fromkeys(variant for _, variant in groups):
        parts = [table for (_, each), table in tables.items() if each == variant]
        if len(parts) > 1:
            tables[AVERAGE, variant] = _Average(parts)
    pooled = {name: [each for group in groups.values() for each in group[name]] for name in names}
    return AnswerReport(
        environment=environment,
        max_new_tokens=max_new_tokens,
        passage_format=passage_format,
        num_skipped=num_skipped,
        arms=tuple(names),
        rows=tuple(
            {"dataset": dataset, "variant": variant, **table.row(name)}
            for (dataset, variant), table in tables.items()
            for name in names
        ),
        comparisons=tuple(
            {"dataset": dataset, "variant": variant, **difference}
            for (dataset, variant), table in tables.items()
            for difference in table.differences(names)
        ),
        by_gold_position=tuple(_sliced(pooled, "gold_position", without_order, ("accuracy",))),
        by_num_passages=tuple(_sliced(pooled, "num_passages", without_number, ("accuracy", "fidelity"))),
        text=text,
    )


def _grouped(
    examples: Sequence[QaExample], arms: Sequence[str], log: PredictionLog
) -> dict[tuple[str, str], dict[str, list[Prediction]]]:
    """Return predictions by benchmark and variant, then by arm, each arm's in the same order."""
    groups: dict[tuple[str, str], dict[str, list[Prediction]]] = {}
    for example in examples:
        found = [log.get(example.key, name) for name in arms]
        group = groups.setdefault((example.dataset, example.variant), {name: [] for name in arms})
        for name, prediction in zip(arms, found, strict=True):
            assert prediction is not None, f"{name} has not answered {example.example_id}"
            group[name].append(prediction)
    return groups


class _Table:
    """Draws of every measure of every arm on one set of questions."""

    def __init__(self, answers: Mapping[str, Answers], seed: int = 0) -> None:
        self.num_questions = len(answers[FULL_ARM.name])
        self._answers = answers
        self._asked = [(each.dataset, each.example_id) for each in answers[FULL_ARM.name]]
        resamples = Resamples(self._asked, seed=seed)
        self.draws = {name: _draws(each, answers, resamples) for name, each in answers.items()}

    def row(self, arm: str) -> dict[str, Any]:
        """Return what a table shows of an arm."""
        row = self.measured(arm, list(self.draws[arm]))
        full = self.draws[FULL_ARM.name].get("accuracy")
        if full is not None and arm != FULL_ARM.name:
            row |= _shown("accuracy_gain", Interval.of(self.draws[arm]["accuracy"] - full))
        seconds = self.seconds(arm)
        if seconds:
            row |= {"ttft_seconds": statistics.median(seconds), "num_timed": len(seconds)}
        return row

    def measured(self, arm: str, measures: Sequence[str]) -> dict[str, Any]:
        """Return some measures of an arm with their intervals."""
        row: dict[str, Any] = {"arm": arm, "num_questions": self.num_questions}
        for name in measures:
            if name in self.draws[arm]:
                row |= _shown(name, Interval.of(self.draws[arm][name]))
        return row

    def seconds(self, arm: str) -> list[float]:
        """Return the times to first token that were taken."""
        return [each.ttft_seconds for each in self._answers[arm] if each.ttft_seconds is not None]

    def differences(self, arms: Sequence[str]) -> list[dict[str, Any]]:
        """Compare every two arms; a difference whose interval holds zero is none that can be claimed.

        Nor is one that comes from a handful of questions, see ``FEWEST``.
        """
        found = []
        for one, other in combinations(arms, 2):
            for measure in _COMPARED:
                if measure in self.draws[one] and measure in self.draws[other]:
                    gain = Interval.of(self.draws[other][measure] - self.draws[one][measure])
                    number = self.num_differing(measure, one, other)
                    found.append(
                        {"measure": measure, "arm": other, "than": one, **dataclasses.asdict(gain)}
                        | {"num_differing": number, "is_clear": not gain.holds_zero and number >= FEWEST}
                    )
        return found

    def num_differing(self, measure: str, one: str, other: str) -> int:
        """Return of how many questions a measure differs between two arms."""
        parts = _MEASURES.get(measure, _MEASURES["divergence"]).parts  # fidelity is made of divergences
        asked = zip(self._asked, self._answers[one], self._answers[other], strict=True)
        return len({name for name, first, second in asked if parts(first) != parts(second)})


class _Average(_Table):
    """The mean over benchmarks, each counting alike whatever its number of questions."""

    def __init__(self, parts: Sequence[_Table]) -> None:
        self.num_questions = sum(part.num_questions for part in parts)
        self._parts = parts
        self.draws = {
            arm: {
                name: np.mean([part.draws[arm][name] for part in parts], axis=0)
                for name in draws
                if all(name in part.draws[arm] for part in parts)
            }
            for arm, draws in parts[0].draws.items()
        }

    def seconds(self, arm: str) -> list[float]:
        """Return the times to first token that were taken on any benchmark."""
        return [each for part in self._parts for each in part.seconds(arm)]

    def num_differing(self, measure: str, one: str, other: str) -> int:
        """Return of how many questions of all benchmarks a measure differs."""
        return sum(part.num_differing(measure, one, other) for part in self._parts)


def _draws(answers: Answers, all_answers: Mapping[str, Answers], resamples: Resamples) -> dict[str, Draws]:
    found = {name: measure.draws(answers, resamples) for name, measure in _MEASURES.items()}
    zero = all_answers.get(NO_PASSAGES.name)
    if zero is not None and any(each.divergence for each in zero):
        # Both sums run over the same tokens, so their number falls out.
        far = resamples.ratio([each.divergence for each in answers], [each.divergence for each in zero])
        found["fidelity"] = 1 - far
    return {name: draws for name, draws in found.items() if draws is not None}


def _shown(name: str, interval: Interval) -> dict[str, Any]:
    spread = f"{interval.low:.3f} to {interval.high:.3f}"
    values = {"": interval.value, "_low": interval.low, "_high": interval.high, "_interval": spread}
    return {name + end: value for end, value in values.items()}


def _sliced(
    answers: Mapping[str, Answers], by: str, alike: Callable[[str], str], measures: Sequence[str]
) -> list[dict[str, Any]]:
    """Return measures of each arm on the questions that share a value of one field, where there are several.

    Args:
        answers: Of all arms, by name.
        by: The field.
        alike: From the name of a variant to that of those that are pooled.
        measures: Names of measures.
    """
    found = []
    for variant in dict.fromkeys(alike(each.variant) for each in answers[FULL_ARM.name]):
        part = {
            arm: [each for each in all_ if alike(each.variant) == variant] for arm, all_ in answers.items()
        }
        values = sorted({getattr(each, by) for each in part[FULL_ARM.name]} - {None})
        for value in values if len(values) > 1 else ():
            same = {arm: [each for each in all_ if getattr(each, by) == value] for arm, all_ in part.items()}
            table = _Table(same)
            found += [{"variant": variant, by: value, **table.measured(arm, measures)} for arm in same]
    return found
