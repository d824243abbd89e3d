"""Stage 1, supervised fine-tuning: say it in the product's format and roles. The same loop trains tenant adapters and tool use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from posttrain.contract import Sequence as Rendered
from posttrain.contract.preflight import Preflight, preflight
from posttrain.data.records import Conversation
from posttrain.objectives.supervised import sft_ce
from posttrain.objectives.tensors import Metrics
from posttrain.policy.pack import fill_packs
from posttrain.policy.policy import LoraOptions
from posttrain.ranges import Count, Positive
from posttrain.stages.bench import Work, Workbench, batches, learned_weight, train
from posttrain.training import Learner, OptimiserOptions, Scored


@dataclass(frozen=True, slots=True)
class SftOptions:
    """batch: records per step; epochs may be fractional; max_tokens: a longer record is an error, never a silent cut."""

    batch: Count = 24
    epochs: Positive = 1.0
    max_tokens: Count = 1024
    adapter: LoraOptions = field(default_factory=LoraOptions)
    optimiser: OptimiserOptions = field(default_factory=lambda: OptimiserOptions(lr=1.5e-3))


def check(options: SftOptions, conversations: Sequence[Conversation], bench: Workbench) -> tuple[Sequence[Rendered], Preflight]:
    """Render everything and refuse what would train wrongly, before any training starts."""
    rendered = bench.renderer.conversations(conversations)
    names = [conversation.id for conversation in conversations]
    return rendered, preflight(
        zip(names, rendered, strict=True), max_tokens=options.max_tokens, end_of_turn=bench.contract.end_of_turn
    )


def run(options: SftOptions, conversations: Sequence[Conversation], bench: Workbench, name: str = "main") -> str | None:
    """Train adapter `name` on the conversations; returns why it stopped early, if it did."""
    rendered, _ = check(options, conversations, bench)
    return fit(options, rendered, bench, name)


def fit(options: SftOptions, rendered: Sequence[Rendered], bench: Workbench, name: str, phase: str = "train") -> str | None:
    """Masked cross-entropy on rendered sequences (objectives.md 1.1), one global token mean a step."""
    plan = batches(len(rendered), options.batch, options.epochs, bench.seed)
    if name not in bench.policy.adapters:
        bench.policy.add_adapter(name, options.adapter, bench.seed)
    learner = Learner.for_adapter(bench.policy, name, options.optimiser, len(plan))

    def work(step: int) -> Work:
        sequences = [rendered[i] for i in plan[step]]
        return Work(fill_packs(sequences, bench.pack_tokens), token_cross_entropy(learned_weight(sequences)))

    stopped = train(bench, learner, work, phase)
    learner.freeze()
    return stopped


def token_cross_entropy(total: float) -> SftObjective:
    """Objective of a pack whose step holds `total` weight in all its packs."""
    return SftObjective(total)


@dataclass(frozen=True, slots=True)
class SftObjective:
    total: float

    def __call__(self, scored: Scored) -> tuple[Tensor, Metrics]:
        return sft_ce(scored.padded_logprobs(), scored.pack.padded_weights(), normaliser=self.total)
