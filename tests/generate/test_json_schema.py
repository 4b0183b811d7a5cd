"""Texts that are JSON of a schema, from a model of random weights: whatever it says, the grammar has let through."""

from __future__ import annotations

import json
import sys

import jsonschema
import pytest
import torch
import transformers
from tiny_directory import save_tiny, tiny_tokenizer
from tiny_models import decoder_for, run, tiny_model

from advance_step import decode
from advance_step.decode import Request, SamplingParams
from advance_step.decode.json_output import JsonGrammars
from advance_step.generate import job
from advance_step.generate.fields import take_schema
from advance_step.generate.records import LineError
from advance_step.generate.run_header import RunHeader
from advance_step.generate.settings import Settings, read_schema

EOS = 1
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 199},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
SCHEMAS = [
    PERSON,
    {"enum": ["red", "green", {"other": [1, 2.5, None]}]},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    {"anyOf": [{"type": "integer", "maximum": 9, "minimum": 0}, {"const": "none"}]},
]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def grammars(tokenizer):
    return JsonGrammars(tokenizer, 97, [EOS])


@pytest.mark.parametrize("options", [{}, {"steps_per_sync": 4}, {"draft_tokens": 3}, {"num_pages": 14}], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_text_is_json_of_its_schema(model, tokenizer, grammars, options, temperature):
    """Also where a row stands still, is put back, or is ahead of the host; the rows beside are as ever."""

    def requests(constrained: bool) -> list[Request]:
        made = []
        for i in range(12):
            schema = SCHEMAS[i % 4] if constrained and i % 3 else None
            processors = (grammars.constraint(schema),) if schema else ()
            params = SamplingParams(
                max_new_tokens=40, temperature=temperature, seed=i, logits_processors=processors, ignore_eos=not schema
            )
            made.append(Request(i, [5 + i, 9, 7], params))
        return made

    sizes = {"batch_size": 4, "block_size": 4, "max_seq_len": 48, "stop_token_ids": [EOS]}
    held, free = requests(True), requests(False)
    decoder = decoder_for(model, **sizes | options)
    run(decoder, held)
    run(decoder_for(model, **sizes), free)
    for i, (request, other) in enumerate(zip(held, free, strict=True)):
        if not i % 3:
            assert request.tokens == other.tokens
            continue
        assert (request.finish_reason, request.tokens[-1]) == ("stop", EOS)
        jsonschema.validate(json.loads(tokenizer.decode(request.tokens[:-1])), SCHEMAS[i % 4])
    if "num_pages" in options:
        assert decoder.figures.preemptions


def test_samples_of_one_prompt_have_a_processor_each(model, tokenizer, grammars):
    params = SamplingParams(
        max_new_tokens=40, temperature=1.0, seed=1, n=4, logits_processors=(grammars.constraint(PERSON),)
    )
    model.generation_config.eos_token_id = EOS
    texts = [c.text for c in decode.generate(model, tokenizer, [[5, 6]], params)]
    assert len(set(texts)) > 1
    for text in texts:
        jsonschema.validate(json.loads(text), PERSON)


def test_the_tokens_are_those_of_transformers_generate(model, grammars):
    constraint = grammars.constraint(PERSON)
    request = Request(0, [5, 6, 7], SamplingParams(max_new_tokens=40, logits_processors=(constraint,)))
    (tokens,) = run(decoder_for(model, stop_token_ids=[EOS]), [request])
    ids = torch.tensor([[5, 6, 7]])
    config = transformers.GenerationConfig(do_sample=False, max_new_tokens=40, eos_token_id=EOS, pad_token_id=0)
    processors = transformers.LogitsProcessorList([constraint.for_request([5, 6, 7])])
    model.set_attn_implementation("sdpa")
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), generation_config=config, logits_processor=processors
    )
    assert out[0, 3:].tolist() == tokens


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "foo"}, "JSON schema: Invalid type: foo"),
        ({"type": "string", "pattern": "("}, "JSON schema: regex parse error"),
        ({"type": "array", "uniqueItems": True}, "JSON schema: Unimplemented keys"),
        ({"type": "number", "minimum": 5, "maximum": 3}, "JSON schema: Unsatisfiable schema"),
    ],
)
def test_schemas_that_are_not_served(tmp_path, grammars, schema, message):
    with pytest.raises(ValueError, match=message):
        grammars.constraint(schema)
    (tmp_path / "s.json").write_text(json.dumps(schema))
    with pytest.raises(ValueError, match=f"--json-schema: .*s.json: {message}"):
        read_schema(str(tmp_path / "s.json"))


