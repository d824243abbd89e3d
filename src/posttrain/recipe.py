"""Recipes: YAML -> typed options. Unknown keys are named with their nearest neighbour, types are strict, nothing is guessed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from posttrain.errors import RecipeError, nearest, nearest_of
from posttrain.evaluation.gate import GatePolicy, check_policy
from posttrain.files.hashing import sha256_of

StageKind = Literal["sft", "adapters", "preference", "tools", "reason", "distill"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class DataOptions(_Strict):
    """Where a stage's records come from: the world's generators (n, shapes or kinds, seed) or a file of your own (path)."""

    n: int = Field(200, gt=0)
    shapes: dict[str, float] = {}
    kinds: dict[str, float] = {}
    path: str | None = None
    seed: int | None = None
    own_share: float = Field(1.0, ge=0, le=1)


class StageRecipe(_Strict):
    """One stage: its lever (kind), its data, its options and the gate it must pass."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    kind: StageKind
    data: DataOptions = DataOptions()
    options: dict[str, Any] = {}
    gate: dict[str, Any] = {}


class EvaluationRecipe(_Strict):
    """The suite every candidate and the base are measured on. kinds: tasks of each kind; free: first turns repeated without grammar;
    drift: episodes on which KL to the parent is measured."""

    split: Literal["train", "dev", "test"] = "test"
    seed: int = 1
    kinds: dict[str, int] = {}
    suite: str | None = None
    max_tokens: int = Field(192, gt=0)
    free: int = Field(24, ge=0)
    drift: int = Field(16, ge=0)
    latency: int = Field(4, ge=0)


