"""Group Relative Policy Optimisation, by hand: rewards -> advantages -> packed trees -> loss -> one optimizer step.

    advantage   A_i   = (r_i - mean(r)) / (std(r) + eps)        over the group of i: same scenario, personas, order       (1)
    ratio       rho_t = exp(log pi(a_t | s_t) - log pi_old(a_t | s_t))                                                    (2)
    policy      L_t   = -min(rho_t A, clip(rho_t, 1 - low, 1 + high) A)                                                   (3)
    KL          k3_t  = exp(d) - d - 1,  d = log pi_ref - log pi                                                          (4)
    loss        L     = sum_t m_t (L_t + beta k3_t) / D         m: the dialogue-token mask, D: one number for the batch   (5)

(1) to (4): DeepSeekMath, arXiv 2402.03300, eq. 3 and 4, and Schulman's k3 estimator; (5) with D the number of trained tokens of
the whole batch: DAPO, arXiv 2503.14476. The mask says which tokens are trained: by default what the two agents said to
each other, and not the final completion that the judge scores.

What is deliberately absent: a value network, a reward model, per-turn rewards, and any denominator that depends on how
the batch is cut into micro-batches or spread over ranks: gradients are summed everywhere and divided by D once.
"""

import dataclasses
import functools
import math

import torch
import torch.distributed as dist
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from model import (
    Tree,
    adapters_off,
    add_lora,
    capacity_for,
    cast,
    inner,
    prepare,
    token_logprobs,
)

# ---- pure functions --------------------------------------------------------------------------------------------------


def group_advantages(rewards, scale="std", eps=1e-4, noise=0.0):
    """Eq. 1. rewards (P, G) float, NaN = missing -> advantages (P, G).

    A group whose rewards lie no further apart than `noise`, the judge's own wobble, is uniform: its advantages are exactly 0.

    Mean and unbiased standard deviation (as torch.std) over the valid rewards of each row; scale "std" divides by
    (std + eps), "none" does not. Missing rewards, and rows with under 2 valid ones, get 0.
    """
    valid = torch.isfinite(rewards)
    n = valid.sum(1, keepdim=True)  # (P, 1)
    centred = torch.where(valid, rewards, 0.0) - (
        torch.where(valid, rewards, 0.0).sum(1, keepdim=True) / n.clamp(min=1)
    )
    centred = torch.where(valid, centred, 0.0)
    if scale == "std":
        std = (centred.square().sum(1, keepdim=True) / (n - 1).clamp(min=1)).sqrt()
        centred = centred / (std + eps)
    elif scale != "none":
        raise ValueError(f"scale {scale!r}: must be 'std' or 'none'")
    spread = torch.where(valid, rewards, -math.inf).amax(1, keepdim=True) - torch.where(
        valid, rewards, math.inf
    ).amin(1, keepdim=True)
    uniform = spread <= noise  # equal rewards too, whatever the mean's rounding
    return torch.where(valid & (n >= 2) & ~uniform, centred, 0.0)


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
    weights=None,
):
    """Eq. 2 to 5. logp, old_logp, ref_logp, mask, weights (B, T), advantages (B,) -> (loss, stats).

    aggregate "token": sum / number of masked tokens, or / `denominator`; "sequence": mean over rows (that have a masked
    token) of per-row means; "constant": sum / (B * denominator). ratio "token": eq. 2; "sequence": the geometric mean
    of the row's ratios, for each of its tokens (GSPO, arXiv 2507.18071). weights multiply the policy term
    (truncated importance sampling). Both exponents are clamped (20 and 10 nats), so no gap overflows.
    stats, all detached: clip_frac, approx_kl (k3 of old against new), ratio_mean, kl_ref: means over masked tokens.
    """
    mask = mask.to(logp.dtype)
    # `where` and not a product: a NaN or an infinity at a masked position must change neither the loss nor its gradient
    keep = mask > 0
    zero = torch.zeros((), dtype=logp.dtype, device=logp.device)
    logp = torch.where(keep, logp, zero)
    log_ratio = logp - torch.where(keep, old_logp, zero)
    if ratio == "sequence":
        log_ratio = (
            log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        ).expand_as(log_ratio)
    elif ratio != "token":
        raise ValueError(f"ratio {ratio!r}: must be 'token' or 'sequence'")
    rho = log_ratio.clamp(-20, 20).exp()  # (B, T)
    A = advantages.to(logp.dtype)[:, None]  # (B, 1)
    clipped = rho.clamp(1 - clip_low, 1 + clip_high)
    per_token = -torch.minimum(rho * A, clipped * A)  # (B, T)
    if weights is not None:
        per_token = per_token * torch.where(keep, weights, zero)
    kl = zero
    if ref_logp is not None:
        d = (torch.where(keep, ref_logp, zero) - logp).clamp(-10, 10)
        kl = d.exp() - d - 1
        per_token = per_token + beta * kl
    total, tokens = (per_token * mask).sum(), mask.sum().clamp(min=1)
    if aggregate == "token":
        loss = total / (tokens if denominator is None else denominator)
    elif aggregate == "sequence":
        rows = mask.sum(1)
        loss = ((per_token * mask).sum(1) / rows.clamp(min=1)).sum() / (rows > 0).sum().clamp(min=1)
    elif aggregate == "constant":
        if denominator is None:
            raise ValueError(
                "aggregate 'constant' needs a denominator, the number of tokens to divide each row by"
            )
        loss = total / (mask.shape[0] * denominator)
    else:
        raise ValueError(f"aggregate {aggregate!r}: must be 'token', 'sequence' or 'constant'")
    with torch.no_grad():
        mean = lambda x: ((x * mask).sum() / tokens).item()
        outside = ((rho * A) > (clipped * A)).to(logp.dtype)  # the clip is what the minimum chose
        stats = {
            "clip_frac": mean(outside),
            "approx_kl": mean(rho - 1 - log_ratio),
            "ratio_mean": mean(rho),
            "kl_ref": mean(kl) if ref_logp is not None else 0.0,
        }
    return loss, stats


