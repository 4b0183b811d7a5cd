"""How one request is sampled, and what of a model's own generation config takes part in it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

# Token ids so far [1, length] and logits [1, vocabulary] to logits [1, vocabulary], as transformers' LogitsProcessor.
LogitsProcessor = Callable[[Tensor, Tensor], Tensor]


class ProcessorMaker(Protocol):
    """Makes the logits processor of a request."""

    def for_request(self, prompt_ids: Sequence[int]) -> LogitsProcessor: ...


# Below it float32 logits divided by the temperature could pass float32's largest; vLLM takes such for greedy.
MIN_TEMPERATURE = 1e-5

INT64 = range(-(2**63), 2**63)


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled. Raises ValueError: "temperature: expected temperature >= 0, got -1".

    The order is that of transformers: penalties, min_new_tokens, logits_processors, temperature, top_k, top_p, min_p.

    max_new_tokens: tokens that are generated at most.
    temperature: what the logits are divided by; 0: the likeliest token, and no randomness (greedy).
    top_k: only tokens as likely as the k-th likeliest, ties included; 0: all.
    top_p: only the likeliest tokens, as few as have at least this probability together; 1: all.
    min_p: only tokens that have at least this share of the likeliest one's probability; 0: all.
    repetition_penalty: a token of the prompt or of the output has its logit divided by it where positive and multiplied
        where negative (transformers); 1: off.
    presence_penalty, frequency_penalty: subtracted from the logit of a token of the output, once, and once for each
        time that it occurs (OpenAI, vLLM); 0: off.
    seed: the same seed gives the same text, whatever the batch around it; None: the engine draws one.
    stop: strings that end the text, which is cut before them; one string stands for a tuple of one.
    stop_token_ids: tokens that end the request beside the model's own.
    ignore_eos: the model's own end-of-sequence tokens end nothing.
    min_new_tokens: until so many are generated, neither the model's end-of-sequence tokens nor stop_token_ids can be
        sampled, and stop strings are not looked at.
    logprobs: None: none; 0: those of the generated tokens; N: and of the N likeliest at each. They are of the model's
        distribution, before penalties, temperature and filters (vLLM's "raw_logprobs").
    n: samples of one prompt. With temperature 0 they would be equal, and more than one is refused, as in vLLM.
    logits_processors: functions of (token ids so far [1, length], logits [1, vocabulary]) that return the logits, as
        transformers' are; or, where each request is to have one of its own, something with a method
        for_request(prompt_ids) that makes it. It is made anew when a row that was put back goes on, and is then given
        all tokens so far. A batch with such a request waits for the device at every step, and cannot be captured.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_new_tokens: int = 0
    logprobs: int | None = None
    n: int = 1
    logits_processors: tuple[LogitsProcessor | ProcessorMaker, ...] = ()

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids", "logits_processors"):
            object.__setattr__(self, name, _as_tuple(name, getattr(self, name)))
        self._check_int("max_new_tokens", 1)
        self._check_float("temperature", 0, math.inf)
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise ValueError(f"temperature: expected 0 or temperature >= {MIN_TEMPERATURE}, got {self.temperature!r}")
        self._check_int("top_k", 0)
        self._check_float("top_p", 0, 1)
        self._check_float("min_p", 0, 1)
        self._check_float("repetition_penalty", 0, math.inf, positive=True)
        self._check_float("presence_penalty", -2, 2)  # OpenAI's range, and vLLM's
        self._check_float("frequency_penalty", -2, 2)
        if self.seed is not None and not (_is_int(self.seed) and self.seed in INT64):
            raise ValueError(f"seed: expected None or a 64-bit integer, got {self.seed!r}")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise ValueError(f"stop: expected strings that are not empty, got {text!r}")
        for token in self.stop_token_ids:
            if not _is_int(token) or token < 0:
                raise ValueError(f"stop_token_ids: expected token ids >= 0, got {token!r}")
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(f"ignore_eos: expected a bool, got {self.ignore_eos!r}")
        self._check_int("min_new_tokens", 0)
        if self.min_new_tokens > self.max_new_tokens:
            expected = f"min_new_tokens <= max_new_tokens={self.max_new_tokens}"
            raise ValueError(f"min_new_tokens: expected {expected}, got {self.min_new_tokens}")
        if self.logprobs is not None:
            self._check_int("logprobs", 0)
        self._check_int("n", 1)
        if self.n > 1 and self.temperature == 0:
            raise ValueError(f"n: expected 1 with temperature=0, where all samples are equal, got {self.n}")
        for function in self.logits_processors:
            if not callable(function) and not hasattr(function, "for_request"):
                raise ValueError(f"logits_processors: expected functions, got {function!r}")

    @classmethod
    def from_generation_config(cls, config: Any, **overrides: Any) -> "SamplingParams":
        """Parameters with `overrides` as given, and the rest as a transformers GenerationConfig sets them.

        What neither sets keeps the default of this class, transformers' own top_k of 50 included: it is no model's.
        A config without do_sample is greedy, as it is for transformers. Its eos_token_id is the engine's business;
        what else it sets and is not honoured, `ignored_fields` names.
        """
        values = {name: getattr(config, field, None) for field, name in HONOURED.items()}
        if not getattr(config, "do_sample", None):
            values["temperature"] = 0.0
        elif values["temperature"] is None:
            values["temperature"] = 1.0
        known = {name: value for name, value in values.items() if value is not None}
        return cls(**known | overrides)

    @property
    def penalises(self) -> bool:
        """Whether logits depend on the tokens so far by one of the penalties."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def processors_for(self, prompt_ids: Sequence[int]) -> list[LogitsProcessor]:
        """The logits processors of one request of these parameters."""
        return [f.for_request(prompt_ids) if hasattr(f, "for_request") else f for f in self.logits_processors]

    def _check_int(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if not _is_int(value) or value < least:
            raise ValueError(f"{name}: expected an integer, {name} >= {least}, got {value!r}")

    def _check_float(self, name: str, least: float, most: float, positive: bool = False) -> None:
        value = getattr(self, name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        expected = f"{name} {'>' if positive else '>='} {least}" if most == math.inf else f"{least} <= {name} <= {most}"
        if not number or value < least or value > most or (positive and value == 0):
            raise ValueError(f"{name}: expected {expected}, got {value!r}")
        if not math.isfinite(value):
            raise ValueError(f"{name}: expected a finite {expected}, got {value!r}")


# Field of a transformers GenerationConfig, and the parameter that it fills.
HONOURED = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_new_tokens",
    "min_new_tokens": "min_new_tokens",
    "stop_strings": "stop",
}

# Fields of a GenerationConfig that change the generated tokens and are not honoured, and the values (beside None) that
# change nothing.
IGNORED: dict[str, tuple[Any, ...]] = {
    "max_length": (),
    "min_length": (0,),
    "max_time": (),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "diversity_penalty": (0.0,),
    "length_penalty": (1.0,),
    "early_stopping": (False,),
    "constraints": (),
    "force_words_ids": (),
    "penalty_alpha": (0.0,),
    "dola_layers": (),
    "top_h": (),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "remove_invalid_values": (False,),
    "exponential_decay_length_penalty": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ({}, []),
    "token_healing": (False,),
    "guidance_scale": (1.0,),
    "watermarking_config": (),
    "assistant_ensemble_weight": (),
}


def ignored_fields(config: Any) -> list[str]:
    """The fields of a transformers GenerationConfig that ask for other tokens and are not honoured: "num_beams=4"."""
    found = {name: getattr(config, name, None) for name in IGNORED}
    if getattr(config, "max_new_tokens", None) is not None:  # goes before max_length in transformers too
        found["max_length"] = None
    return [f"{name}={value!r}" for name, value in found.items() if value is not None and value not in IGNORED[name]]


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _as_tuple(name: str, value: Any) -> tuple[Any, ...]:
    if isinstance(value, str) and name == "stop":
        return (value,)
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name}: expected a list or a tuple, got {value!r}")
    return tuple(value)
