import sys

from tune_app.apply.cli import main

sys.exit(main())
