"""`python -m dsnet_jax` is `dsnet`."""

import sys

from dsnet_jax.cli import main

sys.exit(main())
