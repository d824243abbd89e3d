"""A key leads to its own tenant's release or to a refusal: never to the base, never to another tenant's adapter."""

from __future__ import annotations

import json
from pathlib import Path

import openai
import pytest
from release_making import contract_lock
from serving_house import House, running

from posttrain.errors import IntegrityError
from posttrain.releases import Channels, Kind, Parent
from posttrain.serving import AccessFile, Refused, Route, RoutingReason, issue_key
from posttrain.serving import router as router_module


def follow(house: House, tenant: str, model: str | None = None) -> Route:
    """What the app does with a key: authenticate, follow the channels, route."""
    caller = house.router.authenticate(house.keys[tenant])
    if house.router.moved(caller):
        house.router.refresh()
    return house.router.route(caller, model or f"live/{tenant}")


def reason_of(house: House, tenant: str, model: str | None = None) -> RoutingReason:
    with pytest.raises(Refused) as caught:
        follow(house, tenant, model)
    return caught.value.reason


def test_every_tenant_gets_its_own_release_and_adapter(still: House) -> None:
    for tenant, release in still.releases.items():
        route = follow(still, tenant)
        assert (route.tenant, route.channel, route.release) == (tenant, f"live/{tenant}", release)
        assert route.adapter == f"adapter-{release}"
        assert route.weights_sha256 == still.registry.get(release).weights_sha256
        assert route.contract == contract_lock().fingerprint


# -- keys ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["wrong", "pt-", "pt-" + "x" * 43, "\udcff"])
def test_an_unknown_key_is_refused(still: House, key: str) -> None:
    with pytest.raises(Refused) as caught:
        still.router.authenticate(key)
    assert caught.value.reason is RoutingReason.UNKNOWN_KEY
    assert caught.value.status == 401


@pytest.mark.parametrize("key", [None, ""])
def test_no_key_is_refused(still: House, key: str | None) -> None:
    with pytest.raises(Refused, match="Authorization: Bearer") as caught:
        still.router.authenticate(key)
    assert caught.value.reason is RoutingReason.NO_KEY


def test_the_access_file_holds_sums_and_no_keys(still: House) -> None:
    text = still.access.read_text()
    assert all(key not in text for key in still.keys.values())
    assert len(json.loads(text)["keys"]) == 2


def test_a_tenant_may_have_several_keys_and_each_has_its_own_id(still: House) -> None:
    second = issue_key(still.access, "bank_A")
    one, two = still.router.authenticate(still.keys["bank_A"]), still.router.authenticate(second)
    assert one.tenant == two.tenant == "bank_A"
    assert one.key_id != two.key_id
    assert AccessFile(still.access).current().tenants["bank_A"] == "live/bank_A"


def test_a_revoked_key_stops_working_without_a_restart(still: House) -> None:
    still.router.authenticate(still.keys["bank_A"])
    value = json.loads(still.access.read_text())
    value["keys"] = [entry for entry in value["keys"] if entry["tenant"] != "bank_A"]
    still.access.write_text(json.dumps(value))
    with pytest.raises(Refused, match="unknown API key"):
        still.router.authenticate(still.keys["bank_A"])
    still.router.authenticate(still.keys["retail_B"])


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format":2,"tenants":{},"keys":[]}', '{"format":1,"tenants":{},"keys":[{"sha256":"pt-clear","tenant":"t"}]}',
             '{"format":1,"tenants":{"t":"channel"},"keys":[]}'],
)  # fmt: skip
def test_a_broken_access_file_is_named_and_nobody_gets_in(still: House, text: str) -> None:
    still.access.write_text(text)
    with pytest.raises(IntegrityError, match=r"access\.json: not an access file"):
        still.router.authenticate(still.keys["bank_A"])


# -- models --------------------------------------------------------------------------------------------------------------


def test_another_tenants_names_an_old_release_and_nonsense_are_refused_alike(still: House) -> None:
    old = still.releases["bank_A"]
    still.channels.promote("live/bank_A", still.add(9.0, "bank_A"), "ann", "better")
    other = [still.releases["retail_B"], "live/retail_B", "retail_B"]
    messages = set()
    for name in (*other, old, "smollm2-135m", "gpt-4", "", f"adapter-{old}"):
        with pytest.raises(Refused) as caught:
            follow(still, "bank_A", name or " ")
        assert caught.value.reason is RoutingReason.OTHER_MODEL
        assert caught.value.status == 404
        messages.add((caught.value.what, caught.value.remedy))
    assert len(messages) == 1  # nothing tells a foreign name from one that does not exist


