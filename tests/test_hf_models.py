"""The models for a loop of one's own: the reference loop, against transformers' whole model."""

from __future__ import annotations

import runpy
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F
from torch.optim import AdamW
from transformers import get_scheduler

from tests.pages import ROOT
from tests.tiny_models import write_tiny_model
from tests.trials import VOCAB
from tests.whole_models import add_deep_prompts, open_whole
from tune_app.models import (
    AutoDistributedModelForCausalLM,
    AutoDistributedModelForSequenceClassification,
)
from tune_app.run.search_config import ConfigError

PROMPT, STEPS = 3, 4
LENGTHS = torch.tensor([9, 4, 6])
CLASSES = {
    "causal-lm": AutoDistributedModelForCausalLM,
    "classification": AutoDistributedModelForSequenceClassification,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model("qwen3", tmp_path_factory.mktemp("models") / "tiny", vocab=VOCAB)


@pytest.fixture(scope="module")
def peers(folder):
    from tune_app.serve.serve_config import ServeConfig
    from tune_app.serve.supervisor import private_swarm

    with private_swarm(ServeConfig(folder, threads=1)) as swarm:
        yield swarm.peers


def batches(task: str) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(9) < LENGTHS[:, None]).long()
    found = []
    for _ in range(STEPS):
        input_ids = torch.randint(3, VOCAB, mask.shape, generator=generator) * mask
        labels = input_ids.masked_fill(mask == 0, -100)
        if task == "classification":
            labels = torch.randint(2, (len(mask),), generator=generator)
        found.append({"input_ids": input_ids, "attention_mask": mask, "labels": labels})
    return found


def reference_loop(model, train_dataloader) -> list[float]:
    optimizer = AdamW(filter(lambda p: p.requires_grad, model.parameters()), lr=0.05)
    lr_scheduler = get_scheduler(
        name="linear", optimizer=optimizer, num_warmup_steps=1, num_training_steps=STEPS
    )
    losses = []
    model.train()
    for batch in train_dataloader:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


class Whole(torch.nn.Module):
    """The same by transformers alone: a row at a time, without padding or mask."""

    def __init__(self, folder, task, ours) -> None:
        super().__init__()
        self.folder, self.task = folder, task
        for name, parameter in ours.named_parameters():
            copy = torch.nn.Parameter(parameter.detach().cpu().clone())
            self.register_parameter(name.removesuffix(".weight"), copy)

    def forward(self, input_ids, attention_mask, labels):
        model, logits = open_whole(self.folder, torch.float32), []
        deep = getattr(self, "intermediate_prompt_embeddings", None)
        if deep is not None:
            deep_PLH = deep.view(PROMPT, -1, self.prompt_embeddings.shape[1])
            add_deep_prompts(model, deep_PLH.transpose(0, 1)[:, None])
        for tokens, length in zip(input_ids, attention_mask.sum(1), strict=True):
            text = model.get_input_embeddings()(tokens[None, :length])
            embeds = torch.cat([self.prompt_embeddings[None], text], dim=1)
            if self.task == "causal-lm":
                logits.append(model(inputs_embeds=embeds).logits[0, PROMPT:-1])
            else:
                hidden = model.base_model(inputs_embeds=embeds).last_hidden_state
                logits.append(hidden[0, -1:] @ self.score.T)
        if self.task == "causal-lm":
            labels = labels[:, 1:][labels[:, 1:] != -100]
        loss = F.cross_entropy(torch.cat(logits), labels)
        return type("Output", (), {"loss": loss})


@pytest.mark.parametrize("where", ["local", pytest.param("swarm", marks=pytest.mark.swarm)])
@pytest.mark.parametrize("mode", ["ptune", "deep_ptune"])
@pytest.mark.parametrize("task", CLASSES)
def test_the_reference_loop_trains_as_on_the_whole_model(task, mode, where, folder, request):
    peers = request.getfixturevalue("peers") if where == "swarm" else ()
    torch.manual_seed(0)
    model = CLASSES[task].from_pretrained(
        str(folder), initial_peers=peers, tuning_mode=mode, pre_seq_len=PROMPT
    )
    whole = Whole(folder, task, model)

    losses = reference_loop(model, batches(task))

    assert losses == pytest.approx(reference_loop(whole, batches(task)), rel=1e-4)
    assert min(losses) < losses[0]  # something was learned
    model.close()


def test_without_a_mask_a_row_ends_before_its_padding_token(folder):
    model = AutoDistributedModelForSequenceClassification.from_pretrained(str(folder))
    (batch, *_) = batches("classification")
    with torch.no_grad():
        masked = model(**batch).logits
        assert model.config.pad_token_id == 0
        torch.testing.assert_close(model(batch["input_ids"]).logits, masked)


def test_padding_on_the_left_is_refused(folder):
    model = AutoDistributedModelForCausalLM.from_pretrained(str(folder))
    mask = torch.tensor([[0, 0, 1, 1]])
    with pytest.raises(ValueError, match="padding_side"):
        model(torch.tensor([[0, 0, 5, 6]]), attention_mask=mask)


def test_mistakes_are_reported_together(folder):
    with pytest.raises(ConfigError) as caught:
        AutoDistributedModelForCausalLM.from_pretrained(
            str(folder), tuning_mode="deep", pre_seq_len=0
        )
    assert len(caught.value.messages) == 2


EXAMPLE = [str(ROOT / "examples" / "petals_loop.py"), "--epochs", "4"]


def check_example(out: str, err: str) -> None:
    losses = [float(line.rpartition(" ")[2]) for line in out.splitlines()]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert err == ""


def test_the_example_runs(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", EXAMPLE)
    runpy.run_path(EXAMPLE[0], run_name="__main__")
    check_example(*capsys.readouterr())


@pytest.mark.slow
def test_the_example_runs_as_a_command():
    command = [sys.executable, *EXAMPLE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    check_example(done.stdout, done.stderr)
