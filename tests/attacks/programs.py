"""Programs that try to get out, to stay, to eat the machine, or to lie about how they ended.

The standard library alone: they run as another user, by another Python, too. ``$port``,
``$secret``, ``$marker`` and ``$pid`` stand for a server, a file, a folder and a process outside.
"""

from __future__ import annotations

from dataclasses import dataclass
from string import Template

LEAK = "TOPSECRET"


@dataclass(frozen=True)
class Attack:
    """A program, how its run must end, and what it must have said."""

    name: str
    source: str
    ended: str = "ok"  # several, where the kernel and the watch race
    says: str = ""
    code: int | None = None
    stdin: bytes = b""
    leaks_outside: bool = False  # without a box it finds what it looks for: the control

    def aimed(self, at: dict[str, object]) -> str:
        """The program with the names of what is outside."""
        return Template(self.source).safe_substitute(at)


QUIETLY = "import contextlib, os\nwith contextlib.suppress(Exception):\n    "
LIBC = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def call(name, number, *arguments):
    outcome = libc.syscall(number, *arguments)
    print(name, outcome if outcome < 0 else "DONE", os.strerror(ctypes.get_errno()))
"""

ATTACKS = [
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
        "memory",
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
    # Files.
    Attack(
        "disk_fill",
        """
made = 0
try:
    for number in range(8):
        with open(f"big{number}", "wb") as file:
            for _ in range(20): made += file.write(bytes(1 << 20))
except OSError: print("made", made <= 64 << 20)
""",
        says="made True",
    ),
    Attack(
        "shm_fill",
        """
made = 0
try:
    with open("/dev/shm/x", "wb") as file:
        while True: made += file.write(bytes(1 << 20))
except OSError: print("made", made <= 64 << 20)
""",
        says="made True",
    ),
    Attack(
        "many_files",
        """
made = 0
try:
    while True:
        open(f"f{made}", "w").close()
        made += 1
except OSError: print("made", 1000 < made <= 4096)
""",
        says="made True",
    ),
    Attack("sparse_file", "open('x', 'wb').truncate(1 << 40)", "error", code=1),
    Attack("write_host_tmp", QUIETLY + "open('$marker/pwn', 'w').write('x')"),
    Attack("write_usr", QUIETLY + "open('/usr/lib/pwn_sandbox', 'w').write('x')"),
    Attack(
        "write_root_and_devices",
        """
for path in ("/x", "/dev/x", "/etc/x", "/dev/fd/9", "/proc/sys/net/ipv4/ip_default_ttl",
             "/proc/sys/kernel/hostname", "/proc/self/uid_map"):
    try:
        with open(path, "w") as file: file.write("1")
    except OSError: print("refused")
    else: print("DONE")
""",
        says="refused\n" * 7,
    ),
    Attack(
        "let_others_be_ended_first",
        "with open('/proc/self/oom_score_adj', 'w') as file: file.write('1')\nprint('DONE')",
        "error",
        code=1,
    ),
    Attack(
        "read_etc_passwd",
        "print('TOP' + 'SECRET' if 'root:' in open('/etc/passwd').read() else '')",
        "error",
        leaks_outside=True,
    ),
    Attack("read_secret", "print(open('$secret').read())", "error", leaks_outside=True),
    Attack(
        "list_folder",
        "import os\nprint('TOP' + 'SECRET' if os.listdir('$marker/..') else '')",
        "error",
        leaks_outside=True,
    ),
    Attack(
        "symlink_escape",
        "import os\nos.symlink('$secret', 'out.txt')\n"
        "try: print(open('out.txt').read())\nfinally: os.unlink('out.txt')",
        "error",
        leaks_outside=True,
    ),
    Attack(
        "dotdot_escape",
        "print(open('../../../../../../..$secret').read())",
        "error",
        leaks_outside=True,
    ),
    Attack(
        "proc_root_escape",
        """
import contextlib, glob
for path in glob.glob("/proc/[0-9]*/root") + glob.glob("/proc/[0-9]*/cwd"):
    for way in ("", "/../../../../../.."):
        with contextlib.suppress(OSError): print(open(path + way + "$secret").read())
