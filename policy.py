"""The policy on its ranks: who learns, who plays, what is sharded, what is frozen.

    --model or a checkpoint -> build -> Policy: model, player, tokenizer, optimizer, reference

One process a card, started by torchrun; without it one process. Each rank has the whole model, or
with --fsdp a shard of it. Left out: tensor and pipeline parallelism, quantisation.
"""

import dataclasses
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

import grpo
import model as lm
from attention import inner
from cli import UserError
from decode import decoder_of

# ---- ranks ---------------------------------------------------------------------------------------


@dataclasses.dataclass
class World:
    """This process among those that torchrun started (one of one without torchrun)."""

    rank: int
    size: int
    device: torch.device

    def gather(self, thing):
        """The list of every rank's picklable `thing`, on every rank."""
        if self.size == 1:
            return [thing]
        things = [None] * self.size
        dist.all_gather_object(things, thing)
        return things

    def broadcast(self, thing):
        """Rank 0's `thing`, on every rank."""
        return self.gather(thing)[0]


def start_world():
    """Join the process group that torchrun describes: NCCL on GPUs, gloo on CPUs.

    Raises UserError where only half of torchrun's variables are there.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    needed = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in os.environ]
    if size > 1 and missing:
        raise UserError(
            f"WORLD_SIZE={size} is set, but {', '.join(missing)} not; unset WORLD_SIZE, "
            f"or start with torchrun --nproc_per_node={size} train.py"
        )
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))), "nccl"
        torch.cuda.set_device(device)
    if size > 1:
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    return World(rank, size, device)


# ---- the policy ----------------------------------------------------------------------------------


@dataclasses.dataclass
class Policy:
    """The model that learns, the one that plays, and what belongs to them."""

    model: torch.nn.Module  # learns
    player: torch.nn.Module  # the same one; with shards a whole copy in the compute dtype
    tokenizer: object
    optimizer: grpo.Optimizer
    reference: torch.nn.Module  # frozen, for --beta; None without
    sharded: bool

    @torch.no_grad()
    def update_player(self):
        """Give the player the newest weights; of shards each is gathered once, outside of play."""
        if not self.sharded:
            return
        copies = dict(self.player.named_parameters())
        for name, parameter in self.model.named_parameters():
            copies[name].copy_(parameter.full_tensor())


def build(settings, world, weights=None):
    """The Policy of these settings. weights: a folder to read instead of --model."""
    source, rank = weights or settings.model, settings.lora_rank
    sharded = settings.fsdp and world.size > 1
    dtype = lm.compute_dtype(settings.dtype, world.device)
    model, tokenizer = lm.load(source, "fp32", "cpu")
    if rank:
        torch.manual_seed(settings.seed)
        lm.add_lora(model, rank)
        if world.rank == 0:
            print(lm.lora_share(model))
    if settings.gradient_checkpointing:
        how = {"use_reentrant": False}
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
    player = model
    if sharded:
        player, _ = lm.load(source, settings.dtype, world.device)
        if rank:
            lm.add_lora(player, rank)
        player.requires_grad_(False)
        shard(model, dtype)
    else:
        for parameter in model.parameters():
            if not parameter.requires_grad:  # the base of adapters: half the bytes on the card
                parameter.data = parameter.data.to(dtype)
        model.to(world.device)
    reference = None
    if settings.beta > 0 and rank:
        reference = player  # with its adapters off
    elif settings.beta > 0:
        reference, _ = lm.load(settings.model, settings.dtype, world.device)
        reference.requires_grad_(False)
    decay_steps = settings.steps * settings.updates_per_rollout if settings.lr_decay else 0
    compute_dtype = torch.float32 if sharded else dtype  # FSDP casts by itself
    optimizer = grpo.Optimizer(
        model,
        settings.lr,
        settings.warmup_steps,
        dtype=compute_dtype,
        decay_steps=decay_steps,
    )
    decoder = decoder_of(player)
    if decoder and not settings.cuda_graphs:
        decoder.use_graphs = False
    return Policy(model, player, tokenizer, optimizer, reference, sharded)


def shard(model, dtype):
    """Split weights, gradients and optimizer state over the ranks, block by block (FSDP2)."""
    body = inner(model)
    blocks = body.layers if hasattr(body, "layers") else body.h  # GPT-2's name for them
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for part in [*blocks, model]:
        fully_shard(part, mp_policy=precision)
        # sums over ranks, as without shards: grpo divides by D once
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)

    def token_logprobs(*arguments):
        return [values.clone() for values in lm.token_logprobs(model, *arguments)]

    # FSDP gathers weights around registered methods of the model only, so this must be one. grpo
    # finds it by its name, and takes a model that has it for a sharded one. FSDP warns of views,
    # hence the copies.
    model.token_logprobs = token_logprobs
    register_fsdp_forward_method(model, "token_logprobs")


# ---- shards and whole tensors ------------------------------------------------------------------


def whole_state(policy, world):
    """({name: fp32 master}, {name: {moment: tensor}}, weights of the plain model), on rank 0's CPU.

    Trained weights are the masters. Under FSDP all ranks gather each tensor.
    """

    def whole(tensor):
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        return tensor.detach().cpu() if world.rank == 0 else None

    model, optimizer = policy.model, policy.optimizer
    masters, moments = {}, {}
    for name, master in optimizer.masters.items():
        masters[name] = whole(master)
        state = optimizer.adamw.state.get(master, {})
        moments[name] = {key: whole(tensor) for key, tensor in state.items()}
    name_of = {parameter: name for name, parameter in optimizer.params.items()}
    state = model.state_dict()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter in name_of:  # a tied weight has one master and two names
            state[name] = masters[name_of[parameter]]
    for name, tensor in state.items():
        if tensor is not None:
            state[name] = whole(tensor)
    return masters, moments, lm.plain_state(model, state) if world.rank == 0 else None


def placed(tensor, master):
    """The tensor on the master's device and, where that is sharded, cut into the same shards."""
    tensor = tensor.to(master.device)
    if isinstance(master, DTensor) and tensor.dim():  # without a dimension: AdamW's step count
        return distribute_tensor(tensor, master.device_mesh, master.placements)
    return tensor