def test_files_that_hold_no_schema(tmp_path):
    for content, message in [("[1]", r"expected a JSON schema, got \[1\]"), ("{", "Expecting property name")]:
        (tmp_path / "s.json").write_text(content)
        with pytest.raises(ValueError, match=f"--json-schema: .*s.json: {message}"):
            read_schema(str(tmp_path / "s.json"))
    with pytest.raises(FileNotFoundError):
        read_schema(str(tmp_path / "none.json"))


def test_without_an_end_of_a_text_there_is_no_end_of_the_json(tokenizer):
    with pytest.raises(ValueError, match="JSON schema: expected a model with an end-of-sequence token, got none"):
        JsonGrammars(tokenizer, 97, []).constraint(PERSON)


def test_without_llguidance_one_line_says_how_to_get_it(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ValueError, match=r'llguidance is not installed: pip install "advance-step\[json\]"'):
        JsonGrammars(tokenizer, 97, [EOS]).constraint(PERSON)


def test_response_formats():
    def taken(value: object) -> object:
        return take_schema({"response_format": value})

    assert take_schema({}) is None and taken(None) is None
    assert taken({"type": "text"}) is False
    assert taken({"type": "json_object"}) == {"type": "object"}
    assert taken({"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": PERSON}}) == PERSON
    for wrong in ("json", {"type": "grammar"}, {"type": "json_schema", "json_schema": {"name": "x"}}, 5):
        with pytest.raises(LineError, match=r"response_format: expected .*, got "):
            taken(wrong)


def test_a_job(tmp_path, capsys):
    """A schema for all lines, one for a line, none for another; what cannot be is that line's error."""
    directory = save_tiny(tmp_path / "model")
    config = transformers.GenerationConfig.from_pretrained(directory)
    config.eos_token_id = EOS
    config.save_pretrained(directory)
    own = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMAS[2]}}
    lines = [
        {"id": "all", "prompt": "a"},
        {"id": "own", "prompt": "b", "response_format": own},
        {"id": "text", "prompt": "c", "response_format": {"type": "text"}, "max_new_tokens": 3, "ignore_eos": True},
        {
            "id": "bad",
            "prompt": "d",
            "response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}},
        },
        {"id": "endless", "prompt": "e", "ignore_eos": True},
        {"id": "longer", "prompt": "f", "min_new_tokens": 3},
        {
            "custom_id": "batch",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"messages": [{"role": "user", "content": "g"}], "response_format": own, "return_token_ids": True},
        },
    ]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = Settings(
        model=str(directory), dtype="float32", json_schema=PERSON, sampling={"max_new_tokens": 60, "seed": 0}, verify=2
    )
    assert job.generate([], str(source), str(output), False, settings) == 1
    assert "verified: 2 of 2 as transformers' generate" in capsys.readouterr().err
    results = {line.get("id", line.get("custom_id")): line for line in map(json.loads, output.read_text().splitlines())}
    batch = next(line for line in results.values() if "response" in line)
    jsonschema.validate(json.loads(results["all"]["text"]), PERSON)
    jsonschema.validate(json.loads(results["own"]["text"]), SCHEMAS[2])
    jsonschema.validate(json.loads(batch["response"]["body"]["choices"][0]["message"]["content"]), SCHEMAS[2])
    assert results["text"]["tokens"] == 3
    assert results["bad"]["error"].startswith("JSON schema: Unimplemented keys")
    assert results["endless"]["error"] == "ignore_eos: expected False of a text that is to be JSON, got True"
    assert results["longer"]["error"] == "min_new_tokens: expected 0 of a text that is to be JSON, got 3"
    assert RunHeader.read(output.with_name("out.jsonl.run.json")).settings["json_schema"] == PERSON
    settings.json_schema = SCHEMAS[1]
    with pytest.raises(ValueError, match="made with --json-schema"):
        job.generate([], str(source), str(output), True, settings)
