"""Retrieval of policy passages: BM25 within one tenant's passages.

The tenant is chosen before anything is ranked: an index holds one tenant's passages and the shared ones, nothing else, so another
tenant's text can neither be returned nor move a score.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from posttrain.errors import DataError

_TOKEN = re.compile(
    r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u3040-\u30ff\uac00-\ud7af]+|[^\W_\u3400-\u9fff\u3040-\u30ff\uac00-\ud7af]+"
)
_WIDE = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]")


@dataclass(frozen=True, slots=True)
class Hit:
    """One passage found, with its BM25 score (higher is better, comparable within one search only)."""

    id: str
    tenant: str | None
    text: str
    score: float


def tokens(text: str) -> list[str]:
    """Lower-case words; Chinese, Japanese and Korean runs as single characters and bigrams, which need no dictionary."""
    found: list[str] = []
    for run in _TOKEN.findall(unicodedata.normalize("NFKC", text).lower()):
        if _WIDE.match(run):
            found += [run] if len(run) == 1 else [run[i : i + 2] for i in range(len(run) - 1)]
        else:
            found.append(run)
    return found


class Retriever:
    """BM25 over passages `{id, tenant, text}` (`title` is searched too); a passage without a tenant is shared by all."""

    def __init__(self, passages: Iterable[Mapping[str, str]]) -> None:
        """Raises DataError for a passage without id or text, and for two of one id."""
        self._passages = tuple(passages)
        seen: set[str] = set()
        for index, passage in enumerate(self._passages):
            if not passage.get("id") or not passage.get("text") or passage["id"] in seen:
                what = "a passage needs an id of its own and a text"
                raise DataError(what, where=f"corpus[{index}]", value=passage.get("id"), remedy="correct the corpus")
            seen.add(passage["id"])
        self._indexes: dict[str | None, tuple[Sequence[Mapping[str, str]], Any]] = {}

    def search(self, query: str, *, tenant: str | None, k: int = 3) -> tuple[Hit, ...]:
        """The k best passages that this tenant may read, best first; passages that share no word with the query are left out."""
        passages, index = self._index(tenant)
        asked = tokens(query)
        if not passages or not asked:
            return ()
        scores = np.asarray(index.get_scores(asked), dtype=np.float64)
        best = np.argsort(-scores, kind="stable")[:k]  # stable: ties stay in the corpus' order
        return tuple(
            Hit(passages[i]["id"], passages[i].get("tenant") or None, passages[i]["text"], float(scores[i]))
            for i in best
            if scores[i] > 0
        )

    def _index(self, tenant: str | None) -> tuple[Sequence[Mapping[str, str]], Any]:
        if tenant not in self._indexes:
            visible = [passage for passage in self._passages if (passage.get("tenant") or None) in (None, tenant)]
            self._indexes[tenant] = (
                visible,
                _build([tokens(f"{passage.get('title', '')} {passage['text']}") for passage in visible]),
            )
        return self._indexes[tenant]


def _build(documents: Sequence[list[str]]) -> Any:
    try:
        import bm25s
    except ImportError as error:
        raise DataError("the retrieval engine is not installed", where="corpus", remedy="install posttrain[rag]") from error
    if not documents:
        return None
    index = bm25s.BM25()
    index.index(list(documents), show_progress=False)
    return index
