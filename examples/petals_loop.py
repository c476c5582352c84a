"""Prompt tuning in your own training loop, as in Petals' examples.

    python examples/petals_loop.py
    python examples/petals_loop.py --peers /ip4/127.0.0.1/tcp/31337/p2p/12D3KooW...

It is an ordinary PyTorch loop; only the model's class comes from tune_app. The blocks run in this
process or on a swarm, and only prompts and score head are trained.
"""

from __future__ import annotations

import argparse

import torch
from torch.optim import AdamW
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, get_scheduler

from tune_app.models import AutoDistributedModelForSequenceClassification
from tune_app.models.folder import model_folder

TEXTS = [
    ("Return the number of bytes that were written to the file.", 0),
    ("Open a file and read all of its lines.", 0),
    ("Close the stream; closing it again does nothing.", 0),
    ("Rename the file or directory src to dst.", 0),
    ("Return the square root of x.", 1),
    ("Return the greatest common divisor of the integers.", 1),
    ("Return x with the fractional part removed.", 1),
    ("Return the sum of the products of two sequences.", 1),
]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="demo", help="demo, a folder or a name on a hub")
    parser.add_argument("--peers", nargs="*", default=[], help="addresses of the swarm's servers")
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args()
    torch.manual_seed(0)

    tokenizer = AutoTokenizer.from_pretrained(model_folder(args.model))
    tokenizer.padding_side = "right"
    model = AutoDistributedModelForSequenceClassification.from_pretrained(
        args.model,
        initial_peers=args.peers,
        tuning_mode="deep_ptune",
        pre_seq_len=8,
        num_labels=2,
    )

    def collate(rows: list[tuple[str, int]]) -> dict[str, torch.Tensor]:
        texts, labels = zip(*rows, strict=True)
        batch = tokenizer(list(texts), padding=True, return_tensors="pt")
        return {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "labels": torch.tensor(labels),
        }

    train_dataloader = DataLoader(TEXTS, batch_size=4, shuffle=True, collate_fn=collate)
    optimizer = AdamW(filter(lambda p: p.requires_grad, model.parameters()), lr=1e-2)
    lr_scheduler = get_scheduler(
        name="linear",
        optimizer=optimizer,
        num_warmup_steps=0,
        num_training_steps=args.epochs * len(train_dataloader),
    )
    for epoch in range(args.epochs):
        model.train()
        losses = []
        for batch in train_dataloader:
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}: loss {sum(losses) / len(losses):.3f}")
    model.close()


if __name__ == "__main__":
    main()
