"""README.md of a folder of prompts: what they are and how to load them."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from tune_app.apply.front_matter import front_matter
from tune_app.models.folder import is_local, model_folder
from tune_app.report.words import number, trained_by
from tune_app.run.trial_config import TrialConfig
from tune_app.serve.supervisor import dht_prefix_of
from tune_app.tasks.known import task_named

if TYPE_CHECKING:
    from tune_app.apply.prompts_folder import About

# The attribute for the model without its head in Petals' classes. All also have `transformer`.
_PETALS_BASE = {"llama": "model", "bloom": "transformer", "falcon": "transformer"}


def model_card(about: About) -> str:
    """The card as Markdown."""
    model, config = about.model, about.config
    name = Path(model.name).name
    title = f"Prompts for {name}: {about.task}"
    parts = [
        front_matter(about, title),
        f"# {title}",
        f"{config.prompt_length} trained prompt vectors ({config.tuning_mode}) for the frozen "
        f"model `{name}` ({model.family}, hidden size {model.hidden_size}, {model.num_blocks} "
        f"blocks{f', revision {model.revision}' if model.revision else ''}). Found and written by "
        f"tune_app {about.tune_app}.",
        _results(about),
        _use(),
        *_without_tune_app(about),
        _petals(about),
        _training(about),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _results(about: About) -> str:
    columns = ["loss", *sorted({name for values in about.metrics.values() for name in values})]
    columns = list(dict.fromkeys(columns))
    lines = [f"| split | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
    for split, values in about.metrics.items():
        cells = [number(values.get(column), column) for column in columns]
        lines.append(f"| {split} | {' | '.join(cells)} |")
    task = task_named(about.task)
    lines.append("")
    made = trained_by(about.trial, about.trained_as, about.config.seed)
    lines.append(f"Loss in {task.loss} per {task.unit}. These weights are from {made}.")
    if about.class_names:
        lines.append(f"Classes, in the order of the scores: {', '.join(about.class_names)}.")
    if about.scale is not None:
        lines.append(
            f"The predicted number is {number(about.scale.mean)} plus {number(about.scale.std)} "
            "times the score."
        )
    if about.answer:
        lines += ["", f"Result of the search: {about.answer}"]
    return "## Results\n\n" + "\n".join(lines)


def _use() -> str:
    return """\
## Use

```bash
python -m tune_app.apply FOLDER              # this folder; text from standard input
python -m tune_app.apply FOLDER --evaluate   # on the test split of the search
```"""


def _without_tune_app(about: About) -> list[str]:
    """Sections on PEFT and on the bare tensor."""
    if about.config.tuning_mode != "ptune":
        return [
            """\
## PEFT

PEFT has no adapter type for deep prompts (`deep_ptune`), which are added to the input of every
block, so this folder has no PEFT adapter."""
        ]
    outputs = task_named(about.task).outputs(about.class_names)
    if not outputs:
        return [_PEFT_CAUSAL_LM, _TENSOR]
    values = {
        "CLASSES": outputs,
        "MAX_LENGTH": about.max_length,
        "BEFORE": about.config.prompt_length - 1,
    }
    section = _PEFT_CLASSIFICATION
    for name, value in values.items():
        section = section.replace(name, str(value))
    return [section]


# MODEL is the model's folder or hub name and FOLDER this folder, as the reader has them.
_PEFT_CAUSAL_LM = """\
## Use them with PEFT

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL), FOLDER)
text = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**text, max_new_tokens=40)[0]))
```

In `model(**text).logits`, the positions of the prompt come before those of the text."""

_PEFT_CLASSIFICATION = """\
## Use them with PEFT

```python
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(MODEL)
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token
base = AutoModelForSequenceClassification.from_pretrained(
    MODEL, num_labels=CLASSES, pad_token_id=tokenizer.pad_token_id
)
model = PeftModel.from_pretrained(base, FOLDER)


@torch.no_grad()
def scores(texts):
    rows = tokenizer(
        texts,
        return_tensors="pt",
        truncation=True,
        max_length=MAX_LENGTH,
        padding=True,
        padding_side="right",
    )
    hidden = model(**rows, output_hidden_states=True).hidden_states[-1]
    last = rows["attention_mask"].sum(dim=1) + BEFORE  # position of each row's last token
    return model.base_model.score(hidden[torch.arange(len(texts)), last])
