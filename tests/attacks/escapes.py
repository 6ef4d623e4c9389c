"""Programs that reach for the host's processes, the network, or other rights."""

from __future__ import annotations

from attacks.attack import QUIETLY, Attack

LIBC = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
def call(name, number, *arguments):
    outcome = libc.syscall(number, *arguments)
    print(name, outcome if outcome < 0 else "DONE", os.strerror(ctypes.get_errno()))
"""

ESCAPES = [
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
all = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
code = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=all)
code.write(b"\\xb8\\x14\\x00\\x00\\x00\\xcd\\x80\\xc3")
place = ctypes.addressof(ctypes.c_char.from_buffer(code))
print("DONE", ctypes.CFUNCTYPE(ctypes.c_int)(place)())
""",
        "killed",
        code=-31,
    ),
]
