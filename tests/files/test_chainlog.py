"""The chained log: crashes are repaired, tampering is named, writers do not disturb each other."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.errors import DataError, IntegrityError, StorageError
from posttrain.files import chainlog
from posttrain.files.chainlog import GENESIS, ChainLog, Head


def _log(folder: Path, lines: int = 5) -> ChainLog:
    log = ChainLog(folder / "log.jsonl", sync=False)
    for number in range(lines):
        log.append({"step": number, "text": "汉" * number})
    return log


def test_a_line_holds_the_callers_fields_and_the_chains(tmp_path: Path) -> None:
    log = ChainLog(tmp_path / "deep" / "log.jsonl")
    first, second = log.append({"loss": 0.5}), log.append({"loss": 0.25})
    assert [first["seq"], second["seq"]] == [0, 1]
    assert (first["previous"], second["previous"]) == (GENESIS, first["hash"])
    assert datetime.fromisoformat(second["time"]) >= datetime.fromisoformat(first["time"])
    assert log.read() == [first, second]
    lines = (tmp_path / "deep" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [0.5, 0.25]
    assert log.verify() == Head(2, second["hash"])


def test_a_log_that_was_never_written_is_empty_and_whole(tmp_path: Path) -> None:
    log = ChainLog(tmp_path / "none.jsonl")
    assert log.read() == []
    assert log.verify() == Head(0, GENESIS)
    assert not (tmp_path / "none.jsonl").exists()


def test_another_object_continues_the_chain(tmp_path: Path) -> None:
    _log(tmp_path, 3)
    ChainLog(tmp_path / "log.jsonl").append({"long": "x" * 200_000})
    assert ChainLog(tmp_path / "log.jsonl").append({"step": 4})["seq"] == 4
    assert ChainLog(tmp_path / "log.jsonl").verify().lines == 5


@pytest.mark.parametrize("record", [{"seq": 1}, {"hash": "x"}, {"loss": float("nan")}, {"x": object()}])
def test_a_record_the_chain_cannot_hold_is_refused_and_nothing_is_written(tmp_path: Path, record: dict[str, object]) -> None:
    log = _log(tmp_path, 2)
    with pytest.raises(DataError, match=r"log\.jsonl"):
        log.append(record)
    assert log.verify().lines == 2


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("torn", [b'{"seq":5,"ti', b"\x00" * 100, b"x"])
def test_a_line_torn_by_a_crash_is_skipped_then_cut_and_noted(tmp_path: Path, torn: bytes, fresh: bool) -> None:
    log = _log(tmp_path)
    with open(log.path, "ab") as file:
        file.write(torn)
    assert len(log.read()) == 5
    assert log.verify().torn_bytes == len(torn)
    line = (ChainLog(log.path) if fresh else log).append({"step": 5})
    assert (line["seq"], line["cut_bytes"]) == (5, len(torn))
    assert log.verify() == Head(6, line["hash"])


def test_a_first_line_torn_by_a_crash_is_cut_too(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_bytes(b'{"seq":0')
    assert ChainLog(tmp_path / "log.jsonl").append({})["cut_bytes"] == 8
    assert ChainLog(tmp_path / "log.jsonl").verify().lines == 1


def test_every_point_of_a_crash_leaves_a_log_that_goes_on(tmp_path: Path) -> None:
    log = _log(tmp_path, 3)
    whole = log.path.read_bytes()
    start = whole.rfind(b"\n", 0, -1) + 1
    for cut in range(start, len(whole)):
        log.path.write_bytes(whole[:cut])
        again = ChainLog(log.path, sync=False)
        assert again.append({"after": cut})["seq"] == 2
        assert again.verify().lines == 3


def _alter(lines: list[bytes], how: str) -> list[bytes]:
    match how:
        case "value":
            lines[2] = lines[2].replace(b'"step":2', b'"step":9')
        case "space":
            lines[2] = lines[2].replace(b'"step":2', b'"step": 2')
        case "removed":
            del lines[2]
        case "swapped":
            lines[2], lines[3] = lines[3], lines[2]
        case "doubled":
            lines.insert(2, lines[1])
        case "not json":
            lines[2] = b"rubbish\n"
        case "blank":
            lines.insert(2, b"\n")
    return lines


@pytest.mark.parametrize("how", ["value", "space", "removed", "swapped", "doubled", "not json", "blank"])
def test_verify_names_the_first_line_that_was_tampered_with(tmp_path: Path, how: str) -> None:
    log = _log(tmp_path)
    log.path.write_bytes(b"".join(_alter(log.path.read_bytes().splitlines(keepends=True), how)))
    with pytest.raises(IntegrityError, match=r"log\.jsonl: line 3 "):
        log.verify()


def test_a_line_rewritten_with_a_hash_of_its_own_breaks_at_the_next_line(tmp_path: Path) -> None:
    log = _log(tmp_path)
    lines = log.path.read_bytes().splitlines(keepends=True)
    fields = json.loads(lines[2])
    del fields["hash"]
    lines[2], _ = chainlog._seal({**fields, "step": 9}, log.path)
    log.path.write_bytes(b"".join(lines))
    with pytest.raises(IntegrityError, match="line 4 does not continue"):
        log.verify()


def test_lines_cut_off_the_end_are_seen_with_a_kept_head_only(tmp_path: Path) -> None:
    log = _log(tmp_path)
    head = log.verify()
    log.append({"later": True})
    log.verify(head)
    lines = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(b"".join(lines[:3]))
    assert log.verify().lines == 3
    with pytest.raises(IntegrityError, match="line 4 is missing: there were 5 lines"):
        log.verify(head)


def test_a_whole_new_chain_is_seen_with_a_kept_head(tmp_path: Path) -> None:
    head = _log(tmp_path, 3).verify()
    (tmp_path / "log.jsonl").unlink()
    with pytest.raises(IntegrityError, match="line 3 is not the line"):
        _log(tmp_path, 4).verify(head)


def test_nothing_is_appended_to_a_log_that_became_shorter_or_was_altered(tmp_path: Path) -> None:
    log = _log(tmp_path)
    data = log.path.read_bytes()
    log.path.write_bytes(data[:-200])
    with pytest.raises(IntegrityError, match="shorter"):
        log.append({})
    log.path.write_bytes(data.replace(b'"step":4', b'"step":5'))
    with pytest.raises(IntegrityError, match="last line was altered"):
        ChainLog(log.path).append({})
    log.path.write_bytes(b"rubbish\n")
    with pytest.raises(IntegrityError, match="the last line"):
        ChainLog(log.path).append({})


def test_reading_a_line_that_is_not_an_object_names_it(tmp_path: Path) -> None:
    log = _log(tmp_path, 1)
    with open(log.path, "ab") as file:
        file.write(b"[]\n")
    with pytest.raises(IntegrityError, match="line 2 is not a JSON object"):
        log.read()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_single_changed_byte_is_found(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    log = _log(tmp_path_factory.mktemp("log"), 4)
    head, content = log.verify(), bytearray(log.path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 2))  # a lost last newline is a torn line, which `head` catches as missing
    content[place] ^= data.draw(st.integers(1, 255))
    log.path.write_bytes(content)
    with pytest.raises(IntegrityError):
        log.verify(head)


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = _log(tmp_path)
    before, real = log.path.read_bytes(), os.pwrite

    def half_then_full(descriptor: int, data: bytes, offset: int) -> int:
        if offset > len(before):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data[:10], offset)

    with monkeypatch.context() as patch:
        patch.setattr(chainlog.os, "pwrite", half_then_full)
        with pytest.raises(StorageError, match="full"):
            log.append({"step": 5})
    assert log.path.read_bytes() == before
    assert log.append({"step": 5})["seq"] == 5


def test_sync_forces_every_line_to_the_disk_and_no_sync_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(chainlog.os, "fsync", calls.append)
    log = ChainLog(tmp_path / "a", sync=True)
    log.append({})
    calls.clear()
    log.append({})
    assert len(calls) == 1
    calls.clear()
    _log(tmp_path)
    assert calls == []


def test_two_processes_and_four_threads_append_one_unbroken_chain(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    program = (
        "import sys\nfrom posttrain.files.chainlog import ChainLog\nlog = ChainLog(sys.argv[1], sync=False)\n"
        "for step in range(100):\n    log.append({'who': sys.argv[2], 'step': step})\n"
    )
    children = [subprocess.Popen([sys.executable, "-c", program, str(path), name]) for name in ("a", "b")]
    shared = ChainLog(path, sync=False)

    def work(name: str) -> None:
        for step in range(50):
            shared.append({"who": name, "step": step})

    threads = [threading.Thread(target=work, args=(f"t{index}",)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [child.wait() for child in children] == [0, 0]
    assert shared.verify().lines == 400
    for who in ("a", "b", "t0", "t3"):
        steps = [line["step"] for line in shared.read() if line["who"] == who]
        assert steps == sorted(steps)
