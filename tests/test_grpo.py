"""The algorithm: advantages, loss, packing and the update.

Against plain loops, hand-worked numbers, a game that can be won, and a committed run.
"""

import contextlib
import copy
import dataclasses
import itertools
import json
import math
import random
import statistics
from pathlib import Path

import helpers
import pytest
import runs
import torch
import torch.distributed as dist
from servers import JudgeServer
from transformers import AutoModelForCausalLM, LlamaConfig

import chat
import grpo
import model as lm
import packing
import reward
import selfplay
import train
from policy import World
from settings import Settings

ONE = World(0, 1, torch.device("cpu"))
NAN, INF = math.nan, math.inf
WHOLE = 10**6  # micro_tokens that nothing exceeds
GOLDEN = Path(__file__).parent / "golden.json"

# ---- advantages ----------------------------------------------------------------------------------


def test_advantages_worked_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    centred = torch.tensor([[-1.5, -0.5, 0.5, 1.5]])
    std = math.sqrt(5 / 3)  # unbiased: (2.25 + 0.25 + 0.25 + 2.25) / 3
    torch.testing.assert_close(grpo.group_advantages(rewards, eps=0.0), centred / std)
    assert torch.equal(grpo.group_advantages(rewards, "none"), centred)
    torch.testing.assert_close(
        grpo.group_advantages(torch.tensor([[0.0, 1.0]]), eps=1.0),
        torch.tensor([[-0.5, 0.5]]) / (math.sqrt(0.5) + 1),
    )
    with pytest.raises(ValueError, match="'std' or 'none'"):
        grpo.group_advantages(rewards, "variance")


def test_advantages_leave_missing_rewards_out():
    rewards = [[1, NAN, 3, NAN], [NAN, NAN, 7, NAN], [NAN, NAN, NAN, NAN], [0, INF, 4, 8]]
    got = grpo.group_advantages(torch.tensor(rewards), eps=0.0)
    half = math.sqrt(0.5)
    expected = [[-half, 0, half, 0], [0, 0, 0, 0], [0, 0, 0, 0], [-1.0, 0, 0, 1.0]]
    torch.testing.assert_close(got, torch.tensor(expected))
    # the others are as if the missing ones had not been there
    alone = grpo.group_advantages(torch.tensor([[1.0, 3.0]]), eps=0.0)
    assert torch.equal(got[:1, [0, 2]], alone)


@pytest.mark.parametrize("scale", ["std", "none"])
def test_advantages_of_equal_rewards_are_exactly_zero(scale):
    for value in (0.0, 0.1, 1 / 3, 4.7, -2.6, 1e-30, 1e6):
        for size in (2, 3, 6, 7):
            rewards = torch.full((1, size), value)
            rewards[0, -1] = NAN if size > 2 else value
            assert torch.equal(grpo.group_advantages(rewards, scale), torch.zeros(1, size))


def test_a_spread_within_the_judges_noise_is_no_evidence():
    """PITFALLS 35: 2.500 five times and 2.501 once are equal where the judge wobbles by more."""
    rewards = [[2.5] * 5 + [2.501], [2.5] * 5 + [2.6], [1.0, 1.015, 1.03, NAN, 1.0, 1.0]]
    rewards = torch.tensor(rewards, dtype=torch.float64)
    got = grpo.group_advantages(rewards, noise=0.02)
    assert (got[0] == 0).all()
    assert got[1].abs().min() > 0.3
    assert got[2].abs().sum() > 0  # 0.03 apart
    assert (grpo.group_advantages(rewards, noise=0.05)[2] == 0).all()
    assert grpo.group_advantages(rewards)[0].abs().max() > 1  # as it would be without


def advantages_by_loops(rewards):
    """Eq. 1 for one group, a list with NaN where missing."""
    valid = [r for r in rewards if not math.isnan(r)]
    if len(valid) < 2:
        return [0.0] * len(rewards)
    mean, std = statistics.fmean(valid), statistics.stdev(valid)
    return [0.0 if math.isnan(r) else (r - mean) / (std + 1e-4) for r in rewards]


