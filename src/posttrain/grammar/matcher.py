"""From a grammar to a mask over the vocabulary, step by step: llguidance behind two small classes.

Arrays: `mask` is int32 [B, ceil(V / 32)], least significant bit first: bit `t % 32` of word `t // 32` says whether token `t` may
come next. V is the model's padded vocabulary size, which is not the tokenizer's: rows beyond the tokenizer's last id stay 0.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import Any

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer
from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par
from numpy.typing import NDArray

from posttrain.errors import GrammarError

Mask = NDArray[np.int32]

_ALL = np.int32(-1)
_COMPILED = 512  # compiled grammars kept per process
_TOKENIZERS = 8
_QUOTE, _BRACKETS = re.compile(rb'"[\]}]*'), re.compile(rb"[\[{]?[\]}]+")
_MARKS, _LETTER = re.compile(rb'[\[\]{}":,]+'), re.compile(rb"[a-z]")
_REST = re.compile(rb"[\x80-\xbf]+")
_PARALLEL = 32  # rows from which handing them to threads costs less than it saves


@dataclass(frozen=True, slots=True)
class Grammar:
    """A llguidance Lark grammar as text. Two grammars with the same text are the same grammar."""

    source: str

    @property
    def hash(self) -> str:
        """SHA-256 of the text, as 64 hex digits."""
        return hashlib.sha256(self.source.encode("utf-8")).hexdigest()

    def check(self, where: str = "grammar") -> None:
        """Raise GrammarError naming what cannot be enforced. Needs no tokenizer."""
        message = _problem(self.source)
        if message:
            raise _refused(message, where)


class Matcher:
    """One request's place in its grammar."""

    __slots__ = ("_inner",)

    def __init__(self, inner: LLMatcher) -> None:
        self._inner = inner

    def consume(self, token: int) -> None:
        """Advance by one token. Raises GrammarError when the grammar does not allow it here."""
        if not self._inner.consume_token(int(token)):
            raise GrammarError(
                f"a token outside the grammar: {_first_line(self._inner.get_error())}",
                where="matcher",
                value=int(token),
                remedy="draw only tokens that the mask allows",
            )

    def forced_run(self) -> list[int]:
        """Tokens that must come next, in order, tokenised as the tokenizer itself would; empty where there is a choice."""
        return list(self._inner.compute_ff_tokens())

    def allowed(self, row: Mask) -> None:
        """Write the mask of the next token into `row`, int32 [ceil(V / 32)]. Raises GrammarError when nothing may follow."""
        mask = row.reshape(1, -1)
        fill_next_token_bitmask(self._inner, mask, 0)
        _check_filled(self, mask[0])

    def copy(self) -> Matcher:
        """Another matcher at the same place."""
        return Matcher(self._inner.deep_copy())

    def way_out(self, closers: Closers, most: int, guess: bool = False) -> list[int] | None:
        """Tokens that make a whole sentence of what was consumed so far, empty where it is one; None where `most` tokens do not. What is
        open is closed. Where a value must come first there is no way, unless to `guess` one of those that the grammar allows will do."""
        rest, way = self.copy(), list[int]()
        if most < 0:
            return None
        mask = np.zeros((1, len(closers.quotes)), np.int32)
        while not rest.is_accepting:
            run = rest.forced_run()
            if not run:
                fill_next_token_bitmask(rest._inner, mask, 0)
                if closers.ends(mask[0]):
                    break
                run = closers.best(mask[0], guess)
            if not run or rest.error or len(way) + len(run) > most:
                return None
            for token in run:
                rest.consume(token)
            way += run
        return way

    @property
    def is_accepting(self) -> bool:
        """What was consumed so far is a whole sentence of the grammar."""
        return bool(self._inner.is_accepting())

    @property
    def is_stopped(self) -> bool:
        """Nothing but the end of the turn may follow."""
        return bool(self._inner.is_stopped())

    @property
    def error(self) -> str:
        """Why the matcher is broken, or ''. A broken matcher would silently allow the end of the turn, so it must be asked."""
        return _first_line(self._inner.get_error()) if self._inner.is_error() else ""