""",
        leaks_outside=True,
    ),
    # The host's processes and environment.
    Attack("env_secret", "import os\nprint(dict(os.environ))", leaks_outside=True),
    Attack(
        "parent_environ",
        """
import contextlib, glob
for path in glob.glob("/proc/[0-9]*/environ") + glob.glob("/proc/[0-9]*/cmdline"):
    with contextlib.suppress(OSError): print(open(path, "rb").read().decode("latin-1"))
""",
        leaks_outside=True,
    ),
    Attack(
        "fd_leak",
        """
import os
for file in range(3, 2000):
    try: print(file, os.pread(file, 100, 0))
    except OSError: pass
""",
        leaks_outside=True,
    ),
    Attack("only_own_processes", "import glob\nprint(len(glob.glob('/proc/[0-9]*')))", says="2\n"),
    Attack(
        "ptrace",
        LIBC + "for pid in (1, os.getppid(), $pid): call('attach', 101, 16, pid, 0, 0)",
        says="attach -1",
    ),
    Attack(
        "memory_of_the_first_process",
        """
for name in ("mem", "maps", "environ", "fd/200", "fd/201", "root/", "ns/pid", "exe"):
    try: open("/proc/1/" + name, "rb").read(1)
    except OSError: print("refused")
    else: print("DONE", name)
""",
        says="refused\n" * 8,
    ),
    Attack(
        "slow_the_watch",
        """
import os, resource
for change in (
    lambda: resource.prlimit(1, resource.RLIMIT_CPU, (0, 0)),
    lambda: os.sched_setaffinity(1, {0}),
    lambda: os.sched_setscheduler(1, os.SCHED_IDLE, os.sched_param(0)),
    lambda: os.setpriority(os.PRIO_USER, 0, 19),
):
    try: change()
    except OSError: print("refused")
    else: print("DONE")
""",
        says="refused\n" * 4,
    ),
    # The network.
    Attack(
        "net_loopback",
        "import socket\nprint(socket.create_connection(('127.0.0.1', $port), 3).recv(99).decode())",
        "error",
        leaks_outside=True,
    ),
    Attack(
        "net_abstract_unix",
        "import socket\nlink = socket.socket(socket.AF_UNIX)\n"
        "link.connect('\\0sandbox_test_$port')\nprint(link.recv(99).decode())",
        "error",
        leaks_outside=True,
    ),
    Attack(
        "net_udp",
        "import socket\nlink = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "link.settimeout(3)\nlink.sendto(b'hi', ('127.0.0.1', $port))\n"
        "print(link.recv(99).decode())",
        "error",
        leaks_outside=True,
    ),
    Attack(
        "net_by_socketpair",
        "import socket\nfor family in (socket.AF_INET, socket.AF_NETLINK):\n"
        "    try: socket.socketpair(family); print('DONE')\n"
        "    except OSError as error: print(error.errno)",
        says="1\n1\n",
    ),
    # Other rights.
    Attack(
        "unshare_mount",
        LIBC
        + """
call("user", 272, 0x10000000)
call("mounts", 272, 0x20000)
call("clone", 56, 0x10000011, 0, 0, 0, 0)
call("clone3", 435, bytes(88), 88)
call("mount", 165, b"none", b"/tmp", b"tmpfs", 0, 0)
call("remount", 165, b"none", b"/usr", b"", 32, 0)
call("umount", 166, b"/proc", 2)
call("chroot", 161, b"/tmp")
call("fsopen", 430, b"tmpfs", 0)
""",
        says="fsopen -1",
    ),
    Attack(
        "setns",
        LIBC + "for kind in ('pid', 'mnt', 'net', 'user'):\n"
        "    call(kind, 308, os.open('/proc/self/ns/' + kind, os.O_RDONLY), 0)",
        says="user -1",
    ),
    Attack(
        "io_uring",
        LIBC + "call('io_uring', 425, 8, bytes(256))\ncall('bpf', 321, 0, bytes(120), "
        "120)\ncall('keyctl', 250, 0, -3, 1)\ncall('perf', 298, bytes(120), 0, -1, -1, 0)",
        says="perf -1",
    ),
    Attack(
        "setuid_root", "import os\nos.setresuid(0, 0, 0)\nprint(open('$secret').read())", "error"
    ),
    Attack("other_uid", QUIETLY + "os.setuid(1)\n    print('DONE')"),
    Attack(
        "make_a_device", "import os\nos.mknod('disk', 0o60777, os.makedev(259, 0))", "error", code=1
    ),
    Attack(
        "setuid_programs",
        """
