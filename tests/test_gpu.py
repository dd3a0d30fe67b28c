"""What a GPU computes is what a CPU computes. Skipped where there is no GPU; everything else here runs train.py on the GPU where there is one."""

import copy

import helpers
import pytest
import torch

import grpo
import selfplay
import train
from settings import Settings

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
CFG = Settings(
    max_turns=4,
    turn_tokens=12,
    final_tokens=12,
    agreement="none",
    temperature=1.0,
    final_temperature=1.0,
    dtype="fp32",
)


def played(kind, cfg=CFG, dtype=torch.float32):
    """(the model on the CPU, a learner of the same on the GPU, its groups of dialogues played there), two scenarios of unlike length."""
    model = helpers.tiny(kind)
    twin = copy.deepcopy(model).cuda()
    learner = grpo.Learner(twin, grpo.Optimizer(twin, 1e-3, clip=0.0, dtype=dtype), cfg)
    flat = selfplay.play(
        (selfplay.voice(twin, helpers.tokenizer()),) * 2, helpers.dialogues(2, 4), cfg
    )
    for i, d in enumerate(flat):
        d.reward = float((7 * i) % 5)
    groups = [flat[:4], flat[4:]]
    for group in groups:
        train.settle(group, cfg)
    return model, learner, groups


def update(learner, groups, micro_tokens):
    """One step; returns its means."""
    for group in groups:
        for tree, rows in grpo.pack(group, "dialogue", micro_tokens):
            learner.backward(tree, rows)
    return learner.step()


@pytest.mark.parametrize("context_turns", [0, 2])
@pytest.mark.parametrize("kind", helpers.KINDS)
def test_logprobs_recorded_on_the_gpu_are_those_of_a_plain_forward_on_the_cpu(kind, context_turns):
    model, _, groups = played(kind, Settings(**{**vars(CFG), "context_turns": context_turns}))
    for d in sum(groups, []):
        assert len(d.turns) == 4
        for sample in [*d.streams[0], *d.streams[1], d.final_sample]:
            got, mask = torch.tensor(sample.logprobs), torch.tensor(sample.mask) > 0
            assert mask.any()
            torch.testing.assert_close(
                got[mask],
                helpers.plain_logprobs(model, sample.ids)[mask[1:]].detach(),
                rtol=0,
                atol=1e-4,
            )


@pytest.mark.parametrize("micro_tokens", [1, 10**6])
@pytest.mark.parametrize("kind", helpers.KINDS)
def test_gradients_on_the_gpu_are_those_of_the_cpu(kind, micro_tokens):
    model, on_gpu, groups = played(kind)
    kept = []
    for learner in (grpo.Learner(model, grpo.Optimizer(model, 1e-3, clip=0.0), CFG), on_gpu):
        learner.optimizer.adamw.step = lambda learner=learner: kept.append(
            torch.cat([p.grad.flatten().cpu() for p in learner.optimizer.masters.values()])
        )
        means = update(learner, groups, micro_tokens)
        assert means["logprob_gap"] < 1e-5 and means["ratio_mean"] == pytest.approx(1, abs=1e-5)
    assert kept[0].norm() > 0 and (kept[1] - kept[0]).norm() / kept[0].norm() < 1e-5


def test_in_bf16_sampler_and_learner_stay_close():
    _, learner, groups = played("llama", dtype=torch.bfloat16)
    assert next(learner.model.parameters()).dtype == torch.bfloat16
    means = update(learner, groups, 768)
    assert 0 < means["logprob_gap"] < 0.05 and not means["skipped"]
