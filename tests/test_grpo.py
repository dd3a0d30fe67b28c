"""The algorithm: advantages, loss, packing and the update, against plain loops, hand-worked numbers and a committed run."""

import contextlib
import copy
import itertools
import json
import math
import random
import statistics
from pathlib import Path

import helpers
import pytest
import torch
import torch.distributed as dist
from servers import JudgeServer

import grpo
import model as lm
import reward
import selfplay
import train

ONE = train.World(0, 1, torch.device("cpu"))
NAN, INF = math.nan, math.inf

# ---- advantages -----------------------------------------------------------------------------------------------------


def test_advantages_worked_by_hand():
    got = grpo.group_advantages(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), eps=0.0)
    std = math.sqrt(5 / 3)  # unbiased: (2.25 + 0.25 + 0.25 + 2.25) / 3
    torch.testing.assert_close(got, torch.tensor([[-1.5, -0.5, 0.5, 1.5]]) / std)
    assert grpo.group_advantages(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), "none").tolist() == [
        [-1.5, -0.5, 0.5, 1.5]
    ]
    torch.testing.assert_close(
        grpo.group_advantages(torch.tensor([[0.0, 1.0]]), eps=1.0),
        torch.tensor([[-0.5, 0.5]]) / (math.sqrt(0.5) + 1),
    )


def test_advantages_leave_missing_rewards_out():
    got = grpo.group_advantages(
        torch.tensor(
            [[1.0, NAN, 3.0, NAN], [NAN, NAN, 7.0, NAN], [NAN, NAN, NAN, NAN], [0.0, INF, 4.0, 8.0]]
        ),
        eps=0.0,
    )
    root = math.sqrt(2)
    torch.testing.assert_close(
        got,
        torch.tensor([[-1 / root, 0, 1 / root, 0], [0, 0, 0, 0], [0, 0, 0, 0], [-1.0, 0, 0, 1.0]]),
    )
    alone = grpo.group_advantages(torch.tensor([[1.0, 3.0]]), eps=0.0)
    assert torch.equal(
        got[:1, [0, 2]], alone
    )  # the others are as if the missing ones had not been there


@pytest.mark.parametrize("scale", ["std", "none"])
def test_advantages_of_equal_rewards_are_exactly_zero(scale):
    for value in (0.0, 0.1, 1 / 3, 4.7, -2.6, 1e-30, 1e6):
        for size in (2, 3, 6, 7):
            rewards = torch.full((1, size), value)
            rewards[0, -1] = NAN if size > 2 else value
            assert torch.equal(grpo.group_advantages(rewards, scale), torch.zeros(1, size))


def test_a_spread_within_the_judges_noise_is_no_evidence():
    """PITFALLS 35: rewards of 2.500 five times and 2.501 once are equal where the judge itself wobbles by more."""
    rewards = torch.tensor(
        [[2.5] * 5 + [2.501], [2.5] * 5 + [2.6], [1.0, 1.015, 1.03, float("nan"), 1.0, 1.0]],
        dtype=torch.float64,
    )
    got = grpo.group_advantages(rewards, noise=0.02)
    assert (got[0] == 0).all() and got[1].abs().min() > 0.3 and got[2].abs().sum() > 0  # 0.03 apart
    assert (grpo.group_advantages(rewards, noise=0.05)[2] == 0).all()
    assert grpo.group_advantages(rewards)[0].abs().max() > 1  # as it would be without


def test_advantages_match_a_plain_loop_in_any_order():
    rng = random.Random(1)
    rows = [
        [rng.choice([NAN, rng.uniform(0, 5), rng.uniform(0, 5)]) for _ in range(6)]
        for _ in range(20)
    ]
    expected = []
    for row in rows:
        valid = [r for r in row if not math.isnan(r)]
        if len(valid) < 2:
            expected.append([0.0] * 6)
            continue
        mean, std = statistics.fmean(valid), statistics.stdev(valid)
        expected.append([0.0 if math.isnan(r) else (r - mean) / (std + 1e-4) for r in row])
    rewards = torch.tensor(rows, dtype=torch.float64)
    got = grpo.group_advantages(rewards)
    torch.testing.assert_close(
        got, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12
    )
    order, members = torch.randperm(20), torch.randperm(6)
    assert torch.equal(grpo.group_advantages(rewards[order]), got[order])
    assert torch.equal(
        torch.cat([grpo.group_advantages(r[None]) for r in rewards]), got
    )  # a row knows nothing of the others
    torch.testing.assert_close(
        grpo.group_advantages(rewards[:, members]), got[:, members], rtol=1e-12, atol=1e-12
    )


def test_advantages_refuse_an_unknown_scale():
    with pytest.raises(ValueError, match="'std' or 'none'"):
        grpo.group_advantages(torch.zeros(1, 2), "variance")


# ---- loss -------------------------------------------------------------------------------------------------------------


