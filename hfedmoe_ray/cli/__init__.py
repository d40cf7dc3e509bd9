"""The command line: `hfedmoe run`, `plan`, `validate`, `doctor` and the others.

Every command imports what it needs when it runs, so that `--help`, `plan` and every refusal answer at once.
"""

from hfedmoe_ray.cli.app import commands, main
from hfedmoe_ray.cli.checking import doctor, plan, validate
from hfedmoe_ray.cli.comparing import compare
from hfedmoe_ray.cli.measuring import bench
from hfedmoe_ray.cli.running import export, report, resume, run, submit, verify
from hfedmoe_ray.cli.studying import study
from hfedmoe_ray.cli.tracking import wandb

__all__ = ["main"]

# In the order in which they are listed, which is the order of use.
for _command in (run, resume, plan, validate, doctor, report, verify, export, submit, wandb, compare, study, bench):
    commands.add_command(_command)
