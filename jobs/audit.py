"""Known vulnerabilities of the pinned packages, where the advisories can be reached: pip-audit, and what it leaves out.

    python jobs/audit.py

pip-audit counts a package that it could not look up as one without findings. Here it is told when that is so of all.
"""

import json
import subprocess
import sys
from pathlib import Path

PINS = Path(__file__).parents[1] / "constraints-cpu.txt"
AUDIT = ("-m", "pip_audit", "--format=json", "--no-deps", "--disable-pip", "--progress-spinner=off", "--requirement")
TIMEOUT_S = 600


def told(report: str, problem: str) -> tuple[str, int]:
    """What pip-audit found, in words, and the exit code.

    Args:
        report: Its JSON; empty where it made none.
        problem: What it said beside that.
    """
    packages = json.loads(report)["dependencies"] if report.strip() else []
    looked_up = [package for package in packages if "skip_reason" not in package]
    if not looked_up:
        why = packages[0]["skip_reason"] if packages else (problem.strip().splitlines() or ["it said nothing"])[-1]
        return f"Nothing was audited: the advisories cannot be reached from here ({why[:120]}).", 0
    lines = [
        f"{package['name']} {package['version']}: {found['id']}, mended in {', '.join(found['fix_versions']) or 'none'}"
        for package in looked_up
        for found in package["vulns"]
    ]
    skipped = len(packages) - len(looked_up)
    lines.append(f"{len(looked_up)} packages audited, {len(lines)} findings" + (f"; {skipped} unknown" * bool(skipped)))
    return "\n".join(lines), int(len(lines) > 1)


def main() -> int:
    """Audits the pins; 1 where there are findings."""
    try:
        done = subprocess.run(
            [sys.executable, *AUDIT, str(PINS)], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        words, code = told(done.stdout, done.stderr)
    except subprocess.TimeoutExpired:
        words, code = told("", f"no answer within {TIMEOUT_S} s")
    print(words)
    return code


if __name__ == "__main__":
    sys.exit(main())