def loss_by_loops(
    logp, old, advantages, mask, low, high, ref, beta, aggregate, ratio, denominator, weights
):
    """Eq. 2 to 5 of grpo.py, one token at a time."""
    rows, count = [], 0
    for i in range(len(logp)):
        at = [t for t in range(len(logp[i])) if mask[i][t]]
        mean_gap = sum(logp[i][t] - old[i][t] for t in at) / max(1, len(at))
        losses = []
        for t in at:
            rho = torch.exp(mean_gap if ratio == "sequence" else logp[i][t] - old[i][t])
            clipped = (
                rho
                if 1 - low <= rho.item() <= 1 + high
                else torch.tensor(1 - low if rho.item() < 1 else 1 + high, dtype=torch.float64)
            )
            loss = -min(rho * advantages[i], clipped * advantages[i], key=lambda x: x.item())
            if weights is not None:
                loss = loss * weights[i][t]
            if ref is not None:
                d = ref[i][t] - logp[i][t]
                loss = loss + beta * (torch.exp(d) - d - 1)
            losses.append(loss)
        rows.append(losses)
        count += len(at)
    if aggregate == "token":
        return sum(x for row in rows for x in row) / (count if denominator is None else denominator)
    if aggregate == "sequence":
        rows = [row for row in rows if row]
        return sum(sum(row) / len(row) for row in rows) / len(rows)
    return sum(x for row in rows for x in row) / (len(rows) * denominator)


def example(seed=0, B=5, T=7):
    """Random arguments of policy_loss, float64; one row has no masked token."""
    g = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(B, T, generator=g, dtype=torch.float64)
    logp = old + 0.4 * torch.randn(B, T, generator=g, dtype=torch.float64)
    ref = old + 0.4 * torch.randn(B, T, generator=g, dtype=torch.float64)
    mask = (torch.rand(B, T, generator=g) < 0.6).double()
    mask[2] = 0
    return (
        dict(
            logp=logp,
            old_logp=old,
            advantages=torch.randn(B, generator=g, dtype=torch.float64),
            mask=mask,
        ),
        ref,
        torch.rand(B, T, generator=g).double(),
    )


@pytest.mark.parametrize(
    "aggregate,denominator",
    [("token", None), ("token", 11.0), ("sequence", None), ("constant", 13.0)],
)
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("beta,weighted", [(None, False), (0.3, False), (0.3, True)])
def test_loss_and_gradient_match_plain_loops(aggregate, denominator, ratio, beta, weighted):
    for seed in range(3):
        args, ref, weights = example(seed)
        ref, weights = ref if beta else None, weights if weighted else None
        results = []
        for loops in (False, True):
            logp = args["logp"].clone().requires_grad_()
            if loops:
                loss = loss_by_loops(
                    logp,
                    args["old_logp"],
                    args["advantages"],
                    args["mask"],
                    0.2,
                    0.28,
                    ref,
                    beta or 0.0,
                    aggregate,
                    ratio,
                    denominator,
                    weights,
                )
            else:
                loss, _ = grpo.policy_loss(
                    **{**args, "logp": logp},
                    clip_high=0.28,
                    ref_logp=ref,
                    beta=beta or 0.0,
                    aggregate=aggregate,
                    ratio=ratio,
                    denominator=denominator,
                    weights=weights,
                )
            results.append((loss.detach(), *torch.autograd.grad(loss, logp)))
        torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)
        assert results[0][1].abs().sum() > 0


def test_loss_worked_by_hand():
    old = torch.zeros(1, 4)
    logp = torch.tensor([[1.5, 0.5, 1.1, 2.0]]).log()
    mask = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    loss, stats = grpo.policy_loss(logp, old, torch.tensor([2.0]), mask)
    assert loss.item() == pytest.approx(
        -2 * (1.2 + 0.5 + 1.1) / 3
    )  # a rise is clipped at 1.2, a fall is not
    assert stats["clip_frac"] == pytest.approx(1 / 3) and stats["ratio_mean"] == pytest.approx(
        (1.5 + 0.5 + 1.1) / 3
    )
    assert (
        stats["approx_kl"]
        == pytest.approx(sum(r - 1 - math.log(r) for r in (1.5, 0.5, 1.1)) / 3, rel=1e-5)
        and stats["kl_ref"] == 0.0
    )
    loss, stats = grpo.policy_loss(logp, old, torch.tensor([-2.0]), mask)
    assert loss.item() == pytest.approx(
        2 * (1.5 + 0.8 + 1.1) / 3
    )  # with A < 0 a fall is clipped at 0.8, a rise is not
    assert stats["clip_frac"] == pytest.approx(1 / 3)
    loss, stats = grpo.policy_loss(
        torch.zeros(1, 4),
        old,
        torch.tensor([0.0]),
        mask,
        ref_logp=torch.full((1, 4), math.log(2)),
        beta=0.5,
    )
    assert loss.item() == pytest.approx(0.5 * (2 - math.log(2) - 1)) and stats[
        "kl_ref"
    ] == pytest.approx(2 - math.log(2) - 1)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_at_ratio_one_the_gradient_is_that_of_reinforce(ratio):
    args, _, _ = example()
    logp = args["logp"].clone().requires_grad_()
    loss, stats = grpo.policy_loss(**{**args, "logp": logp, "old_logp": args["logp"]}, ratio=ratio)
    (grad,) = torch.autograd.grad(loss, logp)
    torch.testing.assert_close(
        grad,
        -args["advantages"][:, None] * args["mask"] / args["mask"].sum(),
        rtol=1e-12,
        atol=1e-14,
    )
    assert (
        stats["ratio_mean"] == pytest.approx(1.0)
        and stats["clip_frac"] == 0.0
        and stats["approx_kl"] == pytest.approx(0.0)
    )


