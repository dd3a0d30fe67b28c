"""The policy on its ranks: who learns, who plays, what is sharded, what is frozen.

    --model or a checkpoint -> build -> Policy: model, player, tokenizer, optimizer, reference

One process a card, started by torchrun; without it one process. Each rank has the whole model, or
with --fsdp a shard of it; then rank 0 alone reads the files, and gives the others what they keep.
Left out: tensor and pipeline parallelism, quantisation.
"""

import contextlib
import copy
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
from cli import UserError, env_number
from decode import decoder_of

# ---- ranks ---------------------------------------------------------------------------------------


@dataclasses.dataclass
class World:
    """This process among those that torchrun started (one of one without torchrun)."""

    rank: int
    size: int
    device: torch.device
    local_rank: int = 0  # among those of this machine

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

    def share(self, total):
        """This rank's part of a number that is meant for all ranks together, but at least 1."""
        return max(1, len(range(self.rank, total, self.size)))

    def together(self, work):
        """work() of every rank. A UserError on one ends all; the first that has one tells it."""
        result = failure = None
        try:
            result = work()
        except UserError as error:
            failure = error
        failed = self.gather(failure is not None)
        if any(failed):
            raise failure if failed.index(True) == self.rank else SystemExit(2)
        return result

    def in_turn(self, work):
        """The same, each machine's first rank before its others: what it fetched, they find."""

        is_first = self.local_rank == 0
        first = self.together(work if is_first else lambda: None)
        others = self.together(work if not is_first else lambda: None)
        return first if is_first else others


def start_world():
    """Join the process group that torchrun describes: NCCL on GPUs, gloo on CPUs.

    Raises UserError where only half of torchrun's variables are there, or no numbers.
    """
    rank, size = env_number("RANK", 0), env_number("WORLD_SIZE", 1, low=1)
    if rank >= size:
        raise UserError(f"RANK={rank} is set, but WORLD_SIZE is {size}; unset RANK")
    needed = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in os.environ]
    if size > 1 and missing:
        raise UserError(
            f"WORLD_SIZE={size} is set, but {', '.join(missing)} not; unset WORLD_SIZE, "
            f"or start with torchrun --nproc_per_node={size} train.py"
        )
    local_rank = env_number("LOCAL_RANK", 0)
    env_number("MASTER_PORT", 0, high=65535)
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", local_rank), "nccl"
        torch.cuda.set_device(device)
    if size > 1:
        # the others wait for the first one's download
        dist.init_process_group(backend, timeout=timedelta(hours=2))
    return World(rank, size, device, local_rank)


# ---- the policy ----------------------------------------------------------------------------------


@dataclasses.dataclass
class Policy:
    """The model that learns, the one that plays, and what belongs to them."""

    model: torch.nn.Module  # learns
    player: torch.nn.Module  # the same one; with shards a whole copy in the compute dtype
    tokenizer: object
    optimizer: grpo.Optimizer
    reference: torch.nn.Module  # frozen, for --beta; None without

    @torch.no_grad()
    def update_player(self):
        """Give the player the newest weights; of shards each is gathered once, outside of play."""
        if self.player is self.model:
            return
        copies = dict(self.player.named_parameters())
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:  # the others are as `load_sharded` left them
                copies[name].copy_(parameter.full_tensor())


def build(settings, world, weights=None):
    """The Policy of these settings. weights: a folder to read instead of --model.

    All ranks call. Raises UserError where the model cannot be had or used.
    """
    sharded = settings.fsdp and world.size > 1
    dtype = lm.compute_dtype(settings.dtype, world.device)

    def read():
        """(model in fp32 on the CPU, with its adapters; tokenizer)."""
        with reading(weights):
            model, tokenizer = lm.load(weights or settings.model, "fp32", "cpu")
        if settings.lora_rank:
            torch.manual_seed(settings.seed)
            lm.add_lora(model, settings.lora_rank)
            if world.rank == 0:
                print(lm.lora_share(model))
        return model, tokenizer

    if sharded:
        model, player, tokenizer = load_sharded(read, world, dtype)
    else:
        model, tokenizer = world.in_turn(read)
        player = model
        for parameter in model.parameters():
            if not parameter.requires_grad:  # the base of adapters: half the bytes on the card
                parameter.data = parameter.data.to(dtype)
        model.to(world.device)
    if settings.gradient_checkpointing:
        how = {"use_reentrant": False}
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
    set_decoder(player, settings)
    reference = None
    if settings.beta > 0 and settings.lora_rank:
        reference = player  # with its adapters off
    elif settings.beta > 0:
        reference = load_reference(settings, world, dtype, sharded)
    decay_steps = settings.steps * settings.updates_per_rollout if settings.lr_decay else 0
    compute_dtype = torch.float32 if sharded else dtype  # FSDP casts by itself
    optimizer = grpo.Optimizer(
        model, settings.lr, settings.warmup_steps, dtype=compute_dtype, decay_steps=decay_steps
    )
    return Policy(model, player, tokenizer, optimizer, reference)


