"""examples/container/Containerfile: its instructions, stages and arguments, and that what it copies is there."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILE = ROOT / "examples/container/Containerfile"
INSTRUCTIONS = {"FROM", "ARG", "RUN", "COPY", "ENV", "WORKDIR", "ENTRYPOINT", "CMD"}
FLAGS = {"COPY": ("--from=",)}


def instructions(text: str) -> list[tuple[str, str]]:
    """Instruction and argument of every line, continued ones joined."""
    text = re.sub(r"(?m)^\s*#.*\n", "", text).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]


def faults(text: str) -> list[str]:
    """What a builder would refuse."""
    found, stages, declared, begun = [], [], {"PATH"}, False
    before_stages: set[str] = set()
    for name, argument in instructions(text):
        if name not in INSTRUCTIONS:
            found.append(f"unknown instruction {name}")
            continue
        if unknown := set(re.findall(r"\$\{(\w+)\}", argument)) - (before_stages if name == "FROM" else declared):
            found.append(f"{name} uses undeclared {sorted(unknown)}")
        if not begun and name not in ("ARG", "FROM"):
            found.append(f"{name} before FROM")
        words = argument.split() if name == "RUN" else shlex.split(argument)
        flags = [word for word in words if word.startswith("--")] if name in FLAGS else []
        if any(not flag.startswith(FLAGS[name]) for flag in flags):
            found.append(f"{name} has {flags}")
        if name == "ARG":
            (declared if begun else before_stages).add(argument.split("=")[0])
        elif name == "ENV":
            declared |= {word.split("=")[0] for word in words}
        elif name == "FROM":
            begun, declared = True, {"PATH"}
            if not re.fullmatch(r"\S+:\S+( AS \w+)?", argument):
                found.append(f"FROM {argument}")
            stages += re.findall(r" AS (\w+)", argument)
        elif name == "COPY" and flags:
            if flags[0].removeprefix("--from=") not in stages:
                found.append(f"COPY from unknown stage {flags[0]}")
        elif name == "COPY":
            *sources, target = words
            found += [f"COPY {source}: no such file" for source in sources if not (ROOT / source).exists()]
            if len(sources) > 1 and not target.endswith("/"):
                found.append(f"COPY of several files to {target}")
    return found


def test_the_container_file():
    assert faults(FILE.read_text()) == []


def test_all_that_is_built_from_is_copied():
    """As the Makefile names it, with the files that pyproject.toml reads."""
    copies = [argument for name, argument in instructions(FILE.read_text()) if name == "COPY"]
    copied = {word for argument in copies if "--from" not in argument for word in argument.split()}
    assert {"setup.py", "pyproject.toml", "CMakeLists.txt", "csrc", "reca_kernels", "python"} <= copied
    settings = (ROOT / "pyproject.toml").read_text()
    assert {re.search(r'readme = "(.*)"', settings)[1], "LICENSE", "NOTICE"} <= copied
    extras = re.search(r'"\.\[(.*)\]"', FILE.read_text())[1].split(",")
    assert all(re.search(rf"(?m)^{extra} = \[", settings) for extra in extras)
    assert f"TORCH={re.search(r'TORCH .= (.*)', (ROOT / 'Makefile').read_text())[1]}" in FILE.read_text()


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("COPY csrc csrc", "COPY sources csrc", "COPY sources: no such file"),
        ("RUN pip", "RUM pip", "unknown instruction RUM"),
        ("--from=build", "--from=builder", "COPY from unknown stage --from=builder"),
        ("ARG TORCH=torch==2.13.0\n", "", "RUN uses undeclared ['TORCH']"),
        ("ARG CUDA=13.0.2\n", "WORKDIR /a\nARG CUDA=13.0.2\n", "WORKDIR before FROM"),
        ("NOTICE ./", "NOTICE .", "COPY of several files to ."),
    ],
)
def test_faults_are_seen(old, new, fault):
    text = FILE.read_text()
    assert old in text and fault in faults(text.replace(old, new, 1))
