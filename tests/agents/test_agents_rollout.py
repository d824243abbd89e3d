from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import pytest
from agents_fakes import ADD, END, FakeContract, FakeWorld, ScriptSampler, ask, call, decode, encode, sampled

from posttrain.agents import Guard, OnDenial, RolloutOptions, run_episodes, run_judged, turn_seed
from posttrain.data import Episode, Message, StopReason, Task, ToolSpec
from posttrain.errors import DataError, GrammarError, VerifierError
from posttrain.grammar import turn_grammar
from posttrain.sampling.protocol import SampleRequest

Script = Callable[[str, SampleRequest], Any]


class Setting:
    """Everything a rollout needs, with what happened kept for a look."""

    def __init__(self, script: Script, world: FakeWorld | None = None) -> None:
        self.world, self.contract, self.sampler = world or FakeWorld(), FakeContract(), ScriptSampler(script)
        self.parts: dict[str, Any] = {
            "sampler": self.sampler, "contract": self.contract, "world": self.world, "guard": Guard.of(self.world),
        }  # fmt: skip

    def play(self, *tasks: Task, seed: int = 0, **options: Any) -> list[Episode]:
        return run_episodes(tasks, **self.parts, options=RolloutOptions(**options), seed=seed)


def script(*turns: str) -> Script:
    """Says one text after another, by how many turns the prompt already holds."""
    return lambda prompt, _: turns[min(prompt.count("<assistant>") - 1, len(turns) - 1)]


def test_a_call_is_executed_its_result_read_and_the_answer_ends_the_episode() -> None:
    setting = Setting(script(call("add", by=2), "it is 2"))
    (episode,) = setting.play(ask())
    assert [message.role for message in episode.messages] == ["user", "assistant", "tool", "assistant"]
    assert episode.messages[2] == Message("tool", '{"count": 2}', (), "call_0")
    assert (episode.stop, episode.answer) == (StopReason.END_OF_TURN, "it is 2")
    assert setting.world.executed == [("add", {"by": 2}, "retail_B")]
    assert [outcome.ok for outcome in episode.outcomes] == [True]


def test_context_is_prompt_then_sampled_ids_then_results_and_samples_are_never_tokenised_again() -> None:
    odd = [*encode(call("add", by=2)[:5]), *encode(call("add", by=2)[5:]), END]
    setting = Setting(lambda prompt, _: sampled(odd) if "<tool>" not in prompt else "done")
    (episode,) = setting.play(ask())
    first, second = episode.turns
    prompt = encode("<user>go<assistant>")
    results = encode('<tool>{"count": 2}<assistant>')
    assert episode.ids == (*prompt, *odd, *results, *second.ids)
    assert (first.prompt_length, second.prompt_length) == (len(prompt), len(prompt) + len(odd) + len(results))
    for turn in episode.turns:
        assert episode.ids[turn.prompt_length : turn.prompt_length + len(turn.ids)] == turn.ids
        assert len(turn.ids) == len(turn.logprobs) == len(turn.forced)
    assert [message.role for message in setting.contract.tokenised] == ["user", "tool"]
    assert setting.sampler.calls[1][0].prompt == (*prompt, *odd, *results)


def test_several_calls_of_a_turn_run_in_order_with_ids_unique_in_the_episode() -> None:
    setting = Setting(script(call("add", by=1) + call("add", by=10), call("read"), "11"))
    (episode,) = setting.play(ask())
    assert [outcome.call.id for outcome in episode.outcomes] == ["call_0", "call_1", "call_2"]
    assert [message.tool_call_id for message in episode.messages if message.role == "tool"] == ["call_0", "call_1", "call_2"]
    assert [outcome.content for outcome in episode.outcomes] == ['{"count": 1}', '{"count": 11}', '{"count": 11}']
    assert episode.turns[1].message == episode.messages[4]


def test_every_copy_of_every_task_acts_in_an_environment_of_its_own_and_results_keep_the_order() -> None:
    setting = Setting(lambda prompt, _: call("add", by=1) if "<tool>" not in prompt else re.findall(r"\d+", prompt)[-1])
    tasks = [ask(f"t{start}", environment={"start": start}) for start in (0, 10, 20)]
    episodes = setting.play(*tasks, copies=2)
    assert [episode.task_id for episode in episodes] == ["t0", "t0", "t10", "t10", "t20", "t20"]
    assert [episode.answer for episode in episodes] == ["1", "1", "11", "11", "21", "21"]
    assert len(setting.world.environments) == 6
    assert [environment.closed for environment in setting.world.environments] == [1] * 6
    assert len(setting.sampler.calls) == 2  # one batch for each turn


