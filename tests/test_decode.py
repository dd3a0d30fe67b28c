"""The static decoding step: what it draws is what today's path draws, recorded or not.

No GPU is needed: the step runs in eager mode, and its recording through a stand-in for CUDA graphs.
"""

import contextlib
import functools

import helpers
import pytest
import runs
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import attention
import chat
import decode
import grpo
import model as lm
import packing
import policy
import selfplay
import train
from settings import Settings

CFG = dict(
    max_turns=3,
    turn_tokens=10,
    final_tokens=8,
    agreement="none",
    temperature=0.7,
    top_p=1.0,
    final_temperature=1.0,
    final_top_p=1.0,
)
CASES = {
    "plain": {},
    "nucleus": {"top_p": 0.8, "final_top_p": 0.6},
    "greedy": {"temperature": 1.0, "final_temperature": 0.0},
    "crops": {"max_turns": 4, "context_turns": 2},
}


def settings(**more):
    """Settings of short dialogues."""
    return Settings(**{**CFG, **more})


def played(monkeypatch, model, static, cfg, scenarios=2):
    """Dialogues of unlike length, decoded with the static step or without."""
    monkeypatch.setattr(decode, "ALWAYS", static)
    voice = chat.Voice(model, helpers.tokenizer())
    return selfplay.play((voice, voice), helpers.dialogues(scenarios, 2), cfg)


def turns_of(dialogue):
    """All samples of a dialogue."""
    return [*dialogue.streams[0], *dialogue.streams[1], dialogue.final_sample]


def assert_same(static, today):
    """The same tokens, and their log-probs, cuts and log masses to 1e-5."""
    for one, other in zip(static, today, strict=True):
        for a, b in zip(turns_of(one), turns_of(other), strict=True):
            assert a.ids == b.ids
            for name in ("logprobs", "cuts", "log_masses"):
                numbers = torch.tensor([getattr(a, name), getattr(b, name)], dtype=torch.float64)
                torch.testing.assert_close(*numbers, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "kind, case",
    [
        *((kind, "nucleus") for kind in helpers.KINDS),
        *((kind, "crops") for kind in helpers.KINDS),
        ("llama", "plain"),
        ("llama", "greedy"),
    ],
)
def test_the_static_step_draws_what_rows_left_out_draw(monkeypatch, kind, case):
    """With idle rows (the other agent's, who has spoken), sliding windows, prompts read once."""
    model, cfg = helpers.tiny(kind), settings(**CASES[case])
    today = played(monkeypatch, model, False, cfg)
    steps, compute = [], decode.Decoder.compute

    def watched(self, *arguments):
        steps.append(len(self.inputs))
        return compute(self, *arguments)

    monkeypatch.setattr(decode.Decoder, "compute", watched)
    assert_same(played(monkeypatch, model, True, cfg), today)
    assert set(steps) == {8}  # always all rows, of both agents


def test_a_cache_that_grows_keeps_what_it_holds(monkeypatch):
    model, cfg = helpers.tiny(), settings(max_turns=6, turn_tokens=40)
    voice = chat.Voice(model, helpers.tokenizer())
    voice.chat.ends = set()
    both = []
    for static in (False, True):
        monkeypatch.setattr(decode, "ALWAYS", static)
        both.append(selfplay.play((voice, voice), helpers.dialogues(1, 2), cfg))
    assert_same(*both)
    assert decode.decoder_of(model).cache.capacity > 256


def test_decoder_and_cache_outlive_a_play_and_an_optimizer_step(monkeypatch):
    model, cfg = helpers.tiny("qwen2"), settings(lr=1e-2)
    learner = grpo.Learner(model, grpo.Optimizer(model, cfg.lr), cfg)
    found = []
    for _ in range(2):
        dialogues = played(monkeypatch, model, True, cfg, scenarios=1)
        assert_same(dialogues, played(monkeypatch, model, False, cfg, scenarios=1))
        store = decode.DECODERS[model].cache.store
        found.append([whole.data_ptr() for pair in store.values() for whole in pair])
        for number, dialogue in enumerate(dialogues):
            dialogue.reward = float(number)
        before = next(model.parameters()).detach().clone()
        train.settle(dialogues, cfg)
        for tree, rows in packing.pack(dialogues, "dialogue", 600):
            learner.backward(tree, rows)
        assert not learner.step()["no_evidence"]
        assert not torch.equal(before, next(model.parameters()))
    assert found[0] == found[1]


