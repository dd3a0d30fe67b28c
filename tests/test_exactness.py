"""The check of numbers at loading: what it lets through is exact, what it refuses is one line.

Run: python -m pytest -q -n0 tests/test_exactness.py (and once more with -m slow: every causal kind)
"""

import collections
import contextlib
import random
import re

import helpers
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import attention
import cli
import exactness
import model as lm
from attention import RaggedCache, Tree

# ---- every causal kind of transformers, tiny and random ------------------------------------------

# What a size becomes, by a part of its name; the first that fits.
SIZES = [
    ("vocab", 128),
    ("token_id", 3),
    ("shared_layers", 0),
    ("layers", 2),
    ("n_layer", 2),
    ("heads", 4),
    ("n_head", 4),
    ("group", 1),
    ("head_dim", 16),
    ("rotary_dim", 16),
    ("per_tok", 2),
    ("moe_k", 2),
    ("top_k", 2),
    ("topk", 2),
    ("expert", 4),
    ("size", 64),
    ("dim", 64),
    ("rank", 64),
    ("n_embd", 64),
    ("d_model", 64),
    ("n_inner", 64),
    ("d_ff", 64),
]
UNSET = {"head_dim": 16, "num_key_value_heads": 4, "num_experts_per_tok": 2, "n_routed_experts": 4}
STRONG = 0.2  # weights so large that tokens differ in probability


def shrunk(config):
    """{name: small value} of a config's sizes, and of those in the configs inside."""
    changes = {}
    for name, value in vars(config).items():
        if isinstance(value, transformers.PreTrainedConfig):
            changes[name] = shrink(value)
        elif value is None and name in UNSET:
            changes[name] = UNSET[name]
        elif "initializer_range" in name or "init_std" in name:
            changes[name] = STRONG
        elif type(value) is int and value > 0:
            small = next((size for part, size in SIZES if part in name), value)
            changes[name] = min(value, small)
    return changes


def shrink(config):
    """The config at a tiny size."""
    changes = shrunk(config)
    flat = {name: value for name, value in changes.items() if not hasattr(value, "to_dict")}
    with contextlib.suppress(Exception):
        config = type(config)(**flat)  # lists of layers follow their number
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def tiny(kind):
    """A random model of this kind, as loaded: nothing of it is exchanged."""
    config = shrink(CONFIG_MAPPING[kind]())
    torch.manual_seed(0)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    assert size < 2e7
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model(torch.randint(4, 100, (1, 9)), use_cache=False)
    return model


def checked(model):
    """The model as `load` would hand it out. Raises UserError where it would be refused."""
    plain = exactness.expect(model)
    lm.prepare(model)
    exactness.check(model, plain, lm.token_logprobs)
    return model


@torch.no_grad()
def plain_logprobs(model, ids):
    """log-prob of every token after the first, by the model's own attention."""
    model.set_attn_implementation("eager")
    logprobs = model(torch.tensor([ids]), use_cache=False).logits[0, :-1].log_softmax(-1)
    model.set_attn_implementation("negotiate")
    return logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def gaps(model):
    """Largest differences of the sampler and of the learner from plain forward passes."""
    rng = random.Random(1)
    prefix, *tails = ([rng.randrange(4, 100) for _ in range(n)] for n in (11, 19, 5))
    rows = [prefix + tail for tail in tails]
    plain = [plain_logprobs(model, row) for row in rows]
    cache, sampler = RaggedCache(3), []
    for end in (*range(12, 16), 30):
        for row, ids in enumerate(rows):
            ids = ids[:end]
            if cache.lengths[row] < len(ids) - 1:
                logits = cache.feed(model, [row], [ids[cache.lengths[row] : -1]])
                value = logits[0].log_softmax(-1)[ids[-1]] - plain[row][len(ids) - 2]
                sampler.append(value.abs().item())
    wanted = [list(range(len(tail))) for tail in tails]
    learned = lm.token_logprobs(model, Tree(prefix, tails), wanted)
    learner = [(a - b[10:]).abs().max().item() for a, b in zip(learned, plain)]
    return max(sampler), max(learner)


# Not built: no size of theirs shrinks by its name, or they need inputs other than text.
NOT_BUILT = (
    "bamba blt cohere_compass_text dbrx dots1 falcon_h1 gemma3n gemma4_assistant "
    "gemma4_unified_assistant granitemoehybrid lfm2_moe longcat_flash mamba2 mimo_v2_flash "
    "musicgen musicgen_melody reformer xmod zamba zamba2"
)


