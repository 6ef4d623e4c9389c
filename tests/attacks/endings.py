"""Programs that flood their output, touch what runs them, or lie about how they ended."""

from __future__ import annotations

from attacks.attack import Attack

ENDINGS = [
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