@pytest.mark.parametrize("gap", [100.0, -100.0, 1e4, -1e4])
def test_huge_gaps_stay_finite(gap):
    logp = torch.full((2, 3), -1.0, requires_grad=True)
    for other in (
        {"ref_logp": torch.full((2, 3), -1.0 + gap), "old_logp": logp.detach()},
        {"ref_logp": logp.detach(), "old_logp": torch.full((2, 3), -1.0 + gap)},
    ):
        loss, stats = grpo.policy_loss(
            logp, advantages=torch.tensor([1.0, -1.0]), mask=torch.ones(2, 3), beta=0.1, **other
        )
        (grad,) = torch.autograd.grad(loss, logp)
        assert (
            torch.isfinite(loss)
            and torch.isfinite(grad).all()
            and all(math.isfinite(v) for v in stats.values())
        )
    assert torch.isfinite(grpo.truncated_weights(logp, logp.detach() - gap, 2.0)).all()


@pytest.mark.parametrize("aggregate", ["token", "sequence", "constant"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_what_stands_at_masked_positions_changes_nothing(aggregate, ratio):
    args, ref, weights = example()
    results = []
    for junk in (0.0, NAN, INF, -INF, 1e30):
        dirty = lambda t: torch.where(args["mask"] > 0, t, junk)
        logp = dirty(args["logp"]).requires_grad_()
        loss, stats = grpo.policy_loss(
            logp,
            dirty(args["old_logp"]),
            args["advantages"],
            args["mask"],
            ref_logp=dirty(ref),
            beta=0.2,
            aggregate=aggregate,
            ratio=ratio,
            denominator=9.0 if aggregate == "constant" else None,
            weights=dirty(weights),
        )
        (grad,) = torch.autograd.grad(loss, logp)
        assert (grad[args["mask"] == 0] == 0).all()
        results.append((loss.item(), grad.tolist(), stats))
    assert all(r == results[0] for r in results) and math.isfinite(results[0][0])


def test_an_empty_mask_gives_zero_and_unknown_variants_are_refused():
    logp = torch.zeros(2, 3, requires_grad=True)
    for aggregate in ("token", "sequence", "constant"):
        loss, stats = grpo.policy_loss(
            logp,
            torch.zeros(2, 3),
            torch.ones(2),
            torch.zeros(2, 3),
            aggregate=aggregate,
            denominator=2.0,
        )
        assert (
            loss.item() == 0.0
            and (torch.autograd.grad(loss, logp)[0] == 0).all()
            and stats["clip_frac"] == 0.0
        )
    for wrong in ({"aggregate": "mean"}, {"ratio": "row"}, {"aggregate": "constant"}):
        with pytest.raises(ValueError):
            grpo.policy_loss(logp, logp, torch.ones(2), torch.ones(2, 3), **wrong)


def test_truncated_weights():
    got = grpo.truncated_weights(
        torch.tensor([0.0, -1.0, 0.0], requires_grad=True), torch.tensor([0.0, 0.0, -5.0]), 2.0
    )
    torch.testing.assert_close(got, torch.tensor([1.0, math.exp(-1), 2.0]))
    assert not got.requires_grad


# ---- dialogues for what follows ---------------------------------------------------------------------------------------


def settings(**more):
    """Settings of short dialogues without a judge."""
    return train.Settings(
        **{
            **dict(
                max_turns=3,
                turn_tokens=8,
                final_tokens=8,
                agreement="none",
                temperature=1.0,
                final_temperature=1.0,
                dtype="fp32",
                lr=1e-3,
                warmup_steps=0,
                grad_clip=0.0,
            ),
            **more,
        }
    )


def played(cfg, groups=2, members=4, kind="llama"):
    """Groups of finished dialogues of a tiny model, with rewards that differ."""
    flat = selfplay.play((helpers.voice(kind),) * 2, helpers.dialogues(groups, members), cfg)
    for i, d in enumerate(flat):
        d.reward = float((7 * i) % 5)
    made = [flat[g * members : (g + 1) * members] for g in range(groups)]
    for group in made:
        train.settle(group, cfg)
    return made


def gradients(groups, cfg, model=None):
    """The gradient of one step, {name: tensor}, and the step's means; no parameter moves."""
    model = model or helpers.tiny()
    learner = grpo.Learner(
        model,
        grpo.Optimizer(model, cfg.lr, clip=0.0),
        cfg,
        reference=helpers.tiny(seed=5) if cfg.beta else None,
    )
    kept = {}
    learner.optimizer.adamw.step = lambda: kept.update(
        {n: p.grad.clone() for n, p in learner.optimizer.masters.items()}
    )
    return kept, update(groups, learner)


def update(groups, learner):
    """One step on groups that are settled."""
    for group in groups:
        for tree, rows in grpo.pack(
            group, learner.settings.train_tokens, learner.settings.micro_tokens
        ):
            learner.backward(tree, rows)
    return learner.step()


def distance(a, b):
    """|a - b| / |b| over all parameters together."""
    square = lambda grads: sum(g.double().square().sum() for g in grads.values())
    return (square({n: a[n] - b[n] for n in b}) / square(b)).sqrt().item()


# ---- packing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train_tokens", ["dialogue", "final", "both"])
@pytest.mark.parametrize("context_turns", [0, 2])
@pytest.mark.parametrize("micro_tokens", [1, 400, 10**6])
def test_each_trained_token_is_trained_exactly_once(train_tokens, context_turns, micro_tokens):
    cfg = settings(max_turns=4, context_turns=context_turns)
    for group in played(cfg):
        packed = grpo.pack(group, train_tokens, micro_tokens)
        for d in group:
            expected = (
                [(i, p) for t in d.turns for i, p in zip(t.ids, t.logprobs)]
                if train_tokens != "final"
                else []
            )
            if train_tokens != "dialogue":
                expected += [
                    (i, p)
                    for i, p, m in zip(
                        d.final_sample.ids, d.final_sample.logprobs, d.final_sample.mask
                    )
                    if m
                ]
            got = [
                (tree.continuations[k][at], p)
                for tree, rows in packed
                for k, row in enumerate(rows)
                if row.dialogue is d
                for at, p in zip(row.wanted, row.sampler_logp)
            ]
            assert sorted(got) == sorted(expected) and len(got) > 0
        samples = {tuple(s.ids) for d in group for s in grpo.trained_samples(d, train_tokens)}
        for tree, rows in packed:
            assert tree.tokens <= micro_tokens or len(rows) == 1
            assert all(tuple(tree.prefix + c) in samples for c in tree.continuations)
        if micro_tokens == 10**6:
            assert len(packed) == (
                1 if train_tokens == "final" else 2
            )  # one tree for each agent's view


def test_packed_logprobs_are_those_of_the_sampler():
    for kind in ("llama", "qwen2"):
        cfg = settings(top_p=0.9, temperature=0.8)
        for group in played(cfg, kind=kind):
            learner = grpo.Learner(helpers.tiny(kind), None, cfg)
            for tree, rows in grpo.pack(group, "dialogue", 10**6):
                for row, logp in zip(rows, learner.logprobs(learner.model, tree, rows)):
                    torch.testing.assert_close(
                        logp[: len(row.wanted)].detach(),
                        torch.tensor(row.sampler_logp),
                        rtol=0,
                        atol=1e-4,
                    )


# ---- the update -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"aggregate": "sequence"},
        {"aggregate": "constant"},
        {"beta": 0.1},
        {"ratio": "sequence", "context_turns": 2},
    ],
)
def test_gradients_do_not_depend_on_micro_batches(more):
    cfg = settings(**more)
    groups = played(cfg, groups=1, members=8)
    groups[0][3].reward = None  # and one is missing
    train.settle(groups[0], cfg)
    sizes, results = [], []
    for micro_tokens in (1, 300, 10**6):
        cut = settings(**more, micro_tokens=micro_tokens)
        sizes.append(max(len(rows) for _, rows in grpo.pack(groups[0], "dialogue", micro_tokens)))
        results.append(gradients(groups, cut))
    assert sizes[0] == 1 and 2 <= sizes[1] <= 5 and sizes[2] >= 8
    for grads, means in results[1:]:
        assert distance(grads, results[0][0]) < 1e-6
        assert means == pytest.approx(results[0][1], rel=1e-5, abs=1e-6)


