"""Group Relative Policy Optimisation: rewards -> advantages -> loss -> gradient -> one step.

    A_i   = (r_i - mean r) / (std r + eps)        r: the rewards of one scenario's group        (1)
    rho_t = pi(a_t | s_t) / pi_old(a_t | s_t)     pi_old: the policy that sampled a_t           (2)
    L_t   = -min(rho_t A_i, clip(rho_t, 1 - low, 1 + high) A_i)                                 (3)
    k3_t  = exp(d_t) - d_t - 1                    d_t = log pi_ref - log pi                     (4)
    L     = sum_t m_t (L_t + beta k3_t) / D       m: the token mask, D: its sum over the batch  (5)

(1) to (4): DeepSeekMath, arXiv 2402.03300, eq. 3 and 4. (5), one D for all: DAPO, arXiv 2503.14476.
Left out on purpose: a value network, a reward per turn, and any denominator that depends on how the
batch is cut into micro-batches or spread over ranks: gradients are summed and divided by D once.

The packed trees that a Learner reads come from `packing.py`; `train.py` runs it all, and
`tests/test_grpo.py` works each equation by hand.
"""

import collections
import functools
import math

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence

from attention import Tree, upload
from model import adapters_off, cast, token_logprobs
from packing import pack

# ---- pure functions ------------------------------------------------------------------------------


def group_advantages(rewards, scale="std", eps=1e-4, noise=0.0):
    """Eq. 1. rewards (P, G) float: P groups of G dialogues, NaN = missing -> advantages (P, G).

    scale "std" divides by the unbiased standard deviation + eps, "none" does not. A group of under
    two rewards, or of rewards no further apart than `noise` (the judge's wobble), gets exact zeros,
    and so does a missing reward.
    """
    if scale not in ("std", "none"):
        raise ValueError(f"scale {scale!r}: must be 'std' or 'none'")
    valid = torch.isfinite(rewards)  # (P, G)
    number = valid.sum(1, keepdim=True)  # (P, 1) valid rewards of each group
    mean = rewards.masked_fill(~valid, 0.0).sum(1, keepdim=True) / number.clamp(min=1)
    advantages = (rewards - mean).masked_fill(~valid, 0.0)
    if scale == "std":
        variance = advantages.square().sum(1, keepdim=True) / (number - 1).clamp(min=1)
        advantages = advantages / (variance.sqrt() + eps)
    highest = rewards.masked_fill(~valid, -math.inf).amax(1, keepdim=True)
    lowest = rewards.masked_fill(~valid, math.inf).amin(1, keepdim=True)
    differ = (number >= 2) & (highest - lowest > noise)  # (P, 1)
    return advantages.masked_fill(~differ, 0.0)  # exact, whatever the rounding of the mean


def token_losses(logp, old_logp, advantages, mask, clip_low, clip_high, ref_logp, beta, ratio):
    """Eq. 2 to 4 for each token: (losses (B, T), stats as scalars). Change the loss here.

    The arguments: see `policy_loss`.
    """
    if advantages.dim() == 1:
        advantages = advantages[:, None]  # (B, 1) one for all tokens of a row
    # Filled, not multiplied by the mask: a NaN at a masked position would survive a product.
    masked = mask == 0
    logp = logp.masked_fill(masked, 0.0)
    old_logp = old_logp.masked_fill(masked, 0.0)
    advantages = advantages.to(logp.dtype).expand_as(logp).masked_fill(masked, 0.0)

    log_ratio = logp - old_logp  # (B, T)
    if ratio == "sequence":
        row_tokens = mask.sum(1, keepdim=True).clamp(min=1)
        log_ratio = (log_ratio.sum(1, keepdim=True) / row_tokens).expand_as(log_ratio)
    elif ratio != "token":
        raise ValueError(f"ratio {ratio!r}: must be 'token' or 'sequence'")
    rho = log_ratio.clamp(-20, 20).exp()  # eq. 2; clamped, so that no gap overflows
    clipped = rho.clamp(1 - clip_low, 1 + clip_high)
    losses = -torch.minimum(rho * advantages, clipped * advantages)  # eq. 3
    k3 = torch.zeros_like(losses)
    if ref_logp is not None:
        d = (ref_logp.masked_fill(masked, 0.0) - logp).clamp(-10, 10)
        k3 = d.exp() - d - 1  # eq. 4
        losses = losses + beta * k3

    with torch.no_grad():
        stats = {
            "clip_frac": masked_mean(rho * advantages > clipped * advantages, mask),
            "approx_kl": masked_mean(rho - 1 - log_ratio, mask),
            "ratio_mean": masked_mean(rho, mask),
            "kl_ref": masked_mean(k3, mask),
        }
    return losses, stats


