from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from posttrain.agents import Decision, Guard, PolicyError, Ruling

POLICIES = """
@id("read")
permit (principal, action in [Action::"query", Action::"search"], resource);
@id("small")
permit (principal == Tenant::"retail_B", action == Action::"transfer", resource)
when { context.amount < 100 || (context has approvals && context.approvals >= 2) };
@id("frozen")
forbid (principal, action == Action::"transfer", resource) when { context has frozen && context.frozen };
permit (principal == Tenant::"bank_A", action == Action::"post", resource) unless { context has reversed && context.reversed };
"""
SCHEMA = """
entity Tenant; entity Tool;
action "query", "search", "post" appliesTo { principal: Tenant, resource: Tool, context: { reversed?: Bool } };
action "transfer" appliesTo { principal: Tenant, resource: Tool, context: { amount: Long, approvals?: Long, frozen?: Bool } };
"""


@pytest.fixture(params=[None, SCHEMA], ids=["no_schema", "schema"])
def guard(request: pytest.FixtureRequest) -> Guard:
    return Guard(POLICIES, request.param)


def ask(guard: Guard, tenant: str | None, tool: str, **context: Any) -> Decision:
    return guard.authorise(tenant, tool, {}, context)


def test_what_a_permit_covers_is_allowed_with_its_id(guard: Guard) -> None:
    assert ask(guard, "retail_B", "transfer", amount=99, frozen=False) == Decision(True, Ruling.PERMITTED, ("small",))
    assert ask(guard, "retail_B", "transfer", amount=100, approvals=2, frozen=False).allowed
    assert ask(guard, "bank_A", "search", reversed=False).reasons == ("read",)


def test_what_no_permit_covers_is_denied(guard: Guard) -> None:
    for decision in (
        ask(guard, "retail_B", "transfer", amount=100, frozen=False),
        ask(guard, "bank_A", "transfer", amount=1, frozen=False),
        ask(guard, "retail_B", "post", reversed=False),
        ask(guard, 'retail_B" || true', "transfer", amount=1, frozen=False),
    ):
        assert decision == Decision(False, Ruling.NOT_PERMITTED)
        assert decision.reason == "not_permitted"


def test_a_tool_that_no_policy_knows_is_denied(guard: Guard) -> None:
    assert not ask(guard, "bank_A", "drop_tables", reversed=False).allowed


def test_nobody_is_no_tenant(guard: Guard) -> None:
    assert not ask(guard, None, "transfer", amount=1, frozen=False).allowed
    assert not ask(guard, "", "transfer", amount=1, frozen=False).allowed


def test_a_forbid_wins_and_its_id_is_the_reason(guard: Guard) -> None:
    decision = ask(guard, "retail_B", "transfer", amount=1, frozen=True)
    assert (decision.allowed, decision.ruling, decision.reasons) == (False, Ruling.FORBIDDEN, ("frozen",))
    assert decision.reason == "frozen"


def test_a_policy_without_an_id_is_named_by_its_position() -> None:
    assert Guard(POLICIES).authorise("bank_A", "post", {}, {"reversed": False}).reasons == ("policy3",)


def test_an_attribute_whose_absence_would_help_must_be_there() -> None:
    guard = Guard(POLICIES)
    decision = ask(guard, "retail_B", "transfer", amount=1)
    assert (decision.ruling, decision.reasons) == (Ruling.MISSING_CONTEXT, ("frozen",))
    assert ask(guard, "bank_A", "post").reasons == ("reversed",)
    assert ask(guard, "retail_B", "transfer", amount=1, frozen=None).ruling is Ruling.MISSING_CONTEXT
    assert ask(guard, "bank_A", "query").allowed  # other actions need nothing


def test_an_attribute_that_is_read_without_a_has_before_it_must_be_there() -> None:
    guard = Guard(POLICIES)
    assert ask(guard, "retail_B", "transfer", approvals=2, frozen=False).reasons == ("amount",)
    assert ask(guard, "retail_B", "transfer", amount=200, frozen=False).ruling is Ruling.NOT_PERMITTED  # approvals has its `has`