def test_a_missing_reward_leaves_the_loss_and_nothing_else_changes():
    cfg = settings()
    groups = played(cfg, groups=1, members=5)
    groups[0][2].reward = None
    train.settle(groups[0], cfg)
    assert groups[0][2].advantage is None
    with_it, means = gradients(groups, cfg)
    without = [[d for i, d in enumerate(groups[0]) if i != 2]]
    train.settle(without[0], cfg)
    alone, same = gradients(without, cfg)
    assert distance(with_it, alone) < 1e-6 and means["trained_tokens"] == same["trained_tokens"]


def test_tokens_that_are_not_trained_get_no_gradient_of_their_own():
    """Altering the advantage-free parts (the final completion's log-probs, recorded numbers at mask 0) changes nothing, bitwise."""
    cfg = settings()
    groups = played(cfg)
    before, _ = gradients(groups, cfg)
    for d in itertools.chain(*groups):
        d.final_sample = dataclass_with(d.final_sample, logprobs=[-9.0] * len(d.final_sample.ids))
        for s in itertools.chain(*d.streams):
            s.logprobs[:] = [p if m else NAN for p, m in zip(s.logprobs, s.mask)]
    after, _ = gradients(groups, cfg)
    assert all(torch.equal(before[n], after[n]) for n in before)


