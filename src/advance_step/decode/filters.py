"""From logits to the token: each filter for all rows at once, every row with its own parameters.

The filters are transformers' (generation/logits_process.py), applied in its order; the penalties on the output are
vLLM's. A parameter at its neutral value leaves the row as it is, bit for bit. No function waits for the device, and no
shape depends on data.
"""

import torch
from torch import Tensor


def penalise(
    scores: Tensor,  # float32 [rows, vocabulary]
    in_prompt: Tensor,  # bool [rows, vocabulary]
    output_counts: Tensor,  # int32 [rows, vocabulary]
    repetition: Tensor,  # float32 [rows], neutral: 1
    presence: Tensor,  # float32 [rows], neutral: 0
    frequency: Tensor,  # float32 [rows], neutral: 0
) -> Tensor:
    """RepetitionPenaltyLogitsProcessor over prompt and output; then vLLM's penalties, over the output alone."""
    in_output = output_counts > 0
    repeated = torch.where(scores < 0, scores * repetition[:, None], scores / repetition[:, None])
    scores = torch.where(in_prompt | in_output, repeated, scores)
    return scores - frequency[:, None] * output_counts - presence[:, None] * in_output


def keep_likeliest(scores: Tensor, outside: Tensor, tail: Tensor) -> Tensor:
    """TopKLogitsWarper and then TopPLogitsWarper: what they remove is -inf.

    outside: int64 [rows]: vocabulary - top_k, neutral: 0. All tokens that equal the k-th likeliest stay.
    tail: float32 [rows]: 1 - top_p, or -1 where nothing is to be removed. Of equal tokens at the edge, where
        transformers leaves it to the sort, those with the smaller ids stay, as with the greedy choice.
    """
    ascending, token = (x.flip(-1) for x in scores.sort(dim=-1, descending=True, stable=True))
    removed = ascending < ascending.gather(-1, outside[:, None])
    cumulative = ascending.masked_fill(removed, -torch.inf).softmax(-1).cumsum(-1)
    in_tail = cumulative <= tail[:, None]
    in_tail[:, -1] = False  # the likeliest token always stays
    removed |= in_tail
    return scores.masked_fill(removed.scatter(-1, token, removed), -torch.inf)


def weights_above(scores: Tensor, min_p: Tensor) -> Tensor:
    """MinPLogitsWarper, and the softmax: probabilities with 0 for what is removed, not normalised again.

    min_p: float32 [rows], neutral: 0.
    """
    probabilities = scores.softmax(-1)
    least = min_p[:, None] * probabilities.amax(-1, keepdim=True)
    return probabilities.masked_fill(probabilities < least, 0)


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """The token (int64 [rows]) at which the cumulated weights, in vocabulary order, pass `uniform` of their sum.

    In float64: float32 sums over a vocabulary are off by more than the probability of its rare tokens.
    """
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    passed = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    return passed.clamp(max=weights.shape[-1] - 1)[:, 0]  # past the end only where the logits were no numbers
