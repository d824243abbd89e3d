from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.data import (
    Conversation,
    Defaults,
    Format,
    Message,
    Preference,
    Shape,
    Task,
    ToolCall,
    ToolSpec,
    dataset_hash,
    read_conversations,
    read_preferences,
    read_tasks,
    to_row,
    write_jsonl,
)
from posttrain.data.fields import Trace
from posttrain.data.formats import to_conversation, to_preference, to_task
from posttrain.data.jsonl import MAX_ERRORS
from posttrain.errors import DataError, StorageError

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
GOOD = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}

text = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12)
json_objects = st.dictionaries(
    text, st.none() | st.booleans() | st.integers() | text | st.lists(st.integers(), max_size=3), max_size=3
)
tools = st.lists(
    st.builds(ToolSpec, text, st.text(max_size=5), json_objects.map(lambda extra: {"type": "object", "x": extra})),
    max_size=2,
    unique_by=lambda tool: tool.name,
).map(tuple)
carried = {"tenant": st.none() | text, "source": st.text(max_size=4), "licence": st.text(max_size=4), "split": text}


@st.composite
def turns(draw: st.DrawFn, names: tuple[str, ...]) -> tuple[Message, ...]:
    """An assistant turn, perhaps with calls, their results, and an answer that is learned."""
    name = st.sampled_from(names) if names else text
    calls = draw(st.lists(st.tuples(text, name, json_objects), max_size=2, unique_by=lambda call: call[0]))
    if not calls:
        return (Message("assistant", draw(text)),)
    made = tuple(ToolCall(identity, called, json.dumps(arguments, indent=1)) for identity, called, arguments in calls)
    results = tuple(Message("tool", draw(st.text(max_size=5)), (), draw(st.sampled_from([None, call.id]))) for call in made)
    return (
        Message("assistant", draw(st.text(max_size=5)), made, learn=draw(st.booleans())),
        *results,
        Message("assistant", draw(text)),
    )


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    offered = draw(tools)
    start = draw(st.lists(st.builds(Message, st.just("system"), st.text(max_size=5)), max_size=1))
    end = draw(turns(tuple(tool.name for tool in offered)))
    messages = (*start, Message("user", draw(st.text(max_size=5)), learn=draw(st.booleans())), *end)
    return Conversation(
        draw(text), messages, offered, shape=draw(st.sampled_from(Shape)), **{k: draw(v) for k, v in carried.items()}
    )


@st.composite
def preferences(draw: st.DrawFn) -> Preference:
    offered = draw(tools)
    names = tuple(tool.name for tool in offered)
    chosen, rejected = draw(st.tuples(turns(names), turns(names)).filter(lambda pair: pair[0] != pair[1]))
    prompt = (Message("user", draw(text)),)
    return Preference(draw(text), prompt, chosen, rejected, offered, **{k: draw(v) for k, v in carried.items()})


@st.composite
def tasks(draw: st.DrawFn) -> Task:
    offered = draw(tools)
    shown = draw(st.just(()) | turns(tuple(tool.name for tool in offered)))
    return Task(
        draw(text), (Message("user", draw(text.filter(str.strip))),), offered, draw(carried["tenant"]), draw(text), draw(text),
        draw(json_objects), draw(json_objects), draw(st.none() | json_objects), draw(st.booleans()), draw(st.integers(1, 9)), draw(text),
        shown,
    )  # fmt: skip


