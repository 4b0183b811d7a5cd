"""Decoding of Hugging Face causal LMs over a paged KV cache, each step advanced in place by the operators.

`generate` takes prompts and returns texts; `Decoder` takes requests, as they come, and gives them back as they finish.
`pack_linears` prepares a 16-bit model for a CPU.
"""

from advance_step.decode.generate import Completion, generate
from advance_step.decode.loop import Decoder
from advance_step.decode.packed_linear import pack_linears
from advance_step.decode.request import Figures, Occupancy, Request
from advance_step.decode.sampling import TokenLogprobs
from advance_step.decode.sampling_params import SamplingParams

__all__ = [
    "Completion",
    "Decoder",
    "Figures",
    "Occupancy",
    "Request",
    "SamplingParams",
    "TokenLogprobs",
    "generate",
    "pack_linears",
]