def truncated_weights(logp, sampler_logp, cap):
    """min(pi_learner / pi_sampler, cap) per token, without gradient: the sampler computed in other shapes or another dtype."""
    return (logp.detach() - sampler_logp).clamp(max=20).exp().clamp(max=cap)


# ---- from dialogues to packed trees -----------------------------------------------------------------------------------


@dataclasses.dataclass
class Row:
    """One trained sample inside a tree. `wanted` are the indices, after the shared prefix, of its trained tokens."""

    dialogue: object
    wanted: list
    sampler_logp: list  # of the wanted tokens, as sampled
    cuts: list  # with top-p: where the nucleus ended; else empty
    old_logp: object = None  # the learner's own log-probs before the first of several updates
    ref_logp: object = None


def trained_samples(dialogue, train_tokens):
    """The Samples of one dialogue whose masked tokens are trained: "dialogue" (both agents' turns), "final" or "both"."""
    samples = [] if train_tokens == "final" else [s for stream in dialogue.streams for s in stream]
    final = dialogue.final_sample
    if final is None or train_tokens == "dialogue":
        return samples
    first = dialogue.streams[0][-1:] if train_tokens == "both" else []
    if first and len(dialogue.streams[0]) == 1 and final.ids[: len(first[0].ids)] == first[0].ids:
        n = len(
            first[0].ids
        )  # the final continues agent 0's stream: one row for both, not the same tokens twice
        merged = dataclasses.replace(
            final,
            **{
                k: getattr(first[0], k)[:n] + getattr(final, k)[n:]
                for k in ("mask", "logprobs", "cuts", "masses")
            },
        )
        return [merged] + samples[1:]
    return samples + [final]


def common_prefix(samples):
    """How many leading ids all samples share, ending before the first token that any of them trains."""
    n = min(s.mask.index(1) for s in samples)
    for s in samples[1:]:
        n = next((i for i in range(n) if s.ids[i] != samples[0].ids[i]), n)
    return n


