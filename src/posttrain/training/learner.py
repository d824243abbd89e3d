"""The learner: `forward_backward(packs, objective)`, `step()`, `save()`, `resume()`. Nothing else trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.errors import TrainingError
from posttrain.policy.head import Head
from posttrain.policy.pack import Pack
from posttrain.policy.policy import Policy
from posttrain.training.checkpoint import Checkpointer, read_checkpoint
from posttrain.training.schedule import OptimiserOptions, learning_rate
from posttrain.training.team import team


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """What an objective's caller may read of one pack: the policy's hidden states at its predictions, through the chunked head
    log-probabilities, and the states between layers that the learner was told to keep. Everything keeps its graph."""

    policy: Policy
    pack: Pack
    hidden: Tensor  # [N, hidden] at pack.rows
    states: Sequence[Tensor] = ()  # [T, hidden] after each of the learner's `blocks`

    def logprobs(self) -> Tensor:
        """[N] float32."""
        return self.policy.head.logprobs(self.hidden, self.pack.targets)

    def padded_logprobs(self) -> Tensor:
        """[B, L] float32, 0 where there is no prediction."""
        return self.pack.pad(self.logprobs())

    def tokenwise(
        self, function: Callable[..., Tensor], beside: Sequence[tuple[Head, Tensor]] = (), aligned: Sequence[Tensor] = ()
    ) -> Tensor:
        """`Head.tokenwise` at the predictions: function(logits [n, V], *logits of `beside`, *aligned) -> [n]; logits are never kept."""
        return self.policy.head.tokenwise(function, self.hidden, beside, aligned)


Objective = Callable[[Scored], tuple[Tensor, Mapping[str, Any]]]


def _groups(parameters: Mapping[str, Tensor], lora_plus: float) -> list[dict[str, Any]]:
    """One group as long as all parameters share a rate, else LoRA's B apart with a rate of its own."""
    if lora_plus == 1.0:
        return [{"params": list(parameters.values()), "scale": 1.0}]
    ups = {name for name in parameters if "lora_B" in name}
    split = [
        {"params": [parameter for name, parameter in parameters.items() if (name in ups) == up], "scale": scale}
        for up, scale in ((False, 1.0), (True, lora_plus))
    ]
    return [group for group in split if group["params"]]


