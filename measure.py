"""What can be measured without a judge, and how sure a number is: pure functions on texts, records and lists of numbers.

    texts      overlap, distinct-n, repetition, grounding; `measure` of one dialogue, `diversity` of many, `collapse` as a warning
    checks     does an answer keep to its instruction: length, words, form, language
    numbers    correlation, AUC, kappa; `figure`: any of them with its count and a 95% interval from a bootstrap over scenarios

train.py logs `diversity`; eval.py and report.py use the rest. Left out on purpose: embeddings, perplexity under a third model, p-values.
"""

import collections
import json
import re

import numpy as np

# ---- texts ---------------------------------------------------------------------------------------------------------------

COMMON = set(
    [
        "about",
        "after",
        "again",
        "against",
        "also",
        "another",
        "because",
        "been",
        "before",
        "being",
        "between",
        "both",
        "come",
        "could",
        "does",
        "doing",
        "down",
        "during",
        "each",
        "even",
        "every",
        "from",
        "have",
        "having",
        "here",
        "into",
        "itself",
        "just",
        "like",
        "made",
        "make",
        "many",
        "more",
        "most",
        "much",
        "must",
        "need",
        "only",
        "other",
        "ours",
        "over",
        "same",
        "shall",
        "should",
        "some",
        "such",
        "than",
        "that",
        "their",
        "them",
        "then",
        "there",
        "these",
        "they",
        "this",
        "those",
        "through",
        "under",
        "until",
        "upon",
        "very",
        "want",
        "well",
        "were",
        "what",
        "when",
        "where",
        "which",
        "while",
        "will",
        "with",
        "without",
        "would",
        "your",
    ]
)


def words(text):
    """Lower-case words; an apostrophe inside belongs to the word."""
    return re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text.lower())


def ngrams(text, n):
    """All word n-grams of a text, in order."""
    w = words(text)
    return [tuple(w[i : i + n]) for i in range(len(w) - n + 1)]


def overlap(one, other, n=3):
    """Share of the distinct n-grams of whoever has fewer that the other one says too. Lists of texts; None where one has none."""
    a, b = ({gram for text in texts for gram in ngrams(text, n)} for texts in (one, other))
    return len(a & b) / min(len(a), len(b)) if a and b else None


def distinct(texts, n=2):
    """Distinct n-grams over all n-grams (Li et al., arXiv 1510.03055); None without any."""
    grams = [gram for text in texts for gram in ngrams(text, n)]
    return len(set(grams)) / len(grams) if grams else None


def repetition(texts, n=4):
    """Share of n-grams that stood in the same text before; None without any."""
    grams = [ngrams(text, n) for text in texts]
    total = sum(map(len, grams))
    return sum(len(g) - len(set(g)) for g in grams) / total if total else None


def grounding(final, sources):
    """Share of the final's content words (4 letters or more, no common ones) that come from the sources, by their first five letters."""
    content = lambda text: [w[:5] for w in words(text) if len(w) >= 4 and w not in COMMON]
    known, used = {w for source in sources for w in content(source)}, content(final)
    return sum(w in known for w in used) / len(used) if used else None


JUDGED = (
    "ca_score",
    "endorse_min",
    "endorse_mean",
    "endorse_first",
    "endorse_second",
)  # None here is a verdict that is missing


def measure(record):
    """Every figure of one dialogue, a line of dialogues.jsonl, perhaps with `endorse`; None where it has no such figure."""
    final, turns, endorsed = (
        record["final"] or "",
        record["turns"],
        record.get("endorse") or [None, None],
    )
    said = [[t["text"] for t in turns if t["speaker"] == me] for me in (0, 1)]
    texts, cut = (
        [t["text"] for t in turns] + [final],
        [t["truncated"] for t in turns] + [record["final_truncated"]],
    )
    sources = [record["dilemma"]] + [
        p[key] for p in record["personas"] for key in ("name", "creed")
    ]
    known = None not in endorsed
    return {
        "ca_score": record["reward"],
        "endorse_min": min(endorsed) if known else None,
        "endorse_mean": sum(endorsed) / 2 if known else None,
        "endorse_first": endorsed[0],
        "endorse_second": endorsed[1],
        "agreed": float(record["agreed"]) if turns else None,
        "agreed_at_once": float(record["agreed"] and len(turns) <= 2) if turns else None,
        "turns_to_agreement": len(turns) if record["agreed"] else None,
        "final_words": None if record["final"] is None else len(words(final)),
        "truncated": sum(cut) / len(cut),
        "overlap": overlap(*said),
        "distinct_2": distinct(texts),
        "repetition": repetition(texts),
        "grounding": grounding(final, sources),
    }


