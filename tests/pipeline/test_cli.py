"""The command `hermes4` itself: help, mistakes, Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hermes_core import __version__
from hermes_pipeline.__main__ import EXTRAS
from hermes_pipeline.cli import options
from hermes_pipeline.config import LARGEST_SEED, recipe_names
from hermes_pipeline.errors import UserError
from hermes_pipeline.evaluation.benchmarks import BENCHMARKS
from hermes_pipeline.stages import demo, pack
from running import Ended, Hermes4

pytestmark = pytest.mark.timeout(100)

# In the order of the flow.
COMMANDS = [
    *("complete", "show", "tokenize", "pack", "init"),
    *("train", "export", "serve", "route", "sandbox", "evaluate", "demo"),
]


def failing(error: BaseException) -> Callable[..., None]:
    def run(*_: object, **__: object) -> None:
        raise error

    return run


def test_help_lists_the_commands_in_the_order_of_the_flow(hermes4: Hermes4) -> None:
    ended = hermes4("--help")
    first_words = [line.strip("│ ").split(" ")[0] for line in ended.out.splitlines()]
    assert ended.code == 0
    assert [word for word in first_words if word in COMMANDS] == COMMANDS


def test_version_is_the_packages(hermes4: Hermes4) -> None:
    assert hermes4("--version") == Ended(0, f"hermes4 {__version__}\n", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_its_help(hermes4: Hermes4, command: str) -> None:
    ended = hermes4(command, "--help")
    assert (ended.code, ended.err) == (0, "")
    assert f"Usage: hermes4 {command} " in ended.out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_speaks_of_no_python(hermes4: Hermes4, command: str) -> None:
    told = hermes4(command, "--help").out
    for words in ("None", "<bool>", "[default: ("):
        assert words not in told
    assert " --help " in told


def test_the_largest_seed_is_that_of_recipes() -> None:
    assert options.LARGEST_SEED == LARGEST_SEED


def test_help_names_every_recipe_and_benchmark(
    hermes4: Hermes4, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    told = {command: hermes4(command, "--help").out for command in COMMANDS}
    takers = {"answers": ("complete",), "finetune": ("train",)}  # which gives no shape to `init`
    for name in recipe_names():
        for command in takers.get(name, ("train", "init")):
            assert name in told[command]
    assert f"Which benchmark: {', '.join(BENCHMARKS)}. [required, here or in" in told["evaluate"]
    assert "[default: 0.6]" in told["complete"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["init", "--recipe", "answers", "--tokenizer", "t", "--out", "o"],
            "recipe 'answers' is one of `hermes4 complete`; take finetune, hermes4_14b, "
            "hermes4_405b, hermes4_70b, tiny, or name a .toml file",
        ),
        (
            ["complete", "--recipe", "tiny"],
            "recipe 'tiny' is one of `hermes4 train`; take answers, or name a .toml file",
        ),
        (
            ["evaluate", "--recipe", "tiny"],
            "recipe 'tiny' is one of `hermes4 train`; name a .toml file",
        ),
        (
            ["evaluate", "--benchmark", "math500", "--out", "o"],
            "unknown benchmark 'math500'; known: chain",
        ),
        (
            ["evaluate", "--benchmark", "chian", "--out", "o"],
            "unknown benchmark 'chian'; did you mean 'chain'? known: chain",
        ),
        (
            [*("train", "--recipe", "tiny", "--out", "o", "--set", "training.precision=x")],
            "recipe tiny.toml: training.precision is 'x', not one of 'bfloat16', 'float32'",
        ),
    ],
)
def test_a_wrong_name_is_refused_with_those_there_are(
    hermes4: Hermes4, words: list[str], message: str
) -> None:
    assert hermes4(*words) == (2, "", f"hermes4: error: {message}\n")


def test_without_a_command_the_help_is_printed_and_nothing_run(hermes4: Hermes4) -> None:
    ended = hermes4()
    assert (ended.code, ended.err) == (2, "")
    assert "tokenize" in ended.out


def test_help_loads_no_large_library() -> None:
    code = (
        "import contextlib, sys\n"
        "from hermes_pipeline.cli import main\n"
        "for command in sys.argv[1:]:\n"
        "    sys.argv[1:] = [command, '--help']\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        main()\n"
        "large = {'numpy', 'torch', 'transformers', 'datasets', 'pyarrow', 'aiohttp', 'vllm'}\n"
        "print('loaded:', sorted(large & set(sys.modules)))\n"
    )
    words = [sys.executable, "-c", code, *COMMANDS]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.count("Usage: hermes4 ") == len(COMMANDS)
    assert done.stdout.endswith("loaded: []\n")


@pytest.mark.parametrize(
    ("missing", "words", "extra"),
    [
        ("typer", ["--help"], "pipeline"),
        ("transformers", ["tokenize", "--data", "d", "--tokenizer", "t", "--out", "o"], "pipeline"),
    ],
)
def test_a_package_that_is_not_installed_is_one_line(
    tmp_path: Path, missing: str, words: list[str], extra: str
) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.jsonl").write_text('{"messages": []}\n')
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "tokenizer_config.json").write_text("{}")
    code = (
        "import sys\n"
        f"sys.modules[{missing!r}] = None\n"
        "from hermes_pipeline.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    line = f"hermes4 needs more than the library: pip install 'hermes4-core[{extra}]'\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)


def test_the_command_is_the_module_that_knows_what_is_missing(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"hermes4": "hermes_pipeline.__main__:main"}
    brings = project["optional-dependencies"]
    for package, extra in EXTRAS.items():
        both = brings[extra] + (brings["torch"] if extra == "train" else [])
        assert any(wanted.startswith(package) for wanted in both), package


def test_a_module_of_ours_that_is_missing_keeps_its_traceback() -> None:
    code = (
        "import sys\n"
        "sys.modules['hermes_pipeline.cli'] = None\n"
        "from hermes_pipeline.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pakc"], "No such command 'pakc'. Did you mean 'pack'? (see hermes4 --help)"),
        (["cook"], "No such command 'cook' (see hermes4 --help)"),
        (["pack"], "Missing argument 'store' (see hermes4 pack --help)"),
        (["tokenize", "--data", "x"], "Missing option '--tokenizer' (see hermes4 tokenize --help)"),
        (["tokenize", "--data"], "Option '--data' requires an argument (see hermes4 --help)"),
        (["pack", "a", "b"], "Got unexpected extra argument(s) (b) (see hermes4 pack --help)"),
    ],
)
def test_a_wrong_command_line_is_explained_in_one_line(
    hermes4: Hermes4, words: list[str], message: str
) -> None:
    assert hermes4(*words) == (2, "", f"hermes4: error: {message}\n")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["pack", "s", "--row-lenth", "8"], "--row-lenth (Possible options: --row-length)"),
        (["pack", "s", "--row-length", "0"], "'--row-length': "),
        (["pack", "s", "--row-length", "-8"], "'--row-length': "),
        (["pack", "s", "--row-length", "x"], "'--row-length': "),
        (["tokenize", "--workers", "0"], "'--workers': "),
        (["tokenize", "--workers", "1" + 20 * "0"], "'--workers': "),
        (["sandbox", "--workers", "1" + 20 * "0"], "'--workers': "),
        (["evaluate", "--top-p", "1.5"], "'--top-p': "),
    ],
)
def test_a_wrong_option_is_named_in_one_line(
    hermes4: Hermes4, words: list[str], named: str
) -> None:
    ended = hermes4(*words)
    assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1)
    assert ended.err.startswith("hermes4: error: ")
    assert named in ended.err


@pytest.mark.parametrize(
    "error", [UserError("no x; try y"), FileNotFoundError("no x; try y"), PermissionError("no x")]
)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    hermes4: Hermes4, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(pack, "run", failing(error))
    assert hermes4("pack", "store") == (2, "", f"hermes4: error: {error}\n")


def test_a_users_mistake_shows_its_traceback_on_demand(
    hermes4: Hermes4, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack, "run", failing(UserError("no x")))
    monkeypatch.setenv("HERMES4_TRACEBACK", "1")
    with pytest.raises(UserError, match="no x"):
        hermes4("pack", "store")


def test_a_defect_keeps_its_traceback(hermes4: Hermes4, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "run", failing(ZeroDivisionError("ours")))
    with pytest.raises(ZeroDivisionError, match="ours"):
        hermes4("pack", "store")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGHUP, 75)]
)
def test_a_signal_is_one_line_and_has_its_exit_code(tmp_path: Path, number: int, code: int) -> None:
    os.mkfifo(tmp_path / "store.json")
    words = [sys.executable, "-m", "hermes_pipeline", "pack", str(tmp_path)]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, **pipes) as process:
        try:
            # Opens once the command has opened it too, and is about to wait for what we write.
            with (tmp_path / "store.json").open("wb"):
                process.send_signal(number)
                # Another thread may take the signal: the end of the file would be there first.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=2)
            # Closed by now: a signal that came just before the wait would not have ended it.
            said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, *said) == (code, "", "hermes4: interrupted\n")


def test_a_demo_that_is_stopped_while_it_trains_ends_as_training_does(
    hermes4: Hermes4, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stopped = [step for step in demo.model_steps(tmp_path, 0) if step.name == "train"]
    monkeypatch.setattr(demo, "data_steps", lambda *_: [])
    monkeypatch.setattr(demo, "model_steps", lambda *_: stopped)
    monkeypatch.setattr(demo.train, "run", lambda *_, **__: 75)
    ended = hermes4("demo", "--out", tmp_path / "demo")
    assert ended.code == 75
    assert ended.err.endswith("hermes4: interrupted; run the same command again to go on\n")


def test_a_reader_that_is_gone_from_the_start_has_its_exit_code() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    words = [sys.executable, "-m", "hermes_pipeline", "--help"]
    done = subprocess.run(words, stdout=writing, stderr=subprocess.PIPE, timeout=60)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def test_help_tells_the_exit_codes(hermes4: Hermes4, repository: Path) -> None:
    told = " ".join(hermes4("--help").out.split())
    readme = (repository / "README.md").read_text()
    for code in ("0", "1", "2", "75", "128 + n"):
        assert f" {code}: " in told
        assert f"\n| {code} |" in readme


def show(tmp_path: Path, shared_data: Path) -> list[str]:
    record = (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    )
    (tmp_path / "chats.jsonl").write_text(f"{record}\n" * 3_000)
    tokenizer = shared_data / "tokenizers" / "qwen" / "tokenizer.json.gz"
    return [
        sys.executable, "-m", "hermes_pipeline", "show", "--data", str(tmp_path / "chats.jsonl"),
        "--tokenizer", str(tokenizer), "--template", "hermes_chatml", "--count", "3000",
    ]  # fmt: skip


def test_a_full_disk_is_one_line(tmp_path: Path, shared_data: Path) -> None:
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            show(tmp_path, shared_data), stdout=full, stderr=subprocess.PIPE, text=True, timeout=80
        )
    assert ended.returncode == 2
    assert ended.stderr == (
        "hermes4: error: No space left on device. Make room, and run the same command again\n"
    )


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path, shared_data: Path) -> None:
    with subprocess.Popen(
        show(tmp_path, shared_data), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith("conversation 0")
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=80) == 141
