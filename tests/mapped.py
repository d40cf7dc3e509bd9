"""What is mapped at an address of a process, as the operating system tells it."""

import re
from pathlib import Path


def mapping(pid: int, address: int) -> tuple[tuple[str, str, int], str, dict[str, int]]:
    """((device, inode, offset of the address in the file), permissions, smaps in KiB) of what is mapped there."""
    place, inside, counts = None, False, {}
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        head = re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+) ([0-9a-f]+) (\S+) (\d+)", line)
        if head:
            start, end, offset = int(head[1], 16), int(head[2], 16), int(head[4], 16)
            inside = start <= address < end
            if inside:
                place = (head[5], head[6], offset + address - start), head[3]
        elif inside and line.endswith("kB"):
            counts[line.split(":")[0]] = int(line.split()[1])
    return *(place or (("", "", 0), "")), counts
