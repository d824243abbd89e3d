"""The lock: it round-trips, and any change of template, tokenizer or rendering is named where the artifact is loaded."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from posttrain.contract import LOCK_FILE, TEMPLATES, Contract, ContractLock
from posttrain.contract import template as template_module
from posttrain.contract.template import template_for
from posttrain.data.records import Message
from posttrain.errors import ContractError
from tiny_models import SPECIAL


@pytest.fixture
def saved(contract: Contract, tmp_path: Path) -> Path:
    contract.save(tmp_path)
    return tmp_path


def rewrite(path: Path, change: Callable[[Any], None]) -> None:
    value = json.loads(path.read_text("utf-8"))
    change(value)
    path.write_text(json.dumps(value), "utf-8")


def test_a_lock_survives_json(contract: Contract) -> None:
    lock = contract.lock()
    again = ContractLock.from_json(json.loads(json.dumps(lock.to_json())))
    assert again == lock and again.fingerprint == lock.fingerprint
    contract.verify(again)


def test_two_contracts_over_the_same_tokenizer_have_one_fingerprint(
    contract: Contract, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    assert Contract(tiny_tokenizer).lock().fingerprint == contract.lock().fingerprint


def test_a_saved_contract_loads_and_renders_the_same(contract: Contract, saved: Path) -> None:
    loaded = Contract.load(saved)
    messages = (Message("user", "What is due? 你好 <|im_end|>"),)
    assert loaded.prompt_ids(messages) == contract.prompt_ids(messages)
    assert loaded.lock() == contract.lock()
    assert (loaded.end_of_turn, loaded.vocabulary_size) == (contract.end_of_turn, contract.vocabulary_size)


def test_saving_again_after_loading_writes_the_same_lock(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    again = tmp_path_factory.mktemp("again")
    Contract.load(saved).save(again)
    assert (again / LOCK_FILE).read_bytes() == (saved / LOCK_FILE).read_bytes()


def test_a_folder_without_a_lock_gets_the_template_that_fits(saved: Path) -> None:
    (saved / LOCK_FILE).unlink()
    assert Contract.load(saved).template.name == "posttrain-chatml/1"


def test_a_changed_merge_of_the_tokenizer_is_noticed(saved: Path) -> None:
    rewrite(saved / "tokenizer.json", lambda value: value["model"]["merges"].pop())
    with pytest.raises(ContractError, match="tokenizer_sha256") as caught:
        Contract.load(saved)
    assert caught.value.where == str(saved / LOCK_FILE) and caught.value.remedy


def test_a_changed_normaliser_of_the_tokenizer_is_noticed(saved: Path) -> None:
    rewrite(saved / "tokenizer.json", lambda value: value.update(normalizer={"type": "Lowercase"}))
    with pytest.raises(ContractError, match="tokenizer_sha256"):
        Contract.load(saved)


def test_an_added_token_is_noticed(contract: Contract, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    grown = copy.deepcopy(tiny_tokenizer)
    grown.add_tokens([AddedToken("1001", special=False)])
    with pytest.raises(ContractError, match="does not match its lock"):
        Contract(grown).verify(contract.lock())


def test_swapped_special_tokens_are_noticed(contract: Contract) -> None:
    lock = contract.lock()
    swapped = tuple((token, lock.special_ids[1 - i][1]) for i, (token, _) in enumerate(lock.special_ids))
    with pytest.raises(ContractError, match="special_ids"):
        contract.verify(replace(lock, special_ids=swapped))


def test_a_template_that_writes_other_text_under_the_same_name_is_noticed(
    contract: Contract, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = replace(TEMPLATES[0], separator="\n\n")
    monkeypatch.setattr(template_module, "TEMPLATES", (changed, *TEMPLATES[1:]))
    with pytest.raises(ContractError, match="template_sha256"):
        Contract(tiny_tokenizer).verify(contract.lock())


def test_another_template_name_is_noticed(contract: Contract) -> None:
    with pytest.raises(ContractError, match="template should be 'posttrain-chatml/0'"):
        contract.verify(replace(contract.lock(), template="posttrain-chatml/0"))


def test_a_moved_golden_names_the_probe_and_the_first_token_that_differs(contract: Contract) -> None:
    lock = contract.lock()
    name, ids, digest = lock.goldens[1]
    changed = (*ids[:7], ids[7] + 1, *ids[8:])
    tampered = replace(lock, goldens=(lock.goldens[0], (name, changed, digest), *lock.goldens[2:]))
    with pytest.raises(ContractError, match="golden rendering 'turns' differs from token 7 on"):
        contract.verify(tampered)


def test_a_golden_whose_weights_changed_is_noticed_though_its_ids_are_the_same(contract: Contract) -> None:
    lock = contract.lock()
    name, ids, _ = lock.goldens[0]
    with pytest.raises(ContractError, match="golden rendering 'tool'"):
        contract.verify(replace(lock, goldens=((name, ids, "0" * 64), *lock.goldens[1:])))


def test_a_golden_on_disk_that_was_altered_is_noticed_on_load(saved: Path) -> None:
    def change(value: Any) -> None:
        value["goldens"][2]["ids"][3] += 1

    rewrite(saved / LOCK_FILE, change)
    with pytest.raises(ContractError, match="golden rendering 'hostile' differs from token 3 on"):
        Contract.load(saved)


def test_a_lock_that_lost_its_goldens_is_refused(contract: Contract) -> None:
    lock = contract.lock()
    for goldens in ((), lock.goldens[:-1], lock.goldens[::-1]):
        with pytest.raises(ContractError, match="golden"):
            contract.verify(replace(lock, goldens=goldens))


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value.update(format=2),
        lambda value: value.pop("format"),
        lambda value: value.pop("tokenizer_sha256"),
        lambda value: value.update(special_ids=[1, 2]),
        lambda value: value.update(goldens=7),
        lambda value: value["goldens"][0].pop("ids"),
        lambda value: value["goldens"][0].update(ids=["x"]),
        lambda value: value.update(vocabulary_size="many"),
    ],
)
def test_a_lock_of_another_format_or_garbled_is_refused_with_its_path(saved: Path, change: Callable[[Any], None]) -> None:
    rewrite(saved / LOCK_FILE, change)
    with pytest.raises(ContractError) as caught:
        Contract.load(saved)
    assert caught.value.where == str(saved / LOCK_FILE) and caught.value.remedy


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"lock"'])
def test_a_lock_file_that_is_no_lock_is_refused(saved: Path, text: str) -> None:
    (saved / LOCK_FILE).write_text(text)
    with pytest.raises(ContractError):
        Contract.load(saved)


def test_a_tokenizer_without_a_fast_backend_is_refused() -> None:
    with pytest.raises(ContractError, match="no fast backend"):
        Contract(object())


# -- which template --------------------------------------------------------------------------------------------------------


def test_the_template_is_chosen_by_the_special_tokens_of_the_vocabulary() -> None:
    assert template_for({token: i for i, token in enumerate(SPECIAL)}).name == "posttrain-chatml/1"
    llama = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    assert template_for({token: i for i, token in enumerate(llama)}).name == "posttrain-llama3/1"
    gemma = ["<bos>", "<start_of_turn>", "<end_of_turn>"]
    assert template_for({token: i for i, token in enumerate(gemma)}).name == "posttrain-gemma/1"


def test_no_template_or_an_unknown_one_is_an_error_that_lists_what_is_supported() -> None:
    with pytest.raises(ContractError, match=r"no chat template fits.*posttrain-chatml/1"):
        template_for({"a": 0})
    with pytest.raises(ContractError, match="'posttrain-gemma/1' is unknown or needs tokens"):
        template_for({token: i for i, token in enumerate(SPECIAL)}, "posttrain-gemma/1")


def with_special(tokenizer: PreTrainedTokenizerFast, tokens: list[str]) -> PreTrainedTokenizerFast:
    grown = copy.deepcopy(tokenizer)
    grown.add_special_tokens({"additional_special_tokens": tokens})
    return grown


def test_the_llama_template_begins_once_and_names_the_tool_role_ipython(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    made = Contract(with_special(tiny_tokenizer, tokens), "posttrain-llama3/1")
    ids = made.prompt_ids((Message("user", "a"), Message("assistant", "b"), Message("tool", "c")))
    assert made.decode(ids) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\na<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nb<|eot_id|>"
        "<|start_header_id|>ipython<|end_header_id|>\n\nc<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert [
        *made.prompt_ids((Message("user", "a"),)),
        *made.encode("b"),
        made.end_of_turn,
        *made.continuation_ids((Message("tool", "c"),)),
    ] == ids


def test_the_gemma_template_calls_the_assistant_model(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    made = Contract(with_special(tiny_tokenizer, ["<bos>", "<start_of_turn>", "<end_of_turn>"]), "posttrain-gemma/1")
    ids = made.prompt_ids((Message("user", "a"),))
    assert made.decode(ids) == "<bos><start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\n"
    assert made.decode([made.end_of_turn]) == "<end_of_turn>"
