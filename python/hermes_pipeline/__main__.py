"""The command `hermes4`, also as `python -m hermes_pipeline`; says which packages it needs."""

from __future__ import annotations

import os

from hermes_pipeline.exits import MISTAKEN, say

# Who brings a package; a name that is not here is a defect, and keeps its traceback.
EXTRAS = {
    **dict.fromkeys(("aiohttp", "datasets", "jinja2", "matplotlib", "orjson"), "pipeline"),
    **dict.fromkeys(("pyarrow", "rich", "safetensors", "tokenizers"), "pipeline"),
    **dict.fromkeys(("transformers", "typer"), "pipeline"),
    **dict.fromkeys(("torch", "torchtitan", "triton"), "train"),
    "ray": "ray",
}


def main() -> None:
    """Run `hermes4`; without the packages it needs, one line and the exit code of a mistake."""
    try:
        from hermes_pipeline import cli

        cli.main()
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None or os.environ.get("HERMES4_TRACEBACK"):
            raise
        say(f"hermes4 needs more than the library: pip install 'hermes4-core[{extra}]'")
        raise SystemExit(MISTAKEN) from None


if __name__ == "__main__":
    main()
