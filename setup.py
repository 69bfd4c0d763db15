"""Build the extensions written in Cython, and compile modules on the path of every mail.

The extensions are `mailerq._core`, `mailerq.wire._lines` and `mailerq.mail._canonical`.

The compiled modules are the Python modules with a .pxd of the same name, which types the
attributes of their classes. They also run uncompiled. Everything else is in pyproject.toml.

The compilers get CFLAGS and LDFLAGS of the environment, CFLAGS after the flags below.
``MQ_UNCOMPILED=1`` builds only these extensions, in half a minute. ``MQ_DEBUG=1`` does the same,
with debug information and assertions. ``MQ_SANITIZE=address,undefined`` builds the extensions with
these sanitizers.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


def asked(variable: str) -> bool:
    return os.environ.get(variable, "") not in ("", "0")


DEBUG = asked("MQ_DEBUG")
UNCOMPILED = DEBUG or asked("MQ_UNCOMPILED")

SANITIZE = (
    [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=undefined"]
    if (sanitizers := os.environ.get("MQ_SANITIZE"))
    else []
)

LOOPS = ("mailerq.wire._lines", "mailerq.mail._canonical")

LIBRARIES = (
    # name in pkg-config, header, linker option, Debian package
    ("libev", "ev.h", "-lev", "libev-dev"),
    ("json-c", "json-c/json.h", "-ljson-c", "libjson-c-dev"),
    ("libcrypt", "crypt.h", "-lcrypt", "libcrypt-dev"),
)


def pkg_config(name: str, option: str) -> list[str] | None:
    """Return the flags of a library from pkg-config, or None if pkg-config does not know it."""
    program = shutil.which(os.environ.get("PKG_CONFIG", "pkg-config"))
    if program is None:
        return None
    found = subprocess.run([program, option, name], capture_output=True, text=True, check=False)
    return shlex.split(found.stdout) if found.returncode == 0 else None


def compiles(header: str, link: str) -> bool:
    """Whether a program with this header and library can be built: libev ships no .pc file."""
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
    """Return the compiler and linker flags of the libraries; exit if a library is missing."""
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
    flags = ["-fvisibility=hidden", "-fexceptions", "-Wno-unused-function"]
    flags += ["-O1", "-g3", "-fno-omit-frame-pointer"] if DEBUG else ["-O2", "-g1"]
    return Extension(
        "mailerq._core",
        sources=["mailerq/_core.pyx", "mailerq/_core_guard.cpp"],
        depends=[
            "setup.py",
            "include/mailerq.h",
            *map(str, sorted(Path("mailerq").glob("_core*.p[x]*"))),
        ],
        include_dirs=["include"],
        define_macros=[("MQ_DEBUG", "1")] if DEBUG else [],
        extra_compile_args=flags + SANITIZE,
        extra_link_args=[*SANITIZE, "-lstdc++", "-ldl", "-lpthread"],
    )


def loops(name: str) -> Extension:
    return Extension(
        name,
        sources=[name.replace(".", "/") + ".pyx"],
        depends=["setup.py"],
        # At -O2 the compiler does not vectorize the loop over every byte of a mail.
        extra_compile_args=["-O1" if DEBUG else "-O3", "-g1", "-Wno-unused-function", *SANITIZE],
        extra_link_args=SANITIZE,
    )


def hot_modules() -> list[Extension]:
    return [
        Extension(
            ".".join(types.with_suffix("").parts),
            sources=[str(types.with_suffix(".py"))],
            depends=["setup.py"],
            # The -Werror finds cpdef methods used as values of their class, which Cython
            # calls wrongly. Calls into Python without a jump through the PLT make a relayed
            # message with connections of its own some 8 % cheaper.
            extra_compile_args=shlex.split(
                "-O2 -g1 -fno-plt -fno-semantic-interposition -Wno-unused-function"
                " -Wno-array-bounds -Wno-maybe-uninitialized -Werror=incompatible-pointer-types"
            ),
            define_macros=[("CYTHON_CLINE_IN_TRACEBACK", "0")],
        )
        for types in sorted(Path("mailerq").rglob("*.pxd"))
        if types.with_suffix(".py").exists()
    ]


class Build(build_ext):
    """Find libraries and run Cython only to compile, because a source package needs neither."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = self.parallel or len(os.sched_getaffinity(0))

    def build_extensions(self) -> None:
        compile_flags, link_flags = library_flags()
        written, hot = [], []
        for extension in self.extensions:
            if extension.name == "mailerq._core":
                extension.extra_compile_args += compile_flags
                extension.extra_link_args += link_flags
            # setuptools has put CFLAGS before our flags, which would take precedence.
            extension.extra_compile_args += shlex.split(os.environ.get("CFLAGS", ""))
            (hot if extension.sources[0].endswith(".py") else written).append(extension)
        self.translate(written)
        # Annotations are for mypy and readers: Cython would require exactly bytes for "bytes".
        self.translate(hot, annotation_typing=False)
        super().build_extensions()

    def translate(self, extensions: list[Extension], **directives: bool) -> None:
        """Translate extensions to C with Cython, and build them from the C files."""
        from Cython.Build import cythonize

        translated = cythonize(
            extensions,
            nthreads=self.parallel,
            build_dir="build/cython",
            quiet=True,
            language_level=3,
            compiler_directives=directives,
        )
        sources = {extension.name: extension.sources for extension in translated}
        for extension in extensions:
            extension.sources = sources[extension.name]


if __name__ == "__main__":  # not when helper processes of Cython import this file
    setup(
        cmdclass={"build_ext": Build},
        data_files=[
            ("include", ["include/mailerq.h"]),
            ("share/pkgconfig", ["include/mailerq.pc"]),
        ],
        ext_modules=[core(), *map(loops, LOOPS), *([] if UNCOMPILED else hot_modules())],
    )
