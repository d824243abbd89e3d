"""The gate: two scorecards and a policy in, a verdict out. Pure: no model, no files, no clock.

| targets                       | guardrails       | verdict        |
|-------------------------------|------------------|----------------|
| gained                        | all hold         | real gain      |
| gained, or the proxy gained   | one is breached  | reward hacking |
| none gained, proxy did not    | one is breached  | regression     |
| none gained                   | all hold         | idle drift     |

A target gains when its difference to the parent, in the wanted direction, is at least `min_gain` and its confidence interval
excludes zero. `at_least` and `at_most` bound the candidate's own value and must hold for every target that names them; a target with
bounds only needs no comparison. Of the compared targets at least one must gain. A guardrail is breached when the candidate is worse
than the parent by more than `max_drop` **and** the interval of the difference excludes zero harm (so that a small suite cannot fail
a candidate by chance; such a case is noted as inconclusive), or when its own value violates a bound. What cannot be judged has not held:
a value that the candidate lacks fails its check, and without a parent's value `max_drop` is breached unless the guardrail also gives a
bound on the candidate's own value, which then decides.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from posttrain.errors import DataError, RecipeError, nearest_of
from posttrain.evaluation.scorecard import METRICS, SHARES, SUITE_METRICS, Direction, Metric, Scorecard
from posttrain.evaluation.statistics import Interval, at_confidence, interval, is_share, paired_difference, unpaired_difference
from posttrain.evaluation.verdict import Check, Outcome, Verdict


@dataclass(frozen=True, slots=True)
class Target:
    """What must become better. `slice` such as 'kind=reconcile' restricts it; direction 'down' wants smaller values, None what the
    metric's own direction is, up for metrics that posttrain does not know."""

    metric: str
    slice: str | None = None
    min_gain: float | None = None
    at_least: float | None = None
    at_most: float | None = None
    direction: Direction | None = None

    @property
    def compared(self) -> bool:
        """Whether it asks for a gain over the parent; a target without any bound does."""
        return self.min_gain is not None or (self.at_least is None and self.at_most is None)


@dataclass(frozen=True, slots=True)
class Guardrail:
    """What must not become worse: by more than `max_drop` in the bad direction, or beyond a bound."""

    metric: str
    slice: str | None = None
    max_drop: float | None = None
    at_least: float | None = None
    at_most: float | None = None
    direction: Direction | None = None


@dataclass(frozen=True, slots=True)
class GatePolicy:
    """Targets, guardrails, and optionally the metric that was trained on (`proxy`), to tell hacking from bad luck."""

    targets: tuple[Target, ...] = ()
    guardrails: tuple[Guardrail, ...] = ()
    proxy: str | None = None
    confidence: float = 0.95


def check_policy(
    policy: GatePolicy,
    where: str,
    kinds: Collection[str] | None = None,
    left_out: Collection[str] = (),
    others: Collection[str] = (),
) -> None:
    """Raises RecipeError for a policy that guards nothing or that no scorecard of a run could answer: this is known before anything is
    trained. `kinds`: the kinds of task that are measured (None: unknown); `left_out`: metrics that are not; `others`: metrics that
    scorecards hold besides posttrain's own."""
    _check_rules(policy, where)
    known = list(dict.fromkeys([*METRICS, *others]))
    for place, metric, slice in asked(policy, where):
        if metric not in known:
            raise RecipeError("no such metric", where=place, value=metric, remedy=nearest_of(metric, known))
        if metric in left_out:
            raise RecipeError(
                "this metric is not measured", where=place, value=metric, remedy="raise its count under `evaluation`"
            )
        if slice is not None:
            _check_slice(slice, metric, kinds, place)


def asked(policy: GatePolicy, where: str) -> list[tuple[str, str, str | None]]:
    """The metrics that a policy reads: each with its place and its slice."""
    found: list[tuple[str, str, str | None]] = [(place, rule.metric, rule.slice) for place, rule in _rules(policy, where)]
    return [*found, (f"{where}.proxy", policy.proxy, None)] if policy.proxy else found


