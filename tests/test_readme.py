"""The README's Python runs as it stands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer


def test_python_of_the_readme_runs(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (repository / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    space: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), space)
    assert "lower bound" in capsys.readouterr().out
    loss = space["loss"]
    assert 5 < float(loss) < 20  # type: ignore[arg-type]


def test_exit_codes_of_the_readme_are_those_of_the_help(repository: Path) -> None:
    from hermes_pipeline.exits import EXIT_CODES

    told = [paragraph.replace("\n", " ") for paragraph in EXIT_CODES.split("\n\n")[1:]]
    table = (repository / "README.md").read_text().partition("| exit code |")[2]
    rows = re.findall(r"^\| (\S.*?) \| (.*) \|$", table.partition("\n\n")[0], re.MULTILINE)
    assert told == [f"{code}: {meaning}" for code, meaning in rows]


def test_commands_of_the_readme_exist(repository: Path) -> None:
    from hermes_pipeline.cli import app

    named = set(re.findall(r"^hermes4 (\w+)", (repository / "README.md").read_text(), re.MULTILINE))
    assert {"tokenize", "train", "evaluate"} <= named
    assert named <= {command.callback.__name__ for command in app.registered_commands}  # type: ignore[union-attr]


def blocks_of_commands(repository: Path) -> list[list[list[str]]]:
    """The words of each `hermes4` line, for each block of the README that has some."""
    text = (repository / "README.md").read_text()
    blocks = [
        [shlex.split(line, comments=True)[1:] for line in block.splitlines() if "hermes4 " in line]
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    ]
    found = [block for block in blocks if block]
    assert found
    return found


def test_options_of_the_readme_exist(repository: Path) -> None:
    from hermes_pipeline.cli import app

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for words in (words for block in blocks_of_commands(repository) for words in block):
        known = {option for known in commands[words[0]].params for option in known.opts}
        assert {word for word in words if word.startswith("--")} <= known, words


def test_pack_and_train_of_the_readme_make_the_same_rows(repository: Path) -> None:
    from hermes_pipeline.training.recipes import load_recipe

    for block in blocks_of_commands(repository):
        (pack,) = (words for words in block if words[0] == "pack")
        (train,) = (words for words in block if words[0] == "train")
        data = load_recipe(train[train.index("--recipe") + 1], []).data
        shown = {"--row-length": str(data.row_length), "--too-long": data.too_long}
        assert pack[2:] == [word for pair in shown.items() for word in pair]
        assert (data.packing, data.seed) == ("best", 0)  # those of `pack` when none is given


def test_links_of_the_documents_lead_somewhere(repository: Path) -> None:
    for page in [
        repository / "README.md",
        repository / "CONTRIBUTING.md",
        *repository.glob("docs/*.md"),
    ]:
        for link in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def tree_of_the_architecture(repository: Path) -> str:
    """Section 2's tree, without what stands in brackets because it is not here yet."""
    (tree,) = re.findall(
        r"## 2\. The tree.*?```\n(.*?)```",
        (repository / "docs" / "architecture.md").read_text(),
        re.S,
    )
    here, absent = [], None
    for line in tree.splitlines():
        indent = len(line) - len(line.lstrip())
        if absent is None or indent <= absent:
            absent = indent if line.lstrip().startswith("[") else None
            here.append(re.sub(r"\[[^]]*\]", "", line) if absent is None else "")
    return "\n".join(here)


def test_the_tree_of_the_architecture_is_the_source_tree(repository: Path) -> None:
    tree = tree_of_the_architecture(repository)
    folders = ["csrc", "kernels", "hermes_core", "python", "bench", "tests", "docs", "requirements"]
    files = [path for folder in folders for path in (repository / folder).rglob("*.*")]
    there = {path.name for path in files} | {path.name for path in repository.iterdir()}
    named = set(re.findall(r"(?<![\w./<])[\w.]+\.(?:py|pyi|cpp|hpp|md|in|txt)\b", tree))
    assert named <= there
    outside = {"recipes", "templates", "examples", "tests"}  # a line for all in each of these
    source = [
        path for path in files if path.suffix in (".py", ".pyi", ".cpp", ".hpp", ".md", ".json")
    ]
    wanted = {p.name for p in source if not outside & set(p.relative_to(repository).parts)}
    assert not {name for name in wanted if name not in tree}


def test_files_that_the_claims_name_exist(repository: Path) -> None:
    roots = [repository, repository / "python" / "hermes_pipeline", repository / "tests"]
    text = (repository / "docs" / "report.md").read_text()
    named = re.findall(r"`([\w./]+(?:/|\.py|\.cpp|\.toml))`", text)
    assert len(named) > 20
    for name in named:
        assert any((root / name).exists() for root in roots), f"report.md names {name}"