def save(folder: Path, rows: list[Any], name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


@given(conversations())
def test_a_conversation_written_and_read_is_the_same(record: Conversation) -> None:
    row = json.loads(json.dumps(to_row(record)))
    assert to_conversation(row, Format.OPENAI_MESSAGES, "other", Defaults(), Trace()) == record


@given(preferences())
def test_a_preference_written_and_read_is_the_same(record: Preference) -> None:
    row = json.loads(json.dumps(to_row(record)))
    assert to_preference(row, Format.TRL_PREFERENCE, "other", Defaults(), Trace()) == record


@given(tasks())
def test_a_task_written_and_read_is_the_same(record: Task) -> None:
    row = json.loads(json.dumps(to_row(record)))
    trace = Trace()
    assert to_task(row, "other", Defaults(), trace) == record
    assert not trace.dropped


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz"])
def test_files_written_are_read_back_equal_and_the_same_bytes_each_time(tmp_path: Path, name: str) -> None:
    records = [Conversation(f"c{n}", (Message("user", "问\u2028题"), Message("assistant", "答"))) for n in range(3)]
    pair = Preference("p", (Message("user", "q"),), (Message("assistant", "a"),), (Message("assistant", "b"),))
    todo = Task("t", (Message("user", "q"),), arguments={"calls": []})
    sha256 = write_jsonl(tmp_path / name, records)
    back, report = read_conversations(tmp_path / name)
    assert back == records
    assert (report.format, report.records, report.sha256, report.dropped) == (Format.OPENAI_MESSAGES, 3, sha256, {})
    assert write_jsonl(tmp_path / f"again-{name}", records) == sha256
    write_jsonl(tmp_path / name, [pair])
    assert read_preferences(tmp_path / name)[0] == [pair]
    write_jsonl(tmp_path / name, [todo])
    assert read_tasks(tmp_path / name)[0] == [todo]
    assert (tmp_path / name).read_bytes().startswith(b"\x1f\x8b") is name.endswith(".gz")


def test_a_json_list_and_json_lines_hold_the_same_records(tmp_path: Path) -> None:
    rows = [{**GOOD, "id": str(n)} for n in range(3)]
    (tmp_path / "list.json").write_text("\ufeff " + json.dumps(rows, indent=1), encoding="utf-8")
    lines = save(tmp_path, ["", *rows, "  "])
    assert read_conversations(tmp_path / "list.json")[0] == read_conversations(lines)[0]


def test_the_dataset_hash_is_of_the_records_not_of_the_file(tmp_path: Path) -> None:
    openai, _ = read_conversations(save(tmp_path, [{**GOOD, "id": "1", "note": "x"}, {**GOOD, "id": "2"}]))
    sharegpt, _ = read_conversations(
        save(
            tmp_path, [{"id": i, "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]} for i in "12"]
        )
    )
    assert dataset_hash(openai) == dataset_hash(sharegpt)
    assert dataset_hash(openai) != dataset_hash(openai[::-1])
    assert dataset_hash(openai) != dataset_hash(openai[:1])


@pytest.mark.parametrize(("spelt", "said"), [('"\\ud800"', "half a character; got"), ("1e999", "number out of range")])
def test_a_value_that_no_text_or_number_is_has_its_row_named(spelt: str, said: str, tmp_path: Path) -> None:
    path = save(tmp_path, [GOOD, json.dumps(GOOD)[:-1] + f', "note": {spelt}}}'])
    with pytest.raises(DataError, match=rf"{path.name}:2: row: holds (a )?{said}"):
        read_conversations(path)


def test_the_report_states_format_and_dropped_fields_with_counts(tmp_path: Path) -> None:
    rows = [{**GOOD, "score": 1}, {**GOOD, "score": 2, "note": "x"}, GOOD]
    path = save(tmp_path, rows)
    records, report = read_conversations(path)
    assert [record.id for record in records] == ["data:1", "data:2", "data:3"]
    assert report.dropped == {"note": 1, "score": 2}
    assert str(report) == f"{path}: 3 records, format openai-messages; dropped fields: note (1), score (2)"


def test_a_file_with_argument_objects_is_stated_as_trl(tmp_path: Path) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}
    rows = [GOOD, {"messages": [GOOD["messages"][0], call, {"role": "tool", "content": "1"}, GOOD["messages"][1]]}]
    assert read_conversations(save(tmp_path, rows))[1].format is Format.TRL_MESSAGES


def test_defaults_reach_every_row(tmp_path: Path) -> None:
    records, _ = read_conversations(
        save(tmp_path, [GOOD, {**GOOD, "tenant": "bank_A"}]), Defaults(tenant="saas_C", licence="MIT")
    )
    assert [(record.tenant, record.licence) for record in records] == [("saas_C", "MIT"), ("bank_A", "MIT")]


def test_one_malformed_row_is_named_with_file_row_field_cause_and_remedy(tmp_path: Path) -> None:
    path = save(tmp_path, [GOOD, {"messages": [{"role": "bot", "content": "x"}]}, GOOD])
    with pytest.raises(DataError) as caught:
        read_conversations(path)
    assert str(caught.value).startswith(f"{path}:2: messages[0].role: is no known role; got 'bot'; use one of")


def test_malformed_rows_are_collected_up_to_a_bound(tmp_path: Path) -> None:
    bad = {"messages": [{"role": "user", "content": 3}]}
    with pytest.raises(DataError) as caught:
        read_conversations(save(tmp_path, [GOOD, "{broken", *[bad] * 3, "[1]"]))
    lines = str(caught.value).splitlines()
    assert "5 malformed rows" in lines[0]
    assert [line.strip().partition(": ")[0] for line in lines[1:]] == [f"data.jsonl:{row}" for row in (2, 3, 4, 5, 6)]
    with pytest.raises(DataError) as caught:
        read_conversations(save(tmp_path, [bad] * 50))
    assert len(str(caught.value).splitlines()) == MAX_ERRORS + 1
    assert f"the first {MAX_ERRORS}" in str(caught.value)


def test_a_file_of_another_kind_is_said_once(tmp_path: Path) -> None:
    path = save(tmp_path, [{"prompt": "q", "chosen": "a", "rejected": "b"}] * 9)
    with pytest.raises(DataError, match=r"format: is trl-preference.*expected here: alpaca, openai-messages") as caught:
        read_conversations(path)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(DataError, match="none that is known"):
        read_tasks(save(tmp_path, [{"question": "q"}] * 9))


def test_one_format_per_file_and_one_row_per_id(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.jsonl:2: format: is alpaca in a file of format openai-messages"):
        read_conversations(save(tmp_path, [GOOD, {"instruction": "q", "output": "a"}]))
    with pytest.raises(DataError, match=r"data.jsonl:3: id: was used in row 1 already; got 'x'"):
        read_conversations(save(tmp_path, [{**GOOD, "id": "x"}, GOOD, {**GOOD, "id": "x"}]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no records"),
        (b"\n \n", "holds no records"),
        (b'[{"messages": ', "begins like a JSON list"),
        (b"not json", r"data.jsonl:1: row: is not JSON"),
        (b'{"messages": NaN}', "NaN is not JSON"),
        (b'{"a": 1}\n\xff\xfe', r"data.jsonl:2: is not UTF-8"),
        (gzip.compress(b"x" * 100)[:20], "not a whole gzip file"),
    ],
)
def test_a_file_that_cannot_be_read_as_records_says_why(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_conversations(path)


def test_a_file_that_is_not_there_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"nowhere.jsonl"):
        read_conversations(tmp_path / "nowhere.jsonl")


@pytest.mark.skipif(not SHARED.exists(), reason="the shared data is not here")
class TestPublicFiles:
    @pytest.mark.parametrize(
        ("name", "format", "least"),
        [
            ("alpaca_demo/alpaca_en_demo.jsonl.gz", Format.ALPACA, 700),
            ("alpaca_demo/alpaca_zh_demo.jsonl.gz", Format.ALPACA, 700),
            ("disc_finllm/consulting_part.jsonl", Format.ALPACA, 70),
            ("glaive_toolcall_demo/glaive_toolcall_en_demo.jsonl.gz", Format.SHAREGPT, 200),
        ],
    )
    def test_conversations_are_read_whole_and_survive_our_own_format(
        self, tmp_path: Path, name: str, format: Format, least: int
    ) -> None:
        records, report = read_conversations(SHARED / name)
        assert report.format is format
        assert len(records) == report.records >= least
        assert not report.dropped
        write_jsonl(tmp_path / "ours.jsonl.gz", records)
        assert read_conversations(tmp_path / "ours.jsonl.gz")[0] == records

    def test_tool_trajectories_keep_calls_that_parse_and_answers_in_order(self) -> None:
        records, _ = read_conversations(SHARED / "glaive_toolcall_demo/glaive_toolcall_en_demo.jsonl.gz")
        trajectories = [record for record in records if any(message.tool_calls for message in record.messages)]
        assert len(trajectories) > 90
        for record in trajectories:
            assert record.shape is Shape.TOOL_TRAJECTORY
            calls = [call for message in record.messages for call in message.tool_calls]
            results = [message for message in record.messages if message.role == "tool"]
            assert [message.tool_call_id for message in results] == [call.id for call in calls]
            assert all(isinstance(json.loads(call.arguments), dict) for call in calls)

    @pytest.mark.parametrize("name", ["dpo_en_demo", "dpo_zh_demo"])
    def test_pairs_are_read_whole(self, name: str) -> None:
        records, report = read_preferences(SHARED / "dpo_demo" / f"{name}.jsonl.gz")
        assert report.format is Format.SHAREGPT_PREFERENCE
        assert len(records) > 200
        assert all(record.chosen != record.rejected for record in records)

    def test_two_broken_trajectories_of_a_public_file_are_found(self) -> None:
        with pytest.raises(DataError, match="2 malformed rows") as caught:
            read_conversations(SHARED / "glaive_toolcall_demo/glaive_toolcall_zh_demo.jsonl.gz")
        assert str(caught.value).count("a tool result that answers no call") == 2

    def test_unpaired_preferences_are_not_mistaken_for_demonstrations(self) -> None:
        with pytest.raises(DataError, match="unpaired preference data"):
            read_conversations(SHARED / "dpo_demo/kto_en_demo.jsonl.gz")
