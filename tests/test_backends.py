"""Which executor serves, and that a forced one that is not there fails loudly. Each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import advance_step

INFO = "import json, advance_step; print(json.dumps(advance_step.backend_info()))"


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("ADVANCE_STEP_BACKEND", "TRITON_INTERPRET")}
    return subprocess.run([sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True)


def has_native() -> bool:
    return json.loads(python(INFO).stdout)["devices"]["cpu"]["executor"] == "native"


def test_info_names_every_device_and_why():
    info = advance_step.backend_info()
    assert set(info) == {"advance_step", "torch", "python", "forced", "devices"}
    assert info["advance_step"] == advance_step.__version__
    assert set(info["devices"]) == {"cpu", "cuda", "xpu", "npu"}
    for served in info["devices"].values():
        assert served["executor"] in ("native", "triton", "reference")
        assert served["why"]


def test_reference_can_be_forced():
    info = json.loads(python(INFO, ADVANCE_STEP_BACKEND="reference").stdout)
    assert info["forced"] == "reference"
    assert info["devices"]["cpu"]["executor"] == "reference"
    assert "ADVANCE_STEP_BACKEND=reference" in info["devices"]["cpu"]["why"]


def test_unknown_backend_is_refused():
    ran = python("import advance_step", ADVANCE_STEP_BACKEND="cudnn")
    assert ran.returncode != 0
    expected = "ADVANCE_STEP_BACKEND: expected native, triton, reference or nothing, got 'cudnn'"
    assert ran.stderr.splitlines()[-1] == f"ValueError: {expected}"


def test_native_that_is_not_there_is_refused():
    hide = "import pathlib; pathlib.Path.glob = lambda self, pattern: iter(()); import advance_step"
    ran = python(hide, ADVANCE_STEP_BACKEND="native")
    assert ran.stderr.splitlines()[-1].startswith("ImportError: ADVANCE_STEP_BACKEND=native: not built")


def test_without_a_core_the_reference_serves_and_says_why():
    hide = "import pathlib; pathlib.Path.glob = lambda self, pattern: iter(()); " + INFO
    served = json.loads(python(hide).stdout)["devices"]["cpu"]
    assert served["executor"] == "reference"
    assert served["why"].startswith("no native core: not built")


def test_triton_without_a_device_is_refused():
    pytest.importorskip("triton", reason="Triton is not installed (it has wheels for Linux only)")
    ran = python("import torch, advance_step; print(torch.cuda.is_available())", ADVANCE_STEP_BACKEND="triton")
    if "True" in ran.stdout:
        pytest.skip("a GPU is here")
    assert "but Triton can serve no device here" in ran.stderr.splitlines()[-1]


def test_a_core_that_does_not_load_warns_and_is_named(tmp_path):
    """A core of another platform or torch: the reference serves, the reason is told, forcing it fails."""
    break_it = "import torch\ndef fail(path): raise OSError('undefined symbol: gone')\ntorch.ops.load_library = fail\n"
    if not has_native():
        pytest.skip("needs a built core")
    ran = python(break_it + INFO)
    assert "does not load" in ran.stderr and "undefined symbol: gone" in ran.stderr
    assert json.loads(ran.stdout)["devices"]["cpu"]["executor"] == "reference"
    assert python(break_it + INFO, ADVANCE_STEP_BACKEND="native").returncode != 0


@pytest.mark.parametrize("module", ["triton", "torch_npu"])
def test_a_placeholder_module_is_not_installed(module):
    """As engines leave them in sys.modules: without the __spec__ that importlib asks for."""
    ran = python(f"import sys, types, torch; sys.modules[{module!r}] = types.ModuleType({module!r}); " + INFO)
    assert ran.returncode == 0, ran.stderr
    if module == "triton":
        assert "triton is not installed" in json.loads(ran.stdout)["devices"]["cuda"]["why"]


def test_import_is_light():
    """Operators need torch alone: no model library, no terminal library, no Triton, no CUDA start-up."""
    heavy = ("transformers", "typer", "rich", "matplotlib")
    code = f"import sys, advance_step; print([m for m in {heavy} if m in sys.modules])"
    assert python(code).stdout.strip() == "[]"
    code = "import torch; before = set(__import__('sys').modules); import advance_step; " + (
        "print('triton' in set(__import__('sys').modules) - before, torch.cuda.is_initialized())"
    )
    assert python(code).stdout.strip() == "False False"


@pytest.mark.parametrize("command", [["-m", "advance_step"], ["-m", "advance_step", "info"]])
def test_command_prints_the_info(command):
    ran = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)
    assert advance_step.__version__ in ran.stdout
    assert advance_step.backend_info()["devices"]["cpu"]["executor"] in ran.stdout
