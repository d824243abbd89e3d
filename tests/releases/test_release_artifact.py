"""A release is immutable, named by its content, and exists only when a gate passed it or a person answers for it."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
from release_making import BASE, Made, contract_lock, verdict
from safetensors.numpy import load_file

from posttrain.errors import BindingError, GateError, IntegrityError, StorageError
from posttrain.evaluation.verdict import Outcome
from posttrain.releases import Candidate, Kind, Override, Parent, Release, Teacher, check_binding
from posttrain.releases.lineage import Lineage, plain


@pytest.fixture
def release(tmp_path: Path) -> Release:
    return Release.build(tmp_path / "out", Made(tmp_path / "w").parts())


def forge(release: Release, name: str, data: bytes) -> Path:
    """Change a file of a release as someone with write access would; returns its folder."""
    path = release.folder / name
    if path.exists():
        path.chmod(0o644)
    path.write_bytes(data)
    return release.folder


def test_a_release_holds_what_peft_loads_and_every_record_beside_it(release: Release) -> None:
    assert set(release.manifest.files) == {
        "adapter_config.json", "adapter_model.safetensors", "contract.lock.json", "tokenizer.json",
        "grammar.json", "lineage.json", "scorecard.json", "verdict.json",
    }  # fmt: skip
    assert load_file(release.folder / "adapter_model.safetensors")["w"].tolist() == [[1.0] * 3] * 2
    assert release.folder.name == release.id
    assert release.id.startswith("r-")
    assert len(release.id) == 18


def test_records_come_back_as_they_went_in(tmp_path: Path, release: Release) -> None:
    parts = Made(tmp_path / "w").parts()
    assert release.lineage == parts.lineage
    assert release.verdict == verdict()
    assert release.contract == contract_lock()
    assert release.scorecard["metrics"]["tool_success"] == {"value": 0.9, "low": 0.83, "high": 0.95, "n": 100, "unit": "share"}
    assert release.grammar["tools"][0]["name"] == "query_erp"
    assert len(release.grammar["answer_schema_sha256"]) == 64
    assert release.override is None


def test_lineage_with_teacher_and_merge_parity_survives_json() -> None:
    lineage = Lineage(
        Kind.DENSE,
        "distill",
        "base",
        BASE,
        Parent("f" * 64, "r-1", {"max": 0.01}),
        "9" * 64,
        teacher=Teacher("r-2", "8" * 64, "7" * 64),
    )
    assert Lineage.from_json(json.loads(json.dumps(plain(lineage))), "here") == lineage


def test_lineage_with_an_unknown_part_is_refused() -> None:
    with pytest.raises(IntegrityError, match="lineage cannot be read"):
        Lineage.from_json({"kind": "adapter", "parent": {"fingerprint": "x"}, "teacher": None, "surprise": 1}, "here")


def test_the_same_parts_give_the_same_id_and_other_weights_another(tmp_path: Path) -> None:
    first = Release.build(tmp_path / "out", Made(tmp_path / "w").parts())
    again = Release.build(tmp_path / "out", Made(tmp_path / "w").parts())
    other = Release.build(tmp_path / "out", Made(tmp_path / "w", fill=2.0).parts())
    assert first.id == again.id != other.id
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([first.id, other.id])


def test_files_of_a_release_are_read_only(release: Release) -> None:
    assert {path.stat().st_mode & 0o777 for path in release.folder.iterdir()} == {0o444}


@pytest.mark.parametrize("outcome", [Outcome.REWARD_HACKING, Outcome.IDLE_DRIFT, Outcome.REGRESSION])
def test_without_a_passed_verdict_nothing_is_built(tmp_path: Path, outcome: Outcome) -> None:
    with pytest.raises(GateError, match=outcome.value):
        Release.build(tmp_path / "out", Made(tmp_path / "w", outcome=outcome).parts())
    assert not (tmp_path / "out").exists()


def test_a_persons_override_is_recorded_in_the_release(tmp_path: Path) -> None:
    parts = Made(tmp_path / "w", outcome=Outcome.IDLE_DRIFT).parts()
    override = Override("ann", "pilot with two users", "2026-11-23T04:00:00+00:00")
    release = Release.build(tmp_path / "out", parts, override=override)
    assert Release.open(release.folder).override == override


@pytest.mark.parametrize("blank", [("", "why", "at"), ("by", " ", "at"), ("by", "why", "")])
def test_an_override_needs_who_why_and_when(blank: tuple[str, str, str]) -> None:
    with pytest.raises(GateError, match="who, when and why"):
        Override(*blank)


def test_a_rejected_candidate_is_kept_but_is_not_a_release(tmp_path: Path) -> None:
    parts = Made(tmp_path / "w", outcome=Outcome.REGRESSION).parts()
    kept = Candidate.build(tmp_path / "out", parts)
    assert kept.id.startswith("c-")
    assert Candidate.open(kept.folder).verdict.outcome is Outcome.REGRESSION
    with pytest.raises(GateError, match="this is a candidate"):
        Release.open(kept.folder)


def test_a_candidate_may_keep_its_record_only(tmp_path: Path) -> None:
    kept = Candidate.build(tmp_path / "out", Made(tmp_path / "w", outcome=Outcome.REGRESSION).parts(), keep_weights=False)
    assert "adapter_model.safetensors" not in kept.manifest.files
    with pytest.raises(GateError, match="only the record"):
        kept.parts()


def test_a_release_that_passed_nothing_is_refused_although_its_hashes_fit(tmp_path: Path) -> None:
    override = Override("ann", "why", "now")
    made = Release.build(tmp_path / "out", Made(tmp_path / "w", outcome=Outcome.REGRESSION).parts(), override=override)
    from posttrain.releases.manifest import Manifest

    (made.folder / "override.json").unlink()
    forged = Manifest("release", {name: digest for name, digest in made.manifest.files.items() if name != "override.json"})
    forge(made, "manifest.json", forged.data)
    folder = made.folder.rename(tmp_path / "out" / forged.id)
    with pytest.raises(GateError, match="neither a passed verdict nor an override"):
        Release.open(folder)


# -- tampering -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["adapter_model.safetensors", "adapter_config.json", "contract.lock.json", "lineage.json", "verdict.json", "scorecard.json"],
)
def test_a_changed_file_is_named(release: Release, name: str) -> None:
    data = (release.folder / name).read_bytes()
    with pytest.raises(IntegrityError, match=rf"{name}: the file was altered.*expected SHA-256"):
        Release.open(forge(release, name, data[:-1] + bytes([data[-1] ^ 1])))


def test_a_missing_file_is_named(release: Release) -> None:
    (release.folder / "tokenizer.json").unlink()
    with pytest.raises(IntegrityError, match=r"tokenizer\.json.*missing"):
        Release.open(release.folder)


def test_an_extra_file_is_named(release: Release) -> None:
    with pytest.raises(IntegrityError, match=r"extra\.json.*not named in the manifest"):
        Release.open(forge(release, "extra.json", b"{}"))


def test_an_edited_manifest_no_longer_fits_the_folders_name(release: Release) -> None:
    value = json.loads((release.folder / "manifest.json").read_bytes())
    value["files"]["tokenizer.json"] = "0" * 64
    from posttrain.files.hashing import canonical_json

    with pytest.raises(IntegrityError, match="not the id of its content"):
        Release.open(forge(release, "manifest.json", canonical_json(value) + b"\n"))


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"not json", b'{"format":9,"kind":"release","files":{}}', b'{"format":1,"kind":"x","files":{}}']
)
def test_a_broken_manifest_is_refused(release: Release, data: bytes) -> None:
    with pytest.raises(IntegrityError, match="manifest"):
        Release.open(forge(release, "manifest.json", data))


def test_a_manifest_with_other_white_space_is_refused(release: Release) -> None:
    data = (release.folder / "manifest.json").read_bytes()
    with pytest.raises(IntegrityError, match="canonical form"):
        Release.open(forge(release, "manifest.json", data + b"\n"))


def test_a_folder_that_is_not_there_is_an_integrity_error(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="missing"):
        Release.open(tmp_path / "nothing")


# -- unsafe content ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pkl", "modeling_x.py", "weights.pt", "run.so", "noextension"])
def test_formats_that_may_run_code_are_refused_on_build_and_on_open(tmp_path: Path, release: Release, name: str) -> None:
    with pytest.raises(IntegrityError, match=f"{name}: not a safe format"):
        Release.build(tmp_path / "out", Made(tmp_path / "bad", files={name: b"x"}).parts())
    with pytest.raises(IntegrityError, match=f"{name}: not a safe format"):
        Release.open(forge(release, name, b"x"))


def test_a_pickle_named_safetensors_is_refused(tmp_path: Path) -> None:
    files = {"adapter_model.safetensors": pickle.dumps({"w": [1.0]})}
    with pytest.raises(IntegrityError, match="not a safetensors file"):
        Release.build(tmp_path / "out", Made(tmp_path / "w", files=files).parts())


def test_a_pickle_named_txt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="not UTF-8 text"):
        Release.build(tmp_path / "out", Made(tmp_path / "w", files={"merges.txt": pickle.dumps([1.5])}).parts())


def test_remote_code_in_a_config_is_refused(tmp_path: Path) -> None:
    files = {"config.json": b'{"auto_map": {"AutoModel": "x.Y"}}'}
    with pytest.raises(IntegrityError, match="auto_map"):
        Release.build(tmp_path / "out", Made(tmp_path / "w", files=files).parts())


def test_links_and_subfolders_are_refused(tmp_path: Path, release: Release) -> None:
    link = release.folder / "link.json"
    link.symlink_to("/etc/passwd")
    with pytest.raises(IntegrityError, match="link"):
        Release.open(release.folder)
    link.unlink()
    (release.folder / "sub").mkdir()
    with pytest.raises(IntegrityError, match="flat folder"):
        Release.open(release.folder)


def test_a_release_folder_that_is_itself_a_link_is_refused(tmp_path: Path, release: Release) -> None:
    link = tmp_path / "link"
    link.symlink_to(release.folder)
    with pytest.raises(IntegrityError, match="no such release folder"):
        Release.open(link)


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors", "contract.lock.json"])
def test_an_incomplete_adapter_is_named_before_anything_is_written(tmp_path: Path, missing: str) -> None:
    parts = Made(tmp_path / "w").parts()
    (parts.weights / missing).unlink()
    with pytest.raises(IntegrityError, match=f"{missing} is missing"):
        Release.build(tmp_path / "out", parts)
    assert not (tmp_path / "out").exists()


def test_dense_weights_need_a_fingerprint_and_adapters_have_none(tmp_path: Path) -> None:
    from dataclasses import replace

    dense = Made(tmp_path / "w", kind=Kind.DENSE).parts()
    with pytest.raises(IntegrityError, match="fingerprint"):
        Release.build(tmp_path / "out", replace(dense, lineage=replace(dense.lineage, weights=None)))


def test_dense_weights_in_shards_need_their_index(tmp_path: Path) -> None:
    parts = Made(tmp_path / "w", kind=Kind.DENSE).parts()
    (parts.weights / "model.safetensors").rename(parts.weights / "model-00001-of-00001.safetensors")
    with pytest.raises(IntegrityError, match=r"model\.safetensors\.index\.json is missing"):
        Release.build(tmp_path / "out", parts)
    (parts.weights / "model.safetensors.index.json").write_text("{}")
    assert Release.build(tmp_path / "out", parts).lineage.kind is Kind.DENSE


# -- binding and writing -------------------------------------------------------------------------------------------------


def test_an_adapter_is_bound_to_the_exact_weights_it_was_trained_on(release: Release) -> None:
    check_binding(release, BASE)
    with pytest.raises(BindingError) as caught:
        check_binding(release, "c" * 64)
    assert BASE in str(caught.value)
    assert "c" * 64 in str(caught.value)
    assert "base smollm2-135m" in str(caught.value)


def test_a_dense_release_is_bound_to_its_own_weights(tmp_path: Path) -> None:
    release = Release.build(tmp_path / "out", Made(tmp_path / "w", kind=Kind.DENSE, fill=5.0).parts())
    check_binding(release, f"{5:064d}")
    with pytest.raises(BindingError, match="release holds weights"):
        check_binding(release, BASE)


def test_a_kill_while_building_leaves_no_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Made(tmp_path / "w").parts()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("posttrain.releases.artifact.verify_files", killed)
        with pytest.raises(KeyboardInterrupt):
            Release.build(tmp_path / "out", parts)
    assert [path for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")] == []
    assert Release.build(tmp_path / "out", parts).verdict.passed


def test_weights_that_change_while_they_are_copied_are_not_released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Made(tmp_path / "w").parts()
    import shutil

    def copy_and_spoil(source: Path, target: Path) -> None:
        target.write_bytes(Path(source).read_bytes() + b" ")

    monkeypatch.setattr(shutil, "copyfile", copy_and_spoil)
    with pytest.raises(IntegrityError, match="was altered"):
        Release.build(tmp_path / "out", parts)
    assert os.listdir(tmp_path / "out") == []


def test_a_full_disk_is_a_storage_error_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import shutil

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(StorageError, match=r"full.*free space"):
        Release.build(tmp_path / "out", Made(tmp_path / "w").parts())
    assert os.listdir(tmp_path / "out") == []
