"""What a GPU computes is what a CPU computes. Skipped where there is no GPU.

Everything else in this folder runs train.py on the GPU where there is one.
"""

import copy

import helpers
import pytest
import torch

import chat
import decode
import grpo
import packing
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
    top_p=1.0,
    final_temperature=1.0,
    final_top_p=1.0,
    dtype="fp32",
)


def played(kind, cfg=CFG, dtype=torch.float32):
    """Two groups of dialogues on scenarios of unlike length, played on the GPU.

    Returns (the model on the CPU, a Learner of the same model on the GPU, the groups).
    """
    model = helpers.tiny(kind)
    twin = copy.deepcopy(model).cuda()
    learner = grpo.Learner(twin, grpo.Optimizer(twin, 1e-3, clip=0.0, dtype=dtype), cfg)
    voice = chat.Voice(twin, helpers.tokenizer())
    dialogues = selfplay.play((voice, voice), helpers.dialogues(2, 4), cfg)
    for i, d in enumerate(dialogues):
        d.reward = float((7 * i) % 5)
    groups = [dialogues[:4], dialogues[4:]]
    for group in groups:
        train.settle(group, cfg)
    return model, learner, groups


def backward(learner, groups, micro_tokens):
    """Add up the gradients of all groups."""
    for group in groups:
        for tree, rows in packing.pack(group, "dialogue", micro_tokens):
            learner.backward(tree, rows)


@pytest.mark.parametrize("context_turns", [0, 2])
@pytest.mark.parametrize("kind", helpers.KINDS)
def test_logprobs_recorded_on_the_gpu_are_those_of_a_plain_forward_on_the_cpu(kind, context_turns):
    model, _, groups = played(kind, Settings(**{**vars(CFG), "context_turns": context_turns}))
    for d in sum(groups, []):
        assert len(d.turns) == 4
        for sample in [*d.streams[0], *d.streams[1], d.final_sample]:
            got = torch.tensor(sample.logprobs)
            mask = torch.tensor(sample.mask) > 0
            assert mask.any()
            expected = helpers.plain_logprobs(model, sample.ids)[mask[1:]].detach()
            torch.testing.assert_close(got[mask], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("micro_tokens", [1, 10**6])
@pytest.mark.parametrize("kind", helpers.KINDS)
def test_gradients_on_the_gpu_are_those_of_the_cpu(kind, micro_tokens):
    model, on_gpu, groups = played(kind)
    on_cpu = grpo.Learner(model, grpo.Optimizer(model, 1e-3, clip=0.0), CFG)
    gradients = []
    for learner in (on_cpu, on_gpu):
        backward(learner, groups, micro_tokens)
        masters = learner.optimizer.masters.values()
        gradients.append(torch.cat([master.grad.flatten().cpu() for master in masters]))
        means = learner.step()
        assert means["logprob_gap"] < 1e-5
        assert means["ratio_mean"] == pytest.approx(1, abs=1e-5)
    cpu, gpu = gradients
    assert cpu.norm() > 0
    assert (gpu - cpu).norm() / cpu.norm() < 1e-5


def test_in_bf16_sampler_and_learner_stay_close():
    _, learner, groups = played("llama", dtype=torch.bfloat16)
    assert next(learner.model.parameters()).dtype == torch.bfloat16
    backward(learner, groups, 768)
    means = learner.step()
    assert 0 < means["logprob_gap"] < 0.05
    assert not means["skipped"]


@pytest.mark.parametrize("more", [{}, {"top_p": 0.8, "final_temperature": 0.0}])
@pytest.mark.parametrize("kind", helpers.KINDS)
def test_a_replayed_step_draws_bitwise_what_the_eager_step_draws(kind, more):
    """Also after the weights have changed in place."""
    cfg = Settings(**{**vars(CFG), **more})
    model = helpers.tiny(kind).cuda()
    voice = chat.Voice(model, helpers.tokenizer())
    decoder = decode.decoder_of(model)
    for _ in range(2):
        streams = []
        for graphs in (True, False):
            decoder.use_graphs = graphs
            decoder.graphs.clear()
            decoder.capacity = 0
            dialogues = selfplay.play((voice, voice), helpers.dialogues(2, 4), cfg)
            streams.append(
                [[s.record() for s in (*d.streams[0], d.final_sample)] for d in dialogues]
            )
            assert decoder.use_graphs == graphs and bool(decoder.graphs) == graphs
        assert streams[0] == streams[1]
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.02)


def test_a_recorded_step_asks_the_card_to_wait_once():
    model = helpers.tiny().cuda()
    decoder = decode.decoder_of(model)
    decoder.cache_for(4)
    wishes = {0: (5, 0.7, 0.8, 0.3), 2: (6, 0.0, 1.0, 0.9)}
    decoder.step(model, wishes)
    with torch.profiler.profile() as profile:
        decoder.step(model, wishes)
    names = [event.key for event in profile.key_averages() for _ in range(event.count)]
    assert sum(name.startswith("cudaMemcpy") for name in names) == 2
    assert sum(name == "cudaGraphLaunch" for name in names) == 1
    assert sum(name.startswith("cudaLaunchKernel") for name in names) < 3
