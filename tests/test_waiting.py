"""What a learner never waits for, and what it never computes: passes that could teach nothing."""

import collections
import math

import helpers
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import attention
import grpo
import model as lm
import packing
import selfplay
import train
from settings import Settings

CFG = dict(max_turns=2, turn_tokens=8, final_tokens=8, agreement="none", lr=1e-3)


def settled(rewards, cfg):
    """Groups of dialogues with these rewards, settled."""
    voice = helpers.voice()
    dialogues = selfplay.play((voice, voice), helpers.dialogues(len(rewards), len(rewards[0])), cfg)
    groups = []
    for number, values in enumerate(rewards):
        group = dialogues[number * len(values) : (number + 1) * len(values)]
        for dialogue, value in zip(group, values):
            dialogue.reward = value
        train.settle(group, cfg)
        groups.append(group)
    return groups


def new_learner(cfg):
    model = helpers.tiny()
    reference = helpers.tiny(seed=5).requires_grad_(False) if cfg.beta else None
    return grpo.Learner(model, grpo.Optimizer(model, cfg.lr, clip=0.0), cfg, reference)


def passes_of(model):
    """A list that grows by one with each forward pass."""
    passes = []
    model.model.register_forward_hook(lambda *arguments: passes.append(1))
    return passes


def backward(learner, groups, micro_tokens=600):
    """Add up the gradients; returns the number of trees."""
    number = 0
    for group in groups:
        for tree, rows in packing.pack(group, "dialogue", micro_tokens):
            learner.backward(tree, rows)
            number += 1
    return number


@pytest.mark.parametrize("aggregate", ["token", "sequence", "constant"])
def test_a_uniform_group_costs_no_pass_and_stays_in_the_denominator(monkeypatch, aggregate):
    cfg = Settings(**CFG, aggregate=aggregate)
    groups = settled([[1.0, 2.0, 4.0], [3.0, 3.0, None]], cfg)
    outcomes = []
    for skips in (True, False):
        if not skips:
            monkeypatch.setattr(grpo, "is_uniform", lambda group: False)
        learner = new_learner(cfg)
        passes = passes_of(learner.model)
        trees = [backward(learner, [group]) for group in groups]
        assert len(passes) == (trees[0] if skips else sum(trees))
        outcomes.append((learner.step(), learner.optimizer.masters))
    (skipped, weights), (read, others) = outcomes
    for name in ("loss", "grad_norm", "trained_tokens", "entropy"):
        assert skipped[name] == pytest.approx(read[name], rel=1e-6)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], rtol=0, atol=1e-7)
    assert skipped["ratio_mean"] == pytest.approx(1, abs=1e-4)


def test_with_a_kl_a_uniform_group_is_read():
    cfg = Settings(**CFG, beta=0.1)
    groups = settled([[3.0, 3.0]], cfg)
    learner = new_learner(cfg)
    passes = passes_of(learner.model)
    assert backward(learner, groups) == len(passes) > 0
    assert learner.step()["kl_ref"] > 0


def test_shards_make_as_many_passes_whatever_the_rewards(monkeypatch):
    """Under FSDP each pass gathers weights from all ranks, so none may be left out."""
    cfg = Settings(**CFG)
    learner = new_learner(cfg)
    learner.model.token_logprobs = lambda *more: grpo.token_logprobs(learner.model, *more)
    passes = passes_of(learner.model)
    for rewards in ([[1.0, 2.0]], [[3.0, 3.0]], [[None, None]]):
        passes.clear()
        assert backward(learner, settled(rewards, cfg)) == len(passes) > 0
        gradients = [master.grad for master in learner.optimizer.masters.values()]
        taught = any(g is not None and g.abs().sum() > 0 for g in gradients)
        assert taught == (rewards == [[1.0, 2.0]])
        learner.step()


class Waits(TorchDispatchMode):
    """Counts the moments at which a card would have to answer."""

    def __init__(self):
        super().__init__()
        self.seen = collections.Counter()

    def __torch_dispatch__(self, function, kinds, arguments=(), options=None):
        self.seen[function.overloadpacket.__name__] += 1
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("more", [{}, {"aggregate": "sequence"}, {"beta": 0.1}])
def test_no_number_is_asked_for_before_the_step(monkeypatch, more):
    cfg = Settings(**CFG, **more)
    groups = settled([[1.0, 2.0], [3.0, 3.0]], cfg)
    learner = new_learner(cfg)

    def scores(model, tree, wanted, *rest):
        """The model's part: it has its own tests."""
        weight = next(model.parameters())
        return [weight.flatten()[: len(places)] - 3 for places in wanted]

    monkeypatch.setattr(grpo, "token_logprobs", scores)
    with Waits() as waits:
        assert backward(learner, groups) > 0
    assert waits.seen["_local_scalar_dense"] == waits.seen["nonzero"] == 0
    with Waits() as waits:
        means = learner.step()
    assert waits.seen["_local_scalar_dense"] > 0
    assert math.isfinite(means["loss"])


def test_micro_tokens_0_go_by_the_device(monkeypatch):
    cfg = Settings(**CFG)
    assert cfg.micro_tokens == 0
    (group,) = settled([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]], cfg)

    def sizes(micro_tokens):
        return [tree.tokens for tree, _ in packing.pack(group, "dialogue", micro_tokens)]

    monkeypatch.setattr(packing, "MICRO_TOKENS", {"cpu": 200, "cuda": 8192})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sizes(0) == sizes(200) != sizes(8192)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert sizes(0) == sizes(8192)


@pytest.mark.parametrize("prefix", [0, 1, 40])  # 40: longer than the sliding windows
@pytest.mark.parametrize("kind", helpers.KINDS)
def test_a_row_under_one_mask_is_the_row_span_by_span(monkeypatch, kind, prefix):
    """What a card computes in one product: values and gradients."""
    numbers = torch.Generator().manual_seed(0)

    def some_ids(n):
        return torch.randint(5, 300, (n,), generator=numbers).tolist()

    tree = attention.Tree(some_ids(prefix), [some_ids(n) for n in (30, 1, 9)])
    wanted = [range(0 if prefix else 1, len(ids)) for ids in tree.continuations]
    results, calls = [], []

    def at_once(*arguments, **options):
        calls.append(1)
        return attention.attend_to_row(*arguments, **options)

    for masked in (False, True):
        model = helpers.tiny(kind)
        if masked:
            monkeypatch.setattr(attention, "attend_to_tree", at_once)
        logp = torch.cat(lm.token_logprobs(model, tree, wanted))
        logp.sum().backward()
        results.append((logp.detach(), [p.grad for p in model.parameters()]))
    (today, gradients), (masked, others) = results
    assert len(calls) == 2  # once a layer
    torch.testing.assert_close(masked, today, rtol=0, atol=2e-5)
    for a, b in zip(others, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
