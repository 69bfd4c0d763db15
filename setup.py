"""Build `mailerq._core` and `mailerq.wire._lines`, and compile the modules that mail goes through.

Those are the Python modules with a .pxd of the same name beside them, which says of what type
the attributes of their classes are; they also run as they are. Everything else is in
pyproject.toml.

The environment variable ``MQ_DEBUG=1`` builds these two for a debugger, with assertions, and
compiles none of the Python modules; ``MQ_SANITIZE=address,undefined`` builds the two for these
sanitizers of the compiler.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

DEBUG = os.environ.get("MQ_DEBUG", "") not in ("", "0")

SANITIZE = (
    [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=undefined"]
    if (sanitizers := os.environ.get("MQ_SANITIZE"))
    else []
)

LIBRARIES = (
    # pkg-config's name, header, linker option, Debian's package
    ("libev", "ev.h", "-lev", "libev-dev"),
    ("json-c", "json-c/json.h", "-ljson-c", "libjson-c-dev"),
    ("libcrypt", "crypt.h", "-lcrypt", "libcrypt-dev"),
)


def pkg_config(name: str, option: str) -> list[str] | None:
    """What pkg-config says about a library, or None when it does not know it."""
    program = shutil.which(os.environ.get("PKG_CONFIG", "pkg-config"))
    if program is None:
        return None
    found = subprocess.run([program, option, name], capture_output=True, text=True, check=False)
    return shlex.split(found.stdout) if found.returncode == 0 else None


def compiles(header: str, link: str) -> bool:
    """Whether a program with this header and library can be built; libev ships no .pc file."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    flags = shlex.split(os.environ.get("CFLAGS", ""))
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory, "probe.c")
        source.write_text(f"#include <{header}>\nint main(void) {{ return 0; }}\n")
        command = [*compiler, *flags, str(source), "-o", str(source.with_suffix("")), link]
        try:
            return subprocess.run(command, capture_output=True, check=False).returncode == 0
        except OSError:
            sys.exit(f"mailerq needs a C compiler, and {compiler[0]!r} is none: install gcc")


def library_flags() -> tuple[list[str], list[str]]:
    """Compiler and linker flags of the libraries; says what to install when one is missing."""
    compile_flags: list[str] = []
    link_flags: list[str] = []
    missing: list[str] = []
    for name, header, link, package in LIBRARIES:
        cflags, libs = pkg_config(name, "--cflags"), pkg_config(name, "--libs")
        if cflags is not None and libs is not None:
            compile_flags += cflags
            link_flags += libs
        elif compiles(header, link):
            link_flags.append(link)
        else:
            missing.append(package)
    if missing:
        sys.exit(f"mailerq needs libraries that are not here: apt-get install {' '.join(missing)}")
    if shutil.which(shlex.split(os.environ.get("CXX", "g++"))[0]) is None:
        sys.exit("mailerq needs a C++ compiler for one small file: apt-get install g++")
    return compile_flags, link_flags


def core() -> Extension:
    compile_flags, link_flags = library_flags()
    macros: list[tuple[str, str | None]] = []
    compile_flags += ["-fvisibility=hidden", "-fexceptions", "-Wno-unused-function"]
    if DEBUG:
        macros.append(("MQ_DEBUG", "1"))
        compile_flags += ["-O1", "-g3", "-fno-omit-frame-pointer"]
    else:
        compile_flags += ["-O2", "-g1"]
    return Extension(
        "mailerq._core",
        sources=["mailerq/_core.pyx", "mailerq/_core_guard.cpp"],
        depends=[
            "setup.py",
            "include/mailerq.h",
            *map(str, sorted(Path("mailerq").glob("_core*.p[x]*"))),
        ],
        include_dirs=["include"],
        define_macros=macros,
        extra_compile_args=compile_flags + SANITIZE,
        extra_link_args=[*link_flags, *SANITIZE, "-lstdc++", "-ldl", "-lpthread"],
    )


def lines() -> Extension:
    return Extension(
        "mailerq.wire._lines",
        sources=["mailerq/wire/_lines.pyx"],
        depends=["setup.py"],
        # At -O2 the compiler makes no vector instructions of its loop.
        extra_compile_args=["-O1" if DEBUG else "-O3", "-g1", "-Wno-unused-function", *SANITIZE],
        extra_link_args=SANITIZE,
    )


def hot_modules() -> list[Extension]:
    return [
        Extension(
            ".".join(types.with_suffix("").parts),
            sources=[str(types.with_suffix(".py"))],
            depends=["setup.py"],
            # Cython makes a wrong call of a cpdef method that is taken from its class as a value.
            extra_compile_args=shlex.split(
                "-O2 -g1 -Wno-unused-function -Werror=incompatible-pointer-types"
            ),
        )
        for types in sorted(Path("mailerq").rglob("*.pxd"))
        if types.with_suffix(".py").exists() and not DEBUG
    ]


setup(
    data_files=[("include", ["include/mailerq.h"])],
    ext_modules=[
        *cythonize([core()], language_level=3),
        *cythonize([lines()], build_dir="build/cython", quiet=True),
        # Annotations are for readers and mypy: Cython would take "bytes" for exactly that.
        *cythonize(
            hot_modules(),
            build_dir="build/cython",
            quiet=True,
            language_level=3,
            compiler_directives={"annotation_typing": False},
        ),
    ],
)
