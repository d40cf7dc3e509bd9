"""How a partition looks, in one row per client: for the command line and the report."""

from dataclasses import dataclass

from hfedmoe_ray.context import PreparedData


@dataclass(frozen=True, kw_only=True)
class PartitionRow:
    """One client's training examples (its own test split excluded)."""

    client: int
    examples: int
    classes: int
    """Classes with at least one example."""
    largest_class: str | None
    """Name of the most frequent class (the first of several); None without examples."""
    largest_share: float
    """Its share of the client's examples, 0..1."""


def partition_table(prepared: PreparedData) -> list[PartitionRow]:
    """Returns one row per client; all are empty where clients read their own files, which the server never sees."""
    rows = []
    for client, counts in enumerate(prepared.counts):
        examples = sum(counts)
        largest = max(counts, default=0)
        rows.append(
            PartitionRow(
                client=client,
                examples=examples,
                classes=sum(count > 0 for count in counts),
                largest_class=prepared.label_names[counts.index(largest)] if examples else None,
                largest_share=largest / examples if examples else 0.0,
            )
        )
    return rows
