"""The contract room: one renderer for data, training and serving, and the lock that keeps it one."""

from posttrain.contract.contract import Contract, learned_text, total_learned
from posttrain.contract.lock import LOCK_FILE, ContractLock
from posttrain.contract.parse import MalformedCall, parse_turn
from posttrain.contract.preflight import Preflight, preflight
from posttrain.contract.sequence import Sequence
from posttrain.contract.template import CALL_CLOSE, CALL_OPEN, TEMPLATES, Template, signature

__all__ = [
    "CALL_CLOSE",
    "CALL_OPEN",
    "LOCK_FILE",
    "TEMPLATES",
    "Contract",
    "ContractLock",
    "MalformedCall",
    "Preflight",
    "Sequence",
    "Template",
    "learned_text",
    "parse_turn",
    "preflight",
    "signature",
    "total_learned",
]
