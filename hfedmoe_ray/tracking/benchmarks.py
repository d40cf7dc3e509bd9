"""How a benchmark's score is told: what each measure is called, and its value as people read it."""

from collections.abc import Mapping

from hfedmoe_ray.tracking.formatting import decimal, percent

_NAMES = {
    "accuracy": "accuracy",
    "normalised": "by character",
    "exact_match": "exact match",
    "word_perplexity": "perplexity by word",
    "byte_perplexity": "by byte",
    "token_perplexity": "by token",
}
"""Measures in the order in which they are told."""


def measures(score: Mapping[str, float]) -> dict[str, str]:
    """Returns the values of a score (`records.BenchmarkScore.fields`) by the names of its measures."""
    return {
        told: decimal(score[name]) if name.endswith("perplexity") else percent(score[name])
        for name, told in _NAMES.items()
        if name in score
    }


def change(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """Returns two scores of one benchmark in a line."""
    ends = measures(after)
    told = ", ".join(f"{name} {value} → {ends[name]}" for name, value in measures(before).items())
    return f"{told.removeprefix('accuracy ')} ({after['items']} items)"