```

Do not use `model(**rows).logits` instead of `scores` for texts of different lengths. With a prompt,
transformers sees embeddings instead of tokens, so it does not recognise padding and takes the
batch's last position: rows shorter than the longest one would be judged by their padding. For a
single text, or texts of equal length, both give the same. Padding on the left does not help,
because it would come between prompt and text."""

_TENSOR = """\
## Use them as a tensor

`prompt_embeddings` in `prompts.safetensors` is the prompt as a plain tensor, [P, H]. Any library
that accepts embeddings instead of tokens can use it, in front of the text's embeddings:

```python
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL)
prompt = load_file(f"{FOLDER}/prompts.safetensors")["prompt_embeddings"]
tokens = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
words = model.get_input_embeddings()(tokens)[0]
embeds = torch.cat([prompt.to(words.dtype), words])  # [P + T, H]
print(tokenizer.decode(model.generate(inputs_embeds=embeds[None], max_new_tokens=40)[0]))
```

vLLM accepts the same tensor. This example follows vLLM's documentation; it was not run here:

```text
from vllm import LLM

llm = LLM(MODEL, enable_prompt_embeds=True)
print(llm.generate({"prompt_embeds": embeds})[0].outputs[0].text)
```"""


def _petals(about: About) -> str:
    """How to load the weights into Petals' own class; "" for a family that Petals does not have."""
    family, config, task = about.model.family, about.config, task_named(about.task)
    if family not in _PETALS_BASE or not task.petals_class:
        return ""
    cls, outputs = task.petals_class, task.outputs(about.class_names)
    dtype = about.search["dtype"]
    options = [f'tuning_mode="{config.tuning_mode}"', f"pre_seq_len={config.prompt_length}"]
    paths = {"prompt_embeddings": "transformer.prompt_embeddings.weight"}
    if config.tuning_mode == "deep_ptune":
        paths["intermediate_prompt_embeddings"] = (
            "transformer.intermediate_prompt_embeddings.weight"
        )
    if outputs:
        options.append(f"num_labels={outputs}")
        paths["score"] = "score.weight"
    if is_local(about.model.name):
        # Petals would derive it from the folder's whole path
        options.append(f'dht_prefix="{dht_prefix_of(model_folder(about.model.name))}"')
    options = ["initial_peers=PEERS", f"torch_dtype=torch.{dtype}", *options]
    copies = "\n".join(
        f'model.{path}.data.copy_(weights["{name}"])' for name, path in paths.items()
    )
    base = _PETALS_BASE[family]
    places = "\n".join(
        f"| `{name}` | `{path.replace('transformer', base)}` | {_SHAPES[name]} |"
        for name, path in paths.items()
    )
    note = ""
    if outputs:
        note = """

The class uses the last token before the padding, so in a batch of texts of different lengths, pad
on the right with `model.config.pad_token_id`; some models come without one."""
    return f"""\
## Load them into Petals' own class

Petals' classes need transformers 4.34 or earlier, so use a separate environment with petals 2.2 and
its requirements. `MODEL` is the model's folder or hub name, `PEERS` are the addresses of a swarm
that serves it, started by tune_app or by Petals.

```python
import torch
from petals import {cls}
from safetensors.torch import load_file

model = {cls}.from_pretrained(
    MODEL,
    {_indented(options)}
)
weights = load_file("{_WEIGHTS}")
{copies}
```

| in the file | in Petals' class for {family} | shape |
| --- | --- | --- |
{places}

P prompt tokens, H hidden size, L blocks, C classes.{note}"""


_WEIGHTS = "prompts.safetensors"
_SHAPES = {
    "prompt_embeddings": "[P, H]",
    "intermediate_prompt_embeddings": "[P, L * H]",
    "score": "[C, H]",
}


def _training(about: About) -> str:
    default = TrialConfig()
    changed = [
        f"{field.name} {number(getattr(about.config, field.name), field.name)}"
        for field in fields(TrialConfig)
        if field.name in ("lr", "scheduler", "steps", "batch_size")
        or getattr(about.config, field.name) != getattr(default, field.name)
    ]
    if about.config.init == "text":
        at = changed.index("init text")
        changed[at] += f" (`{about.search['init_text']}`)"
    data = about.search.get("train")
    source = "the built-in text of the task" if data is None else f"`{Path(data).name}`"
    score = " and the score head" if task_named(about.task).outputs(about.class_names) else ""
    return f"""\
## Training

AdamW over only the prompts{score}, on {source}, cut
to {about.max_length} tokens per row: {", ".join(changed)}; everything else is as in `TrialConfig`.
`prompts.json` has the whole configuration."""


def _indented(options: list[str]) -> str:
    return "\n    ".join(f"{option}," for option in options)
