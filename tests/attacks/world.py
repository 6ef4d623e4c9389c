"""What attacks aim at, and what must be true after each. The standard library alone.

As a program it runs every attack and prints what went wrong: one line each, and a last one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

from attacks.attack import LEAK, Attack
from attacks.programs import ATTACKS
from hermes_pipeline.services.sandbox import Job, Limits, Result, Sandbox
from hermes_pipeline.services.sandbox.wire import FIRST_USER

Wait = Callable[[Coroutine[Any, Any, Any]], Any]  # runs to the end, always in the same loop
Look = Callable[[], dict[int, int]]  # bytes of memory, by id, of the processes of a box

LIMITS = Limits(wall_s=0.9, cpu_s=0.5, memory_bytes=256 << 20, output_bytes=256 << 10)
PATIENT = replace(LIMITS, wall_s=10, cpu_s=5)
MOST_BYTES = 8 * LIMITS.memory_bytes  # of all processes of a run, also where the watch is late
SHARED_BYTES = 12 << 20  # of a process forked from the warm one, at least
STRAY = Path("/usr/lib/pwn_sandbox")


class World:
    """Servers, a secret, an open file and a folder: all within an attack's reach, but for a box."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="sandbox-")))
        folder.chmod(0o777)
        self.secret, self.marker = folder / "secret.txt", folder / "marker"
        self.secret.write_text(LEAK)
        self.marker.mkdir()
        self.marker.chmod(0o777)
        # Inherited by everything that does not close it.
        self._open = self._stack.enter_context(self.secret.open())
        os.set_inheritable(self._open.fileno(), True)
        os.environ["SANDBOX_TEST_KEY"] = LEAK
        self._stack.callback(os.environ.pop, "SANDBOX_TEST_KEY")
        self.at = {
            "port": self._serve(),
            "secret": self.secret,
            "marker": self.marker,
            "pid": os.getpid(),
        }

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _serve(self) -> int:
        """Tell the secret to whoever comes, by TCP, UDP and an abstract socket."""
        tcp = socket.create_server(("127.0.0.1", 0))
        port = int(tcp.getsockname()[1])
        abstract = socket.socket(socket.AF_UNIX)
        abstract.bind(f"\0sandbox_test_{port}")
        abstract.listen()
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.bind(("127.0.0.1", port))

        def welcome(server: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while True:
                    guest, _ = server.accept()
                    with guest:
                        guest.send(LEAK.encode())

        def answer() -> None:
            with contextlib.suppress(OSError):
                while guest := udp.recvfrom(99)[1]:
                    udp.sendto(LEAK.encode(), guest)

        for work, given in ((welcome, (tcp,)), (welcome, (abstract,)), (answer, ())):
            threading.Thread(target=work, args=given, daemon=True).start()
        for server in (tcp, abstract, udp):
            self._stack.callback(server.close)
            # Closing alone does not wake a thread that waits.
            self._stack.callback(_shut, server)
        return port

    def complaints(self) -> list[str]:
        """What an attack has changed outside."""
        said = []
        if self.secret.read_text() != LEAK:
            said.append("the secret was changed")
        if list(self.marker.iterdir()) or STRAY.exists():
            said.append("a file was written outside")
        return said


class Watch(threading.Thread):
    """The most memory and processes of a box, seen every 10 ms."""

    def __init__(self, look: Look) -> None:
        super().__init__(daemon=True)
        self._look = look
        self.most_bytes = self.most_processes = 0
        self._ended = threading.Event()

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()

    def run(self) -> None:
        """Look until the end."""
        while not self._ended.wait(0.01):
            family = self._look()
            self.most_processes = max(self.most_processes, len(family))
            own_bytes = sum(max(0, each - SHARED_BYTES) for each in family.values())
            self.most_bytes = max(self.most_bytes, own_bytes)


def family_of(pid: int) -> dict[int, int]:
    """Bytes of memory, by id, of every process below one; what they share counts in each."""
    parents, used = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            values = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if values:
            parents[int(path.parent.name)] = int(values[1])
            used[int(path.parent.name)] = int(values[21]) << 12
    family, added = {pid}, {pid}
    while added:
        added = {child for child, parent in parents.items() if parent in added}
        family |= added
    return {each: used[each] for each in family - {pid} if each in used}


def under_us() -> dict[int, int]:
    """Every process below this one."""
    return family_of(os.getpid())


def in_containers() -> dict[int, int]:
    """Every process of a box of containers, but the first of each."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            status, values = (path / "status").read_text(), (path / "stat").read_text()
        except OSError:
            continue
        facts = dict(line.split(":", 1) for line in status.splitlines())
        user, level = int(facts["Uid"].split()[0]), facts["NSpid"].split()[-1]
        if user // 100 == FIRST_USER // 100 and level != "1":
            found[int(path.name)] = int(values.rpartition(")")[2].split()[21]) << 12
    return found


def attack(
    one: Attack, world: World, sandbox: Sandbox, wait: Wait, look: Look = under_us
) -> list[str]:
    """Run an attack, then an honest program in the same box; return what was wrong."""

    # Only what must run into a limit of time is given little; a machine may be busy.
    limits = LIMITS if "timeout" in one.ended.split() else PATIENT

    def run(job: Job) -> Result:
        result: Result = wait(sandbox.run_job(job))
        return result

    assert run(Job(PATIENT, source="print(1)")).stdout == "1\n"  # the box is warm
    before = set(look())
    with Watch(look) as watch:
        result = run(Job(limits, one.stdin, one.aimed(world.at)))
    wrong = world.complaints()
    said = result.stdout + result.stderr
    if result.ended not in one.ended.split():
        wrong.append(f"ended {result.ended}, not {one.ended}")
    if one.code is not None and result.exit_code != one.code:
        wrong.append(f"exit code {result.exit_code}, not {one.code}")
    if one.says not in result.stdout:
        wrong.append(f"does not say {one.says!r}")
    if LEAK in said or "DONE" in result.stdout:
        wrong.append("it got what it wanted")
    if max(len(result.stdout), len(result.stderr)) > limits.output_bytes:
        wrong.append("more output than allowed")
    if result.cpu_s > 6 * limits.cpu_s or result.wall_s > limits.wall_s + 4:
        wrong.append(f"took {result.cpu_s:.1f} CPU s, {result.wall_s:.1f} s")
    if watch.most_bytes > MOST_BYTES or watch.most_processes > limits.processes + 9:
        wrong.append(f"{watch.most_bytes >> 20} MiB in {watch.most_processes} processes")
    left = set(look()) - before
    if left:
        wrong.append(f"left processes {left}")
    after = run(Job(PATIENT, b"21", HONEST))
    if after.stdout != "42 ['main.py']\n":
        wrong.append(f"the next run gives {after}")
    if set(look()) != before:
        wrong.append("the box was started anew")
    return [f"{one.name}: {line}: {result}" for line in wrong]


HONEST = """
import os, re
from collections import Counter
assert re.fullmatch("a+", "aaa") and Counter("aab")["a"] == 2
print(2 * int(input()), os.listdir())
"""


def run_outside(one: Attack, world: World) -> str:
    """What an attack says without a box: the control, for those that only look."""
    command = [sys.executable, "-I", "-c", one.aimed(world.at)]
    return subprocess.run(
        command,
        cwd=world.secret.parent,
        capture_output=True,
        text=True,
        close_fds=False,
        timeout=30,
        check=False,
    ).stdout


def _shut(server: socket.socket) -> None:
    with contextlib.suppress(OSError):
        server.shutdown(socket.SHUT_RDWR)


def main() -> None:
    """Run every attack."""
    with World() as world, asyncio.Runner() as runner:
        sandbox = Sandbox(workers=1)
        for one in ATTACKS:
            sys.stdout.writelines(f"{x}\n" for x in attack(one, world, sandbox, runner.run))
        runner.run(sandbox.__aexit__(None, None, None))
    sys.stdout.write(f"{len(ATTACKS)} attacks by user {os.getuid()}\n")


if __name__ == "__main__":
    main()
