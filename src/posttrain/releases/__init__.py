"""Releases: content-addressed artifacts, the registry that keeps them, and the channels that point at them."""

from posttrain.releases.artifact import Candidate, Parts, Release, check_binding
from posttrain.releases.channels import Action, Channels, Move
from posttrain.releases.lineage import Kind, Lineage, Override, Parent, Teacher, grammar_record
from posttrain.releases.registry import Registry
from posttrain.releases.signing import sign, verify_signature

__all__ = [
    "Action",
    "Candidate",
    "Channels",
    "Kind",
    "Lineage",
    "Move",
    "Override",
    "Parent",
    "Parts",
    "Registry",
    "Release",
    "Teacher",
    "check_binding",
    "grammar_record",
    "sign",
    "verify_signature",
]
