"""A decoding step that a card replays from a recording: one token for all rows of a fixed block.

    id, place, temperature, top-p, uniform number of each row  -> one copy in
    embedding ... logits, the drawn token                      -> a CUDA graph, or the same in eager
    id, log-prob, cut, log mass of each row                    -> one copy out, the only wait

Launched one by one from Python, the thousand small kernels of a step take longer to launch than to
run; a CUDA graph launches all of them at once. It repeats what was recorded with the same tensors,
so every step takes the same ones, and all rows: an idle row writes at its own next place, which
nobody sees and which its next real token overwrites. Whatever is a Python number inside belongs in
the recording's key. Weights change in place, so a recording outlives optimizer steps.

A CPU gains more from leaving idle rows out (sampler.read). Left out: graphs of reading turns.
"""

import functools
import sys
import weakref

import torch

from attention import Placement, RaggedCache, project
from drawing import draw
from model import LoRALinear

ALWAYS = False  # tests decode so on a CPU as well
DECODERS = weakref.WeakKeyDictionary()  # model -> its Decoder


def decoder_of(model):
    """The model's Decoder, one as long as it lives; None where the model decodes row by row."""
    if not (ALWAYS or next(model.parameters()).is_cuda):
        return None
    if model not in DECODERS:
        stretches = [m for m in model.modules() if changes_with_length(m)]
        if stretches:
            do_without("CUDA graphs", "the rotary embedding changes with the length")
        DECODERS[model] = None if stretches else Decoder(model)
    return DECODERS[model]


def changes_with_length(module):
    """Whether a rotary embedding takes other frequencies for other lengths of the whole batch."""
    kinds = str(getattr(module, "rope_type", ""))  # some models have one for each kind of layer
    return "dynamic" in kinds or "longrope" in kinds


def bucket(tokens):
    """The capacity of a cache for so many tokens: few sizes, so that recordings last."""
    return -(-tokens // 256) * 256


def do_without(what, error):
    """Say in one line what is not used, and why."""
    print(f"decoding without {what}: {' '.join(str(error).split())[:160]}", file=sys.stderr)


class Decoder:
    """The cache of a model and the recordings of its step, which last from play to play.

    It holds no reference to the model, so that it goes with it.
    """

    def __init__(self, model):
        self.device = next(model.parameters()).device
        self.adapters = [m for m in model.modules() if isinstance(m, LoRALinear)]
        self.use_graphs = self.device.type == "cuda"
        self.cache = None
        self.graphs = {}  # of the cache's capacity: (any greedy, any nucleus, adapters on) -> graph
        self.capacity = 0  # at which they were recorded

    def cache_for(self, rows):
        """A cache of empty rows: the one that is there, unless it has fewer rows."""
        if self.cache is None or len(self.cache.lengths) < rows:
            self.cache, self.capacity = RaggedCache(rows, rounded=bucket), 0
            pinned = self.device.type == "cuda"
            self.sent = torch.zeros(rows, 5, dtype=torch.float64, pin_memory=pinned)
            self.received = torch.zeros(rows, 4, dtype=torch.float64, pin_memory=pinned)
            self.inputs = self.sent.to(self.device, copy=True)
            self.outputs = self.received.to(self.device, copy=True)
        self.cache.lengths = [0] * len(self.cache.lengths)
        return self.cache

    def step(self, model, wishes):
        """Read one id into each row of `wishes` and draw the next.

        wishes: {row: (id, temperature, top-p, uniform number)}. Returns a list, in their order, of
        (id, log-prob, cut, log mass), see `drawing.draw`.
        """
        lengths = self.cache.lengths
        self.cache.grow(max(lengths) + 1)
        columns = [[0, length, 1.0, 1.0, 0.0] for length in lengths]  # of idle rows
        for row, (token, *how) in wishes.items():
            columns[row] = [token, lengths[row], *how]
        any_greedy = any(temperature == 0 for _, temperature, _, _ in wishes.values())
        any_nucleus = any(top_p < 1 for _, _, top_p, _ in wishes.values())
        self.sent.copy_(torch.tensor(columns, dtype=torch.float64))
        self.inputs.copy_(self.sent, non_blocking=True)  # the copy in
        self.run(model, any_greedy, any_nucleus)
        self.received.copy_(self.outputs)  # the copy out
        drawn = self.received.tolist()
        for row in wishes:
            lengths[row] += 1
        return [(int(drawn[row][0]), *drawn[row][1:]) for row in wishes]

    def run(self, model, any_greedy, any_nucleus):
        """Replay the recording of this kind of step; make it first where there is none."""
        if self.capacity != self.cache.capacity:  # the recordings point to tensors that are gone
            self.graphs.clear()
            self.capacity = self.cache.capacity
            if self.use_graphs:  # all recordings share memory, and so a stream
                self.pool, self.aside = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        key = (any_greedy, any_nucleus, any(adapter.on for adapter in self.adapters))
        work = functools.partial(self.compute, model, any_greedy, any_nucleus)
        if self.use_graphs and key not in self.graphs:
            self.graphs[key] = self.record(work)
        if self.graphs.get(key):
            self.graphs[key].replay()
        else:
            work()

    @torch.no_grad()
    def compute(self, model, any_greedy, any_nucleus):
        """From `inputs` to `outputs`, on the card alone: no size and no branch depends on data."""
        ids, places, temperature, top_p, uniform = self.inputs.unbind(1)  # (rows,) each
        slots, capacity = torch.arange(len(ids), device=self.device), self.cache.capacity
        placement = Placement(slots, places.long()[:, None], slice(0, len(ids)), capacity)
        hidden = self.cache.forward(model, ids.long()[:, None], placement, capacity)  # (rows, 1, H)
        numbers = temperature.float(), top_p.float(), uniform.float()
        logits = project(model, hidden[:, 0])  # (rows, V)
        drawn = draw(logits, *numbers, any_greedy, any_nucleus)
        self.outputs.copy_(torch.stack([column.double() for column in drawn], dim=1))

    def compile(self):
        """From now on Inductor fuses the small kernels of `compute`, unless it cannot."""
        plain, compiled = self.compute, torch.compile(self.compute, fullgraph=True, dynamic=False)

        def compute(*arguments):
            try:
                compiled(*arguments)
            except RuntimeError as error:  # mostly: no C compiler
                do_without("torch.compile", error)
                self.compute = plain
                plain(*arguments)

        self.compute = compute

    def record(self, work):
        """A CUDA graph of work(), or None, for good, where it cannot be recorded."""
        here, aside = torch.cuda.current_stream(), self.aside
        graph = torch.cuda.CUDAGraph()
        # NCCL's watchdog, a thread of its own, asks the card meanwhile: hence thread_local
        how = dict(pool=self.pool, stream=aside, capture_error_mode="thread_local")
        try:
            aside.wait_stream(here)
            with torch.cuda.stream(aside):
                for _ in range(3):  # what libraries do once must not be in it
                    work()
            here.wait_stream(aside)
            with torch.cuda.graph(graph, **how):
                work()
        except RuntimeError as error:
            torch.cuda.set_stream(here)
            self.use_graphs = False
            do_without("CUDA graphs", error)
            return None
        return graph