def masked_mean(values, mask):
    """The mean, a scalar, of values (B, T) where mask (B, T) is 1; 0 where it never is."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def sum_losses(losses, mask, aggregate, length=None):
    """The numerator of eq. 5 and its part of D: (sum, units), from losses and mask (B, T).

    Of "token" the units are tokens. "sequence" adds means of rows instead, its units are rows with
    a token. "constant" divides each row by one `length`, its units are rows (arXiv 2503.20783).
    """
    losses = losses * mask
    if aggregate == "token":
        return losses.sum(), mask.sum()
    if aggregate == "sequence":
        row_tokens = mask.sum(1)  # (B,)
        return (losses.sum(1) / row_tokens.clamp(min=1)).sum(), (row_tokens > 0).sum()
    if aggregate == "constant" and length is not None:
        return losses.sum() / length, len(mask)
    raise ValueError(
        f"aggregate {aggregate!r}: must be 'token', 'sequence' or, with a length, 'constant'"
    )


def policy_loss(
    logp,
    old_logp,
    advantages,
    mask,
    clip_low=0.2,
    clip_high=0.2,
    ref_logp=None,
    beta=0.0,
    aggregate="token",
    ratio="token",
    denominator=None,
):
    """Eq. 2 to 5 of a whole batch, for tests and readers: (loss, stats).

    Training does not call it: `Learner.backward` adds up the same two functions piece by piece, and
    `Learner.step` divides.
    logp, old_logp, ref_logp, mask (B, T), advantages (B,) or (B, T). aggregate: see `sum_losses`;
    `denominator` is D for "token" (else the number of tokens), the length for "constant".
    ratio "token": eq. 2; "sequence": its geometric mean over a row (GSPO, arXiv 2507.18071).
    stats: means over masked tokens; clip_frac: the clip decided, approx_kl: k3 of old against new.
    """
    mask = mask.to(logp.dtype)
    losses, stats = token_losses(
        logp, old_logp, advantages, mask, clip_low, clip_high, ref_logp, beta, ratio
    )
    total, units = sum_losses(losses, mask, aggregate, denominator)
    if aggregate == "token" and denominator is not None:
        units = denominator
    return total / (float(units) or 1), {name: mean.item() for name, mean in stats.items()}


# ---- one update ----------------------------------------------------------------------------------

# Tokens whose logits over the whole vocabulary exist at a time.
CHUNK = {"cpu": 256, "cuda": 2048}
# Reported as means over the tokens that were read, on all ranks (with beta 0 not those of uniform
# groups); the entropy over all trained tokens.
TOKEN_MEANS = ("logprob_gap", "clip_frac", "approx_kl", "ratio_mean", "kl_ref")
# tokens: all trained ones, read: those of a pass that may have a gradient
SUMS = ("loss", "units", "tokens", "read", "entropy", *TOKEN_MEANS)


class Learner:
    """Adds up the gradients of packed trees (`backward` for each) and takes one step (`step`).

    settings: settings.Settings. reference: for --beta, the model that is the frozen reference with
    its adapters (if any) off; never a sharded one, so that its passes need no other rank.
    """

    def __init__(self, model, optimizer, settings, reference=None):
        self.model = model
        self.optimizer = optimizer
        self.settings = settings
        self.reference = reference
        self.sums = collections.Counter()  # SUMS since the last step

    def backward(self, tree, samples):
        """Forward and backward of one micro-batch: adds the gradient of eq. 5's numerator."""
        tree, samples = with_rewards(tree, samples)
        if not samples:
            return self.idle()
        cfg, device = self.settings, self.optimizer.device
        mask = padded([[1.0] * len(sample.wanted) for sample in samples], device)  # (B, T)
        old_logp = padded([sample.sampler_logp for sample in samples], device)  # (B, T)
        advantages = [sample.dialogue.advantage for sample in samples]
        advantages = upload(torch.tensor(advantages, dtype=mask.dtype), device)  # (B,)
        tokens = read = sum(len(sample.wanted) for sample in samples)
        if cfg.beta == 0 and is_uniform(samples[0].group):  # a gradient of 0, but part of D
            self.idle()
            logp = old_logp.clone().requires_grad_()
            read = 0
        else:
            # transformers checkpoints activations in training mode only; all dropouts are 0.
            self.model.train(cfg.gradient_checkpointing)
            logp = self.logprobs(self.model, tree, samples)  # (B, T)
            self.model.eval()
        if samples[0].dialogue.stop == "written":  # nobody sampled it: plain likelihood, at ratio 1
            old_logp = logp.detach()
        ref_logp = self.reference_logprobs(tree, samples) if cfg.beta > 0 else None  # (B, T)

        low, high = cfg.clip_low, cfg.clip_high
        losses, stats = token_losses(
            logp, old_logp, advantages, mask, low, high, ref_logp, cfg.beta, cfg.ratio
        )
        loss_sum, units = sum_losses(losses, mask, cfg.aggregate, self.row_length)
        loss_sum.backward()
        stats["logprob_gap"] = masked_mean((logp.detach() - old_logp).abs(), mask)
        sums = {name: mean.double() * read for name, mean in stats.items()}
        # The mean -log-prob that the sampler recorded estimates it; of written text it is the loss.
        sums["entropy"] = masked_mean(-old_logp, mask).double() * tokens
        sums["loss"] = loss_sum.detach().double()
        for name, value in {**sums, "units": units, "tokens": tokens, "read": read}.items():
            self.sums[name] += value  # a number or a scalar tensor: nobody waits for a card

    @property
    def row_length(self):
        """The length of a row for --aggregate constant: all that a dialogue may have trained."""
        cfg = self.settings
        turns = cfg.turn_tokens * cfg.max_turns if cfg.train_tokens != "final" else 0
        return turns + (cfg.final_tokens if cfg.train_tokens != "dialogue" else 0)

    def idle(self):
        """A pass with a gradient of 0: under FSDP all ranks must make equally many."""
        if hasattr(self.model, "token_logprobs"):  # policy.shard's
            (logp,) = self.model.token_logprobs(Tree([0], [[0]]), [[0]])
            (logp.sum() * 0.0).backward()

    def logprobs(self, model, tree, samples):
        """Log-probs of the trained tokens of each row, (B, T) padded with 0."""
        temperature = self.settings.temperature
        if self.settings.train_tokens == "final":
            temperature = self.settings.final_temperature
        wanted = [sample.wanted for sample in samples]
        cuts = [sample.cuts for sample in samples]
        chunk = CHUNK[next(model.parameters()).device.type]
        score = functools.partial(token_logprobs, model)
        score = getattr(model, "token_logprobs", score)  # policy.shard's, which gathers the weights
        return pad_sequence(score(tree, wanted, temperature, cuts, chunk), batch_first=True)

    def reference_logprobs(self, tree, samples):
        """The reference's log-probs of the same tokens, (B, T); kept for further updates."""
        if samples[0].ref_logp is None:
            with torch.no_grad(), adapters_off(self.reference) as reference:
                logp = self.logprobs(reference, tree, samples)
            for sample, values in zip(samples, logp):
                sample.ref_logp = values
        return pad_sequence([sample.ref_logp for sample in samples], batch_first=True)

    @torch.no_grad()
    def nll(self, dialogues):
        """(sum of -log-prob, number) of trained tokens; under FSDP all ranks bring equally many."""
        total, tokens = 0.0, 0
        for dialogue in dialogues:
            trees = pack([dialogue], self.settings.train_tokens, self.settings.micro_tokens)
            for tree, samples in trees:
                total -= self.logprobs(self.model, tree, samples).sum().item()
                tokens += sum(len(sample.wanted) for sample in samples)
        return total, tokens

    def step(self):
        """Divide the gradient by D, clip it, step. Returns means over all ranks, and two flags.

        skipped: a loss or gradient was not finite on some rank, so all ranks skip the step.
        no_evidence: no reward, or all groups uniform and no KL pulls: nothing to learn from.
        With either, weights, moments and warm-up stay as they are.
        """
        sums = torch.tensor([float(self.sums[name]) for name in SUMS], dtype=torch.float64)
        self.sums.clear()
        if dist.is_initialized():
            sums = sums.to(self.optimizer.device)
            dist.all_reduce(sums)
        sums = dict(zip(SUMS, sums.tolist()))
        denominator = max(sums["units"], 1.0)  # D of eq. 5, over micro-batches and ranks
        evidence = sums["read"] > 0
        grad_norm = 0.0
        if evidence:
            grad_norm = self.optimizer.step(1.0 / denominator, math.isfinite(sums["loss"]))
        else:
            self.optimizer.adamw.zero_grad()
        return {
            "loss": sums["loss"] / denominator,
            "grad_norm": grad_norm,
            "trained_tokens": int(sums["tokens"]),
            "entropy": sums["entropy"] / max(sums["tokens"], 1.0),
            **{name: sums[name] / max(sums["read"], 1.0) for name in TOKEN_MEANS},
            "skipped": not math.isfinite(grad_norm),
            "no_evidence": not evidence,
        }