def opening(text):
    """The first four words of a text, by which two finals are said to begin alike."""
    return tuple(words(text)[:4])


def diversity(records):
    """What a batch of dialogues is like: means of `measure`, distinct-2 over all their texts, share of distinct first four words of finals."""
    measured = [measure(r) for r in records]
    mean = lambda values: float(np.mean(values)) if values else None
    finals = [r["final"] for r in records if r["final"]]
    means = {
        k: mean([m[k] for m in measured if m[k] is not None])
        for k in ("overlap", "repetition", "grounding", "final_words", "agreed_at_once")
    }
    return {
        **means,
        "distinct_2": distinct([t["text"] for r in records for t in r["turns"]] + finals),
        "distinct_openings": len(set(map(opening, finals))) / len(finals) if finals else None,
    }


def collapse(now, first):
    """What in `now` looks like collapse beside `first`, both of `diversity`, the latter of the first steps; "" where nothing does."""
    halved = lambda key: None not in (now[key], first[key]) and now[key] < first[key] / 2
    above = lambda key, limit: now[key] is not None and now[key] > limit >= (first[key] or 0.0)
    signs = {
        "the agents say the same (overlap)": above("overlap", 0.5),
        "texts repeat themselves (repetition)": above("repetition", 0.3),
        "they agree at once (agreed_at_once)": above("agreed_at_once", 0.9),
        "few different word pairs (distinct_2)": halved("distinct_2"),
        "finals begin alike (distinct_openings)": halved("distinct_openings"),
        "finals leave the dilemma (grounding)": halved("grounding"),
        "finals shrink (final_words)": halved("final_words"),
    }
    return ", ".join(sign for sign, there in signs.items() if there)


# ---- checks of answers -----------------------------------------------------------------------------------------------------

LANGUAGES = {
    name: set(text.split())
    for name, text in {
        "en": "the and of to is are was that it for with you this a they have on my",
        "es": "el la los las de que y en un una es por con para se del muy mi",
        "fr": "le la les de des et est une un que dans pour du je nous il ils au",
        "de": "der die das und ist ein eine nicht ich mit auf zu den von im es sie er",
    }.items()
}


def language(text):
    """The language whose function words are most frequent; "" with fewer than three, or with two languages level."""
    (most, name), (next_most, _), *_ = sorted(
        ((sum(w in known for w in words(text)), name) for name, known in LANGUAGES.items()),
        reverse=True,
    )
    return name if most >= 3 and most > next_most else ""


def json_keys(text):
    """The keys of a text that is one JSON object and nothing else (it may be fenced); else none."""
    try:
        found = json.loads(re.sub(r"^\s*```(json)?\s|\s```\s*$", "", text))
    except (ValueError, RecursionError):
        return set()
    return set(found) if isinstance(found, dict) else set()


def says(text, word):
    """Does the text have this word, whatever its case?"""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


def sentences(text):
    """How many sentences."""
    return sum(bool(words(s)) for s in re.split(r"(?<=[.!?])[\"')\]]*\s+", text))


CHECKS = {  # type of a check in eval_general.jsonl -> (text without blanks around it, check) -> bool
    "min_words": lambda text, c: len(text.split()) >= c["value"],
    "max_words": lambda text, c: len(text.split()) <= c["value"],
    "must_include": lambda text, c: all(says(text, w) for w in c["words"]),
    "must_not_include": lambda text, c: not any(says(text, w) for w in c["words"]),
    "lowercase": lambda text, c: text == text.lower(),
    "uppercase": lambda text, c: text == text.upper() != text.lower(),
    "no_comma": lambda text, c: "," not in text,
    "sentences": lambda text, c: sentences(text) == c["value"],
    "starts_with": lambda text, c: re.match(re.escape(c["value"]) + r"(?!\w)", text) is not None,
    "ends_with": lambda text, c: text.endswith(c["value"]),
    "bullets": lambda text, c: len(re.findall(r"^\s*[-*] +\S", text, re.MULTILINE)) == c["value"],
    "json": lambda text, c: set(c["keys"]) <= json_keys(text),
    "language": lambda text, c: language(text) == c["value"],
}


def passed(row, text):
    """Which checks of a line of eval_general.jsonl an answer passes: a list of bools. An empty answer passes nothing."""
    text = text.strip()
    if row["kind"] == "exact":  # one of the answers, as whole words, in the first line
        return [any(says(text.split("\n")[0], answer) for answer in row["answers"])]
    return [bool(text) and CHECKS[check["type"]](text, check) for check in row["checks"]]


# ---- numbers ---------------------------------------------------------------------------------------------------------------