def test_adapters_are_part_of_the_key(monkeypatch):
    StandIn(monkeypatch)
    model, cfg = lm.add_lora(helpers.tiny(), 4), settings()
    for name, p in model.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(p, std=0.3)
    on = played(monkeypatch, model, True, cfg)
    with lm.adapters_off(model):
        off = played(monkeypatch, model, True, cfg)
        assert_same(off, played(monkeypatch, model, False, cfg))
    assert_same(on, played(monkeypatch, model, False, cfg))
    assert on[0].turns[0].ids != off[0].turns[0].ids
    assert list(decode.DECODERS[model].graphs) == [(False, False, True), (False, False, False)]


# ---- recording, without a card -------------------------------------------------------------------


class Stream:
    """A stream on which nothing waits."""

    def wait_stream(self, other):
        pass


class Graph:
    """What was recorded: `work`."""

    def replay(self):
        self.work()


class StandIn:
    """In place of CUDA graphs: notes the step that is recorded, and runs it again at replay."""

    def __init__(self, monkeypatch, broken=False):
        self.graphs, self.recording, self.broken, self.stream = [], None, broken, "main"
        self.replays = 0
        compute, stand_in = decode.Decoder.compute, self

        def watched(decoder, *arguments):
            if stand_in.recording:
                tensors = decoder.inputs, decoder.outputs, dict(decoder.cache.store)
                stand_in.recording.work = lambda: stand_in.replay(decoder, tensors, arguments)
                return  # a card only notes what it would do
            compute(decoder, *arguments)

        self.compute = compute
        monkeypatch.setattr(decode.Decoder, "compute", watched)
        aside = Stream()
        fakes = {
            "CUDAGraph": Graph,
            "Stream": Stream,
            "stream": lambda stream: contextlib.nullcontext(),
            "current_stream": lambda: aside,
            "set_stream": self.set_stream,
            "graph_pool_handle": object,
            "graph": self.capture,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        init = decode.Decoder.__init__

        def wanting_graphs(decoder, model):
            init(decoder, model)
            decoder.use_graphs = True

        monkeypatch.setattr(decode.Decoder, "__init__", wanting_graphs)

    def set_stream(self, stream):
        self.stream = stream

    @contextlib.contextmanager
    def capture(self, graph, pool, stream, capture_error_mode):
        assert pool is not None and capture_error_mode == "thread_local"
        self.graphs.append(graph)
        self.recording = graph
        try:
            yield
        finally:
            self.recording = None
        if self.broken:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    def replay(self, decoder, tensors, arguments):
        """Only with the tensors that were there at the recording."""
        inputs, outputs, store = tensors
        assert decoder.inputs is inputs and decoder.outputs is outputs
        for layer, pair in decoder.cache.store.items():
            assert all(a is b for a, b in zip(pair, store[layer], strict=True))
        self.replays += 1
        self.compute(decoder, *arguments)


def test_each_kind_of_step_is_recorded_once_and_replayed(monkeypatch):
    cuda, model = StandIn(monkeypatch), helpers.tiny()
    cfg, recorded = settings(top_p=0.8, final_temperature=0.0), []
    for _ in range(2):
        assert_same(played(monkeypatch, model, True, cfg), played(monkeypatch, model, False, cfg))
        recorded.append(len(cuda.graphs))
    assert recorded[0] == recorded[1] < cuda.replays / 5
    # turns within a nucleus, greedy finals, and both in one step
    kinds = {(False, True, False), (True, False, False), (True, True, False)}
    assert set(decode.DECODERS[model].graphs) == kinds


def test_recordings_of_a_cache_that_is_gone_are_dropped(monkeypatch):
    """A recording that used a freed tensor: when the cache grows, and when it gets more rows."""
    cuda, model = StandIn(monkeypatch), helpers.tiny()
    long = settings(max_turns=6, turn_tokens=60)
    for scenarios, cfg in ((1, settings()), (1, long), (2, long), (1, long)):
        assert_same(
            played(monkeypatch, model, True, cfg, scenarios),
            played(monkeypatch, model, False, cfg, scenarios),
        )
    assert len(decode.DECODERS[model].graphs) == 1
    assert len(cuda.graphs) > 2


def test_a_step_that_cannot_be_recorded_runs_eager_and_says_so_once(monkeypatch, capsys):
    cuda, model, cfg = StandIn(monkeypatch, broken=True), helpers.tiny(), settings()
    assert_same(played(monkeypatch, model, True, cfg), played(monkeypatch, model, False, cfg))
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "decoding without CUDA graphs: operation not permitted when stream is capturing and more"
    ]
    assert cuda.stream != "main" and cuda.replays == 0  # the old stream is the current one again