def dataclass_with(thing, **changes):
    return type(thing)(**{**vars(thing), **changes})


def rank_gradients(rank, size, folder):
    """A process of two: its share of eight dialogues (whole groups), then the step's gradient to a file."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size
    )
    torch.set_num_threads(1)
    for name, more in (("token", {}), ("sequence", {"aggregate": "sequence", "micro_tokens": 1})):
        groups = played(settings())  # everybody plays all, so that the dialogues are the very same
        grads, means = gradients(groups[rank::size], settings(**more))
        torch.save((grads, means), f"{folder}/{name}-{rank}.pt")
    groups = played(settings())
    if rank == 1:
        groups[1][0].advantage = NAN
    model = helpers.tiny()
    learner = grpo.Learner(model, grpo.Optimizer(model, 1e-2), settings())
    means = update([groups[rank]], learner)
    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), helpers.tiny().parameters()))
    torch.save((means["skipped"], same, learner.optimizer.updates), f"{folder}/nan-{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_compute_what_one_does_and_skip_together(tmp_path):
    torch.multiprocessing.spawn(rank_gradients, (2, str(tmp_path)), nprocs=2)
    groups = played(settings())
    for name, more in (("token", {}), ("sequence", {"aggregate": "sequence"})):
        alone, means = gradients(groups, settings(**more))
        for rank in (0, 1):
            grads, same = torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=False)
            assert distance(grads, alone) < 1e-6
            assert same == pytest.approx(means, rel=1e-5, abs=1e-7)
    for rank in (0, 1):  # NaN on rank 1 alone
        assert torch.load(tmp_path / f"nan-{rank}.pt", weights_only=False) == (True, True, 0)


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(broken):
    cfg = settings()
    groups = played(cfg)
    model, twin = helpers.tiny(), helpers.tiny()
    learners = [grpo.Learner(m, grpo.Optimizer(m, 1e-2), cfg) for m in (model, twin)]
    for learner in learners:
        update(groups, learner)
    before = [p.detach().clone() for p in model.parameters()]
    hurt = copy.copy(groups[0][0])
    hurt.advantage = NAN if broken == "loss" else hurt.advantage
    if broken == "gradient":
        handle = next(model.parameters()).register_hook(lambda g: g * INF)
    means = update([[hurt, *groups[0][1:]]], learners[0])
    if broken == "gradient":
        handle.remove()
        assert math.isfinite(means["loss"])
    assert means["skipped"] and learners[0].optimizer.updates == 1
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    for learner in learners:  # and the next step is as if the bad one had not been
        assert not update(groups, learner)["skipped"]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))


@pytest.mark.parametrize("rewards", [[3.0] * 4, [None] * 4, [3.0, None, None, None]])
def test_a_step_without_evidence_changes_nothing(rewards):
    """PITFALLS 36: not even by AdamW's momentum, nor does the warm-up go on."""
    cfg, model = settings(beta=0.0), helpers.tiny()
    groups = played(cfg, groups=1)
    learner = grpo.Learner(model, grpo.Optimizer(model, cfg.lr, warmup_steps=9, clip=0.0), cfg)
    assert not update(groups, learner)["no_evidence"] and learner.optimizer.updates == 1
    before = {n: p.clone() for n, p in model.named_parameters()}
    moments = [
        {k: v.clone() for k, v in state.items()} for state in learner.optimizer.adamw.state.values()
    ]
    again = played(cfg, groups=1)
    for d, r in zip(again[0], rewards):
        d.reward = r
    train.settle(again[0], cfg)
    means = update(again, learner)
    assert (
        means["no_evidence"]
        and means["grad_norm"] == 0
        and not means["skipped"]
        and learner.optimizer.updates == 1
    )
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert all(
        torch.equal(a[k], b[k])
        for a, b in zip(moments, learner.optimizer.adamw.state.values())
        for k in a
    )
    assert (
        not update(groups, learner)["no_evidence"] and learner.optimizer.updates == 2
    )  # and nothing of it is left over


