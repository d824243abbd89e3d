"""Stage 3: at the start the loss is ln 2, then margins rise; pairs stay pairs; the leash holds."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from workshop import FAST, LORA, Shop

from posttrain.data.records import Message, Preference
from posttrain.errors import PreflightError
from posttrain.policy import Pack
from posttrain.stages import Workbench, preference
from posttrain.training import Learner

OPTIONS = preference.PreferenceOptions(batch=4, epochs=5.0, adapter=LORA, optimiser=replace(FAST, lr=5e-3))


def pair(index: int, chosen: str = "", rejected: str = "") -> Preference:
    asked = (Message("user", f"What is due on account {index}?"),)
    better, worse = chosen or f"{index}2.50, see JV-{index}", rejected or "quite a lot, I think"
    return Preference(f"p{index}", asked, (Message("assistant", better),), (Message("assistant", worse),))


PAIRS = [pair(i) for i in range(8)]


@torch.no_grad()
def margins(bench: Workbench, pairs: list[Preference]) -> torch.Tensor:
    """h of each pair, computed pair by pair without the stage's code: (chosen - rejected) of policy less that of the base."""
    found = []
    for one in pairs:
        pack = Pack.of(bench.contract.render_preference(one))
        policy = pack.pad(bench.policy.logprobs(pack)).sum(1)
        with bench.policy.only_base():
            base = pack.pad(bench.policy.logprobs(pack)).sum(1)
        found.append((policy - base)[0] - (policy - base)[1])
    return torch.stack(found)


def test_training_starts_at_ln_two_and_raises_every_margin(shop: Shop) -> None:
    bench = shop.bench()
    assert preference.run(OPTIONS, PAIRS, bench) is None
    losses, seen = shop.notes.of("loss"), shop.notes.of("margin")
    assert len(losses) == 10
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5) and seen[0] == pytest.approx(0.0, abs=1e-5)
    assert shop.notes.of("drift")[0] == pytest.approx(0.0, abs=1e-5)
    assert losses[-1] < losses[0] - 0.1 and shop.notes.of("accuracy")[-1] == 1.0
    assert bool((margins(bench, PAIRS) > 1.0).all())
    assert seen[-1] == pytest.approx(OPTIONS.beta * float(margins(bench, PAIRS).mean()), rel=0.6)


def test_the_reference_is_computed_once_a_pair_and_the_same_for_a_run_that_begins_later(shop: Shop) -> None:
    bench = shop.bench()
    sequences = preference.check(OPTIONS, PAIRS, bench)
    bench.policy.add_adapter("main", LORA, 1)
    learner = Learner.for_adapter(bench.policy, "main", FAST, 4)
    plan = [[0, 1, 2, 3], [4, 5, 6, 7], [6, 0, 3, 5], [1, 7, 2, 4]]
    asked: list[Pack] = []
    honest = learner.reference_logprobs
    learner.reference_logprobs = lambda packs: (asked.extend(packs), honest(packs))[1]  # type: ignore[method-assign]
    whole, late = (preference.References(sequences, plan, learner, 80) for _ in range(2))
    early = [whole.of(pairs) for pairs in plan]
    assert sum(len(pack.members) for pack in asked) == len(sequences)
    for pairs, known in zip(plan[2:], early[2:], strict=True):  # resumed in the second epoch
        for one, other in zip(known, late.of(pairs), strict=True):
            assert torch.equal(one, other)
    for place, pair in enumerate(plan[2]):
        alone = Pack.of([sequences[2 * pair]])
        torch.testing.assert_close(early[2][2 * place], honest([alone])[0][1], atol=1e-4, rtol=1e-4)


def test_metrics_are_means_over_the_pairs_of_a_step_however_they_are_packed(shop: Shop) -> None:
    lines = {}
    for size in (60, 5000):
        shop.notes.lines.clear()
        preference.run(OPTIONS, PAIRS, shop.bench(f"size{size}", pack_tokens=size))
        lines[size] = [dict(metrics) for _, _, metrics in shop.notes.lines]
    for step, (small, large) in enumerate(zip(lines[60], lines[5000], strict=True)):
        assert small.pop("pack_tokens") >= large.pop("pack_tokens")
        assert small.keys() == large.keys()
        # at the first step the policy is the reference: every margin is zero but for rounding, and its sign says nothing
        for name in ("loss", "margin", "chosen_logp", "rejected_logp", *(["accuracy"] if step else [])):
            assert small[name] == pytest.approx(large[name], abs=2e-3), name


