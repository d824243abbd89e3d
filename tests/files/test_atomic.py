"""Files and folders are complete or absent, and a full disk says so."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from posttrain.errors import DataError, StorageError
from posttrain.files import atomic
from posttrain.files.atomic import atomic_folder, write_bytes, write_json, write_text


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _fail_with(number: int):
    def fail(*_args: object, **_kwargs: object) -> int:
        raise OSError(number, os.strerror(number))

    return fail


def test_a_written_file_holds_exactly_the_bytes_and_leaves_no_scratch(tmp_path: Path) -> None:
    target = tmp_path / "new" / "deep" / "a.bin"
    write_bytes(target, b"\x00\xffdata")
    assert target.read_bytes() == b"\x00\xffdata"
    assert _names(target.parent) == ["a.bin"]


def test_text_keeps_its_line_ends_and_json_its_key_order(tmp_path: Path) -> None:
    write_text(tmp_path / "t", "é\r\nb\n")
    assert (tmp_path / "t").read_bytes() == "é\r\nb\n".encode()
    write_json(tmp_path / "j", {"b": 1, "a": ["汉", 0.1]})
    assert list(json.loads((tmp_path / "j").read_text("utf-8"))) == ["b", "a"]
    assert "汉" in (tmp_path / "j").read_text("utf-8")


@pytest.mark.parametrize("value", [float("nan"), {"a": float("inf")}, {1, 2}])
def test_what_json_cannot_hold_is_refused_before_the_old_file_is_touched(tmp_path: Path, value: object) -> None:
    write_json(tmp_path / "j", 1)
    with pytest.raises(DataError, match="JSON"):
        write_json(tmp_path / "j", value)
    assert (tmp_path / "j").read_text() == "1\n"


def test_an_existing_files_permissions_are_kept_and_new_ones_follow_the_umask(tmp_path: Path) -> None:
    secret = tmp_path / "key"
    secret.write_text("old")
    secret.chmod(0o600)
    old_mask = os.umask(0o027)
    try:
        write_text(secret, "new")
        write_text(tmp_path / "plain", "x")
    finally:
        os.umask(old_mask)
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "plain").stat().st_mode) == 0o640


def test_a_link_is_followed_and_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_full_disk_at_any_step_leaves_the_old_file_and_names_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    target = tmp_path / "a.json"
    target.write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, call, _fail_with(errno.ENOSPC))
        with pytest.raises(StorageError, match=r"a\.json.*full.*MB free, 0\.0 MB needed.*free space") as caught:
            write_text(target, "new")
    assert isinstance(caught.value, OSError)
    assert target.read_text() == "old"
    assert _names(tmp_path) == ["a.json"]


@pytest.mark.parametrize(
    ("number", "words"), [(errno.EROFS, "writable"), (errno.EACCES, "writable"), (errno.EIO, "check the path")]
)
def test_other_storage_errors_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str) -> None:
    monkeypatch.setattr(atomic.os, "write", _fail_with(number))
    with pytest.raises(StorageError, match=words):
        write_text(tmp_path / "a", "new")


def test_a_parent_that_is_a_file_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file/a"):
        write_text(tmp_path / "file" / "a", "x")


def test_a_folder_appears_only_when_its_block_is_done(tmp_path: Path) -> None:
    target = tmp_path / "release"
    with atomic_folder(target) as scratch:
        (scratch / "sub").mkdir()
        (scratch / "sub" / "a").write_text("x")
        assert not target.exists()
        assert scratch.parent == target.parent
    assert (target / "sub" / "a").read_text() == "x"
    assert _names(tmp_path) == ["release"]


def test_a_block_that_fails_leaves_nothing_and_keeps_its_own_error(tmp_path: Path) -> None:
    def half() -> None:
        with atomic_folder(tmp_path / "r") as scratch:
            (scratch / "a").write_text("x")
            raise FileNotFoundError("source")

    with pytest.raises(FileNotFoundError, match="source"):
        half()
    assert _names(tmp_path) == []


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left"), RuntimeError("I/O error: No space left on device (os error 28)")]
)
def test_a_full_disk_inside_the_block_is_named_whoever_reports_it(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(StorageError, match="full"), atomic_folder(tmp_path / "r"):
        raise error
    assert _names(tmp_path) == []


def test_an_existing_folder_is_refused_or_replaced_as_asked(tmp_path: Path) -> None:
    target = tmp_path / "r"
    for word in ("first", "second"):
        with atomic_folder(target, replace=True) as scratch:
            (scratch / word).write_text("")
    assert _names(target) == ["second"]
    with pytest.raises(StorageError, match="exists already"), atomic_folder(target):
        pytest.fail("the block must not run")
    assert _names(tmp_path) == ["r"]


def test_of_two_writers_of_one_folder_the_first_wins_and_the_other_is_told(tmp_path: Path) -> None:
    def slow() -> None:
        with atomic_folder(tmp_path / "r"), atomic_folder(tmp_path / "r") as fast:
            (fast / "fast").write_text("")

    with pytest.raises(StorageError, match="exists already"):
        slow()
    assert _names(tmp_path / "r") == ["fast"]
    assert _names(tmp_path) == ["r"]


def test_a_killed_writer_leaves_no_folder_and_the_next_one_sweeps_its_scratch(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\nfrom posttrain.files.atomic import atomic_folder\n"
        "with atomic_folder(sys.argv[1]) as scratch:\n"
        "    (scratch / 'a').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    target = tmp_path / "r"
    assert subprocess.run([sys.executable, "-c", program, str(target)], check=False).returncode == -9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".r.")
    os.utime(left, (time.time() - 3600,) * 2)
    with atomic_folder(target) as scratch:
        (scratch / "a").write_text("whole")
    assert _names(tmp_path) == ["r"]
    assert (target / "a").read_text() == "whole"


def test_a_living_writers_scratch_is_never_swept(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "r") as mine:
        (mine / "a").write_text("mine")
        os.utime(mine, (time.time() - 3600,) * 2)
        with pytest.raises(KeyError), atomic_folder(tmp_path / "r"):
            raise KeyError
        assert (mine / "a").exists()
    assert (tmp_path / "r" / "a").read_text() == "mine"
