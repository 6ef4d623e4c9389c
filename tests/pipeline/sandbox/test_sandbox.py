"""What the sandbox gives to honest programs."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from attacks.world import PATIENT, Wait
from hermes_pipeline.services.sandbox import Case, Limits, Result, Sandbox

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(60)]

NEAR_THE_LIMITS = {
    "memory": ("x = bytearray(180 << 20)\nprint(len(x) >> 20)", "180"),
    "processes": (
        "import os\nfor _ in range(50):\n    if os.fork() == 0: os._exit(0)\n"
        "for _ in range(50): os.wait()\nprint('all')",
        "all",
    ),
    "many processes at once": (
        "import os, time\nfor _ in range(40):\n    if os.fork() == 0:\n        time.sleep(0.2)\n"
        "        os._exit(0)\nfor _ in range(40): os.wait()\nprint('all')",
        "all",
    ),
    "threads": (
        "from concurrent.futures import ThreadPoolExecutor\nimport time\n"
        "with ThreadPoolExecutor(8) as pool: print(sum(pool.map(lambda n: time.sleep(0.02) or n, "
        "range(16))))",
        "120",
    ),
    "a pool of processes": (
        "import math\nfrom multiprocessing import Pool\n"
        "with Pool(2) as pool: print(sum(pool.map(math.sqrt, [4, 9])))",
        "5.0",
    ),
    "memory that processes share": (
        "from multiprocessing import Array, Process\n"
        "from multiprocessing.shared_memory import SharedMemory\n"
        "counts, text = Array('i', 1 << 20), SharedMemory(create=True, size=1 << 20)\n"
        "def fill():\n    counts[9], text.buf[:2] = 42, b'ab'\n"
        "child = Process(target=fill)\nchild.start()\nchild.join()\n"
        "print(counts[9], bytes(text.buf[:2]))\ntext.unlink()",
        "42 b'ab'",
    ),
    "memory of a map": (
        "import mmap\nmap = mmap.mmap(-1, 9, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n"
        "map[:2] = b'ab'\nprint(map[:3])",
        "b'ab\\x00'",
    ),
    "messages between processes": (
        "import os, socket\npairs = [socket.socketpair() for _ in range(25)]\n"
        "if os.fork() == 0:\n    for _, end in pairs: end.send(b'x')\n    os._exit(0)\n"
        "print(sum(len(end.recv(9)) for end, _ in pairs))",
        "25",
    ),
    "asyncio": ("import asyncio\nprint(asyncio.run(asyncio.sleep(0.01, 'slept')))", "slept"),
    "a file": (
        "open('x', 'wb').write(bytes(50 << 20))\nimport os\nprint(os.stat('x').st_size >> 20)",
        "50",
    ),
    "files": (
        "import os\nfor n in range(3000): open(str(n), 'w').close()\nprint(len(os.listdir()))",
        "3001",
    ),
    "output": ("print('x' * (200 << 10))", "x" * (200 << 10)),
    "recursion": (
        "import sys\nfrom functools import cache\nsys.setrecursionlimit(10**6)\n@cache\n"
        "def f(n): return n and 1 + f(n - 1)\nprint(f(20_000))",
        "20000",
    ),
    "a copy of a file": (
        "import shutil\nopen('x', 'wb').write(bytes(9 << 20))\nshutil.copy('x', 'y')\n"
        "print(len(open('y', 'rb').read()) >> 20)",
        "9",
    ),
    "zeros": ("print(open('/dev/zero', 'rb').read(2))", "b'\\x00\\x00'"),
    "a temporary file": (
        "import tempfile\nwith tempfile.TemporaryFile() as file: print(file.write(b'xx'))",
        "2",
    ),
    "another program": ("import subprocess\nsubprocess.run(['echo', 'said'])", "said"),
    "pickles of its own": (
        "import pickle\nclass A: pass\nprint(type(pickle.loads(pickle.dumps(A()))).__name__)",
        "A",
    ),
    "threads that end after it": (
        "import threading, time\n"
        "threading.Thread(target=lambda: (time.sleep(0.05), print('late'))).start()",
        "late",
    ),
    "what is done at exit": ("import atexit\natexit.register(print, 'bye')", "bye"),
    "no output at all": ("import os\nfor file in range(3): os.close(file)", ""),
    "text of every kind": ("print('Zürich 日本 🙂')", "Zürich 日本 🙂"),
}


@pytest.mark.parametrize("name", NEAR_THE_LIMITS)
def test_what_keeps_the_limits_ends_well(name: str, sandbox: Sandbox, wait: Wait) -> None:
    source, said = NEAR_THE_LIMITS[name]
    result: Result = wait(sandbox.run(source))
    assert (result.ended, result.stdout.strip(), result.stderr) == ("ok", said, ""), result


@pytest.mark.parametrize(
    ("source", "ended", "said"),
    [
        ("def f(x: List[int]): return x\nprint(f(1))", "error", ""),
        ("def f(x: int): return x\nprint(f.__annotations__['x'] is int)", "ok", "True"),
        ("import sys\nsys.stdout.reconfigure(encoding='utf-8')\nprint('ü')", "ok", "ü"),
        (
            "import io, sys\nsys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding='utf-8')\n"
            "print(sys.stdout.seekable())",
            "ok",
            "False",
        ),
        ("import sys\nsys.stderr.reconfigure(errors='strict')\nprint(1)", "ok", "1"),
    ],
)
def test_a_program_runs_as_by_itself(
    sandbox: Sandbox, wait: Wait, source: str, ended: str, said: str
) -> None:
    result = wait(sandbox.run(source))
    assert (result.ended, result.stdout.strip()) == (ended, said), result
    assert ended == "ok" or "NameError: name 'List' is not defined" in result.stderr


OTHER_STREAM = "f = open(1, 'w')\nprint('a')\nf.write('x')\n"
ENDINGS = {
    "a stream of its own": OTHER_STREAM,
    "a function that holds it": f"{OTHER_STREAM}def g(): return f",
    "a handler that holds it": (
        f"{OTHER_STREAM}def g(*_): return f\nimport signal\nsignal.signal(signal.SIGALRM, g)"
    ),
    "a stream and an error": f"{OTHER_STREAM}1/0",
    "a stream and a code": f"{OTHER_STREAM}exit(3)",
    "output to a text": "import io, sys\nprint('a')\nsys.stdout = io.StringIO()\nprint('b')",
    "output through a class": (
        "import sys\nclass T:\n    def write(self, text): sys.__stdout__.write(text)\n"
        "    def flush(self): pass\nsys.stdout = T()\nprint('a')"
    ),
    "output that cannot be flushed": (
        "import sys\nprint('a')\nclass T: pass\nsys.stdout = T()\nsys.stdout.write = print"
    ),
    "output on another buffer": (
        "import io, sys\nprint('a')\nsys.stdout = io.TextIOWrapper(sys.stdout.detach())\nprint('b')"
    ),
    "no output": "import sys\nprint('a')\nsys.stdout = None\nprint('b')",
    "output taken away": "import sys\nprint('a')\ndel sys.stdout",
    "output closed": "import sys\nprint('a')\nsys.stdout.close()",
    "no errors": "import sys\nprint('a')\nsys.stderr = None",
    "no errors, and one": "import sys\nprint('a')\nsys.stderr = None\n1/0",
    "errors closed, and one": "import sys\nprint('a')\nsys.stderr.close()\n1/0",
    "errors closed, and a word": "import sys\nprint('a')\nsys.stderr.close()\nsys.exit('no')",
    "errors told by itself": (
        "import sys\ndef tell(*of): print('told', of[1])\nsys.excepthook = tell\n1/0"
    ),
    "an object that says goodbye": (
        "import os\nclass A:\n    def __del__(self): print('bye', os.sep, a is self)\na = A()"
    ),
    "an error at exit": "import atexit\natexit.register(lambda: 1/0)\nprint('a')",
    "a thread that goes on": (
        "import threading, time\ndef g():\n    while True: time.sleep(0.001), time\n"
        "threading.Thread(target=g, daemon=True).start()\nprint('a')"
    ),
    "builtins": "print(type(__builtins__).__name__, __builtins__.len('ab'))",
}


@pytest.mark.parametrize("name", ENDINGS)
def test_a_program_ends_as_by_itself(
    name: str, sandbox: Sandbox, wait: Wait, tmp_path: Path
) -> None:
    (tmp_path / "main.py").write_text(ENDINGS[name])
    true = subprocess.run([sys.executable, "main.py"], cwd=tmp_path, capture_output=True, text=True)
    result = wait(sandbox.run(ENDINGS[name]))
    assert (result.exit_code, result.stdout) == (true.returncode, true.stdout), result


def test_a_program_reads_its_input_and_ends_with_its_code(sandbox: Sandbox, wait: Wait) -> None:
    text = "ü\n" * 1_000_000
    source = "import sys\nprint(len(sys.stdin.read()))\nprint('why', file=sys.stderr)\nexit(3)"
    result = wait(sandbox.run(source, stdin=text))
    assert (result.ended, result.exit_code) == ("error", 3)
    assert (result.stdout, result.stderr, result.reason) == ("2000000\n", "why\n", "exit code 3")
    assert 0 < result.cpu_s < 10
    assert 0 < result.wall_s < 30
    assert result.box.startswith("bubblewrap ")
    assert ", Python 3." in result.box


@pytest.mark.parametrize(
    ("source", "last"),
    [
        ("x = 1\nx / 0", "ZeroDivisionError: division by zero"),
        ("1 +", "SyntaxError: invalid syntax"),
        ("raise SystemExit('no')", "no"),
        ("\0", "source code string cannot contain null bytes"),
        ("print('\ud800')", None),
    ],
)
def test_a_program_that_fails_says_why(
    source: str, last: str | None, sandbox: Sandbox, wait: Wait
) -> None:
    result = wait(sandbox.run(source))
    if last is None:
        assert (result.ended, result.stdout) == ("ok", "?\n")
    else:
        assert (result.ended, result.exit_code) == ("error", 1)
        assert result.stderr.splitlines()[-1].endswith(last)
    assert "inside" not in result.stderr


def test_a_traceback_shows_the_program_alone(sandbox: Sandbox, wait: Wait) -> None:
    result = wait(sandbox.run("def f():\n    return 1 / 0\nf()"))
    files = [line for line in result.stderr.splitlines() if "File" in line]
    assert [line.split('"')[1] for line in files] == ["/tmp/main.py"] * 2
    assert "return 1 / 0" in result.stderr


def test_each_case_has_its_own_limits_and_end(sandbox: Sandbox, wait: Wait) -> None:
    source = """
