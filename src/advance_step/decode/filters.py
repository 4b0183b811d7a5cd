"""From logits to the token: each filter for all rows at once, every row with its own parameters.

The filters are transformers' (generation/logits_process.py), applied in its order; the penalties on the output are
vLLM's. A parameter at its neutral value leaves the row as it is, bit for bit. No function waits for the device, and no
shape depends on data.
"""

import torch
from torch import Tensor

PARTS = 64  # of a vocabulary


def likeliest(scores: Tensor) -> Tensor:
    """The first of the largest scores of each row [rows, vocabulary]: int64 [rows].

    On a CPU by parts of the vocabulary: the largest value of each is found three times as fast as its place.
    (torch.argmax is the slowest in bfloat16.)
    """
    if scores.device.type != "cpu" or scores.shape[-1] % PARTS:
        return scores.max(-1).indices
    parts = scores.unflatten(-1, (PARTS, -1))
    part = parts.amax(-1).max(-1).indices  # [rows]
    within = parts[torch.arange(len(part)), part].max(-1).indices
    return part * parts.shape[-1] + within


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


def keep_top_k(scores: Tensor, outside: Tensor, most: int) -> Tensor:
    """TopKLogitsWarper: what is less likely than a row's k-th likeliest token is -inf; what equals it stays.

    outside: int64 [rows]: vocabulary - top_k, neutral: 0.
    most: the largest top_k of the rows that have one, or more.
    """
    vocab_size = scores.shape[-1]
    likeliest = scores.topk(min(most, vocab_size), -1).values
    last = (vocab_size - 1 - outside).clamp(max=likeliest.shape[-1] - 1)[:, None]
    return torch.where((scores < likeliest.gather(-1, last)) & (outside > 0)[:, None], -torch.inf, scores)


def keep_top_p(scores: Tensor, tail: Tensor) -> Tensor:
    """TopPLogitsWarper: the least likely tokens that have at most the tail's probability together are -inf.

    tail: float32 [rows]: 1 - top_p, or -1 where nothing is to be removed. Of equal tokens at the edge, where
        transformers leaves it to its sort, those with the smaller ids stay, as with the greedy choice.
    """
    probabilities = scores.softmax(-1)
    # The tokens that are below this have half the tail's probability at most, all of them: they need no order. To sort
    # the rest among equals is several times faster than to sort a vocabulary.
    sortable = torch.where(probabilities < tail[:, None] / (2 * scores.shape[-1]), -torch.inf, scores)
    token = sortable.sort(dim=-1, descending=True, stable=True).indices.flip(-1)  # the likeliest last
    removed = probabilities.gather(-1, token).cumsum(-1) <= tail[:, None]
    removed[:, -1] = False  # the likeliest token always stays
    return torch.where(removed.scatter(-1, token, removed), -torch.inf, scores)


def weights_above(scores: Tensor, min_p: Tensor) -> Tensor:
    """MinPLogitsWarper, and the softmax: probabilities with 0 for what is removed, not normalised again.

    min_p: float32 [rows], neutral: 0.
    """
    probabilities = scores.softmax(-1)
    least = min_p[:, None] * probabilities.amax(-1, keepdim=True)
    return torch.where(probabilities < least, 0, probabilities)


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """The token (int64 [rows]) at which the cumulated weights, in vocabulary order, pass `uniform` of their sum.

    In float64: float32 sums over a vocabulary are off by more than the probability of its rare tokens.
    """
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    passed = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    return passed.clamp(max=weights.shape[-1] - 1)[:, 0]  # past the end only where the logits were no numbers