def test_several_updates_on_one_rollout_use_the_clipped_ratio():
    groups = played(settings())
    results = []
    for updates in (1, 3):
        cfg = settings(updates_per_rollout=updates, lr=1e-2)
        model = helpers.tiny()
        learner = grpo.Learner(model, grpo.Optimizer(model, cfg.lr), cfg)
        means, _ = train.learn(groups, learner, cfg, ONE)
        assert learner.optimizer.updates == updates
        results.append(means)
    assert (
        results[0]["ratio_mean"] == pytest.approx(1.0, abs=1e-4)
        and results[0]["clip_frac"] == 0.0
        and results[0]["approx_kl"] < 1e-6
    )
    assert (
        abs(results[1]["ratio_mean"] - 1) > 1e-3
        and results[1]["clip_frac"] > 0.05
        and results[1]["approx_kl"] > 1e-3
    )


def test_importance_weights_correct_the_samplers_log_probs():
    """Recorded log-probs moved by log 2: with --tis-cap the ratio is 1 and the policy term is multiplied by 1/2, or by the cap."""
    groups = played(settings())
    plain, means = gradients(groups, settings())
    for shift, cap, factor in (
        (math.log(2), 2.0, 0.5),
        (-math.log(2), 1.5, 1.5),
        (-math.log(2), 4.0, 2.0),
    ):
        moved = copy.deepcopy(groups)
        for s in (s for group in moved for d in group for s in itertools.chain(*d.streams)):
            s.logprobs[:] = [p + shift if m else 0 for p, m in zip(s.logprobs, s.mask)]
        grads, got = gradients(moved, settings(tis_cap=cap))
        assert distance(grads, {n: g * factor for n, g in plain.items()}) < 1e-3
        assert got["ratio_mean"] == pytest.approx(1.0, abs=1e-5) and got[
            "logprob_gap"
        ] == pytest.approx(math.log(2), abs=1e-3)


def test_the_reference_is_read_once_and_pulls_towards_itself():
    groups = played(settings())
    for group in groups:
        for d in group:
            d.advantage = 0.0
    cfg = settings(beta=1.0, lr=3e-3, updates_per_rollout=1)
    model, reference = helpers.tiny(), helpers.tiny(seed=5).requires_grad_(False)
    learner = grpo.Learner(model, grpo.Optimizer(model, cfg.lr), cfg, reference)
    packed = grpo.pack(groups[0], "dialogue", 10**6)
    kls, calls = [], []
    reference.register_forward_hook(lambda *a: None)
    reference.model.register_forward_hook(lambda *a: calls.append(1))
    for _ in range(8):
        for tree, rows in packed:
            learner.backward(tree, rows)
        kls.append(learner.step()["kl_ref"])
    assert kls[-1] < 0.7 * kls[0] and len(calls) == len(packed)


def test_bf16_computes_and_fp32_remembers():
    model = helpers.tiny()
    frequencies = {n: b.clone() for n, b in model.named_buffers()}
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = grpo.Optimizer(model, 1e-6, dtype=torch.bfloat16, clip=0.0)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters()) and all(
        m.dtype == torch.float32 for m in optimizer.masters.values()
    )
    assert all(
        b.dtype == frequencies[n].dtype and torch.equal(b, frequencies[n])
        for n, b in model.named_buffers()
    )
    assert all(torch.equal(optimizer.masters[n], start[n]) for n in start)  # not rounded
    learner, cfg = grpo.Learner(model, optimizer, settings()), settings()
    groups = played(cfg)
    for step in range(3):
        train.learn(groups, learner, cfg, ONE)
    moved = torch.cat([(optimizer.masters[n] - start[n]).flatten() for n in start])
    assert 1e-6 < moved.abs().max() < 4e-6  # steps far below the resolution of bf16 add up
    assert all(torch.equal(p, optimizer.masters[n].bfloat16()) for n, p in model.named_parameters())


def test_bf16_gradients_are_summed_in_fp32():
    parameter = torch.nn.Parameter(torch.ones(4))
    module = torch.nn.Module()
    module.w = parameter
    optimizer = grpo.Optimizer(module, 1e-3, dtype=torch.bfloat16)
    for _ in range(1000):  # in bf16 the sum of ones stops at 256
        module.w.sum().backward()
    assert optimizer.masters["w"].grad.tolist() == [1000.0] * 4 and module.w.grad is None


