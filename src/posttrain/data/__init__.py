"""Data: the records that travel between rooms, and the files they come from."""

from posttrain.data.formats import Defaults, Format, detect
from posttrain.data.jsonl import ReadReport, Record, dataset_hash, read_conversations, read_preferences, read_tasks, write_jsonl
from posttrain.data.records import (
    ROLES,
    Conversation,
    Episode,
    Message,
    Preference,
    Role,
    Shape,
    StopReason,
    Task,
    ToolCall,
    ToolOutcome,
    ToolSpec,
    Turn,
)
from posttrain.data.rows import to_row

__all__ = [
    "ROLES",
    "Conversation",
    "Defaults",
    "Episode",
    "Format",
    "Message",
    "Preference",
    "ReadReport",
    "Record",
    "Role",
    "Shape",
    "StopReason",
    "Task",
    "ToolCall",
    "ToolOutcome",
    "ToolSpec",
    "Turn",
    "dataset_hash",
    "detect",
    "read_conversations",
    "read_preferences",
    "read_tasks",
    "to_row",
    "write_jsonl",
]