@dataclass(frozen=True, slots=True)
class Closers:
    """The tokens that close JSON, int32 [ceil(V / 32)] each: a quote with brackets behind it or none, brackets alone, marks of any kind.
    `rest`: bytes that a letter of several still lacks. Within a string brackets are letters like others, and at an array's first place a
    quote opens one: where letters may come, it is a string."""

    quotes: Mask
    brackets: Mask
    marks: Mask
    letters: Mask
    rest: Mask
    end: int

    def ends(self, mask: Mask) -> bool:
        """Whether the end of the turn may come."""
        return bool(mask[self.end // 32] >> (self.end % 32) & 1)

    def best(self, mask: Mask, guess: bool) -> list[int]:
        """What closes the most: the last of tokens that are as good, since later merges are longer. Else the first mark, which opens
        least; else, as a guess, the first token that the mask allows, which is short; or none."""
        within = (mask & self.letters).any()
        for kind in (self.quotes,) if within else (self.brackets, self.quotes):
            if closing := _edge(mask & kind, -1):
                return closing
        more = [] if within else _edge(mask & self.marks, 0) or _edge(mask & self.rest, 0)
        return more or (_edge(mask, 0) if guess else [])


class GrammarEngine:
    """Compiles grammars for one tokenizer and fills masks for a batch.

    Tokenizers and compiled grammars are cached for the whole process by their hashes, so a second engine for the same tokenizer
    costs nothing. Safe to share between threads; a Matcher is not.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_id: int) -> None:
        """`tokenizer`: a Hugging Face fast one; `vocab_size`: the model's padded vocabulary V; `eos_id`: the end-of-turn id.

        Raises GrammarError for a slow tokenizer, or a vocabulary smaller than the tokenizer's.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise GrammarError(
                "the tokenizer has no fast backend",
                where="grammar engine",
                value=type(tokenizer).__name__,
                remedy="load it with use_fast=True",
            )
        largest = max(backend.get_vocab(with_added_tokens=True).values())
        if not (largest < vocab_size and 0 <= eos_id < vocab_size):
            raise GrammarError(
                f"the vocabulary does not hold token ids up to {max(largest, eos_id)}",
                where="grammar engine",
                value=vocab_size,
                remedy="pass the model's padded vocabulary size (config.vocab_size)",
            )
        self.vocab_size, self.eos_id = vocab_size, eos_id
        self.tokenizer_hash = hashlib.sha256(f"{vocab_size} {eos_id} {backend.to_str()}".encode()).hexdigest()
        self._tokenizer = _TOKENIZER_CACHE.get_or_make((self.tokenizer_hash,), lambda: _build(tokenizer, vocab_size, eos_id))

    @cached_property
    def closers(self) -> Closers:
        """What closes a JSON value that is open."""
        decode = self._tokenizer.decode_bytes
        texts = [decode([token]) for token in range(self._tokenizer.vocab_size)]

        def those(form: re.Pattern[bytes]) -> Mask:
            bits = np.zeros(32 * ((self.vocab_size + 31) // 32), np.uint8)
            bits[[token for token, text in enumerate(texts) if form.fullmatch(text)]] = 1
            return np.packbits(bits, bitorder="little").view(np.int32)

        return Closers(those(_QUOTE), those(_BRACKETS), those(_MARKS), those(_LETTER), those(_REST), self.eos_id)

    def matcher(self, grammar: Grammar) -> Matcher:
        """A fresh matcher at the start of the grammar. Raises GrammarError when it does not compile."""
        key = (self.tokenizer_hash, grammar.hash)
        compiled: LLMatcher = _GRAMMAR_CACHE.get_or_make(key, lambda: self._compile(grammar))
        return Matcher(compiled.deep_copy())

    def fill(self, matchers: Sequence[Matcher | None]) -> Mask:
        """The batch's mask, int32 [B, ceil(V / 32)]; a row without a matcher allows everything.

        Raises GrammarError for a matcher that is broken or allows nothing: an empty mask would let noise through.
        """
        mask, broken = self.masks(matchers)
        for error in broken.values():
            raise error
        return mask

    def masks(self, matchers: Sequence[Matcher | None]) -> tuple[Mask, dict[int, GrammarError]]:
        """The batch's mask as `fill` gives it, and by row what is wrong with matchers that are broken or allow nothing; their rows
        allow everything, so that the other rows can be drawn."""
        mask: Mask = np.full((len(matchers), (self.vocab_size + 31) // 32), _ALL, dtype=np.int32)
        held = [(matcher, row) for row, matcher in enumerate(matchers) if matcher is not None]
        if len(held) >= _PARALLEL:
            fill_next_token_bitmask_par(_executor(), [(matcher._inner, row) for matcher, row in held], mask)
        else:
            for matcher, row in held:
                fill_next_token_bitmask(matcher._inner, mask, row)
        broken = {}
        for matcher, row in held:
            try:
                _check_filled(matcher, mask[row])
            except GrammarError as error:
                broken[row] = error
                mask[row] = _ALL
        return mask, broken

    def _compile(self, grammar: Grammar) -> LLMatcher:
        compiled = LLMatcher(self._tokenizer, grammar.source, log_level=0, limits=_limits())
        if compiled.is_error():
            raise _refused(compiled.get_error(), "grammar")
        return compiled


def allowed_counts(mask: Mask) -> NDArray[np.int64]:
    """How many tokens each row allows, int64 [B]; padding bits of an all-ones row are counted too."""
    return np.asarray(np.bitwise_count(mask.view(np.uint32)).sum(axis=1, dtype=np.int64))


def forced_rows(mask: Mask) -> NDArray[np.bool_]:
    """Rows that leave no choice, bool [B]: such a token says nothing about the policy that emits it."""
    return np.asarray(allowed_counts(mask) == 1)


def _edge(mask: Mask, place: int) -> list[int]:
    """The first (0) or the last (-1) token that a mask [ceil(V / 32)] allows, if there is one."""
    (words,) = mask.nonzero()
    if not len(words):
        return []
    word = int(mask.view(np.uint32)[words[place]])
    return [32 * int(words[place]) + (word if place else word & -word).bit_length() - 1]


class _Cache:
    """The most recently used values, made once per key even when threads ask together."""

    def __init__(self, size: int) -> None:
        self._size, self._values, self._lock = size, OrderedDict[tuple[str, ...], Any](), threading.Lock()

    def get_or_make(self, key: tuple[str, ...], make: Any) -> Any:
        with self._lock:
            if key not in self._values:
                self._values[key] = make()
                while len(self._values) > self._size:
                    self._values.popitem(last=False)
            self._values.move_to_end(key)
            return self._values[key]


_TOKENIZER_CACHE = _Cache(_TOKENIZERS)
_GRAMMAR_CACHE = _Cache(_COMPILED)


@cache
def _executor() -> LLExecutor:
    return LLExecutor()


@lru_cache(maxsize=_COMPILED)
def _problem(source: str) -> str:
    """What is wrong with a grammar, or ''. Cached: every task of a suite asks about the same few."""
    return str(LLMatcher.validate_grammar(source, limits=_limits()))


@cache
def _limits() -> LLParserLimits:
    return LLParserLimits(verbose_errors=False)  # verbose messages carry the whole grammar, and with it a tenant's schema


def _build(tokenizer: Any, vocab_size: int, eos_id: int) -> LLTokenizer:
    from llguidance.hf import from_tokenizer  # imports transformers

    try:
        return from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=eos_id)
    except Exception as error:  # the binding raises plain Exception types that differ between versions
        raise GrammarError(
            f"the tokenizer cannot drive a grammar ({_first_line(str(error))})",
            where="grammar engine",
            value=type(tokenizer).__name__,
            remedy="use a byte-level BPE or byte-fallback fast tokenizer",
        ) from error


def _check_filled(matcher: Matcher, row: Mask) -> None:
    if matcher.error or not row.any():
        raise GrammarError(
            f"no token may follow: {matcher.error or 'the mask is empty'}",
            where="matcher",
            remedy="simplify the schema, or check that the tokenizer holds every byte",
        )


def _refused(message: str, where: str) -> GrammarError:
    reason = _first_line(message).rpartition("failed to compile JSON schema: ")[2]
    return GrammarError(
        f"cannot be enforced while decoding: {reason}",
        where=where,
        remedy="take the named keyword out of the schema and check that rule after decoding",
    )


def _first_line(message: str) -> str:
    return message.strip().partition("\n")[0]