def test_warm_up_clipping_and_adamw():
    module = torch.nn.Linear(2, 1, bias=False)
    start = module.weight.detach().clone()
    optimizer = grpo.Optimizer(module, lr=0.1, warmup_steps=2, clip=1.0)
    module(torch.tensor([3.0, 4.0])).backward()
    assert optimizer.step(1.0) == pytest.approx(5.0)
    torch.testing.assert_close(
        module.weight.detach(), start - 0.05
    )  # Adam's first step is lr in each direction, and half of it while warming up
    state = optimizer.adamw.state[module.weight]
    torch.testing.assert_close(
        state["exp_avg"], 0.1 * torch.tensor([[0.6, 0.8]])
    )  # the clipped gradient
    module(torch.tensor([0.3, 0.4])).backward()
    assert optimizer.step(1.0) == pytest.approx(0.5) and optimizer.adamw.param_groups[0][
        "lr"
    ] == pytest.approx(0.1)


@pytest.mark.parametrize("micro_tokens", [10**6, 300])
def test_gradient_checkpointing_gives_the_same_gradient_and_keeps_the_cache(micro_tokens):
    cfg, model = settings(gradient_checkpointing=True, micro_tokens=micro_tokens), helpers.tiny()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    runs = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *a: runs.append(1))
    voice = selfplay.voice(model, helpers.tokenizer())
    flat = selfplay.play((voice,) * 2, helpers.dialogues(2, 4), cfg)
    for i, d in enumerate(flat):
        d.reward = float((7 * i) % 5)
    groups = [flat[:4], flat[4:]]
    for group in groups:
        train.settle(group, cfg)
    decoded = len(runs)
    plain, _ = gradients(groups, settings())
    assert distance(gradients(groups, cfg, model)[0], plain) < 1e-6
    trees = [tree for g in groups for tree, _ in grpo.pack(g, "dialogue", micro_tokens)]
    assert len(runs) - decoded == 2 * len(trees)  # once forward, once more in backward
    assert [t.ids for d in flat for t in d.turns] == [
        t.ids for d in itertools.chain(*played(settings())) for t in d.turns
    ]


# ---- does it learn? ------------------------------------------------------------------------------------------------------

# The game: agent 0 says one of them, whoever speaks later repeats it. None is among the warm words that the judge never sees.
WORDS = [" the", " and", " farm", " share", " water", " council"]


def word_ids():
    """One id for each word."""
    return [helpers.tokenizer()(w, add_special_tokens=False)["input_ids"][-1] for w in WORDS]


