"""Each test that needs the emulated NPU has a process of its own: torch cannot take a device away again."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import advance_step
from advance_step.ascend import emulation
from advance_step.ascend import torch_npu as npu_patch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PAGE = ROOT.parent / "shared/seed/npu_advance_step_flashattn.zh.md"
RUN = "import sys; from advance_step.ascend.script import run; sys.exit(run(sys.argv[1], sys.argv[2:]))"


def python(*args, cwd=None, **environment):
    package = str(Path(advance_step.__file__).parents[1])  # the one under test, wherever the child runs
    environment = os.environ | environment | {"PYTHONPATH": package}
    return subprocess.run(
        [sys.executable, *map(str, args)], capture_output=True, text=True, timeout=300, cwd=cwd, env=environment
    )


def emulate(script, *args, cwd=None):
    return python("-c", RUN, script, *args, cwd=cwd)


@pytest.mark.parametrize("suite", ["device", "operator", "modules", "processes"])
def test_the_device(suite):
    suite = HERE / f"emulated_{suite}.py"
    done = python("-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", suite, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def page(tmp_path):
    if not PAGE.is_file():
        pytest.skip(f"the operator's public page is not at {PAGE}")
    script = tmp_path / "page.py"
    script.write_text(PAGE.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0], encoding="utf-8")
    return script


def test_the_public_pages_example_runs_unmodified(page):
    done = emulate(page)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


PAGE_RESULT = """
import runpy, sys
import numpy as np
from advance_step.ascend import emulation

