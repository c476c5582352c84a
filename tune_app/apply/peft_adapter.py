"""The prompts as a PEFT adapter, so that they can be used without tune_app.

    adapter_config.json         prompt tuning, for causal LM or sequence classification
    adapter_model.safetensors   the prompt, and the score head if there is one

These are names and formats of PEFT 0.21; `PeftModel.from_pretrained` reads them, and a test
compares its logits with ours. PEFT's prompt tuning puts a trained prompt in front of the text's
embeddings, as `ptune` does. It has no type for `deep_ptune` (its prefix tuning trains keys and
values).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from safetensors.numpy import save

from tune_app.models.folder import is_local, model_folder

if TYPE_CHECKING:
    import numpy as np

    from tune_app.apply.prompts_folder import About

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def adapter_files(weights: Mapping[str, np.ndarray], about: About) -> dict[str, str | bytes]:
    """File name -> content; empty if PEFT has no type for the prompts."""
    if about.config.tuning_mode != "ptune":
        return {}
    name = about.model.name
    config = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "SEQ_CLS" if "score" in weights else "CAUSAL_LM",
        "base_model_name_or_path": str(model_folder(name)) if is_local(name) else name,
        "revision": about.model.revision,
        "inference_mode": True,
        "num_virtual_tokens": about.config.prompt_length,
        "token_dim": weights["prompt_embeddings"].shape[1],
        "num_transformer_submodules": 1,  # decoder only
        "prompt_tuning_init": "RANDOM",  # how PEFT would initialise a new one
    }
    tensors = {"prompt_embeddings": weights["prompt_embeddings"]}
    if "score" in weights:
        tensors["base_model.score.weight"] = weights["score"]
    content = save(tensors)
    return {
        ADAPTER_CONFIG: json.dumps(config, indent=2) + "\n",
        ADAPTER_WEIGHTS: content,
    }
