import sys

from tune_app.serve.cli import main

sys.exit(main())
