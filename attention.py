"""Attention for a sampler and a learner that see the same model: a cache of unequal rows, a tree.

No model is rewritten, so any Hugging Face decoder will do. Two official hooks are used:
`AttentionInterface` for the attention (`attend`), `Cache` for keys and values (`RaggedCache`).

    sampling   rows of unequal length in one preallocated cache             RaggedCache
    learning   a shared prefix, computed once, and its continuations
               in one row: [prefix | c0 | c1 | ...]                         Tree, read_tree
    both       from hidden states to logits                                 project

Left out on purpose: paged caches, encoder models.
"""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutput


def inner(model):
    """The decoder without its vocabulary projection (`model.model`, GPT-2: `model.transformer`)."""
    return getattr(model, inner_name(model))


def inner_name(model):
    prefix = model.base_model_prefix
    return prefix if hasattr(model, prefix) else "model"


def context_limit(model):
    """The longest stream, in tokens, that the model's positions allow."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30


def upload(tensor, device):
    """A CPU's tensor on a device. A card fetches it from pinned memory, so that nobody waits."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


# ---- attention -----------------------------------------------------------------------------------


def attend(module, query, key, value, attention_mask=None, tree=None, **options):
    """The attention function of every layer, as transformers' AttentionInterface wants it.

    query (B, Hq, Q, D), key and value (B, Hkv, K, D) -> output (B, Q, Hq, D).
    """
    if tree is None:
        return attend_to_cache(query, key, value, attention_mask, **options), None
    return attend_to_tree(query, key, value, tree, **options), None


AttentionInterface.register("negotiate", attend)


def attend_to_cache(query, key, value, mask, sliding_window=None, places=None, **options):
    """Attention in `RaggedCache.read`, whose mask knows no sliding window; without mask, causal.

    places: (B, Q) the place of each query in its row. sliding_window: the layer's own.
    """
    keys = key.shape[2]
    if mask is None:
        mask = causal_mask(query, keys, sliding_window)
    elif sliding_window is not None and keys > sliding_window:
        out_of_window = places[:, None, :, None] - sliding_window  # (B, 1, Q, 1)
        too_old = torch.arange(keys, device=query.device) <= out_of_window  # (B, 1, Q, K)
        mask = mask.masked_fill(too_old, -math.inf)
    return grouped_attention(query, key, value, mask, **options)


def attend_to_tree(query, key, value, tree, masks, sliding_window=None, **options):
    """Attention in a row [prefix | c0 | c1 | ...]: each continuation sees the prefix and itself.

    masks: a dict in which one layer leaves its masks for the next.
    """
    plain = options.get("softcap") is None and options.get("s_aux") is None
    if query.is_cuda and plain and tree.tokens <= MASKED_ROW:
        return attend_to_row(query, key, value, tree, masks, sliding_window, **options)
    first = len(tree.prefix)
    prefix_key, prefix_value = key[:, :, :first], value[:, :, :first]
    outputs = []
    for start, end in [(0, first), *tree.spans]:
        if start == end:
            continue
        q, k, v = (x[:, :, start:end] for x in (query, key, value))
        if start >= first:  # a continuation
            k = torch.cat([prefix_key, k], dim=2)
            v = torch.cat([prefix_value, v], dim=2)
        shape = (end - start, k.shape[2], sliding_window)
        if shape not in masks:
            masks[shape] = causal_mask(q, k.shape[2], sliding_window)
        outputs.append(grouped_attention(q, k, v, masks[shape], **options))
    return torch.cat(outputs, dim=1)  # (1, T, Hq, D)


def attend_to_row(query, key, value, tree, masks, sliding_window=None, scaling=None, **_):
    """The same in one product under one mask: more arithmetic, but few kernels to launch."""
    if sliding_window not in masks:
        masks[sliding_window] = tree_mask(query, tree, sliding_window)
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    mask = masks[sliding_window]
    out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return out.transpose(1, 2).contiguous()


