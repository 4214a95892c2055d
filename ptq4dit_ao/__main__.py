"""Entry point of ``python -m ptq4dit_ao``."""

import sys

from ptq4dit_ao.cli.main import main

sys.exit(main())
