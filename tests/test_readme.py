"""The README's Python runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest


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


def test_commands_of_the_readme_exist(repository: Path) -> None:
    from hermes_pipeline.cli import app

    named = set(re.findall(r"^hermes4 (\w+)", (repository / "README.md").read_text(), re.MULTILINE))
    assert named <= {command.callback.__name__ for command in app.registered_commands}  # type: ignore[union-attr]


def test_links_of_the_documents_lead_somewhere(repository: Path) -> None:
    for page in [
        repository / "README.md",
        repository / "CONTRIBUTING.md",
        *repository.glob("docs/*.md"),
    ]:
        for link in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_files_that_the_claims_name_exist(repository: Path) -> None:
    roots = [repository, repository / "python" / "hermes_pipeline", repository / "tests"]
    text = (repository / "docs" / "report.md").read_text()
    named = re.findall(r"`([\w./]+(?:/|\.py|\.cpp|\.toml))`", text)
    assert len(named) > 20
    for name in named:
        assert any((root / name).exists() for root in roots), f"report.md names {name}"
