"""README.md, CONTRIBUTING.md and docs/: links, paths, commands and flags exist, examples run, numbers are the records'."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import inspect
import json
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import pytest
import tiny

from adafuse_jax.adapters.config import AdapterConfig
from adafuse_jax.core.errors import UserError
from adafuse_jax.core.flags import parse_flags
from adafuse_jax.evaluation.config import EvaluationConfig
from adafuse_jax.export import ExportConfig
from adafuse_jax.inference.config import DecodeConfig
from adafuse_jax.serving.config import ServeConfig
from adafuse_jax.training.config import TrainConfig
from examples.skills.config import DemoConfig

ROOT = tiny.REPOSITORY
README = ROOT / "README.md"
PAGES = sorted(
    [README, ROOT / "CONTRIBUTING.md", ROOT / "studies" / "README.md"]
    + [page for folder in ("docs", "pallas_kernels") for page in (ROOT / folder).rglob("*.md")]
)
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
RECORDS = ROOT / "benchmarks" / "results" / "nvidia_h200"
MAX_LINES, MAX_WORDS = 150, 1500
COMMANDS: dict[str, tuple[type, ...]] = {
    "train": (TrainConfig, AdapterConfig), "decode": (DecodeConfig,), "evaluate": (EvaluationConfig,),
    "export": (ExportConfig,), "serve": (ServeConfig,),
}  # fmt: skip
CONFIGS: dict[str, tuple[type, ...]] = {
    "train.py": COMMANDS["train"], "decode.py": COMMANDS["decode"], "examples.skills": (DemoConfig,),
    "adafuse_jax.evaluation": COMMANDS["evaluate"], "adafuse_jax.export": COMMANDS["export"],
    "adafuse_jax.serving": COMMANDS["serve"],
} | {f"adafuse {name}": configs for name, configs in COMMANDS.items()}  # fmt: skip
"""Programs whose flags are made from dataclasses."""
FOREIGN = {"--model_args", "--batch_size", "--tasks", "--ntasks-per-node", "--gpus-per-node", "--signal", "--requeue"}
"""Flags of lm-evaluation-harness and of SLURM."""
PYTEST_FLAGS = {"-q", "-x", "-m", "-k"}
TOP_LEVEL = ("adafuse_jax", "pallas_kernels", "benchmarks", "examples", "studies", "tests", "docs")


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of the fenced blocks."""
    return re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def links(text: str) -> list[str]:
    """Targets of Markdown links and pictures within the repository."""
    found = re.findall(r"\]\(([^)\s]+)\)", prose(text)) + re.findall(r'(?:src|href)="([^"]+)"', prose(text))
    return [target for target in found if not re.match(r"https?://|mailto:", target)]