class Learner:
    """Trains one set of parameters of a policy: a named adapter, or (a student) given base parameters."""

    def __init__(
        self,
        policy: Policy,
        parameters: Mapping[str, nn.Parameter],
        options: OptimiserOptions,
        total_steps: int,
        blocks: Sequence[int] = (),
    ) -> None:
        """`blocks`: after which of the policy's layers an objective reads the states, at every position."""
        assert parameters and total_steps > 0, "nothing to train, or no steps"
        self.blocks = blocks
        self.policy, self.options, self.total_steps = policy, options, total_steps
        self.parameters = dict(parameters)
        team().copy_([parameter.data for parameter in self.parameters.values()])  # the same start everywhere
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        # fp32 masters: a bf16 parameter plus a 1e-4 update is often the same bf16 number
        self._masters = {
            name: p if p.dtype == torch.float32 else p.detach().float().requires_grad_(True)
            for name, p in self.parameters.items()
        }
        self._optimiser = torch.optim.AdamW(
            _groups(self._masters, options.lora_plus),
            lr=options.lr,
            betas=(options.beta1, options.beta2),
            eps=options.eps,
            weight_decay=options.weight_decay,
            fused=policy.device.type in ("cpu", "cuda"),  # one pass over each parameter and its moments instead of ten
        )
        self.steps_done = 0
        self.tokens_done = 0

    @classmethod
    def for_adapter(cls, policy: Policy, name: str, options: OptimiserOptions, total_steps: int) -> Learner:
        policy.use(name)
        parameters = policy.adapter_parameters(name)
        assert all(".lora_" in key for key in parameters), "an adapter is trained beside the base, never the base itself"
        return cls(policy, parameters, options, total_steps)

    def forward_backward(self, packs: Iterable[Pack], objective: Objective) -> dict[str, float]:
        """Accumulate gradients of sum(objective(pack)) over packs; each objective divides by the global count itself
        (objectives.md 1.2: sum first, one global count, no second division). Returns the summed metrics. Of several processes each
        takes a share of the packs; the metrics are those of all packs on every one, and `step` sums the gradients."""
        totals: dict[str, float] = {"loss": 0.0}
        packs = list(packs)
        for pack in team().own(packs):
            loss, metrics = objective(self.score(pack))
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
            totals["loss"] += float(loss.detach())
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0.0) + float(value)
        for pack in self._company(packs):
            (self.score(pack).hidden.sum() * 0).backward()  # type: ignore[no-untyped-call]
        self.tokens_done += sum(pack.tokens for pack in packs)
        return team().totals(totals)

    def _company(self, packs: Sequence[Pack]) -> list[Pack]:
        """Packs to run for nothing: where weights are sharded, a pass needs every process, also those that have fewer packs."""
        if not self.policy.sharded or not packs:
            return []
        return [min(packs, key=lambda pack: pack.tokens)] * team().idle(packs)

    def _sum_gradients(self) -> None:
        """Sum over the processes. A parameter that none of them has a gradient of keeps none: zeros would let AdamW move it."""
        if team().size == 1:
            return
        parameters = list(self.parameters.values())
        having = torch.tensor([float(parameter.grad is not None) for parameter in parameters], device=self.policy.device)
        team().sum_([having])
        found = [parameter for parameter, count in zip(parameters, having.tolist(), strict=True) if count]
        for parameter in found:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        team().sum_([parameter.grad for parameter in found if parameter.grad is not None])

    def score(self, pack: Pack) -> Scored:
        pack = pack.to(self.policy.device)
        hidden, states = self.policy.states(pack, self.blocks)
        return Scored(self.policy, pack, hidden[pack.rows], states)

    @torch.no_grad()
    def reference_logprobs(self, packs: Sequence[Pack]) -> list[tuple[Pack, Tensor]]:
        """[N] of the same base with every adapter off, for each of this process's packs."""
        with self.policy.only_base():
            found = [(pack, self.policy.logprobs(pack)) for pack in team().own(packs)]
            for pack in self._company(packs):
                self.policy.hidden(pack)
        return found

    def step(self) -> dict[str, float]:
        """Clip, update, clear. Returns the gradient norm before clipping and the rate used. Raises TrainingError, in every process
        alike and with the weights as they were, when the norm is not finite."""
        self._sum_gradients()
        for name, parameter in self.parameters.items():
            master = self._masters[name]
            if master is not parameter:
                master.grad = None if parameter.grad is None else parameter.grad.float()
                parameter.grad = None
        masters = list(self._masters.values())
        norm = float(nn.utils.clip_grad_norm_(masters, self.options.clip))
        rate = learning_rate(self.options, self.steps_done, self.total_steps)
        if not math.isfinite(norm):
            self._optimiser.zero_grad(set_to_none=True)
            raise TrainingError(
                "the gradients are not finite: training has diverged",
                where=f"step {self.steps_done}",
                value=norm,
                remedy=f"lower optimiser.lr, which is {rate:.3g} at this step",
            )
        for group in self._optimiser.param_groups:
            group["lr"] = rate * group["scale"]
        self._optimiser.step()
        # the fused kernel writes without counting it, and merged LoRA weights are formed anew when the count moves (policy/fused.py)
        torch.autograd.graph.increment_version(masters)
        self._optimiser.zero_grad(set_to_none=True)
        self._publish()
        self.steps_done += 1
        return {"grad_norm": norm, "lr": rate}

    @torch.no_grad()
    def _publish(self) -> None:
        for name, parameter in self.parameters.items():
            master = self._masters[name]
            if master is not parameter:
                parameter.copy_(master)

    @torch.no_grad()
    def freeze(self) -> None:
        """End training: round the parameters to bf16, the stored type, so that what is measured is what is released."""
        for parameter in self.parameters.values():
            parameter.requires_grad_(False)
            parameter.copy_(parameter.to(torch.bfloat16))
        self.policy.forget_merged()

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def save(self, checkpointer: Checkpointer, cursor: Mapping[str, Any]) -> None:
        """Hand a consistent copy of everything to the background writer; training goes on meanwhile. Every process holds everything, so
        a checkpoint of several processes can be resumed by any number."""
        tensors = {f"master.{name}": master.detach() for name, master in self._masters.items()}
        for name, master in self._masters.items():
            for key, value in self._optimiser.state.get(master, {}).items():
                tensors[f"adam.{key}.{name}"] = value
        tensors["rng.torch"] = torch.get_rng_state()
        if self.policy.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.policy.device)
        copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        checkpointer.write(
            copies,
            {
                "steps_done": self.steps_done,
                "tokens_done": self.tokens_done,
                "total_steps": self.total_steps,
                "cursor": dict(cursor),
            },
        )

    @torch.no_grad()
    def resume(self, folder: Path, identity: str) -> dict[str, Any] | None:
        """Restore the newest complete checkpoint in `folder`, if any; returns its cursor. CheckpointError if another run wrote it."""
        found = team().share(read_checkpoint(folder, identity) if team().first else None)
        if found is None:
            return None
        tensors, state = found
        for name, master in self._masters.items():
            master.copy_(tensors[f"master.{name}"])
            prefix = [key for key in tensors if key.startswith("adam.") and key.split(".", 2)[2] == name]
            if prefix:
                self._optimiser.state[master] = {
                    key.split(".", 2)[1]: tensors[key].to(master.device, copy=True) for key in prefix
                }
        torch.set_rng_state(tensors["rng.torch"])
        if self.policy.device.type == "cuda" and "rng.cuda" in tensors:  # a checkpoint of a CPU has none
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.policy.device)
        self._publish()
        self.steps_done, self.tokens_done = int(state["steps_done"]), int(state["tokens_done"])
        return dict(state["cursor"])