def set_decoder(player, settings):
    """How the player decodes on a card: recorded steps or not, compiled or not."""
    decoder = decoder_of(player)
    if decoder and not settings.cuda_graphs:
        decoder.use_graphs = False
    if decoder and settings.compile:
        decoder.compile()


@contextlib.contextmanager
def reading(checkpoint):
    """Inside this block, whatever a broken checkpoint raises becomes a UserError about it."""
    try:
        yield
    except (UserError, *lm.DAMAGED) as error:
        if checkpoint is None:
            raise
        cause = error.__cause__ or error
        reason = f"{type(cause).__name__}: {cause}".partition("\n")[0]
        advice = "move it away, and --resume takes the one before"
        raise UserError(f"--resume: {checkpoint} cannot be read ({reason}); {advice}") from error


def load_reference(settings, world, dtype, sharded):
    """The frozen model of --model, whole on every rank's device in `dtype`."""
    if sharded:
        whole, empty, _ = read_once(lambda: lm.load(settings.model, "fp32", "cpu"), world)
        reference = with_room(empty, world.device, dtype)
        hand_out(whole, world.device, reference)
    else:
        reference, _ = world.in_turn(lambda: lm.load(settings.model, settings.dtype, world.device))
    return reference.requires_grad_(False)


# ---- one copy on the host, a shard on each rank --------------------------------------------------


def load_sharded(read, world, dtype):
    """(the model in fp32 shards, a whole frozen player in `dtype`, tokenizer), on all ranks.

    read() gives rank 0 (model, tokenizer); no other rank's host memory ever holds the weights.
    """
    whole, model, tokenizer = read_once(read, world)
    player = with_room(model, world.device, dtype).requires_grad_(False)
    shard(model, dtype)
    room = {"device": world.device}  # as to_empty makes it, but buffers keep their numbers
    model._apply(lambda t: torch.empty_like(t, **room) if t.is_meta else t.to(**room))
    hand_out(whole, world.device, model, player)
    return model, player, tokenizer


def read_once(read, world):
    """(model of rank 0, elsewhere None; the same model without weights; tokenizer).

    What is no weight comes along as it is: buffers such as the rotary frequencies, tied names,
    numbers that only the class knows.
    """
    whole, tokenizer = world.together(read if world.rank == 0 else lambda: (None, None))
    empty = with_room(whole, "meta") if whole is not None else None
    empty, tokenizer = world.broadcast((empty, tokenizer))
    return whole, empty, tokenizer


def with_room(model, device, dtype=None):
    """A copy of the model on `device`, its parameters without values; tied ones stay tied."""
    rooms = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device=device, dtype=dtype)
        rooms[id(parameter)] = torch.nn.Parameter(empty, parameter.requires_grad)
    made = copy.deepcopy(model, rooms)  # it takes what it finds in `rooms` for a copy
    return made if device == "meta" else made.to(device)


@torch.no_grad()
def hand_out(whole, device, *models):
    """Copy rank 0's weights into these models on all ranks, tensor by tensor, whole or cut."""
    given = dict(whole.named_parameters()) if whole is not None else {}
    targets = [dict(model.named_parameters()) for model in models]
    for name, parameter in models[0].named_parameters():
        tensor = torch.empty(parameter.shape, device=device)
        if given:
            tensor.copy_(given[name])
        dist.broadcast(tensor, 0)
        for parameters in targets:
            parameters[name].copy_(placed(tensor, parameters[name]))


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
    """A copy of the tensor on the master's device, where that is sharded cut into such shards."""
    if isinstance(master, DTensor) and tensor.dim():  # without a dimension: AdamW's step count
        how = master.device_mesh, master.placements
        return distribute_tensor(tensor.to(master.device), *how, src_data_rank=None)  # all have it
    return tensor.to(master.device, copy=True)
