"""Passes as text and back: `prune-weights{ratio=0.5}; fold-batch-norm`.

A pass's name is its class name in kebab-case, its options are Python literals. `pass_text` leaves defaults out;
`full_text` writes them all, so that a changed default cannot change an old recipe.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import io
import re
import tokenize
from typing import TYPE_CHECKING, TypeVar

from mcc.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from _typeshed import DataclassInstance

PassType = TypeVar("PassType")

_NAME = re.compile(r"\s*([a-z][a-z0-9]*(?:-[a-z0-9]+)*)\s*")


def kebab_case(name: str) -> str:
    """`FoldBatchNorm` -> `fold-batch-norm`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", name).lower()


def pass_text(instance: DataclassInstance) -> str:
    """The pass as text, options that have their default left out."""
    return _text(instance, [f for f in dataclasses.fields(instance) if getattr(instance, f.name) != _default(f)])


def full_text(instance: DataclassInstance) -> str:
    """The pass as text with every option written."""
    return _text(instance, list(dataclasses.fields(instance)))


def _default(field: dataclasses.Field[object]) -> object:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _text(instance: DataclassInstance, fields: Sequence[dataclasses.Field[object]]) -> str:
    options = ", ".join(f"{f.name}={getattr(instance, f.name)!r}" for f in fields)
    name = kebab_case(type(instance).__name__)
    return f"{name}{{{options}}}" if options else name


def parse_passes(text: str, known: Mapping[str, type[PassType]]) -> tuple[PassType, ...]:
    """Read a pass list.

    Args:
        text: passes separated by semicolons.
        known: pass classes by kebab-case name.

    Raises:
        SpecError: the text is malformed, or names an unknown pass or option.
    """
    passes: list[PassType] = []
    rest = text
    while rest.strip():
        match = _NAME.match(rest)
        if match is None:
            raise SpecError(f"expected a pass name at {rest.strip()[:30]!r}", remedy="write name{option=value}; name")
        options, rest = _split_options(rest[match.end() :])
        passes.append(build_pass(match[1], options, known))
        if rest.strip() and not rest.lstrip().startswith(";"):
            raise SpecError(f"expected ';' before {rest.strip()[:30]!r}", remedy="separate passes by semicolons")
        rest = rest.lstrip()[1:]
    return tuple(passes)


def _split_options(text: str) -> tuple[dict[str, object], str]:
    """Options in the braces that `text` begins with, and what follows; a brace inside a string does not count."""
    if not text.startswith("{"):
        return {}, text
    depth = 0
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            depth += {"{": 1, "}": -1}.get(token.string, 0) if token.type == tokenize.OP else 0
            if depth == 0:
                lines = text.splitlines(keepends=True)
                end = sum(len(line) for line in lines[: token.end[0] - 1]) + token.end[1]
                return _options(text[1 : end - 1]), text[end:]
    except (tokenize.TokenError, SyntaxError):
        pass
    raise SpecError(f"no closing brace in {text[:40]!r}", remedy="write name{option=value, option=value}")


def _options(text: str) -> dict[str, object]:
    try:
        call = ast.parse(f"options({text})", mode="eval").body
        assert isinstance(call, ast.Call)
        options = {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg is not None}
    except (SyntaxError, ValueError) as error:
        raise SpecError(f"cannot read the options {{{text}}}", remedy="options are name=literal, by commas") from error
    if call.args or len(options) != len(call.keywords):
        raise SpecError(f"options need names: {{{text}}}", remedy="write option=value")
    return options


def build_pass(name: str, options: Mapping[str, object], known: Mapping[str, type[PassType]]) -> PassType:
    """Make the pass called `name`; lists among the options become tuples.

    Raises:
        SpecError: the name or an option is unknown, a needed option is left out, or a value has the wrong type.
    """
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise SpecError(f"unknown pass {name!r}", remedy=f"{hint}known passes: {', '.join(sorted(known))}")
    fields = {f.name: f for f in dataclasses.fields(known[name])}  # type: ignore[arg-type]  # passes are dataclasses
    for option, value in options.items():
        if option not in fields:
            raise SpecError(f"{name} has no option {option!r}", remedy=f"its options: {', '.join(fields) or 'none'}")
        default = _default(fields[option])
        if isinstance(default, int | float | str) and not _fits(value, default):
            raise SpecError(
                f"{name}: {option}={value!r} is not a {type(default).__name__}", remedy=f"such as {option}={default!r}"
            )
    needed = [f.name for f in fields.values() if _default(f) is dataclasses.MISSING and f.name not in options]
    if needed:
        raise SpecError(f"{name} needs {', '.join(needed)}", remedy=f"write {name}{{{needed[0]}=…}}")
    return known[name](**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})


def _fits(value: object, default: object) -> bool:
    if value is None:
        return True  # whether None is allowed is the pass's to say
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    return isinstance(value, int | float) if isinstance(default, float) else isinstance(value, type(default))


def read_recipe(path: Path, known: Mapping[str, type[PassType]]) -> tuple[PassType, ...]:
    """Read a YAML recipe: a list whose items are a pass as text, or a mapping {name: {option: value}}.

    Raises:
        SpecError: the file is not such a list, or a pass in it is wrong.
    """
    import yaml  # only recipes need it

    try:
        items = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SpecError(f"cannot read the recipe {path}: {str(error).splitlines()[0]}") from error
    if not isinstance(items, list):
        raise SpecError(f"{path}: a recipe is a list of passes", remedy="begin each line with '- '")
    passes: list[PassType] = []
    for item in items:
        if isinstance(item, str):
            passes += parse_passes(item, known)
        elif isinstance(item, dict) and all(isinstance(o, dict) or o is None for o in item.values()):
            passes += [build_pass(str(name), options or {}, known) for name, options in item.items()]
        else:
            raise SpecError(f"{path}: {item!r} is not a pass", remedy="write a name, or name: {option: value}")
    return tuple(passes)
