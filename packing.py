"""Packing: the samples that a group trains, as few rows in which what they share stands once.

    Dialogues of a group -> trained_samples -> pack -> [(Tree, its PackedSamples)], one a pass

The samples of one agent begin alike (persona, rules, dilemma), and reading that is most of the
work: a Tree reads it once, and after it each sample's own continuation. Padding is never computed.
"""

import collections
import dataclasses
import itertools
import math

import torch

from attention import Tree

# Tokens of one pass: what stays in a CPU's caches, and what fills a card.
MICRO_TOKENS = {"cpu": 1200, "cuda": 8192}


@dataclasses.dataclass
class PackedSample:
    """What the loss needs of a chat.Sample whose ids are a continuation in a Tree."""

    dialogue: object  # the selfplay.Dialogue that it is of: its advantage
    group: list  # the Dialogues whose rewards are compared with its own
    wanted: list[int]  # where its trained tokens stand in the continuation
    sampler_logp: list[float]  # of each of them, over the nucleus; NaN where nobody sampled it
    cuts: list[float]  # the log-prob at which the nucleus ended, -inf where there was none
    ref_logp: torch.Tensor | None = None  # (T,) kept for further updates on the same rollout


def trained_samples(dialogue, train_tokens):
    """The samples of a dialogue to train on: "dialogue" (all turns), "final" or "both"."""
    turns = list(itertools.chain.from_iterable(dialogue.streams))
    final = dialogue.final_sample
    if train_tokens == "final":
        return [] if final is None else [final]
    if train_tokens == "dialogue" or final is None:
        return turns
    first = dialogue.streams[0]
    if len(first) == 1 and final.ids[: len(first[0].ids)] == first[0].ids:
        return [continued(first[0], final), *turns[1:]]
    return [*turns, final]


def continued(sample, final):
    """One sample for a stream and the final that goes on from it: no token is read twice."""
    n = len(sample.ids)
    columns = {}
    for name in ("mask", "logprobs", "cuts", "log_masses"):
        columns[name] = getattr(sample, name) + getattr(final, name)[n:]
    return dataclasses.replace(final, **columns)


def pack(group, train_tokens, micro_tokens):
    """[(Tree, its PackedSamples)] of a group, each Tree of at most `micro_tokens` (0: by device).

    A single sample that is longer than that is a tree of its own.
    """
    if micro_tokens == 0:
        micro_tokens = MICRO_TOKENS["cuda" if torch.cuda.is_available() else "cpu"]
    alike = collections.defaultdict(list)  # first ids, an agent's -> [(Sample, Dialogue)]
    for dialogue in group:
        for sample in trained_samples(dialogue, train_tokens):
            if 1 in sample.mask:
                untrained = sample.ids[: sample.mask.index(1)]
                # 32 ids tell agents apart; `common_prefix` looks at all of them
                alike[tuple(untrained[:32])].append((sample, dialogue))
    trees = []
    for pairs in alike.values():
        prefix = common_prefix([sample for sample, _ in pairs])
        n = len(prefix)
        for share in split_evenly(pairs, n, micro_tokens):
            tree = Tree(prefix, [sample.ids[n:] for sample, _ in share])
            trees.append((tree, [pack_sample(*pair, group, n) for pair in share]))
    return trees


def common_prefix(samples):
    """The leading ids that all samples share, up to the first token that any of them trains."""
    untrained = min(sample.mask.index(1) for sample in samples)
    columns = zip(*(sample.ids[:untrained] for sample in samples))
    shared = itertools.takewhile(lambda column: len(set(column)) == 1, columns)
    return [column[0] for column in shared]


def split_evenly(pairs, prefix_tokens, micro_tokens):
    """Deal (Sample, Dialogue) pairs out to the fewest trees that fit, about equally long."""
    pairs = sorted(pairs, key=lambda pair: len(pair[0].ids), reverse=True)
    for number in range(1, len(pairs) + 1):
        shares = [pairs[i::number] for i in range(number)]
        largest = [len(sample.ids) - prefix_tokens for sample, _ in shares[0]]
        if prefix_tokens + sum(largest) <= micro_tokens:
            break
    return shares


def pack_sample(sample, dialogue, group, prefix_tokens):
    """The PackedSample of a sample whose first `prefix_tokens` ids are its tree's prefix."""
    trained = [i for i, m in enumerate(sample.mask) if m]
    return PackedSample(
        dialogue,
        group,
        wanted=[i - prefix_tokens for i in trained],
        # log_masses: of the nucleus's probability, by which the sampler renormalised
        sampler_logp=[sample.logprobs[i] - sample.log_masses[i] for i in trained],
        cuts=[sample.cuts[i] if sample.cuts[i] < 0 else -math.inf for i in trained],
    )
