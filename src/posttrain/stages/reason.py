"""Stage 5, verifiable reasoning: collect best-of-K that the verifier passes, learn from them, then GRPO on the verifier's score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from posttrain.contract import Sequence as Rendered
from posttrain.data.records import Episode, Task
from posttrain.errors import DataError
from posttrain.policy.policy import LoraOptions
from posttrain.ranges import Count, Positive, Whole
from posttrain.stages import sft
from posttrain.stages.bench import Workbench, derive
from posttrain.stages.policy_gradient import GrpoOptions, Played
from posttrain.stages.rollouts import Play, Show, improve, pass_share, passes
from posttrain.training import OptimiserOptions


@dataclass(frozen=True, slots=True)
class CollectOptions:
    """Rejection sampling (ReST-EM's E-step): K samples a task, the passed ones kept, at most `cap` distinct ones a task, and
    `easy_cap` where every sample passed: there the policy learns nothing new, but it keeps what it can. demonstrate: a task that no
    sample passed is learned from its demonstration, where it has one and the verifier passes it (in place of STaR's rationalisation,
    objectives.md 5.3): what is never right by chance cannot be collected."""

    tasks: Whole = 48
    samples: Count = 4
    cap: Count = 2
    easy_cap: Whole = 2
    demonstrate: bool = False
    epochs: Positive = 2.0
    batch: Count = 16
    optimiser: OptimiserOptions = field(default_factory=lambda: OptimiserOptions(lr=8e-4))


@dataclass(frozen=True, slots=True)
class ReasonOptions:
    """Either half may be switched off, by `collect.tasks: 0` or `grpo.steps: 0`. temperature is the samples'; the losses are of the
    untempered distribution, so with another value than 1 the samples of GRPO are off-policy and nothing corrects for it. max_tokens:
    the longest sequence to learn from."""

    adapter: LoraOptions = field(default_factory=LoraOptions)
    collect: CollectOptions = field(default_factory=CollectOptions)
    grpo: GrpoOptions = field(default_factory=GrpoOptions)
    max_tokens: Count = 1024
    temperature: Positive = 1.0

    def demonstrating(self, tasks: Sequence[Task]) -> dict[str, Sequence[Task]]:
        """The tasks of each half that learns from demonstrations, by the option that asks for it."""
        first = self.collect.tasks
        halves: dict[str, Sequence[Task]] = {}
        if self.collect.demonstrate and first:
            halves["collect.demonstrate"] = tasks[:first]
        if self.grpo.loss_name == "luffy" and self.grpo.steps:
            halves["grpo.loss"] = tasks[first:]
        return halves


def check_tasks(options: ReasonOptions, tasks: Sequence[Task], where: str = "reason.data") -> None:
    """Raise DataError when the options need more tasks than there are: no task is played twice."""
    needed = options.collect.tasks + options.grpo.needed
    if len(tasks) < needed:
        raise DataError("too few tasks for the options", where=where, value=len(tasks), remedy=f"give at least {needed}")


def run(
    options: ReasonOptions, tasks: Sequence[Task], play: Play, bench: Workbench, name: str = "main", *, show: Show | None = None
) -> str | None:
    """Train adapter `name` on tasks with a verifier; returns why it stopped early, if it did. `show` is needed where
    demonstrations are learned from."""
    check_tasks(options, tasks)
    if show is None and (asked := options.demonstrating(tasks)):
        raise ValueError(f"{' and '.join(asked)} needs `show`, which plays demonstrations")
    bench.policy.add_adapter(name, options.adapter, bench.seed)
    rest = list(tasks)
    if options.collect.tasks:
        kept = collect(options.collect, rest[: options.collect.tasks], play, bench, show)
        rest = rest[options.collect.tasks :]
        if kept:
            fit = sft.SftOptions(
                options.collect.batch,
                options.collect.epochs,
                options.max_tokens,
                options.adapter,
                options.collect.optimiser,
            )
            sft.fit(fit, kept, bench, name, phase="collect")
    return improve(options.grpo, rest, play, bench, name, show) if options.grpo.steps else None


def collect(
    options: CollectOptions, tasks: Sequence[Task], play: Play, bench: Workbench, show: Show | None = None
) -> list[Rendered]:
    """Sequences of the episodes the verifier passed, capped and deduplicated per task. Sampled from the parent (adapter still zero)."""
    with bench.clock("sample"), bench.policy.gathered():
        played = play(tasks, options.samples, derive(bench.seed, "collect"), None)
    groups = [played[start : start + options.samples] for start in range(0, len(played), options.samples)]
    unsolved = [index for index, group in enumerate(groups) if not any(passes(judgement) for _, judgement in group)]
    kept = [_chosen(options, group) for group in groups]
    demonstrated: list[int] = []
    if options.demonstrate:
        assert show is not None, "demonstrations need what plays them"
        demonstrated = [index for index in unsolved if tasks[index].demonstration]
        for index, (episode, judgement) in zip(demonstrated, show([tasks[i] for i in demonstrated]), strict=True):
            kept[index] = [episode] if passes(judgement) else []
    bench.log(
        "collect",
        -1,
        1,
        {
            "collect_pass_share": pass_share(played),
            "collect_solved_share": (len(groups) - len(unsolved)) / max(1, len(tasks)),
            "collect_demonstrated": float(sum(len(kept[index]) for index in demonstrated)),
            "collect_kept": float(sum(map(len, kept))),
        },
    )
    sequences = [bench.contract.render_episode(episode) for episodes in kept for episode in episodes]
    return [sequence for sequence in sequences if sequence.learned]


def _chosen(options: CollectOptions, group: Sequence[Played]) -> list[Episode]:
    """Of one task's samples the distinct ones that passed, as many as the options take."""
    right = [episode for episode, judgement in group if passes(judgement)]
    distinct: dict[tuple[int, ...], Episode] = {}
    for episode in right:
        distinct.setdefault(episode.ids, episode)
    most = options.easy_cap if len(right) == len(group) else options.cap
    return list(distinct.values())[:most]
