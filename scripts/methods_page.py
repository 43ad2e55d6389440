"""docs/methods.md, made from the code: python scripts/methods_page.py.

A method's text is the docstring of its file, its options are those of `-h`, its recipes and published results are the
headers below configs/. A test keeps the page current.
"""

import importlib
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import get_args, get_type_hints

from loce.config import (
    AdaptiveOptions,
    Config,
    HeadConfig,
    IndicatorConfig,
    MemoryConfig,
    RPNConfig,
    SamplerConfig,
    load_config,
    run_script,
)
from loce.heads import HEADS
from loce.utils.files import write_text
from loce.utils.options import help_text

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/methods.md"
INTRODUCTION = """\
# Methods

Made from the code by `python scripts/methods_page.py`; do not edit. How to add your own: [plug-in guide](plugin.md).

Three choices are independent: the **image sampler** (`sampler.name`), the **classification head** (`head.name`) and the
**feature memory** (`memory.enabled`; what it stores, in what form, and how it is drawn from: `memory.source`,
`memory.kind`, `memory.draw`). Any of their combinations is a YAML edit; the few that make no sense are refused with the
reason before anything starts. What is compared, and how long everything is trained: `configs/tables.yaml`.

Notation: N rows (regions, then rows from the memory), C foreground classes, label C is the background, z logits,
y the label of a row, n_c training instances and f_c share of training images of class c.
"""
# What else the tables compare: title, file that explains it, section of the options, prefix of their keys, which of
# them (none: all).
OTHERS: list[tuple[str, str, type, str, tuple[str, ...]]] = [
    ("Mean score", "loce.mean_score", IndicatorConfig, "indicator.", ()),
    ("Feature memory", "loce.models.memory_sampling", MemoryConfig, "memory.", ()),
    ("Gaussian feature memory", "loce.gaussian_memory", MemoryConfig, "memory.", ("kind", "momentum")),
    ("Adaptive sampling rates", "loce.adaptive_rates", AdaptiveOptions, "memory.adaptive.", ()),
    ("Image samplers", "loce.data.samplers", SamplerConfig, "sampler.", ()),
    ("NMS resampling", "loce.models.nms_resampling", RPNConfig, "model.rpn.", ("nms_resampling",)),
]


def recipes() -> dict[str, Config]:
    """Every recipe below configs/, by its path there."""
    folder = ROOT / "configs"
    paths = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.yaml"))
    return {path: load_config([str(folder / path)]) for path in paths if path != "tables.yaml"}


def header(path: str) -> dict[str, str]:
    """The `# Name: text` lines on top of a recipe."""
    text = (ROOT / "configs" / path).read_text(encoding="utf-8")
    return dict(re.findall(r"^# (\w+): +(.+)$", text, re.MULTILINE))


def explained(module: ModuleType) -> str:
    """The docstring of a file: its first line, the text with the equations as it stands, and what follows it."""
    title, _, rest = (inspect.getdoc(module) or "").partition("\n")
    body, *after_body = re.split(r"^(?=State:|Differences)", rest, flags=re.MULTILINE)
    after = re.sub(r"^(State|Differences)([^:\n]*):", r"**\1\2:**", "".join(after_body), flags=re.MULTILINE)
    parts = [title, f"```text\n{body.strip(chr(10))}\n```" if body.strip() else "", after.strip()]
    return "\n\n".join(part for part in parts if part)


def options_of(section: type, prefix: str, only: tuple[str, ...] = ()) -> str:
    """The keys of a section with their defaults and meaning, as `-h` prints them."""
    lines = [line for line in help_text(section, prefix).splitlines()[1:] if line.startswith("  ")]
    chosen = [line[2:] for line in lines if not only or line.split()[0].rpartition(".")[2] in only]
    return "```\n" + "\n".join(chosen) + "\n```" if chosen else "No options."


def recipe_lines(found: dict[str, Config]) -> list[str]:
    """A line for each recipe: what was published, and what is trained here."""
    lines = []
    for path in found:
        words = header(path)
        parts = [f"{name.lower()}: {words[name]}" for name in ("Published", "Schedule", "Expected") if name in words]
        lines.append(f"- [`{path}`](../configs/{path}): {'; '.join(parts)}")
    return lines


def method(name: str, found: dict[str, Config]) -> str:
    """One head's part of the page."""
    module = importlib.import_module(HEADS[name].__module__)
    sections = get_type_hints(HeadConfig, include_extras=False)
    options = options_of(sections[name], f"head.{name}.") if name in sections else "No options."
    used = {path: config for path, config in found.items() if config.head.name == name}
    parts = [f"## `head.name={name}`", f"File: `{module.__name__.replace('.', '/')}.py`", explained(module), options]
    return "\n\n".join([*parts, "\n".join(["Recipes:", "", *recipe_lines(used)])] if used else parts)


def page() -> str:
    """The whole page."""
    found = recipes()
    parts = [
        INTRODUCTION.rstrip(),
        *(method(name, found) for name in get_args(get_type_hints(HeadConfig)["name"])),
    ]
    for title, name, section, prefix, only in OTHERS:
        module = importlib.import_module(name)
        parts.append("\n\n".join([f"## {title}", explained(module), options_of(section, prefix, only)]))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    write_text(PAGE, page())
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    run_script(main)