emulation.enable()
for seed in range(100):
    np.random.seed(seed)
    end = runpy.run_path(sys.argv[1])
    given = {name: end[name].tolist() for name in ("sampled_token_id", "seq_len", "block_table")}
    rows = zip(*(end[name].tolist() for name in ("input_tokens", "input_positions", "seq_lens", "slot_mappings")))
    for i, row in enumerate(rows):
        p = given["seq_len"][i]
        live = lambda: (given["sampled_token_id"][i][0], p, p + 1, given["block_table"][i][p // 8] * 8 + p % 8)
        assert row == (live() if i < 8 else (0, 0, p, -1)), (seed, i, row)
    assert end["sampled_token_ids"].tolist() == given["sampled_token_id"]
    assert end["block_tables"].tolist() == given["block_table"]
print("seeds:", seed + 1)
"""


def test_the_public_pages_example_leaves_what_the_contract_says(page):
    done = python("-c", PAGE_RESULT, page)
    assert (done.stdout, done.stderr) == ("seeds: 100\n", "")


CONFORMANCE = """
from advance_step.ascend import emulation
from advance_step.conformance.run import check

emulation.enable()
import torch_npu

results = list(check(torch_npu.npu_advance_step_flashattn, "npu", "npu"))
print(len(results) > 30, [result for result in results if result.outcome != "holds"])
"""


def test_the_emulated_operator_holds_the_whole_contract():
    done = python("-c", CONFORMANCE, ADVANCE_STEP_CHECK="1")  # bad values are refused there: an NPU's, when it checks
    assert (done.stdout, done.stderr) == ("True []\n", "")


@pytest.mark.parametrize(
    ("script", "last_line"),
    [
        ("plain.py", "plain: every row as the contract says"),
        ("speculative.py", "speculative: every row as the contract says"),
        ("decode_loop.py", "32 steps of 3 rows: the CPU's tokens"),
    ],
)
def test_the_examples(script, last_line):
    done = emulate(ROOT / "examples/ascend" / script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == last_line


ABOUT = """
import os, sys, __main__
class Kept: pass
os.chdir("/")
print(__name__, __file__, __package__, __spec__ and __spec__.name, type(__loader__).__name__, sys.argv)
print(sys.path[0], __main__.Kept is Kept, Kept.__module__, sorted(n for n in globals() if n[:2] == "__"))
"""
ENDINGS = {
    "about": ABOUT,
    "beside": "import beside; print(beside.answer)",
    "exit-code": "import sys; sys.exit(5)",
    "exit-message": "import sys; sys.exit('no luck')",
    "exit-list": "import sys; sys.exit(['bad', 1])",
    "exit-none": "raise SystemExit",
    "exit-large": "import os; print(1, flush=True); os._exit(3)",
    "syntax": "x = (",
    "exception": "def f():\n    1 / 0\ntry:\n    f()\nexcept ArithmeticError as e:\n    raise ValueError('so') from e",
    "interrupt": "import atexit; atexit.register(print, 'last'); print('first'); raise KeyboardInterrupt",
    "hook": "import sys; sys.excepthook = lambda *e: print('hooked', e[0], e[2].tb_lineno); 1 / 0",
    "atexit": "import atexit, sys; here = 7; atexit.register(lambda: print(here, sys.modules['__main__'].here))",
    "thread": "import threading, time; threading.Thread(target=lambda: (time.sleep(0.2), print('late'))).start()",
    "warning": "import warnings; warnings.warn('old', DeprecationWarning)",
    "encoding": "# coding: latin-1\nprint(ascii('\xe9'))",
}


@pytest.mark.parametrize("name", ENDINGS)
def test_a_script_runs_as_python_would_run_it(tmp_path, name):
    (tmp_path / "beside.py").write_text("answer = 42")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "script.py").write_text(ENDINGS[name], encoding="latin-1")
    arguments = ("../script.py", "--help", "5")
    done = emulate(*arguments, cwd=tmp_path / "elsewhere")
    expected = python(*arguments, cwd=tmp_path / "elsewhere")
    assert (done.returncode, done.stdout, done.stderr) == (expected.returncode, expected.stdout, expected.stderr)


@pytest.mark.parametrize(
    "arguments",
    [("-m", "package.module", "-x"), ("-m", "package"), ("-c", ABOUT.replace("__file__", "0"), "a"), (".",)],
    ids=str,
)
def test_modules_code_and_directories_run_as_with_python(tmp_path, arguments):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("answer = 42")
    (tmp_path / "package" / "module.py").write_text("from . import answer\nprint(answer)" + ABOUT)
    (tmp_path / "package" / "__main__.py").write_text("from . import answer\nprint(answer)" + ABOUT)
    (tmp_path / "__main__.py").write_text(ABOUT)
    done, expected = emulate(*arguments, cwd=tmp_path), python(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (expected.returncode, expected.stdout, expected.stderr)
    assert expected.returncode == 0


def test_a_traceback_has_no_frames_of_the_emulation(tmp_path):
    (tmp_path / "script.py").write_text("import torch\ntorch.ones(2, device='npu') + torch.ones(2)")
    done = emulate("script.py", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("File ") == 1 and f'File "{tmp_path}/script.py", line 2, in <module>' in done.stderr
    assert done.stderr.endswith("other is on cpu, other tensors are on npu:0 (in aten.add.Tensor)\n")


def test_no_such_script(tmp_path):
    done = emulate(tmp_path / "none.py")
    assert done.returncode == 2
    assert done.stderr == f"advance-step emulate-npu: {tmp_path / 'none.py'}: no such file\n"


def test_the_command(tmp_path):
    pytest.importorskip("typer")
    (tmp_path / "script.py").write_text("import sys, torch_npu\nprint(sys.argv[1:])\nsys.exit(4)\n")
    done = python("-m", "advance_step", "emulate-npu", "script.py", "--help", "-x", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (4, "['--help', '-x']\n", "")
    done = python("-m", "advance_step", "emulate-npu", "-m", "script", "-x", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (4, "['-x']\n", "")


# Refusals: before anything in this process has changed


@pytest.fixture(autouse=True)
def nothing_changes():
    yield
    assert "torch_npu" not in sys.modules and not hasattr(torch, "npu")
    assert torch._C._get_privateuse1_backend_name() == "privateuseone"


def test_importing_changes_nothing():
    importlib.reload(emulation)
    importlib.reload(npu_patch)


def test_a_real_torch_npu_is_not_hidden(tmp_path, monkeypatch):
    (tmp_path / "torch_npu.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match=r"torch_npu is installed \(.*torch_npu\.py\).*run the script itself"):
        emulation.enable()


def test_another_device_has_the_place(monkeypatch):
    monkeypatch.setattr(torch._C, "_get_privateuse1_backend_name", lambda: "xyz")
    with pytest.raises(RuntimeError, match='already the device "xyz"'):
        emulation.enable()
    monkeypatch.undo()


def test_an_older_torch_is_told_what_is_needed(monkeypatch):
    monkeypatch.delattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend")
    with pytest.raises(RuntimeError, match=r"needs a torch .* \(.*tested with 2\.13\), got torch"):
        emulation.enable()


def test_patching_wants_torch_npu():
    with pytest.raises(ModuleNotFoundError, match="torch_npu"):
        npu_patch.patch()
    npu_patch.unpatch()