@pytest.fixture
def parrots(monkeypatch):
    """A tiny model that has learnt to play the game: what agent 0 says first, of six words, comes back in the final completion."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    for name, text in {
        "SYSTEM": "{me}",
        "CASE": "{dilemma} ",
        "ASK": "So?",
        "FINAL": "Sum up.",
    }.items():  # so short that two layers learn it
        monkeypatch.setattr(selfplay, name, text)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        vocab_size=len(helpers.tokenizer()),
        eos_token_id=helpers.tokenizer().eos_token_id,
    )
    model = lm.prepare(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    voice = selfplay.voice(model, helpers.tokenizer())
    group, say = (
        [],
        lambda speaker, word: selfplay.Turn(
            speaker, "x", False, [word] * 3 + [voice.chat.end], [-1.0] * 4
        ),
    )
    for word in word_ids():
        d = helpers.dialogues(1, 1)[0]
        views = [selfplay.View(voice.chat, me, d.scenario, False) for me in (0, 1)]
        d.turns = [say(0, word), say(1, word)]
        for t in d.turns:
            t.text = voice.chat.text(t.ids)
        request = selfplay.final_request(d.scenario, selfplay.FINAL)
        d.streams = [[views[0].until([], d.turns[0])], [views[1].until(d.turns[:1], d.turns[1])]]
        d.final_sample = views[0].until(d.turns, say(0, word), train=[], closing=request)
        group.append(d)
    trees = grpo.pack(group, "dialogue", 10**6) + grpo.pack(group, "final", 10**6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for step in range(400):
        loss = -sum(
            torch.cat(lm.token_logprobs(model, tree, [r.wanted for r in rows])).mean()
            for tree, rows in trees
        ) / len(trees)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (
            loss < 0.21
        ):  # the best there is: log(6) for one of four tokens in one of three texts, 0.15
            break
    return model


def score(d, word):
    """The share of the final completion that is one certain word."""
    ids = [i for i, m in zip(d.final_sample.ids, d.final_sample.mask) if m]
    return sum(i == word_ids()[word] for i in ids) / 3


def train_parrots(model, how):
    """Thirty-two steps with gradients on the dialogue alone, for the word that is rarest at first, so that there is room to rise.

    The judge is an HTTP server that counts the word in the solution. By plain gradient descent: to Adam an update of pure noise is
    as long as any other, and a few of them settle on some word. Returns the scores of 60 fresh dialogues before and after.
    """
    model, cfg = (
        copy.deepcopy(model),
        settings(max_turns=2, turn_tokens=4, final_tokens=4, grad_clip=0.0),
    )
    voice, rng = selfplay.voice(model, helpers.tokenizer()), random.Random(5)
    optimizer = grpo.Optimizer(model, cfg.lr, clip=cfg.grad_clip)
    optimizer.adamw = torch.optim.SGD(optimizer.masters.values())
    optimizer.lr, learner = 5e-3, grpo.Learner(model, optimizer, cfg)
    fresh = lambda: selfplay.play((voice,) * 2, helpers.dialogues(1, 60, step=1000), cfg)
    by_word = [[score(d, word) for d in fresh()] for word in range(len(WORDS))]
    word, before = min(
        ((w, scores) for w, scores in enumerate(by_word) if any(scores)),
        key=lambda pair: sum(pair[1]),
    )
    counted, asking = (
        lambda text: 5 * min(1, text.split().count(WORDS[word].strip()) / 3),
        reward.JudgeSettings(judge_mode="json", judge_model="scripted", judge_cache="off"),
    )
    with (
        JudgeServer(counted, offers=("json",)) as server,
        contextlib.closing(reward.Judge(asking, server.url)) as judge,
    ):
        for step in range(32):
            judge.start_batch()
            group = selfplay.play((voice,) * 2, helpers.dialogues(1, 64, step), cfg, judge)
            train.settle(group, cfg)
            assert all(d.reward is not None for d in group)
            if how == "shuffled":
                for d, a in zip(group, rng.sample([d.advantage for d in group], len(group))):
                    d.advantage = a
            if how == "inverted":
                for s in (s for d in group for stream in d.streams for s in stream):
                    s.mask[:] = [0] + [1 - m for m in s.mask[1:]]
            for tree, rows in grpo.pack(group, "dialogue", 4096):
                if how == "inverted":
                    with torch.no_grad():
                        for row, values in zip(rows, learner.logprobs(model, tree, rows)):
                            row.sampler_logp = values[: len(row.wanted)].tolist()
                learner.backward(tree, rows)
            learner.step()
    return before, [score(d, word) for d in fresh()]


@pytest.mark.slow
def test_the_score_rises_with_gradients_on_the_dialogue_alone(parrots):
    """By more than two standard deviations; and not at all when the mask is inverted or the advantages are dealt to others."""
    rise = {}
    for how in ("proper", "inverted", "shuffled"):
        before, after = train_parrots(parrots, how)
        rise[how] = (statistics.fmean(after) - statistics.fmean(before)) / statistics.stdev(before)
    assert rise["proper"] > 2 and rise["inverted"] < 0.7 and rise["shuffled"] < 0.7, rise


# ---- a committed run ----------------------------------------------------------------------------------------------------


def handmade(model, members=4, seed=0):
    """A group of dialogues that no sampler made, so that they are the same on every CPU: two samples each, two spans of 6 trained tokens."""
    rng = random.Random(seed)
    ids = lambda n: [rng.randrange(4, 260) for _ in range(n)]
    heads, group = (ids(20), ids(24)), helpers.dialogues(1, members)
    for i, d in enumerate(group):
        for me in (0, 1):
            tokens, mask = (
                heads[me] + ids(5) + ids(6) + ids(7) + ids(6),
                [0] * (len(heads[me]) + 5) + [1] * 6 + [0] * 7 + [1] * 6,
            )
            numbers = [0.0, *helpers.plain_logprobs(model, tokens).tolist()]
            d.streams[me] = [
                selfplay.Sample(
                    tokens,
                    mask,
                    [p * m for p, m in zip(numbers, mask)],
                    [0] * len(mask),
                    [0] * len(mask),
                )
            ]
        d.reward = [1.0, 4.0, 2.5, None][i % 4]
    return group


def golden_run():
    """Loss, gradient norm and clipped share of five fp32 steps: the same two handmade groups each time, so that the ratio is soon clipped."""
    with torch.no_grad():
        model = helpers.tiny()
        reference = helpers.tiny().requires_grad_(False)
        groups = [handmade(model, seed=s) for s in (0, 1)]
    cfg = settings(beta=0.05, lr=1.5e-4, grad_clip=1.0)
    for group in groups:
        train.settle(group, cfg)
    learner = grpo.Learner(
        model, grpo.Optimizer(model, cfg.lr, warmup_steps=2, clip=1.0), cfg, reference
    )
    rows = [train.learn(groups, learner, cfg, ONE)[0] for _ in range(5)]
    return [
        {k: row[k] for k in ("loss", "grad_norm", "clip_frac", "kl_ref", "trained_tokens")}
        for row in rows
    ]


def test_five_steps_are_those_of_the_committed_run():
    """To renew it after a deliberate change of the mathematics: python tests/test_grpo.py"""
    expected = json.loads((Path(__file__).parent / "golden.json").read_text())
    got = golden_run()
    assert len(got) == len(expected) == 5
    for mine, theirs in zip(got, expected):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)


if __name__ == "__main__":
    (Path(__file__).parent / "golden.json").write_text(json.dumps(golden_run(), indent=1) + "\n")
