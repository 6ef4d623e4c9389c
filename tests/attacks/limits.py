"""Programs that eat time, processes or memory."""

from __future__ import annotations

from attacks.attack import Attack

OVER_LIMITS = [
    # Time.
    Attack("infinite_loop", "while True: pass", "timeout"),
    Attack("sleep_forever", "import time\ntime.sleep(1000)", "timeout"),
    Attack(
        "ignore_signals",
        """
import contextlib, signal
for number in range(1, 65):
    with contextlib.suppress(Exception):
        signal.signal(number, signal.SIG_IGN)
while True: pass
""",
        "timeout",
    ),
    Attack("a_loop_in_c", "import re\nre.match('(a+)+$$', 'a' * 40 + 'b')", "timeout"),
    Attack("a_large_power", "print(9**9**9)", "timeout memory"),
    Attack(
        "time_spread_over_children",
        "import os\nfor _ in range(3): os.fork()\nwhile True: pass",
        "timeout",
    ),
    Attack(
        "stop_every_process",
        "import os, signal, time\nif os.fork() == 0: time.sleep(9)\nos.kill(-1, signal.SIGSTOP)\n"
        "os.kill(os.getpid(), signal.SIGSTOP)",
        "timeout",
    ),
    Attack(
        "stdout_closed_early",
        "import os, time\nos.close(1); os.close(2)\ntime.sleep(99)",
        "timeout",
    ),
    # Processes.
    Attack(
        "fork_bomb",
        """
import os, time
while True:
    try: os.fork()
    except OSError: time.sleep(0.01)
""",
        "timeout memory",
    ),
    Attack(
        "zombie_flood",
        """
import os
made = 0
try:
    while True:
        if os.fork() == 0: os._exit(0)
        made += 1
except OSError: print("made", made <= 64)
""",
        says="made True",
    ),
    Attack(
        "thread_bomb",
        """
import threading, time
made = 0
try:
    while True:
        threading.Thread(target=time.sleep, args=(9,), daemon=True).start()
        made += 1
except RuntimeError: print("made", made <= 64)
""",
        says="made True",
    ),
    Attack(
        "daemonize",
        """
import contextlib, os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for file in range(3):
            with contextlib.suppress(OSError): os.close(file)
        time.sleep(600)
    os._exit(0)
print("parent done")
""",
        says="parent done",
    ),
    Attack(
        "an_orphan_keeps_stdout",
        "import os, time\nif os.fork() == 0:\n    time.sleep(600)\nprint('parent done')",
        says="parent done",
    ),
    Attack(
        "kill_parent",
        """
import os, signal
for pid in (os.getppid(), 1, $pid):
    for number in range(1, 65):
        try: os.kill(pid, number)
        except OSError as error: said = error
print("still here")
raise SystemExit(7)
""",
        "error",
        says="still here",
        code=7,
    ),
    # Memory.
    Attack("mem_bomb", "x = []\nwhile True: x.append(bytearray(50 << 20))", "memory"),
    Attack(
        "mem_bomb_multi",
        """
import os, time
for _ in range(12):
    if os.fork() == 0:
        x = bytearray(200 << 20)
        for at in range(0, len(x), 4096): x[at] = 1
        time.sleep(30)
time.sleep(30)
""",
        "memory",
    ),
    Attack(
        "shared_memory",
        "import mmap\nx = mmap.mmap(-1, 1 << 30)\nfor at in range(0, 1 << 30, 4096): x[at] = 1",
        "error",
        code=1,
    ),
    Attack(
        "page_tables",
        """
import mmap
UNCOUNTED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000
x = mmap.mmap(-1, 1 << 40, flags=UNCOUNTED, prot=mmap.PROT_READ)
print("DONE", sum(x[at] for at in range(0, 1 << 33, 1 << 21)))
""",
        "error",
        code=1,
    ),
    Attack(
        "files_in_memory",
        "import os\nfile = os.memfd_create('x')\nwhile True: os.write(file, bytes(1 << 20))",
        "error",
        code=1,
    ),
    Attack(
        "raise_a_limit",
        """
import resource
for kind in (resource.RLIMIT_DATA, resource.RLIMIT_NPROC, resource.RLIMIT_CPU):
    try: resource.setrlimit(kind, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    except (ValueError, OSError) as error: print("refused")
    else: print("DONE")
""",
        says="refused\nrefused\nrefused",
    ),
    Attack(
        "deep_recursion",
        "import sys\nsys.setrecursionlimit(10**9)\n"
        "class A:\n    def __repr__(self): return repr(self)\nrepr(A())",
        "killed memory timeout",
    ),
    Attack("deep_source", "eval('(' * 100_000 + ')' * 100_000)", "error killed memory"),
]
