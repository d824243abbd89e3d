"""The policy: one set of base weights with named LoRA adapters. The reference model is the same policy, adapters off."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from posttrain.errors import BaseModelError, BindingError
from posttrain.policy.architecture import (
    blocks_of,
    body_of,
    check_length,
    mixing_layers,
    own_logprobs,
    prove,
    steady_length,
)
from posttrain.policy.attention import NAME, TreeAttention
from posttrain.policy.fused import Mix, forget_merged, install, is_simple
from posttrain.policy.head import Head
from posttrain.policy.inference import Inference
from posttrain.policy.lora import check_adapter_name, lora_layers, own_parameters
from posttrain.policy.pack import Pack
from posttrain.policy.quantised import quantise
from posttrain.policy.recompute import Recompute, wrap
from posttrain.policy.sharded import gathered, shard
from posttrain.policy.targets import targets
from posttrain.policy.weights import fingerprint
from posttrain.ranges import Count, Positive

_log = logging.getLogger(__name__)
_ROUND = 64  # tokens: a thirtieth of a pack more, on average


@dataclass(frozen=True, slots=True)
class LoraOptions:
    """Hu 2021: W' = W + (alpha / r) B A. `targets` 'all-linear' adapts every linear layer but the output head.

    `top`: adapt only the last so many blocks, all of a model that has no more (a student, say); the backward pass ends below them.
    None: all blocks. `base`: the form in which the frozen weights are kept while the adapter trains; 'nf4' is QLoRA.
    """

    rank: Count = 16
    alpha: Positive = 32.0
    targets: str | tuple[str, ...] = "all-linear"
    rslora: bool = False
    top: Count | None = None
    base: Literal["dense", "nf4"] = "dense"


class Policy:
    """Base weights, frozen, plus adapters. Tokens of a pack in, hidden states and log-probabilities out."""

    def __init__(self, model: nn.Module, folder: Path | None = None) -> None:
        mixing = mixing_layers(model.config)
        self.packs = not mixing  # whether sequences of a pack share computation
        if mixing:
            _log.warning("%s layers mix tokens outside attention: sequences run row by row, nothing is shared", ", ".join(mixing))
        self.steady = steady_length(model.config)  # tokens that a sequence may have at most, where its neighbours may not matter
        if self.steady is not None:
            _log.warning("positions of sequences over %d tokens depend on their neighbours: such are refused", self.steady)
        self.base: Any = cast(Any, model)
        self.model: Any = model  # becomes the PEFT wrapper with the first adapter
        self.folder = folder
        self._fingerprint: str | None = None
        self.quantised = False
        self.sharded = False
        self._reshard = True
        self._mix = Mix()
        self._inference: Inference | None = None
        self._recompute = Recompute()
        with suppress(BaseModelError):  # raised when recompute is asked for
            wrap(blocks_of(model), self._recompute)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        model.eval()  # no dropout in policy or reference, or ratios and margins are noise (objectives.md 0, pitfall 7)
        self._own_attention = getattr(model.config, "_attn_implementation", None)
        if self.packs:
            self.base.set_attn_implementation(NAME)
            install(self.base, self._mix)
        self.head = Head.of(model)

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Policy:
        """Load a Hugging Face folder (safetensors only). `dtype` is the compute type; None measures (see `weights.fast_dtype`).

        Two short rows are computed as transformers does and as a pack: where they differ the policy runs row by row, and BaseModelError
        where that differs, too."""
        from transformers import AutoModelForCausalLM

        from posttrain.policy.weights import fast_dtype

        quiet_transformers()
        try:
            model = AutoModelForCausalLM.from_pretrained(
                str(folder), dtype=dtype or fast_dtype(torch.device(device).type), use_safetensors=True, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise BaseModelError(
                f"the model could not be loaded ({error})",
                where=str(folder),
                remedy="name a Hugging Face folder with safetensors weights",
            ) from error
        wanted = own_logprobs(model.to(device))
        policy = cls(model, folder)
        found = prove(policy, wanted)
        if found:
            kind = type(model).__name__
            _log.warning("%s computes packs wrongly (%s): sequences run row by row, nothing is shared", kind, found)
        return policy

    def run_row_by_row(self) -> None:
        """From here on run each sequence by itself, with the model's own attention."""
        self.packs = False
        self.base.set_attn_implementation(self._own_attention)

    @property
    def recompute(self) -> bool:
        """Whether a training pass keeps each block's input only and computes the rest again: less memory, a third more time.
        BaseModelError where the blocks are not known."""
        return self._recompute.on

    @recompute.setter
    def recompute(self, on: bool) -> None:
        if on:
            blocks_of(self.base)
        self._recompute.on = on

    # -- identity ------------------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        return self._first.dtype

    @property
    def device(self) -> torch.device:
        return self._first.device

    @property
    def _first(self) -> nn.Parameter:
        parameter: nn.Parameter = next(iter(self.base.parameters()))
        return parameter

    @property
    def config(self) -> Any:
        return self.base.config

    @property
    def context(self) -> int:
        """The number of tokens that a sequence may have."""
        return self.steady or int(getattr(self.config.get_text_config(), "max_position_embeddings", 4096))

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the base weights as stored (bf16): what an adapter is bound to."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.base)
        return self._fingerprint

    # -- adapters ------------------------------------------------------------------------------------------------------

    @property
    def adapters(self) -> tuple[str, ...]:
        return tuple(getattr(self.model, "peft_config", {}))

    def add_adapter(self, name: str, options: LoraOptions, seed: int) -> None:
        """A fresh adapter: A Kaiming-uniform, B zero, so the policy starts equal to its base bit for bit.

        With `options.base` 'nf4' the base is quantised first, for as long as this policy lives: BindingError when it holds an adapter
        of the dense base, or for a name that no adapter can have."""
        check_adapter_name(name)
        if options.base == "nf4" and not self.quantised:
            self._quantise()
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=options.rank,
            lora_alpha=options.alpha,
            **targets(self.base, options),
            use_rslora=options.rslora,
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
        )  # type: ignore[arg-type]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if self.adapters:
                self.model.add_adapter(name, config, autocast_adapter_dtype=False)
            else:
                self.model = get_peft_model(self.base, config, adapter_name=name, autocast_adapter_dtype=False)
        self.model.eval()
        install(self.base, self._mix)
        for parameter in self.adapter_parameters(name).values():
            parameter.requires_grad_(False)
        self.use(name)

    def shard(self, reshard: bool = True) -> None:
        """From here on hold a share of each block's weights (`policy/sharded.py`); called by all processes, before any adapter."""
        if self.adapters or self.quantised:
            raise BindingError(
                "only a bare dense base can be sharded",
                where="policy",
                value="NF4 weights" if self.quantised else ", ".join(self.adapters),
                remedy="shard before adapters are added, and with adapter.base: dense",
            )
        _ = self.fingerprint  # of the whole weights, which adapters stay bound to
        self.forget_inference()
        self._mix.merge = False  # W' is a whole layer
        shard(body_of(self.base), self.device, reshard)
        self.sharded, self._reshard = True, reshard

    def gathered(self) -> AbstractContextManager[None]:
        """Inside, passes without gradients need no other process: sampling, where each has its own number of them."""
        return gathered(blocks_of(self.base), self._reshard) if self.sharded else nullcontext()

    def _quantise(self) -> None:
        if self.adapters or self.sharded:
            raise BindingError(
                "the policy is sharded" if self.sharded else "the policy holds adapters of the dense base",
                where="adapter.base: nf4",
                value=", ".join(self.adapters) or None,
                remedy="give every adapter of the stage the same `base`, and train NF4 weights without FSDP",
            )
        _ = self.fingerprint  # of the dense weights, which the adapter stays bound to
        self.forget_inference()
        quantise(self.base)
        self.quantised = True

    def load_adapter(self, name: str, folder: Path, expected_parent: str | None = None) -> None:
        """Load a PEFT folder under `name`; refuse it when it was trained on other weights than these. Raises BindingError."""
        check_adapter_name(name)
        if expected_parent is not None and expected_parent != self.fingerprint:
            raise BindingError(
                "the adapter was trained on another parent",
                where=str(folder),
                value=self.fingerprint,
                remedy=f"load it on the parent {expected_parent}, or train it again on this one",
            )
        from peft import PeftModel

        if self.adapters:
            self.model.load_adapter(str(folder), name, autocast_adapter_dtype=False)
        else:
            self.model = PeftModel.from_pretrained(self.base, str(folder), adapter_name=name, autocast_adapter_dtype=False)
        for parameter in self.adapter_parameters(name).values():
            parameter.data = parameter.data.to(self.dtype)
            parameter.requires_grad_(False)
        self.model.eval()
        install(self.base, self._mix)
        self.use(name)

    def save_adapter(self, name: str, folder: Path, base_name: str) -> None:
        """Write a PEFT folder (adapter_config.json, adapter_model.safetensors in bf16)."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        # not PEFT's own selection, which takes a layer for another adapter's where their names are alike ("layers.1", adapter "1")
        state = {
            f"{place}.{inner}": parameter.detach().to(torch.bfloat16).contiguous()
            for place, inner, parameter in own_parameters(self.model, name)
        }
        save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = self.model.peft_config[name]
        previous, config.base_model_name_or_path, config.inference_mode = config.base_model_name_or_path, base_name, True
        config.save_pretrained(str(folder))
        config.base_model_name_or_path, config.inference_mode = previous, False

    def adapter_parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The adapter's own parameters by their full names, never the base's, however the adapter is called."""
        return {f"{place}.{name}.{inner}": parameter for place, inner, parameter in own_parameters(self.model, name)}

    def drop_adapter(self, name: str) -> None:
        """Forget one adapter; the others stay. BindingError when it is not there."""
        self.use(name)
        if self.adapters == (name,):
            self.remove_adapters()
            return
        self.model.delete_adapter(name)
        self.use(self.adapters[0])

    def remove_adapters(self) -> None:
        """Back to the bare base weights."""
        if self.adapters:
            self.base = self.model.unload()
            self.model = self.base
            self.head = Head.of(self.base)

    def use(self, name: str | None) -> None:
        """Make one adapter active, or none. An adapter that is not there is a BindingError, never the base instead."""
        if name is not None and name not in self.adapters:
            loaded = ", ".join(self.adapters) or "none"
            raise BindingError("the policy holds no such adapter", where="policy", value=name, remedy=f"loaded: {loaded}")
        layers = self._lora_layers()
        if all(
            layer.disable_adapters == (name is None) and (name is None or layer.active_adapters == [name]) for layer in layers
        ):
            return
        # PEFT turns gradients on and off as it switches; who trains what is the learner's business, so put it back
        before = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        for layer in layers:
            layer.enable_adapters(name is not None)
            if name is not None:
                layer.set_adapter(name)
        for parameter, flag in before:
            parameter.requires_grad_(flag)

    @contextmanager
    def mixed(self, shares: Sequence[tuple[str | None, Tensor | None]]) -> Iterator[None]:
        """Inside, a pass (without gradients) computes each token with its own adapter: `shares` are adapters with the indices of their
        tokens (None: all tokens). BindingError for an adapter that is not there."""
        for name, _ in shares:
            if name is not None and name not in self.adapters:
                self.use(name)  # raises
        before = self._mix.shares
        self._mix.shares = [
            (name, None if tokens is None else tokens.to(self.device)) for name, tokens in shares if name is not None
        ]
        try:
            yield
        finally:
            self._mix.shares = before

    def mixes(self, name: str | None) -> bool:
        """Whether tokens of this adapter may share a pass with those of others: plain LoRA in every layer it adapts."""
        layers = (layer for layer in self._lora_layers() if name in layer.lora_A)
        return name is None or all(is_simple(layer, name) and not layer.merged for layer in layers)

    def _lora_layers(self) -> list[Any]:
        return [layer for _, layer in lora_layers(self.model)] if self.adapters else []

    @contextmanager
    def only_base(self) -> Iterator[None]:
        """The reference: the same weights with every adapter off, no gradients."""
        layers = self._lora_layers()
        before = [layer._disable_adapters for layer in layers]
        # set directly: enable_adapters would also touch requires_grad
        for layer in layers:
            layer._disable_adapters = True
        try:
            with torch.no_grad():
                yield
        finally:
            for layer, value in zip(layers, before, strict=True):
                layer._disable_adapters = value

    # -- computing -----------------------------------------------------------------------------------------------------

    def hidden(self, pack: Pack, sink: dict[int, tuple[Tensor, Tensor]] | None = None) -> Tensor:
        """Final hidden states [T, hidden] of every token of the pack. BaseModelError: see `check_length`."""
        check_length(pack, self.steady)
        if not self.packs:
            assert sink is None, "rows that run one by one have no keys and values to hand out"
            return self._row_by_row(pack)
        return self.forward(pack.ids.to(self.device), pack.positions.to(self.device), TreeAttention(pack, sink))

    def _row_by_row(self, pack: Pack) -> Tensor:
        """`hidden`, each sequence by itself. What several share is taken from the first of them: causal layers give the same there."""
        found, places = [], []
        missing = torch.ones(pack.tokens, dtype=torch.bool)
        for b in range(len(pack.members)):
            rows = pack.sequence_rows(b)
            out = self.base.base_model(input_ids=pack.ids[rows][None].to(self.device), use_cache=False).last_hidden_state[0]
            new = missing[rows]
            found.append(out[new.to(out.device)])
            places.append(rows[new])
            missing[rows] = False
        order = torch.cat(places).argsort()
        return torch.cat(found)[order.to(self.device)]

    def go_on(self, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Hidden states [n, hidden] of one row's next tokens ids [n], and the model's own cache after them (None before the first)."""
        known = inspect.signature(self.base.base_model.forward).parameters
        name = "cache_params" if "cache_params" in known else "past_key_values"
        out = self.base.base_model(input_ids=ids[None].to(self.device), use_cache=True, **{name: cache})
        return out.last_hidden_state[0], getattr(out, name)

    def inference(self) -> Inference | None:
        """The base arranged for decoding, None where it cannot be; kept from the first call on while its weights stay as they are."""
        if self._inference is None or self._inference.stale:
            self._inference = Inference.of(self.base) if self.packs else None
        return self._inference

    def forget_inference(self) -> None:
        """Give the arranged weights' memory back, as much as the base's own; the next `inference` makes them again in half a second."""
        self._inference = None

    def forget_merged(self) -> None:
        """Give the memory of a training pass's merged weights back; the next pass forms them again."""
        forget_merged(self.base)

    def states(self, pack: Pack, blocks: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """`hidden`, and the residual stream [T, hidden] after each of the given blocks. What trains goes this way: the pass is over the
        pack rounded up, as sizes that come again find their kernels and their memory again."""
        found: dict[int, Tensor] = {}

        def keep(block: int) -> Callable[[nn.Module, object, object], None]:
            def hook(module: nn.Module, inputs: object, output: object) -> None:
                found[block] = cast(Tensor, output[0] if isinstance(output, tuple) else output)

            return hook

        layers = blocks_of(self.base) if blocks else ()
        hooks = [layers[block].register_forward_hook(keep(block)) for block in blocks]
        try:
            hidden = self.hidden(pack.rounded(_ROUND) if self.packs else pack)
        finally:
            for hook in hooks:
                hook.remove()
        return hidden[: pack.tokens], [found[block][0, : pack.tokens] for block in blocks]

    def forward(self, ids: Tensor, positions: Tensor, context: object) -> Tensor:
        """One pass over flat tokens: ids, positions [T] -> hidden [T, hidden]; `context` computes the attention."""
        if torch.is_grad_enabled():
            self.forget_inference()  # a training pass needs the room
        body = self.base.base_model
        out = body(input_ids=ids[None], position_ids=positions[None], use_cache=False, posttrain_context=context)
        states: Tensor = out.last_hidden_state
        return states[0]

    def logprobs(self, pack: Pack, chunk: int = 256) -> Tensor:
        """log pi(target | its prefix) [N] float32 of every prediction of the pack; differentiable when an adapter trains."""
        hidden, _ = self.states(pack, ())  # as a learner's pass: a fresh adapter must give its reference's bits
        return self.head.logprobs(hidden[pack.rows.to(self.device)], pack.targets.to(self.device), chunk)


def quiet_transformers() -> None:
    """Progress bars of the loading libraries are noise beside our own."""
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