@pytest.mark.slow
def test_every_causal_kind_is_exact_or_refused_in_one_line():
    found = collections.defaultdict(set)
    for kind in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        try:
            model = tiny(kind)
        except Exception:
            found["not built"].add(kind)
            continue
        try:
            checked(model)
        except cli.UserError as error:
            assert re.fullmatch("--model: [^\\n]*", str(error)), kind
            found["refused"].add(kind)
            continue
        assert max(gaps(model)) < 1e-4, (kind, gaps(model))
        found["exact"].add(kind)
    print({name: len(kinds) for name, kinds in found.items()})
    assert " ".join(sorted(found["not built"])) == NOT_BUILT
    assert (len(found["exact"]), len(found["refused"])) == (102, 74)


# ---- each fault by itself ------------------------------------------------------------------------


def test_what_is_exact_passes_and_is_left_as_it_was():
    for kind in helpers.KINDS:
        torch.manual_seed(0)
        config = helpers.KINDS[kind](vocab_size=99, bos_token_id=0, eos_token_id=2, pad_token_id=3)
        model = checked(AutoModelForCausalLM.from_config(config).eval())
        assert all(p.grad is None for p in model.parameters())
        for owner in [model.config, *model.modules()]:
            assert getattr(owner, "sliding_window", None) in (None, 24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "kind, line",
    [
        ("stablelm", "differs by .* between learning and its own"),  # drops keyword arguments
        ("bert", "differs by .* between sampling and its own"),  # sees what comes later
        ("llama4_text", "differs by .* between sampling and its own"),  # chunks in the mask only
        ("dory", "differs by .* between sampling and its own"),  # experts depend on the batch
        ("qwen3_next", "layers that keep more than keys and values are not supported"),
        ("mamba", "layers that keep more than keys and values are not supported"),
        ("bloom", "has no causal attention to exchange"),
        ("bart", "differs by .* between sampling and its own"),  # takes no cache
    ],
)
def test_what_is_not_exact_is_refused_by_its_numbers(kind, line, dtype):
    if kind == "dory" and dtype == torch.bfloat16:
        pytest.skip("a tiny random one differs by less than bf16 rounds")
    with pytest.raises(cli.UserError, match=f"^--model: {kind}.*{line}.*use another model$"):
        checked(tiny(kind).to(dtype))


@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss", "cohere", "minicpm3", "hyperclovax", "opt"])
def test_caps_sinks_and_odd_heads_are_as_their_makers_meant(kind):
    """Soft caps, a score of no key, logits scaled either way, a decoder one level deeper."""
    assert max(gaps(checked(tiny(kind)))) < 1e-4


def test_a_head_of_two_matrices_is_used_whole(monkeypatch):
    model = tiny("llama")
    second = torch.nn.Linear(128, 128, bias=False)
    forward = type(model).forward

    def two(self, *args, **inputs):
        out = forward(self, *args, **inputs)
        out.logits = second(out.logits)
        return out

    monkeypatch.setattr(type(model), "forward", two)
    assert max(gaps(checked(model))) < 1e-4


def test_a_window_that_only_the_mask_knows_is_found(monkeypatch):
    model = tiny("mistral")
    model.config.sliding_window = 4096  # as long as real ones: no row of the check is
    checked(model)
    for layer in model.model.layers:
        monkeypatch.delattr(layer.self_attn, "sliding_window", raising=False)
    monkeypatch.setattr(attention, "attend_to_cache", without_window(attention.attend_to_cache))
    with pytest.raises(cli.UserError, match="^--model: mistral differs by .* sampling"):
        checked(model)


def without_window(attend):
    def blind(*args, sliding_window=None, **options):
        return attend(*args, **options)

    return blind


def test_a_model_that_swallows_our_cache_is_refused(monkeypatch):
    """As with older transformers, whose argument has another name: no token would see another."""
    model = tiny("llama")
    forward = type(model.model).forward

    def older(self, *args, cache=None, **inputs):
        return forward(self, *args, **inputs)

    monkeypatch.setattr(type(model.model), "forward", older)
    with pytest.raises(cli.UserError, match="^--model: llama .*requirements.txt, or"):
        checked(model)


def test_a_wrong_gradient_is_found():
    model = tiny("llama")
    plain = exactness.expect(model)
    lm.prepare(model)

    def detached(*args, **options):
        return [values.detach() + 0 * values for values in lm.token_logprobs(*args, **options)]

    with pytest.raises(cli.UserError, match="differs by .* between the gradient of learning and"):
        exactness.check(model, plain, detached)


def test_a_run_on_a_refused_model_makes_nothing(tmp_path):
    folder = tmp_path / "m"
    model = tiny("stablelm")
    lm.save(model.config, model.generation_config, helpers.tokenizer(), model.state_dict(), folder)
    with pytest.raises(cli.UserError, match="^--model: stablelm differs by"):
        lm.load(str(folder), "fp32")
