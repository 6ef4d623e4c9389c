"""A Ray cluster of several nodes on this machine, in processes of its own: `Nodes`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from running import comes_true, processes_of

MEMORY_BYTES = 80 << 20  # of each node's object store
VARIABLES = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_IMPORT_WARNING": "1"}


class Nodes:
    """The cluster, for the time of a `with` block; the first node is the head.

    Attributes:
        address: where it is to be found.
    """

    def __init__(self, count: int, *, cpus: int = 1) -> None:
        self._count, self._cpus = count, cpus
        # Short: Ray puts sockets there, whose paths have a limit.
        self._folder = tempfile.TemporaryDirectory(prefix="ray", dir="/tmp")
        self._mark = f"HERMES4_TEST_RAY={self._folder.name}"
        self.address = ""

    def __enter__(self) -> Nodes:
        name, _, value = self._mark.partition("=")
        # The head also writes its address under Ray's usual folder, which nobody may have made yet.
        Path(self._folder.name, "ray").mkdir()
        usual = {"RAY_TMPDIR": self._folder.name}
        words = [sys.executable, __file__, str(self._count), str(self._cpus), self._folder.name]
        self._owner = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | VARIABLES | usual | {name: value},
        )
        assert self._owner.stdout is not None
        try:
            told = json.loads(self._owner.stdout.readline())
        except BaseException:  # the time of a test, for one
            self.__exit__()
            raise
        self.address, self._raylets = told["address"], told["raylets"]
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._owner.communicate(timeout=30)
        for pid in processes_of(self._mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._owner.wait(10)
        assert comes_true(lambda: not processes_of(self._mark), 10)
        self._folder.cleanup()

    def kill(self, number: int) -> None:
        """End a node as a lost machine does: its raylet and all its workers, at once."""
        raylet = self._raylets[number]
        for pid in [raylet, *_children(raylet)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def workers(self, number: int) -> int:
        """How many actors run on a node."""
        raylet = self._raylets[number]
        return sum("ray::_Worker" in words for words in map(_words, _children(raylet)))


def _children(pid: int) -> list[int]:
    return list(map(int, _read(f"/proc/{pid}/task/{pid}/children").split()))


def _words(pid: int) -> str:
    return _read(f"/proc/{pid}/cmdline")


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:  # it has ended
        return ""


def _own(count: int, cpus: int, folder: str) -> None:
    """Start the nodes, say where they are, and end them when standard input ends."""
    from ray.cluster_utils import Cluster

    options = {"num_cpus": cpus, "object_store_memory": MEMORY_BYTES, "include_dashboard": False}
    head = options | {"temp_dir": folder}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        nodes = [cluster.head_node, *(cluster.add_node(**options) for _ in range(count - 1))]
        cluster.wait_for_nodes()
        raylets = [node.all_processes["raylet"][0].process.pid for node in nodes]
        sys.stdout.write(json.dumps({"address": cluster.address, "raylets": raylets}) + "\n")
        sys.stdout.flush()
        sys.stdin.read()
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    _own(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
