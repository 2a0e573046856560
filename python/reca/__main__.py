import sys

from reca.cli import main

sys.exit(main())
