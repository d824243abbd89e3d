"""Stage 4, tools: look it up before concluding. Supervised on tool trajectories; the calls are learned, the results only read.

The other half of the lever is at inference: calls and answers are constrained by the tools' schemas, permitted by the guard,
and executed against the real system (agents/, grammar/). The same evaluation measures both halves.
"""

from __future__ import annotations

from collections.abc import Sequence

from posttrain.data.records import Conversation
from posttrain.errors import DataError
from posttrain.stages import sft
from posttrain.stages.bench import Workbench

ToolOptions = sft.SftOptions


def hold_calls(conversations: Sequence[Conversation]) -> bool:
    """Whether any record holds a tool call."""
    return any(message.tool_calls for conversation in conversations for message in conversation.messages)


def run(options: ToolOptions, conversations: Sequence[Conversation], bench: Workbench, name: str = "main") -> str | None:
    """Train on trajectories; at least one record must hold a call, or the stage would teach nothing it is named for."""
    if not hold_calls(conversations):
        raise DataError(
            "no record holds a tool call", where="tools.data", remedy="give the stage tool trajectories (shape tool_trajectory)"
        )
    return sft.run(options, conversations, bench, name)
