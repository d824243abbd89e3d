"""Grammar: from a schema, or from a turn's tools and answer, to the mask of tokens that may come next."""

from posttrain.grammar.evidence import Evidence, bound_tools, needs_user, only_said, shown
from posttrain.grammar.matcher import Grammar, GrammarEngine, Matcher, allowed_counts, forced_rows
from posttrain.grammar.turn import CALL_CLOSE, CALL_OPEN, bound_answer, json_grammar, text_grammar, turn_grammar

__all__ = [
    "CALL_CLOSE",
    "CALL_OPEN",
    "Evidence",
    "Grammar",
    "GrammarEngine",
    "Matcher",
    "allowed_counts",
    "bound_answer",
    "bound_tools",
    "forced_rows",
    "json_grammar",
    "needs_user",
    "only_said",
    "shown",
    "text_grammar",
    "turn_grammar",
]
