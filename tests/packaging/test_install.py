"""What users install: sdist and wheel, built from a copy of the sources and run where there is no compiler.

torch comes from the environment of the tests; nothing is fetched.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch

import advance_step

ROOT = Path(__file__).parents[2]
RUN = """
import json, shutil, torch, advance_step
tokens, positions, slots = (torch.full((2,), 9) for _ in range(3))
seq_lens, table = torch.tensor([5, 16], dtype=torch.int32), torch.tensor([[7, 3], [2, 9]], dtype=torch.int32)
advance_step.advance_step_flashattn(2, 2, 16, tokens, torch.tensor([11, 12]), positions, seq_lens, slots, table)
state = [tensor.tolist() for tensor in (tokens, positions, seq_lens, slots)]
cpu = advance_step.backend_info()["devices"]["cpu"]
print(json.dumps([advance_step.__file__, [shutil.which(name) for name in ("c++", "g++", "clang++")], state, cpu]))
"""
ADVANCED = [[11, 12], [5, 16], [6, 17], [117, 144]]

needs_compiler = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "c++")), reason="no C++ compiler")


@pytest.fixture(scope="module")
def python_only(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PATH on which there is a Python and no compiler."""
    directory = tmp_path_factory.mktemp("bin")
    (directory / "python").symlink_to(sys.executable)
    return str(directory)


def build(target: str, directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs one hook of the build, as pip does, in a copy of the sources; what it makes lies in directory / "dist"."""
    sources = directory / "sources"
    if not sources.exists():
        ignored = shutil.ignore_patterns("_C.*", "__pycache__", "*.egg-info")
        shutil.copytree(ROOT / "src", sources / "src", ignore=ignored)
        for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, sources)
    (directory / "dist").mkdir(exist_ok=True)
    return hook(target, sources, directory / "dist", **environment)


def hook(target: str, sources: Path, dist: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX", "CXXFLAGS")}
    program = f"from setuptools import build_meta; build_meta.build_{target}({str(dist)!r})"
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=sources, env=clean | environment, capture_output=True, text=True)


def run_installed(wheel: Path, directory: Path, path: str) -> list[object]:
    """Installs the wheel into a new environment that sees this one's torch, and runs an operator there."""
    venv.create(directory / "env", symlinks=True)
    python = directory / "env" / "bin" / "python"
    site = next((directory / "env" / "lib").glob("python*/site-packages"))
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True)
    (site / "torch.pth").write_text(str(Path(torch.__file__).parents[1]))
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("ADVANCE_STEP", "PYTHON"))}
    command = [str(python), "-c", RUN]
    done = subprocess.run(command, cwd=directory, env=clean | {"PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    file, compilers, state, cpu = json.loads(done.stdout)
    assert Path(file).is_relative_to(site)
    assert compilers == [None, None, None]
    assert state == ADVANCED
    return cpu


@needs_compiler
def test_the_wheel_of_the_sdist_runs_natively_without_a_compiler(tmp_path: Path, python_only: str) -> None:
    assert build("sdist", tmp_path, ADVANCE_STEP_BUILD="0").returncode == 0
    (sdist,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    done = hook("wheel", tmp_path / sdist.name.removesuffix(".tar.gz"), tmp_path / "dist", ADVANCE_STEP_BUILD="1")
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert re.fullmatch(rf"advance_step-{advance_step.__version__}-cp310-abi3-\w+\.whl", wheel.name)
    names = ZipFile(wheel).namelist()
    assert {"advance_step/_C.abi3.so", "advance_step/py.typed", "_advance_step_pytest.py"} <= set(names)
    assert not [name for name in names if "csrc" in name]
    cpu = run_installed(wheel, tmp_path, python_only)
    assert cpu == {"executor": "native", "why": "the core has kernels for cpu"}


def test_build_0_serves_by_reference_and_says_why(tmp_path: Path, python_only: str) -> None:
    done = build("wheel", tmp_path, ADVANCE_STEP_BUILD="0")
    assert "installs without its native core: ADVANCE_STEP_BUILD=0" in done.stderr
    cpu = run_installed(
        tmp_path / "dist" / f"advance_step-{advance_step.__version__}-py3-none-any.whl", tmp_path, python_only
    )
    assert cpu["executor"] == "reference"
    assert "no native core: not built" in cpu["why"]


def test_auto_without_a_compiler_builds_without_the_core(tmp_path: Path, python_only: str) -> None:
    done = build("wheel", tmp_path, ADVANCE_STEP_BUILD="auto", PATH=python_only)
    assert "installs without its native core: no C++ compiler (c++, g++ or clang++) on PATH" in done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in ZipFile(wheel).namelist() if "_C." in name]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ADVANCE_STEP_BUILD": "1"}, "ADVANCE_STEP_BUILD=1, but no C++ compiler (c++, g++ or clang++) on PATH"),
        ({"ADVANCE_STEP_BUILD": "1", "CXX": "cxx-of-nobody"}, "but no C++ compiler (cxx-of-nobody) on PATH"),
        ({"ADVANCE_STEP_BUILD": "auto", "CXX": "/bin/false"}, "the native core did not compile"),
        ({"ADVANCE_STEP_BUILD": "yes"}, "ADVANCE_STEP_BUILD: expected auto, 1 or 0, got 'yes'"),
    ],
)
def test_what_cannot_be_built_is_refused(
    tmp_path: Path, python_only: str, environment: dict[str, str], message: str
) -> None:
    done = build("wheel", tmp_path, PATH=python_only, **environment)
    assert done.returncode != 0
    assert message in done.stderr


@pytest.mark.parametrize("mode", ["0", "auto"])
def test_no_core_of_an_earlier_build_survives(tmp_path: Path, python_only: str, mode: str) -> None:
    assert build("sdist", tmp_path, ADVANCE_STEP_BUILD="0").returncode == 0  # for the copy of the sources
    core = tmp_path / "sources" / "src" / "advance_step" / "_C.abi3.so"
    core.write_bytes(b"of an earlier editable install")
    done = build("editable", tmp_path, ADVANCE_STEP_BUILD=mode, PATH=python_only)
    assert done.returncode == 0, done.stderr
    assert not core.exists()


def test_one_version() -> None:
    """What is installed has the version of the source; so has what is cited."""
    (cited,) = re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited == advance_step.__version__ == importlib.metadata.version("advance-step")
