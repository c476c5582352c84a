"""Pretrains the demo model: `python -m tune_app.models.demo.pretrain` (about 5 minutes on 2 cores).

A Llama of 4 layers x 128 with a byte-level BPE of 2,048 pieces, trained on the docstrings of the
installed standard library. Same Python version, same torch, same machine: same weights.
`model/README.md` says which of them made the files that come with the project.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tune_app.tasks.stdlib_text import split_of, stdlib_docstrings

VOCABULARY = 2048
PAD, BOS, EOS = "<pad>", "<s>", "</s>"


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE that puts `<s>` before each text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, bos_id)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="right",
        model_max_length=512,
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All texts in one row of token ids, `<s> text </s> <s> text </s> ...`."""
    ids = [i for text in texts for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    return torch.tensor(ids)


def batch_of(stream_T: torch.Tensor, starts_B: torch.Tensor, length: int) -> torch.Tensor:
    return torch.stack([stream_T[start : start + length] for start in starts_B.tolist()])


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, stream_T: torch.Tensor, length: int) -> float:
    """Mean loss in nats per token over the whole stream, in windows of `length` tokens."""
    starts = torch.arange(0, len(stream_T) - length, length)
    losses = []
    for chunk in starts.split(32):
        tokens_BT = batch_of(stream_T, chunk, length)
        losses += [model(tokens_BT, labels=tokens_BT).loss.item()] * len(chunk)
    return sum(losses) / len(losses)


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=344,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=512,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def pretrain(
    model: LlamaForCausalLM,
    train_T: torch.Tensor,
    valid_T: torch.Tensor,
    args: argparse.Namespace,
    generator: torch.Generator,
) -> None:
    """Prints the losses every 250 steps."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1
    )
    warmup = 100
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / warmup, 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        ),
    )
    began = time.monotonic()
    for step in range(args.steps):
        starts = torch.randint(len(train_T) - args.length, (args.rows,), generator=generator)
        tokens_BT = batch_of(train_T, starts, args.length)
        loss = model(tokens_BT, labels=tokens_BT).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if (step + 1) % 250 == 0:
            now = held_out_loss(model, valid_T, args.length)
            print(
                f"step {step + 1}: train {loss.item():.3f}, held out {now:.3f}, "
                f"{time.monotonic() - began:.0f} s",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=128, help="tokens in each row")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    texts = [text for text, _ in stdlib_docstrings()]
    train_texts = [text for text in texts if split_of(text) == "train"]
    valid_texts = [text for text in texts if split_of(text) == "valid"]
    generator = torch.Generator().manual_seed(args.seed)
    train_texts = [
        train_texts[i] for i in torch.randperm(len(train_texts), generator=generator).tolist()
    ]
    tokenizer = train_tokenizer(train_texts)
    train_T, valid_T = token_stream(tokenizer, train_texts), token_stream(tokenizer, valid_texts)
    print(f"{len(train_texts)} docstrings, {len(train_T)} tokens; held out {len(valid_T)} tokens")

    torch.manual_seed(args.seed)  # transformers initialises from the global generator
    model = new_model(tokenizer)
    first_loss = held_out_loss(model, valid_T, args.length)
    pretrain(model, train_T, valid_T, args, generator)
    last_loss = held_out_loss(model, valid_T, args.length)
    model.save_pretrained(args.out, safe_serialization=True)
    tokenizer.save_pretrained(args.out)
    facts = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_docstrings": len(train_texts),
        "train_tokens": len(train_T),
        "steps": args.steps,
        "tokens_per_step": args.rows * args.length,
        "held_out_loss_before": round(first_loss, 3),
        "held_out_loss": round(last_loss, 3),
    }
    (args.out / "pretraining.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
