"""The numbers of texts, and how sure a number is.

    texts of a dialogue -> overlap, repetition, grounding ... -> text_measures, diversity, collapse
    (scenario, number) of each item -> figure: a ResultRow, its 95% interval over scenarios

Left out: embeddings, perplexity under a third model, p-values.
"""

import collections
import dataclasses
import itertools
import re

import numpy as np

from dataset import DATA

# ---- numbers of texts ----------------------------------------------------------------------------

COMMON = set((DATA / "common_words.txt").read_text(encoding="utf-8").split())


def words(text):
    """Lower-case words; an apostrophe inside belongs to the word."""
    return re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text.lower())


def ngrams(texts, n):
    """All word n-grams of a list of texts, in order; none spans two texts."""
    grams = []
    for text in texts:
        said = words(text)
        grams += [tuple(said[i : i + n]) for i in range(len(said) - n + 1)]
    return grams


def overlap(one, other, n=3):
    """Share of the distinct n-grams of the side with fewer that the other says too, or None."""
    ours = set(ngrams(one, n))
    theirs = set(ngrams(other, n))
    fewer = min(len(ours), len(theirs))
    return len(ours & theirs) / fewer if fewer else None


def distinct(texts, n=2):
    """Distinct n-grams over all n-grams (Li et al., arXiv 1510.03055); None without any."""
    grams = ngrams(texts, n)
    return len(set(grams)) / len(grams) if grams else None


def repetition(texts, n=4):
    """Share of n-grams that stood in the same text before; None without any."""
    total = len(ngrams(texts, n))
    fresh = sum(len(set(ngrams([text], n))) for text in texts)
    return (total - fresh) / total if total else None


def stems(text):
    """The first five letters of each content word: of four letters or more, and not common."""
    return [word[:5] for word in words(text) if len(word) >= 4 and word not in COMMON]


def grounding(final, sources):
    """Share of the final's content words whose stems occur in the sources; None without any."""
    known = set(stems("\n".join(sources)))
    used = stems(final)
    return sum(stem in known for stem in used) / len(used) if used else None


def texts_of(record):
    """All that was written in a dialogue, a line of dialogues.jsonl."""
    return [turn["text"] for turn in record["turns"]] + [record["final"] or ""]


def text_measures(record):
    """{figure: number} of the texts of one dialogue; None where it has no such figure."""
    turns, final = record["turns"], record["final"]
    first = [turn["text"] for turn in turns if turn["speaker"] == 0]
    second = [turn["text"] for turn in turns if turn["speaker"] == 1]
    told = [f"{persona['name']} {persona['creed']}" for persona in record["personas"]]
    return {
        "agreed_at_once": float(record["agreed"] and len(turns) <= 2) if turns else None,
        "final_words": None if final is None else len(words(final)),
        "overlap": overlap(first, second),
        "distinct_2": distinct(texts_of(record)),
        "repetition": repetition(texts_of(record)),
        "grounding": grounding(final or "", [record["dilemma"], *told]),
    }


def diversity(records):
    """What a batch of dialogues is like: means of their figures, and two over all their texts."""
    measured = [text_measures(record) for record in records]
    found = {}
    for name in ("overlap", "repetition", "grounding", "final_words", "agreed_at_once"):
        known = [row[name] for row in measured if row[name] is not None]
        found[name] = float(np.mean(known)) if known else None
    texts = []
    for record in records:
        texts += texts_of(record)
    openings = [tuple(words(r["final"])[:4]) for r in records if r["final"]]
    found["distinct_2"] = distinct(texts)
    found["distinct_openings"] = len(set(openings)) / len(openings) if openings else None
    return found


RISEN = {  # above this, and not so in the first step: a sign of collapse
    "overlap": (0.5, "the agents say the same"),
    "repetition": (0.3, "texts repeat themselves"),
    "agreed_at_once": (0.9, "they agree at once"),
}
HALVED = {
    "distinct_2": "few different word pairs",
    "distinct_openings": "joint solutions begin alike",
    "grounding": "joint solutions leave the dilemma",
    "final_words": "joint solutions shrink",
}