class Solution:
    def f(self, n, of=()):
        if n == 1:
            while True: pass
        return [n, 10 // n, of]
"""
    short = Limits(cpu_s=0.2)
    cases = [Case([5, (1, 2)]), Case([1], short), Case([0]), Case([2]), Case([3, 4, 5])]
    results = wait(sandbox.run_cases(source, "Solution.f", cases))
    assert [x.ended for x in results] == ["ok", "timeout", "error", "ok", "error"]
    assert [x.value for x in results] == [[5, 2, [1, 2]], None, None, [2, 5, []], None]
    assert results[1].reason == "used more than 0.2 s of processor time"
    assert results[1].wall_s < 9  # of the ten that it might have had
    assert "ZeroDivisionError" in results[2].stderr
    assert "takes from 2 to 3" in results[4].stderr


def test_processor_time_is_that_of_all_processes(sandbox: Sandbox, wait: Wait) -> None:
    source = "import os\nfor _ in range(2): os.fork()\nwhile True: pass"
    result = wait(sandbox.run(source, limits=Limits(cpu_s=0.6, wall_s=20)))
    assert (result.ended, result.reason) == ("timeout", "used more than 0.6 s of processor time")
    assert 0.6 < result.cpu_s < 20  # of forty that four processes might have had


def test_no_cases_are_no_results(sandbox: Sandbox, wait: Wait) -> None:
    assert wait(sandbox.run_cases("", "f", [])) == []


def test_a_command_has_its_files_and_the_same_limits(sandbox: Sandbox, wait: Wait) -> None:
    files = {"a/b.txt": bytes(range(256)), "c": b"2"}
    result = wait(
        sandbox.run_command(["sh", "-c", "wc -c < a/b.txt; ls; cat"], files=files, stdin="in")
    )
    assert (result.ended, result.stdout) == ("ok", "256\na\nc\nin")
    short = Limits(wall_s=0.3)
    assert wait(sandbox.run_command(["sleep", "99"], limits=short)).ended == "timeout"
    assert wait(sandbox.run_command(["sh", "-c", "kill -9 $$"])).exit_code == -signal.SIGKILL
    missing = wait(sandbox.run_command(["no-such-thing"]))
    assert (missing.ended, missing.exit_code) == ("error", 127)
    assert missing.stderr == "no-such-thing: No such file or directory\n"


@pytest.mark.parametrize("path", ["/usr/x", "../usr/x"])
def test_a_file_of_a_command_stays_in_its_folder(path: str, sandbox: Sandbox, wait: Wait) -> None:
    with pytest.raises(ValueError, match="not below the working folder"):
        wait(sandbox.run_command(["true"], files={path: b""}))


@pytest.mark.parametrize("name", ["a\0b", "\0", "\ud800", "a/\udfff"])
def test_what_no_name_can_be_is_refused(name: str, sandbox: Sandbox, wait: Wait) -> None:
    with pytest.raises(ValueError, match="holds NUL or half a surrogate pair"):
        wait(sandbox.run_command(["true"], files={name: b""}))
    with pytest.raises(ValueError, match="holds NUL or half a surrogate pair"):
        wait(sandbox.run_command(["echo", name]))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"x": bytes(2 << 20)}, "x: No space left on device\n"),
        ({"x": b"", "x/y": b""}, "x/y: File exists\n"),
        ({"x" * 300: b""}, "x" * 300 + ": File name too long\n"),
    ],
)
def test_files_that_do_not_fit_are_an_error_of_the_job(
    files: dict[str, bytes], said: str, sandbox: Sandbox, wait: Wait
) -> None:
    for _ in range(4):
        result = wait(sandbox.run_command(["true"], files=files, limits=Limits(file_bytes=1 << 20)))
        assert (result.ended, result.exit_code, result.stderr) == ("error", 1, said)


def test_arguments_that_are_no_json_are_refused(sandbox: Sandbox, wait: Wait) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        wait(sandbox.run_cases("def f(x): return x", "f", [Case([{1}])]))


def test_the_order_of_a_set_is_the_same_in_every_run(sandbox: Sandbox, wait: Wait) -> None:
    said = {wait(sandbox.run("print({'a', 'b', 'c', 'd'}, hash('x'))")).stdout for _ in range(3)}
    said |= {wait(run_in_a_fresh_box("print({'a', 'b', 'c', 'd'}, hash('x'))")).stdout}
    assert len(said) == 1


def test_random_numbers_differ_between_runs(sandbox: Sandbox, wait: Wait) -> None:
    assert (
        len({wait(sandbox.run("import random\nprint(random.random())")).stdout for _ in "123"}) == 3
    )


async def run_in_a_fresh_box(source: str) -> Result:
    async with Sandbox(workers=1, limits=PATIENT) as sandbox:
        return await sandbox.run(source)


def test_a_limit_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cpu_s is 0; it must be above 0"):
        Limits(cpu_s=0)
    with pytest.raises(ValueError, match=r"workers is 0; it must be at least 1"):
        Sandbox(workers=0)
