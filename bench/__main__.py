"""`python -m bench BENCHMARK [--static] [--only TEXT] [--json]`; `--help` names the benchmarks.

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
# What the machine code tells where no GPU is.
STATIC = {"attention": "attention_static", "loss": "loss_static"}


def main() -> None:
    """Run one benchmark, its correctness gate first; or the trial."""
    if sys.argv[1:2] == ["kills"]:
        raise SystemExit(importlib.import_module("bench.kills").main(sys.argv[2:]))
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_argument("--json", action="store_true", help="a line of JSON for each result")
    parser.add_argument(
        "--static", action="store_true", help="read the machine code; no GPU needed"
    )
    parser.add_argument(
        "--only", metavar="TEXT", default="", help="attention: shapes whose name has this in it"
    )
    arguments = parser.parse_args()
    name = arguments.benchmark
    if arguments.only and (arguments.static or name != "attention"):
        parser.error("--only is for attention, where it is run")
    if arguments.static and name not in STATIC:
        parser.error(f"{name} has no machine code to read; --static is for {', '.join(STATIC)}")
    module = importlib.import_module(f"bench.{STATIC[name] if arguments.static else name}")
    options = {"only": arguments.only} if arguments.only else {}
    tell(module.run(**options), as_json=arguments.json)


if __name__ == "__main__":
    main()
