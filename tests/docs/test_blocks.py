"""Every command, Python block and recipe in the docs runs: tiny, without a network, in a sandbox."""

from __future__ import annotations

import argparse
import json
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import weakseg
from tests.docs.pages import ROOT, Block, blocks, inline, pages
from tests.docs.sandbox import NETWORK, TINY, call, sets
from tests.docs.worked import installed, written
from weakseg.cli import _settings, app
from weakseg.methods import resolve
from weakseg.recipe import Recipe, load_recipe, shipped_recipes
from weakseg.stages.check import collect

NOT_RUN = {
    "weakseg predict me/birds photos --out masks": "the name of a model on the hub is made up; "
    "tests/export/test_hub.py fetches from a stand-in",
}
"""Commands that no test can run, each with the reason."""

NOT_OURS = {
    "pip install": "installs packages",
    "uv pip install": "installs packages",
    "uv venv": "makes an environment",
    "uv sync": "makes an environment",
    "uv run pytest": "is the tests themselves",
    "uv run pre-commit": "installs hooks",
    "git ": "is not a command of this package",
    "bash .ci/run": "runs the tests",
}
"""Beginnings of other lines of shell, each with the reason why no test runs them."""

NOT_PYTHON = {
    "class Method(nn.Module):": "outlines a contract; tests/contract runs it",
    "import fiftyone as fo": "FiftyOne is no dependency; tests/readers runs its importer",
    "model.push_to_hub(": "needs a hub; tests/export/test_hub.py pushes to a stand-in",
}
"""Lines of Python blocks that no test runs, each with the reason."""

NOT_A_RECIPE = {
    "sofa: studio couch": "the classes of a given classifier; tests/stages/test_project.py reads such",
}
"""Lines of YAML blocks that are no recipe, each with the reason."""

PAPERS = set(shipped_recipes()) - {"demo"}

NEEDS = {"onnx": ("onnx", "onnxruntime", "onnxscript"), "openvino": ("openvino", "onnx")}
"""What must be installed where a word of a command asks for it."""


def listed(text: str, known: dict[str, str]) -> bool:
    """Whether a line of the text stands in the list."""
    return any(
        line.strip().startswith(beginning) for line in text.splitlines() for beginning in known
    )


def lines_of(block: Block) -> list[str]:
    """The commands of a block of shell, without comments, each on one line."""
    text = block.text.replace("\\\n", " ")
    lines = []
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        parts: list[list[str]] = [[]]
        for word in words:
            if word == "&&":
                parts.append([])
            else:
                parts[-1].append(word)
        lines += [shlex.join(part) for part in parts if part]
    return lines


def own(line: str) -> list[str] | None:
    """The words of a ``weakseg`` command, without the program; ``None`` for other commands."""
    words = shlex.split(line.removeprefix("uv run "))
    return words[1:] if words and words[0] == "weakseg" else None


SHELL = [block for page in pages() for block in blocks(page, "bash", "sh", "shell", "console")]
PYTHON = [b for page in pages() for b in blocks(page, "python", "py") if b.title is None]
YAML = [b for page in pages() for b in blocks(page, "yaml", "yml") if b.title is None]
IN_BLOCKS = {line.removeprefix("uv run ") for block in SHELL for line in lines_of(block)}


def _in_sentences(page: Path) -> list[str]:
    """Whole commands in the sentences of a page that no block has, in order and each once."""
    found: dict[str, None] = {}
    for code in inline(page):
        words = own(code.text) if "weakseg " in code.text else None
        if not words or any(re.fullmatch(r"[A-Z]{3,}(\.\w+)?", word) for word in words):
            continue
        line = shlex.join(["weakseg", *words])
        if line in IN_BLOCKS or (len(words) == 1 and not _complete(words)):
            continue
        found[line] = None
    return list(found)


def _complete(words: list[str]) -> bool:
    try:
        app.parse_args(words, exit_on_error=False, print_error=False)
    except Exception:  # a command that is named in a sentence, without what it needs
        return False
    return True


