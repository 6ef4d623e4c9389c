"""Speed against peers. `python -m bench BENCHMARK --help` tells the options of each."""

from __future__ import annotations

import argparse
import importlib
import sys

from bench.harness import tell

BENCHMARKS = {
    "packing": "plans of millions of samples, against other packers",
    "dealing": "rows of an epoch dealt to ranks, and what these lose by waiting",
    "rows": "batches built from a plan, against collators and loaders",
    "attention": "attention inside segments, forward and backward",
    "loss": "the loss on chosen tokens, forward and backward",
    "endpoint": "calls of the client, against other clients",
    "complete": "CPU time of a call of `hermes4 complete`, all in",
    "sandbox": "runs of a program in a box, against cold bubblewrap and no isolation",
}
TRIAL = "a trial: `hermes4 complete` killed a thousand times"
# What else a benchmark can do: the module, and in words.
MODES = {
    "attention": {
        "static": ("attention_static", "read the kernels' machine code; no GPU needed"),
        "sweep": ("attention_sweep", "time every launch worth trying, on the GPU that is here"),
    },
    "loss": {"static": ("loss_static", "read the kernels' machine code; no GPU needed")},
}
ONLY = {
    "attention": "shapes whose name has this in it",
    "loss": "on a CPU: shapes whose name has this in it",
}


def main() -> None:
    """Run one benchmark, its correctness gate first; or the trial."""
    if sys.argv[1:2] == ["kills"]:
        raise SystemExit(importlib.import_module("bench.kills").main(sys.argv[2:]))
    arguments = build_parser().parse_args()
    name, mode = arguments.benchmark, getattr(arguments, "mode", None)
    module = importlib.import_module(f"bench.{MODES[name][mode][0] if mode else name}")
    only = getattr(arguments, "only", "")
    tell(module.run(**({"only": only} if only else {})), as_json=arguments.json)


def build_parser() -> argparse.ArgumentParser:
    """A parser for each benchmark, which knows its own options alone."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    benchmarks = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    for name, what in BENCHMARKS.items():
        one = benchmarks.add_parser(name, help=what, description=what)
        one.add_argument("--json", action="store_true", help="a line of JSON for each result")
        if name not in MODES:
            continue
        ways = one.add_mutually_exclusive_group()
        for mode, (_, does) in MODES[name].items():
            ways.add_argument(f"--{mode}", dest="mode", action="store_const", const=mode, help=does)
        ways.add_argument("--only", metavar="TEXT", default="", help=ONLY[name])
    benchmarks.add_parser("kills", help=TRIAL, add_help=False)  # reads its own words
    return parser


if __name__ == "__main__":
    main()