import subprocess
for command in (["su", "-c", "id"], ["mount", "-t", "tmpfs", "x", "/tmp"], ["unshare", "-r", "id"]):
    try: print(subprocess.run(command, capture_output=True).returncode == 0)
    except OSError: print("False")
""",
        says="False\nFalse\nFalse\n",
    ),
    Attack(
        "filter_outlives_exec",
        "import os, sys\nos.execv(sys.executable, ['python', '-S', '-c', "
        "'import _socket; _socket.socket()'])",
        "error",
        code=1,
    ),
    Attack("the_other_call_table", LIBC + "call('x32', 0x40000000 + 39)", "killed", code=-31),
    Attack(
        "calls_of_32_bits",
        """
import ctypes, mmap
code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
code.write(b"\\xb8\\x14\\x00\\x00\\x00\\xcd\\x80\\xc3")
place = ctypes.addressof(ctypes.c_char.from_buffer(code))
print("DONE", ctypes.CFUNCTYPE(ctypes.c_int)(place)())
""",
        "killed",
        code=-31,
    ),
    # Output, and what is said of the end.
    Attack("output_flood", "import sys\nwhile True: sys.stdout.write('A' * (1 << 20))", "output"),
    Attack("stderr_flood", "import sys\nwhile True: sys.stderr.write('A' * (1 << 20))", "output"),
    Attack("output_flood_and_leave", "print('A' * (300 << 10))", "output"),
    Attack("huge_stdin_unread", "print('done')", says="done", stdin=b"x" * (40 << 20)),
    Attack(
        "write_into_stdin",
        "import os\ntry: os.pwrite(0, b'zzz', 0)\nexcept OSError: pass\nprint(open(0).read())",
        says="given",
        stdin=b"given",
    ),
    Attack(
        "garbage_to_every_fd",
        """
import os
for file in range(3, 4000):
    try: os.write(file, b'{"code": 0}\\n'); print("DONE", file)
    except OSError: pass
raise SystemExit(9)
""",
        "error",
        code=9,
    ),
    Attack("look_like_a_signal", "raise SystemExit(137)", "error", code=137),
    Attack(
        "patch_the_runner",
        """
import os, sys, builtins, json, threading
os._exit = lambda code: None
os.write = os.close = os.fork = json.dumps = threading._shutdown = lambda *given: 0
sys.exit(5)
""",
        "error timeout",
    ),
    Attack(
        "stay_in_the_warm_process",
        """
import builtins, contextlib, gc, os, random, socket, sys
sys.modules["re"] = sys.modules["collections"] = None
builtins.print = builtins.len = os.fork = lambda *given: 0
for thing in gc.get_objects():
    if type(thing).__name__ == "Zygote": thing.run = None
open("/tmp/sitecustomize.py", "w").write("x")
open("/dev/shm/left", "w").write("x")
with contextlib.suppress(PermissionError): os.chmod("/tmp", 0)
os.chdir("/")
sys.stdout.write("tried")
""",
        says="tried",
    ),
]

# Of each kind some, for boxes in which all of them would take minutes.
REPRESENTATIVE = (
    *("infinite_loop", "stop_every_process", "fork_bomb", "zombie_flood", "daemonize"),
    *("kill_parent", "mem_bomb_multi", "many_files", "write_root_and_devices", "read_secret"),
    *("memory_of_the_first_process", "slow_the_watch", "net_abstract_unix", "unshare_mount"),
    *("the_other_call_table", "output_flood", "huge_stdin_unread", "garbage_to_every_fd"),
)
