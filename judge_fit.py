"""How the heads of the embedded judge were fitted, and how good they are.

    data/judge_labels.jsonl, agreement_labels.jsonl -> what judge_server.py reads of each text (F,)
        -> ridge regression, a head each            -> data/judge_heads.safetensors

Run it when the labels change. What it prints stands in RESULTS.md.

    python judge_fit.py
"""

import collections
import dataclasses
import json
import re

import torch
from safetensors.torch import save_file
from tqdm import tqdm

import dataset
from chat import Turn
from cli import run_cli
from dataset import DATA
from judge_server import HEADS, Base, apply
from measure import pairs_right, spearman
from rubric import Case, case_of, clean, for_reward_model, spoken

# What a head reads: (layer, tokens of the judged text from its beginning; None: all of them).
# Chosen by cross-validation over the dilemmas that are not the test's, as are the two numbers of
# RIDGE: the penalty, and how many hand-made texts one text of a policy counts for.
READS = {"score": [(22, None)], "endorse": [(22, None)], "agreed": [(20, 12)]}
RIDGE = {"score": (10000.0, 8.0), "endorse": (10000.0, 8.0), "agreed": (3000.0, 1.0)}
POLICIES = ("warm", "trained", "policy")  # sources of labels: texts that a policy wrote


@dataclasses.dataclass(frozen=True)
class Example:
    """A label: what is read, and what a head should say."""

    scenario: str
    test: bool  # of the dilemmas that are only looked at once a version
    source: str  # who wrote it: a policy (warm, trained, policy), or bare, hand, demo
    before: str
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


def main():
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


if __name__ == "__main__":
    run_cli(main)
