"""`python -m bench BENCHMARK [--static | --sweep] [--only TEXT] [--json]`; `--help` tells which.

`python -m bench kills` is a trial with options of its own: see its `--help`.
"""

from __future__ import annotations

import argparse
import importlib
import sys

from bench.harness import tell

BENCHMARKS = (
    *("packing", "dealing", "rows", "attention", "loss"),
    *("endpoint", "complete", "sandbox"),
)
# What the machine code tells where no GPU is, and what a GPU tells about launches.
MODES = {
    "static": {"attention": "attention_static", "loss": "loss_static"},
    "sweep": {"attention": "attention_sweep"},
}


def main() -> None:
    """Run one benchmark, its correctness gate first; or the trial."""
    if sys.argv[1:2] == ["kills"]:
        raise SystemExit(importlib.import_module("bench.kills").main(sys.argv[2:]))
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_argument("--json", action="store_true", help="a line of JSON for each result")
    mode = parser.add_mutually_exclusive_group()
    for word, what in (
        ("static", "read the machine code; no GPU needed"),
        ("sweep", "time every launch worth trying on the GPU that is here"),
    ):
        mode.add_argument(f"--{word}", dest="mode", action="store_const", const=word, help=what)
    parser.add_argument(
        "--only",
        metavar="TEXT",
        default="",
        help="attention, loss on a CPU: shapes whose name has this in it",
    )
    arguments = parser.parse_args()
    name = arguments.benchmark
    if arguments.only and (arguments.mode or name not in ("attention", "loss")):
        parser.error("--only is for attention and loss, where they are run")
    known = MODES[arguments.mode] if arguments.mode else {name: name}
    if name not in known:
        parser.error(f"--{arguments.mode} is for {', '.join(known)}, not for {name}")
    module = importlib.import_module(f"bench.{known[name]}")
    options = {"only": arguments.only} if arguments.only else {}
    tell(module.run(**options), as_json=arguments.json)


if __name__ == "__main__":
    main()
