"""The command line: `hfedmoe run`, `plan`, `validate`, `doctor` and the others.

Every command imports what it needs when it runs, so that `--help`, `plan` and every refusal answer at once.
"""

from hfedmoe_ray.cli.app import commands, main
from hfedmoe_ray.cli.checking import doctor, plan, validate
from hfedmoe_ray.cli.clustering import cluster
from hfedmoe_ray.cli.comparing import compare
from hfedmoe_ray.cli.evaluating import evaluate
from hfedmoe_ray.cli.language import generate, upcycle
from hfedmoe_ray.cli.measuring import bench
from hfedmoe_ray.cli.running import export, report, resume, run, submit, verify
from hfedmoe_ray.cli.starting import completion, init, schema
from hfedmoe_ray.cli.studying import study
from hfedmoe_ray.cli.submitted import logs, status, stop
from hfedmoe_ray.cli.tracking import wandb

__all__ = ["main"]

# In the order in which they are listed, which is the order of use.
_HERE = (init, run, resume, plan, validate, doctor, report, evaluate, verify, export, generate, upcycle, wandb)
_ON_A_CLUSTER = (submit, status, logs, stop, cluster)
for _command in (*_HERE, *_ON_A_CLUSTER, compare, study, bench, schema, completion):
    commands.add_command(_command)
