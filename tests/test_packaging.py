"""What the packages hold, and what a plugin's author finds once mailerq is installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import mailerq
from tests.support import ROOT
from tests.support import mailerq as run

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]

MADE = re.compile(r"mailerq\.egg-info/.*|PKG-INFO|setup\.cfg")
"""What setuptools adds."""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The files that are in git, as they are now."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if not (ROOT / ".git").exists() or listed.returncode:
        pytest.skip(f"git does not know this tree: {listed.stderr}")
    for name in listed.stdout.split("\0")[:-1]:
        if (ROOT / name).exists():
            target = tmp_path / "tree" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
    return tmp_path / "tree"


def setup(tree: Path, *arguments: str, **environ: str) -> None:
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", *arguments],
        cwd=tree,
        env={"PATH": os.environ["PATH"], **environ},
        check=True,
    )


def source_package(tree: Path, directory: Path) -> Path:
    # No compiler, no library: a source package needs none.
    setup(tree, "sdist", f"--dist-dir={directory}", CC="false", CXX="false", PKG_CONFIG="false")
    (package,) = directory.iterdir()
    return package


def test_the_source_package_holds_what_git_does(tree: Path, tmp_path: Path) -> None:
    wanted = {str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()}
    (tree / "mailerq" / "_core.c").touch()
    (tree / "build/cython").mkdir(parents=True)
    (tree / "build/cython/x.c").touch()
    (tree / "plugins/x.so").touch()
    package = source_package(tree, tmp_path / "dist")
    assert package.name == f"mailerq-{VERSION}.tar.gz"
    with tarfile.open(package) as archive:
        files = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert {name for name in files if not MADE.fullmatch(name)} == wanted - {".gitignore"}
    assert {"tests/support.py", "plugins/trace.c", "CHANGELOG.md"} < files


def test_what_is_installed_has_no_sources_of_the_extensions(tree: Path, tmp_path: Path) -> None:
    (tree / "mailerq" / "_core.c").touch()
    setup(tree, "build_py", f"--build-lib={tmp_path / 'lib'}")
    files = [path for path in (tmp_path / "lib").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".py", ".pyi", ".pxd", ".typed"}


def build_plugin(directory: Path, *flags: str) -> None:
    target = directory / "null.so"
    command = ["cc", "-std=c99", "-shared", "-fPIC", *flags, ROOT / "plugins/null.c", "-o", target]
    subprocess.run(command, check=True, capture_output=True)


def pkg_config(prefix: Path, *options: str) -> list[str]:
    done = subprocess.run(
        ["pkg-config", *options, "mailerq"],
        env={**os.environ, "PKG_CONFIG_PATH": str(prefix / "share/pkgconfig")},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


def test_pkg_config_says_how_to_compile_a_plugin(tree: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "prefix"
    setup(tree, "install_data", f"--install-dir={prefix}")
    assert pkg_config(prefix, "--modversion") == [VERSION] == [mailerq.__version__]
    build_plugin(tmp_path, *pkg_config(prefix, "--cflags"))


def test_a_source_tree_says_where_its_header_is(tmp_path: Path) -> None:
    done = run("--include-dir")
    assert (done.returncode, done.stdout.decode()) == (0, f"{ROOT / 'include'}\n")
    build_plugin(tmp_path, f"-I{done.stdout.decode().strip()}")


COMPILER = """\
#!/bin/sh
printf '%s\\n' "$*" >>"$0.log"
exec cc "$@"
"""

BUILD = """\
import runpy, sys
from setuptools import Distribution

made = runpy.run_path("setup.py")
command = made["Build"](Distribution({"ext_modules": [made["loops"]("mailerq.wire._lines")]}))
command.build_lib = command.build_temp = sys.argv[1]
command.ensure_finalized()
command.run()
"""


def test_the_flags_of_the_environment_come_last(tree: Path, tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    environ = {
        "PATH": os.environ["PATH"],
        "CC": str(compiler),
        "CFLAGS": "-O0 -DFROM_OUTSIDE=1",
        "LDFLAGS": "-Wl,--build-id=0x12345678",
    }
    command = [sys.executable, "-c", BUILD, tmp_path / "out"]
    subprocess.run(command, cwd=tree, env=environ, check=True, capture_output=True)
    calls = Path(f"{compiler}.log").read_text().splitlines()
    (compile_call,) = [call for call in calls if "_lines.c " in call]
    (link_call,) = [call for call in calls if "_lines.o" in call and " -c " not in call]
    flags = compile_call.split()
    assert [flag for flag in flags if flag.startswith("-O")][-1] == "-O0"
    assert flags.index("-O3") < len(flags) - 1 - flags[::-1].index("-DFROM_OUTSIDE=1")
    assert "-Wl,--build-id=0x12345678" in link_call.split()


@pytest.mark.soak
def test_pip_installs_the_source_package_compiled_as_a_whole(tree: Path, tmp_path: Path) -> None:
    package = source_package(tree, tmp_path / "dist")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--no-build-isolation", "--no-deps", f"-w{tmp_path}", package], check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    compiled = {name.partition(".")[0] for name in names if name.endswith(".so")}
    types = {name.removesuffix(".pxd") for name in names if name.endswith(".pxd")}
    assert compiled == types | {"mailerq/wire/_lines", "mailerq/mail/_canonical"}
    code = [name for name in names if name.endswith((".c", ".cpp", ".pyx", ".pxi"))]
    assert code == []

    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    python = environment / "bin/python"
    libraries = sysconfig.get_paths(vars={"base": str(environment)})["purelib"]
    Path(libraries, "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    subprocess.run([python, "-m", "pip", "--quiet", "install", "--no-deps", wheel], check=True)

    def say(*words: str) -> str:
        done = subprocess.run(
            [environment / "bin" / words[0], *words[1:]],
            cwd="/",
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout

    include = Path(say("mailerq", "--include-dir").strip())
    assert include == (environment / "include").resolve()
    build_plugin(tmp_path, f"-I{include}")
    build_plugin(tmp_path, *pkg_config(environment, "--cflags"))
    assert say("mailerq", "--version") == f"mailerq {VERSION}\n"
    assert say("newaliases") == ""