@pytest.mark.parametrize("wanted", [True, False])
def test_no_cuda_graphs(monkeypatch, tmp_path, wanted):
    """`--no-cuda-graphs`: the static step, but nothing is recorded."""
    cuda = StandIn(monkeypatch)
    monkeypatch.setattr(decode, "ALWAYS", True)
    made = settings(model=runs.saved_model(tmp_path / "tiny"), cuda_graphs=wanted, dtype="fp32")
    player = policy.build(made, policy.World(0, 1, torch.device("cpu"))).player
    played(monkeypatch, player, True, settings(), scenarios=1)
    assert bool(cuda.replays) == bool(decode.DECODERS[player].graphs) == wanted


def test_a_rotary_embedding_that_changes_with_the_length_is_left_alone(monkeypatch, capsys):
    monkeypatch.setattr(decode, "ALWAYS", True)
    model = helpers.tiny()
    model.model.rotary_emb.rope_type = "dynamic"
    assert decode.decoder_of(model) is None and decode.decoder_of(model) is None
    assert capsys.readouterr().err.count("rotary") == 1


class Traffic(TorchDispatchMode):
    """Counts what copies between host and card, or makes the host wait, when a step runs there."""

    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "lift_fresh", "masked_select")

    def __init__(self, decoder):
        super().__init__()
        self.decoder, self.copies, self.waits = decoder, 0, []

    def __torch_dispatch__(self, function, kinds, arguments=(), options=None):
        name = function.overloadpacket.__name__
        if name == "copy_":
            crosses = {id(self.decoder.inputs), id(self.decoder.received)}
            self.copies += id(arguments[0]) in crosses
        elif name in self.WAITS:
            self.waits.append(name)
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("kind", helpers.KINDS)
def test_a_token_takes_two_copies_and_nothing_inside_waits(monkeypatch, kind):
    monkeypatch.setattr(decode, "ALWAYS", True)
    model = helpers.tiny(kind)
    decoder = decode.decoder_of(model)
    decoder.cache_for(3)
    wishes = {0: (5, 0.7, 0.8, 0.3), 2: (6, 0.0, 1.0, 0.9)}
    decoder.step(model, wishes)
    with Traffic(decoder) as traffic:
        decoder.step(model, wishes)
    assert traffic.copies == 2
    assert traffic.waits == ["lift_fresh"]  # the host's own list of numbers
    with Traffic(decoder) as traffic:
        decoder.compute(model, True, True)
    assert traffic.copies == 0 and traffic.waits == []
    assert decoder.cache.lengths == [2, 0, 2]


def test_a_decoder_goes_with_its_model(monkeypatch):
    monkeypatch.setattr(decode, "ALWAYS", True)
    model = helpers.tiny()
    held = decode.decoder_of(model)
    assert not any(value is model for value in vars(held).values())
    assert isinstance(held.cache_for(2), attention.RaggedCache)


def test_a_compiled_step_is_one_graph_and_draws_the_same(monkeypatch):
    """Without Inductor, which takes a minute: what is traced is what would be compiled."""
    backends = []

    def backend(graph, inputs):
        backends.append(graph)
        return graph.forward

    compiler = functools.partial(torch.compile, backend=backend)
    model, cfg = helpers.tiny(), settings(top_p=0.8)
    today = played(monkeypatch, model, False, cfg)
    monkeypatch.setattr(torch, "compile", compiler)
    monkeypatch.setattr(decode, "ALWAYS", True)
    decode.decoder_of(model).compile()
    assert_same(played(monkeypatch, model, True, cfg), today)
    assert len(backends) == 3  # a nucleus at two capacities, none at one: no kind twice


def test_a_step_that_cannot_be_compiled_runs_as_it_is_and_says_so_once(monkeypatch, capsys):
    def no_compiler(graph, inputs):
        raise RuntimeError("no C compiler here\nand so on")

    compiler = functools.partial(torch.compile, backend=no_compiler)
    model, cfg = helpers.tiny(), settings()
    today = played(monkeypatch, model, False, cfg)
    monkeypatch.setattr(torch, "compile", compiler)
    monkeypatch.setattr(decode, "ALWAYS", True)
    decode.decoder_of(model).compile()
    assert_same(played(monkeypatch, model, True, cfg), today)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("decoding without torch.compile: ")
    assert "no C compiler here" in said[0]
