"""A channel moves in one step or not at all, says who moved it and why, and finds its way back."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from release_making import Made, add_release

from posttrain.errors import GateError, IntegrityError, RegistryError
from posttrain.evaluation.verdict import Outcome
from posttrain.releases import Action, Channels, Registry
from posttrain.releases.channels import HISTORY, VIEW


@pytest.fixture
def ids(registry: Registry, tmp_path: Path) -> list[str]:
    return [add_release(registry, tmp_path / "w", fill=float(n)) for n in range(1, 4)]


def promote_all(channels: Channels, ids: list[str]) -> None:
    for name in ids:
        channels.promote("bank_A", name, "ann", f"release {name}")


def test_promote_points_the_channel_and_records_who_and_why(channels: Channels, ids: list[str]) -> None:
    move = channels.promote("bank_A", ids[0], "ann", "passed its gate")
    assert channels.current("bank_A") == ids[0]
    assert channels.release("bank_A").id == ids[0]
    assert (move.action, move.previous, move.by, move.why) == (Action.PROMOTE, None, "ann", "passed its gate")
    assert channels.history() == (move,)
    assert move.at.endswith("Z")


def test_channels_are_independent(channels: Channels, ids: list[str]) -> None:
    channels.promote("bank_A", ids[0], "ann", "x")
    channels.promote("retail_B", ids[1], "ann", "y")
    assert channels.pointers() == {"bank_A": ids[0], "retail_B": ids[1]}
    assert channels.names() == ("bank_A", "retail_B")
    assert [move.release for move in channels.history("retail_B")] == [ids[1]]
    assert channels.serving(ids[0]) == ("bank_A",)


def test_promoting_what_is_already_there_adds_no_line(channels: Channels, ids: list[str]) -> None:
    first = channels.promote("bank_A", ids[0], "ann", "x")
    assert channels.promote("bank_A", ids[0], "bob", "again") == first
    assert len(channels.history()) == 1


def test_rollback_goes_back_one_accepted_release_at_a_time(channels: Channels, ids: list[str]) -> None:
    promote_all(channels, ids)
    assert channels.rollback("bank_A", "bob", "complaints").release == ids[1]
    assert channels.rollback("bank_A", "bob", "more").release == ids[0]
    with pytest.raises(RegistryError, match="no earlier release"):
        channels.rollback("bank_A", "bob", "even more")
    assert channels.current("bank_A") == ids[0]


def test_channels_go_back_together_or_not_at_all(channels: Channels, ids: list[str]) -> None:
    for channel in ("production", "bank_A"):
        for release in ids[:2]:
            channels.promote(channel, release, "ann", "x")
    channels.promote("saas_C", ids[1], "ann", "its first")
    with pytest.raises(RegistryError, match=r"saas_C.*no earlier release"):
        channels.roll_back_together(["production", "bank_A", "saas_C"], "bob", "complaints")
    assert channels.current("production") == channels.current("bank_A") == ids[1]
    moves = channels.roll_back_together(["production", "bank_A", "production"], "bob", "complaints")
    assert [(move.channel, move.previous, move.release) for move in moves] == [
        ("production", ids[1], ids[0]), ("bank_A", ids[1], ids[0]),
    ]  # fmt: skip


def test_after_a_rollback_and_a_promotion_the_way_back_skips_what_was_rolled_back(channels: Channels, ids: list[str]) -> None:
    promote_all(channels, ids[:2])
    channels.rollback("bank_A", "bob", "bad")
    channels.promote("bank_A", ids[2], "ann", "mended")
    assert channels.rollback("bank_A", "bob", "bad too").release == ids[0]
    assert [move.action for move in channels.history()] == [
        Action.PROMOTE,
        Action.PROMOTE,
        Action.ROLLBACK,
        Action.PROMOTE,
        Action.ROLLBACK,
    ]


def test_a_rollback_to_an_altered_release_is_refused_and_moves_nothing(
    channels: Channels, registry: Registry, ids: list[str]
) -> None:
    promote_all(channels, ids[:2])
    path = registry.releases_folder / ids[0] / "adapter_config.json"
    path.chmod(0o644)
    path.write_text("{}")
    with pytest.raises(IntegrityError, match=r"adapter_config\.json"):
        channels.rollback("bank_A", "bob", "x")
    assert channels.current("bank_A") == ids[1]


def test_only_what_a_gate_passed_can_be_promoted(channels: Channels, registry: Registry, tmp_path: Path) -> None:
    kept = registry.keep(Made(tmp_path / "w", outcome=Outcome.REWARD_HACKING).parts())
    with pytest.raises(GateError, match="gate did not pass"):
        channels.promote("bank_A", kept.id, "ann", "hurry")
    assert channels.history() == ()


def test_an_altered_release_cannot_be_promoted(channels: Channels, registry: Registry, ids: list[str]) -> None:
    path = registry.releases_folder / ids[0] / "adapter_model.safetensors"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(IntegrityError, match="adapter_model"):
        channels.promote("bank_A", ids[0], "ann", "x")


def test_unknown_names_offer_the_nearest(channels: Channels, ids: list[str]) -> None:
    with pytest.raises(RegistryError, match="there is no channel yet"):
        channels.current("bank_A")
    channels.promote("bank_A", ids[0], "ann", "x")
    with pytest.raises(RegistryError, match="did you mean bank_A"):
        channels.current("bank_B")
    with pytest.raises(RegistryError, match="did you mean bank_A"):
        channels.rollback("bankA", "ann", "x")
    with pytest.raises(RegistryError, match="unknown release"):
        channels.promote("bank_A", "r-0", "ann", "x")


@pytest.mark.parametrize(("channel", "by", "why"), [("", "a", "b"), ("../x y", "a", "b"), ("ok", " ", "b"), ("ok", "a", "")])
def test_a_move_needs_a_name_a_person_and_a_reason(channels: Channels, ids: list[str], channel: str, by: str, why: str) -> None:
    with pytest.raises(RegistryError, match=r"channel name|a move needs"):
        channels.promote(channel, ids[0], by, why)


# -- crashes and tampering -----------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for the process dying at this point."""