class Recipe(_Strict):
    """A whole run. The order of `stages` is the order they are pulled in."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = 1
    base: str
    world: str = "finance_ops"
    output: str = "runs"
    channel: str = "production"
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$")
    pack_tokens: int = Field(1536, gt=0)
    threads: int | None = Field(None, gt=0)
    recompute: bool = False
    evaluation: EvaluationRecipe = EvaluationRecipe()
    stages: list[StageRecipe] = Field(min_length=1)

    @property
    def hash(self) -> str:
        """SHA-256 of everything that decides the result (not the run's name, folder, device, thread count or memory)."""
        return sha256_of(self.model_dump(exclude={"name", "output", "device", "threads", "recompute"}))


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, apply `key.sub=value` overrides, and check every stage's options and gate.

    Raises RecipeError naming file, key, cause and remedy; all problems of a file are reported together.
    """
    value = read_yaml(path, "recipe")
    if not isinstance(value, dict):
        raise RecipeError("the recipe is not a mapping", where=str(path), remedy="start with `name:` and `base:`")
    for override in overrides:
        _override(value, override)
    return parse_recipe(value, str(path))


def read_yaml(path: Path, what: str) -> Any:
    """A file that a person wrote, read strictly (see the loader below). Raises RecipeError naming the file and `what` it should be."""
    try:
        return yaml.load(path.read_text("utf-8"), Loader=_StrictLoader)
    except OSError as error:
        raise RecipeError(
            f"the {what} cannot be read ({error.strerror})", where=str(path), remedy="give the path of a YAML file"
        ) from error
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"the {what} is not UTF-8 (byte {error.start})", where=str(path), remedy="save it as UTF-8 text"
        ) from error
    except yaml.YAMLError as error:
        raise RecipeError(f"the {what} is not YAML ({error})", where=str(path), remedy="check indentation and quotes") from error


def parse_recipe(value: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """A Recipe from plain data."""
    try:
        recipe = Recipe.model_validate(value)
    except ValidationError as error:
        raise RecipeError(_explain(error, Recipe), where=where, remedy="see docs/recipes.md for every key") from error
    names = [stage.name for stage in recipe.stages]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RecipeError(
            f"two stages have the same name: {', '.join(twice)}", where=f"{where}: stages", remedy="name every stage once"
        )
    if "base" in names:
        raise RecipeError(
            "a stage cannot be called base", where=f"{where}: stages", remedy="reports call the model the road starts from that"
        )
    for index, stage in enumerate(recipe.stages):
        place = f"{where}: stages[{index}] ({stage.name})"
        stage_options(stage, f"{place}.options")
        check_policy(gate_policy(stage, f"{place}.gate"), f"{place}.gate", *_measured(recipe.evaluation))
    return recipe


def _measured(evaluation: EvaluationRecipe) -> tuple[list[str] | None, list[str]]:
    """The kinds of task that are measured (None: unknown here), and the metrics that are not."""
    kinds = [kind for kind, count in evaluation.kinds.items() if count > 0] if evaluation.kinds and not evaluation.suite else None
    counts = {
        "schema_validity_free": evaluation.free,
        "kl_to_parent": evaluation.drift,
        "latency_s": evaluation.latency,
        "latency_ratio": evaluation.latency,
    }
    return kinds, [metric for metric, count in counts.items() if count == 0]


def stage_options(stage: StageRecipe, where: str = "options") -> Any:
    """The stage's own options object, built from the recipe's mapping."""
    return build(options_type(stage.kind), stage.options, where)


def options_type(kind: StageKind) -> type:
    """The options class that lives beside the stage's loop (imported late: the loops import torch)."""
    from posttrain.stages import adapters, distill, preference, reason, sft, tools

    return {
        "sft": sft.SftOptions,
        "adapters": adapters.AdapterOptions,
        "preference": preference.PreferenceOptions,
        "tools": tools.ToolOptions,
        "reason": reason.ReasonOptions,
        "distill": distill.DistillOptions,
    }[kind]


def gate_policy(stage: StageRecipe, where: str = "gate") -> GatePolicy:
    policy: GatePolicy = build(GatePolicy, stage.gate, where)
    return policy


def build(cls: Any, value: Mapping[str, Any], where: str) -> Any:
    """A (nested) frozen dataclass from plain data, strictly: unknown keys and wrong types are errors with a remedy."""
    _refuse_unknown(cls, value, where)
    try:
        return TypeAdapter(cls).validate_python(_plain(value), strict=False)
    except ValidationError as error:
        raise RecipeError(_explain(error, cls), where=where, remedy="fix the value's type or range") from error


def _refuse_unknown(cls: Any, value: Any, where: str) -> None:
    if not (is_dataclass(cls) and isinstance(value, Mapping)):
        return
    hints = get_type_hints(cls)
    known = [f.name for f in fields(cls)]
    for key, inner in value.items():
        if key not in known:
            raise RecipeError(f"unknown key {key!r}", where=where, remedy=nearest_of(str(key), known, "known keys"))
        hint = hints[key]
        if is_dataclass(hint):
            _refuse_unknown(hint, inner, f"{where}.{key}")
        elif (
            get_origin(hint) in (list, tuple)
            and get_args(hint)
            and is_dataclass(get_args(hint)[0])
            and isinstance(inner, Sequence)
        ):
            for index, item in enumerate(inner):
                _refuse_unknown(get_args(hint)[0], item, f"{where}.{key}[{index}]")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def _explain(error: ValidationError, model: Any) -> str:
    lines = []
    for problem in error.errors():
        place = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            near = nearest(str(problem["loc"][-1]), _known_keys(model))
            lines.append(f"unknown key {place!r}{near and ', '}{near}")
        else:
            lines.append(f"{place or 'value'}: {problem['msg']} (got {problem['input']!r})")
    return "; ".join(lines)


def _known_keys(model: Any) -> list[str]:
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        return [f.name for f in fields(model)]
    return [*Recipe.model_fields, *StageRecipe.model_fields, *EvaluationRecipe.model_fields, *DataOptions.model_fields]


def _override(value: dict[str, Any], text: str) -> None:
    """`a.b.0.c=yaml value`; a stage may be addressed by its name: `stages.sft.options.batch=8`."""
    key, equals, raw = text.partition("=")
    if not equals or not key:
        raise RecipeError(
            "an override is written key.sub=value",
            where="override",
            value=text,
            remedy="for example: seed=3 or stages.sft.data.n=100",
        )
    place: Any = value
    *path, last = key.split(".")
    for part in path:
        place = _child(place, part, text)
    try:
        parsed = yaml.load(raw, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise RecipeError(
            "the value of an override is not YAML", where="override", value=text, remedy="quote it: 'key={a: 1}'"
        ) from error
    if isinstance(place, list):
        place[_index(place, last, text)] = parsed
    elif isinstance(place, dict):
        place[last] = parsed
    else:
        raise _below_a_value(last, text)


def _child(place: Any, part: str, text: str) -> Any:
    if isinstance(place, list):
        return place[_index(place, part, text)]
    if isinstance(place, dict):
        return place.setdefault(part, {})
    raise _below_a_value(part, text)


def _below_a_value(part: str, text: str) -> RecipeError:
    return RecipeError(
        f"{part!r} lies below a plain value", where="override", value=text, remedy="name a key that exists in the recipe"
    )


def _index(items: list[Any], part: str, text: str) -> int:
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if part in names:
        return names.index(part)
    if part.isdigit() and int(part) < len(items):
        return int(part)
    known = [str(name) for name in names if name]
    raise RecipeError(f"no stage {part!r}", where="override", value=text, remedy=nearest_of(part, known, "stages"))


class _StrictLoader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-4` as text, `no` as false and keeps the last of two equal keys: here floats are floats, only true/false are
    booleans, and a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]  # type: ignore[no-untyped-call]
        twice = [key for index, key in enumerate(keys) if key in keys[:index]]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]!r} occurs twice", node.start_mark)
        return super().construct_mapping(node, deep)


_StrictLoader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|false|False)$"), list("tTfF"))  # type: ignore[no-untyped-call]
_StrictLoader.add_implicit_resolver(  # type: ignore[no-untyped-call]
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$"),
    list("-+0123456789."),
)
