"""A model in this one process, without Ray: what the commands train and apply run on."""

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
    """What a command says on stderr beside its results: lines, and one that is overwritten.

    A context manager, so that the last passing line never stands before an error's message.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet, self._overwrites = quiet, sys.stderr.isatty()

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.erase()

    def say(self, text: str) -> None:
        """A line that stays."""
        if not self._quiet:
            self.erase()
            print(text, file=sys.stderr, flush=True)

    def progress(self, text: str) -> None:
        """What is being waited for: a passing line in a terminal, one that stays in a pipe."""
        if self._overwrites:
            self.passing(f"{text} ...")
        else:
            self.say(text)

    def passing(self, text: str) -> None:
        """Like `progress`, for what changes too often to be kept."""
        if self._overwrites and not self._quiet:
            print(f"\r\x1b[2K{text}", end="", file=sys.stderr, flush=True)

    def erase(self) -> None:
        """Removes the passing line."""
        self.passing("")


@contextmanager
def open_alone(
    config: SearchConfig, *, progress: Callable[[str], None]
) -> Iterator[tuple[Backbone, Any]]:
    """The config's (backbone, tokenizer); a private swarm is started and ended where it needs one.

    Raises ConfigError where the model or the swarm cannot be used, PrivateSwarmError where a
    server does not start.
    """
    warnings.simplefilter("ignore")  # of transformers and petals, about versions that are pinned
    let_threads_sleep()
    model = model_folder(config.model, config.revision)
    with ExitStack() as stack:
        private = start_private_swarm(config, model, progress=progress)
        if private is not None:
            stack.callback(private.stop)
        else:
            progress("loading the model")
        # Imported here: these take seconds, in which the swarm starts.
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
