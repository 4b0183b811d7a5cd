"""Every operator: its schema, its reference, its contract. The list on one screen; the rest of this file binds it.

The dispatcher is the dispatch table. Here each operator gets its schema, its fake kernel, and the reference as the
kernel of every device that has none of its own (`_backends.py` attaches the native and the Triton kernels).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch

from advance_step import _contracts as contracts
from advance_step import reference
from advance_step.errors import CHECK_VALUES, Call


class Operator(NamedTuple):
    schema: str
    reference: Callable[..., None]
    check_arguments: Callable[[Call], None]  # refuses shapes, dtypes, devices, scalars
    check_values: Callable[[Call], None] | None  # refuses values in tensors; None: each has a meaning
    same: Collection[tuple[str, str]] = ()  # (written, read) arguments that may be one and the same memory


STATE = "Tensor(a!) input_tokens, Tensor sampled_token_ids, Tensor(b!) input_positions, Tensor(c!) seq_lens"
STEP = f"SymInt num_seqs, SymInt num_queries, SymInt block_size, {STATE}, Tensor(d!) slot_mapping, Tensor block_tables"

OPERATORS = [
    Operator(
        f"npu_advance_step_flashattn({STATE}, Tensor(d!) slot_mapping, Tensor block_tables, "
        "SymInt num_seqs, SymInt num_queries, SymInt block_size, *, "
        "Tensor? spec_token=None, Tensor? accepted_num=None) -> ()",
        reference.npu_advance_step_flashattn_ref,
        contracts.check_npu_arguments,
        contracts.check_npu_values,
        same=[("input_tokens", "sampled_token_ids")],
    ),
    Operator(
        f"advance_step_flashattn({STEP}) -> ()",
        reference.advance_step_flashattn_ref,
        contracts.check_vllm_arguments,
        contracts.check_vllm_values,
        same=[("input_tokens", "sampled_token_ids")],
    ),
    Operator(
        f"advance_step_flashinfer({STEP}, Tensor(e!) paged_kv_indices, Tensor(f!) paged_kv_indptr, "
        "Tensor(g!) paged_kv_last_page_len, Tensor(h!) block_table_bound) -> ()",
        reference.advance_step_flashinfer_ref,
        contracts.check_flashinfer_arguments,
        contracts.check_flashinfer_values,
        same=[("input_tokens", "sampled_token_ids")],
    ),
    Operator(
        "eagle_step_update_slot_mapping_and_metadata(Tensor positions_1d, Tensor block_table_tensor, "
        "Tensor(a!) seq_lens, SymInt block_size, SymInt max_model_len, Tensor(b!) out_clamped_positions, "
        "Tensor(c!) out_slot_mapping, SymInt? input_batch_size=None) -> ()",
        reference.eagle_step_update_slot_mapping_and_metadata_ref,
        contracts.check_eagle_arguments,
        None,
        same=[("out_clamped_positions", "positions_1d")],
    ),
    Operator(
        f"advance_until_stop({STATE}, Tensor(d!)[] slot_mappings, Tensor[] block_tables, SymInt[] block_sizes, "
        "Tensor(e!) status, Tensor(f!) output_tokens, Tensor(g!) num_generated, "
        "Tensor stop_token_ids, Tensor max_seq_lens, *, SymInt pad_slot=-1) -> ()",
        reference.advance_until_stop_ref,
        contracts.check_until_stop_arguments,
        contracts.check_until_stop_values,
        same=[("input_tokens", "sampled_token_ids")],
    ),
    Operator(
        "compute_slot_mapping(Tensor query_start_loc, Tensor positions, Tensor block_table, Tensor(a!) slot_mapping, "
        "SymInt block_size, *, SymInt cp_world_size=1, SymInt cp_rank=0, SymInt cp_interleave=1, "
        "SymInt pad_slot=-1) -> ()",
        reference.compute_slot_mapping_ref,
        contracts.check_slot_mapping_arguments,
        contracts.check_slot_mapping_values,
    ),
]

LIBRARY = torch.library.Library("advance_step", "DEF")


def name_of(operator: Operator) -> str:
    return operator.schema.split("(")[0]


def check(operator: Operator, arguments: dict[str, Any], fake: bool = False) -> Call:
    """Raises the ValueError or DtypeError of a call that `operator`'s contract refuses; writes nothing."""
    call = Call(name_of(operator), arguments)
    operator.check_arguments(call)
    if not fake:
        call.own_memory(_written(operator), operator.same)
        if operator.check_values and (CHECK_VALUES or next(iter(call.tensors.values())).device.type == "cpu"):
            operator.check_values(call)
    return call


