"""The fields of a line that say how it is sampled, under our names and those of the OpenAI API."""

from dataclasses import fields
from typing import Any, Literal

from advance_step.decode.sampling_params import SamplingParams
from advance_step.generate.records import JsonSchema, LineError, excerpt

SAMPLING = {field.name for field in fields(SamplingParams)} - {"logits_processors"}
ALIASES = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "top_logprobs": "top_logprobs",  # with "logprobs": true, as the chat API has it
}

# Fields of the OpenAI API, and of vLLM's, that we do not serve, and the values that change nothing.
UNSERVED: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "extra_body": ({},),
    "function_call": ("none",),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1.0,),
    "logit_bias": ({},),
    "logits_processors": ([],),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_logprobs": (),
    "reasoning_effort": (),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stream": (False,),
    "stream_options": (),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "web_search_options": (),
}


def take_sampling(entry: dict[str, Any]) -> dict[str, Any]:
    """Take the sampling fields out of `entry`, under the names of SamplingParams; their values are judged there.

    A field that is null is as good as left out. Raises LineError for a field that we do not serve and that asks for
    something, and for one that is set twice.
    """
    for name, neutral in UNSERVED.items():
        value = entry.pop(name, None)
        if value is not None and value not in neutral:
            raise LineError(f"{name}: this field is not served, got {excerpt(value)}")
    sampling: dict[str, Any] = {}
    for name in (*sorted(SAMPLING), *ALIASES):
        value = entry.pop(name, None)
        if value is None:
            continue
        known = ALIASES.get(name, name)
        if sampling.setdefault(known, value) != value:
            raise LineError(f"{name}: expected {known}={sampling[known]!r}, as the line has it too, got {value!r}")
    if sampling.get("top_k") == -1:  # vLLM's word for all
        sampling["top_k"] = 0
    _settle_logprobs(sampling)
    return sampling


def take_schema(entry: dict[str, Any]) -> JsonSchema | Literal[False] | None:
    """Take `response_format` out of `entry`: the schema that it asks for; False: any text; None: it is left out."""
    value = entry.pop("response_format", None)
    if value is None:
        return None
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return False
    if kind == "json_object":
        return {"type": "object"}
    given = value.get("json_schema") if kind == "json_schema" else None
    schema = given.get("schema") if isinstance(given, dict) else None
    if not isinstance(schema, dict):
        forms = '{"type": "text"}, {"type": "json_object"} or {"type": "json_schema", "json_schema": {"schema": {...}}}'
        raise LineError(f"response_format: expected {forms}, got {excerpt(value)}")
    return schema


def _settle_logprobs(sampling: dict[str, Any]) -> None:
    """The chat API's pair of fields, {"logprobs": true, "top_logprobs": 5}, as one number."""
    top = sampling.pop("top_logprobs", None)
    wanted = sampling.get("logprobs")
    if wanted is True:
        sampling["logprobs"] = top or 0
    elif top:
        raise LineError(f'top_logprobs: expected "logprobs": true beside it, got {excerpt(wanted)}')
    elif wanted is False:
        del sampling["logprobs"]


def take_flag(entry: dict[str, Any], name: str) -> bool:
    """Take a field that is true, false or left out out of `entry`."""
    value = entry.pop(name, None)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise LineError(f"{name}: expected true or false, got {excerpt(value)}")
