"""README and docs: links lead somewhere, files that are named exist, commands are given in words that parse and are run
by a test or need what no test has.
"""

import importlib
import re
import shlex
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from loce.config import load_config, read_options
from loce.engine.passes import read_recipes
from loce.utils.options import schema
from tests.doc_pages import FENCE, blocks, fenced_commands

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
# Scripts whose options are not in their own `Options`.
OPTIONS = {
    "make_glyphs": ("loce.data.glyphs.make", "GlyphOptions"),
    "convert": ("scripts.convert", "ConvertOptions"),
    "rebalance_rows": ("loce.engine.row_training", "RowOptions"),
}
WRITTEN_BY_READERS = {"head.name=focal", "loce/heads/focal.py"}  # docs/plugin.md; tests/test_plugin.py does all of it
WRITTEN = {  # recipes that readers write: the page, and which of its blocks
    "rebalance.yaml": ("rebalance.md", 0),
    "mine.yaml": ("own_data.md", 0),
    "mine_loce.yaml": ("own_data.md", 1),
}


# Links


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """Relative links of a page that lead nowhere."""
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if re.match(r"[a-z]+:", target):
            continue
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    return broken


@EACH_PAGE
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


def test_broken_links_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A `b`, c\n[1](page.md#a-b-c) [2](#d) [3](none.md) [4](https://e.org) `[5](f.md)`\n")
    assert broken_links(page) == ["#d", "none.md"]


@EACH_PAGE
def test_files_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:loce|docs|tests|scripts|configs|benchmarks)/[\w/.-]+\.(?:py|md|yaml|sh))`", text))
    assert [name for name in sorted(named - WRITTEN_BY_READERS) if not (ROOT / name).is_file()] == []


# Commands


def commands(page: Path) -> list[str]:
    """What a page tells its readers to type, without comments."""
    text = page.read_text(encoding="utf-8")
    blocks = [body.replace("\\\n", " ") for language, body in FENCE.findall(text) if language in ("", "sh")]
    rest = FENCE.sub("", text)
    lines = [*"\n".join(blocks).splitlines(), *re.findall(r"^    (.*)$", rest, flags=re.MULTILINE)]
    lines += re.findall(r"`([^`\n]+)`", rest)
    starts = re.compile(r"(make|python|torchrun|sbatch) \S")
    return [line.split("  #")[0].strip() for line in lines if starts.match(line.strip())]


ALL = [(page.name, command) for page in PAGES for command in commands(page)]


def test_commands_are_found() -> None:
    assert ("README.md", "make demo") in ALL and len(ALL) > 20
    assert {"torchrun", "python"} <= {command.split()[0] for _, command in ALL}


def check_script(script: str, words: list[str], tmp_path: Path) -> None:
    """The words of a command line parse as the script reads them: its own options, or a recipe and words for it."""
    assert (ROOT / script).is_file(), script
    words = [re.sub(r"=N$", "=1", word) for word in words if word not in ("-h", "--help", *WRITTEN_BY_READERS)]
    if not script.startswith("scripts/"):
        return
    name = Path(script).stem
    module, options_name = OPTIONS.get(name, (f"scripts.{name}", "Options"))
    options = getattr(importlib.import_module(module), options_name, None)
    own = [word for word in words if options and word.split("=")[0] in schema(options)]
    if options:
        read_options(options, own)
    for recipe, (page, place) in WRITTEN.items():
        (tmp_path / recipe).write_text(blocks(ROOT / "docs" / page, "yaml")[place])
    if any(" " in word for word in words):  # recipes with words of their own
        read_recipes([str(tmp_path / word) if word.split()[0] in WRITTEN else word for word in words])
        return
    recipes = [word for word in words if word.endswith(".yaml") and "=" not in word]
    recipes = [str(tmp_path / recipe) if recipe in WRITTEN else recipe for recipe in recipes]
    rest = [word for word in words if "=" in word and word not in own]
    if recipes or rest or (options is None and words):
        load_config([*(recipes or ["loce.yaml"]), *rest])


def check_make(words: list[str], tmp_path: Path) -> None:
    """The targets exist, and use the variables, whose words parse as the target's script reads them."""
    rules = re.findall(r"^([\w -]+):.*\n((?:\t.*\n)+)", MAKEFILE, flags=re.MULTILINE)
    bodies = {target: body for targets, body in rules for target in targets.split()}
    for target in (word for word in words if "=" not in word):
        assert target in bodies or f"\n{target}:" in MAKEFILE, f"the Makefile has no target {target}"
        scripts = re.findall(r"scripts/\w+\.py", bodies.get(target, ""))
        for name, value in (word.split("=", 1) for word in words if "=" in word):
            assert f"$({name})" in MAKEFILE or f"$(or $({name})" in MAKEFILE or f"{name} ?=" in MAKEFILE, name
            if name == "ARGS" and scripts:
                check_script(scripts[0], shlex.split(value), tmp_path)
            elif name == "ARGS":
                assert all((ROOT / path).exists() for path in value.split()), value
            elif value.endswith(".yaml"):
                load_config([value])


@pytest.mark.parametrize(("page", "command"), ALL, ids=[f"{page}: {command}" for page, command in ALL])
def test_commands_name_what_exists_in_words_that_parse(page: str, command: str, tmp_path: Path) -> None:
    program, *words = shlex.split(command)
    if program == "make":
        check_make(words, tmp_path)
    elif program == "torchrun":
        has_script = any(word.endswith(".py") for word in words)
        parsed = get_args_parser().parse_args(words if has_script else [*words, "x.py"])
        if has_script:
            check_script(parsed.training_script, parsed.training_script_args, tmp_path)
    elif program == "sbatch":
        wrapper, script, config, run, *rest = (word for word in words if not word.startswith("--"))
        assert (ROOT / wrapper).is_file(), wrapper
        check_script(script, [config, f"output={run}", *rest], tmp_path)
    else:
        check_script(words[0], words[1:], tmp_path)


def test_targets_start_the_interpreter_by_its_name() -> None:
    """RUN is what users give `make report`; a target that began with it would start their run folder."""
    assert not re.search(r"^\t.*\$\(RUN\) (scripts|benchmarks)", MAKEFILE, flags=re.MULTILINE)


# Who runs them: the test file that does, or what it needs that no test here has.
GPU, NETWORK, TIME = "needs GPUs and LVIS", "needs the network", "needs many minutes"
RUN_BY = {
    r"README.md: make demo": TIME,
    r".*: torchrun .*": GPU,
    r"first_minutes.md: .*": "needs LVIS",
    r".*: sbatch .*": GPU,
    r".*: make (train|finetune) GPUS=8": GPU,
    r"lvis.md: make data": NETWORK,
    r".*: make eval (CKPT=\S+|CKPT=\S+ GPUS=8|PRED=.*)": "tests/engine/test_training.py",
    r"lvis.md: make check-data DATA=stage1.yaml": "needs LVIS",
    r"usage.md: make table\d": TIME,
    r".*: make setup": NETWORK,
    r".*: make (test|test-oldest|test-slow|test-chaos|lint)": "these tests themselves, and their linters",
    r"usage.md: python scripts/train.py --help": "tests/test_config.py",
    r"usage.md: python scripts/(train|finetune).py (stage1|loce|methods/\w+).yaml.*": "needs LVIS",
    r"usage.md: python scripts/evaluate.py .* save_json=true": "tests/checkpoint/test_load.py",
    r"usage.md: make predict .*": "tests/engine/test_predict.py",
    r"(usage|export).md: python scripts/export.py .*": "tests/engine/test_export.py",
    r"(?!own_data).*: (make (report|figures)|python scripts/(report|figures).py).*": "tests/report/test_report.py",
    r"together.md: python .*": "tests/engine/test_together.py",
    r"posthoc.md: python scripts/(evaluate|predict).py .*": "tests/engine/test_calibration.py",
    r"recipe.md: python scripts/train.py glyphs/.*": TIME,
    r"recipe.md: python scripts/train.py stage1_swin_t.yaml .*": "needs LVIS",
    r"posthoc.md: python scripts/posthoc.py .*": "tests/engine/test_posthoc_bench.py",
    r"lvis.md: python scripts/convert.py .*": "tests/checkpoint/convert/test_files.py",
    r"trunks.md: .*": "needs LVIS",
    r"own_data.md: .*": "tests/test_own_data.py",
    r"rows.md: .*": "tests/engine/test_row_training.py",
    r"rebalance.md: .*": "tests/checkpoint/convert/test_torchvision_agrees.py",
}
FENCED = [f"{page.name}: {command}" for page in PAGES for command in fenced_commands(page)]


@pytest.mark.parametrize("command", FENCED)
def test_fenced_commands_are_run_by_a_test_or_need_what_none_has(command: str) -> None:
    found = [who for pattern, who in RUN_BY.items() if re.fullmatch(pattern, command)]
    assert len(found) == 1, f"{command}: say in RUN_BY which test runs it, or what it needs"
    if found[0].startswith("tests/"):
        assert (ROOT / found[0]).is_file()


def test_every_row_of_run_by_is_of_a_command() -> None:
    assert [pattern for pattern in RUN_BY if not any(re.fullmatch(pattern, command) for command in FENCED)] == []