def pack(group, train_tokens, micro_tokens):
    """The trees of one group: a list of (Tree, rows) with at most `micro_tokens` tokens each, where one sample allows it.

    The samples of each agent share that agent's prefix (persona, rules, dilemma), and so do its trees, which follow one another.
    """
    buckets = {}
    for dialogue in group:
        for s in trained_samples(dialogue, train_tokens):
            if 1 in s.mask:  # the first ids tell whose view it is
                buckets.setdefault(tuple(s.ids[: s.mask.index(1)][:32]), []).append((s, dialogue))
    batches = []
    for bucket in buckets.values():
        bucket.sort(key=lambda pair: -len(pair[0].ids))
        n = common_prefix([s for s, _ in bucket])
        for k in range(
            1, len(bucket) + 1
        ):  # the fewest trees that fit; each takes every k-th sample, so they are about equal
            shares = [bucket[i::k] for i in range(k)]
            if max(n + sum(len(s.ids) - n for s, _ in share) for share in shares) <= micro_tokens:
                break
        prefix = bucket[0][0].ids[:n]
        for share in shares:
            rows = []
            for s, dialogue in share:
                at = [i for i, m in enumerate(s.mask) if m]
                nucleus = any(s.cuts[i] for i in at)
                rows.append(
                    Row(
                        dialogue,
                        [i - n for i in at],
                        [s.logprobs[i] - s.masses[i] for i in at],
                        [s.cuts[i] or -math.inf for i in at] if nucleus else [],
                    )
                )
            batches.append((Tree(prefix, [s.ids[n:] for s, _ in share]), rows))
    return batches


def scorer(model):
    """`token_logprobs` of a model; an FSDP model brings its own, which gathers the weights around it."""
    return getattr(model, "token_logprobs", functools.partial(token_logprobs, model))


# ---- one update --------------------------------------------------------------------------------------------------------


