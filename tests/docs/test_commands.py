"""Every command in the README and the docs exists and takes the arguments that it is shown with."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import weakseg
from weakseg.cli import app
from weakseg.recipe import load_recipe, shipped_recipes

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def _commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        blocks = re.findall(r"```bash\n(.*?)```", text, re.S) + re.findall(
            r"`((?:uv run )?weakseg [^`]+)`", text
        )
        for line in "\n".join(blocks).splitlines():
            for part in line.split("#")[0].split("&&"):
                words = part.strip().removeprefix("uv run ")
                if words.startswith("weakseg "):
                    found.append((page.name, words))
    return sorted(set(found))


@pytest.mark.parametrize(("page", "command"), _commands())
def test_command_parses(page, command):
    words = shlex.split(command.replace("...", ""))[1:]
    if len(words) == 1:  # named in a sentence, without its arguments
        assert words[0] in app
        return
    app.parse_args(words, exit_on_error=False, print_error=False)


def test_the_main_commands_are_shown():
    commands = [c for page, c in _commands() if page == "README.md"]
    assert "weakseg demo" in commands
    assert any(c.startswith("weakseg run photos/ labels.csv") for c in commands)


def test_links_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if not link.startswith("http"):
                assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_names_used_in_the_python_example_exist():
    for name in set(
        re.findall(r"weakseg\.(\w+)\(", (ROOT / "README.md").read_text(encoding="utf-8"))
    ):
        assert callable(getattr(weakseg, name)), name


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipes_load_and_name_a_known_method(name):
    from weakseg.methods import resolve

    recipe = load_recipe(name)
    method, _ = resolve(recipe.method)
    assert method.card.name == recipe.method["name"].partition("+")[0]
    text = shipped_recipes()[name].read_text(encoding="utf-8")
    assert text.startswith("#")
    assert "weakseg " in text.split("seed:")[0], "the header names the command"


def test_cards_name_shipped_recipes_only():
    from weakseg.methods import methods

    for name in methods:
        assert set(methods[name].card.recipes) <= set(shipped_recipes())
