"""Builds the native core; everything else about the package stands in pyproject.toml.

The core is one shared object on libtorch's stable ABI, without Python headers: one binary for every torch >= 2.10.
ADVANCE_STEP_BUILD=auto (the default) builds it where a C++ compiler and torch are found, else installs without it; 1
builds it or fails and says what is missing; 0 installs without it. `advance_step.backend_info()` shows what came of it.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import ExecError

MODE = os.environ.get("ADVANCE_STEP_BUILD", "auto")
CSRC = Path("src/advance_step/csrc")
CPP, CUDA = sorted(CSRC.glob("*.cpp")), sorted(CSRC.glob("*.cu"))
CXX = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), "")
FLAGS = ["-O3", "-std=c++17", "-shared", "-DTORCH_TARGET_VERSION=0x020a000000000000"]  # the ABI of torch 2.10

# pip's isolated build hides the torch that is installed where the package goes; it is the one to build against.
sys.path.append(sysconfig.get_path("purelib"))


def missing() -> str:
    """What the core cannot be built without here, or ""."""
    if os.name != "posix":
        return "the core is built on Linux and macOS only"
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return "a free-threaded Python has no cp310-abi3 extensions"
    if not CPP:
        return f"its sources are not in {CSRC}"
    if not CXX or not shutil.which(shlex.split(CXX)[0]):
        return f"no C++ compiler ({CXX or 'c++, g++ or clang++'}) on PATH"
    try:
        torch = version("torch")
    except PackageNotFoundError:
        return "torch is not installed; install torch >= 2.10 first, then this with pip's --no-build-isolation"
    if tuple(map(int, torch.split(".")[:2])) < (2, 10):
        return f"torch is {torch}, and its stable ABI serves from 2.10 on"
    return ""


def nvcc() -> list[str]:
    """The CUDA compiler that matches torch, with torch's architectures, or []; whether there is a GPU plays no part."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    found = shutil.which("nvcc", path=os.path.join(CUDA_HOME, "bin")) if CUDA_HOME else None
    if not found or not torch.version.cuda:
        return []
    release = re.search(r"release (\d+)", subprocess.check_output([found, "--version"], text=True))
    if not release or release[1] != torch.version.cuda.split(".")[0]:
        print(f"advance-step: no CUDA kernels: {found} is not of torch's CUDA {torch.version.cuda}", file=sys.stderr)
        return []
    codes = torch._C._cuda_getArchFlags().split()  # as sm_80 sm_90 compute_90; torch.cuda's own list can want a GPU
    return [found, "--threads=0", *(f"-gencode=arch=compute_{code.split('_')[1]},code={code}" for code in codes)]


class BuildCore(build_ext):
    def build_extension(self, ext: Extension) -> None:
        """One command compiles and links; neither Python's own compiler flags nor libtorch_python take part."""
        torch = Path(find_spec("torch").origin).parent
        core = Path(self.get_ext_fullpath(ext.name))
        core.parent.mkdir(parents=True, exist_ok=True)
        hidden, cxxflags = ["-fPIC", "-fvisibility=hidden"], shlex.split(os.environ.get("CXXFLAGS", ""))
        command, libraries = [*shlex.split(CXX), *FLAGS, *hidden, *cxxflags], ["-ltorch_cpu"]
        if CUDA and (cuda := nvcc()):
            host = [f"-ccbin={shlex.split(CXX)[0]}", f"-Xcompiler={','.join(hidden)}"]
            command, libraries = [*cuda, *FLAGS, *host, "-DUSE_CUDA", *map(str, CUDA)], ["-ltorch_cpu", "-ltorch_cuda"]
        command += [*ext.sources, f"-I{torch / 'include'}", f"-L{torch / 'lib'}", *libraries, "-o", str(core)]
        try:
            self.spawn(command)
        except ExecError as error:
            sys.exit(f"the native core did not compile ({error}); ADVANCE_STEP_BUILD=0 installs without it")


class BuildPython(build_py):
    def run(self) -> None:
        """Removes the core of an earlier build: this build makes its own, or is meant to have none."""
        super().run()
        package = CSRC.parent if self.editable_mode else Path(self.build_lib, "advance_step")
        for stale in package.glob("_C.*"):
            stale.unlink()


if MODE not in ("auto", "1", "0"):
    sys.exit(f"ADVANCE_STEP_BUILD: expected auto, 1 or 0, got {MODE!r}")
why_not = "ADVANCE_STEP_BUILD=0" if MODE == "0" else missing()
if why_not and MODE == "1":
    sys.exit(f"ADVANCE_STEP_BUILD=1, but {why_not}")
if why_not:
    print(f"advance-step: installs without its native core: {why_not}", file=sys.stderr)

core = Extension("advance_step._C", [str(path) for path in CPP], py_limited_api=True)
setup(
    ext_modules=[] if why_not else [core],
    cmdclass={"build_ext": BuildCore, "build_py": BuildPython},
    # A build is seconds, and file times do not tell that another torch or compiler is there now.
    options={"build_ext": {"force": True}, "bdist_wheel": {} if why_not else {"py_limited_api": "cp310"}},
)