class Learner:
    """Accumulates the summed gradient of packed trees and takes one optimizer step: `backward` per tree, then `step`.

    settings: train.Settings. optimizer: an Optimizer. reference: the model that, with its adapters (if any) off, is the
    frozen reference for --beta; it is never a sharded one, so that its passes need no other rank.
    """

    def __init__(self, model, optimizer, settings, reference=None):
        self.model, self.optimizer, self.settings, self.reference = (
            model,
            optimizer,
            settings,
            reference,
        )
        self.sums = {}

    def logprobs(self, model, tree, rows):
        """Log-probs of the trained tokens of each row, (B, T) padded with 0."""
        temperature = (
            self.settings.final_temperature
            if self.settings.train_tokens == "final"
            else self.settings.temperature
        )
        cuts = (
            [r.cuts or [-math.inf] * len(r.wanted) for r in rows]
            if any(r.cuts for r in rows)
            else None
        )
        return pad_sequence(
            scorer(model)(tree, [r.wanted for r in rows], temperature, cuts), batch_first=True
        )

    def reference_logprobs(self, tree, rows):
        """The reference's log-probs of the rows' tokens, (B, T); computed once per batch and kept in the rows."""
        if rows[0].ref_logp is None:
            with torch.no_grad(), adapters_off(self.reference) as ref:
                for row, values in zip(rows, self.logprobs(ref, tree, rows)):
                    row.ref_logp = values
        return pad_sequence([r.ref_logp for r in rows], batch_first=True)

    def backward(self, tree, rows):
        """Forward and backward of one tree. The gradient of eq. 5's numerator is added; D comes at `step`."""
        cfg = self.settings
        self.model.train(
            cfg.gradient_checkpointing
        )  # transformers recomputes in training mode only; dropouts are 0
        logp = self.logprobs(self.model, tree, rows)  # (B, T)
        self.model.eval()
        device = logp.device
        padded = lambda lists: pad_sequence(
            [torch.tensor(x, dtype=torch.float32, device=device) for x in lists], batch_first=True
        )
        advantages = torch.tensor(
            [r.dialogue.advantage or 0.0 for r in rows], device=device
        )  # (B,)
        known = torch.tensor(
            [r.dialogue.advantage is not None for r in rows], device=device
        )  # a missing reward leaves the loss
        mask = padded([[1.0] * len(r.wanted) for r in rows]) * known[:, None]  # (B, T)
        sampler = padded([r.sampler_logp for r in rows])
        if (
            rows[0].dialogue.stop == "written"
        ):  # nobody sampled it: ratio 1 and advantage 1, so the gradient of plain likelihood
            sampler = torch.where(sampler.isnan(), logp.detach(), sampler)
        old, weights = sampler, None
        if (
            cfg.tis_cap > 0
        ):  # decoupled: the ratio against the learner's own old policy, the mismatch as a capped weight
            if rows[0].old_logp is None:
                for row, values in zip(rows, logp.detach()):
                    row.old_logp = values
            old = pad_sequence([r.old_logp for r in rows], batch_first=True)
            weights = truncated_weights(old, sampler, cfg.tis_cap)
        ref = self.reference_logprobs(tree, rows) if cfg.beta > 0 else None
        # "token": the plain sum over tokens; "sequence": the sum over rows of their means; D divides it in `step`
        loss, stats = policy_loss(
            logp,
            old,
            advantages,
            mask,
            cfg.clip_low,
            cfg.clip_high,
            ref,
            cfg.beta,
            cfg.aggregate,
            cfg.ratio,
            denominator={
                "token": 1.0,
                "constant": float(cfg.turn_tokens * max(1, cfg.max_turns)),
            }.get(cfg.aggregate),
            weights=weights,
        )
        n_rows = {"token": 1, "sequence": int((mask.sum(1) > 0).sum()), "constant": len(rows)}[
            cfg.aggregate
        ]
        (loss * n_rows).backward()
        tokens = mask.sum().item()
        gap = ((logp.detach() - sampler).abs() * mask).sum().item()
        self._add(
            evidence=(advantages.abs() * known).sum().item(),
            loss=loss.item() * n_rows,
            units=tokens if cfg.aggregate == "token" else int(known.sum()),
            tokens=tokens,
            logprob_gap=gap,
            entropy=-(sampler * mask).sum().item(),
            **{k: v * tokens for k, v in stats.items()},
        )

    @torch.no_grad()
    def surprise(self, dialogues):
        """(sum of -log-prob, number) of the trained tokens of these dialogues. Under FSDP every rank must bring as many."""
        total, tokens = 0.0, 0
        for dialogue in dialogues:
            for tree, rows in pack(
                [dialogue], self.settings.train_tokens, self.settings.micro_tokens
            ):
                total -= self.logprobs(self.model, tree, rows).sum().item()
                tokens += sum(len(row.wanted) for row in rows)
        return total, tokens

    def idle(self):
        """A pass whose gradient is zero: under FSDP every rank must run as many as the busiest one."""
        (scorer(self.model)(Tree([0], [[0]]), [[0]])[0].sum() * 0.0).backward()

    def _add(self, **values):
        for key, value in values.items():
            self.sums[key] = self.sums.get(key, 0.0) + value

    def step(self):
        """Divide by D, clip, step. Returns the means over all ranks' trained tokens, grad_norm and `skipped`.

        A non-finite loss or gradient on any rank: every rank skips the step together and the weights stay as they are.
        No advantage but 0 in the whole batch: there is nothing to learn from, so weights, moments and warm-up stay as they are (`no_evidence`).
        """
        keys = (
            "evidence",
            "loss",
            "units",
            "tokens",
            "logprob_gap",
            "entropy",
            "clip_frac",
            "approx_kl",
            "ratio_mean",
            "kl_ref",
        )
        sums = torch.tensor([self.sums.get(k, 0.0) for k in keys], dtype=torch.float64)
        self.sums = {}
        if dist.is_initialized():
            sums = sums.to(self.optimizer.device)
            dist.all_reduce(sums)
        total = dict(zip(keys, sums.tolist()))
        D, tokens = max(total.pop("units"), 1.0), max(total["tokens"], 1.0)
        evidence = (
            total.pop("evidence") > 0 or self.settings.beta > 0 or not math.isfinite(total["loss"])
        )  # the KL pulls by itself
        grad_norm = (
            self.optimizer.step(1.0 / D, finite=math.isfinite(total["loss"]))
            if evidence
            else self.optimizer.drop()
        )
        means = {k: v / tokens for k, v in total.items() if k not in ("loss", "tokens")}
        return {
            "loss": total["loss"] / D,
            "grad_norm": grad_norm,
            "trained_tokens": int(total["tokens"]),
            **means,
            "skipped": not math.isfinite(grad_norm),
            "no_evidence": not evidence,
        }


