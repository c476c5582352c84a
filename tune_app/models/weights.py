"""Compares a model's folder with what transformers expects, without loading any weights.

The family's own class is built on the meta device, and its own `from_pretrained` fills it with
tensors without data, with the names and shapes in the weight files. So prefixes, tied weights, old
names and conversions (experts that are one tensor in the class and many in the file) are left to
transformers, as they are when the model is loaded.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
)
from transformers.utils import logging

from tune_app.models.families import check_family
from tune_app.models.load_parts import blocks_of
from tune_app.models.weight_files import read_header, weight_files
from tune_app.run.search_config import ConfigError, did_you_mean

_SHOWN = 3  # names in a message


def compare(folder: Path) -> tuple[int, list[str]]:
    """(number of blocks, what is wrong), for a folder that has passed `checks.check_files`.

    Reads no weights from safetensors files, except for a family that was never compared.
    """
    with _silent():
        config, mistakes = _config(folder)
        if mistakes:
            return 0, mistakes
        model, mistakes = _model(folder, config)
        if model is None:
            return 0, mistakes
        try:
            blocks = len(blocks_of(model))
        except ConfigError as error:
            return 0, [*error.messages]
        mistakes += _check_tokenizer(folder, model)
        if not mistakes:
            try:
                check_family(folder)
            except ConfigError as error:
                mistakes = error.messages
        return blocks, mistakes


@contextmanager
def _silent() -> Iterator[None]:
    """Silences transformers' progress bars and reports; our own messages replace them."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _config(folder: Path) -> tuple[Any, list[str]]:
    """The config, if it belongs to a family with a causal language model; and what is wrong."""
    content = json.loads((folder / "config.json").read_text("utf-8"))
    family = content["model_type"]
    if family not in CONFIG_MAPPING:
        if "auto_map" in content:
            return None, [
                f"{str(folder)!r} needs Python code that comes with the model "
                f"({_code_of(content['auto_map'])}), and such code is never run. Use a model of a "
                f"type that transformers {transformers.__version__} knows, got type {family!r}."
            ]
        return None, [
            f"{str(folder)!r} is of type {family!r}, which transformers {transformers.__version__} "
            f"does not know.{did_you_mean(family, CONFIG_MAPPING)}"
        ]
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # the families' own checks raise many unrelated types
        return None, [f"{folder / 'config.json'}: {_one_line(error)}"]
    kind = None
    if config.is_encoder_decoder:
        kind = "an encoder-decoder model"
    elif type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        kind = "an encoder"
    elif type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        kind = "not a causal language model"
    if kind is not None:
        return None, [
            f"{str(folder)!r} is {kind} (type {family!r}); must be a causal language model, such "
            "as Llama, Qwen, Gemma, Mistral or GPT-2."
        ]
    return config, []


def _code_of(auto_map: Any) -> str:
    """The Python files that an `auto_map` names."""
    targets = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
    files = {str(target).rpartition("--")[2].rpartition(".")[0] + ".py" for target in targets}
    return ", ".join(sorted(files))