def die(*_: object, **__: object) -> None:
    raise Killed


def test_a_crash_before_the_history_line_leaves_the_old_pointer(
    channels: Channels, ids: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    channels.promote("bank_A", ids[0], "ann", "x")
    with monkeypatch.context() as patch:
        patch.setattr(channels._log, "append", die)
        with pytest.raises(Killed):
            channels.promote("bank_A", ids[1], "ann", "y")
    again = Channels(channels.registry)
    assert again.current("bank_A") == ids[0]
    assert again.promote("bank_A", ids[1], "ann", "y").previous == ids[0]


def test_a_crash_after_the_history_line_leaves_the_new_pointer(
    channels: Channels, ids: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    channels.promote("bank_A", ids[0], "ann", "x")
    with monkeypatch.context() as patch:
        patch.setattr("posttrain.releases.channels.write_json", die)
        with pytest.raises(Killed):
            channels.promote("bank_A", ids[1], "ann", "y")
    again = Channels(channels.registry)
    assert again.current("bank_A") == ids[1]
    assert again.rollback("bank_A", "bob", "z").release == ids[0]
    assert json.loads((channels.registry.root / VIEW).read_text())["channels"]["bank_A"]["release"] == ids[0]


def test_a_line_torn_by_a_crash_never_happened(channels: Channels, ids: list[str]) -> None:
    channels.promote("bank_A", ids[0], "ann", "x")
    path = channels.registry.root / HISTORY
    path.write_bytes(path.read_bytes() + b'{"seq":1,"channel":"bank_A","rel')
    again = Channels(channels.registry)
    assert again.current("bank_A") == ids[0]
    again.promote("bank_A", ids[1], "ann", "y")
    assert Channels(channels.registry).current("bank_A") == ids[1]


def test_an_altered_history_line_stops_every_reader_and_mover(channels: Channels, ids: list[str]) -> None:
    promote_all(channels, ids[:2])
    path = channels.registry.root / HISTORY
    path.write_text(path.read_text().replace('"by":"ann"', '"by":"eve"', 1))
    again = Channels(channels.registry)
    with pytest.raises(IntegrityError, match="line 1 was altered"):
        again.current("bank_A")
    with pytest.raises(IntegrityError, match="line 1"):
        again.rollback("bank_A", "bob", "x")


def test_a_history_cut_off_at_its_end_is_noticed(channels: Channels, ids: list[str]) -> None:
    promote_all(channels, ids[:2])
    path = channels.registry.root / HISTORY
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:1]))
    with pytest.raises(IntegrityError, match="is missing"):
        Channels(channels.registry).current("bank_A")
    path.unlink()
    with pytest.raises(IntegrityError, match="is missing"):
        Channels(channels.registry).pointers()