@pytest.fixture
def sandbox(sandbox: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """The sandbox, with the tables of the clone; where a page needs its own method, with that."""
    Path("benchmarks").symlink_to(ROOT / "benchmarks", target_is_directory=True)
    block = request.node.callspec.params.get("block")
    if block is None or "hide-and-seek" not in block.text:
        yield sandbox
        return
    folder = sandbox.parent / "worked"
    written(folder)
    with installed(folder):
        yield sandbox


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_shell(block: Block, sandbox: Path, monkeypatch):
    if "recipe.yaml" in block.text and not Path("recipe.yaml").exists():
        recipe_of(block)
    for number, line in enumerate(lines_of(block)):
        run_line(line, f"out-{number}", monkeypatch)


def recipe_of(block: Block) -> None:
    """The ``recipe.yaml`` that a page talks about: its last YAML block above, on the photos."""
    above = [b for b in YAML if b.page == block.page and b.line < block.line]
    own = {"data": {"root": str(Path("photos").absolute()), "labels": "../labels.csv"}}
    values = {**own, **yaml.safe_load(above[-1].text)} if above else own
    Path("recipe.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")


SENTENCES = {page: found for page in pages() if (found := _in_sentences(page))}


@pytest.mark.parametrize(
    "page", SENTENCES, ids=lambda page: page.relative_to(ROOT).as_posix() if page else ""
)
def test_commands_in_sentences(page: Path, sandbox: Path, monkeypatch):
    for number, line in enumerate(SENTENCES[page]):
        run_line(line, f"out-{number}", monkeypatch)


def run_line(line: str, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a line of shell as the docs have it, with what makes it small."""
    words = own(line)
    if words is None:
        parse_script(line, monkeypatch)
        return
    if line.removeprefix("uv run ") in NOT_RUN:
        return
    for word, packages in NEEDS.items():
        if word in words:
            for package in packages:
                pytest.importorskip(package, reason=f"{line}: {package} is not installed")
    if words[:1] == ["export"] and "onnx" in words:
        export_onnx(Path(words[words.index("--out") + 1]))
        return
    if words[0] == "run" and set(words) & PAPERS:
        start(words)
        return
    assert call(*small(words, out)) == 0, line
    if words[:1] == ["export"] and "voc" in words:
        correct(Path(words[words.index("--out") + 1]))


def start(words: list[str]) -> None:
    """A recipe of a paper: its settings and the data that it is given. tests/cli plans its run."""
    given = app.parse_args(words, exit_on_error=False, print_error=False)[1].arguments
    keys = ("labels", "recipe", "masks", "classes", "untagged")
    recipe = _settings(given["source"], *map(given.get, keys), given.get("sets", ()))
    resolve(recipe.method)
    assert len(collect(recipe.data).split(*recipe.data.train)) > 0


def correct(tree: Path) -> None:
    """What the page asks of a person: an export that comes back has another mask than the run."""
    file = min((tree / "SegmentationClass").rglob("*.png"))
    with Image.open(file) as mask:
        edited, palette = np.array(mask), mask.getpalette()
    edited[:10, :10] = 1
    image = Image.fromarray(edited, "P")
    image.putpalette(palette)
    image.save(file)


def export_onnx(file: Path) -> None:
    """Exports the run's model, which takes ten seconds, once for all pages."""
    kept = Path("..", "cache", "model.onnx")
    if not kept.exists():
        kept.parent.mkdir(exist_ok=True)
        assert call("export", "run", "--to", "onnx", "--out", kept) == 0
    shutil.copy(kept, file)


def parse_script(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script of benchmarks/ takes hours: it must exist, import, and take these arguments."""
    words = shlex.split(line.removeprefix("uv run "))
    if words[0] != "python" or not words[1].startswith("benchmarks/"):
        assert listed(line, NOT_OURS), f"neither run nor listed: {line}"
        return
    script, given = ROOT / words[1], words[2:]
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser: argparse.ArgumentParser) -> None:
        parse(parser, given)
        raise _ParsedError

    before = set(sys.modules)
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        patch.syspath_prepend(script.parent)
        main = runpy.run_path(str(script))["main"]
        if given:  # without any there is nothing to go wrong
            with pytest.raises(_ParsedError):
                main()
    for name in set(sys.modules) - before:
        if str(script.parent) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


class _ParsedError(Exception):
    """The arguments of a script were taken."""


def small(words: list[str], out: str) -> list[str]:
    """The command with tiny settings, its results inside the sandbox, its network of a second.

    What the page sets wins over the tiny settings; the network wins over the page.
    """
    command, *rest = words
    flags = {f for a in app[command].assemble_argument_collection() for f in a.names}
    if "--set" not in flags:
        return words
    given = [rest[i + 1] for i, word in enumerate(rest) if word == "--set"]
    folder = Path(rest[0]) if rest else Path()
    if (folder / "recipe.yaml").exists():  # a command on the finished run, which is tiny already
        recipe = load_recipe(folder / "recipe.yaml", sets=given)
        return [command, *rest, *sets(*_small_refining(recipe))]
    shipped = next((w for w in rest if w in PAPERS), None)
    file = next((w for w in rest if w.endswith((".yaml", ".yml"))), None)
    usual = {"run": "default/cpu", "demo": "demo"}.get(command)
    recipe = load_recipe(shipped or file or usual, sets=given)
    resolve(recipe.method)  # what the page sets is right by itself, too
    last = ["--out", out] if "--out" in flags and "--out" not in rest else []
    if command == "compare" and "--dry-run" not in rest:  # many runs
        last.append("--dry-run")
    network = [*_small_network(recipe), *_small_refining(recipe)]
    if command == "compare":
        network.append("train.crop=64")
    if recipe.runtime.devices > 1:  # tests/stages/test_processes.py trains with several
        network.append("runtime.devices=1")
    return [command, *sets(*_small_settings(recipe)), *rest, *sets(*network), *last]


def _small_settings(recipe: Recipe) -> list[str]:
    more = []
    if recipe.data.source == "shapes":
        more.append("data.options={train: 24, val: 4, size: 64, seed: 3}")
    if recipe.method["name"].startswith("recurseed"):
        more += ["method.channels=8", "method.dilations=[1, 2, 3]"]
    return [*TINY, *more]


def _small_network(recipe: Recipe) -> list[str]:
    name, network = recipe.method["name"], dict(NETWORK)
    network["backbone.options"] = "{}"
    if recipe.segmenter.backbone is not None:
        network["segmenter.backbone"] = "{name: test_resnet, pretrained: false}"
    if recipe.backbone.name.startswith(("deit", "vit")):
        network["backbone.name"] = "test_vit"
    if name.startswith("acr"):
        network |= {"method.depth": "4", "method.width": "4", "train.crop": "64"}
    return [f"{key}={value}" for key, value in network.items()]


def _small_refining(recipe: Recipe) -> list[str]:
    """The recipe's steps, of which one trains a network."""
    if "affinity" not in recipe.steps:
        return []
    quick = {
        "train": {"steps": 4, "crop": 48, "batch": 4},
        "pairs": "all",
        "labels": {"harden": "none", "foreground": 0.6, "background": 0.5},
        "steps": 4,
    }
    chain = [{**step, **quick} if step["name"] == "affinity" else step for step in recipe.refine]
    return [f"refine={json.dumps(chain)}"]


@pytest.fixture
def small_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """``weakseg.run`` and ``load_recipe`` as a page calls them, with tiny settings behind."""
    run = weakseg.run

    def tiny_run(*args: object, sets: tuple[str, ...] = (), **kwargs: object) -> object:
        network = [f"{key}={value}" for key, value in NETWORK.items()]
        return run(*args, sets=(*TINY, *sets, *network), **kwargs)

    def tiny_recipe(
        source: object = None, *, sets: tuple[str, ...] = (), **kwargs: object
    ) -> Recipe:
        own = _small_settings(load_recipe(source, sets=sets, **kwargs))
        network = [f"{key}={value}" for key, value in {**NETWORK, "backbone.options": "{}"}.items()]
        return load_recipe(source, sets=(*own, *sets, *network), **kwargs)

    monkeypatch.setitem(weakseg.__dict__, "run", tiny_run)
    monkeypatch.setitem(weakseg.__dict__, "load_recipe", tiny_recipe)


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python(block: Block, sandbox: Path, small_runs: None):
    code = compile(block.text, str(block), "exec")
    if listed(block.text, NOT_PYTHON):
        return
    for package in NEEDS["onnx"] if "onnxruntime" in block.text else ():
        pytest.importorskip(package, reason=f"{package} is not installed")
    if "model.onnx" in block.text:
        export_onnx(Path("model.onnx"))
    exec(code, {"__name__": "__main__"})


@pytest.mark.parametrize("block", YAML, ids=str)
def test_yaml(block: Block):
    values = yaml.safe_load(block.text)
    if listed(block.text, NOT_A_RECIPE):
        return
    resolve(load_recipe(values).method)


SECTIONS = re.compile(rf"({'|'.join(Recipe.model_fields)}): [\[{{].*")
"""Settings of a recipe in a sentence."""


def test_settings_in_sentences():
    found = [code for page in pages() for code in inline(page) if SECTIONS.fullmatch(code.text)]
    assert found
    for code in found:
        load_recipe(yaml.safe_load(code.text))


def test_the_lists_of_what_is_not_run_hold_nothing_else():
    shell = [line for block in SHELL for line in lines_of(block)]
    said = [line for found in SENTENCES.values() for line in found]
    for line in NOT_RUN:
        assert line in (*shell, *said), f"no page has {line}: take it off the list"
    for known, of in ((NOT_PYTHON, PYTHON), (NOT_A_RECIPE, YAML)):
        for beginning in known:
            assert any(listed(block.text, {beginning: ""}) for block in of), beginning


def test_brackets_in_commands_are_quoted():
    """zsh, the shell of macOS, takes them for patterns of file names."""
    for block in SHELL:
        for line in block.text.splitlines():
            bare = re.sub(r"'[^']*'|\"[^\"]*\"|#.*", "", line)
            assert not re.search(r"[][{}*?]", bare), f"{block}: quote the brackets in {line}"