def test_advantages_match_a_plain_loop_in_any_order():
    rng = random.Random(1)
    rows = []
    for _ in range(20):
        rows.append([NAN if rng.random() < 1 / 3 else rng.uniform(0, 5) for _ in range(6)])
    rewards = torch.tensor(rows, dtype=torch.float64)
    got = grpo.group_advantages(rewards)
    expected = torch.tensor([advantages_by_loops(row) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    order, members = torch.randperm(20), torch.randperm(6)
    assert torch.equal(grpo.group_advantages(rewards[order]), got[order])
    one_by_one = torch.cat([grpo.group_advantages(row[None]) for row in rewards])
    assert torch.equal(one_by_one, got)  # a row knows nothing of the others
    shuffled = grpo.group_advantages(rewards[:, members])
    torch.testing.assert_close(shuffled, got[:, members], rtol=1e-12, atol=1e-12)


# ---- loss ----------------------------------------------------------------------------------------


def token_loss_by_hand(logp, log_ratio, advantage, ref, low, high, beta):
    """Eq. 2 to 4 of one token; logp, log_ratio and ref are scalars, ref or None."""
    rho = torch.exp(log_ratio)
    clipped = rho
    if rho < 1 - low:
        clipped = torch.tensor(1 - low, dtype=torch.float64)
    if rho > 1 + high:
        clipped = torch.tensor(1 + high, dtype=torch.float64)
    loss = -min(rho * advantage, clipped * advantage, key=lambda x: x.item())
    if ref is not None:
        d = ref - logp
        loss = loss + beta * (torch.exp(d) - d - 1)
    return loss


def loss_by_loops(logp, old, advantages, mask, low, high, ref, beta, aggregate, ratio, denominator):
    """Eq. 2 to 5, one token at a time; advantages (B, T)."""
    rows = []
    for i in range(len(logp)):
        at = [t for t in range(len(logp[i])) if mask[i][t]]
        gaps = {t: logp[i][t] - old[i][t] for t in at}
        if ratio == "sequence":
            gaps = dict.fromkeys(at, sum(gaps.values()) / max(1, len(at)))
        losses = []
        for t in at:
            token_ref = None if ref is None else ref[i][t]
            losses.append(
                token_loss_by_hand(
                    logp[i][t], gaps[t], advantages[i][t], token_ref, low, high, beta
                )
            )
        rows.append(losses)
    if aggregate == "sequence":
        means = [sum(row) / len(row) for row in rows if row]
        return sum(means) / len(means)
    total = sum(sum(row) for row in rows)
    if aggregate == "constant":
        return total / (len(rows) * denominator)
    return total / (denominator or sum(len(row) for row in rows))


def example(seed=0, rows=5, tokens=7):
    """Random arguments of policy_loss, float64; one row has no masked token. And a reference."""
    g = torch.Generator().manual_seed(seed)
    shape = rows, tokens
    old = -3 * torch.rand(shape, generator=g, dtype=torch.float64)
    logp = old + 0.4 * torch.randn(shape, generator=g, dtype=torch.float64)
    ref = old + 0.4 * torch.randn(shape, generator=g, dtype=torch.float64)
    mask = (torch.rand(shape, generator=g) < 0.6).double()
    mask[2] = 0
    advantages = torch.randn(rows, generator=g, dtype=torch.float64)
    return {"logp": logp, "old_logp": old, "advantages": advantages, "mask": mask}, ref


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize(
    "aggregate,denominator",
    [("token", None), ("token", 11.0), ("sequence", None), ("constant", 13.0)],
)
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_loss_and_gradient_match_plain_loops(aggregate, denominator, ratio, beta, per_token):
    for seed in range(3):
        args, ref = example(seed)
        ref = ref if beta else None
        wide = args["advantages"][:, None].expand_as(ref if beta else args["logp"])
        if per_token:  # advantages (B, T)
            wide = args["advantages"] = wide * torch.linspace(-1, 2, wide.shape[1])
        logp = args.pop("logp").requires_grad_()
        variant = {"aggregate": aggregate, "ratio": ratio, "denominator": denominator}
        mine, _ = grpo.policy_loss(logp, **args, clip_high=0.28, ref_logp=ref, beta=beta, **variant)
        old, mask = args["old_logp"], args["mask"]
        theirs = loss_by_loops(logp, old, wide, mask, 0.2, 0.28, ref, beta, **variant)
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
        (gradient,) = torch.autograd.grad(mine, logp)
        (expected,) = torch.autograd.grad(theirs, logp)
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)
        assert gradient.abs().sum() > 0


def test_loss_worked_by_hand():
    old = torch.zeros(1, 4)
    logp = torch.tensor([[1.5, 0.5, 1.1, 2.0]]).log()
    mask = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    loss, stats = grpo.policy_loss(logp, old, torch.tensor([2.0]), mask)
    # a rise is clipped at 1.2, a fall is not
    assert loss.item() == pytest.approx(-2 * (1.2 + 0.5 + 1.1) / 3)
    assert stats["clip_frac"] == pytest.approx(1 / 3)
    assert stats["ratio_mean"] == pytest.approx((1.5 + 0.5 + 1.1) / 3)
    k3 = [r - 1 - math.log(r) for r in (1.5, 0.5, 1.1)]
    assert stats["approx_kl"] == pytest.approx(sum(k3) / 3, rel=1e-5)
    assert stats["kl_ref"] == 0.0
    loss, stats = grpo.policy_loss(logp, old, torch.tensor([-2.0]), mask)
    # with A < 0 a fall is clipped at 0.8, a rise is not
    assert loss.item() == pytest.approx(2 * (1.5 + 0.8 + 1.1) / 3)
    assert stats["clip_frac"] == pytest.approx(1 / 3)


def test_the_kl_worked_by_hand():
    old, ref = torch.zeros(1, 4), torch.full((1, 4), math.log(2))
    mask = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    loss, stats = grpo.policy_loss(old, old, torch.zeros(1), mask, ref_logp=ref, beta=0.5)
    k3 = 2 - math.log(2) - 1
    assert loss.item() == pytest.approx(0.5 * k3)
    assert stats["kl_ref"] == pytest.approx(k3)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_at_ratio_one_the_gradient_is_that_of_reinforce(ratio):
    args, _ = example()
    logp = args["logp"].clone().requires_grad_()
    args.update(logp=logp, old_logp=args["logp"])
    loss, stats = grpo.policy_loss(**args, ratio=ratio)
    (gradient,) = torch.autograd.grad(loss, logp)
    expected = -args["advantages"][:, None] * args["mask"] / args["mask"].sum()
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)
    assert stats["ratio_mean"] == pytest.approx(1.0)
    assert stats["clip_frac"] == 0.0
    assert stats["approx_kl"] == pytest.approx(0.0)


