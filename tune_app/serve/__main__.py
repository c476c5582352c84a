import sys

from tune_app.serve.supervisor import main

sys.exit(main())
