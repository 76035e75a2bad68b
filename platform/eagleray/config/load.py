"""From a YAML file and `--set key=value` to a checked `JobConfig`, and back."""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from eagleray.config.schema import JobConfig, Section
from eagleray.errors import ConfigError, near_miss

S = TypeVar("S", bound=Section)


def load_job(path: str | Path, overrides: list[str] | None = None) -> JobConfig:
    """Read and check a job file.

    Args:
        path: the YAML file.
        overrides: `dotted.key=value` strings; values are YAML (`train.epochs=3`, `tune=null`).

    Raises:
        ConfigError: no such file, not YAML, or a key or value that cannot be; names the key.
    """
    return build_job(_read_mapping(path, "job file", "see jobs/ for examples to copy"), overrides or [], source=str(path))


def load_section(section: type[S], path: str | Path, kind: str, example: str) -> S:
    """Read and check a file that is one section, such as a cluster description.

    Args:
        kind: what such a file is called.
        example: file to copy.

    Raises:
        ConfigError: no such file, not YAML, or a key or value that cannot be; names the key.
    """
    return build_section(section, _read_mapping(path, kind, f"copy {example}"), str(path))


def build_job(document: dict[str, Any], overrides: list[str] | None = None, source: str = "job") -> JobConfig:
    """Check a job given as a mapping; see `load_job`."""
    for override in overrides or []:
        document = _with_override(document, override)
    try:
        return JobConfig.model_validate(document)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_first_problem(error, JobConfig)}") from None


def build_section(section: type[S], values: dict[str, Any], name: str) -> S:
    """Check values given outside a job file, such as command-line options, as the section `name`.

    Raises:
        ConfigError: names the key.
    """
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{name}: {_first_problem(error, section)}") from None


def with_values(job: JobConfig, values: dict[str, Any]) -> JobConfig:
    """Return `job` with dotted keys replaced by Python values, checked again."""
    document = job.model_dump(mode="json")
    for key, value in values.items():
        _set(document, key, value)
    return build_job(document, source="job")


def dump_job(job: JobConfig) -> str:
    """Return the resolved job file, defaults included, as YAML."""
    return yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_function(key: str, reference: str) -> Callable[..., Any]:
    """Return the function that a job file names as `module:function` under `key`.

    Raises:
        ConfigError: there is none.
    """
    module_name, _, function_name = reference.partition(":")
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module_name), function_name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{key} '{reference}': {error}; is it on PYTHONPATH?") from None
    except AttributeError:
        raise ConfigError(f"{key} '{reference}': module '{module_name}' has no '{function_name}'") from None
    return function


def _read_mapping(path: str | Path, kind: str, remedy: str) -> dict[str, Any]:
    try:
        document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"'{path}': no such {kind}; {remedy}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"'{path}': cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"'{path}': not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"'{path}': a {kind} is a mapping of keys to values, this is {_kind(document)}; {remedy}")
    return document


def _with_override(document: dict[str, Any], override: str) -> dict[str, Any]:
    key, separator, value = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set '{override}': expected dotted.key=value, for example train.epochs=3")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"--set '{override}': the value is not valid YAML; quote it") from None
    if isinstance(parsed, str):
        parsed = _number_or_text(parsed)
    document = _copy(document)
    _set(document, key.strip(), parsed)
    return document


def _number_or_text(text: str) -> float | str:
    # YAML 1.1 reads 1e-3 as text; people mean a number.
    try:
        return float(text)
    except ValueError:
        return text


def _set(document: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    node = document
    for parent in parents:
        child = node.get(parent)
        if not isinstance(child, dict):
            child = {}
        node[parent] = child
        node = child
    node[leaf] = value


def _copy(node: Any) -> Any:
    return {key: _copy(value) for key, value in node.items()} if isinstance(node, dict) else node


def _first_problem(error: ValidationError, root: type[BaseModel]) -> str:
    problems = error.errors(include_url=False)
    # An unknown key explains the others: the value it was meant to give is then missing elsewhere.
    ranks = {"extra_forbidden": 0, "value_error": 1}
    problem = min(problems, key=lambda p: ranks.get(p["type"], 2))
    location = [str(part) for part in problem["loc"] if not _is_union_tag(part)]
    key = ".".join(location)
    rest = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if problem["type"] == "extra_forbidden":
        known = _known_keys(location[:-1], root)
        hint = near_miss(location[-1], known) or f"; known keys there: {', '.join(known)}"
        return f"unknown key '{key}'{hint}{rest}"
    if problem["type"] == "missing":
        return f"'{key}' is missing{rest}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{key}: {message}{rest}" if key and not message.startswith(key) else f"{message}{rest}"
    return f"'{key}': {message[0].lower()}{message[1:]}, got {problem['input']!r}{rest}"


_UNION_TAGS = {"int", "constrained-int", "bool", "float", "str"}


def _is_union_tag(part: Any) -> bool:
    """Pydantic puts the member of a union into the location (`int`, `ElasticWorkers`); users don't write that."""
    return isinstance(part, str) and (part[:1].isupper() or part in _UNION_TAGS or "[" in part)


def _known_keys(location: list[str], root: type[BaseModel]) -> list[str]:
    model: Any = root
    for part in location:
        field = model.model_fields.get(part) if isinstance(model, type) and issubclass(model, BaseModel) else None
        model = _section_of(field.annotation) if field is not None else _section_of(model)
        if model is None:
            return []
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def _section_of(annotation: Any) -> Any:
    """Return the first section within an annotation such as `SearchConfig | None` or `dict[str, Distribution]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, dict, list, tuple) or hasattr(annotation, "__metadata__"):
        for argument in get_args(annotation):
            if (section := _section_of(argument)) is not None:
                return section
    return None


def _kind(value: Any) -> str:
    return {type(None): "empty", list: "a list", str: "a text"}.get(type(value), type(value).__name__)
