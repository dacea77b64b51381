"""Every head measure again, one query at a time in plain Python: slow, and easy to believe."""

import math

TAUS = (0.0, 0.1, 0.5, 1.0, 2.0)
WINDOW = 8


def sees(mask, q, k, causal):
    return bool(mask[k]) and (k <= q or not causal)


def position(mask, k):
    return sum(1 for j in range(k) if mask[j])


def counted(mask, q):
    return bool(mask[q]) and position(mask, q) > 0


def period_of(tokens, mask):
    real = [i for i in range(len(tokens)) if mask[i]]
    row = [tokens[i] for i in real]
    for skip in (0, 1):
        body = row[skip:]
        for period in range(2, len(body) // 2 + 1):
            if all(body[i] == body[i - period] for i in range(period, len(body))):
                return period, real[skip]
    return None, None


def keys_of(kind, tokens, mask, q, causal):
    """The keys that a kind names for query q of one sequence."""
    n = len(tokens)
    first = position(mask, q) and next(i for i in range(n) if mask[i])
    inner = [k for k in range(n) if sees(mask, q, k, causal) and position(mask, k) > 0]
    if kind == "previous_token":
        return [k for k in inner if k == q - 1]
    if kind == "current_token":
        return [q]
    if kind == "first_token":
        return [first]
    if kind == "local_mass":
        if position(mask, q) < WINDOW:
            return []
        return [k for k in range(n) if sees(mask, q, k, causal) and abs(q - k) < WINDOW]
    if kind == "duplicate_token":
        return [k for k in inner if k < q and tokens[k] == tokens[q]]
    follow = [k for k in inner if k <= q and mask[k - 1] and tokens[k - 1] == tokens[q]]
    if kind == "prefix_match":
        return follow
    if kind == "prefix_match_recent":
        return follow[-1:]
    if kind == "prefix_match_correct":
        return [k for k in follow if q + 1 < n and mask[q + 1] and tokens[k] == tokens[q + 1]]
    assert kind == "induction"
    period, start = period_of(tokens, mask)
    if period is None:
        return []
    copies = range(1, (q - start) // period + 1) if q >= start else []
    return [k for k in (q - c * period + 1 for c in copies) if k in inner]


def statistics_of(row, mask, q, causal):
    """Every statistic of one row of weights."""
    keys = [k for k in range(len(row)) if sees(mask, q, k, causal)]
    n, weights = len(keys), [row[k] for k in keys]
    entropy = -sum(w * math.log(w) for w in weights if w > 0)
    mean = sum(w * (q - k) for w, k in zip(weights, keys, strict=True))
    square = sum(w * (q - k) ** 2 for w, k in zip(weights, keys, strict=True))
    ties = [sum(1 for w in weights if w >= max(weights) * math.exp(-tau)) for tau in TAUS]
    return {
        "entropy": entropy / math.log(max(n, 2)),
        "effective_keys": math.exp(entropy),
        "effective_keys_l2": 1 / sum(w * w for w in weights),
        "averaging": 1 - sum(abs(w - 1 / n) for w in weights) / 2,
        "max_weight": max(weights),
        "distance_mean": mean,
        "distance_std": math.sqrt(max(square - mean * mean, 0)),
        "tied_keys": ties,
        "tied_keys_normalised": [(t - 1) / max(n - 1, 1) for t in ties],
        "tied_keys_log": [math.log(t) / math.log(max(n, 2)) for t in ties],
    }