def test_an_episode_without_calls_opens_no_environment() -> None:
    setting = Setting(script("hello"))
    assert setting.play(ask())[0].outcomes == ()
    assert setting.world.environments == []


def test_episodes_that_end_leave_the_batch_and_progress_counts_them() -> None:
    told: list[int] = []
    setting = Setting(
        lambda prompt, _: "short" if "one" in prompt else script(call("add", by=1), call("add", by=1), "long")(prompt, _)
    )
    tasks = [ask("a", "one"), ask("b", "two"), ask("c", "one")]
    run_episodes(tasks, **setting.parts, options=RolloutOptions(), progress=told.append)
    assert [len(requests) for requests in setting.sampler.calls] == [3, 1, 1]
    assert told == [1, 1, 1]


def test_no_tasks_are_no_episodes() -> None:
    assert Setting(script("x")).play() == []


def test_a_denied_call_is_not_executed_and_the_model_reads_the_reason() -> None:
    setting = Setting(script(call("pay", amount="100.00"), "refused"))
    (episode,) = setting.play(ask())
    assert setting.world.executed == []
    assert [(outcome.ok, outcome.denied) for outcome in episode.outcomes] == [(False, "not_permitted")]
    assert episode.messages[2].content == '{"error":"denied","detail":"not_permitted"}'
    assert episode.answer == "refused"


def test_the_boundary_of_a_permission_is_its_tenant_and_its_amount() -> None:
    for tenant, amount, executed in (
        ("retail_B", "99.99", 1),
        ("retail_B", "100.00", 0),
        ("bank_A", "1.00", 0),
        (None, "1.00", 0),
    ):
        setting = Setting(script(call("pay", amount=amount), "done"))
        setting.play(ask(tenant=tenant))
        assert len(setting.world.executed) == executed, (tenant, amount)


def test_a_forbid_is_reported_by_its_id_and_a_missing_fact_denies() -> None:
    for frozen, reason in ((True, "frozen"), (None, "missing_context")):
        setting = Setting(script(call("pay", amount="5.00"), "done"), FakeWorld(frozen))
        assert setting.play(ask())[0].outcomes[0].denied == reason
        assert setting.world.executed == []


