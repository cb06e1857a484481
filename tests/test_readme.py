"""The README is true: a newcomer pastes its commands and its Python, and sees what it says they print.

Commands that install, or that take minutes, are not run here; that they exist, with their options, is checked of every
command in README and docs/.
"""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest

from elf_rt.cli import group

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RUN = ("generate", "verify")  # commands whose output is compared
PROGRAM = Path(sys.executable).with_name("elf-rt")


def consoles(text: str) -> list[tuple[str, list[str]]]:
    """(command, lines that it prints) of the blocks where commands stand behind a dollar."""
    found: list[tuple[str, list[str]]] = []
    for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], []))
            else:
                found[-1][1].append(line)
    return found


def assert_printed(printed: str, expected: list[str]) -> None:
    """Lines agree but for numbers with a point, which measure something; … stands for any text, or for any lines."""
    pattern = "\n".join(re.escape(re.sub(r"\d+\.\d+(e[+-]\d+)?", "#", line)) for line in expected).replace(
        "…", r"[\s\S]*"
    )
    masked = re.sub(r"\d+\.\d+(e[+-]\d+)?", "#", "\n".join(line.rstrip() for line in printed.strip("\n").split("\n")))
    assert re.fullmatch(re.sub(r"(\\ )+", r"\\s+", pattern), masked), printed


@pytest.fixture(scope="module")
def clone(bundle, tmp_path_factory):
    """A folder as the README's reader has it after `elf-rt export`."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "model.elfrt").symlink_to(bundle("spoken-to-written"))
    return folder


@pytest.mark.parametrize(("command", "expected"), consoles(README))
def test_a_command_prints_what_the_readme_says(command, expected, clone):
    program, *arguments = shlex.split(command, comments=True)
    if program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
            "optional-dependencies"
        ]
        assert arguments[0] == "install" and set(re.findall(r"[\w-]+", arguments[-1])) <= extras.keys()
    elif program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    elif arguments[0] == "export":  # the fixture's bundle is that of this command, but for the precisions
        done = subprocess.run(
            [PROGRAM, *arguments, "--dry-run"], cwd=clone, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0 and expected[-1] in done.stdout, done.stderr
        assert expected[0].removeprefix("read: ") in done.stdout
    elif arguments[0] in RUN:
        done = subprocess.run([PROGRAM, *arguments], cwd=clone, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert_printed(done.stdout, expected)


def test_the_python_prints_what_the_readme_says(clone):
    ((program, expected),) = re.findall(r"```python\n(.*?)```\n+```text\n(.*?)```", README, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", program], cwd=clone, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert_printed(done.stdout, expected.splitlines())


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_commands_and_their_options_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for line in re.findall(r"^(?:\$ |    )elf-rt ([^\n#]*)", text, re.MULTILINE) + re.findall(
        r"`elf-rt ([^`\n]+)`", text
    ):
        name, *_ = line.split(maxsplit=1)
        with click.Context(group) as above:
            command = group if name.startswith("-") else group.get_command(above, name)
            assert command is not None or name.isupper(), f"{page}: elf-rt {line}"
            known = {option for each in command.get_params(above) for option in each.opts} if command else {"--help"}
        assert set(re.findall(r"(?<!\S)--?[a-z][\w-]*", line)) <= known, f"{page}: elf-rt {line}"
