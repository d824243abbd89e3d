"""Can a verifier be trusted? Show it good episodes and spoiled ones, and count what it gets wrong.

A reward that accepts a spoiled episode will be found and used by training; one that rejects good ones starves it. So a verifier is
audited before anything learns from it, and the audit is kept with the run.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from posttrain.data.records import Episode, Task
from posttrain.errors import VerifierError
from posttrain.verifying.judgement import EnvironmentView, Verifier
from posttrain.verifying.mutations import Mutation

# (task, episode) -> the world as that episode's calls leave it; a spoiled episode needs its own
Replay = Callable[[Task, Episode], AbstractContextManager[EnvironmentView | None]]
_Z = 1.96


@dataclass(frozen=True, slots=True)
class Rate:
    """`count` of `n`, with its 95 % Wilson interval."""

    count: int
    n: int

    @property
    def share(self) -> float:
        return self.count / self.n if self.n else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """(low, high); (0, 1) when nothing was counted."""
        if not self.n:
            return 0.0, 1.0
        centre = self.share + _Z**2 / (2 * self.n)
        half = _Z * math.sqrt(self.share * (1 - self.share) / self.n + _Z**2 / (4 * self.n**2))
        scale = 1 + _Z**2 / self.n
        return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


@dataclass(frozen=True, slots=True)
class AuditReport:
    """false_accepts: spoiled episodes that passed, of all spoiled; false_rejects: good and harmlessly rewritten ones that did not.

    `by_mutation` holds the same errors for each mutation ('gold' = unchanged). `unjudged` counts VerifierErrors: a spoiled episode
    that cannot be judged counts as not accepted, a good one as rejected. `examples`: task ids of errors, a few for each mutation.
    """

    false_accepts: Rate
    false_rejects: Rate
    by_mutation: Mapping[str, Rate]
    unjudged: int = 0
    examples: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def require_trust(self, *, max_false_accepts: float = 0.02, max_false_rejects: float = 0.05, least: int = 20) -> None:
        """Raise VerifierError when an error share is above its bound, or too few episodes were seen to say (`least` of each kind)."""
        for name, rate, bound in (
            ("false accepts", self.false_accepts, max_false_accepts),
            ("false rejects", self.false_rejects, max_false_rejects),
        ):
            if rate.n < least:
                remedy = f"audit on at least {least} episodes of each kind"
                raise VerifierError(f"too few episodes to judge {name}", where="verifier audit", value=rate.n, remedy=remedy)
            if rate.share > bound:
                worst = sorted(((r.share, name) for name, r in self.by_mutation.items() if r.count), reverse=True)[:3]
                remedy = "mend the verifier: " + ", ".join(f"{mutation} {share:.0%}" for share, mutation in worst)
                what = f"cannot be trusted: {rate.count} of {rate.n} {name} ({rate.share:.1%} > {bound:.1%})"
                raise VerifierError(what, where="verifier audit", remedy=remedy)


def audit(
    verifier: Verifier,
    golds: Iterable[tuple[Task, Episode]],
    mutations: Sequence[Mutation],
    replay: Replay | None = None,
    examples: int = 3,
) -> AuditReport:
    """Judge every gold episode and every mutation of it that applies. `replay` supplies the end state that each one leads to."""
    errors: dict[str, list[str]] = defaultdict(list)
    seen: dict[str, int] = defaultdict(int)
    unjudged = 0
    gold = Mutation("gold", lambda episode: episode, harmful=False)
    for task, episode in golds:
        for mutation in (gold, *mutations):
            changed = mutation.apply(episode)
            if changed is None:
                continue
            passed = _passes(verifier, task, changed, replay)
            unjudged += passed is None
            seen[mutation.name] += 1
            if bool(passed) == mutation.harmful:
                errors[mutation.name].append(task.id)
    harm = {mutation.name: mutation.harmful for mutation in (gold, *mutations)}
    by_mutation = {name: Rate(len(errors[name]), seen[name]) for name in harm if seen[name]}
    return AuditReport(
        _total(rate for name, rate in by_mutation.items() if harm[name]),
        _total(rate for name, rate in by_mutation.items() if not harm[name]),
        by_mutation,
        unjudged,
        {name: tuple(found[:examples]) for name, found in errors.items() if found},
    )


def _passes(verifier: Verifier, task: Task, episode: Episode, replay: Replay | None) -> bool | None:
    """The verdict, or None when the verifier could not judge."""
    try:
        with replay(task, episode) if replay is not None else nullcontext() as environment:
            return verifier(task, episode, environment).passed
    except VerifierError:
        return None


def _total(rates: Iterable[Rate]) -> Rate:
    listed = list(rates)
    return Rate(sum(rate.count for rate in listed), sum(rate.n for rate in listed))