@pytest.mark.parametrize("which", ["ref_logp", "old_logp"])
@pytest.mark.parametrize("gap", [100.0, -100.0, 1e4, -1e4])
def test_huge_gaps_stay_finite(gap, which):
    """PITFALLS 19."""
    logp = torch.full((2, 3), -1.0, requires_grad=True)
    others = {"ref_logp": logp.detach(), "old_logp": logp.detach()}
    others[which] = logp.detach() + gap
    advantages, mask = torch.tensor([1.0, -1.0]), torch.ones(2, 3)
    loss, stats = grpo.policy_loss(logp, advantages=advantages, mask=mask, beta=0.1, **others)
    (gradient,) = torch.autograd.grad(loss, logp)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()
    assert all(math.isfinite(value) for value in stats.values())


@pytest.mark.parametrize("aggregate", ["token", "sequence", "constant"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_what_stands_at_masked_positions_changes_nothing(aggregate, ratio):
    args, ref = example()
    args.update(ref_logp=ref, advantages=args["advantages"][:, None].expand_as(ref))
    mask = args.pop("mask")
    results = []
    for junk in (0.0, NAN, INF, -INF, 1e30):
        dirty = {name: values.masked_fill(mask == 0, junk) for name, values in args.items()}
        logp = dirty["logp"].requires_grad_()
        loss, stats = grpo.policy_loss(
            **dirty, mask=mask, beta=0.2, aggregate=aggregate, ratio=ratio, denominator=9.0
        )
        (gradient,) = torch.autograd.grad(loss, logp)
        assert (gradient[mask == 0] == 0).all()
        results.append((loss.item(), gradient.tolist(), stats))
    assert all(result == results[0] for result in results)
    assert math.isfinite(results[0][0])


@pytest.mark.parametrize("aggregate", ["token", "sequence", "constant"])
def test_an_empty_mask_gives_zero(aggregate):
    logp, mask = torch.zeros(2, 3, requires_grad=True), torch.zeros(2, 3)
    variant = {"aggregate": aggregate, "denominator": 2.0}
    loss, stats = grpo.policy_loss(logp, torch.zeros(2, 3), torch.ones(2), mask, **variant)
    assert loss.item() == 0.0
    assert (torch.autograd.grad(loss, logp)[0] == 0).all()
    assert stats["clip_frac"] == 0.0


@pytest.mark.parametrize(
    "wrong", [{"aggregate": "mean"}, {"ratio": "row"}, {"aggregate": "constant"}]
)
def test_unknown_variants_are_refused(wrong):
    logp = torch.zeros(2, 3)
    with pytest.raises(ValueError):
        grpo.policy_loss(logp, logp, torch.ones(2), torch.ones(2, 3), **wrong)


# ---- dialogues for what follows ------------------------------------------------------------------


def settings(**more):
    """Settings of short dialogues without a judge."""
    short = {
        "max_turns": 3,
        "turn_tokens": 8,
        "final_tokens": 8,
        "agreement": "none",
        "temperature": 1.0,
        "top_p": 1.0,
        "final_temperature": 1.0,
        "final_top_p": 1.0,
        "dtype": "fp32",
        "lr": 1e-3,
        "warmup_steps": 0,
    }
    return Settings(**{**short, **more})


def played(cfg, groups=2, members=4, voice=None):
    """Groups of finished dialogues of a tiny model, with rewards that differ."""
    voice = voice or helpers.voice()
    flat = selfplay.play((voice, voice), helpers.dialogues(groups, members), cfg)
    for i, d in enumerate(flat):
        d.reward = float((7 * i) % 5)
    made = [flat[g * members : (g + 1) * members] for g in range(groups)]
    for group in made:
        train.settle(group, cfg)
    return made


def new_learner(cfg, model=None, **optimizer):
    """A Learner of a tiny model, with a reference where --beta asks for one."""
    model = model or helpers.tiny()
    reference = helpers.tiny(seed=5).requires_grad_(False) if cfg.beta else None
    return grpo.Learner(model, grpo.Optimizer(model, cfg.lr, **optimizer), cfg, reference)


def update(groups, learner):
    """One step on groups that are settled."""
    cfg = learner.settings
    for group in groups:
        for tree, rows in packing.pack(group, cfg.train_tokens, cfg.micro_tokens):
            learner.backward(tree, rows)
    return learner.step()


def gradients(groups, cfg, model=None):
    """The gradient of one step, {name: tensor}, and the step's means; no parameter moves."""
    learner, kept = new_learner(cfg, model, clip=0.0), {}

    def keep():
        for name, p in learner.optimizer.masters.items():
            kept[name] = p.grad.clone()

    learner.optimizer.adamw.step = keep
    return kept, update(groups, learner)


def distance(a, b):
    """|a - b| / |b| over all parameters together."""
    gap = sum((a[name] - b[name]).double().square().sum() for name in b)
    return (gap / sum(values.double().square().sum() for values in b.values())).sqrt().item()


def samples_of(dialogues):
    """All samples of all streams, finals aside."""
    streams = itertools.chain.from_iterable(d.streams for d in dialogues)
    return itertools.chain.from_iterable(streams)


def copies(model):
    """{name: a copy of the parameter}."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def unchanged(model, before):
    """Whether every parameter is bitwise what it was."""
    return all(torch.equal(before[name], p) for name, p in model.named_parameters())


# ---- packing -------------------------------------------------------------------------------------


def trained_tokens(dialogue, train_tokens):
    """[(id, log-prob)] of what a dialogue should train, from its turns and its final."""
    pairs = []
    if train_tokens != "final":
        for turn in dialogue.turns:
            pairs += zip(turn.ids, turn.logprobs)
    if train_tokens != "dialogue":
        final = dialogue.final_sample
        columns = zip(final.ids, final.logprobs, final.mask)
        pairs += [(token, logp) for token, logp, m in columns if m]
    return sorted(pairs)


@pytest.mark.parametrize("train_tokens", ["dialogue", "final", "both"])
@pytest.mark.parametrize("context_turns", [0, 2])
@pytest.mark.parametrize("micro_tokens", [1, 400, WHOLE])
def test_each_trained_token_is_trained_exactly_once(train_tokens, context_turns, micro_tokens):
    for group in played(settings(max_turns=4, context_turns=context_turns)):
        packed = packing.pack(group, train_tokens, micro_tokens)
        whole = set()
        for d in group:
            whole.update(tuple(s.ids) for s in packing.trained_samples(d, train_tokens))
        got = {d.member: [] for d in group}
        for tree, rows in packed:
            assert tree.tokens <= micro_tokens or len(rows) == 1
            for row, ids in zip(rows, tree.continuations):
                assert tuple(tree.prefix + ids) in whole
                tokens = [ids[at] for at in row.wanted]
                got[row.dialogue.member] += zip(tokens, row.sampler_logp)
        for d in group:
            assert sorted(got[d.member]) == trained_tokens(d, train_tokens) != []
        if micro_tokens == WHOLE:  # one tree for each agent's view
            assert len(packed) == (1 if train_tokens == "final" else 2)


def test_a_stream_and_the_final_that_continues_it_are_one_row():
    (group,) = played(settings(), groups=1)
    rows = [len(rows) for _, rows in packing.pack(group, "both", WHOLE)]
    assert rows == [4, 4]


def test_the_fewest_trees_that_fit_are_about_equally_long():
    pairs = [(chat.Sample([0] * n, [], [], [], []), n) for n in (30, 12, 25, 28, 11, 26)]
    shares = packing.split_evenly(pairs, 10, 60)  # beside the prefix: 72 tokens in pieces of 50
    assert [[n for _, n in share] for share in shares] == [[30, 26, 12], [28, 25, 11]]
    assert len(packing.split_evenly(pairs, 10, 1)) == 6


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_packed_logprobs_are_those_of_the_sampler(kind):
    cfg = settings(top_p=0.9, temperature=0.8)
    learner = grpo.Learner(helpers.tiny(kind), None, cfg)
    for group in played(cfg, voice=helpers.voice(kind)):
        for tree, rows in packing.pack(group, "dialogue", WHOLE):
            for row, logp in zip(rows, learner.logprobs(learner.model, tree, rows)):
                sampled = torch.tensor(row.sampler_logp)
                mine = logp[: len(row.wanted)].detach()
                torch.testing.assert_close(mine, sampled, rtol=0, atol=1e-4)


# ---- the update ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("trained", "length"), [("dialogue", 24), ("final", 5), ("both", 29)])
def test_the_constant_length_is_all_that_a_dialogue_may_have_trained(trained, length):
    cfg = settings(max_turns=3, turn_tokens=8, final_tokens=5, train_tokens=trained)
    assert grpo.Learner(None, None, cfg).row_length == length


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
    for micro_tokens in (1, 300, WHOLE):
        packed = packing.pack(groups[0], "dialogue", micro_tokens)
        sizes.append(max(len(rows) for _, rows in packed))
        results.append(gradients(groups, settings(**more, micro_tokens=micro_tokens)))
    assert sizes[0] == 1
    assert 2 <= sizes[1] <= 5
    assert sizes[2] >= 8
    for grads, means in results[1:]:
        assert distance(grads, results[0][0]) < 1e-6
        assert means == pytest.approx(results[0][1], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("aggregate", ["token", "sequence", "constant"])
@pytest.mark.parametrize("micro_tokens", [1, WHOLE])  # alone in its tree, and among others
def test_a_missing_reward_leaves_the_loss_and_nothing_else_changes(aggregate, micro_tokens):
    cfg = settings(aggregate=aggregate, micro_tokens=micro_tokens)
    groups = played(cfg, groups=1, members=5)
    groups[0][2].reward = None
    train.settle(groups[0], cfg)
    with_it, means = gradients(groups, cfg)
    without = [groups[0][:2] + groups[0][3:]]
    train.settle(without[0], cfg)
    alone, same = gradients(without, cfg)
    assert distance(with_it, alone) < 1e-6
    assert means == pytest.approx(same, rel=1e-5, abs=1e-6)


def test_tokens_that_are_not_trained_get_no_gradient_of_their_own():
    """The final's log-probs and the numbers recorded at mask 0 change nothing, bitwise."""
    cfg = settings()
    groups = played(cfg)
    before, _ = gradients(groups, cfg)
    everyone = groups[0] + groups[1]
    for d in everyone:
        final = d.final_sample
        d.final_sample = dataclasses.replace(final, logprobs=[-9.0] * len(final.ids))
    for s in samples_of(everyone):
        s.logprobs[:] = [p if m else NAN for p, m in zip(s.logprobs, s.mask)]
    after, _ = gradients(groups, cfg)
    assert all(torch.equal(before[name], after[name]) for name in before)


RANKED = {
    "token": settings(),
    "sequence": settings(aggregate="sequence"),
}


def rank_gradients(rank, size, folder):
    """A process of two: the gradient of its share of eight dialogues (whole groups), to a file."""
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    torch.set_num_threads(1)
    for name, cfg in RANKED.items():
        groups = played(settings())  # everybody plays all, so that the dialogues are the very same
        if name == "sequence":
            cfg = dataclasses.replace(cfg, micro_tokens=1)
        torch.save(gradients(groups[rank::size], cfg), f"{folder}/{name}-{rank}.pt")
    groups = played(settings())
    if rank == 1:
        groups[1][0].advantage = NAN
    learner = new_learner(settings(lr=1e-2))
    before = copies(learner.model)
    means = update([groups[rank]], learner)
    outcome = means["skipped"], unchanged(learner.model, before), learner.optimizer.updates
    torch.save(outcome, f"{folder}/nan-{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_compute_what_one_does_and_skip_together(tmp_path):
    """PITFALLS 11 and 20."""
    runs.fork_server()
    how = dict(nprocs=2, start_method="forkserver")
    torch.multiprocessing.start_processes(rank_gradients, (2, str(tmp_path)), **how)
    groups = played(settings())
    for name, cfg in RANKED.items():
        alone, means = gradients(groups, cfg)
        for rank in (0, 1):
            grads, same = torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=False)
            assert distance(grads, alone) < 1e-6
            assert same == pytest.approx(means, rel=1e-5, abs=1e-7)
    for rank in (0, 1):  # NaN on rank 1 alone
        assert torch.load(tmp_path / f"nan-{rank}.pt", weights_only=False) == (True, True, 0)


@pytest.mark.parametrize("broken", ["loss", "sampler", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(broken):
    cfg = settings(lr=1e-2)
    groups = played(cfg)
    learner, twin = new_learner(cfg), new_learner(cfg)
    update(groups, learner)
    update(groups, twin)
    before = copies(learner.model)
    hurt = copy.copy(groups[0][0])
    if broken == "loss":
        hurt.advantage = NAN
    elif broken == "sampler":  # only where nobody sampled is a NaN no fault
        hurt.streams = copy.deepcopy(hurt.streams)
        hurt.streams[0][0].logprobs = [NAN] * len(hurt.streams[0][0].ids)
    else:
        weight = next(learner.model.parameters())
        handle = weight.register_hook(lambda gradient: gradient * INF)
    means = update([[hurt, *groups[0][1:]]], learner)
    if broken == "gradient":
        handle.remove()
        assert math.isfinite(means["loss"])
    assert means["skipped"]
    assert learner.optimizer.updates == 1
    assert unchanged(learner.model, before)
    # and the next step is as if the bad one had not been
    assert not update(groups, learner)["skipped"]
    update(groups, twin)
    assert unchanged(learner.model, copies(twin.model))


@pytest.mark.parametrize(
    "rewards, beta",
    [([3.0] * 4, 0), ([None] * 4, 0), ([None] * 4, 0.1), ([3.0, None, None, None], 0)],
)
def test_a_step_without_evidence_changes_nothing(rewards, beta):
    """PITFALLS 36: not even by AdamW's momentum, nor does the warm-up go on."""
    cfg = settings(beta=beta)
    groups = played(cfg, groups=1)
    learner = new_learner(cfg, warmup_steps=9, clip=0.0)
    optimizer = learner.optimizer
    assert not update(groups, learner)["no_evidence"]
    assert optimizer.updates == 1
    before = copies(learner.model)
    moments = copy.deepcopy(optimizer.adamw.state_dict()["state"])
    again = played(cfg, groups=1)
    for d, value in zip(again[0], rewards):
        d.reward = value
    train.settle(again[0], cfg)
    means = update(again, learner)
    assert means["no_evidence"]
    assert means["grad_norm"] == 0
    assert not means["skipped"]
    assert optimizer.updates == 1
    assert unchanged(learner.model, before)
    for index, state in optimizer.adamw.state_dict()["state"].items():
        assert all(torch.equal(moments[index][key], state[key]) for key in state)
    assert not update(groups, learner)["no_evidence"]  # and nothing of it is left over
    assert optimizer.updates == 2


def test_several_updates_on_one_rollout_use_the_clipped_ratio():
    groups = played(settings())
    results = []
    for updates in (1, 3):
        cfg = settings(updates_per_rollout=updates, lr=1e-2)
        learner = new_learner(cfg)
        means, _ = train.learn(groups, learner, cfg, ONE)
        assert learner.optimizer.updates == updates
        results.append(means)
    first, third = results
    assert first["ratio_mean"] == pytest.approx(1.0, abs=1e-4)
    assert first["clip_frac"] == 0.0
    assert first["approx_kl"] < 1e-6
    assert abs(third["ratio_mean"] - 1) > 1e-3
    assert third["clip_frac"] > 0.05
    assert third["approx_kl"] > 1e-3


def test_the_reference_is_read_once_and_pulls_towards_itself():
    (group,) = played(settings(), groups=1)
    for d in group:
        d.advantage = 0.0
    learner = new_learner(settings(beta=1.0, lr=3e-3))
    packed = packing.pack(group, "dialogue", WHOLE)
    kls, calls = [], []
    learner.reference.model.register_forward_hook(lambda *a: calls.append(1))
    for _ in range(8):
        for tree, rows in packed:
            learner.backward(tree, rows)
        kls.append(learner.step()["kl_ref"])
    assert kls[-1] < 0.7 * kls[0]
    assert len(calls) == len(packed)


def test_bf16_computes_and_fp32_remembers():
    model = helpers.tiny()
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    start = copies(model)
    cfg = settings(lr=1e-6)
    learner = new_learner(cfg, model, dtype=torch.bfloat16, clip=0.0)
    masters = learner.optimizer.masters
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {m.dtype for m in masters.values()} == {torch.float32}
    for name, b in model.named_buffers():
        assert b.dtype == buffers[name].dtype
        assert torch.equal(b, buffers[name])
    assert all(torch.equal(masters[name], start[name]) for name in start)  # not rounded
    groups = played(cfg)
    for _ in range(3):
        train.learn(groups, learner, cfg, ONE)
    moved = torch.cat([(masters[name] - start[name]).flatten() for name in start])
    assert 1e-6 < moved.abs().max() < 4e-6  # steps far below the resolution of bf16 add up
    assert unchanged(model, {name: m.bfloat16() for name, m in masters.items()})


def test_bf16_gradients_are_summed_in_fp32():
    module = torch.nn.Module()
    module.w = torch.nn.Parameter(torch.ones(4))
    optimizer = grpo.Optimizer(module, 1e-3, dtype=torch.bfloat16)
    for _ in range(1000):  # in bf16 the sum of ones stops at 256
        module.w.sum().backward()
    assert optimizer.masters["w"].grad.tolist() == [1000.0] * 4
    assert module.w.grad is None


def test_warm_up_clipping_and_adamw():
    module = torch.nn.Linear(2, 1, bias=False)
    start = module.weight.detach().clone()
    optimizer = grpo.Optimizer(module, lr=0.1, warmup_steps=2, clip=1.0)
    module(torch.tensor([3.0, 4.0])).backward()
    assert optimizer.step(1.0) == pytest.approx(5.0)
    # Adam's first step is lr in each direction, and half of it while warming up
    torch.testing.assert_close(module.weight.detach(), start - 0.05)
    clipped = torch.tensor([[0.6, 0.8]])
    moment = optimizer.adamw.state[module.weight]["exp_avg"]
    torch.testing.assert_close(moment, 0.1 * clipped)
    module(torch.tensor([0.3, 0.4])).backward()
    assert optimizer.step(1.0) == pytest.approx(0.5)
    assert optimizer.adamw.param_groups[0]["lr"] == pytest.approx(0.1)


def test_the_learning_rate_falls_in_a_straight_line():
    module = torch.nn.Linear(2, 1, bias=False)
    optimizer = grpo.Optimizer(module, lr=0.1, decay_steps=4)
    rates = []
    for _ in range(5):
        module(torch.ones(2)).backward()
        optimizer.step(1.0)
        rates.append(optimizer.adamw.param_groups[0]["lr"])
    assert rates == pytest.approx([0.1, 0.075, 0.05, 0.025, 0.0])


@pytest.mark.parametrize("micro_tokens", [WHOLE, 300])
def test_gradient_checkpointing_gives_the_same_gradient_and_keeps_the_cache(micro_tokens):
    """PITFALLS 30."""
    cfg, model = settings(gradient_checkpointing=True, micro_tokens=micro_tokens), helpers.tiny()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    passes = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *a: passes.append(1))
    groups = played(cfg, voice=chat.Voice(model, helpers.tokenizer()))
    decoded = len(passes)
    plain, _ = gradients(groups, settings())
    assert distance(gradients(groups, cfg, model)[0], plain) < 1e-6
    trees = sum(len(packing.pack(group, "dialogue", micro_tokens)) for group in groups)
    assert len(passes) - decoded == 2 * trees  # once forward, once more in backward
    for d, same in zip(groups[0] + groups[1], itertools.chain(*played(settings()))):
        assert [t.ids for t in d.turns] == [t.ids for t in same.turns]


# ---- does it learn? ------------------------------------------------------------------------------

# The game: agent 0 says one of them, whoever speaks later repeats it.
WORDS = [" the", " and", " farm", " share", " water", " council"]
# So short that two layers learn it.
PROMPTS = {"SYSTEM": "{me}", "TASK": "{dilemma} ", "ASK": "So?", "FINAL": "Sum up."}


def word_ids():
    """One id for each word."""
    return [helpers.tokenizer()(w, add_special_tokens=False)["input_ids"][-1] for w in WORDS]


def said(voice, speaker, word):
    """A turn that is one word, three times."""
    ids = [word] * 3 + [voice.chat.end]
    return chat.Turn(speaker, voice.chat.text(ids), False, ids, [-1.0] * 4)


def game(voice, word):
    """A dialogue in which both agents and the final say the word."""
    d = helpers.dialogues(1, 1)[0]
    one, two = [selfplay.view_of(voice.chat, me, d.scenario, False) for me in (0, 1)]
    d.turns = [said(voice, 0, word), said(voice, 1, word)]
    d.streams = [[one.sample_with([], d.turns[0])], [two.sample_with(d.turns[:1], d.turns[1])]]
    final, request = said(voice, 0, word), selfplay.final_request(d.scenario, selfplay.FINAL)
    d.final_sample = one.sample_with(d.turns, final, train=False, closing=request)
    return d


@pytest.fixture
def parrots(monkeypatch):
    """A tiny model that plays the game: agent 0's first word comes back in the final."""
    for name, text in PROMPTS.items():
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
    voice = chat.Voice(model, helpers.tokenizer())
    group = [game(voice, word) for word in word_ids()]
    trees = packing.pack(group, "dialogue", WHOLE) + packing.pack(group, "final", WHOLE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(400):
        loss = 0.0
        for tree, rows in trees:
            logps = lm.token_logprobs(model, tree, [row.wanted for row in rows])
            loss = loss - torch.cat(logps).mean() / len(trees)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        # the best there is: log(6) for one of four tokens in one of three texts, 0.15
        if loss < 0.21:
            break
    return model


def score(d, word):
    """The share of the joint solution that is one certain word."""
    ids = [i for i, m in zip(d.final_sample.ids, d.final_sample.mask) if m]
    return ids.count(word_ids()[word]) / 3


def spoil(group, how, rng):
    """Deal the advantages out anew ("shuffled"), or train all but the agents' tokens."""
    if how == "shuffled":
        dealt = rng.sample([d.advantage for d in group], len(group))
        for d, advantage in zip(group, dealt):
            d.advantage = advantage
    if how == "inverted":
        for s in samples_of(group):
            s.mask[:] = [0] + [1 - m for m in s.mask[1:]]


@torch.no_grad()
def as_if_sampled(learner, tree, rows):
    """Let the rows' old log-probs be the learner's own."""
    for row, values in zip(rows, learner.logprobs(learner.model, tree, rows)):
        row.sampler_logp = values[: len(row.wanted)].tolist()


def train_parrots(model, how):
    """Thirty-two steps with gradients on the dialogue alone, for the word that is rarest at first.

    The judge is an HTTP server that counts the word in the solution. By plain gradient descent: to
    Adam an update of pure noise is as long as any other, and a few of them settle on some word.
    Returns the scores of 60 fresh dialogues before and after.
    """
    cfg = settings(max_turns=2, turn_tokens=4, final_tokens=4)
    learner = new_learner(cfg, copy.deepcopy(model), clip=0.0)
    learner.optimizer.adamw = torch.optim.SGD(learner.optimizer.masters.values())
    learner.optimizer.lr = 5e-3
    voice, rng = chat.Voice(learner.model, helpers.tokenizer()), random.Random(5)

    def fresh():
        return selfplay.play((voice, voice), helpers.dialogues(1, 60, step=1000), cfg)

    by_word = {word: [score(d, word) for d in fresh()] for word in range(len(WORDS))}
    said_at_all = [word for word in by_word if any(by_word[word])]
    word = min(said_at_all, key=lambda w: sum(by_word[w]))

    def count(text):
        return 5 * min(1, text.split().count(WORDS[word].strip()) / 3)

    asking = reward.JudgeSettings(judge_mode="json", judge_model="scripted")
    with (
        JudgeServer(count, offers=("json",)) as server,
        contextlib.closing(reward.Judge(asking, server.url)) as judge,
    ):
        for step in range(32):
            judge.start_batch()
            group = selfplay.play((voice, voice), helpers.dialogues(1, 64, step), cfg, judge)
            train.settle(group, cfg)
            assert all(d.reward is not None for d in group)
            spoil(group, how, rng)
            for tree, rows in packing.pack(group, "dialogue", 4096):
                if how == "inverted":
                    as_if_sampled(learner, tree, rows)
                learner.backward(tree, rows)
            learner.step()
    return by_word[word], [score(d, word) for d in fresh()]


@pytest.mark.slow
def test_the_score_rises_with_gradients_on_the_dialogue_alone(parrots):
    """By more than two standard deviations; and not with the wrong mask or others' advantages."""
    rise = {}
    for how in ("proper", "inverted", "shuffled"):
        before, after = train_parrots(parrots, how)
        rise[how] = (statistics.fmean(after) - statistics.fmean(before)) / statistics.stdev(before)
    assert rise["proper"] > 2, rise
    assert rise["inverted"] < 0.7, rise
    assert rise["shuffled"] < 0.7, rise


# ---- a committed run -----------------------------------------------------------------------------


def random_ids(rng, n):
    """That many ids of plain tokens."""
    return [rng.randrange(4, 260) for _ in range(n)]


def handmade(model, members=4, seed=0):
    """A group of dialogues that no sampler made, so that they are the same on every CPU.

    Each has one sample an agent, with two spans of 6 trained tokens.
    """
    rng = random.Random(seed)
    heads, group = (random_ids(rng, 20), random_ids(rng, 24)), helpers.dialogues(1, members)
    for i, d in enumerate(group):
        for me, head in enumerate(heads):
            ids = head + random_ids(rng, 24)
            mask = [0] * (len(head) + 5) + [1] * 6 + [0] * 7 + [1] * 6
            logps = [0.0, *helpers.plain_logprobs(model, ids).tolist()]
            logps = [p * m for p, m in zip(logps, mask)]
            zeros = [0] * len(ids)
            d.streams[me] = [chat.Sample(ids, mask, logps, zeros, zeros)]
        d.reward = [1.0, 4.0, 2.5, None][i % 4]
    return group


def golden_run():
    """Five fp32 steps on the same two handmade groups, so that the ratio is soon clipped."""
    with torch.no_grad():
        model = helpers.tiny()
        groups = [handmade(model, seed=seed) for seed in (0, 1)]
    reference = helpers.tiny().requires_grad_(False)
    cfg = settings(beta=0.05, lr=1.5e-4)
    for group in groups:
        train.settle(group, cfg)
    optimizer = grpo.Optimizer(model, cfg.lr, warmup_steps=2, clip=1.0)
    learner = grpo.Learner(model, optimizer, cfg, reference)
    rows = [train.learn(groups, learner, cfg, ONE)[0] for _ in range(5)]
    kept = ("loss", "grad_norm", "clip_frac", "kl_ref", "trained_tokens")
    return [{key: row[key] for key in kept} for row in rows]


def test_five_steps_are_those_of_the_committed_run():
    """To renew it after a deliberate change of the mathematics: python tests/test_grpo.py"""
    expected, got = json.loads(GOLDEN.read_text()), golden_run()
    assert len(got) == len(expected) == 5
    for mine, theirs in zip(got, expected):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(golden_run(), indent=1) + "\n")
