"""How a simulated attack is told, wherever a run that has one is shown."""

from collections.abc import Collection, Mapping
from typing import Any

from hfedmoe_ray.tracking.formatting import percent, plural


def attacked(attack: Mapping[str, Any], clients: Collection[int]) -> str:
    """Says who does what: "sign_flip by 2 clients (3, 7), scale 4".

    Args:
        attack: The section `attack` of a resolved configuration.
        clients: Who is hostile, if that is known.
    """
    who = f"{percent(attack['share'], 0)} of the clients"
    if clients:
        named = ", ".join(map(str, sorted(clients)[:8])) + (", …" if len(clients) > 8 else "")
        who = f"{plural(len(clients), 'client')} ({named})"
    words = f"{attack['kind']} by {who}"
    if attack["kind"] == "backdoor":
        words += f", {attack['trigger']!r} to lead to label {attack['target']}"
    if attack["scale"] is None:
        return words
    scaled = "" if attack["expert"] is None else f" for expert {attack['expert']}"
    return f"{words}, scale {attack['scale']:g}{scaled}"