def test_facts_that_cannot_be_had_deny(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("database gone")

    setting = Setting(script(call("pay", amount="5.00"), "done"))
    monkeypatch.setattr(setting.world, "guard_context", broken)
    assert setting.play(ask())[0].outcomes[0].denied == "no_context"
    assert setting.world.executed == []


def test_a_denial_ends_the_episode_where_the_policy_says_so() -> None:
    setting = Setting(script(call("pay", amount="500.00") + call("add", by=1), "done"))
    (episode,) = setting.play(ask(), on_denial=OnDenial.STOP)
    assert episode.stop is StopReason.DENIED
    assert len(episode.outcomes) == 1  # what follows the refusal in the turn is not tried
    assert setting.world.executed == []


@pytest.mark.parametrize(
    ("said", "content"),
    [
        (call("transfer", amount="1.00"), '{"error":"unknown_tool","detail":"offered: add, pay, read"}'),
        (call("add", by="two"), '{"error":"invalid_arguments","detail":"by: \\"two\\" is not of type \\"integer\\""}'),
        (call("add"), '{"error":"invalid_arguments","detail":"\\"by\\" is a required property"}'),
        (call("pay", amount="1.0"), "invalid_arguments"),
        (call("read", what="explode"), '{"error":"tool_failed","detail":"ZeroDivisionError"}'),
        (call("read", what="nothing"), '{"error":"not_found"}'),
    ],
)
def test_a_call_that_cannot_succeed_is_told_to_the_model_and_the_episode_goes_on(said: str, content: str) -> None:
    (episode,) = Setting(script(said, "I see")).play(ask(), constrained=False)
    assert not episode.outcomes[0].ok
    assert episode.outcomes[0].denied is None
    assert content in episode.outcomes[0].content.replace("'", '\\"')
    assert episode.answer == "I see"


def test_a_tool_that_the_world_has_but_the_task_does_not_offer_is_not_executed() -> None:
    setting = Setting(script(call("add", by=1), "ok"))
    (episode,) = setting.play(ask(tools=()))
    assert setting.world.executed == []
    assert "unknown_tool" in episode.outcomes[0].content


def test_a_malformed_call_ends_the_episode_and_executes_nothing() -> None:
    setting = Setting(script(call("add", by=1) + "<tool_call>{broken"))
    (episode,) = setting.play(ask())
    assert episode.stop is StopReason.MALFORMED_CALL
    assert setting.world.executed == []
    assert episode.messages[-1].tool_calls == ()
    assert "<tool_call>{broken" in episode.messages[-1].content


@pytest.mark.parametrize("stop", [StopReason.LENGTH, StopReason.CLOSED])
@pytest.mark.parametrize("text", [call("add", by=1), call("add", by=1)[:-5], "half an ans"])
def test_what_was_cut_by_length_is_never_executed(text: str, stop: StopReason) -> None:
    setting = Setting(lambda *_: sampled(encode(text), stop))
    (episode,) = setting.play(ask())
    assert episode.stop is stop
    assert setting.world.executed == []
    assert episode.outcomes == ()
    assert decode(episode.turns[0].ids) == text


def test_the_budget_of_calls_ends_the_episode_before_one_too_many() -> None:
    setting = Setting(script(call("add", by=1) * 2))
    (episode,) = setting.play(ask(max_turns=9), max_calls=3)
    assert episode.stop is StopReason.MAX_TURNS
    assert len(setting.world.executed) == 3
    assert len(episode.turns) == 2


def test_the_budget_of_turns_is_the_tasks() -> None:
    setting = Setting(script(call("add", by=1)))
    (episode,) = setting.play(ask(max_turns=3), max_calls=None)
    assert episode.stop is StopReason.MAX_TURNS
    assert len(episode.turns) == 3
    assert episode.answer == ""


def test_the_budget_of_tokens_bounds_each_request_and_the_episode() -> None:
    first = call("add", by=1)
    setting = Setting(script(first))
    (episode,) = setting.play(ask(), max_tokens=len(first) + 11, max_tokens_per_turn=len(first) + 5)
    assert [requests[0].options.max_tokens for requests in setting.sampler.calls] == [len(first) + 5, 10]
    setting = Setting(script(first))
    (episode,) = setting.play(ask(), max_tokens=len(first) + 1)
    assert episode.stop is StopReason.LENGTH
    assert len(episode.turns) == 1


def test_the_budget_of_seconds_ends_the_episode_after_the_turn_that_spent_it() -> None:
    def slow(*_: Any) -> str:
        time.sleep(0.03)
        return call("add", by=1)

    setting = Setting(slow)
    (episode,) = setting.play(ask(max_turns=99), max_seconds=0.02)
    assert episode.stop is StopReason.MAX_TURNS
    assert len(episode.turns) == 1
    assert len(setting.world.executed) == 1
    assert episode.seconds >= 0.03


def test_a_context_that_is_full_ends_the_episode_instead_of_overflowing() -> None:
    prompt = len("<user>go<assistant>")
    setting = Setting(script("hello"))
    assert setting.play(ask(), max_context=prompt)[0].stop is StopReason.LENGTH
    assert setting.sampler.calls == []
    setting.play(ask(), max_context=prompt + 7)
    assert setting.sampler.calls[0][0].options.max_tokens == 7


def test_requests_carry_the_grammar_of_their_tasks_tools_and_schema_only_when_constrained() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    setting = Setting(script("x"))
    setting.play(ask("t", tools=(ADD,), response_schema=schema), calls_per_turn=3)
    assert setting.sampler.calls[0][0].grammar == turn_grammar((ADD,), schema, max_calls=3)
    setting.play(ask(), constrained=False)
    assert setting.sampler.calls[1][0].grammar is None


def test_sampling_options_and_the_adapter_of_the_tenant_reach_the_sampler() -> None:
    setting = Setting(script("x"))
    run_episodes([ask()], **setting.parts, options=RolloutOptions(max_tokens_per_turn=7, temperature=0.5, top_p=0.9, top_k=3),
                 adapter_for=lambda task: f"adapter-{task.tenant}")  # fmt: skip
    request = setting.sampler.calls[0][0]
    assert (request.options.max_tokens, request.options.temperature, request.options.top_p, request.options.top_k) == (
        7,
        0.5,
        0.9,
        3,
    )
    assert request.adapter == "adapter-retail_B"


def test_seeds_depend_on_run_task_turn_and_copy_and_on_nothing_else() -> None:
    assert len({turn_seed(s, t, n, c) for s in (0, 1) for t in "ab" for n in (0, 1) for c in (0, 1)}) == 16
    assert 0 <= turn_seed(3, "task", 2, 1) < 2**63

    def seeds(*tasks: Task, **options: Any) -> dict[tuple[str, int], int]:
        setting = Setting(script(call("add", by=1), "x"))
        setting.play(*tasks, **options)
        return {(decode(r.prompt), n): r.seed for n, batch in enumerate(setting.sampler.calls) for r in batch}

    alone, together = seeds(ask("b", "bb")), seeds(ask("a", "aa"), ask("b", "bb"))
    assert alone.items() <= together.items()
    assert seeds(ask("b", "bb"), seed=1) != alone


def test_judged_episodes_are_judged_in_the_world_as_they_left_it() -> None:
    setting = Setting(script(call("add", by=4), "4"))
    tasks = [
        ask("good", verifier="counted", arguments={"count": 4}),
        ask("bad", verifier="counted", arguments={"count": 5}),
        ask(
            "calls", arguments={"calls": [{"name": "add", "arguments": {"by": 4}}], "state": [{"sql": "SELECT 1", "rows": [[4]]}]}
        ),
        ask("broken", arguments={"cals": []}),
    ]
    results = run_judged(tasks, **setting.parts, options=RolloutOptions())
    assert [judgement and judgement.passed for _, judgement in results] == [True, False, True, None]
    assert [environment.closed for environment in setting.world.environments] == [1] * 4


def test_a_judge_sees_a_fresh_world_when_the_model_did_nothing() -> None:
    setting = Setting(script("I did nothing"))
    ((_, judgement),) = run_judged([ask(verifier="counted", arguments={"count": 0})], **setting.parts, options=RolloutOptions())
    assert judgement is not None
    assert judgement.passed


def test_an_unknown_verifier_is_refused_before_anything_is_sampled() -> None:
    setting = Setting(script("x"))
    with pytest.raises(VerifierError, match="known: counted, expected"):
        run_judged([ask(verifier="nobody")], **setting.parts, options=RolloutOptions())
    assert setting.sampler.calls == []


def test_a_verifier_that_fails_leaves_its_episode_unjudged_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    setting = Setting(script("done"))
    counted = setting.world.verifiers()["counted"]

    def picky(task: Task, *rest: Any) -> Any:
        if task.id == "odd":
            raise TypeError("cannot compare")
        return counted(task, *rest)

    monkeypatch.setattr(setting.world, "verifiers", lambda: {"counted": picky})
    tasks = [
        *(ask(name, verifier="counted", arguments={"count": 0}) for name in ("a", "odd", "b")),
        ask("c", arguments={"cals": []}),
    ]
    results = run_judged(tasks, **setting.parts, options=RolloutOptions())
    assert [judgement and judgement.passed for _, judgement in results] == [True, None, True, None]
    assert [environment.closed for environment in setting.world.environments] == [1] * 4
    assert "task odd could not be judged: counted failed" in caplog.text
    assert "TypeError: cannot compare" in caplog.text
    assert "task c: unknown expectation" in caplog.text


@pytest.mark.parametrize("where", ["sampler", "close"])
def test_environments_are_closed_on_every_way_out(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("stop here")

    second = fail if where == "sampler" else (lambda *_: "done")
    setting = Setting(lambda prompt, request: call("add", by=1) if "<tool>" not in prompt else second())
    if where == "close":
        opened = setting.world.environment

        def environment(*given: Any, **named: Any) -> Any:
            made = opened(*given, **named)
            if len(setting.world.environments) == 1:
                kept = made.close
                made.close = lambda: (kept(), fail())
            return made

        monkeypatch.setattr(setting.world, "environment", environment)
    with pytest.raises(RuntimeError, match="stop here"):
        run_judged(
            [ask(str(n), verifier="counted", arguments={"count": 1}) for n in range(3)], **setting.parts, options=RolloutOptions()
        )
    assert [environment.closed for environment in setting.world.environments] == [1] * 3


def test_a_task_that_cannot_be_played_is_refused_before_anything_is_sampled() -> None:
    setting = Setting(script("x"))
    with pytest.raises(DataError, match="without messages"):
        setting.play(Task("t", ()))
    with pytest.raises((DataError, GrammarError), match="tool odd"):
        setting.play(ask(tools=(ToolSpec("odd", "", {"type": "object", "properties": 3}),)), constrained=False)
    with pytest.raises(GrammarError, match="uniqueItems"):
        setting.play(ask(response_schema={"type": "array", "uniqueItems": True}))
    assert setting.sampler.calls == []
