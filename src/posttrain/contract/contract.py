"""The contract T(.): template, tokenizer and special tokens as one versioned thing, shared by data, training and serving.

One pass renders ids and weights together; the sampling prompt is a prefix of the rendered training sequence by construction,
because both are concatenations of the same separately tokenised pieces. Content is always tokenised as plain text: a
`<|im_end|>` typed by a user stays a dozen ordinary tokens and can never close a turn.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from posttrain.contract.lock import LOCK_FILE, ContractLock
from posttrain.contract.parse import parse_turn
from posttrain.contract.probes import PROBES
from posttrain.contract.sequence import Sequence, SequenceBuilder
from posttrain.contract.template import Template, assistant_text, system_text, template_for
from posttrain.data.records import Conversation, Episode, Message, Preference, ToolSpec
from posttrain.errors import ContractError
from posttrain.files.hashing import canonical_json, sha256_of

_KEPT_TEXTS, _KEPT_LENGTH = 1024, 8192  # at most 100 MB of texts with their ids


class Contract:
    """Renders records to sequences, prompts to ids, and sampled ids back to messages."""

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        """`tokenizer` is a Hugging Face fast tokenizer; `template` a name of TEMPLATES (default: the one that fits)."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ContractError(
                "the tokenizer has no fast backend",
                where="contract",
                value=type(tokenizer).__name__,
                remedy="load it with use_fast=True",
            )
        self.tokenizer = tokenizer
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.template: Template = template_for(vocabulary, template)
        self._special = {token: vocabulary[token] for token in self.template.special_tokens}
        self.end_of_turn: int = self._special[self.template.end]
        self.vocabulary_size = len(vocabulary)
        self._plain = _plain_tokenizer(backend, self._special)
        self._encode_cached = lru_cache(maxsize=_KEPT_TEXTS)(self._encode_tuple)

    # -- text and tokens -----------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Plain text to ids; special-token text is not special here."""
        # what many conversations repeat is short: headers, tools, the system text
        return list(self._encode_cached(text) if len(text) <= _KEPT_LENGTH else self._encode_tuple(text))

    def _encode_tuple(self, text: str) -> tuple[int, ...]:
        return tuple(self._plain.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Seq[int]) -> str:
        return str(self._plain.decode(list(ids), skip_special_tokens=False))

    def parse(self, ids: Seq[int]) -> Message:
        """One sampled assistant turn to a Message. Raises MalformedCall when a call is opened but not completed."""
        body = list(ids)
        if self.end_of_turn in body:
            body = body[: body.index(self.end_of_turn)]
        return parse_turn(self.decode(body))

    # -- rendering -----------------------------------------------------------------------------------------------------

    def prompt_ids(self, messages: Seq[Message], tools: Seq[ToolSpec] = ()) -> list[int]:
        """Everything the model reads before its next turn, ending with the open assistant header."""
        builder = SequenceBuilder()
        self._render_messages(builder, messages, tools, learn=False)
        builder.add(self._header("assistant"), weight=0, origin=len(messages))
        ids: list[int] = builder.build().ids.tolist()
        return ids

    def turn_ids(self, message: Message) -> tuple[int, ...]:
        """An assistant's turn as it would have sampled it: its text and the end-of-turn token."""
        return (*self.encode(assistant_text(message)), self.end_of_turn)

    def continuation_ids(self, messages: Seq[Message]) -> list[int]:
        """What follows a finished assistant turn: its separator, the new messages, the next open assistant header."""
        builder = SequenceBuilder()
        builder.add(self.encode(self.template.separator), weight=0, origin=-1)
        for index, message in enumerate(messages):
            self._turn(builder, message, index, learn=False)
        builder.add(self._header("assistant"), weight=0, origin=len(messages))
        ids: list[int] = builder.build().ids.tolist()
        return ids

    def render(self, conversation: Conversation) -> Sequence:
        """Ids and weights of a conversation: assistant turns with their end token are learned, all else is read."""
        builder = SequenceBuilder()
        self._render_messages(builder, conversation.messages, conversation.tools, learn=True)
        return builder.build()

    def render_preference(self, preference: Preference) -> tuple[Sequence, Sequence]:
        """(chosen, rejected): the same prompt tokens, read only; the continuations' assistant turns are learned."""
        sides = []
        for continuation in (preference.chosen, preference.rejected):
            builder = SequenceBuilder()
            self._render_messages(builder, preference.prompt, preference.tools, learn=False)
            for offset, message in enumerate(continuation):
                self._turn(builder, message, len(preference.prompt) + offset, learn=True)
            sides.append(builder.build())
        return sides[0], sides[1]

    def render_episode(self, episode: Episode) -> Sequence:
        """The episode's own tokens, never re-tokenised; the model's turns are learned, except grammar-forced tokens."""
        builder = SequenceBuilder()
        position = 0
        for index, turn in enumerate(episode.turns):
            builder.add(list(episode.ids[position : turn.prompt_length]), weight=0, origin=-1)
            for token, forced in zip(turn.ids, turn.forced, strict=True):
                builder.add([token], weight=0.0 if forced else 1.0, origin=index)
            position = turn.prompt_length + len(turn.ids)
        return builder.build()

    def _render_messages(self, builder: SequenceBuilder, messages: Seq[Message], tools: Seq[ToolSpec], *, learn: bool) -> None:
        first_is_system = bool(messages) and messages[0].role == "system"
        system = system_text(messages[0].content if first_is_system else None, tools)
        builder.add([self._special[token] for token in self.template.preamble], weight=0, origin=-1)
        if system is not None:
            self._turn(builder, Message("system", system), 0 if first_is_system else -1, learn=False)
        for index, message in enumerate(messages):
            if index == 0 and first_is_system:
                continue
            if message.role == "system":
                raise ContractError(
                    "a system message after the first turn",
                    where=f"messages[{index}]",
                    remedy="keep one system message, at the start",
                )
            self._turn(builder, message, index, learn=learn)

    def _turn(self, builder: SequenceBuilder, message: Message, origin: int, *, learn: bool) -> None:
        is_assistant = message.role == "assistant"
        weight = 1.0 if learn and is_assistant and message.learn else 0.0
        text = assistant_text(message) if is_assistant else message.content
        builder.add(self._header(message.role), weight=0, origin=origin)
        builder.add(self.encode(text), weight=weight, origin=origin)
        builder.add([self.end_of_turn], weight=weight, origin=origin)
        builder.add(self.encode(self.template.separator), weight=0, origin=origin)

    def _header(self, role: str) -> list[int]:
        ids = [self._special[self.template.start], *self.encode(self.template.role_name(role))]
        for piece in self.template.after_role:
            ids += [self._special[piece]] if piece in self._special else self.encode(piece)
        return ids

    # -- the lock ------------------------------------------------------------------------------------------------------

    def lock(self) -> ContractLock:
        """Fingerprints of template and tokenizer, and golden renderings of the probe conversations."""
        parts = json.loads(self._plain.to_str())
        tokenizer = {key: parts.get(key) for key in ("added_tokens", "normalizer", "pre_tokenizer", "decoder", "model")}
        return ContractLock(
            template=self.template.name,
            template_sha256=sha256_of(_template_source(self.template)),
            tokenizer_sha256=sha256_of(tokenizer),
            special_ids=tuple(sorted(self._special.items())),
            vocabulary_size=self.vocabulary_size,
            goldens=tuple((probe.id, *_golden(self.render(probe))) for probe in PROBES),
        )

    def verify(self, lock: ContractLock, where: str = "contract") -> None:
        """Raise ContractError naming the first part in which this contract differs from the lock."""
        lock.compare(self.lock(), where)

    def save(self, folder: Path) -> None:
        """Write tokenizer files and `contract.lock.json` into an existing folder."""
        self.tokenizer.save_pretrained(folder)
        (folder / LOCK_FILE).write_bytes(canonical_json(self.lock().to_json()) + b"\n")

    @classmethod
    def load(cls, folder: Path) -> Contract:
        """The contract saved in a folder, verified against its own lock; a folder without a lock gets the fitting template."""
        from transformers import AutoTokenizer  # slow import, only needed here

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        except (OSError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ContractError(
                f"the folder's tokenizer cannot be read ({reason})",
                where=str(folder),
                remedy="keep tokenizer.json beside the weights",
            ) from error
        path = Path(folder) / LOCK_FILE
        lock = ContractLock.read(path) if path.exists() else None
        contract = cls(tokenizer, lock.template if lock else None)
        if lock is not None:
            contract.verify(lock, where=str(path))
        return contract


def _plain_tokenizer(backend: Any, markers: Mapping[str, int]) -> Tokenizer:
    """A private copy of the tokenizer: padding or truncation set elsewhere cannot leak in, and the template's markers are plain text
    wherever they are typed. Raises ContractError where they cannot be."""
    text = backend.to_str()
    parts = json.loads(text)
    unmarked = [token for token in parts.get("added_tokens") or () if token["content"] in markers and not token["special"]]
    if unmarked:  # published ChatML models forget the flag; encode_special_tokens passes such tokens by
        for token in unmarked:
            token["special"] = True
        text = json.dumps(parts)
    plain = Tokenizer.from_str(text)
    plain.no_padding()
    plain.no_truncation()
    plain.encode_special_tokens = True
    for marker, number in markers.items():
        typed = (marker, f"x{marker}x", f"x {marker} x")
        if any(number in plain.encode(text, add_special_tokens=False).ids for text in typed):
            raise ContractError(
                "whoever types this marker would write the token that parts the turns",
                where="contract",
                value=marker,
                remedy="add it to the tokenizer as a special token, not to its vocabulary",
            )
    return plain


def _template_source(template: Template) -> dict[str, object]:
    """What the template does, as data: its markers and how it writes a tool block and a call."""
    probe = PROBES[0]
    return {
        "markers": [template.start, list(template.after_role), template.end, template.separator, list(template.preamble)],
        "roles": [list(pair) for pair in template.roles],
        "system": system_text("S", probe.tools),
        "assistant": [assistant_text(message) for message in probe.messages if message.role == "assistant"],
    }


def _golden(sequence: Sequence) -> tuple[tuple[int, ...], str]:
    ids = tuple(sequence.ids.tolist())
    return ids, sha256_of({"ids": list(ids), "weights": sequence.weights.tolist()})


def learned_text(contract: Contract, sequence: Sequence) -> list[str]:
    """The stretches of text a sequence trains on, for people to read."""
    stretches: list[list[int]] = []
    previous = False
    for token, weight in zip(sequence.ids.tolist(), sequence.weights.tolist(), strict=True):
        if weight > 0:
            if not previous:
                stretches.append([])
            stretches[-1].append(token)
        previous = weight > 0
    return [contract.decode(stretch) for stretch in stretches]


def total_learned(sequences: Iterable[Sequence]) -> int:
    return sum(sequence.learned for sequence in sequences)