def test_a_reading_that_another_missing_attribute_would_hide_denies_before_and_after() -> None:
    guard = Guard("permit(principal, action, resource) unless { !(context has a && context.b > 1) };")
    assert guard.authorise("t", "pay", {}, {"a": 1}).reasons == ("b",)
    assert guard.authorise("t", "pay", {}, {}).reasons == ("b",)


def test_a_policy_that_fails_denies_although_another_permits() -> None:
    guard = Guard(
        '@id("all") permit(principal, action, resource); @id("cap") forbid(principal, action, resource) when { context.amount > 5 };'
    )
    decision = guard.authorise("a", "pay", {}, {"amount": "six"})
    assert (decision.allowed, decision.ruling, decision.reasons) == (False, Ruling.POLICY_ERROR, ("cap",))
    assert "long" in decision.detail
    assert guard.authorise("a", "pay", {}, {}).ruling is Ruling.MISSING_CONTEXT
    assert guard.authorise("a", "pay", {}, {"amount": 5}).allowed


def test_a_context_outside_the_schema_is_denied() -> None:
    guard = Guard(POLICIES, SCHEMA)
    for context in ({"amount": "1", "frozen": False}, {"frozen": False}, {"amount": 1, "frozen": False, "more": 1}):
        assert guard.authorise("retail_B", "transfer", {}, context).ruling in (Ruling.POLICY_ERROR, Ruling.MISSING_CONTEXT)


def test_without_a_context_the_arguments_are_read() -> None:
    guard = Guard("permit(principal, action, resource) when { context.amount < 10 };")
    assert guard.authorise("a", "pay", {"amount": 9}).allowed
    assert not guard.authorise("a", "pay", {"amount": 9}, {"amount": 10}).allowed


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else 1


@pytest.mark.parametrize(
    "value", [2**63, -(2**63) - 1, 0.00001, 1e30, float("nan"), float("inf"), b"x", object(), "\ud800", nested(500)]
)
def test_a_value_that_no_policy_can_read_denies(value: Any) -> None:
    guard = Guard("permit(principal, action, resource);")
    assert guard.authorise("a", "pay", {"x": 1, "deep": [{"y": 2}]}).allowed
    assert guard.authorise("a", "pay", {"deep": [{"y": value}]}).ruling is Ruling.POLICY_ERROR


ENTITIES = """
entity Tenant; entity Tool;
action "pay" appliesTo { principal: Tenant, resource: Tool, context: { a?: Tenant, b?: Long, c?: Set<decimal> } };
"""
GUARDS = [
    Guard("permit(principal, action, resource);", ENTITIES),
    Guard("permit(principal, action, resource) when { context has a && context.a == 1 };"),
]
KEYS = st.text(st.characters(), max_size=3) | st.sampled_from(["a", "b", "c", "type", "id"])  # half surrogate pairs among them
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | KEYS | st.sampled_from([1e30, -1e24, 1e15, 10**30]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60)
@given(st.sampled_from(GUARDS), KEYS | st.none(), KEYS, st.dictionaries(KEYS, VALUES, max_size=3))
def test_no_request_raises(guard: Guard, tenant: str | None, tool: str, arguments: dict[str, Any]) -> None:
    decision = guard.authorise(tenant, tool, arguments)
    assert decision.allowed is (decision.ruling is Ruling.PERMITTED)


def test_fractions_are_compared_as_decimals() -> None:
    guard = Guard('permit(principal, action, resource) when { context.rate.lessThan(decimal("0.5")) };')
    assert guard.authorise("a", "pay", {"rate": 0.25}).allowed
    assert not guard.authorise("a", "pay", {"rate": 0.75}).allowed


@pytest.mark.parametrize("name", ["__entity", "__extn", "__expr"])
def test_arguments_cannot_smuggle_entities_in(name: str) -> None:
    guard = Guard('permit(principal, action, resource) when { context.who == Tenant::"root" };')
    assert guard.authorise("a", "pay", {"who": {name: {"type": "Tenant", "id": "root"}}}).ruling is Ruling.POLICY_ERROR


