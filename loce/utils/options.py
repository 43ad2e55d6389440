"""Command-line and YAML options as frozen dataclasses; all mistakes are reported at once.

What is allowed stands in a field's type: plain `bool`, `int`, `float` and `str`, `Literal["a", "b"]`, a number with
limits (`Count`, `Share`, ... below), `tuple[X, ...]` of these, one type or another (`X | Y`), or another dataclass (a
section).
"""

import dataclasses
import difflib
import inspect
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, reduce
from types import MappingProxyType, UnionType
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from loce.utils.errors import expand_home, raise_problems
from loce.utils.yaml_text import parse_value, show

T = TypeVar("T")
Conflict = tuple[tuple[str, ...], Callable[[Any], bool], str]  # dotted keys, "is it wrong?" of the whole, the reason
Choice = tuple[str, "tuple[Any, ...] | Range"]  # dotted key, and its values with which an option does something
Given = tuple[str, Any, str]  # dotted key, value, where it was written
_UNIONS = (Union, UnionType)


class NoPlaceError(ValueError):
    """`~` where nobody is at home, or a variable that is not set; the message says what to write."""


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; `above`, `below`: the end itself is not allowed."""

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        after = value > self.low if self.above else value >= self.low
        return after and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        low = f"{'>' if self.above else '>='} {self.low}"
        return low if self.high == math.inf else f"{low} and {'<' if self.below else '<='} {self.high}"


Count = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
Positive = Annotated[float, Range(0, above=True)]
NotNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
Share = Annotated[float, Range(0, 1, above=True)]
Decay = Annotated[float, Range(0, 1, below=True)]


def to_dict(options: Any) -> dict[str, Any]:
    """Plain nested dict of a dataclass instance: numbers, text, lists and dicts only."""
    return {field.name: _plain(getattr(options, field.name)) for field in dataclasses.fields(options)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    return list(value) if isinstance(value, tuple) else value


@cache
def schema(cls: type, prefix: str = "") -> Mapping[str, Any]:
    """Dotted key -> type, in order, of everything `cls` holds; a section stands before its own keys."""
    types: dict[str, Any] = {}
    for name, hint in _hints(cls).items():
        types[prefix + name] = hint
        if is_section(hint):
            types |= schema(hint, f"{prefix}{name}.")
    return MappingProxyType(types)


@cache
def _hints(cls: type) -> dict[str, Any]:
    """A field's type, with its limits; kept, since tables of results read thousands of configs."""
    return get_type_hints(cls, include_extras=True)


def flatten(cls: type, values: Mapping[Any, Any], source: str) -> list[Given]:
    """The dotted keys of a nested mapping; an empty section (all its lines commented out, say) gives none."""
    types = schema(cls)

    def walk(mapping: Mapping[Any, Any], prefix: str) -> Iterator[Given]:
        for name, value in mapping.items():
            key = f"{prefix}{name}"
            if not is_section(types.get(key)):
                yield key, value, source
            elif isinstance(value, Mapping):
                yield from walk(value, f"{key}.")
            elif value is not None:
                yield key, value, source

    return list(walk(values, ""))


def split_words(cls: type, words: Iterable[str]) -> tuple[list[Given], list[str]]:
    """What `key=value` words say, and what is wrong with words of another form."""
    types, given, problems = schema(cls), [], []
    for word in words:
        key, equals, text = word.partition("=")
        if equals and not key.startswith("-"):
            # Text and choices stand as they are, unless quoted; the rest is YAML.
            base, _ = _split(types.get(key))
            is_text = (base is str or get_origin(base) is Literal) and not text.startswith(("'", '"'))
            given.append((key, text if is_text else parse_value(text), "command line"))
        else:
            problems.append(
                f"command line: {word}: must be key=value, without dashes{_suggest(key.lstrip('-'), types)}"
            )
    return given, problems