def with_rewards(tree, samples):
    """The tree and its samples without those whose reward is missing: they leave the loss."""
    known = [i for i, sample in enumerate(samples) if sample.dialogue.advantage is not None]
    return Tree(tree.prefix, [tree.continuations[i] for i in known]), [samples[i] for i in known]


def is_uniform(group):
    """Whether no dialogue of a settled group is better or worse than another."""
    return not any(dialogue.advantage for dialogue in group)


def padded(lists, device):
    """Lists of numbers as one (B, T) tensor, filled up with 0."""
    rows = [torch.tensor(numbers, dtype=torch.float32) for numbers in lists]
    return upload(pad_sequence(rows, batch_first=True), device)


class Optimizer:
    """AdamW on fp32 masters of the weights of `model`, which from now on computes in `dtype`.

    In bf16 small steps and sums of many gradients would round to nothing: both happen in the
    masters, and `step` copies them back. FSDP2 does so by itself: pass it fp32.
    The learning rate rises over `warmup_steps` and falls to 0 over `decay_steps` (0: never).
    """

    def __init__(self, model, lr, warmup_steps=0, clip=1.0, dtype=torch.float32, decay_steps=0):
        self.lr = lr
        self.warmup_steps = warmup_steps
        self.decay_steps = decay_steps
        self.clip = clip
        self.updates = 0
        self.params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.device = next(iter(self.params.values())).device
        self.masters = dict(self.params)  # in fp32 the weights are their own masters
        if dtype != torch.float32:
            for name, p in self.params.items():
                self.masters[name] = torch.nn.Parameter(p.detach().clone())
                p.register_post_accumulate_grad_hook(gradient_adder(self.masters[name]))
        cast(model, dtype)
        self.adamw = torch.optim.AdamW(
            self.masters.values(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )

    def step(self, scale, finite=True):
        """Sum the gradients over ranks, multiply by `scale`, clip, step. Returns the norm before.

        Where it is not finite, or `finite` is False, all ranks alike skip: only the gradients go.
        """
        for master in self.masters.values():
            if master.grad is None:  # no token of this rank reached it
                master.grad = torch.zeros_like(master)
        gradients = [master.grad for master in self.masters.values()]
        sharded = isinstance(gradients[0], DTensor)  # FSDP2 has summed its shards in backward
        if sharded:
            gradients = [gradient.to_local() for gradient in gradients]
        elif dist.is_initialized():
            pending = [dist.all_reduce(gradient, async_op=True) for gradient in gradients]
            for reduction in pending:
                reduction.wait()
        torch._foreach_mul_(gradients, scale)
        square = torch.stack(torch._foreach_norm(gradients)).double().square().sum()
        if sharded:
            dist.all_reduce(square)
        norm = square.sqrt().item() if finite else math.nan
        if math.isfinite(norm):
            if norm > self.clip > 0:
                torch._foreach_mul_(gradients, self.clip / norm)
            self.updates += 1
            self.adamw.param_groups[0]["lr"] = self.learning_rate()
            self.adamw.step()
            self.publish()
        self.adamw.zero_grad()
        return norm

    def learning_rate(self):
        """The rate of update number `updates`, counted from 1."""
        warm = min(1.0, self.updates / max(1, self.warmup_steps))
        left = 1.0
        if self.decay_steps:
            left = max(0.0, 1 - (self.updates - 1) / self.decay_steps)
        return self.lr * warm * left

    @torch.no_grad()
    def publish(self):
        """Copy the masters into the parameters that the model computes with."""
        for name, p in self.params.items():
            p.copy_(self.masters[name])


def gradient_adder(master):
    """A hook that adds a parameter's gradient to its master's as soon as backward has made it."""
    # A CPU widens bf16 to fp32 before it adds: piece by piece, that stays in its caches.
    piece = master.numel() if master.is_cuda else 1 << 18

    def add(p):
        if master.grad is None:
            master.grad = torch.zeros_like(master)
        pieces = zip(master.grad.view(-1).split(piece), p.grad.view(-1).split(piece))
        for total, part in pieces:
            total.add_(part)
        p.grad = None

    return add