def checked(operator: Operator, kernel: Callable[..., None]) -> Callable[..., None]:
    """`kernel` behind the contract's checks, as the dispatcher calls it."""

    def call(*args: Any, **kwargs: Any) -> None:
        checked_call = check(operator, _bind(operator, args, kwargs))
        kernel(*args, **kwargs)
        # A backward that needs a value from before the call is to raise; of a kernel's writes autograd does not know.
        torch.autograd.graph.increment_version(checked_call.named(_written(operator)).values())

    return call


def explained(error: Exception, name: str, arguments: dict[str, Any]) -> Exception:
    """What to raise for `error`, which the operator called `name` raised: its contract's own refusal, if it has one.

    The native core, being C++, can raise a ValueError but no TypeError, and the dispatcher refuses what is no tensor
    with a RuntimeError. `arguments` holds the operator's by name; whatever else it holds is left out.
    """
    operator = next(o for o in OPERATORS if name_of(o) == name)
    try:
        check(operator, {a.name: arguments[a.name] for a in _arguments(operator)})
    except ValueError as refusal:
        return refusal
    except RuntimeError:  # a tensor without memory to look at, under torch's function transforms
        return error
    return error


def _arguments(operator: Operator) -> list[Any]:
    return getattr(torch.ops.advance_step, name_of(operator)).default._schema.arguments


def _written(operator: Operator) -> list[str]:
    return [a.name for a in _arguments(operator) if a.is_write]


def _bind(operator: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name; the dispatcher leaves out those that have their default."""
    arguments = {a.name: a.default_value for a in _arguments(operator)}
    return arguments | dict(zip(arguments, args, strict=False)) | kwargs


def _define(operator: Operator) -> None:
    name = name_of(operator)
    LIBRARY.define(operator.schema, tags=(torch.Tag.pt2_compliant_tag,))
    # Under inference_mode torch's own operators write into tensors that were made in it, as kernels do anywhere.
    LIBRARY.impl(name, checked(operator, torch.inference_mode()(operator.reference)), "CompositeExplicitAutograd")
    for key in ("Autograd", "ADInplaceOrView"):  # integers have no gradient: nothing to do there
        LIBRARY.impl(name, torch.library.fallthrough_kernel, key)

    @torch.library.register_fake(f"advance_step::{name}", lib=LIBRARY)
    def fake(*args: Any, **kwargs: Any) -> None:
        check(operator, _bind(operator, args, kwargs), fake=True)

    def refuse_lazy(*args: Any, **kwargs: Any) -> None:
        check(operator, _bind(operator, args, kwargs))

    for key in ("Negative", "Conjugate"):  # a tensor whose memory does not hold its values; torch would write a copy
        LIBRARY.impl(name, refuse_lazy, key)

    # The native core asks this for its words: why the contract refuses the call, or "" if it does not.
    def refusal(*args: Any, **kwargs: Any) -> str:
        try:
            check(operator, _bind(operator, args, kwargs))
        except ValueError as error:
            return str(error)
        return ""

    reads_only = re.sub("[(][a-z]![)]", "", operator.schema.removesuffix("()").replace(name, f"{name}_refusal", 1))
    LIBRARY.define(f"{reads_only}str")
    LIBRARY.impl(f"{name}_refusal", refusal, "CompositeExplicitAutograd")


for _operator in OPERATORS:
    _define(_operator)