def collapse(now, first):
    """What in `now` looks like collapse beside `first`, both of `diversity`; "" if nothing does."""
    signs = []
    for name, (limit, sign) in RISEN.items():
        if now[name] is not None and now[name] > limit >= (first[name] or 0.0):
            signs.append(f"{sign} ({name})")
    for name, sign in HALVED.items():
        if None not in (now[name], first[name]) and now[name] < first[name] / 2:
            signs.append(f"{sign} ({name})")
    return ", ".join(signs)


# ---- how sure a number is ------------------------------------------------------------------------


@dataclasses.dataclass
class ResultRow:
    """A row of results: a figure of A, of B or of their difference, with interval and counts."""

    figure: str
    of: str
    value: float = None
    low: float = None  # the 95% interval
    high: float = None
    n: int = 0  # items that are in the value
    scenarios: int = 0  # that these items lie in
    missing: int = 0  # items without a verdict
    pairs: int = None  # of A against B: how many there were, and how they ended
    wins: int = None
    losses: int = None
    ties: int = None
    inconsistent: int = None


def minus(one, other):
    """A difference, None where one side is missing."""
    return None if None in (one, other) else one - other


def spearman(a, b):
    """Rank correlation of two equally long rows of numbers; equal numbers share their mean rank."""
    ranks = []
    for values in (np.asarray(a), np.asarray(b)):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[inverse])
    return float(np.corrcoef(*ranks)[0, 1])


def pairs_right(scored):
    """(scenario, 1 if put right, 0 if not, 0.5 if equal) of pairs of (scenario, score, label).

    Of pairs on one scenario whose labels differ by half a point; None where a score is missing.
    """
    pairs = []
    for one, other in itertools.combinations(scored, 2):
        apart = one[2] - other[2]
        if one[0] == other[0] and abs(apart) >= 0.5:
            gap = minus(one[1], other[1])
            pairs.append((one[0], None if gap is None else (1 + np.sign(gap * apart)) / 2))
    return pairs


def finite(number):
    """A number for JSON; None for NaN and infinities."""
    return round(float(number), 6) if np.isfinite(number) else None


def bootstrap(columns, scenarios, statistic, rounds=1000):
    """The 95% interval of statistic(*columns), columns (k, n), from a bootstrap (Efron 1979).

    It draws whole scenarios, for dialogues on one scenario are not independent. scenarios: for
    each, the indices of its items. Seeded. (None, None) where the statistic is never finite.
    """
    rng = np.random.default_rng(0)
    values = []
    for _ in range(rounds):
        drawn = rng.integers(0, len(scenarios), len(scenarios))
        values.append(statistic(*columns[:, np.concatenate([scenarios[i] for i in drawn])]))
    if not np.isfinite(values).any():
        return None, None
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return finite(low), finite(high)


def figure(name, of, items, statistic=np.mean, **counts):
    """The ResultRow of statistic(*columns) of items (scenario, number, ...).

    An item with a None is left out and counted as missing. No interval with under two scenarios.
    """
    whole = [item for item in items if None not in item]
    columns = np.array([item[1:] for item in whole], dtype=float).T  # (numbers of an item, items)
    members = collections.defaultdict(list)
    for i, (scenario, *_) in enumerate(whole):
        members[scenario].append(i)
    counts = {"missing": len(items) - len(whole), **counts}
    row = ResultRow(name, of, n=len(whole), scenarios=len(members), **counts)
    with np.errstate(invalid="ignore", divide="ignore"):
        if whole:
            row.value = finite(statistic(*columns))
        if len(members) > 1:
            row.low, row.high = bootstrap(columns, list(members.values()), statistic)
    return row
