"""The embedded judge: what it reads of a text, its linear heads, and how they were fitted.

    case, judged text -> frozen base -> hidden states, averaged over the judged text (F,)     Base
                        -> a linear head each: score, endorse, agreed                         apply
    data/judge_labels.jsonl, agreement_labels.jsonl -> ridge -> data/judge_heads.safetensors  fit

A group's case is read once, and each text by itself, so its score depends on nothing else. Left
out: batches (a text keeps a CPU as busy). What `judge_server.py fit` prints stands in RESULTS.md.
"""

import collections
import copy
import dataclasses
import functools
import hashlib
import json
import re

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer

import dataset
from chat import Turn
from cli import UserError
from dataset import DATA
from measure import pairs_right, spearman
from model import compute_dtype, default_model_folder
from rubric import Case, case_of, clean, for_reward_model, spoken

HEADS = DATA / "judge_heads.safetensors"
CASES = 32  # whose keys and values are kept, some 5 MB each
LONGEST_TEXT = 1000  # tokens of a case, and of a judged text; of more, the last ones are read
# What a head reads: (layer, tokens of the judged text from its beginning; None: all of them).
# Chosen by cross-validation over the dilemmas that are not the test's, as are the two numbers of
# RIDGE: the penalty, and how many hand-made texts one text of a policy counts for.
READS = {
    "score": [(18, None), (24, None)],
    "endorse": [(18, None), (24, None)],
    "agreed": [(20, 12)],
}
RIDGE = {"score": (30000.0, 8.0), "endorse": (30000.0, 8.0), "agreed": (3000.0, 1.0)}
POLICIES = ("warm", "trained", "policy")  # sources of labels: texts that a policy wrote

# ---- reading -------------------------------------------------------------------------------------


def heads_digest():
    """8 hex digits of the heads, part of the judge's name: other heads' answers never pass for its.

    Raises UserError when they are not there.
    """
    try:
        return hashlib.sha256(HEADS.read_bytes()).hexdigest()[:8]
    except OSError as error:
        problem = f"{HEADS}: cannot be read ({error.strerror})"
        raise UserError(f"{problem}; put it back, or name a --judge-url") from error


def judge_device():
    """Where the base reads: on the last card, without any on the CPU.

    A turn waits for the judge's word, and one judge serves the dialogues of all ranks: a CPU, which
    feeds the cards besides, would keep them waiting. The last card is one that no rank uses, or
    that of the rank with the least to do: rank 0 starts this server, and writes the run's folder.
    """
    cards = torch.cuda.device_count()
    return torch.device("cuda", cards - 1) if cards else torch.device("cpu")


class Base:
    """The frozen model, cut off after the last layer that a head reads.

    reads: {head: [(layer, tokens of the judged text from its beginning; None: all of them)]}.
    """

    def __init__(self, reads):
        self.reads = reads
        folder = default_model_folder()
        self.device = judge_device()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        dtype = compute_dtype("auto", self.device)
        self.model = AutoModel.from_pretrained(folder, dtype=dtype).eval().to(self.device)
        last = max(layer for parts in reads.values() for layer, _ in parts)
        self.model.layers = self.model.layers[:last]
        self.model.norm = nn.Identity()
        self.read_case = functools.lru_cache(CASES)(self._read_case)

    def ids(self, text):
        """Ids of untrusted text, in which no control token can be spelled."""
        plain = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        return plain["input_ids"][-LONGEST_TEXT:]

    @torch.no_grad()
    def features(self, head, before, text):
        """What `head` reads of a text: mean hidden states in a row, (F,) fp32.

        before: the case, read once for all that follows it, and texts between it and this one.
        """
        case, *said = before
        between = self.ids("\n\n".join(["", *said, ""]))
        judged = self.ids(text) or self.ids("(nothing)")
        lengths = [tokens for _, tokens in self.reads[head]]
        if None not in lengths:
            judged = judged[: max(lengths)]  # what follows changes nothing before it
        known = self.read_case(tuple(self.ids(case) or self.ids("(nothing)")))
        cache = copy.deepcopy(known)  # the model adds to it
        ids = torch.tensor([between + judged], device=self.device)  # (1, T)
        states = self.model(ids, cache=cache, output_hidden_states=True).hidden_states
        means = []
        for layer, tokens in self.reads[head]:
            read = states[layer][0, len(between) :][:tokens]  # (tokens read, H)
            means.append(read.float().mean(0))
        return torch.cat(means).cpu()

    def _read_case(self, ids):
        """Keys and values of a case, which all solutions of a group share."""
        ids = torch.tensor([ids], device=self.device)
        return self.model(ids, use_cache=True).cache


def apply(weights, features):
    """What a head says of features (..., F): a number each, (...,)."""
    return features @ weights[:-1] + weights[-1]