def test_a_history_replaced_by_another_whole_one_is_noticed(channels: Channels, ids: list[str], tmp_path: Path) -> None:
    promote_all(channels, ids[:2])
    other = Registry(tmp_path / "other")
    for name in ids[1:]:
        other.add(channels.registry.releases_folder / name)
    promote_all(Channels(other), ids[1:])
    (channels.registry.root / HISTORY).write_bytes((other.root / HISTORY).read_bytes())
    with pytest.raises(IntegrityError, match="not the line that was there"):
        Channels(channels.registry).current("bank_A")


@pytest.mark.parametrize("view", ["{}", '{"head": {"lines": "x", "hash": 1}}'])
def test_a_damaged_view_is_named_with_the_way_out(channels: Channels, ids: list[str], view: str) -> None:
    promote_all(channels, ids[:1])
    (channels.registry.root / VIEW).write_text(view)
    with pytest.raises(IntegrityError, match=r"channels\.json.*restore it"):
        Channels(channels.registry).current("bank_A")


def test_a_move_by_another_process_is_seen_at_once(channels: Channels, ids: list[str]) -> None:
    other = Channels(channels.registry)
    channels.promote("bank_A", ids[0], "ann", "x")
    assert other.current("bank_A") == ids[0]
    channels.promote("bank_A", ids[1], "ann", "y")
    assert other.current("bank_A") == ids[1]
    assert other.rollback("bank_A", "bob", "z").previous == ids[1]


_MOVER = """
import sys
from pathlib import Path
from posttrain.releases import Channels, Registry
channels = Channels(Registry(Path(sys.argv[1])))
for n in range(15):
    for release in sys.argv[2:4]:
        channels.promote(sys.argv[4], release, "process " + sys.argv[4], f"round {n}")
        channels.promote("shared", release, "process " + sys.argv[4], f"round {n}")
"""


def test_two_processes_promoting_at_once_lose_no_move(channels: Channels, ids: list[str]) -> None:
    root = str(channels.registry.root)
    movers = [subprocess.Popen([sys.executable, "-c", _MOVER, root, ids[0], ids[1], name]) for name in ("left", "right")]
    assert [mover.wait(timeout=120) for mover in movers] == [0, 0]
    moves = channels.history()
    for name in ("left", "right"):
        assert [move.release for move in moves if move.channel == name] == [ids[0], ids[1]] * 15
    shared = [move for move in moves if move.channel == "shared"]
    assert [move.previous for move in shared[1:]] == [move.release for move in shared[:-1]]
    assert all(move.release != move.previous for move in shared)


def test_readers_beside_a_mover_never_see_a_broken_history(channels: Channels, ids: list[str]) -> None:
    channels.promote("bank_A", ids[0], "ann", "x")

    def move() -> None:
        mover = Channels(channels.registry)
        for n in range(20):
            mover.promote("bank_A", ids[n % 2], "ann", f"{n}")

    def read() -> set[str]:
        reader = Channels(channels.registry)
        return {reader.current("bank_A") for _ in range(200)}

    with ThreadPoolExecutor(3) as pool:
        moving, *reading = pool.submit(move), pool.submit(read), pool.submit(read)
        moving.result()
        assert set().union(*(future.result() for future in reading)) <= set(ids[:2])