class Optimizer:
    """AdamW over the fp32 weights of `model`, which from now on computes in `dtype`. FSDP2 shards keep their own dtypes.

    In bf16 each trained parameter leaves an fp32 master here; its gradient is added to the master's, in fp32, the moment
    that backward has made it, and `step` copies the masters back. Betas 0.9 and 0.95, no weight decay, linear warm-up.
    decay_steps: updates by which the learning rate has fallen to zero in a straight line (0: it does not fall).
    """

    def __init__(self, model, lr, warmup_steps=0, clip=1.0, dtype=torch.float32, decay_steps=0):
        self.lr, self.warmup_steps, self.decay_steps, self.clip, self.updates = (
            lr,
            warmup_steps,
            decay_steps,
            clip,
            0,
        )
        self.params = {
            n: p for n, p in model.named_parameters() if p.requires_grad
        }  # what the model computes with
        self.device = next(iter(self.params.values())).device
        self.masters = {
            n: torch.nn.Parameter(p.detach().clone()) if dtype != torch.float32 else p
            for n, p in self.params.items()
        }
        cast(model, dtype)
        for n, p in self.params.items():
            if self.masters[n] is not p:
                p.register_post_accumulate_grad_hook(self._into_master(self.masters[n]))
        self.adamw = torch.optim.AdamW(
            self.masters.values(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )

    @staticmethod
    def _into_master(master):
        piece = (
            master.numel() if master.is_cuda else 1 << 18
        )  # a CPU widens a gradient to fp32 before it adds: in its caches, not in fresh memory

        def hook(p):
            if master.grad is None:
                master.grad = torch.zeros_like(master)
            for total, part in zip(master.grad.view(-1).split(piece), p.grad.view(-1).split(piece)):
                total.add_(part)
            p.grad = None

        return hook

    def step(self, scale, finite=True):
        """Sum the gradients over ranks, multiply by `scale`, clip by their norm, step. Returns the norm before clipping.

        With `finite` False or a norm that is not finite nothing changes but the gradients, which are dropped.
        """
        grads = []
        for p in self.masters.values():
            if p.grad is None:  # no token of this rank reached it
                p.grad = torch.zeros_like(p)
            grads.append(p.grad)
        sharded = isinstance(grads[0], DTensor)  # FSDP2 has reduced its shards during backward
        local = [g.to_local() if sharded else g for g in grads]
        if dist.is_initialized() and not sharded:
            for work in [dist.all_reduce(g, async_op=True) for g in local]:
                work.wait()
        torch._foreach_mul_(local, scale)
        square = torch.stack(torch._foreach_norm(local)).double().square().sum()
        if sharded:
            dist.all_reduce(square)
        norm = square.sqrt().item() if finite else math.nan
        if math.isfinite(norm):
            if norm > self.clip > 0:
                torch._foreach_mul_(local, self.clip / norm)
            self.updates += 1
            left = (
                1 - (self.updates - 1) / self.decay_steps if self.decay_steps else 1.0
            )  # of the way down
            self.adamw.param_groups[0]["lr"] = (
                self.lr * min(1.0, self.updates / max(1, self.warmup_steps)) * max(0.0, left)
            )
            self.adamw.step()
            self.publish()
        self.adamw.zero_grad(set_to_none=True)
        return norm

    def drop(self):
        """Forget the gradients: no step is taken, and nothing else changes. Returns 0.0, the norm that counted."""
        self.adamw.zero_grad(set_to_none=True)
        return 0.0

    @torch.no_grad()
    def publish(self):
        """Copy the masters into the parameters that the model computes with."""
        for n, p in self.params.items():
            if self.masters[n] is not p:
                p.copy_(self.masters[n])


# ---- will it fit? --------------------------------------------------------------------------------------------------------


def memory_plan(config, settings, ranks, dtype, head, cuda=True):
    """Bytes that one card needs at most, {what: bytes}, from the model's config alone: nothing is allocated.

    The activations are those that autograd keeps in a forward pass over tensors without data. head: tokens of persona, rules and
    dilemma. "peak" is not the sum: playing, backward and the optimizer step follow one another.
    """
    groups, G = -(-settings.scenarios_per_step // ranks), settings.group_size
    spoken = settings.max_turns * (settings.turn_tokens + 8) + (
        settings.final_tokens + 80 if settings.train_tokens != "dialogue" else 0
    )
    each = min(spoken, settings.context_turns * (settings.turn_tokens + 8) or spoken)
    rows = max(1, min(G, (settings.micro_tokens - head) // each))
    tree = Tree([0] * head, [[0] * each] * rows)
    kept, c = {}, dtype.itemsize
    with torch.device("meta"):
        model = prepare(
            AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="negotiate")
        )
        if settings.lora_rank:
            add_lora(model, settings.lora_rank)
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        N, T = (
            sum(p.numel() for p in model.parameters() if p.requires_grad or every)
            for every in (True, False)
        )
        blocks = sum(
            p.numel() for n, p in model.named_parameters() if ".layers." in n or ".h." in n
        )
        with saved_tensors_hooks(
            lambda t: kept.setdefault(t.untyped_storage()._cdata, t), lambda t: t
        ):
            zeros = torch.zeros(1, tree.tokens, dtype=torch.long)
            inner(model)(input_ids=zeros, position_ids=zeros, use_cache=False, tree=tree, masks={})
    text = config.get_text_config()
    L, V = text.num_hidden_layers, text.vocab_size
    activations = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in own)
    if settings.gradient_checkpointing:
        activations = activations // L + L * tree.tokens * text.hidden_size * c
    heads = text.num_attention_heads
    width = (getattr(text, "head_dim", None) or text.hidden_size // heads) * (
        getattr(text, "num_key_value_heads", None) or heads
    )
    capacity = capacity_for(
        head + settings.max_turns * (settings.turn_tokens + 8) + settings.final_tokens + 80
    )
    shard = ranks if settings.fsdp else 1
    gathered = (
        4 * c * blocks // L + 2 * c * (N - blocks) if shard > 1 else 0
    )  # two blocks and the root, with their gradients
    plan = {
        "weights (compute)": c * N + gathered if shard > 1 or c < 4 or settings.lora_rank else 0,
        "weights (fp32)": 4 * (T if shard == 1 else N) // shard,
        "optimizer": 8 * T // shard,
        "reference": c * N if settings.beta > 0 and not settings.lora_rank else 0,
    }
    always = sum(plan.values())
    plan |= {
        "gradients": 4 * T // shard,
        "activations": activations,
        "logits": 4 * 4 * V * min(256, rows * each),
        "KV cache": 2 * L * width * c * 2 * groups * G * capacity,
        "play logits": 5 * 4 * V * groups * G,
    }
    copies = 0 if cuda else c * N  # `packed`
    learn, play = (
        plan["gradients"] + plan["activations"] + plan["logits"],
        plan["KV cache"] + plan["play logits"] + copies,
    )
    return plan | {"peak": always + max(learn, play)}
