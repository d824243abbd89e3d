"""The registry keeps releases and candidates apart, knows who descends from whom, and what must be made again."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from release_making import BASE, Made, add_release

from posttrain.errors import GateError, IntegrityError, RegistryError
from posttrain.evaluation.verdict import Outcome
from posttrain.releases import Kind, Override, Parent, Registry


def test_an_empty_registry_lists_nothing(registry: Registry) -> None:
    assert registry.list() == ()
    assert registry.candidates() == ()


def test_get_returns_the_verified_release(registry: Registry, tmp_path: Path) -> None:
    name = add_release(registry, tmp_path / "w")
    assert registry.get(name).id == name
    assert [release.id for release in registry.list()] == [name]
    weights = registry.releases_folder / name / "adapter_model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(b"other")
    with pytest.raises(IntegrityError, match=r"adapter_model\.safetensors"):
        registry.get(name)


def test_a_release_swapped_for_another_is_noticed(registry: Registry, tmp_path: Path) -> None:
    one, two = add_release(registry, tmp_path / "w"), add_release(registry, tmp_path / "w", fill=2.0)
    shutil.rmtree(registry.releases_folder / one)
    shutil.copytree(registry.releases_folder / two, registry.releases_folder / one)
    with pytest.raises(IntegrityError, match="swapped or edited"):
        registry.get(one)


def test_an_unknown_id_names_the_nearest(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="there is no release yet"):
        registry.get("r-1")
    name = add_release(registry, tmp_path / "w")
    with pytest.raises(RegistryError, match=f"did you mean {name}"):
        registry.get(name[:-1])
    with pytest.raises(RegistryError, match=f"known: {name}"):
        registry.get("../../etc")


def test_a_candidate_is_kept_and_cannot_be_got_as_a_release(registry: Registry, tmp_path: Path) -> None:
    kept = registry.keep(Made(tmp_path / "w", outcome=Outcome.REGRESSION).parts())
    assert [candidate.id for candidate in registry.candidates()] == [kept.id]
    with pytest.raises(GateError, match="accept it with a recorded override"):
        registry.get(kept.id)
    with pytest.raises(RegistryError, match=f"did you mean {kept.id}"):
        registry.candidate(kept.id + "0")


def test_a_person_can_accept_a_candidate_and_the_record_says_so(registry: Registry, tmp_path: Path) -> None:
    kept = registry.keep(Made(tmp_path / "w", outcome=Outcome.IDLE_DRIFT).parts())
    release = registry.accept(kept.id, Override.now("ann", "needed for the pilot"))
    assert release.override is not None
    assert release.override.by == "ann"
    assert release.verdict.outcome is Outcome.IDLE_DRIFT
    assert registry.get(release.id).lineage == kept.lineage
    assert registry.candidate(kept.id).id == kept.id


def test_adding_from_elsewhere_verifies_first_and_is_idempotent(registry: Registry, tmp_path: Path) -> None:
    elsewhere = Registry(tmp_path / "elsewhere")
    release = elsewhere.build(Made(tmp_path / "w").parts())
    assert registry.add(release.folder).id == registry.add(release.folder).id == release.id
    assert len(registry.list()) == 1
    config = release.folder / "adapter_config.json"
    config.chmod(0o644)
    config.write_text("{}")
    with pytest.raises(IntegrityError, match=r"adapter_config\.json"):
        Registry(tmp_path / "third").add(release.folder)


def test_the_same_release_built_by_many_threads_at_once_is_one_release(registry: Registry, tmp_path: Path) -> None:
    parts = Made(tmp_path / "w").parts()
    with ThreadPoolExecutor(4) as pool:
        ids = list(pool.map(lambda _: registry.build(parts).id, range(8)))
    assert len(set(ids)) == 1
    assert [path.name for path in registry.releases_folder.iterdir()] == [ids[0]]


def test_a_build_in_progress_is_not_listed(registry: Registry, tmp_path: Path) -> None:
    name = add_release(registry, tmp_path / "w")
    (registry.releases_folder / ".r-1.partial").mkdir()
    assert [release.id for release in registry.list()] == [name]


# -- lineage -------------------------------------------------------------------------------------------------------------


class Family:
    """base <- sft <- dpo (on merged sft); bank and retail are adapters on merged sft; late stands on merged bank."""

    def __init__(self, registry: Registry, folder: Path) -> None:
        self.sft = add_release(registry, folder, stage="sft")
        merged = Parent("f" * 64, self.sft, {"max_abs_logprob_difference": 0.02})
        self.dpo = add_release(registry, folder, stage="dpo", fill=2.0, parent=merged)
        self.bank = add_release(registry, folder, stage="adapters", fill=3.0, tenant="bank_A", parent=merged)
        self.retail = add_release(registry, folder, stage="adapters", fill=4.0, tenant="retail_B", parent=merged)
        self.late = add_release(registry, folder, stage="late", fill=5.0, parent=Parent("a" * 64, self.bank))
        self.student = add_release(
            registry, folder, stage="distill", kind=Kind.DENSE, fill=6.0, parent=Parent("a" * 64, self.bank)
        )


@pytest.fixture
def family(registry: Registry, tmp_path: Path) -> Family:
    return Family(registry, tmp_path / "w")


def test_children_are_found_by_release_id_and_by_fingerprint(registry: Registry, family: Family) -> None:
    by_id = {release.id for release in registry.children(family.sft)}
    assert by_id == {family.dpo, family.bank, family.retail}
    assert {release.id for release in registry.children("f" * 64)} == by_id
    assert {release.id for release in registry.children(BASE)} == {family.sft}


def test_lineage_goes_down_to_the_base(registry: Registry, family: Family) -> None:
    assert [release.id for release in registry.lineage(family.late)] == [family.late, family.bank, family.sft]
    with pytest.raises(RegistryError):
        registry.lineage("r-0")


def test_when_a_parent_moves_its_adapters_and_what_stands_on_them_are_stale(registry: Registry, family: Family) -> None:
    stale = [release.id for release in registry.stale_adapters(family.sft, family.dpo)]
    assert set(stale[:2]) == {family.bank, family.retail}
    assert stale[2:] == [family.late]  # the student is dense: it stays what it is


def test_when_the_base_moves_everything_trained_on_it_is_stale(registry: Registry, family: Family) -> None:
    stale = [release.id for release in registry.stale_adapters(BASE, "0" * 64)]
    assert stale[0] == family.sft
    assert set(stale) == {family.sft, family.dpo, family.bank, family.retail, family.late}


def test_adapters_already_made_for_the_new_parent_are_not_stale(registry: Registry, family: Family, tmp_path: Path) -> None:
    again = add_release(
        registry, tmp_path / "w", stage="adapters", fill=9.0, tenant="bank_A", parent=Parent("9" * 64, family.dpo)
    )
    assert again not in {release.id for release in registry.stale_adapters(family.sft, family.dpo)}


def test_nothing_is_stale_when_nothing_moves(registry: Registry, family: Family) -> None:
    assert registry.stale_adapters(family.sft, family.sft) == ()
