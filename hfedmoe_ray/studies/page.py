"""What a study leaves: NAME.json with every number, NAME.md to paste, NAME.html to look at."""

import re
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from hfedmoe_ray.config.load import dump_experiment
from hfedmoe_ray.studies.study import Findings, Setting, Study, Table
from hfedmoe_ray.tracking.formatting import plural
from hfedmoe_ray.tracking.jsonl import dumps, write_atomic
from hfedmoe_ray.tracking.markup import figure, section, table
from hfedmoe_ray.tracking.versions import software_versions


def write_study(study: Study, setting: Setting, findings: Findings) -> tuple[Path, Path, Path]:
    """Writes the three files into `setting.output` and returns their paths: JSON, Markdown, HTML."""
    config = setting.experiment(setting.seeds[0])
    numbers: dict[str, Any] = {
        "study": study.name,
        "seeds": list(setting.seeds),
        "config": config.model_dump(mode="json"),
        "versions": software_versions(),
        "headline": findings.headline,
        "paragraph": findings.paragraph,
        "numbers": findings.numbers,
        "sources": list(findings.sources),
    }
    contents = {
        "json": dumps(numbers, indent=1) + "\n",
        "md": markdown(study, findings),
        "html": html(study, setting, findings, dump_experiment(config)),
    }
    setting.output.mkdir(parents=True, exist_ok=True)
    paths = tuple(setting.output / f"{study.name}.{kind}" for kind in contents)
    for path, content in zip(paths, contents.values(), strict=True):
        write_atomic(path, content)
    return paths[0], paths[1], paths[2]


def markdown(study: Study, findings: Findings) -> str:
    """The title, a paragraph, the tables, the sources."""
    parts = [f"# {study.title}", f"{findings.headline} {findings.paragraph}".strip()]
    for one in findings.tables:
        parts += [f"**{one.title}**", _markdown_table(one), *([one.note] if one.note else [])]
    if findings.sources:
        parts.append("Sources:\n\n" + "\n".join(f"- {source}" for source in findings.sources))
    return "\n\n".join(parts) + "\n"


def _markdown_table(one: Table) -> str:
    head = " | ".join(heading.lstrip("*") for heading in one.headings)
    rule = "|".join("---:" if heading.startswith("*") else "---" for heading in one.headings)
    rows = (" | ".join(cell.replace("|", "\\|") for cell in row) for row in one.rows)
    return "\n".join([f"| {head} |", f"|{rule}|", *(f"| {row} |" for row in rows)])


def html(study: Study, setting: Setting, findings: Findings, config: str) -> str:
    """One page without a script and without a request to anywhere, in the look of a run's report."""
    style = files("hfedmoe_ray.tracking").joinpath("report.css").read_text(encoding="utf-8")
    eyebrow = f"study {study.name} · {plural(len(setting.seeds), 'seed')} · {setting.config.name}"
    drawn = "".join(figure(one.caption, one.html) for one in findings.figures)
    paired = f'<div class="pair">{drawn}</div>' if len(findings.figures) > 1 else drawn
    body = "".join(
        [
            f'<header><p class="eyebrow">{escape(eyebrow)}</p><h1>{escape(study.title)}</h1>'
            f'<p class="lede">{escape(_unbroken(findings.headline))}</p></header>\n',
            section("What it shows", _unbroken(findings.paragraph), paired),
            *(section(one.title, _unbroken(one.note), _html_table(one)) for one in findings.tables),
            _sources(findings.sources),
            section(
                "How to repeat it",
                f"{_command(study, setting)}. All numbers are in {study.name}.json beside this page.",
                f"<details><summary>The configuration that is varied</summary><pre>{escape(config)}</pre></details>",
            ),
            _footer(),
        ]
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(study.title)}</title>\n<link rel="icon" href="data:,">\n'
        f"<style>\n{style}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )


def _unbroken(sentence: str) -> str:
    """Keeps numbers and their units on one line."""
    return re.sub(r"(?<=\d) (?=(?:%|s|min|h|B|KiB|MiB|GiB)\b|%)", "\N{NO-BREAK SPACE}", sentence)


def _command(study: Study, setting: Setting) -> str:
    seeds = f"--seeds {','.join(map(str, setting.seeds))}"
    return " ".join(["hfedmoe study", study.name, setting.config.name, *setting.overrides, seeds])


def _html_table(one: Table) -> str:
    return table(one.headings, [[escape(cell) for cell in row] for row in one.rows])


def _sources(sources: Sequence[str]) -> str:
    if not sources:
        return ""
    return section("Sources", "", f"<ul>{''.join(f'<li>{escape(source)}</li>' for source in sources)}</ul>")


def _footer() -> str:
    versions = ", ".join(f"{name} {number}" for name, number in software_versions().items() if name != "git")
    return f"<footer><p>Computed from the runs of this study, with {escape(versions)}.</p></footer>\n"
