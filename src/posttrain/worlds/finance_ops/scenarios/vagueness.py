"""Worse answers to advice requests: vague, empty-handed, unsupported or in the wrong order, of a length that tells nothing."""

from __future__ import annotations

import re

from posttrain.worlds.finance_ops.answers import Answer
from posttrain.worlds.finance_ops.scenarios.bench import Bench

_SUMMARIES = (
    "There may be an issue here that needs attention.",
    "This looks like something the team should review in more detail.",
    "The situation is not ideal and should be watched closely over the next days.",
    "Some follow-up seems useful.",
    "This needs a closer look.",
    "It is hard to say more at this point, but a careful look at everything would certainly be a good idea.",
    "Many things could be behind this, and it is usually best to keep calm, to weigh the options and to stay in touch.",
)
_STEPS = (
    "Review the matter.",
    "Follow up as needed.",
    "Keep an eye on it.",
    "Talk to the people involved.",
    "Improve the process.",
    "Take suitable measures when the time comes.",
    "Consider all options carefully.",
    "Stay in contact with everyone concerned.",
    "Make sure that such things do not happen again in the future.",
    "Discuss the topic in one of the next team meetings.",
    "Decide later, depending on how the situation develops over time.",
    "Inform whoever may need to know about it.",
    "Think about the wider picture and about what would be best for everyone in the long run.",
    "Collect some more impressions from the team before anything is decided one way or the other.",
    "Come back to this topic in due course and see whether it is still an issue by then.",
    "Find a good balance between speed and care, as is usually wise in such situations.",
    "Have a quiet word with the people who usually know about this kind of thing, if they have time.",
    "Keep all doors open for now, since it is not certain which way would turn out to be the better one.",
)


SHORT = 5  # the summaries and steps before this index are short


def vague(bench: Bench, good: Answer, *, steps: int = 2, among: int | None = None) -> Answer:
    """The same decision without evidence or concrete actions; `among` limits the choice to the first, shorter phrases."""
    return Answer(good.decision, bench.rng.choice(_SUMMARIES[:among]), (), (), tuple(bench.rng.sample(_STEPS[:among], steps)))


def toothless(bench: Bench, good: Answer, *, steps: int = 2, among: int | None = None) -> Answer:
    """Evidence is there, the actions are empty."""
    return good.but(next_steps=tuple(bench.rng.sample(_STEPS[:among], steps)))


def unsupported(bench: Bench, good: Answer) -> Answer:
    """Good actions and an empty one, without figure or source, under a vague summary."""
    summary, extra = bench.rng.choice(_SUMMARIES), bench.rng.sample(_STEPS, bench.rng.choice((0, 1, 2)))
    return good.but(summary=summary, figures=(), sources=(), next_steps=(*good.next_steps, *extra)[:4])


def disordered(good: Answer) -> Answer:
    """Evidence is there, but acting comes before checking."""
    return good.but(next_steps=good.next_steps[::-1])


def burden(answer: Answer) -> float:
    """Length as tokens would count it, without a tokenizer: digits and punctuation one each, words by length, names double."""
    text = answer.json()
    words = re.findall(r"[A-Za-z]+", text)
    marks = re.findall(r"[^\w\s]+", text)
    return (
        sum(letter.isdigit() for letter in text)
        + len(marks)
        + sum(1 + (len(word) - 1) // (3 if word[0].isupper() else 9) for word in words)
    )


def worse(bench: Bench, good: Answer, index: int) -> Answer:
    """A worse answer of similar length: longer than the good one for even `index`, shorter for odd, so that length tells nothing."""
    kind = bench.rng.choices(("vague", "toothless", "unsupported", "disordered"), weights=(55, 20, 10, 15))[0]
    if kind == "disordered":
        return disordered(good)
    if kind == "unsupported":
        pool = [unsupported(bench, good) for _ in range(16)]
    else:
        spoil = vague if kind == "vague" else toothless
        pool = [spoil(bench, good, steps=steps) for steps in (2, 3, 4, 4, 4) for _ in range(12)]
    target = burden(good) * (1.04 + (1 if index % 2 == 0 else -1) * bench.rng.uniform(0.04, 0.16))
    return min(pool, key=lambda answer: abs(burden(answer) - target))