def _check_rules(policy: GatePolicy, where: str) -> None:
    """What every policy must obey, wherever it came from. Raises RecipeError."""
    if not policy.targets:
        raise RecipeError("a gate without targets can promote nothing", where=where, remedy="name at least one target")
    if not 0.5 < policy.confidence < 1:
        raise RecipeError("a confidence lies between 0.5 and 1", where=where, value=policy.confidence, remedy="for example 0.95")
    for place, rule in _rules(policy, where):
        limits = {name: getattr(rule, name, None) for name in ("min_gain", "max_drop", "at_least", "at_most")}
        for name, limit in limits.items():
            difference = name in ("min_gain", "max_drop")
            if limit is not None and (not math.isfinite(limit) or (difference and limit < 0)):
                raise RecipeError(
                    "a limit is a number, that of a difference from 0 up",
                    where=f"{place}.{name}",
                    value=limit,
                    remedy="`direction` says which way is worse",
                )
            if limit is not None and rule.metric in SHARES and not (0 <= limit < 1 or (limit == 1 and name != "max_drop")):
                raise RecipeError(
                    f"{rule.metric} lies between 0 and 1: this limit {'guards nothing' if name == 'max_drop' else 'cannot be one'}",
                    where=f"{place}.{name}",
                    value=limit,
                    remedy="five points are 0.05",
                )
        if isinstance(rule, Guardrail) and all(limit is None for limit in limits.values()):
            raise RecipeError(
                "a guardrail without a limit guards nothing",
                where=place,
                value=rule.metric,
                remedy="give max_drop, at_least or at_most",
            )
        _check_direction(rule, place)


def _check_direction(rule: Target | Guardrail, where: str) -> None:
    if rule.metric not in METRICS:
        return
    own = METRICS[rule.metric]
    compared = rule.compared if isinstance(rule, Target) else rule.max_drop is not None
    if own is None and rule.direction is None and compared:
        raise RecipeError(
            f"{rule.metric} may be wanted either way", where=where, remedy="say `direction: up` or `direction: down`"
        )
    if own is not None and rule.direction not in (None, own):
        raise RecipeError(
            f"of {rule.metric} the {'larger' if own == 'up' else 'smaller'} value is the better one",
            where=f"{where}.direction",
            value=rule.direction,
            remedy=f"write `direction: {own}` or leave it out",
        )


def _sign(metric: str, direction: Direction | None = None) -> int:
    """1 where larger values are better, -1 where smaller ones are."""
    return -1 if (direction or METRICS.get(metric)) == "down" else 1


def _rules(policy: GatePolicy, where: str) -> list[tuple[str, Target | Guardrail]]:
    """Every target and guardrail with its place."""
    targets = [(f"{where}.targets[{index}]", target) for index, target in enumerate(policy.targets)]
    return [*targets, *((f"{where}.guardrails[{index}]", rail) for index, rail in enumerate(policy.guardrails))]


def _check_slice(slice: str, metric: str, kinds: Collection[str] | None, where: str) -> None:
    key, equals, label = slice.partition("=")
    if key not in ("kind", "tenant") or not equals or not label:
        raise RecipeError("no such slice", where=where, value=slice, remedy="write kind=NAME or tenant=NAME")
    if metric in SUITE_METRICS:
        raise RecipeError(f"{metric} is of the whole suite, not of a slice", where=where, value=slice, remedy="leave `slice` out")
    if key == "kind" and kinds is not None and label not in kinds:
        raise RecipeError("no task of this kind is measured", where=where, value=label, remedy=nearest_of(label, list(kinds)))


def decide(parent: Scorecard | None, candidate: Scorecard, policy: GatePolicy) -> Verdict:
    """The verdict by the table above. Raises RecipeError for a policy that guards nothing."""
    _check_rules(policy, "gate")
    targets = [_target(parent, candidate, target, policy.confidence) for target in policy.targets]
    guarded = [_guardrail(parent, candidate, guardrail, policy.confidence) for guardrail in policy.guardrails]
    proxy = [_proxy(parent, candidate, policy)] if policy.proxy else []
    compared = [check.passed for check, target in zip(targets, policy.targets, strict=True) if target.compared]
    bounded = all(_within(candidate, target) for target in policy.targets)
    gained = bounded and (any(compared) if compared else True)
    breached = [check for check, _ in guarded if not check.passed]
    outcome = _outcome(gained, bool(breached), any(check.passed for check in proxy))
    unsure = [
        f"{_place(check)} fell by {abs(check.difference or 0):.3f}, within chance" for check, doubtful in guarded if doubtful
    ]
    notes = {"inconclusive": unsure, "paired": parent is not None and _same_tasks(parent, candidate)}
    reasons = _reasons(outcome, targets, breached, candidate, policy.confidence)
    return Verdict(outcome, (*targets, *(check for check, _ in guarded), *proxy), reasons, notes)


