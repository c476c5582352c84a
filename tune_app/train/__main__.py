import sys

from tune_app.train.cli import main

sys.exit(main())
