"""Drawing tokens: frequencies, the nucleus, the edges."""

import math

import numpy as np
import pytest
import torch

import sampler


def nucleus_of(probabilities, top_p):
    """Its tokens, by the definition: the fewest likeliest that reach top_p together."""
    order = probabilities.argsort(descending=True)
    return order[: int((probabilities[order].cumsum(0) < top_p).sum()) + 1]


def chi_square(counts, probabilities):
    """(statistic, a bound of 5 standard deviations); tokens expected under 5 times are one bin."""
    expected = probabilities.double() * counts.sum()
    often = expected >= 5
    pairs = (counts.double(), expected)
    o, e = (torch.cat([x[often], x[~often].sum()[None]]) for x in pairs)
    n = len(o) - 1
    return ((o - e) ** 2 / e.clamp(min=1e-9)).sum().item(), n + 5 * math.sqrt(2 * n)


@pytest.mark.parametrize(
    "temperature, top_p", [(1.0, 1.0), (0.6, 1.0), (1.7, 1.0), (0.7, 0.8), (1.0, 0.3)]
)
def test_frequencies_are_those_of_the_softmax(temperature, top_p):
    logits, n = torch.randn(60, generator=torch.Generator().manual_seed(0)) * 2, 20000
    uniform = torch.tensor(np.random.default_rng(1).random(n), dtype=torch.float32)
    ids, logp, cut, log_mass = sampler.draw(
        logits.expand(n, -1), torch.full((n,), temperature), torch.full((n,), top_p), uniform
    )
    p = (logits / temperature).softmax(0)
    inside = nucleus_of(p, top_p)
    q = p
    if top_p < 1:
        q = torch.zeros(60).index_copy(0, inside, p[inside] / p[inside].sum())
    counts = torch.bincount(ids, minlength=60)
    statistic, bound = chi_square(counts, q)
    assert statistic < bound
    # and the test can see a wrong temperature
    assert chi_square(counts, (logits / temperature / 1.15).softmax(0))[0] > bound
    torch.testing.assert_close(logp, p.log()[ids])
    torch.testing.assert_close(logp - log_mass, q.log()[ids], rtol=0, atol=1e-5)
    assert set(ids.tolist()) <= set(inside.tolist()) or top_p == 1


def draw_one(logits, uniform, temperature=1.0, top_p=1.0):
    """(id, log-prob, cut, log_mass) of a single row."""
    numbers = [torch.tensor([x]) for x in (temperature, top_p, uniform)]
    return [x.item() for x in sampler.draw(logits[None], *numbers)]


def test_sampling_at_the_edges():
    logits = torch.tensor([0.0, 5.0, 1.0])
    assert draw_one(logits, 0.999999, temperature=0.0)[0] == 1
    expected = -math.log1p(math.exp(-5) + math.exp(-4))
    assert draw_one(logits, 0.0, top_p=1e-9)[:2] == [1, pytest.approx(expected, abs=1e-6)]
    certain = torch.tensor([-math.inf, 0.0, -math.inf])  # never a token of probability 0
    assert draw_one(certain, 0.0)[0] == draw_one(certain, 1.0)[0] == 1
    for size in (255, 256, 257):  # a nucleus of exactly as many tokens as the quick look takes
        likely, rest = torch.full((size,), 0.999 / size), torch.full((744,), 0.001 / 744)
        token, _, cut, log_mass = draw_one(torch.cat([likely, rest]).log(), 0.99999, top_p=0.9985)
        assert token < size and rest[0].log() < cut < likely[0].log()
        assert log_mass == pytest.approx(math.log(0.999), abs=1e-4)
    tied = torch.zeros(8)
    tied[0] = 1.0  # equals stay together, whatever rounding does
    assert draw_one(tied, 0.999, top_p=0.5)[3] == pytest.approx(0.0, abs=1e-6)
