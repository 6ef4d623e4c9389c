"""Programs that hold memory where it shows in none of their processes."""

from __future__ import annotations

from attacks.attack import Attack
from attacks.escapes import LIBC

_OUT_OF_SIGHT = (
    *("shared", "shared_and_validated", "huge", "paged_out", "vmsplice", "splice", "tee"),
    *("sendfile", "setsockopt", "bind", "inotify", "inotify1"),
)

HOARDS = [
    Attack(
        "memory_out_of_sight",
        LIBC
        + """
import mmap
own = mmap.mmap(-1, 1 << 12, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
at = ctypes.c_long(ctypes.addressof(ctypes.c_char.from_buffer(own)))
call("shared", 9, 0, 1 << 21, 3, 0x21, -1, 0)
call("shared_and_validated", 9, 0, 1 << 21, 3, 0x23, -1, 0)
call("huge", 9, 0, 1 << 21, 3, 0x40022, -1, 0)
call("paged_out", 28, at, 1 << 12, 21)
call("vmsplice", 278, -1, 0, 0, 0)
call("splice", 275, -1, 0, -1, 0, 1, 0)
call("tee", 276, -1, -1, 1, 0)
call("sendfile", 40, -1, -1, 0, 1)
call("setsockopt", 54, -1, 1, 7, 0, 0)
call("bind", 49, -1, 0, 0)
call("inotify", 253)
call("inotify1", 294, 0)
""",
        says="".join(f"{name} -1 Operation not permitted\n" for name in _OUT_OF_SIGHT),
    ),
    Attack(
        "first_threads_that_end",
        """
import ctypes, os, threading, time
def hold():
    time.sleep(0.2)  # until the first thread has ended
    x = b"1" * (100 << 20)
    time.sleep(30)
for _ in range(4):
    if os.fork() == 0:
        threading.Thread(target=hold).start()
        ctypes.CDLL(None).syscall(60, 0)
time.sleep(30)
""",
        "memory",
    ),
    Attack(
        "unread_messages",
        """
import contextlib, os, socket, time
for _ in range(40):
    if os.fork() == 0:
        kept = []
        for _ in range(28):
            kept += socket.socketpair()
            for each in kept[-2:]:
                each.setblocking(False)
                with contextlib.suppress(OSError):
                    while True: each.send(bytes(1 << 16))
        time.sleep(30)
time.sleep(30)
""",
        "memory",
    ),
    # Not of containers, which have the engine's /dev, and its limit on all memory.
    Attack(
        "zero_as_memory",
        "import mmap, os\nmmap.mmap(os.open('/dev/zero', os.O_RDWR), 1 << 20)\nprint('DONE')",
        "error",
        code=1,
    ),
]
