"""Safe YAML reading and writing: numbers as people write them, no key twice, and what is written is read back equal."""

import copy
import math
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import yaml

from loce.utils.errors import UserError


class _Loader(yaml.SafeLoader):
    """Safe YAML whose numbers are read as people write them: 1e-3 is a float, 010 is ten, 1:30 and 1_000 are text.

    A tag (!!python/name:x, !!binary) is an error: no option needs one.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if tag := getattr(event, "tag", None):
            raise yaml.composer.ComposerError(None, None, f"the tag {tag} is not allowed", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
        seen = set()
        for key in keys:
            if isinstance(key.value, str) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} stands twice", key.start_mark)
            seen.add(key.value if isinstance(key.value, str) else id(key))
        return super().construct_mapping(node, deep)


_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] not in (*_NUMBERS, "tag:yaml.org,2002:timestamp")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_NUMBERS[0], re.compile(r"[-+]?[0-9]+$"), list("-+0123456789"))
_FLOAT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$")
_Loader.add_implicit_resolver(_NUMBERS[1], _FLOAT, list("-+.0123456789"))
_Loader.add_constructor(_NUMBERS[0], lambda loader, node: int(node.value))


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back equal; lists on one line."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(list, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, True))


def parse_value(text: str) -> Any:
    """The scalar or list that a piece of YAML means; the text itself where it is no YAML."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        return text


@lru_cache(maxsize=256)
def _parsed(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # the same few recipes stand below all rows of the tables


def load_yaml(text: str, source: str) -> dict[str, Any]:
    """The mapping that `text` holds ({} when empty); UserError naming `source` and the line when it is not one."""
    try:
        values = copy.deepcopy(_parsed(text))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{source}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if values is not None and not isinstance(values, dict):
        raise UserError(f"{source}: must hold `key: value` lines, but holds {show(values)}")
    return values or {}


def dump_yaml(values: Mapping[str, Any]) -> str:
    """YAML text that `load_yaml` reads back equal."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, width=1000, allow_unicode=True)


def dotted(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"lr": 1}} -> {"train.lr": 1}, as options are named on a command line."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= dotted(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def differing(*options: Mapping[str, Any]) -> list[str]:
    """Keys, in order, that do not have the same value in all of these flat mappings."""
    keys = dict.fromkeys(key for found in options for key in found)
    return [key for key in keys if any(found.get(key) != options[0].get(key) for found in options)]


def show(value: Any) -> str:
    """A value in a message, as YAML on one line."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    try:
        text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=10**6, allow_unicode=True)
    except yaml.YAMLError:
        text = str(value)
    text = text.removesuffix("\n").removesuffix("\n...")
    return text if len(text) <= 80 else text[:77] + "..."
