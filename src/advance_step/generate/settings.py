"""How a run decodes: the options of the command."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from advance_step.decode.json_output import check_schema
from advance_step.decode.loop import MAX_NUM_BATCHED_TOKENS
from advance_step.decode.sampling_params import SamplingParams
from advance_step.generate.records import JsonSchema, excerpt

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Settings:
    """Each field is the option of `advance-step generate` of that name.

    compile: None: where it pays (`engine.worth_compiling`).
    json_schema: the schema itself.
    sampling: the fields of SamplingParams that are options, as far as they were given; max_new_tokens and seed always.
    Raises ValueError for a dtype that is none, and for sampling that is out of range.
    """

    model: str | None = None
    device: str = "cpu"
    dtype: str = "bfloat16"
    raw: bool = False
    sampling: dict[str, Any] = field(default_factory=lambda: {"max_new_tokens": 128, "seed": 0})
    batch_size: int = 8
    block_size: int | None = None
    num_pages: int | None = None
    steps_per_sync: int | None = None
    max_num_batched_tokens: int = MAX_NUM_BATCHED_TOKENS
    draft_tokens: int = 0
    compile: bool | None = None
    ordered: bool = False
    verify: int = 0
    json_schema: JsonSchema | None = None
    ray: bool = False
    ray_cores: int | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype: expected one of {', '.join(DTYPES)}, got {self.dtype}")
        if self.ray_cores and not (self.ray and self.device == "cpu"):
            raise ValueError(f"--ray-cores: expected none without --ray or on GPUs, got {self.ray_cores}")
        SamplingParams(**self.sampling)  # refuses what is out of range

    @property
    def deciding(self) -> dict[str, Any]:
        """Those that results follow from: a run with others may not go on with the same output."""
        constrained = {"json_schema": self.json_schema} if self.json_schema is not None else {}
        return {"dtype": self.dtype, "raw": self.raw, "ordered": self.ordered, **self.sampling, **constrained}


def read_schema(path: str) -> JsonSchema:
    """The JSON schema of a file. ValueError for one that has none, or one that cannot be served; OSError."""
    try:
        schema = json.loads(Path(path).read_bytes())
        if not isinstance(schema, dict):
            raise ValueError(f"expected a JSON schema, got {excerpt(schema)}")
        check_schema(schema)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--json-schema: {path}: {error}") from error
    return schema
