"""From a run directory to what people look at: tables, a summary, a page. Imports no torch.

`load` reads the run's events into pandas; everything else is made from what it returns, so it works
on a run that goes on, has ended or died, and can be made again at any time.
"""

from tune_app.results.frames import Results, load
from tune_app.results.summary import summary
from tune_app.results.tables import write_tables

__all__ = ["Results", "load", "summary", "write_tables"]