def build(
    cls: type[T],
    given: Sequence[Given],
    conflicts: Sequence[Conflict] = (),
    problems: Sequence[str] = (),
    option_of: Mapping[str, Choice] = MappingProxyType({}),
) -> T:
    """An instance of `cls` from what was given, the rest by default; UserError with everything that is wrong.

    A key may be given once per source; a later source wins. `problems`: found before; they are reported too.
    option_of: option or section -> the choice without which it does nothing, so that giving it is a mistake.
    """
    types, found = schema(cls), list(problems)  # type: ignore[arg-type]  # mypy: not hashable
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    wrong: set[str] = set()
    # Each value as its type wants it; a later source replaces an earlier one, with its mistake.
    for key, value, source in given:
        if sources.get(key) == source:
            found.append(f"{source}: {key} = {show(value)}: given twice")
        sources[key] = source
        wrong.discard(key)
        try:
            values[key] = _convert(types[key], value)
        except (KeyError, ValueError, OverflowError) as error:
            wrong.add(key)
            reason = str(error) if isinstance(error, NoPlaceError) else _complaint(key, types)
            found.append(f"{source}: {key} = {show(value)}: {reason}")
    # Then what is missing, options that exclude each other, and options of what is not chosen.
    missing = [key for key in _required(cls) if key not in sources]
    found += [f"command line: {key} is missing: {_allowed(types[key])}" for key in missing]
    if not missing and wrong.isdisjoint(_required(cls)):
        options = _assemble(cls, {key: value for key, value in values.items() if key not in wrong})
        for keys, is_wrong, reason in conflicts:
            if wrong.isdisjoint(keys) and is_wrong(options):
                found.append(_describe_conflict(options, keys, reason, sources))
        for key, (chooser, needed) in _idle(options, given, sources, option_of):
            if wrong.isdisjoint((key, chooser)):
                choice = f"{chooser} {needed}" if isinstance(needed, Range) else f"{chooser}={show(needed[0])}"
                reason = f"an option of {choice}, which is not chosen"
                found.append(_describe_conflict(options, (key, chooser), reason, sources))
    raise_problems(found)
    return options


def read_options(
    cls: type[T],
    argv: Sequence[str],
    conflicts: Sequence[Conflict] = (),
    option_of: Mapping[str, Choice] = MappingProxyType({}),
) -> T:
    """An instance of the dataclass `cls` from `key=value` words (`-h`: prints the keys and exits with 0)."""
    if "-h" in argv or "--help" in argv:
        print_help(help_text(cls))
    given, problems = split_words(cls, argv)
    return build(cls, given, conflicts, problems, option_of)


def print_help(*parts: str) -> NoReturn:
    """Print what the running script's docstring says, command line included, then `parts`; exit with 0."""
    print("\n\n".join([(sys.modules["__main__"].__doc__ or "").strip(), *parts]))
    sys.exit(0)


def help_text(cls: type, prefix: str = "") -> str:
    """Every key with what is allowed, its default and its meaning (the comment beside the field)."""
    comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(cls), re.MULTILINE))
    hints = _hints(cls)
    lines = [(cls.__doc__ or "").partition("\n")[0]]
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if is_section(hint):
            lines.append("\n" + help_text(hint, f"{prefix}{field.name}."))
            continue
        default = "(required)" if field.default is dataclasses.MISSING else show(_plain(field.default))
        meaning = f"; {comments[field.name]}" if field.name in comments else ""
        lines.append(f"  {prefix + field.name + ' = ' + default:<40} {_allowed(hint)}{meaning}")
    return "\n".join(lines)


def is_section(hint: Any) -> bool:
    """Whether a field of this type holds options of its own."""
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _split(hint: Any) -> tuple[Any, tuple[Range, ...]]:
    """A type without its limits, and its limits."""
    return (get_args(hint)[0], hint.__metadata__) if get_origin(hint) is Annotated else (hint, ())


def _convert(hint: Any, value: Any) -> Any:
    """`value` as `hint` wants it; ValueError where it does not fit (a whole number fits a float, 1 is no bool).

    `~/x` and `$NAME/x` become whole paths: texts are paths, and a shell leaves `~` alone after `key=`, a recipe both.
    """
    base, limits = _split(hint)
    if get_origin(base) in _UNIONS:
        for choice in get_args(base):
            with suppress(ValueError):
                return _convert(choice, value)
        raise ValueError(value)
    if get_origin(base) is tuple and isinstance(value, (list, tuple)):
        return tuple(_convert(get_args(base)[0], item) for item in value)
    if get_origin(base) is Literal:
        fits = any(type(value) is type(choice) and value == choice for choice in get_args(base))
    else:
        value = float(value) if base is float and type(value) is int else value
        fits = type(value) is base and not (base is float and not math.isfinite(value))
    if not fits or any(value not in limit for limit in limits):
        raise ValueError(value)
    return whole_path(value) if base is str else value


def whole_path(text: str) -> str:
    """A path with home directories and variables of the environment filled in; NoPlaceError where they are unknown."""
    text = os.path.expandvars(expand_home(text))
    if os.path.lexists(text):  # whatever it is called
        return text
    if text == "~" or text.startswith("~/"):
        raise NoPlaceError("there is no home directory here (HOME is not set); give the whole path")
    if user := re.match(r"~(\w[\w.-]*)/", text):
        raise NoPlaceError(f"there is no user {user[1]} here; give the whole path, or ./{text}")
    if variable := re.search(r"\$([A-Z][A-Z0-9_]+|\{\w+\})", text):
        raise NoPlaceError(f"the environment has no variable {variable[1].strip('{}')}; give the whole path")
    return text


