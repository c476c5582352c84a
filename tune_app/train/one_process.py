"""A model in a single process, without Ray, for the commands train and apply."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from tune_app.backbones.opening import open_backbone
from tune_app.models.folder import model_folder
from tune_app.run.search_config import ConfigError, SearchConfig
from tune_app.run.threads import let_threads_sleep
from tune_app.serve.connection import connection_to, start_private_swarm

if TYPE_CHECKING:
    from tune_app.backbones.protocol import Backbone


class Terminal:
    """Messages on stderr, next to a command's results: lines, and a status line that is
    overwritten.

    A context manager, so that the status line is gone before an error message is printed.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet, self._overwrites = quiet, sys.stderr.isatty()

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.erase()

    def say(self, text: str) -> None:
        """Prints a permanent line."""
        if not self._quiet:
            self.erase()
            print(text, file=sys.stderr, flush=True)

    def progress(self, text: str) -> None:
        """Says what is being waited for: a status line in a terminal, a permanent one in a pipe."""
        if self._overwrites:
            self.passing(f"{text} ...")
        else:
            self.say(text)

    def passing(self, text: str) -> None:
        """Sets the status line; for messages that change too often to be kept in a pipe."""
        if self._overwrites and not self._quiet:
            print(f"\r\x1b[2K{text}", end="", file=sys.stderr, flush=True)

    def erase(self) -> None:
        """Removes the status line."""
        self.passing("")


@contextmanager
def open_alone(
    config: SearchConfig, *, progress: Callable[[str], None]
) -> Iterator[tuple[Backbone, Any]]:
    """The config's (backbone, tokenizer), with a private swarm if it needs one.

    Raises ConfigError if the model or the swarm cannot be used, PrivateSwarmError if a server does
    not start.
    """
    warnings.simplefilter("ignore")  # from transformers and petals, about pinned versions
    let_threads_sleep()
    model = model_folder(config.model, config.revision)
    with ExitStack() as stack:
        private = start_private_swarm(config, model, progress=progress)
        if private is not None:
            stack.callback(private.stop)
        else:
            progress("loading the model")
        # Imported here, because it takes seconds, in which the swarm starts.
        from transformers import AutoTokenizer

        from tune_app.backbones.protocol import BackboneUnavailable

        if config.backbone == "swarm":
            import tune_app.backbones.swarm  # noqa: F401
        if private is not None:
            private.wait_until_ready()
        try:
            backbone = open_backbone(config, str(model), connection_to(config, model, private))
        except BackboneUnavailable as error:
            raise ConfigError(f"--peers: {error}") from error
        stack.callback(backbone.close)
        yield backbone, AutoTokenizer.from_pretrained(str(model))