def _outcome(gained: bool, breached: bool, proxy_gained: bool) -> Outcome:
    if breached:
        return Outcome.REWARD_HACKING if gained or proxy_gained else Outcome.REGRESSION
    return Outcome.REAL_GAIN if gained else Outcome.IDLE_DRIFT


def _reasons(
    outcome: Outcome, targets: list[Check], breached: list[Check], candidate: Scorecard, confidence: float
) -> tuple[str, ...]:
    failed = [_reason(check, candidate, confidence) for check in targets if not check.passed]
    fell = [_reason(check, candidate, confidence) for check in breached]
    return tuple(fell if outcome is Outcome.REAL_GAIN else [*fell, *failed])


def _reason(check: Check, candidate: Scorecard, confidence: float) -> str:
    return f"{check.role} {_place(check)}: {check.requirement}, got {_shown(check, candidate, confidence)}"


def _target(parent: Scorecard | None, candidate: Scorecard, target: Target, confidence: float) -> Check:
    sign = _sign(target.metric, target.direction)
    difference = _difference(parent, candidate, target.metric, target.slice, sign, confidence)
    passed = _within(candidate, target)
    wanted = _bounds(target.at_least, target.at_most)
    if target.compared:
        least = target.min_gain or 0.0
        wanted.insert(0, f"{'rise' if sign > 0 else 'fall'} beyond chance" + (f" by at least {least:g}" if least else ""))
        passed = passed and difference is not None and sign * difference[0] >= least and _worst(difference, sign) > 0
    return _check("target", parent, candidate, (target.metric, target.slice), difference, (", ".join(wanted), passed))


def _guardrail(parent: Scorecard | None, candidate: Scorecard, guardrail: Guardrail, confidence: float) -> tuple[Check, bool]:
    """The check, and whether it fell beyond the margin but within chance."""
    sign = _sign(guardrail.metric, guardrail.direction)
    difference = _difference(parent, candidate, guardrail.metric, guardrail.slice, sign, confidence)
    passed = _within(candidate, guardrail)
    wanted, doubtful = _bounds(guardrail.at_least, guardrail.at_most), False
    if guardrail.max_drop is not None:
        bounded = bool(wanted)
        wanted.insert(0, f"{'fall' if sign > 0 else 'rise'} by at most {guardrail.max_drop:g}")
        if difference is None:
            passed = passed and bounded
        elif not sign * difference[0] >= -guardrail.max_drop:
            certain = not _best(difference, sign) >= 0
            passed, doubtful = passed and not certain, not certain
    return _check(
        "guardrail", parent, candidate, (guardrail.metric, guardrail.slice), difference, (", ".join(wanted), passed)
    ), doubtful


def _proxy(parent: Scorecard | None, candidate: Scorecard, policy: GatePolicy) -> Check:
    assert policy.proxy is not None
    sign = _sign(policy.proxy)
    difference = _difference(parent, candidate, policy.proxy, None, sign, policy.confidence)
    rose = difference is not None and _worst(difference, sign) > 0
    return _check("proxy", parent, candidate, (policy.proxy, None), difference, ("what was trained on, watched", rose))


def _difference(
    parent: Scorecard | None, candidate: Scorecard, name: str, slice: str | None, sign: int, confidence: float
) -> tuple[float, float, float, int] | None:
    """(difference, low, high, n), paired where both scorecards hold the same tasks; None without a parent's value. Where the metric
    applied to other tasks of the candidate than of the parent (figures in other answers), the shared tasks say nothing about the
    rest: then each number is the worse of the paired and the unpaired one."""
    own, other = _found(candidate, name, slice), _found(parent, name, slice)
    if parent is None or own is None or other is None:
        return None
    after, before = candidate.values(name, slice), parent.values(name, slice)
    shared = sorted(after.keys() & before.keys()) if _same_tasks(parent, candidate) else []
    paired = paired_difference([after[t] for t in shared], [before[t] for t in shared], confidence) if shared else None
    if paired is not None and after.keys() == before.keys():
        return *paired, len(shared)
    own_interval, other_interval = _interval(own, after, confidence), _interval(other, before, confidence)
    unpaired = unpaired_difference(own_interval, other_interval, (own.value, other.value))
    if paired is None:
        return *unpaired, min(own.n, other.n)
    d, low, high = map(min if sign > 0 else max, paired, unpaired)
    return d, low, high, len(shared)


