"""Requests are composed, not listed: fragments from phrase files, each owned by one split, expanded by a seeded grammar.

A phrase file maps set names to fragments. In a fragment `<set>` expands to a fragment of that set, `{slot}` is filled with a value of
the scenario and `*...*` marks the span that a policy query copies. A set whose name starts with `~` is shared by all splits: it holds
formats and function words only. Every other fragment belongs to exactly one split, chosen by its hash.
"""

from posttrain.worlds.finance_ops.wording.grammar import Wording, wording
from posttrain.worlds.finance_ops.wording.register import Utterance, speak

__all__ = ["Utterance", "Wording", "speak", "wording"]
