"""The world as an episode's calls leave it: for audits, and to show what an episode did."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from posttrain.agents.world import Environment, World
from posttrain.data.records import Episode, Task


def replay_in(world: World) -> Callable[[Task, Episode], AbstractContextManager[Environment]]:
    """A `Replay` for `verifying.audit`: each episode's successful calls executed again in a fresh copy of the task's world."""

    @contextmanager
    def replay(task: Task, episode: Episode) -> Iterator[Environment]:
        environment = world.environment(task.environment, tenant=task.tenant)
        try:
            for outcome in episode.outcomes:
                if outcome.ok:
                    environment.call(outcome.call.name, json.loads(outcome.call.arguments), tenant=task.tenant)
            yield environment
        finally:
            environment.close()

    return replay
