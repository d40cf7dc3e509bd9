"""`python -m hfedmoe_ray.cli` is `hfedmoe`."""

import sys

from hfedmoe_ray.cli import main

sys.exit(main())