def _model(folder: Path, config: Any) -> tuple[PreTrainedModel | None, list[str]]:
    """The model without data, and what is wrong with the weights."""
    try:
        given = _shapes(folder)
    except ValueError as error:
        return None, [str(error)]
    family = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    try:
        model, loading = family.from_pretrained(
            None,
            config=config,
            state_dict={name: torch.empty(shape, device="meta") for name, shape in given.items()},
            device_map="meta",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:  # of conversions, for example
        return None, [
            f"{str(folder)!r}: the weights do not fit the {config.model_type} model that "
            f"config.json describes: {_one_line(error)}"
        ]
    missing, others = sorted(loading["missing_keys"]), sorted(loading["unexpected_keys"])
    unexpected = _used(model, others)
    mistakes = []
    if missing:
        mistakes.append(
            f"{str(folder)!r} lacks {len(missing)} of the {len(model.state_dict())} weights of a "
            f"{config.model_type} model: {_some(missing)}.{_why(model, missing, others)}"
        )
    elif unexpected:
        mistakes.append(
            f"{str(folder)!r} has {len(unexpected)} weights that the {config.model_type} model of "
            f"config.json does not use: {_some(unexpected)}. Results would differ from those of "
            "the saved model; config.json must belong to the same model."
        )
    if loading["mismatched_keys"]:
        wrong = [
            f"{name} {tuple(found)}, should be {tuple(right)}"
            for name, found, right in sorted(loading["mismatched_keys"])
        ]
        mistakes.append(
            f"{str(folder)!r} has {len(wrong)} weights whose shapes do not match config.json: "
            f"{_some(wrong, '; ')}."
        )
    return model, mistakes


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of all weights. Raises ValueError if a file cannot be read."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            shapes |= read_header(file)
            continue
        try:
            content = torch.load(file, map_location="meta", weights_only=True)
        except Exception as error:  # a zip's, a pickle's or torch's own
            unsafe = "weights_only" in str(error) and "GLOBAL" in str(error)
            what = (
                "contains more than tensors; that could run code, so it is not read"
                if unsafe
                else "is cut short or does not contain weights"
            )
            raise ValueError(f"{file} {what}. Save the model as safetensors.") from error
        shapes |= {
            name: tuple(tensor.shape)
            for name, tensor in content.items()
            if isinstance(tensor, torch.Tensor)
        }
    return shapes


def _used(model: PreTrainedModel, others: list[str]) -> list[str]:
    """Those of the unused weights that would change the saved model's results.

    Another block, norm or bias makes a difference. Another head (a value head, a classifier's) does
    not, nor do the buffers of old files, such as masks: these belong to modules without parameters,
    and none is called `weight`.
    """
    modules = dict([*model.base_model.named_modules(), *model.named_modules()])

    def is_used(name: str) -> bool:
        owner, _, leaf = name.rpartition(".")
        return name.split(".")[0] in modules and (
            leaf == "weight"
            or (owner in modules and any(True for _ in modules[owner].parameters(recurse=False)))
        )

    return [name for name in others if is_used(name)]


def _why(model: PreTrainedModel, missing: list[str], others: list[str]) -> str:
    """A likely reason, from the names that are missing and the names found instead."""
    if not any(name.startswith(f"{model.base_model_prefix}.") for name in missing):
        return f" It was saved without its head; save the whole {type(model).__name__}."
    for name in others:
        prefix = next((name.removesuffix(end) for end in missing if name.endswith("." + end)), "")
        if prefix:
            return (
                f" It has them as {prefix}*; save the model itself, without the wrapper that was "
                "around it in training."
            )
    if others:
        return (
            f" It has {len(others)} others: {_some(others)}. config.json must belong to the same "
            "model."
        )
    return " Copy or save the whole model again."


def _check_tokenizer(folder: Path, model: PreTrainedModel) -> list[str]:
    """What is wrong if the tokenizer cannot be loaded, or if a token of texts has no embedding.

    Special tokens that no text contains need none: Gemma 3's small models have one for images, and
    Qwen 2's tokenizer adds one for unknown characters if a folder has none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # transformers, tokenizers and sentencepiece raise many types
        return [f"{str(folder)!r}: its tokenizer cannot be loaded: {_one_line(error)}"]
    rows = model.get_input_embeddings().weight.shape[0]
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    special -= {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    beyond = {
        token: id for token, id in tokenizer.get_vocab().items() if id >= rows and id not in special
    }
    if not beyond:
        return []
    first = sorted(beyond, key=lambda token: beyond[token])
    return [
        f"{str(folder)!r}: its tokenizer has {len(tokenizer)} tokens, but its model has embeddings "
        f"for {rows}; {_some([f'{token!r} ({beyond[token]})' for token in first])} have none. Use "
        "the tokenizer that was saved with the model, or resize the model's embeddings and save it."
    ]


def _some(names: list[str], separator: str = ", ") -> str:
    more = len(names) - _SHOWN
    return separator.join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _one_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error)).strip()[:300] or type(error).__name__


if __name__ == "__main__":
    print(json.dumps(compare(Path(sys.argv[1]))))
