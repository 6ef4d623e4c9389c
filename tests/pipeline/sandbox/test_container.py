"""The box of containers: with podman and docker where they are, and with a stand-in everywhere."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from attacks.engines import IMAGE, write_image, write_stand_in
from attacks.programs import ATTACKS, REPRESENTATIVE
from attacks.world import LIMITS, PATIENT, Wait, World, attack, in_containers, under_us
from hermes_pipeline.errors import UserError
from hermes_pipeline.services.sandbox import Case, Container, Limits, Result, Sandbox
from hermes_pipeline.services.sandbox.container import LABEL, Engine, run_words
from running import comes_true

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(120)]

LIMITED = [one for one in ATTACKS if one.name in REPRESENTATIVE]


@pytest.fixture(scope="module", params=["podman", "docker"])
def real(request: pytest.FixtureRequest) -> Iterator[str]:
    """An engine that has the image; podman's own store is not touched."""
    name = request.param
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    if name == "podman" and os.geteuid() != 0:
        pytest.skip("a podman without root bounds no number of files, and its users have other ids")
    if name == "docker" and subprocess.run(["docker", "version"], capture_output=True).returncode:
        pytest.skip("docker is installed, and its daemon does not run")
    # Not pytest's folder, whose path is too long for podman.
    with (
        tempfile.TemporaryDirectory(prefix="pod-") as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        if name == "podman":
            store, settings = Path(folder, "storage.conf"), Path(folder, "containers.conf")
            store.write_text(
                f'[storage]\ndriver = "overlay"\ngraphroot = "{folder}/root"\n'
                f'runroot = "{folder}/run"\n'
            )
            # crun refuses a machine with both versions of cgroups.
            settings.write_text('[engine]\nruntime = "runc"\n' if shutil.which("runc") else "")
            patch.setenv("CONTAINERS_STORAGE_CONF", str(store))
            patch.setenv("CONTAINERS_CONF", str(settings))
        image = Path(folder, "image.tar")
        write_image(image)
        subprocess.run([name, "import", image, IMAGE], check=True, capture_output=True)
        volumes = said_by(name, "volume", "ls", "--quiet", "--filter", "dangling=true")
        yield name
        assert comes_true(lambda: not containers_of(name, os.getpid()), 10)
        assert said_by(name, "volume", "ls", "--quiet", "--filter", "dangling=true") == volumes
        subprocess.run([name, "image", "rm", IMAGE], check=True, capture_output=True)


def containers_of(engine: str, pid: int) -> list[str]:
    """Containers that a process has started."""
    return said_by(engine, "ps", "--all", "--quiet", "--filter", f"label={LABEL}={pid}")


def said_by(engine: str, *words: str) -> list[str]:
    return subprocess.run(
        [engine, *words], capture_output=True, text=True, check=True
    ).stdout.split()


@pytest.fixture(scope="module")
def contained(real: str, wait: Wait) -> Iterator[Sandbox]:
    """A sandbox with one box of containers."""
    sandbox = Sandbox(workers=1, limits=PATIENT, make_box=box_of(real))
    wait(sandbox.__aenter__())
    yield sandbox
    wait(sandbox.__aexit__(None, None, None))


def box_of(engine: str) -> partial[Container]:
    return partial(Container, engine=engine, image=IMAGE)


@pytest.mark.parametrize("one", LIMITED, ids=lambda one: one.name)
def test_a_container_contains_an_attack(
    one: object, world: World, contained: Sandbox, wait: Wait
) -> None:
    assert attack(one, world, contained, wait, in_containers) == []


def test_a_result_names_engine_image_and_digest(contained: Sandbox, real: str, wait: Wait) -> None:
    result: Result = wait(contained.run("import os\nprint(os.getuid() > 60000, *os.environ)"))
    assert result.stdout == (
        "True PATH HOME LANG PYTHONHASHSEED PYTHONDONTWRITEBYTECODE OMP_NUM_THREADS "
        "OPENBLAS_NUM_THREADS\n"
    )
    said = rf"{real} [\d.]+\S*, image {IMAGE} \(sha256:[0-9a-f]{{64}}\), Python 3\.\d+\.\d+"
    assert re.fullmatch(said, result.box)


def test_files_in_memory_are_bounded_by_the_kernel(contained: Sandbox, wait: Wait) -> None:
    few = Limits(file_bytes=1 << 20, files=50)
    source = """
made = 0
try:
    while True:
        open(str(made), "w").close()
        made += 1
except OSError as error: print(error.strerror, made < 50)
"""
    assert wait(contained.run(source, limits=few)).stdout == "No space left on device True\n"
    full = wait(contained.run("open('x', 'wb').write(bytes(2 << 20))", limits=few))
    assert full.stderr.endswith("No space left on device\n")


ALONE = """
import asyncio, sys
from functools import partial
from hermes_pipeline.services.sandbox import Container, Sandbox
async def main():
    make_box = partial(Container, engine=sys.argv[1], image=sys.argv[2])
    async with Sandbox(workers=1, make_box=make_box) as sandbox:
        print((await sandbox.run("print('warm')")).stdout, flush=True)
        await sandbox.run("import time\\ntime.sleep(60)")
asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_containers_end_with_the_process_that_uses_them(number: int, real: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", ALONE, real, IMAGE],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "warm\n"
        assert comes_true(lambda: bool(in_containers()), 20)
        os.kill(process.pid, number)
        process.communicate(timeout=20)
    assert comes_true(lambda: not in_containers(), 20)
    assert comes_true(lambda: not containers_of(real, process.pid), 20)


def test_an_engine_that_is_killed_leaves_no_program(real: str, wait: Wait) -> None:
    async def use() -> Result:
        async with Sandbox(workers=1, limits=PATIENT, make_box=box_of(real)) as sandbox:
            await sandbox.run("")
            running = asyncio.create_task(sandbox.run("import time\ntime.sleep(1)\nprint(42)"))
            await asyncio.sleep(0.5)
            for pid in under_us():
                if Path(f"/proc/{pid}/comm").read_text().strip() == real:
                    os.kill(pid, signal.SIGKILL)
            return await running

    assert wait(use()).stdout == "42\n"
    assert comes_true(lambda: not in_containers(), 20)
    # But for the one that waits for the tests above.
    assert comes_true(lambda: len(containers_of(real, os.getpid())) <= 1, 20)


# What holds for a stand-in as well: the program inside, and what talks to it.


@pytest.fixture(scope="module")
def stand_in() -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="stand-in-") as folder:
        write_stand_in(Path(folder))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PATH", folder, prepend=os.pathsep)
            yield


@pytest.fixture(scope="module")
def standing_in(stand_in: None, wait: Wait) -> Iterator[Sandbox]:
    """A sandbox whose containers are boxes of bubblewrap."""
    sandbox = Sandbox(workers=1, limits=PATIENT, make_box=box_of("podman"))
    wait(sandbox.__aenter__())
    yield sandbox
    wait(sandbox.__aexit__(None, None, None))


@pytest.mark.parametrize(
    ("source", "ended"),
    [
        ("print('said')", "ok"),
        ("raise SystemExit(3)", "error"),
        ("while True: pass", "timeout"),
        ("import time\ntime.sleep(9)", "timeout"),
        ("x = []\nwhile True: x.append(bytearray(9 << 20))", "memory"),
        ("import os\nfor _ in range(8):\n    if os.fork() == 0: x = b'1' * (99 << 20); input()\n"
         "import time\ntime.sleep(9)", "memory"),
        ("import os, socket, time\nfor _ in range(40):\n    if os.fork() == 0: break\n"
         "kept = [socket.socketpair() for _ in range(28)]\ntime.sleep(9)", "memory"),
        ("while True: print('x' * 999)", "output"),
        ("import os\nfor _ in range(99_999): os.write(1, b'.')", "ok"),
        ("import os\nos.abort()", "killed"),
        ("n = 0\nwhile n := n + 1: open(str(n), 'w').close()", "memory"),
        ("import os, time\nif os.fork() == 0: time.sleep(99)\nprint('parent')", "ok"),
    ],
)  # fmt: skip
def test_a_container_tells_how_its_program_ended(
    source: str, ended: str, standing_in: Sandbox, wait: Wait
) -> None:
    limits = LIMITS if ended == "timeout" else PATIENT
    result: Result = wait(standing_in.run(source, limits=limits))
    assert result.ended == ended, result
    assert result.box.startswith("podman 0.0, image localhost/hermes4-sandbox-test:1 (sha256:0), ")
    assert wait(standing_in.run("import os\nprint(os.listdir())")).stdout == "['main.py']\n"


def test_a_container_takes_input_calls_and_commands(standing_in: Sandbox, wait: Wait) -> None:
    text = "ü\n" * 300_000
    counted = wait(standing_in.run("import sys\nprint(len(sys.stdin.read()))", stdin=text))
    assert (counted.ended, counted.stdout) == ("ok", "600000\n")
    source = "def f(x, y=()):\n    print('called')\n    return [x, 10 // x, y]"
    cases = [Case([5, (1, 2)]), Case([0]), Case([10**30])]
    results: list[Result] = wait(standing_in.run_cases(source, "f", cases))
    assert [result.value for result in results] == [[5, 2, [1, 2]], None, [10**30, 0, []]]
    assert (results[0].stdout, results[1].ended) == ("called\n", "error")
    assert "ZeroDivisionError" in results[1].stderr
    files = {"a/b": bytes(range(256))}
    command = wait(
        standing_in.run_command(["sh", "-c", "wc -c < a/b; cat"], files=files, stdin="x")
    )
    assert command.stdout == "256\nx"


def test_processor_time_is_that_of_dead_and_living(standing_in: Sandbox, wait: Wait) -> None:
    source = "import os\nfor _ in range(2): os.fork()\nwhile True: pass"
    result = wait(standing_in.run(source, limits=Limits(cpu_s=0.6, wall_s=20)))
    assert (result.ended, result.reason) == ("timeout", "used more than 0.6 s of processor time")
    assert 0.6 < result.cpu_s < 20


def test_a_memory_that_hides_is_counted(standing_in: Sandbox, wait: Wait) -> None:
    source = """
import ctypes, os, time
for _ in range(8):
    if os.fork() == 0:
        ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # nobody can look into it
        x = b"1" * (99 << 20)
        time.sleep(9)
time.sleep(9)
"""
    assert wait(standing_in.run(source)).ended == "memory"


def test_a_container_that_dies_is_replaced(stand_in: None, wait: Wait) -> None:
    async def use() -> Result:
        async with Sandbox(workers=1, limits=PATIENT, make_box=box_of("podman")) as sandbox:
            await sandbox.run("")
            before = set(under_us())
            running = asyncio.create_task(sandbox.run("import time\ntime.sleep(1)\nprint(42)"))
            await asyncio.sleep(0.5)
            for pid in before & set(under_us()):  # the one that waited, and now has the job
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return await running

    before = set(under_us())
    assert wait(use()).stdout == "42\n"
    assert set(under_us()) <= before


def test_a_job_that_is_cancelled_ends_with_its_container(stand_in: None, wait: Wait) -> None:
    async def use() -> Result:
        async with Sandbox(workers=1, limits=PATIENT, make_box=box_of("podman")) as sandbox:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(1):
                    await sandbox.run("import time\ntime.sleep(60)")
            return await sandbox.run("print(42)")

    before = set(under_us())
    assert wait(use()).stdout == "42\n"
    assert set(under_us()) <= before


def test_other_limits_are_another_container(standing_in: Sandbox, wait: Wait) -> None:
    less = Limits(memory_bytes=64 << 20, processes=9)
    source = "import resource\nprint(resource.getrlimit(resource.RLIMIT_DATA)[0] >> 20)"
    said = [wait(standing_in.run(source, limits=each)).stdout for each in (less, PATIENT, less)]
    assert said == ["64\n", "256\n", "64\n"]


# Where there is no container, and what its engine is told.


def test_no_engine_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch, wait: Wait) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="there is no docker; install it, or choose another box"):
        wait(Container(0, engine="docker").start())


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 'Cannot connect: is it running?' >&2; exit 1", "docker does not answer: Cannot con"),
        ("[ $1 = version ] && echo 1.0", "docker has no image python; get it: docker pull python"),
        ("[ $1 != run ] && echo 1.0 && exit\necho 'Error: no cgroups' >&2", "Error: no cgroups"),
    ],
)
def test_an_engine_that_fails_says_why(
    script: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wait: Wait
) -> None:
    engine = tmp_path / "docker"
    engine.write_text(f"#!/bin/sh\n{script}\n")
    engine.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(UserError, match=r"^the sandbox cannot start, and nothing is run") as error:
        wait(Container(0, engine="docker", image="python").start())
    assert said in str(error.value)


@pytest.mark.parametrize("name", ["docker", "podman"])
def test_a_container_has_no_network_no_rights_and_no_file_of_the_machine(name: str) -> None:
    engine = Engine("/usr/bin/" + name, name, "1", False, "python", "sha256:1")
    words = run_words(engine, PATIENT, name="box-1", user=60600)
    line = " ".join(words)
    for told in (
        "--rm --interactive --pull never",
        "--network none",
        "--user 60600:60600 --cap-drop all --security-opt no-new-privileges --read-only",
        "--pids-limit 65",
        "--entrypoint /usr/bin/env sha256:1 -i PATH=",
    ):
        assert told in line
    assert words[words.index("--memory") + 1] == words[words.index("--memory-swap") + 1]
    assert line.count("nr_inodes=") == 2
    assert not {"-v", "--volume", "--privileged", "--cap-add"} & set(words)
    assert "bind" not in " ".join(words[: words.index("--entrypoint")])


def test_a_podman_without_root_limits_the_size_of_files() -> None:
    engine = Engine("/usr/bin/podman", "podman", "1", True, "python", "sha256:1")
    words = run_words(engine, PATIENT, name="box-1", user=60600)
    assert f"/tmp:rw,nosuid,nodev,size={PATIENT.file_bytes},mode=1777" in words