def anchors(text: str) -> set[str]:
    """Anchors of the headings, as GitHub names them."""
    names: list[str] = []
    for heading in re.findall(r"^#{1,6} +(.*?) *#*$", prose(text), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        names.append(name if name not in names else f"{name}-{sum(n.startswith(name) for n in names)}")
    return set(names)


def broken_links(page: Path, text: str) -> list[str]:
    broken = []
    for target in links(text):
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        is_found = place.is_relative_to(ROOT) and place.exists()
        if not is_found or (anchor and anchor not in anchors(place.read_text() if path else text)):
            broken.append(target)
    return broken


@pytest.mark.parametrize("name", NAMES)
def test_links_resolve(name: str):
    assert not broken_links(ROOT / name, (ROOT / name).read_text())


def test_broken_links_are_found():
    text = "# A title: of `two` parts\n[a](docs/nowhere.md) [b](#a-title-of-two-parts) [c](#no) ![d](x.png) [e](../../etc)\n"
    assert broken_links(README, text) == ["docs/nowhere.md", "#no", "x.png", "../../etc"]
    assert anchors("# A title: of `two` parts") == {"a-title-of-two-parts"}


def test_readme_is_short():
    text = README.read_text()
    assert len(text.splitlines()) <= MAX_LINES
    assert len(text.split()) <= MAX_WORDS


def test_every_page_is_reached_from_the_readme():
    reached, new = {README}, [README]
    while new:
        page = new.pop()
        for target in links(page.read_text()):
            place = (page.parent / target.partition("#")[0]).resolve()
            if place.suffix == ".md" and place not in reached:
                reached.add(place)
                new.append(place)
    assert set(PAGES) <= reached


def test_first_commands_of_a_clone():
    first = next(content for _, content in blocks(README.read_text()))
    assert [line.split("#")[0].strip() for line in first.splitlines()] == ["make demo", "make test"]


# Commands


def commands(text: str) -> Iterator[list[str]]:
    """The words of every command in the shell blocks, without assignments before them, and of those in the text."""
    yield from map(shlex.split, re.findall(r"`((?:python|make|adafuse) [^`\n]+)`", prose(text)))
    for language, content in blocks(text):
        if language not in ("bash", "sh"):
            continue
        for line in content.replace("\\\n", " ").splitlines():
            words = shlex.split(re.sub(r"(^|\s)#.*", "", line))
            while words:
                end = words.index("&&") if "&&" in words else len(words)
                command, words = words[:end], words[end + 1 :]
                while command and re.fullmatch(r"[A-Z_]+=.*", command[0]):
                    command = command[1:]
                if command:
                    yield command


@cache
def makefile() -> tuple[set[str], set[str]]:
    """Targets and variables."""
    text = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^\.PHONY: *(.*)$", text, re.MULTILINE)
    return set(" ".join(targets).split()), set(re.findall(r"^(\w+) *[?:]?=", text, re.MULTILINE))


class Parsed(Exception):
    pass


def check_command(words: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise AssertionError or UserError unless the command names what exists."""
    program, *rest = words
    if program == "make":
        targets, variables = makefile()
        for word in rest:
            name, is_variable, _ = word.partition("=")
            assert name in (variables if is_variable else targets), f"make has no {name}"
    elif program in ("pip", "."):
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for named in re.findall(r"\[([\w,]+)\]", " ".join(rest)):
            assert set(named.split(",")) <= extras.keys(), named
    elif program == "adafuse":
        command = " ".join(words[:2])
        assert command in CONFIGS, f"unknown command {command}"
        if words[2:]:
            parse_flags("", CONFIGS[command], with_config_file(rest[1:], command, tmp_path))
    else:
        assert re.fullmatch(r"(\.venv/bin/)?python(3\.\d+)?", program), f"unknown program {program}"
        name, *arguments = rest[1:] if rest[0] == "-m" else rest
        if rest[0] != "-m":
            assert (ROOT / name).is_file(), name
        if name == "pytest":
            check_pytest(arguments)
        elif name in CONFIGS:
            parse_flags("", CONFIGS[name], with_config_file(arguments, name, tmp_path))
        elif name == "adafuse_jax.evaluation.lm_eval":
            check_lm_eval(arguments, monkeypatch)
        elif name != "venv":
            check_argparse(name, arguments, monkeypatch)


def with_config_file(arguments: Sequence[str], program: str, tmp_path: Path) -> list[str]:
    """The arguments, with a file in the place of `--config FILE` that holds the required flags."""
    changed = list(arguments)
    if "--config" in changed:
        fields = [f for config in CONFIGS[program] for f in dataclasses.fields(config)]
        required = {f.name: "x" for f in fields if f.default is dataclasses.MISSING}
        file = tmp_path / "config.json"
        file.write_text(json.dumps(required | ({"dataset": ["x"]} if "dataset" in required else {})))
        changed[changed.index("--config") + 1] = str(file)
    return changed


def check_pytest(arguments: Sequence[str]) -> None:
    files = [word for word in arguments if word.endswith(".py")]
    text = "".join((ROOT / name).read_text() for name in files)
    options = dict(zip(arguments, [*arguments[1:], ""], strict=True))
    assert {word for word in arguments if word.startswith("-")} <= PYTEST_FLAGS
    if "-k" in options:
        assert options["-k"] in text, f"no test of {files} has {options['-k']} in its name"
    if "-m" in options:
        markers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
        assert options["-m"] in [marker.partition(":")[0] for marker in markers]


def check_lm_eval(arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    harness = pytest.importorskip("lm_eval._cli").HarnessCLI()
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments])
    harness.parse_args()


def check_argparse(module: str, arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `main` of the module parse the arguments, and no more."""
    parse = argparse.ArgumentParser.parse_args

    def parse_only(self, *args, **kwargs):
        parse(self, *args, **kwargs)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    package = ROOT.joinpath(*module.split("."), "__main__.py").is_file()
    main = importlib.import_module(f"{module}.__main__" if package else module).main
    with pytest.raises(Parsed):
        main(*[list(arguments)] * bool(inspect.signature(main).parameters))


@pytest.mark.parametrize("name", NAMES)
def test_commands_exist(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for command in commands((ROOT / name).read_text()):
        try:
            with monkeypatch.context() as patch:
                check_command(command, tmp_path, patch)
        except (AssertionError, UserError, SystemExit, ImportError) as error:
            pytest.fail(f"{name}: {shlex.join(command)}: {error or type(error).__name__}")


def test_some_commands_are_checked():
    seen = [command for name in NAMES for command in commands((ROOT / name).read_text())]
    assert len(seen) > 40
    assert {"train.py", "decode.py"} <= {word for command in seen for word in command}


@pytest.mark.parametrize(
    "line",
    [
        "make nothing",
        "make test THREADS=3",
        "pip install -e '.[tpu]'",
        "python nowhere.py",
        "python -m benchmarks.nowhere",
        "python train.py --model DIR --dataset x --output RUN --ranks 16",
        "python train.py --model DIR --output RUN",
        "python decode.py --model DIR --strategy fastest",
        "adafuse serve --model DIR --adapter DIR",
        "adafuse train --model DIR --output RUN",
        "python -m adafuse_jax.export --model DIR --adapter DIR --output OUT --format gguf",
        "python -m benchmarks.kernels.sgmm --outer OUT",
        ".venv/bin/python -m pytest -q tests/kernels/test_sgmm.py -k no_such_test",
        ".venv/bin/python -m pytest -q -m tpu",
        "curl example.org",
    ],
)
def test_wrong_commands_are_found(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (command,) = commands(f"```bash\n{line}\n```\n")
    with pytest.raises((AssertionError, UserError, SystemExit, ImportError)):
        check_command(command, tmp_path, monkeypatch)


# Flags and paths


@cache
def flags() -> frozenset[str]:
    """Names of the flags of all programs of the repository."""
    found = {"--help", "--config"}
    for config in {config for configs in CONFIGS.values() for config in configs}:
        names = [f.name.replace("_", "-") for f in dataclasses.fields(config)]
        switches = [f.name.replace("_", "-") for f in dataclasses.fields(config) if f.type in ("bool", bool)]
        found |= {f"--{name}" for name in names} | {f"--no-{name}" for name in switches}
    for module in [*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "studies").rglob("*.py")]:
        found |= set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', module.read_text()))
    return frozenset(found | FOREIGN)


def unknown_flags(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) - flags()


@pytest.mark.parametrize("name", NAMES)
def test_flags_exist(name: str):
    assert not unknown_flags((ROOT / name).read_text())


def test_unknown_flags_are_found():
    assert unknown_flags("`--rank`, `--no-packing`, --ranks and `--no-rank`") == {"--ranks", "--no-rank"}


def missing_names(text: str) -> list[str]:
    """Paths and dotted names in backticks that do not exist."""
    missing = []
    for name in re.findall(r"`([\w./-]+)`", prose(text)):
        if name.startswith(tuple(f"{top}/" for top in TOP_LEVEL)):
            if not (ROOT / name).exists():
                missing.append(name)
        elif name.startswith(tuple(f"{top}." for top in TOP_LEVEL)) and not name.endswith(".py"):
            missing += [] if defined(name.split(".")) else [name]
    return missing


def defined(parts: Sequence[str]) -> bool:
    """True for a package, a module, or a name at the top of one; nothing is imported."""
    place = ROOT.joinpath(*parts)
    if place.is_dir() or place.with_suffix(".py").is_file():
        return True
    parent = ROOT.joinpath(*parts[:-1])
    file = parent / "__init__.py" if parent.is_dir() else parent.with_suffix(".py")
    return file.is_file() and bool(re.search(rf"\b{re.escape(parts[-1])}\b", file.read_text()))


@pytest.mark.parametrize("name", NAMES)
def test_paths_exist(name: str):
    assert not missing_names((ROOT / name).read_text())


def test_missing_names_are_found():
    text = "`docs/nowhere.md` `docs/data.md` `adafuse_jax.UserError` `adafuse_jax.Nothing` `pallas_kernels/sgmm`"
    assert missing_names(text) == ["docs/nowhere.md", "adafuse_jax.Nothing"]


# Examples, numbers, figures


@pytest.mark.parametrize("name", ["README.md", "docs/python-api.md"])
def test_python_examples_run(name: str, tmp_path: Path):
    model = tiny.write_model(tmp_path / "model")
    code = [content for language, content in blocks((ROOT / name).read_text()) if language == "python"]
    assert code
    namespace: dict[str, object] = {}
    for content in code:
        ast.parse(content)
        exec(content.replace("path/to/model", str(model)), namespace)


DECODED = [
    ("rows", "backbone", "-", "-"),
    ("rows", "adafuse", "qv", "fused"),
    ("rows", "adafuse", "all7", "fused"),
    ("rows", "adafuse", "all7", "unmerged"),
    ("rows", "mola", "all7", "unmerged"),
    ("rows", "lora", "all7", "merged"),
    ("peers", "hf-compiled", "-", "-"),
    ("peers", "peft-lora-compiled", "all7", "-"),
    ("peers", "lora-moe-compiled", "all7", "-"),
]
TRAINED = ["none", "lora-matched", "mola", "adafuse-late-2", "moral", "pesc", "adafuse", "lora"]


def test_numbers_are_the_records():
    latency = json.loads((RECORDS / "decode.json").read_text())
    accuracy = json.loads((ROOT / "studies/results/nvidia_h200/science_questions.json").read_text())["rows"]
    expected = []
    for part, *key in DECODED:
        rows = [row for row in latency[part] if [row["method"], row["targets"], row["strategy"]] == key]
        expected.append(f"{next(row for row in rows if row['batch'] == 1)['ms_per_token']:.2f}")
    for method in TRAINED:
        row = next(row for row in accuracy if row["method"] == method and row["regime"] in ("bare", "mixture"))
        error = row["standard_error"]
        expected.append(f"{100 * row['mean_accuracy']:.1f}" + ("" if error is None else f" ± {100 * error:.1f}"))
    text = README.read_text().replace("*", "")
    pages = "".join((ROOT / f"docs/benchmarks/{name}.md").read_text() for name in ("decode", "accuracy")).replace(
        "*", ""
    )
    assert [number for number in expected if number not in text] == []
    assert [number for number in expected if number not in pages] == []


@pytest.mark.parametrize("figure", sorted((ROOT / "docs" / "figures").glob("*.svg")), ids=lambda path: path.name)
def test_figures_show_in_light_and_dark(figure: Path):
    root = ElementTree.parse(figure).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.find("{http://www.w3.org/2000/svg}title") is not None
    style = root.find("{http://www.w3.org/2000/svg}style")
    assert style is not None
    light, dark = re.findall(r":root *{([^}]*)}", style.text or "")
    assert "prefers-color-scheme: dark" in (style.text or "")
    colours = [set(re.findall(r"(--[\w-]+):", table)) for table in (light, dark)]
    assert colours[0] == colours[1] == set(re.findall(r"var\((--[\w-]+)\)", figure.read_text()))