def tree_mask(query, tree, sliding_window):
    """(1, 1, T, T) to add to the scores of a whole row."""
    tokens, device = tree.tokens, query.device
    owners = [0] * len(tree.prefix)
    for number, ids in enumerate(tree.continuations, start=1):
        owners += [number] * len(ids)
    owner, position = upload(torch.tensor([owners, tree.positions]), device)  # (T,) each
    place = torch.arange(tokens, device=device)
    seen = (place <= place[:, None]) & ((owner == 0) | (owner == owner[:, None]))  # (T, T)
    if sliding_window is not None:
        seen &= position > position[:, None] - sliding_window
    aligned = -(-tokens // 16) * 16  # rows as the kernels want them, so that nobody copies them
    mask = query.new_full((tokens, aligned), -math.inf)[:, :tokens]
    return mask.masked_fill_(seen, 0.0)[None, None]


def causal_mask(query, keys, sliding_window):
    """(1, 1, Q, K) to add to the scores, where the queries are the last Q of K positions."""
    queries = query.shape[2]
    before = keys - queries
    unseen = query.new_full((queries, keys), -math.inf)
    mask = unseen.triu(before + 1)
    if sliding_window is not None:
        mask = mask + unseen.tril(before - sliding_window)
    return mask[None, None]


MASKED_ROW = 4096  # tokens of a row up to which a card reads it under one mask
SMALL = 1 << 23  # attention scores that fit in a CPU's caches


def grouped_attention(query, key, value, mask, scaling=None, softcap=None, s_aux=None, **_):
    """Attention (B, Q, Hq, D) without repeating the keys of grouped queries.

    The G = Hq / Hkv query heads of one KV head count as G times as many positions of that head.
    softcap: Gemma 2's bound of the scores. s_aux: (Hq,) gpt-oss's sinks, a score of no key.
    """
    batch, heads, queries, dim = query.shape
    kv_heads, keys = key.shape[1:3]
    folded = query.reshape(batch, kv_heads, -1, dim)  # (B, Hkv, G*Q, D)
    small = batch * heads * queries * keys <= SMALL  # two plain products are then twice as fast
    if small or softcap or s_aux is not None:
        folded = folded * (dim**-0.5 if scaling is None else scaling)
        scores = torch.matmul(folded, key.transpose(2, 3)).view(batch, kv_heads, -1, queries, keys)
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores + mask[:, :, None]
        if s_aux is not None:
            sinks = s_aux.to(scores).view(1, kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
            scores = torch.cat([scores, sinks], dim=-1)
        weights = scores.softmax(-1)[..., :keys].reshape(batch, kv_heads, -1, keys)
        out = torch.matmul(weights, value)
    else:
        mask = mask.repeat(1, 1, heads // kv_heads, 1)
        out = scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(batch, heads, queries, -1).transpose(1, 2).contiguous()


# ---- sampling: a ragged key-value cache ----------------------------------------------------------

AT_ONCE = 1024  # tokens, pads included, of one forward pass that reads turns


def capacity_for(tokens):
    """The capacity that a cache grows to when its longest row has this many tokens."""
    return -(-tokens // 64) * 64


@dataclass
class Placement:
    """Where one forward pass writes in the store, and what it sees of it."""

    slots: torch.Tensor  # (b,) slot of each row
    positions: torch.Tensor  # (b, q) place of each new token in its row
    seen: slice | torch.Tensor  # the same slots: a slice where they lie side by side, else `slots`
    keys: int  # K, how many places of each slot the attention looks at


class NoOtherState(list):
    """What transformers asks for the state of layers that keep more than keys and values."""

    def __getitem__(self, layer):
        raise NotImplementedError("layers that keep more than keys and values are not supported")


class RaggedCache(Cache):
    """Keys and values of `rows` streams of unequal lengths, preallocated.

    Row r lives in slot `slot_of[r]` and uses its first `lengths[r]` places. A row is cropped by
    lowering its length; what lies beyond a length is never seen. The rows of a decoding batch are
    brought side by side (`together`), so that the model reads them as a view, never as a copy.
    """

    def __init__(self, rows, capacity=256, rounded=capacity_for):
        super().__init__(layers=NoOtherState())
        self.rounded = rounded  # tokens -> the capacity to grow to
        self.lengths = [0] * rows
        self.capacity = capacity
        self.slot_of = list(range(rows))
        self.store = {}  # layer -> (keys, values), each (slots, Hkv, capacity, D)
        self.placement = None  # of the forward pass that is under way

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Called by each layer: write its new (b, Hkv, q, D), return all it sees (b, Hkv, K, D)."""
        new = (key_states, value_states)
        if layer_idx not in self.store:
            sizes = [(len(self.slot_of), x.shape[1], self.capacity, x.shape[3]) for x in new]
            self.store[layer_idx] = [x.new_zeros(size) for x, size in zip(new, sizes)]
        placement, seen = self.placement, []
        for whole, states in zip(self.store[layer_idx], new):
            whole[placement.slots[:, None], :, placement.positions] = states.transpose(1, 2)
            seen.append(whole[placement.seen, :, : placement.keys])
        return seen

    def grow(self, needed):
        """Make room for rows of `needed` tokens; what is there stays, elsewhere."""
        more = self.rounded(needed) - self.capacity
        if needed > self.capacity:
            self.capacity += more
            for layer, pair in self.store.items():
                self.store[layer] = [pad(whole, (0, 0, 0, more)) for whole in pair]

    def together(self, rows):
        """Swap slots until `rows` lie side by side, where most of them are; rows in slot order."""
        size = len(rows)
        rows = sorted(rows, key=self.slot_of.__getitem__)
        if not rows or self.slot_of[rows[-1]] - self.slot_of[rows[0]] == size - 1:
            return rows
        wanted = set(rows)
        # the row in each slot
        owner = sorted(range(len(self.slot_of)), key=self.slot_of.__getitem__)
        there = [row in wanted for row in owner]
        starts = range(len(owner) - size + 1)
        start = max(starts, key=lambda at: sum(there[at : at + size]))
        strangers = [row for row in owner[start : start + size] if row not in wanted]
        for row in rows:
            if not start <= self.slot_of[row] < start + size:
                self._swap(row, strangers.pop())
        return sorted(rows, key=self.slot_of.__getitem__)

    def _swap(self, row, other):
        here, there = self.slot_of[row], self.slot_of[other]
        used = max(self.lengths[row], self.lengths[other])
        for whole in itertools.chain.from_iterable(self.store.values()):
            whole[[here, there], :, :used] = whole[[there, here], :, :used]
        self.slot_of[row], self.slot_of[other] = there, here

    def copy(self, source, targets, n):
        """Give each target row the first `n` tokens of `source`: a group's prefix is read once."""
        slots = [self.slot_of[target] for target in targets]
        for whole in itertools.chain.from_iterable(self.store.values()):
            # a full row is one block, which torch will not write over itself: hence the clone
            whole[slots, :, :n] = whole[self.slot_of[source], :, :n].clone()
        for target in targets:
            self.lengths[target] = n

    def feed(self, model, rows, tokens):
        """Read as `read` does; the logits after each row's last token, (b, V) fp32.

        More than AT_ONCE tokens are read in pieces, the longest first, so with little padding.
        """
        most = AT_ONCE * 16 if next(model.parameters()).is_cuda else AT_ONCE
        if len(rows) * max(len(ids) for ids in tokens) <= most:
            return self._last_logits(model, rows, tokens)
        left = order = sorted(range(len(rows)), key=lambda i: -len(tokens[i]))
        logits = []
        while left:
            size = max(1, most // len(tokens[left[0]]))
            piece, left = left[:size], left[size:]
            some = [rows[i] for i in piece]
            logits.append(self._last_logits(model, some, [tokens[i] for i in piece]))
        return torch.cat(logits)[torch.tensor(order).argsort().to(logits[0].device)]

    @torch.no_grad()
    def _last_logits(self, model, rows, tokens):
        hidden = self.read(model, rows, tokens)  # (b, q, H)
        last = torch.tensor([len(ids) - 1 for ids in tokens], device=hidden.device)
        return project(model, hidden[torch.arange(len(rows), device=hidden.device), last])

    @torch.no_grad()
    def read(self, model, rows, tokens):
        """Read the non-empty ids `tokens[i]` into row `rows[i]`, all b rows in one forward pass.

        Returns the hidden state after each token, (b, q, H); beyond the end of a row it is noise.
        """
        device = next(model.parameters()).device
        counts = [len(ids) for ids in tokens]
        lengths = [self.lengths[row] for row in rows]
        width = max(counts)
        longest = max(length + count for length, count in zip(lengths, counts))
        self.grow(max(lengths) + width)
        placement = self._placement(rows, lengths, width, longest, device)
        padded = [ids + [ids[-1]] * (width - len(ids)) for ids in tokens]
        hidden = self.forward(model, torch.tensor(padded, device=device), placement, longest)
        for row, count in zip(rows, counts):
            self.lengths[row] += count
        return hidden

    def forward(self, model, ids, placement, longest):
        """One forward pass of ids (b, q), written as `placement` says; hidden states (b, q, H)."""
        self.placement = placement
        weight = next(model.parameters())
        unseen = (
            torch.arange(placement.keys, device=weight.device) > placement.positions[:, :, None]
        )
        mask = torch.zeros(unseen.shape, dtype=weight.dtype, device=weight.device)  # (b, q, K)
        mask.masked_fill_(unseen, -math.inf)
        return inner(model)(
            input_ids=ids,
            attention_mask=mask[:, None],
            # a pad may stand beyond the model's last position, or see no key: any number will do
            position_ids=placement.positions.clamp(max=context_limit(model) - 1),
            places=placement.positions.clamp(max=longest - 1),
            cache=self,
            use_cache=True,
        ).last_hidden_state

    def _placement(self, rows, lengths, width, longest, device):
        taken = [self.slot_of[row] for row in rows]
        slots = torch.tensor(taken, device=device)
        new = torch.arange(width, device=device)
        positions = torch.tensor(lengths, device=device)[:, None] + new  # (b, q)
        first, end = taken[0], taken[0] + len(rows)
        if taken == list(range(first, end)):
            # a view of the whole capacity, because a matrix product would copy anything less
            return Placement(slots, positions, slice(first, end), self.capacity)
        return Placement(slots, positions, slots, longest)


# ---- learning and scoring: a prefix and its continuations in one row -----------------------------


@dataclass
class Tree:
    """A shared prefix and its continuations as one row of ids, [prefix | c0 | c1 | ...]."""

    prefix: list
    continuations: list  # of lists of ids

    def __post_init__(self):
        self.ids = list(self.prefix)
        self.positions = list(range(len(self.prefix)))  # each continuation's follow the prefix's
        self.spans = []  # (start, end) of each continuation in the row
        for ids in self.continuations:
            self.spans.append((len(self.ids), len(self.ids) + len(ids)))
            self.ids += ids
            self.positions += range(len(self.prefix), len(self.prefix) + len(ids))
        self.tokens = len(self.ids)


def read_tree(model, tree):
    """Hidden states of a tree's row, (T, H), with gradients."""
    device = next(model.parameters()).device
    ids, positions = upload(torch.tensor([tree.ids, tree.positions]), device)[:, None]  # (1, T)
    options = dict(use_cache=False, tree=tree, masks={})
    return inner(model)(input_ids=ids, position_ids=positions, **options).last_hidden_state[0]


class Given(nn.Module):
    """Stands in for the decoder and answers with hidden states that are there already."""

    def __init__(self, hidden):
        super().__init__()
        self.hidden = hidden

    @property
    def decoder(self):  # OPT's is one level deeper
        return self

    def forward(self, *args, **options):
        return States(last_hidden_state=self.hidden)


class States(BaseModelOutput):
    """Hidden states and nothing else, whatever a model asks for."""

    def __getattr__(self, name):
        return None


def project(model, hidden):
    """Hidden states (N, H) to fp32 logits (N, V), by the model's own forward pass.

    So heads of several matrices, scales and soft caps are as the model's makers meant them.
    """
    shell = object.__new__(type(model))  # the same weights; a sharded model knows no copy.copy
    shell.__dict__ = {
        **model.__dict__,
        "_modules": {**model._modules, inner_name(model): Given(hidden[None])},
    }
    ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
    return shell.forward(input_ids=ids, use_cache=False).logits[0].float()
