"""Serving: the OpenAI-compatible app, the router that refuses rather than falls back, the audit log."""

from posttrain.serving.app import build_app, serve, server
from posttrain.serving.audit import Audit, AuditRecord, Decision
from posttrain.serving.engine import (
    Abandoned,
    Completion,
    CompletionRequest,
    ContractEngine,
    Engine,
    Finish,
    InvalidAnswer,
    Prepared,
)
from posttrain.serving.keys import Access, AccessFile, Caller, issue_key, revoke_key
from posttrain.serving.requests import Limits
from posttrain.serving.router import Refused, Route, Router, RoutingReason, ServingModel

__all__ = [
    "Abandoned",
    "Access",
    "AccessFile",
    "Audit",
    "AuditRecord",
    "Caller",
    "Completion",
    "CompletionRequest",
    "ContractEngine",
    "Decision",
    "Engine",
    "Finish",
    "InvalidAnswer",
    "Limits",
    "Prepared",
    "Refused",
    "Route",
    "Router",
    "RoutingReason",
    "ServingModel",
    "build_app",
    "issue_key",
    "revoke_key",
    "serve",
    "server",
]
