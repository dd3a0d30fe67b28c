"""Runs of train.py as processes of their own, on a tiny model and a scripted judge."""

import contextlib
import functools
import json
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from unittest import mock

import helpers
import torch
from safetensors.torch import load_file
from servers import JudgeServer

ROOT = Path(__file__).resolve().parent.parent


def saved_model(folder, kind="llama"):
    """A tiny model and its tokenizer as a Hugging Face folder."""
    model = helpers.tiny(kind)
    # the shipped dilemmas are long in tokens of the tiny tokenizer
    model.config.max_position_embeddings = 4096
    model.save_pretrained(folder)
    helpers.tokenizer().save_pretrained(folder)
    return str(folder)


def judge(**more):
    """A JSON judge whose score counts the distinct characters of a solution."""
    return JudgeServer(lambda text: min(5.0, len(set(text)) / 8), offers=("json",), **more)


def flags(tiny, url, folder, **more):
    """The command line of a short run, 2 x 3 dialogues of 2 turns; steps=5 means --steps 5."""
    made = {
        "model": tiny,
        "judge_url": url,
        "judge_mode": "json",
        "out": str(folder),
        "max_turns": 2,
        "turn_tokens": 6,
        "final_tokens": 8,
        "scenarios_per_step": 2,
        "group_size": 3,
        "steps": 3,
        "epoch_steps": 5,
        "lora_rank": 0,
        "agreement": "none",
        "dtype": "fp32",
        "lr": 1e-3,
        "warmup_steps": 3,
        "temperature": 0.7,
        "top_p": 1.0,
        "final_temperature": 0.8,
        "final_top_p": 1.0,
        **more,
    }
    return as_flags(made)


def as_flags(settings):
    """{name: value} as a command line: None leaves a flag out, True gives it without a value."""
    flags = []
    for name, value in settings.items():
        if value is not None:
            flags.append("--" + name.replace("_", "-"))
        if value is not None and value is not True:
            flags.append(str(value))
    return flags


def become(program, arguments, cwd, env, said, err):
    """Turn this process, just forked, into a run of `program` with its own session and output."""
    os.setsid()
    for path, descriptor in ((said, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY), descriptor)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv[1:] = arguments
    exec(program, {"__name__": "__main__"})


# what transformers and torch import no sooner than they need it
LAZY = ["transformers.models.llama.modeling_llama", "torch.distributed.run"]


@functools.cache
def fork_server():
    """What starts processes that need not import anything: that would take 5 s each time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["runs", "train", *LAZY])
    env = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    with mock.patch.dict(os.environ, env):
        multiprocessing.forkserver.ensure_running()
    return context


class Forked:
    """A process of the fork server, with the methods of subprocess.Popen that are used here."""

    def __init__(self, *run):
        self.process = fork_server().Process(target=become, args=run, daemon=True)
        self.process.start()
        self.pid, self.kill = self.process.pid, self.process.kill

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("a run", timeout)


TORCHRUN = "import torch.distributed.run as torchrun\ntorchrun.main()"


class Process:
    """train.py at work, by itself or under torchrun, with a mark in its processes' environment.

    train.py, or torchrun, is forked from a process that has imported everything; the ranks are not,
    nor is a `fresh` run, nor anything where there is a card: CUDA does not outlive a fork.
    """

    def __init__(self, arguments, ranks=0, patch="", cwd=ROOT, fresh=False):
        self.mark = f"run-{uuid.uuid4().hex}"
        script = [str(ROOT / "train.py")]
        program = f"import cli, checkpoint, model as lm, train\n{patch}\ncli.run_cli(train.main)"
        if patch:
            script = ["-c", program]
        launcher = []
        if ranks:
            launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
            launcher += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
            if patch:
                launcher += ["--no-python", "--", sys.executable]
            else:
                launcher += ["--"]  # or torchrun would take --log for one of its own
        env = {**os.environ, "NEGOTIATE_MARK": self.mark, "OMP_NUM_THREADS": "1"}
        env |= {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        if ranks > torch.cuda.device_count():
            env["CUDA_VISIBLE_DEVICES"] = ""  # each rank needs a card of its own, or none
        # files, because a pipe that nobody reads would fill up
        self.folder = tempfile.TemporaryDirectory()
        self.said, self.err = Path(self.folder.name, "stdout"), Path(self.folder.name, "stderr")
        with self.said.open("w") as said, self.err.open("w") as err:
            if fresh or torch.cuda.is_available():
                command = [sys.executable, *launcher, *script, *arguments]
                self.process = subprocess.Popen(
                    command, cwd=cwd, env=env, stdout=said, stderr=err, start_new_session=True
                )
            elif ranks:
                line = [*launcher[2:], *script, *arguments]
                self.process = Forked(TORCHRUN, line, cwd, env, said.name, err.name)
            else:
                self.process = Forked(program, arguments, cwd, env, said.name, err.name)

    def wait(self, timeout=150):
        """(exit code, stdout, stderr)"""
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        return self.process.returncode, self.said.read_text(), self.err.read_text()

    def processes(self):
        """{pid: command line} of all that carry the mark."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has just ended, or is not ours to see
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
                # a fork's environ is that of the process it comes from
                ours = int(folder.name) == self.process.pid
                ours = ours or self.mark.encode() in (folder / "environ").read_bytes()
                if state != "Z" and ours:
                    line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    found[int(folder.name)] = line
        return found

    def kill(self):
        """kill -9 of everything that carries the mark."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def gone(self, seconds=15):
        """Whether nothing of it is left, now or within `seconds`."""
        return wait_for(lambda: not self.processes(), seconds)


def wait_for(condition, seconds=90):
    """Wait until condition() is true; returns whether it became so."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        if condition():
            return True
        time.sleep(0.02)
    return False


def rows(out, name="metrics.jsonl"):
    """The lines of a JSON Lines file of a run ([] if there is none)."""
    path = Path(out, name)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def steady(row):
    """A metrics row without what depends on the clock and the machine."""
    passing = {"peak_memory_gb", "tokens_per_second"} | {key for key in row if "seconds" in key}
    return {key: value for key, value in row.items() if key not in passing}


def weights(out, step):
    """{name: tensor} of a checkpoint, trainer's moments included."""
    folder = Path(out, "checkpoints", f"step_{step:06d}")
    found = load_file(folder / "model.safetensors")
    state = torch.load(folder / "trainer.pt", weights_only=True)
    for name, moments in state["moments"].items():
        found |= {f"{name}:{key}": tensor for key, tensor in moments.items()}
    return found


def same(a, b):
    """Whether two dicts of tensors are equal, bit by bit."""
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
