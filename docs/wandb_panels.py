"""Makes a saved view "hfedmoe" in a W&B project, with the panels described in howto/tracking.md.

    pip install wandb-workspaces
    python docs/wandb_panels.py ENTITY PROJECT

Needs an API key. The view is new each time; delete an old one in the project's list of views.
"""

import sys

import wandb_workspaces.reports.v2 as panels
from wandb_workspaces import workspaces

SECTIONS = {
    "What it learned": [
        panels.LinePlot(title="Accuracy", x="round", y=["global/accuracy", "own/accuracy"]),
        panels.LinePlot(title="Loss", x="round", y=["global/loss", "train/loss"]),
        panels.LinePlot(title="Accuracy by MiB sent and fetched", x="traffic/total_mib", y=["global/accuracy"]),
        panels.LinePlot(title="Accuracy by simulated seconds", x="seconds/simulated_total", y=["global/accuracy"]),
        panels.MediaBrowser(title="Clients that trained each expert", media_keys=["experts/heatmap"]),
        panels.LinePlot(title="Experts", x="round", y=["experts/trained", "experts/agreement"]),
    ],
    "Who took part": [
        panels.LinePlot(
            title="Clients by outcome",
            x="round",
            y=["clients/ok", "clients/late", "clients/failed", "clients/memory", "clients/rejected", "clients/dropped"],
        ),
        panels.LinePlot(title="Loss by tier", x="round", metric_regex="tier/.*/loss"),
        panels.LinePlot(title="Seconds of a client by tier", x="round", metric_regex="tier/.*/seconds"),
        panels.LinePlot(title="Experts trained by tier", x="round", metric_regex="tier/.*/experts_trained"),
    ],
    "What it cost": [
        panels.LinePlot(
            title="Where a round's seconds went",
            x="round",
            y=[f"seconds/{phase}" for phase in ("profile", "plan", "publish", "train", "wait", "reduce", "evaluate")],
        ),
        panels.LinePlot(title="MiB of a round", x="round", y=["traffic/up_mib", "traffic/down_mib"]),
        panels.LinePlot(title="Processors of each node (%)", x="round", metric_regex="node/[0-9]+/(cpu|gpu[0-9]+)"),
        panels.LinePlot(title="Memory of each node (%)", x="round", metric_regex="node/[0-9]+/(gpu[0-9]+_)?memory"),
    ],
}


def main(entity: str, project: str) -> None:
    """Saves the view and prints its address."""
    sections = [workspaces.Section(name=name, panels=drawn, is_open=True) for name, drawn in SECTIONS.items()]
    view = workspaces.Workspace(entity=entity, project=project, name="hfedmoe", sections=sections)
    view.save()
    print(view.url)


if __name__ == "__main__":
    main(*sys.argv[1:])