@pytest.mark.parametrize(
    ("policies", "schema", "message"),
    [
        ("permit(", None, "cannot be read"),
        ("permit(principal, action, resource) when { contxt.a };", None, "cannot be read"),
        (POLICIES, "entity", "cannot be read"),
        (POLICIES.replace("context.amount", "context.amuont"), SCHEMA, "amuont"),
        (POLICIES.replace('"transfer"', '"transfr"'), SCHEMA, "do not fit their schema"),
        ('@id("r") permit(principal, action, resource) when { context.a == {"b": 1} };', None, "whole record"),
    ],
)
def test_policies_that_are_wrong_are_refused_when_they_are_loaded(policies: str, schema: str | None, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        Guard(policies, schema)


GROUPS = """
entity Group; entity Tenant in [Group] { suspended?: Bool } tags Bool; entity Tool in [Group];
action "money"; action "pay", "refund" in ["money"] appliesTo { principal: Tenant, resource: Tool, context: { amount?: Long } };
action "query" appliesTo { principal: Tenant, resource: Tool };
"""


@pytest.mark.parametrize("schema", [None, GROUPS], ids=["no_schema", "schema"])
@pytest.mark.parametrize(
    ("scope", "condition"),
    [
        ('principal in Group::"frozen", action, resource', "true"),
        ('principal is Tenant in Group::"frozen", action, resource', "true"),
        ('principal, action, resource in Group::"risky"', "true"),
        ("principal, action, resource", 'principal in Group::"frozen"'),
        ("principal, action, resource", 'principal in [Group::"late", Group::"frozen"]'),
        ("principal, action, resource", 'principal is Tenant in Group::"frozen"'),
        ("principal is Tenant, action, resource", "principal has suspended && principal.suspended"),
        ("principal is Tenant, action, resource", 'principal.hasTag("frozen") && principal.getTag("frozen")'),
        ("principal is Tenant, action, resource is Tool", '(if true then principal else resource) in Group::"frozen"'),
        ("principal is Tenant, action, resource", '!(context has amount && !(resource in Group::"risky"))'),
        ("principal, action, resource", '[principal in Group::"a", false].contains(true)'),
        ("principal, action, resource", 'Tenant::"bank_A" in Group::"frozen"'),
    ],
)
def test_a_rule_that_needs_an_entitys_data_is_refused_when_it_is_loaded(scope: str, condition: str, schema: str | None) -> None:
    rule = f'@id("stop") forbid({scope}) when {{ {condition} }};'
    with pytest.raises(PolicyError, match=r"would never apply; got 'stop'; compare with =="):
        Guard(f"permit(principal, action, resource); {rule}", schema)


@pytest.mark.parametrize(
    "rule",
    [
        'forbid(principal, action in Action::"money", resource);',
        'forbid(principal, action, resource) when { action in Action::"money" };',
    ],
)
def test_a_group_of_actions_needs_a_schema(rule: str) -> None:
    policies = f"permit(principal, action, resource); {rule}"
    with pytest.raises(PolicyError, match=r"`(action )?in`.*policy1.*give a schema"):
        Guard(policies)
    guard = Guard(policies, GROUPS)
    assert guard.authorise("a", "pay", {}).ruling is Ruling.FORBIDDEN
    assert guard.authorise("a", "query", {}).allowed


@pytest.mark.parametrize(
    "rule",
    [
        'forbid(principal, action in [Action::"pay", Action::"refund"], resource);',
        'forbid(principal, action, resource) when { action in [Action::"pay", Action::"refund"] };',
        'forbid(principal, action == Action::"pay", resource) when { [Tenant::"a", Tenant::"b"].contains(principal) };',
    ],
)
@pytest.mark.parametrize("schema", [None, GROUPS], ids=["no_schema", "schema"])
def test_a_list_of_actions_or_of_principals_needs_no_groups(rule: str, schema: str | None) -> None:
    guard = Guard(f"permit(principal, action, resource); {rule}", schema)
    assert guard.authorise("a", "pay", {}).ruling is Ruling.FORBIDDEN
    assert guard.authorise("a", "query", {}).allowed


def test_an_attribute_of_a_choice_between_contexts_is_refused() -> None:
    rule = "forbid(principal, action, resource) when { (if true then context else context) has amount };"
    with pytest.raises(PolicyError, match="`amount` of something else than the context"):
        Guard(f"permit(principal, action, resource); {rule}")


def test_a_template_is_refused_because_nothing_fills_it_in() -> None:
    with pytest.raises(PolicyError, match=r"template.*'frozen'"):
        Guard('permit(principal, action, resource); @id("frozen") forbid(principal == ?principal, action, resource);')


def test_no_policies_permit_nothing() -> None:
    assert not Guard("").authorise("bank_A", "query", {}).allowed


# -- the property: taking an attribute away never turns Deny into Allow ------------------------------------------------

NAMES = ("a", "b", "c")


@st.composite
def conditions(draw: st.DrawFn, depth: int = 3) -> str:
    """Any condition over three Long attributes, read with and without `has`."""
    name = draw(st.sampled_from(NAMES))
    if depth == 0 or draw(st.booleans()):
        return draw(st.sampled_from([f"context has {name}", f"context.{name} > 1", f"context.{name} == 1", "true"]))
    left, right = draw(conditions(depth - 1)), draw(conditions(depth - 1))
    third = draw(conditions(depth - 1))
    form = draw(
        st.sampled_from(["({0}) && ({1})", "({0}) || ({1})", "!({0})", "if ({0}) then ({1}) else ({2})", "({0}) == ({1})"])
    )
    return form.format(left, right, third)


@st.composite
def policy_sets(draw: st.DrawFn) -> str:
    rules = draw(
        st.lists(st.tuples(st.sampled_from(["permit", "forbid"]), st.sampled_from(["when", "unless"]), conditions()), max_size=4)
    )
    scopes = ["action", 'action == Action::"pay"', 'action in [Action::"pay", Action::"read"]']
    lines = [
        f"{effect}(principal, {draw(st.sampled_from(scopes))}, resource) {kind} {{ {text} }};" for effect, kind, text in rules
    ]
    return "\n".join(["permit(principal, action, resource);", *lines] if draw(st.booleans()) else lines)


@given(policy_sets(), st.dictionaries(st.sampled_from(NAMES), st.integers(0, 3)), st.data())
def test_taking_an_attribute_away_never_turns_deny_into_allow(
    policies: str, context: dict[str, int], data: st.DataObject
) -> None:
    assume(context)
    guard = Guard(policies)
    fewer = {key: value for key, value in context.items() if key != data.draw(st.sampled_from(sorted(context)))}
    before, after = guard.authorise("t", "pay", {}, context), guard.authorise("t", "pay", {}, fewer)
    assert before.allowed or not after.allowed, json.dumps([policies, context, fewer])


@given(policy_sets(), st.dictionaries(st.sampled_from(NAMES), st.integers(0, 3)))
def test_a_call_is_allowed_only_when_it_is_permitted(policies: str, context: dict[str, int]) -> None:
    decision = Guard(policies).authorise("t", "pay", {}, context)
    assert decision.allowed is (decision.ruling is Ruling.PERMITTED)
    assert decision.reason


def test_a_nested_attribute_whose_absence_would_help_must_be_there() -> None:
    guard = Guard(
        "permit(principal, action, resource); forbid(principal, action, resource) when { context.a has b && context.a.b > 1 };"
    )
    assert guard.authorise("t", "pay", {"a": {"b": 1}}).allowed
    assert guard.authorise("t", "pay", {"a": {"b": 2}}).ruling is Ruling.FORBIDDEN
    assert guard.authorise("t", "pay", {"a": {}}).reasons == ("a.b",)
    assert not guard.authorise("t", "pay", {}).allowed