def test_a_tenant_that_is_not_served_is_refused(still: House) -> None:
    value = json.loads(still.access.read_text())
    del value["tenants"]["bank_A"]
    still.access.write_text(json.dumps(value))
    assert reason_of(still, "bank_A") is RoutingReason.UNKNOWN_TENANT
    assert follow(still, "retail_B").tenant == "retail_B"


def test_a_tenant_without_a_release_is_refused(still: House) -> None:
    still.keys["saas_C"] = issue_key(still.access, "saas_C", "live/saas_C")
    assert reason_of(still, "saas_C") is RoutingReason.NO_RELEASE
    still.channels.promote("live/saas_C", still.add(7.0, "saas_C"), "ann", "first")
    assert follow(still, "saas_C").tenant == "saas_C"


# -- releases ------------------------------------------------------------------------------------------------------------


def test_a_moved_channel_is_followed_forwards_and_back(still: House) -> None:
    first = still.releases["bank_A"]
    assert follow(still, "bank_A").release == first
    caller = still.router.authenticate(still.keys["retail_B"])
    assert not still.router.moved(caller)
    second = still.add(8.0, "bank_A")
    still.channels.promote("live/bank_A", second, "ann", "better")
    assert still.router.moved(caller)
    assert follow(still, "bank_A").adapter == f"adapter-{second}"
    Channels(still.registry).rollback("live/bank_A", "bob", "worse")
    assert follow(still, "bank_A").adapter == f"adapter-{first}"
    assert follow(still, "retail_B").release == still.releases["retail_B"]
    assert still.model.loaded.count(still.releases["retail_B"]) == 1


def test_an_adapter_made_on_another_parent_is_refused_and_others_are_served(still: House) -> None:
    foreign = still.add(8.0, "bank_A", parent=Parent("f" * 64))
    still.channels.promote("live/bank_A", foreign, "ann", "x")
    assert reason_of(still, "bank_A") is RoutingReason.NOT_SERVABLE
    assert foreign not in still.model.loaded
    assert follow(still, "retail_B").release == still.releases["retail_B"]


def test_a_release_under_another_contract_is_refused(still: House) -> None:
    still.channels.promote("live/bank_A", still.add(8.0, "bank_A", lock=contract_lock("other/2")), "ann", "x")
    with pytest.raises(Refused, match="another contract") as caught:
        follow(still, "bank_A")
    assert caught.value.status == 503
    assert contract_lock("other/2").fingerprint in caught.value.detail


def test_a_release_altered_after_its_promotion_is_refused_at_the_next_load(still: House) -> None:
    path = still.registry.releases_folder / still.releases["bank_A"] / "adapter_model.safetensors"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(Refused, match="was altered") as caught:
        follow(still, "bank_A")
    assert str(still.root) not in str(caught.value)
    assert str(path) in caught.value.detail


def test_a_release_that_cannot_be_loaded_is_tried_again_after_a_while(still: House, monkeypatch: pytest.MonkeyPatch) -> None:
    release = still.releases["bank_A"]
    still.model.broken.add(release)
    assert reason_of(still, "bank_A") is RoutingReason.NOT_SERVABLE
    still.model.broken.clear()
    assert reason_of(still, "bank_A") is RoutingReason.NOT_SERVABLE
    monkeypatch.setattr(router_module, "_RETRY_SECONDS", 0.0)
    assert follow(still, "bank_A").release == release