def _allowed(hint: Any, many: bool = False) -> str:
    base, limits = _split(hint)
    if get_origin(base) in _UNIONS:
        return ", or ".join(map(_allowed, get_args(base)))
    if get_origin(base) is tuple and get_origin(get_args(base)[0]) is Literal:
        return "a list of these"
    if get_origin(base) is tuple:
        return f"a list of {_allowed(get_args(base)[0], many=True)}, such as [1, 2]"
    if get_origin(base) is Literal:
        return " | ".join(show(choice) for choice in get_args(base))
    one, several = {
        bool: ("true or false", "true or false"),
        int: ("a whole number", "whole numbers"),
        float: ("a number", "numbers"),
        str: ("text", "texts"),
    }[base]
    return " ".join([several if many else one, *map(str, limits)])


def _complaint(key: str, types: Mapping[str, Any]) -> str:
    """Why the value of `key` was refused."""
    if key not in types:
        return f"unknown key{_suggest(key, types) or '; --help lists all keys'}"
    if is_section(types[key]):
        inside = [name for name in types if name.startswith(f"{key}.") and name.count(".") == key.count(".") + 1]
        return f"is a section; its keys are {', '.join(inside)}"
    return f"must be {_allowed(types[key])}"


def _suggest(key: str, types: Mapping[str, Any]) -> str:
    """The known keys nearest to `key`: those of the same last part, else the most similar spelling."""
    name = key.rpartition(".")[2]
    near = [known for known in types if known.rpartition(".")[2] == name and known != key]
    near = near or difflib.get_close_matches(key, types, n=1)
    if not near:
        last_parts = [known.rpartition(".")[2] for known in types]
        close = difflib.get_close_matches(name, last_parts, n=1, cutoff=0.75)
        near = [known for known in types if known.rpartition(".")[2] in close]
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _required(cls: type) -> list[str]:
    missing = dataclasses.MISSING
    fields = dataclasses.fields(cls)
    return [field.name for field in fields if field.default is missing and field.default_factory is missing]


def _assemble(cls: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    arguments = {}
    for name, hint in _hints(cls).items():  # type: ignore[arg-type]  # as above
        key = prefix + name
        if is_section(hint):
            arguments[name] = _assemble(hint, values, f"{key}.")
        elif key in values:
            arguments[name] = values[key]
    return cls(**arguments)


def _idle(
    options: Any,
    given: Sequence[Given],
    sources: Mapping[str, str],
    option_of: Mapping[str, Choice],
) -> Iterator[tuple[str, Choice]]:
    """Options that were given and do nothing, each with the choice that it would need.

    What a later source switches off may stay, as an option of a recipe where a word takes another choice. So may all of
    a source that states every option: it records a run, with what the run had switched off.
    """
    if not option_of:
        return
    keys = {key for key, hint in schema(type(options)).items() if not is_section(hint)}  # type: ignore[arg-type]  # as above
    stated: dict[str, set[str]] = {}
    for key, _, source in given:
        stated.setdefault(source, set()).add(key)
    rank = {source: place for place, source in enumerate(stated)}
    defaults = type(options)()
    for key, source in sources.items():
        if key not in keys or keys <= stated[source] or _value(options, key) == _value(defaults, key):
            continue
        for part, (chooser, needed) in option_of.items():
            belongs = f"{key}.".startswith(f"{part}.") and key != chooser
            switched_off = rank.get(sources.get(chooser, ""), -1) > rank[source]  # by who wrote later
            if belongs and _value(options, chooser) not in needed and not switched_off:
                yield key, (chooser, needed)
                break


def _value(options: Any, key: str) -> Any:
    return reduce(getattr, key.split("."), options)


def _describe_conflict(options: Any, keys: Sequence[str], reason: str, sources: Mapping[str, str]) -> str:
    """`file: key = value, other = value (default): reason`; a value from elsewhere than the first says from where."""
    given = [sources[key] for key in keys if key in sources]
    place = given[0] if given else "default"
    parts = []
    for key in keys:
        source = sources.get(key, "default")
        value = show(_plain(_value(options, key)))
        parts.append(f"{key} = {value}" + (f" ({source})" if source != place else ""))
    return f"{place}: {', '.join(parts)}: {reason}"
