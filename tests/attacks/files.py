"""Programs that fill the disk, write outside, or read what is not theirs."""

from __future__ import annotations

from attacks.attack import QUIETLY, Attack

FILES = [
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
]
