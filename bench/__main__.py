"""`python -m bench packing | dealing | rows [--json]`."""

from __future__ import annotations

import argparse

from bench import dealing, packing, rows
from bench.harness import tell

BENCHMARKS = {"packing": packing.run, "dealing": dealing.run, "rows": rows.run}


def main() -> None:
    """Run one benchmark; its correctness gate goes first."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_argument("--json", action="store_true", help="a line of JSON for each result")
    arguments = parser.parse_args()
    tell(BENCHMARKS[arguments.benchmark](), as_json=arguments.json)


if __name__ == "__main__":
    main()
