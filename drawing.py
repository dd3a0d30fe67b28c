"""From logits to tokens: temperature, nucleus, one uniform number a row.

    logits -> log_probs -> nucleus, where top-p cuts -> invert the cumulative distribution -> ids

A uniform number per row makes a draw independent of the batch. Left out: top-k, penalties.
"""

import math

import torch


def draw(logits, temperature, top_p, uniform, any_greedy=None, any_nucleus=None):
    """Draw one token per row by inverse CDF; temperature 0 takes the most likely one.

    logits (b, V) fp32; temperature, top_p and uniform (b,). Returns, (b,) each: ids; log-probs at
    that temperature over the full vocabulary; cut, the log-prob at which the row's nucleus ends
    (-inf without one); log mass, the log of the nucleus's probability. any_greedy, any_nucleus:
    what some row asks for; where both are told nothing here looks at the data, so that it can be
    recorded as a CUDA graph.
    """
    greedy, has_nucleus = temperature == 0, top_p < 1
    quick = None
    if any_nucleus is None:
        any_greedy, any_nucleus, quick = greedy.any(), has_nucleus.any(), 256
    logp = log_probs(logits, temperature)  # (b, V)
    weights = logp.exp()
    cut = torch.full_like(uniform, -math.inf)
    log_mass = torch.zeros_like(uniform)
    if any_nucleus:
        # of a row without one the likeliest token will do: it takes no second look
        found = nucleus(logp, torch.where(has_nucleus, top_p, 0.0), quick)
        cut = torch.where(has_nucleus, found, cut)
        weights = weights.masked_fill(~(logp >= cut[:, None]), 0.0)
        log_mass = torch.where(has_nucleus, weights.sum(1).log(), log_mass)
    ids = invert(weights, uniform)
    if any_greedy:
        ids = torch.where(greedy, logits.argmax(1), ids)
    return ids, logp.gather(1, ids[:, None])[:, 0], cut, log_mass


def log_probs(logits, temperature):
    """(b, V) at each row's temperature; at 0, which divides nothing, at 1."""
    logits = logits / temperature.masked_fill(temperature == 0, 1.0)[:, None]
    return logits - logits.logsumexp(1, keepdim=True)


def invert(weights, uniform):
    """The id (b,) at which the sum of the weights (b, V) passes the uniform number's share."""
    cdf = weights.cumsum(1)  # (b, V)
    total = cdf[:, -1]
    # Below the total, so that rounding never reaches a last token of weight 0.
    point = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, point[:, None], right=True)[:, 0]


def nucleus(logp, top_p, quick):
    """The log-prob at which each row's nucleus ends: the fewest likeliest tokens that have top_p.

    logp (m, V), top_p (m,) -> (m,): half-way between the last token inside and the first outside,
    so that rounding moves no token over it; -inf where all are inside (arXiv 1904.09751).
    quick: so many tokens are looked at first, for a nucleus is nearly always small; None: all.
    """
    vocabulary = logp.shape[1]
    for k in (min(quick or vocabulary, vocabulary), vocabulary):
        top = logp.topk(k).values  # (m, k) descending
        before = top.exp().cumsum(1) - top.exp()  # probability of the tokens before each
        size = (before < top_p[:, None]).sum(1, keepdim=True).clamp(min=1)  # (m, 1)
        if k == vocabulary or (size < k).all():
            break
    last_inside = top.gather(1, size - 1)
    first_outside = top.gather(1, size.clamp(max=k - 1))
    return ((last_inside + first_outside) / 2).masked_fill(size >= k, -math.inf)[:, 0]
