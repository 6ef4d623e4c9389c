"""Build the one compiled module, ``hermes_core._C``; everything else is in pyproject.toml."""

from __future__ import annotations

import os
import sys

import pybind11
from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

# Listed by hand, in reading order, so that a build never picks up a stray file.
SOURCES = ["isa.cpp", "lengths.cpp", "sorting.cpp", "packing.cpp", "exact_gap.cpp"]
SOURCES += ["simplex.cpp", "guide.cpp", "guided.cpp", "choice.cpp", "layout.cpp", "window.cpp"]
SOURCES += ["shards.cpp", "rows.cpp", "pool.cpp", "mapping.cpp", "attention.cpp"]
SOURCES += ["bindings.cpp", "row_bindings.cpp", "attention_bindings.cpp"]
HEADERS = ["isa.hpp", "buffer.hpp", "lengths.hpp", "sorting.hpp", "packing.hpp", "layout.hpp"]
HEADERS += ["rows.hpp", "slots.hpp", "mapping.hpp", "exact_gap.hpp", "window.hpp", "random.hpp"]
HEADERS += ["bit_tree.hpp"]
HEADERS += ["simplex.hpp", "knots.hpp", "knapsack.hpp", "guide.hpp", "guided.hpp", "choice.hpp"]
HEADERS += ["shards.hpp", "pool.hpp", "arrays.hpp", "write_rows.hpp", "attention.hpp"]
HEADERS += ["attention_vectors.hpp", "attention_blocks.hpp", "threads.hpp"]

DEBUG = os.environ.get("HERMES_CORE_DEBUG") == "1"  # asserts, address and UB sanitizers

# No -march: a wheel must run on every CPU of its platform. Wider vector units are reached
# by run-time dispatch (csrc/isa.hpp), never by a build flag.
# -ffp-contract=off: a plan is the same on every platform, also where a CPU can multiply and add in
# one step, rounding once.
# -isystem: warnings are for our sources, not for pybind11's headers.
compile_args = ["-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Wno-sign-conversion"]
compile_args += ["-pthread", "-fvisibility=hidden", "-ffp-contract=off"]
compile_args += ["-isystem", pybind11.get_include()]
link_args = ["-pthread"]
if DEBUG:
    compile_args += ["-O1", "-g1", "-UNDEBUG", "-fno-omit-frame-pointer"]
    compile_args += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    compile_args += ["-D_GLIBCXX_ASSERTIONS"]
    link_args += ["-fsanitize=address,undefined"]
else:
    compile_args += ["-O3", "-g0"]
    link_args += ["-Wl,-s"] if sys.platform == "linux" else []

ParallelCompile("HERMES_CORE_BUILD_JOBS", default=0).install()  # 0: one job for each core

setup(
    ext_modules=[
        Pybind11Extension(
            "hermes_core._C",
            [f"csrc/{name}" for name in SOURCES],
            depends=[f"csrc/{name}" for name in HEADERS],
            include_dirs=["csrc"],
            cxx_std=17,
            extra_compile_args=compile_args,
            extra_link_args=link_args,
        )
    ],
    cmdclass={"build_ext": build_ext},
)
