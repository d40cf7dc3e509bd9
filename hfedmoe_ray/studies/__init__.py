"""The figures of the papers as commands (`hfedmoe study NAME`), one file a study.

A study varies one thing of an experiment, makes the runs that takes (or forward passes alone), and tells what it found:
`study.Findings`, which `page` writes as JSON, Markdown and HTML.
"""

from hfedmoe_ray.studies import (
    ablations,
    activation,
    aggregation,
    balance,
    experts,
    failures,
    merging,
    popularity,
    retention,
    robustness,
    selection_privacy,
    simulated_time,
)
from hfedmoe_ray.studies.study import Study

_MODULES = (
    activation,
    failures,
    popularity,
    aggregation,
    experts,
    balance,
    merging,
    retention,
    robustness,
    ablations,
    selection_privacy,
    simulated_time,
)

STUDIES: dict[str, Study] = {module.STUDY.name: module.STUDY for module in _MODULES}
"""Every study by name, in the order in which they are listed."""