def pearson(x, y):
    """Pearson's correlation; NaN where one side is constant."""
    x, y = x - x.mean(), y - y.mean()
    return (x @ y) / np.sqrt((x @ x) * (y @ y))


def ranks(x):
    """Ranks from 1; equal values share their mean rank."""
    _, place, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def spearman(x, y):
    """Spearman's rank correlation."""
    return pearson(ranks(x), ranks(y))


def auc(score, good):
    """Chance that a good one (good > 0.5) scores above one that is not, ties one half (Mann-Whitney); NaN with one class only."""
    n, r = (good > 0.5).sum(), ranks(score)
    return (r[good > 0.5].sum() - n * (n + 1) / 2) / (n * (len(good) - n))


def kappa(x, y):
    """Quadratic-weighted kappa (Cohen 1968) of ratings rounded to whole points: 1 - mean (x - y)^2 / its value if x and y were independent."""
    x, y = np.round(x), np.round(y)
    return 1 - np.mean((x - y) ** 2) / (np.mean(x**2) + np.mean(y**2) - 2 * x.mean() * y.mean())


SAME = {  # do two raters say the same?
    "exact": lambda x, y: np.mean(np.round(x) == np.round(y)),
    "within_1": lambda x, y: np.mean(np.abs(x - y) <= 1),
    "pearson": pearson,
    "kappa": kappa,
}


def figure(name, of, items, statistic=np.mean, rounds=1000, **more):
    """One row of results: statistic(*columns) of items (scenario, number, ...); an item with a None is left out and counted as missing.

    low and high are the 2.5% and 97.5% percentiles of a bootstrap (Efron 1979) that draws whole scenarios, for dialogues on
    one scenario are not independent; seeded; None with fewer than two scenarios.
    """
    whole = [item for item in items if None not in item]
    columns, groups = (
        np.array([item[1:] for item in whole], dtype=float).T,
        collections.defaultdict(list),
    )
    for i, item in enumerate(whole):
        groups[item[0]].append(i)
    finite = lambda x: round(float(x), 6) if np.isfinite(x) else None
    row = {
        "figure": name,
        "of": of,
        "value": None,
        "low": None,
        "high": None,
        "n": len(whole),
        "scenarios": len(groups),
        "missing": len(items) - len(whole),
    }
    with np.errstate(invalid="ignore", divide="ignore"):
        if whole:
            row["value"] = finite(statistic(*columns))
        if len(groups) > 1:
            members, rng = [np.array(g) for g in groups.values()], np.random.default_rng(0)
            draws = (
                np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))])
                for _ in range(rounds)
            )
            values = np.array([statistic(*columns[:, at]) for at in draws])
            if np.isfinite(values).any():
                row["low"], row["high"] = map(finite, np.nanpercentile(values, [2.5, 97.5]))
    return {**row, **more}


def table(columns, differences=(("A", "B"),)):
    """Rows of every figure of every column, {column: {(scenario, seed): {figure: value}}}, and of the paired differences of columns."""
    rows, minus = [], lambda x, y: None if x is None or y is None else x - y
    count = lambda name, pairs: [
        pair for pair in pairs if name in JUDGED or pair[1] is not None
    ]  # only a judge's answer can be missing
    for name in dict.fromkeys(
        name for column in columns.values() for item in column.values() for name in item
    ):
        if all(item[name] is None for column in columns.values() for item in column.values()):
            continue
        for of, column in columns.items():
            rows.append(
                figure(
                    name, of, count(name, [(key[0], item[name]) for key, item in column.items()])
                )
            )
        for a, b in differences:
            if a in columns and b in columns:
                pairs = [
                    (key[0], minus(item[name], columns[b][key][name]))
                    for key, item in columns[a].items()
                ]
                rows.append(figure(name, f"{a} - {b}", count(name, pairs)))
    return rows


def outcome(first, second):
    """What A against B is when the judge said `first` of (A, B) and `second` of (B, A): a win needs both orders to agree."""
    if first is None or second is None:
        return "missing"
    return {("A", "B"): "win", ("B", "A"): "loss", ("tie", "tie"): "tie"}.get(
        (first, second), "inconsistent"
    )


def win_rate(name, outcomes):
    """The row of wins / (wins + losses) of (scenario, outcome) pairs, with the count of every outcome."""
    count = collections.Counter(what for _, what in outcomes)
    decided = [
        (scenario, float(what == "win")) for scenario, what in outcomes if what in ("win", "loss")
    ]
    return figure(
        name,
        "A against B",
        decided,
        pairs=len(outcomes),
        wins=count["win"],
        losses=count["loss"],
        ties=count["tie"],
        inconsistent=count["inconsistent"],
        missing=count["missing"],
    )
