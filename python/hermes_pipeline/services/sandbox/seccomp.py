"""A filter of system calls for x86-64, in the kernel's own small language (classic BPF).

It shrinks what a program can reach of the kernel beyond files, time and its own processes. The
namespaces isolate; this keeps it from making others, and from rarely used parts of the kernel.
"""

from __future__ import annotations

import struct

_LOAD, _AND, _IF_EQUAL, _IF_AT_LEAST, _IF_ANY_BIT, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE = 0, 4  # offsets in struct seccomp_data
_FIRST, _SECOND, _THIRD, _FOURTH = 16, 24, 32, 40
_X86_64 = 0xC000003E
_X32 = 0x40000000  # the first number of the other call table
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_NOT_PERMITTED, _NOT_THERE = 0x00050001, 0x00050026  # EPERM; ENOSYS, on which glibc falls back

_CLONE, _CLONE3, _IOCTL, _SOCKETPAIR, _MMAP, _MADVISE = 56, 435, 16, 53, 9, 28
# Of a process: its limits, its processors, its class and its place in the queue for them.
_OF_A_PROCESS = {
    "prlimit64": 302, "sched_setaffinity": 203, "sched_setscheduler": 144, "sched_setparam": 142,
    "sched_setattr": 314,
}  # fmt: skip
_NEW_NAMESPACES = 0x7E020000  # CLONE_NEW*: mount, cgroup, uts, ipc, user, pid and net
_TYPE_INTO_TERMINAL = 0x5412  # TIOCSTI
_AF_UNIX = 1
_SHARED_OF_NO_FILE, _HUGE_PAGES = 0x21, 0x40000  # MAP_SHARED | MAP_ANONYMOUS, MAP_HUGETLB
_PAGE_OUT = 21  # MADV_PAGEOUT

DENIED = {
    # Other namespaces and other roots.
    "unshare": 272, "setns": 308, "chroot": 161, "pivot_root": 155, "mount": 165, "umount2": 166,
    "move_mount": 429, "open_tree": 428, "fsopen": 430, "fsconfig": 431, "fsmount": 432,
    "fspick": 433, "mount_setattr": 442, "open_tree_attr": 467,
    # Other processes.
    "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312,
    "pidfd_getfd": 438, "process_madvise": 440, "move_pages": 279, "migrate_pages": 256,
    "setpriority": 141, "ioprio_set": 251,
    # The network, and queues and memory that no limit counts.
    "socket": 41, "bind": 49, "setsockopt": 54, "mq_open": 240, "shmget": 29, "semget": 64,
    "msgget": 68, "memfd_create": 319, "memfd_secret": 447, "io_setup": 206,
    "inotify_init": 253, "inotify_init1": 294,
    # Pipes and sockets that hold pages by a single byte of each.
    "vmsplice": 278, "splice": 275, "tee": 276, "sendfile": 40,
    # Parts of the kernel with a history.
    "bpf": 321, "keyctl": 250, "add_key": 248, "request_key": 249, "io_uring_setup": 425,
    "io_uring_enter": 426, "io_uring_register": 427, "userfaultfd": 323, "perf_event_open": 298,
    "fanotify_init": 300, "open_by_handle_at": 304, "name_to_handle_at": 303, "modify_ldt": 154,
    "personality": 135, "vhangup": 153, "lookup_dcookie": 212, "uselib": 134,
    # The machine.
    "kexec_load": 246, "kexec_file_load": 320, "init_module": 175, "finit_module": 313,
    "delete_module": 176, "reboot": 169, "swapon": 167, "swapoff": 168, "acct": 163,
    "quotactl": 179, "quotactl_fd": 443, "syslog": 103, "iopl": 172, "ioperm": 173,
}  # fmt: skip


def build_filter() -> bytes:
    """The filter as an array of `struct sock_filter`: all is allowed but what is denied here."""
    code = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_IF_EQUAL, 1, 0, _X86_64),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_IF_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _KILL),
        # Its flags lie in memory, where a filter cannot look; clone's do not.
        (_IF_EQUAL, 0, 1, _CLONE3),
        (_RETURN, 0, 0, _NOT_THERE),
        *_deny_when(_CLONE, _FIRST, (_IF_ANY_BIT, 0, 1, _NEW_NAMESPACES)),
        *_deny_when(_IOCTL, _SECOND, (_IF_EQUAL, 0, 1, _TYPE_INTO_TERMINAL)),
        # asyncio wakes itself through a pair of Unix sockets.
        *_deny_when(_SOCKETPAIR, _FIRST, (_IF_EQUAL, 1, 0, _AF_UNIX)),
        # Memory that no process shows: shared, all of it stays while a page of it is mapped.
        *_deny_when(
            _MMAP,
            _FOURTH,
            (_AND, 0, 0, _SHARED_OF_NO_FILE),
            (_IF_EQUAL, 0, 1, _SHARED_OF_NO_FILE),
        ),
        *_deny_when(_MMAP, _FOURTH, (_IF_ANY_BIT, 0, 1, _HUGE_PAGES)),
        *_deny_when(_MADVISE, _THIRD, (_IF_EQUAL, 0, 1, _PAGE_OUT)),
    ]
    for number in _OF_A_PROCESS.values():  # the caller's own are 0
        code += _deny_when(number, _FIRST, (_IF_EQUAL, 1, 0, 0))
    for number in DENIED.values():
        code += [(_IF_EQUAL, 0, 1, number), (_RETURN, 0, 0, _NOT_PERMITTED)]
    code.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def _deny_when(
    number: int, argument: int, *test: tuple[int, int, int, int]
) -> list[tuple[int, int, int, int]]:
    """Deny a call where ``test`` of the low half of its argument goes to the next instruction."""
    return [
        (_IF_EQUAL, 0, 3 + len(test), number),
        (_LOAD, 0, 0, argument),
        *test,
        (_RETURN, 0, 0, _NOT_PERMITTED),
        (_LOAD, 0, 0, _NUMBER),
    ]
