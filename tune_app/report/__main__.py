import sys

from tune_app.report.cli import main

sys.exit(main())
