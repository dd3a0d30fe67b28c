"""Many rows of one model, decoded in one batch: each with its own temperature, nucleus and numbers.

    Say (ids to speak after) -> Table.crop -> read -> draw -> Say.add -> Turn

A row keeps what its cache and the next ids have in common, so that each token is computed once.
What a row draws depends on its own logits and its own random numbers, never on the batch.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools

import numpy as np
import torch
from torch import nn

from attention import RaggedCache
from chat import Turn
from decode import decoder_of
from drawing import draw
from model import LoRALinear

# ---- one row ------------------------------------------------------------------------------------


@dataclasses.dataclass
class Say:
    """`speaker` speaks after `ids`, up to `limit` tokens; the dialogue is sent the Turn.

    unless: a Future of a Verdict; once that is True nobody needs this turn, and it may come back
    unfinished. While it is spoken: table and row, ids that are unread, the turn so far, spoken.
    """

    speaker: int
    ids: list
    limit: int
    temperature: float
    top_p: float
    rng: np.random.Generator
    unless: concurrent.futures.Future = None
    final: bool = False

    def begin(self, table, row):
        """Begin to speak from a row of a table that keeps what it has in common with the ids."""
        self.table, self.row = table, row
        self.unread = table.crop(row, self.ids)  # ids that the row does not hold yet
        self.turn = Turn(self.speaker, "", truncated=True)
        self.spoken = False

    def add(self, token, logprob, cut, log_mass):
        """The unread ids are read: take the token that was drawn. The text comes at the end."""
        chat, turn = self.table.voice.chat, self.turn
        self.table.held[self.row] += self.unread
        self.unread = [token]
        turn.ids.append(token)
        turn.logprobs.append(logprob)
        turn.cuts.append(cut)
        turn.log_masses.append(log_mass)
        turn.truncated = token not in chat.ends
        self.spoken = not turn.truncated or len(turn.ids) == self.limit
        if self.spoken:
            turn.text = chat.text(turn.ids)

    def done(self):
        """As of a Future: whether the turn is spoken, or the agents had agreed before it."""
        check = self.unless
        return self.spoken or bool(check and check.done() and check.result().value)

    def result(self):
        """As of a Future: the Turn."""
        return self.turn


# ---- the rows of a model ------------------------------------------------------------------------


class Table:
    """The cache of one model, and the ids that each of its rows holds."""

    def __init__(self, voice, rows):
        self.voice = voice
        self.decoder = decoder_of(voice.model)
        self.cache = self.decoder.cache_for(rows) if self.decoder else RaggedCache(rows)
        self.held = [[] for _ in range(rows)]

    def read_prompts(self, prompts):
        """Begin rows with prompts {row: ids}; what a group shares is read once, then copied."""
        rows_of = {}
        for row, prompt in prompts.items():
            rows_of.setdefault(tuple(prompt), []).append(row)
            self.held[row] = list(prompt)
        readers = [rows[0] for rows in rows_of.values()]
        self.cache.feed(self.voice.model, readers, [list(prompt) for prompt in rows_of])
        for prompt, (reader, *others) in rows_of.items():
            if others:
                self.cache.copy(reader, others, len(prompt))

    def crop(self, row, ids):
        """Crop a row to what it shares with `ids`. Returns the ids to read, at least the last."""
        common = 0
        for held, wanted in zip(self.held[row], ids[:-1]):
            if held != wanted:
                break
            common += 1
        del self.held[row][common:]
        self.cache.lengths[row] = common
        return ids[common:]


# ---- a batch ------------------------------------------------------------------------------------


def choose_batch(says):
    """Who is in the next forward pass, all of one table: those who have one id to read, or those
    who have more, once these are a quarter as many: all wait for a long pass, so it serves many."""
    says = [say for say in says if say.table is says[0].table]
    reading = [say for say in says if len(say.unread) > 1]
    talking = [say for say in says if len(say.unread) == 1]
    return reading if reading and 4 * len(reading) >= len(talking) else talking


def speak(batch, on_token=None):
    """One token for each of these Says of one table: read what is unread in one pass, then draw."""
    table = batch[0].table
    if table.decoder and all(len(say.unread) == 1 for say in batch):
        drawn = decode(batch, table)
    else:
        batch, drawn = read(batch, table)
    for say, (token, logprob, cut, log_mass) in zip(batch, drawn):
        say.add(token, logprob, cut, log_mass)
        if on_token:
            on_token(say)


def decode(batch, table):
    """The static step of the table's decoder: (id, log-prob, cut, log mass) of each."""
    wishes = {}
    for say in batch:
        wishes[say.row] = (say.unread[0], say.temperature, say.top_p, say.rng.random())
    return table.decoder.step(table.voice.model, wishes)


def read(batch, table):
    """Read what is unread in one pass, then draw: the batch, in the order of the cache where it
    decodes, and (id, log-prob, cut, log mass) of each."""
    if all(len(say.unread) == 1 for say in batch):
        say_of = {say.row: say for say in batch}
        batch = [say_of[row] for row in table.cache.together(list(say_of))]
    unread = [say.unread for say in batch]
    logits = table.cache.feed(table.voice.model, [say.row for say in batch], unread)  # (b, V) fp32
    temperatures = [say.temperature for say in batch]
    top_ps = [say.top_p for say in batch]
    uniforms = [say.rng.random() for say in batch]
    numbers = torch.tensor([temperatures, top_ps, uniforms], device=logits.device)  # (3, b) fp32
    columns = [column.tolist() for column in draw(logits, *numbers)]
    return batch, zip(*columns)


# ---- a CPU's weights ----------------------------------------------------------------------------


@contextlib.contextmanager
def reordered_weights(*models):
    """Inside this block, without gradients, a CPU's linear layers use reordered copies of weights.

    In oneDNN's own order a product with few rows takes a third less time. Adapters stay apart, and
    each sum is rounded as the learner rounds it: merged or fused, the gap between the two doubles.
    """
    layers = []
    for model in models:
        layers += layers_to_reorder(model)
    for layer in layers:
        if isinstance(layer, LoRALinear):
            weights = _reordered(layer.base.weight, layer.A, layer.scale * layer.B)
            layer.forward = functools.partial(_adapted_linear, *weights, layer.base.bias)
        else:
            (weight,) = _reordered(layer.weight)
            layer.forward = functools.partial(_linear, weight, layer.bias)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own is back


def layers_to_reorder(model):
    """Linear layers, and of those with an adapter that is on, the two as one."""
    linear = [module for module in model.modules() if _can_reorder(module)]
    adapters = [module for module in model.modules() if isinstance(module, LoRALinear)]
    adapters = [adapter for adapter in adapters if adapter.on and adapter.base in linear]
    adapted = {adapter.base for adapter in adapters}
    return adapters + [layer for layer in linear if layer not in adapted]


def _reordered(*weights):
    return [torch.ops.mkldnn._reorder_linear_weight(weight.detach()) for weight in weights]


def _linear(weight, bias, x):
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _adapted_linear(weight, a, b, bias, x):
    return _linear(weight, bias, x) + _linear(b, None, _linear(a, None, x))


def _can_reorder(module):
    if not isinstance(module, nn.Linear) or module.weight.device.type != "cpu":
        return False
    onednn = torch.backends.mkldnn.is_available()
    if module.weight.dtype == torch.bfloat16:
        return onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return onednn
