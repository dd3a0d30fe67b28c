"""Does a model compute with our attention what its makers meant? Numbers decide, not names.

    the untouched model's plain forward pass, row by row       -> Plain    expect
    the same tokens through the cache, as the sampler reads     \\
    the same tokens in a tree, as the learner reads, gradients  -> refused where they differ

On a handful of tokens, whenever a model is loaded. Left out: what only long contexts would show.
"""

import contextlib
import itertools
import random
from dataclasses import dataclass

import torch

from attention import RaggedCache, Tree
from cli import UserError

WINDOW = 6  # every sliding window is this short during the check, and the rows are longer
WINDOW_NAMES = ("sliding_window", "attention_chunk_size")
SHARED = 9  # tokens with which both rows begin
# The hooks that we use change between versions of transformers.
ADVICE = "run python -m pip install -r requirements.txt, or use another model"
# Nats that log-probs may differ by, and shares of a gradient's norm that its parts may. An exact
# model stays under a tenth of each.
LOGPROB_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5}
GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


@dataclass
class Plain:
    """Two rows of tokens that begin alike, and what the untouched model says of them."""

    rows: list  # [long, fork], each a list of ids
    logprobs: list  # of each row, (T, V) after each token
    gradient: torch.Tensor  # of `loss`, for a few small parameters


def few_parameters(model):
    """The smallest ones of the last layers: to reach them takes a short backward pass."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return sorted(reversed(trained), key=torch.Tensor.numel)[:8]


def gradient(loss, model):
    """The gradient of the few parameters in one fp32 vector."""
    parts = torch.autograd.grad(loss, few_parameters(model), materialize_grads=True)
    return torch.cat([part.flatten() for part in parts]).float()


def loss(logprobs):
    """Some weighted sum of the log-probs of the two continuations."""
    weights = [torch.linspace(1, -0.5, len(values), device=values.device) for values in logprobs]
    return sum((values * weight).sum() for values, weight in zip(logprobs, weights))


@contextlib.contextmanager
def short_windows(model):
    """Inside this block all sliding windows are short: of layers, and those only masks know."""
    changed = []
    owners = [model.config.get_text_config(), *model.modules()]
    for owner, name in itertools.product(owners, WINDOW_NAMES):
        window = getattr(owner, name, None)
        if isinstance(window, int):
            changed.append((owner, name, window))
            setattr(owner, name, min(window, WINDOW))
    try:
        yield
    finally:
        for owner, name, window in changed:
            setattr(owner, name, window)


@contextlib.contextmanager
def refusing(model):
    """Inside this block, whatever is raised becomes one line about the model."""
    try:
        with short_windows(model), torch.enable_grad():
            yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # somebody else's model code may raise whatever it likes
        problem = f"--model: {model.config.model_type} cannot be read as we read models"
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:140]
        raise UserError(f"{problem} ({reason}); {ADVICE}") from error


def expect(model):
    """The Plain of a model whose attention is still its own. Raises UserError if it cannot run."""
    draw, vocabulary = random.Random(0), model.config.get_text_config().vocab_size
    long, tail = ([draw.randrange(vocabulary) for _ in range(n)] for n in (17, 6))
    rows = [long, long[:SHARED] + tail]
    with refusing(model):
        model.set_attn_implementation("eager")  # others leave out caps and sinks
        logprobs = []
        for row in rows:
            ids = torch.tensor([row], device=model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0]
            logprobs.append(logits.float().log_softmax(-1))
        moved = gradient(loss(continuations(rows, logprobs)), model)
    return Plain(rows, [values.detach() for values in logprobs], moved)


def continuations(rows, logprobs):
    """The log-probs of each row's own tokens after the shared ones."""
    found = []
    for row, values in zip(rows, logprobs):
        targets = torch.tensor(row[SHARED:], device=values.device)
        found.append(values[SHARED - 1 : -1].gather(1, targets[:, None])[:, 0])
    return found


def check(model, plain, token_logprobs):
    """Raise UserError where a prepared model differs from its Plain, as sampler or as learner."""
    with refusing(model):
        compare(model, "sampling", sampled(model, plain), LOGPROB_TOLERANCE)
        tree = Tree(plain.rows[0][:SHARED], [row[SHARED:] for row in plain.rows])
        wanted = [list(range(len(ids))) for ids in tree.continuations]
        learned = token_logprobs(model, tree, wanted, chunk=5)
        pairs = list(zip(learned, continuations(plain.rows, plain.logprobs)))
        compare(model, "learning", pairs, LOGPROB_TOLERANCE)
        scale = plain.gradient.norm().clamp(min=1e-9)
        pairs = [(gradient(loss(learned), model) / scale, plain.gradient / scale)]
        compare(model, "the gradient of learning", pairs, GRADIENT_TOLERANCE)


def sampled(model, plain):
    """Pairs of log-probs (V,): through a cache of two rows of unequal length, and plain ones."""
    cache, pairs = RaggedCache(2, capacity=8), []

    def read(names, ends):
        """Read row `names[r]` into row r of the cache, on to its length `ends[r]`."""
        tokens = [plain.rows[n][cache.lengths[r] : ends[r]] for r, n in enumerate(names)]
        for found, n, end in zip(cache.feed(model, [0, 1], tokens), names, ends):
            pairs.append((found.log_softmax(-1), plain.logprobs[n][end - 1]))

    read((0, 1), (11, 4))
    read((0, 1), (12, 5))  # decoding
    read((0, 1), (13, 6))
    cache.lengths[0] = SHARED  # a crop, then another text
    read((1, 1), (13, 10))
    return pairs


def compare(model, doing, pairs, tolerance):
    """Refuse a model whose pairs of tensors differ by more than its dtype explains."""
    gaps = [(found - expected).abs().max() for found, expected in pairs]
    gap = torch.stack(gaps).max().item()
    if not gap <= tolerance[model.dtype]:  # NaN as well
        problem = f"--model: {model.config.model_type} differs by {gap:.2g} between {doing}"
        raise UserError(f"{problem} and its own forward pass; {ADVICE}")