def test_the_drift_of_a_step_is_the_mean_over_chosen_tokens_however_they_are_packed(shop: Shop) -> None:
    uneven = [pair(i, chosen="x " * (1 + 6 * (i % 2))) for i in range(8)]
    drifts = {}
    for size in (60, 5000):
        shop.notes.lines.clear()
        preference.run(OPTIONS, uneven, shop.bench(f"size{size}", pack_tokens=size))
        drifts[size] = shop.notes.of("drift")
    assert drifts[60] == pytest.approx(drifts[5000], abs=2e-3) and drifts[60][-1] > 0.05


def test_prompts_are_computed_once_for_both_sides(shop: Shop) -> None:
    bench = shop.bench()
    preference.run(replace(OPTIONS, epochs=1.0), PAIRS[:1], bench)
    chosen, rejected = bench.contract.render_preference(PAIRS[0])
    prompt = len(bench.contract.prompt_ids(PAIRS[0].prompt))
    assert shop.notes.of("pack_tokens") == [float(len(chosen) + len(rejected) - prompt)]


def test_an_sft_term_keeps_the_chosen_answers_likelihood_up(shop: Shop) -> None:
    ends = {}
    for weight in (0.0, 1.0):
        shop.notes.lines.clear()
        preference.run(replace(OPTIONS, sft=weight), PAIRS, shop.bench(f"w{weight}"))
        ends[weight] = shop.notes.of("chosen_logp")
    assert ends[1.0][0] == pytest.approx(ends[0.0][0], abs=1e-3)
    assert ends[1.0][-1] > ends[0.0][-1] + 1.0


def test_the_sft_term_adds_the_mean_nll_of_the_steps_chosen_tokens(shop: Shop) -> None:
    bench = shop.bench("plain")
    chosen = [bench.contract.render_preference(p)[0] for p in PAIRS]
    with torch.no_grad():
        nll = float(-bench.policy.logprobs(Pack.of(chosen)).mean())
    for size in (60, 5000):
        shop.notes.lines.clear()
        options = replace(OPTIONS, sft=0.5, batch=8)
        preference.run(options, PAIRS, shop.bench(f"size{size}", pack_tokens=size))
        assert shop.notes.of("loss")[0] == pytest.approx(math.log(2) + 0.5 * nll, abs=1e-3)


def test_drift_beyond_the_leash_stops_the_stage_with_its_reason(shop: Shop) -> None:
    stopped = preference.run(replace(OPTIONS, max_drift=0.02), PAIRS, shop.bench())
    assert stopped is not None and stopped.startswith("drift from the reference")
    assert 1 < len(shop.notes.lines) < 10
    assert shop.notes.of("drift")[-1] > 0.02 >= max(shop.notes.of("drift")[:-1])


def test_the_stages_own_watch_is_asked_too(shop: Shop) -> None:
    bench = shop.bench(watch=lambda step, metrics: "enough" if step == 1 else None)
    assert preference.run(replace(OPTIONS, max_drift=99.0), PAIRS, bench) == "enough"


def test_a_pair_with_equal_sides_is_refused_by_name(shop: Shop) -> None:
    bench = shop.bench()
    with pytest.raises(PreflightError, match=r"1 pair\(s\) with equal sides: p7"):
        preference.run(OPTIONS, [*PAIRS[:7], pair(7, "same", "same")], bench)
    assert bench.policy.adapters == () and not shop.notes.lines


def test_a_side_that_is_too_long_or_silent_is_refused_by_name(shop: Shop) -> None:
    with pytest.raises(PreflightError, match=r"longer than max_tokens=1024: p3 \(rejected\)"):
        preference.run(OPTIONS, [pair(3, rejected="very " * 500)], shop.bench())
    silent = replace(pair(4), chosen=(Message("assistant", "!", learn=False),))
    with pytest.raises(PreflightError, match=r"zero tokens: p4 \(chosen\)"):
        preference.run(OPTIONS, [silent], shop.bench())


def test_sides_of_several_turns_keep_tool_results_out_of_the_margin(shop: Shop) -> None:
    bench = shop.bench()
    looked = (Message("assistant", "looking"), Message("tool", "a very long result " * 4), Message("assistant", "12.50"))
    mixed = [replace(p, chosen=looked) for p in PAIRS]
    chosen, _ = bench.contract.render_preference(mixed[0])
    assert chosen.learned == len(bench.contract.encode("looking")) + len(bench.contract.encode("12.50")) + 2
    assert preference.run(OPTIONS, mixed, bench) is None
    assert bool((margins(bench, mixed) > 0.5).all())