def _interval(metric: Metric, by_task: Mapping[str, float], confidence: float) -> Interval:
    """The metric's interval at a confidence (a scorecard stores that of 95 %), from its values by task where it has them."""
    values = list(by_task.values())
    if values and (len(values) > 1 or is_share(values)):
        return interval(values, confidence)
    return at_confidence((metric.low, metric.high), metric.value, metric.n, confidence)


def _check(
    role: str, parent: Scorecard | None, candidate: Scorecard, what: tuple[str, str | None],
    difference: tuple[float, float, float, int] | None, required: tuple[str, bool],
) -> Check:  # fmt: skip
    (name, slice), own, other = what, _found(candidate, *what), _found(parent, *what)
    before, after = (None if found is None else found.value for found in (other, own))
    d, low, high, n = difference if difference is not None else (None, None, None, 0 if own is None else own.n)
    return Check(name, role, slice or "", before, after, _finite(d), _finite(low), _finite(high), n, *required)


def _finite(number: float | None) -> float | None:
    """JSON knows no other."""
    return number if number is not None and math.isfinite(number) else None


def _found(card: Scorecard | None, name: str, slice: str | None) -> Metric | None:
    """A scorecard's metric; None where it has none, or one that is no number."""
    table = {} if card is None else card.metrics if slice is None else card.slices.get(slice, {})
    return table[name] if name in table and math.isfinite(table[name].value) else None


def _same_tasks(parent: Scorecard, candidate: Scorecard) -> bool:
    """Whether both were measured on one suite. Raises DataError for other tasks under the same name: a comparison would mean nothing."""
    if (parent.suite, parent.split, parent.seed) != (candidate.suite, candidate.split, candidate.seed):
        return False
    before, after = parent.tasks_sha256, candidate.tasks_sha256
    if before is not None and after is not None and before != after:
        raise DataError(
            f"measured on different tasks: the parent on {parent.n} of hash {before[:12]}, the candidate on {candidate.n} of {after[:12]}",
            where=f"{candidate.suite}, {candidate.split} seed {candidate.seed}",
            remedy="measure both on the same file, or on as many tasks of the same kinds",
        )
    return True


def _within(candidate: Scorecard, rule: Target | Guardrail) -> bool:
    """Whether the candidate has a value and it lies within the rule's bounds."""
    own = _found(candidate, rule.metric, rule.slice)
    if own is None:
        return False
    return (rule.at_least is None or own.value >= rule.at_least) and (rule.at_most is None or own.value <= rule.at_most)


def _bounds(at_least: float | None, at_most: float | None) -> list[str]:
    return [
        *([f"at least {at_least:g}"] if at_least is not None else []),
        *([f"at most {at_most:g}"] if at_most is not None else []),
    ]


def _worst(difference: tuple[float, float, float, int], sign: int) -> float:
    """The end of the interval that is worst for the candidate, as a gain."""
    return difference[1] if sign > 0 else -difference[2]


def _best(difference: tuple[float, float, float, int], sign: int) -> float:
    return difference[2] if sign > 0 else -difference[1]


def _place(check: Check) -> str:
    return f"{check.metric} ({check.slice})" if check.slice else check.metric


def _shown(check: Check, candidate: Scorecard, confidence: float) -> str:
    if check.candidate is None:
        return f"no value ({_why_missing(check, candidate)})"
    if check.difference is None:
        return f"{check.candidate:.3f} ({'the parent has no value' if check.parent is None else 'no difference'})"
    if check.low is None or check.high is None:
        return f"{check.candidate:.3f} ({check.difference:+.3f}, too few values to judge, n={check.n})"
    found = f"{100 * confidence:g} % from {check.low:+.3f} to {check.high:+.3f}"
    return f"{check.candidate:.3f} ({check.difference:+.3f}, {found}, n={check.n})"


def _why_missing(check: Check, candidate: Scorecard) -> str:
    try:
        candidate.metric(check.metric, check.slice or None)
    except DataError as error:
        return f"{error.what}; {error.remedy}"
    return "it is no number"
