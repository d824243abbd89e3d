"""The judge of reconciliations: five steps of the procedure, measured on the ledger after the trial posting."""

from __future__ import annotations

from posttrain.data.records import Episode, Task
from posttrain.errors import VerifierError
from posttrain.verifying.judgement import EnvironmentView, Judgement
from posttrain.worlds.finance_ops.differences import Kind
from posttrain.worlds.finance_ops.ledger import DIFFERENCE_SQL, differences
from posttrain.worlds.finance_ops.verifiers.reading import Weighted, arguments_of, judged, step

WEIGHTS = {"one_call": 0.1, "kind": 0.2, "balanced": 0.1, "amount": 0.2, "difference": 0.25, "procedure": 0.15}


def reconcile(task: Task, episode: Episode, environment: EnvironmentView | None) -> Judgement:
    """The first and only call proposes the entry that clears the document. Raises VerifierError without the environment."""
    if environment is None:
        raise VerifierError("reconciliation is judged on the ledger", where=task.id, remedy="hand over the episode's environment")
    wanted = task.arguments["call"]["arguments"]
    proposals = [outcome for outcome in episode.outcomes if outcome.call.name == "propose_entry"]
    single = len(proposals) == 1 and len(episode.outcomes) == 1
    given = arguments_of(proposals[0]) if proposals else {}
    executed = single and proposals[0].ok
    gap = differences(
        [(account, amount) for account, amount in environment.query(DIFFERENCE_SQL, (wanted["ref"], wanted["ref"]))]
    )
    unbalanced = environment.query("SELECT entry FROM lines GROUP BY entry HAVING SUM(amount) <> 0")
    booked = environment.query("SELECT COUNT(*) FROM entries WHERE state = 'trial'")[0][0]
    expected_entries = 0 if wanted["kind"] == Kind.TIMING_DIFFERENCE else 1
    found: dict[str, tuple[bool, str]] = {
        "one_call": (single, f"{len(episode.outcomes)} calls instead of one proposal"),
        "kind": (given.get("kind") == wanted["kind"], f"{given.get('kind')} instead of {wanted['kind']}"),
        "balanced": (executed and not unbalanced, "no balanced trial entry"),
        "amount": (given.get("amount") == wanted["amount"], f"{given.get('amount')} instead of {wanted['amount']}"),
        "difference": (executed and gap == 0 and booked == expected_entries, f"{gap} minor units remain"),
        "procedure": (given.get("ref") == wanted["ref"], f"{given.get('ref')} instead of {wanted['ref']} as evidence"),
    }
    steps: list[Weighted] = [(step(name, passed, why), WEIGHTS[name]) for name, (passed, why) in found.items()]
    return judged(steps, tool_success=float(executed))