def test_a_release_that_cannot_be_loaded_is_not_tried_again_at_another_tenants_request(
    still: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trying takes a gap in the batch, for which every tenant waits."""
    monkeypatch.setattr(router_module, "_RETRY_SECONDS", 0.0)
    still.model.broken.add(still.releases["bank_A"])
    assert reason_of(still, "bank_A") is RoutingReason.NOT_SERVABLE
    bank, shop = (still.router.authenticate(still.keys[tenant]) for tenant in ("bank_A", "retail_B"))
    assert still.router.moved(bank) and not still.router.moved(shop)


def test_a_release_made_for_other_weights_is_not_tried_again_while_its_channel_stays(
    still: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router_module, "_RETRY_SECONDS", 0.0)
    still.channels.promote("live/bank_A", still.add(8.0, "bank_A", parent=Parent("f" * 64)), "ann", "x")
    assert reason_of(still, "bank_A") is RoutingReason.NOT_SERVABLE
    assert not still.router.moved(still.router.authenticate(still.keys["bank_A"]))
    still.channels.rollback("live/bank_A", "bob", "back")
    assert follow(still, "bank_A").release == still.releases["bank_A"]


def test_whatever_a_loading_library_raises_only_its_own_tenant_is_refused(still: House) -> None:
    def name(release: str) -> str:
        if release == still.releases["bank_A"]:
            raise ZeroDivisionError("deep inside")
        return f"adapter-{release}"

    still.model.name = name
    with pytest.raises(Refused, match=r"could not be loaded \(ZeroDivisionError\)") as caught:
        follow(still, "bank_A")
    assert "deep inside" in caught.value.detail
    assert follow(still, "retail_B").tenant == "retail_B"


def test_a_model_that_would_run_the_bare_base_for_an_adapter_is_refused(still: House) -> None:
    still.model.dense.add(still.releases["bank_A"])
    with pytest.raises(Refused, match="wrong kind of weights") as caught:
        follow(still, "bank_A")
    assert "base is never a substitute" in caught.value.detail


def test_two_releases_under_one_adapter_name_are_refused(still: House) -> None:
    still.model.name = lambda _release: "tenant-adapter"
    follow(still, "bank_A")
    with pytest.raises(Refused, match="has the name of release"):
        follow(still, "retail_B")


def test_a_dense_release_of_the_loaded_weights_serves_without_an_adapter(still: House) -> None:
    student = still.add(5.0, "bank_A", kind=Kind.DENSE)
    still.model.weights = f"{5:064d}"
    still.model.dense.add(student)
    still.channels.promote("live/bank_A", student, "ann", "distilled")
    assert follow(still, "bank_A").adapter is None
    assert reason_of(still, "retail_B") is RoutingReason.NOT_SERVABLE  # its adapter belongs to other weights


def test_two_tenants_may_share_one_channel_and_its_release(still: House) -> None:
    still.keys["saas_C"] = issue_key(still.access, "saas_C", "live/bank_A")
    assert follow(still, "saas_C", "live/bank_A").release == follow(still, "bank_A").release


# -- over HTTP -----------------------------------------------------------------------------------------------------------


def test_refusals_reach_the_client_as_openais_errors_and_the_engine_never_hears(house: House) -> None:
    with pytest.raises(openai.AuthenticationError) as wrong, house.client(key="pt-wrong") as client:
        client.chat.completions.create(model="bank_A", messages=[{"role": "user", "content": "Hi"}])
    assert wrong.value.code == "unknown_key"
    assert wrong.value.response.headers["www-authenticate"] == "Bearer"
    with pytest.raises(openai.NotFoundError) as foreign:
        house.say(model=house.releases["retail_B"])
    assert foreign.value.code == "other_model"
    house.keys["saas_C"] = issue_key(house.access, "saas_C")
    with pytest.raises(openai.PermissionDeniedError) as unserved:
        house.say(tenant="saas_C")
    assert unserved.value.code == "no_release"
    with pytest.raises(openai.PermissionDeniedError), house.client("saas_C") as client:
        client.models.list()
    assert house.engine.batches == []
    assert [line["reason"] for line in house.lines(3)] == ["unknown_key", "other_model", "no_release"]


def test_a_promotion_reaches_the_running_server_and_adapters_load_on_the_models_thread(house: House) -> None:
    assert house.say().model == house.releases["bank_A"]
    second = house.add(8.0, "bank_A")
    house.channels.promote("live/bank_A", second, "ann", "better")
    assert house.say().choices[0].message.content == f"adapter-{second} heard: Hi"
    house.channels.rollback("live/bank_A", "bob", "worse")
    assert house.say().model == house.releases["bank_A"]
    assert all(name.startswith("posttrain-model") for name in house.model.threads)


def test_an_altered_channel_history_stops_everyone(house: House) -> None:
    path = house.registry.root / "channels.history.jsonl"
    path.write_text(path.read_text().replace("first", "frist", 1))
    with pytest.raises(openai.InternalServerError) as caught:
        house.say()
    assert caught.value.status_code == 503
    assert caught.value.code == "not_servable"
    assert str(house.root) not in str(caught.value)
    assert str(path) in str(house.lines(1)[0]["detail"])


def test_a_server_starts_although_one_tenants_release_is_broken(still: House, tmp_path: Path) -> None:
    still.model.broken.add(still.releases["bank_A"])
    with running(still):
        with pytest.raises(openai.InternalServerError, match="could not be loaded"):
            still.say()
        assert still.say(tenant="retail_B").model == still.releases["retail_B"]
