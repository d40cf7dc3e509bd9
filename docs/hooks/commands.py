"""Makes the page `reference/commands.md` out of the commands themselves: what `--help` prints, in the order of use."""

from collections.abc import Iterator

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import hfedmoe_ray.cli  # gives the group its commands
from hfedmoe_ray.cli.app import commands

PAGE = "reference/commands.md"
INTRODUCTION = """\
# Command line

What `hfedmoe COMMAND --help` prints, taken from the commands when these pages were built. How every one can end:
[Exit codes and errors](../errors.md).
"""
JOBS = """
## Jobs

Entry points for `ray job submit`, in `jobs/`: `federate.py CONFIG [KEY=VALUE]...` is `hfedmoe run`,
`compare.py CONFIG [options]` is `hfedmoe compare` and `evaluate.py RUN [options]` is `hfedmoe evaluate`, on the cluster
the job runs in. A job's working directory is deleted when it ends, so a relative `output`, or RUN, is taken from the
home directory of the node. `jobs/runtime_env.yaml` is what a job submitted by hand carries along.
"""
assert hfedmoe_ray.cli


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds the page (an event of MkDocs)."""
    files.append(File.generated(config, PAGE, content=page()))
    return files


def page() -> str:
    """The whole page, as Markdown."""
    top = click.Context(commands, info_name="hfedmoe", terminal_width=80, **commands.context_settings)
    return "\n".join([INTRODUCTION, *_command(commands, top), JOBS])


def _command(command: click.Command, context: click.Context) -> Iterator[str]:
    """A command's help, then that of those below it."""
    yield f"\n## `{context.command_path}`\n\n{command.get_short_help_str(limit=200) if context.parent else ''}\n"
    yield f"```text\n{command.get_help(context)}\n```\n"
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            if below is not None and not below.hidden:
                yield from _command(below, click.Context(below, context, name))