def load_heads():
    """({head: what it reads}, {head: weights (F + 1,)}). Raises UserError for a damaged file."""
    try:
        with safe_open(HEADS, "pt") as file:
            reads = json.loads((file.metadata() or {}).get("reads", ""))
        heads = {name: head.float() for name, head in load_file(HEADS).items()}
    except (OSError, SafetensorError, ValueError) as error:
        problem = f"{HEADS}: cannot be read ({error})"
        raise UserError(f"{problem}; put it back, or run python judge_server.py fit") from error
    return reads, heads


# ---- fitting -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Example:
    """A label: what is read, and what a head should say."""

    scenario: str
    test: bool  # of the dilemmas that are only looked at once a version
    source: str  # who wrote it: a policy (warm, trained, policy), or bare, hand, demo
    before: list
    judged: str
    value: float


def examples():
    """{head: [Example]} of the shipped labels."""
    dilemmas = {scenario.id: scenario.dilemma for scenario in dataset.load_scenarios()}
    found = {head: [] for head in READS}

    def add(head, row, personas, texts, value):
        case = Case(case_of(dilemmas[row["scenario_id"]], personas), texts, {})
        before, judged = for_reward_model(head, case)
        source = re.split(r"[ -]", row["source"])[0]
        test = row["split"] == "test"
        found[head].append(Example(row["scenario_id"], test, source, before, judged, value))

    for number, row in enumerate(dataset.load_jsonl(DATA / "judge_labels.jsonl")):
        texts = {"solution": clean(row["solution"])}
        add("score", row, row["personas"], texts, row["score"])
        seat = number % 2  # one party of each: enough, and half the time
        add("endorse", row, [row["personas"][seat]], texts, row["endorse"][seat])
    for row in dataset.load_jsonl(DATA / "agreement_labels.jsonl"):
        turns = [Turn(i % 2, text, False) for i, text in enumerate(row["turns"])]
        texts = {"dialogue": spoken(row["personas"], turns)}
        add("agreed", row, row["personas"], texts, float(row["agreed"]))
    return found


def ridge(features, values, counts, penalty):
    """Weights (F + 1,), the constant last, of features (N, F) that are standardised on the way.

    They minimise sum_i counts_i (x_i w - y_i)^2 + penalty |w|^2.
    """
    share = counts / counts.sum()
    mean, middle = share @ features, share @ values
    scale = features.std(0) + 1e-6
    x, y = (features - mean) / scale, values - middle
    square = x.T @ (counts[:, None] * x) + penalty * torch.eye(x.shape[1], dtype=x.dtype)
    weights = torch.linalg.solve(square, x.T @ (counts * y)) / scale
    return torch.cat([weights, (middle - mean @ weights)[None]])


def quality(head, said):
    """How good a head's numbers are, (Example, number) each, in words."""
    if head == "agreed":
        right = sum((number > 0.5) == (row.value > 0.5) for row, number in said)
        return f"{right / len(said):.2f} right of {len(said)}"
    pairs = pairs_right([(row.scenario, number, row.value) for row, number in said])
    share = sum(right for _, right in pairs) / max(1, len(pairs))
    numbers, labels = [number for _, number in said], [row.value for row, _ in said]
    ranked = spearman(numbers, labels)
    return f"{share:.2f} of {len(pairs)} pairs right, Spearman {ranked:.2f}"


def show_quality(head, said):
    """Print how good a head is on what it was fitted on, on the test's, and on each policy's."""
    parts = collections.defaultdict(list)
    for row, number in said:
        parts["test" if row.test else "fitted on"].append((row, number))
        if row.test and row.source in POLICIES:
            parts[f"test, {row.source}"].append((row, number))
    for part, inside in parts.items():
        print(f"{head:8} {part:14} {quality(head, inside)}")


def fit():
    """Fit each head on the dilemmas that are not the test's, write it, print how good it is."""
    base, heads = Base(READS), {}
    for head, rows in examples().items():
        read = [base.features(head, row.before, row.judged) for row in tqdm(rows, desc=head)]
        features = torch.stack(read).double()  # (N, F)
        values = torch.tensor([row.value for row in rows]).double()
        penalty, weight = RIDGE[head]
        counts = torch.tensor([weight if row.source in POLICIES else 1.0 for row in rows]).double()
        fitted_on = torch.tensor([not row.test for row in rows])
        weights = ridge(features[fitted_on], values[fitted_on], counts[fitted_on], penalty)
        heads[head] = weights.float()
        show_quality(head, list(zip(rows, apply(weights, features).tolist())))
    save_file(heads, HEADS, metadata={"reads": json.dumps(READS)})
    print(f"{HEADS}: the heads")
