"""Make the built-in demo: a tokenizer, a pretrained base and an instruction data set.

    python -m lora_search.builtin.make_demo --out lora_search/builtin/demo

The base is a Llama of two million parameters. It reads the docstrings of the Python standard library (PSF licence)
and records with their values written out, composed here. The data set asks for something that neither has: a sentence
that announces a record. Everything follows from the seeds below.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import random
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lora_search.builtin.demo_tasks import instruction_rows

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

SEED = 0
VOCABULARY = 2048
CONTEXT = 256
BATCH = 16
STEPS = 1600
LEARNING_RATE = 3e-3
RECORDS = 5000
ROWS = 2400
HELD_OUT = 0.02
"""Share of the documents that the base never reads, to measure it on."""


def main() -> None:
    """Make everything, and say what it came to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    (arguments.out / "model").mkdir(parents=True, exist_ok=True)

    documents = [*standard_library_docstrings(), *composed_records(RECORDS)]
    random.Random(SEED).shuffle(documents)
    print(f"{len(documents):,} documents, {sum(map(len, documents)):,} characters", flush=True)
    tokenizer = train_tokenizer(documents)
    tokenizer.save_pretrained(str(arguments.out / "model"))
    held_out = int(len(documents) * HELD_OUT)
    pretrain(documents[held_out:], documents[:held_out], tokenizer, arguments.steps, arguments.out / "model")

    with (arguments.out / "data.jsonl").open("w", encoding="utf-8") as lines:
        for row in instruction_rows(ROWS, SEED):
            lines.write(json.dumps(row) + "\n")


def standard_library_docstrings() -> Iterator[str]:
    """Every docstring of the standard library's modules, under the name of what it documents; parsed, not imported."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(library.rglob("*.py")):
        parts = file.relative_to(library).parts
        if {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(parts):
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) > 30:
                    yield f"{getattr(node, 'name', file.stem)}\n{text}"


def composed_records(count: int) -> Iterator[str]:
    """Records and their values in other orders and forms: what teaches a small model to copy."""
    draw = random.Random(SEED)
    syllables = [a + b for a in "b d f g k l m n p r s t v".split() for b in "a e i o u an er in or el".split()]
    keys = "name colour size place year owner number kind code day state price street weight team".split()
    for _ in range(count):
        record = {}
        for key in draw.sample(keys, draw.randint(2, 5)):
            if draw.random() < 0.4:
                record[key] = str(draw.randint(1, 2000))
            else:
                words = ["".join(draw.choices(syllables, k=draw.randint(2, 3))) for _ in range(draw.randint(1, 2))]
                record[key] = " ".join(words).title() if draw.random() < 0.7 else " ".join(words)
        head = "; ".join(f"{key}={value}" for key, value in record.items())
        order = draw.sample(list(record), len(record))
        form = draw.randrange(4)
        if form == 0:
            body = "\n".join(f"The {key} is {record[key]}." for key in order)
        elif form == 1:
            body = ", ".join(record[key] for key in order)
        elif form == 2:
            body = "\n".join(f"{key}: {record[key]}" for key in order)
        else:
            body = "\n".join(f"{record[key]} is the {key}." for key in order)
        yield f"{head}\n{body}"


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: no text is unknown to it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=512
    )


def pretrain(
    train: list[str], held_out: list[str], tokenizer: PreTrainedTokenizerFast, steps: int, folder: Path
) -> None:
    """Train a Llama from nothing and save it in bfloat16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    train_S, held_out_S = (_stream(texts, tokenizer) for texts in (train, held_out))
    print(f"{model.num_parameters():,} parameters, {len(train_S):,} tokens to read", flush=True)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=(0.9, 0.95),
    )
    warm_up = steps // 20
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            step / warm_up
            if step < warm_up
            else 0.02 + 0.49 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))
        ),
    )
    draw = torch.Generator().manual_seed(SEED)
    start = time.monotonic()
    for step in range(1, steps + 1):
        places = torch.randint(len(train_S) - CONTEXT, (BATCH,), generator=draw)
        ids_BT = torch.stack([train_S[place : place + CONTEXT] for place in places.tolist()])
        loss = model(input_ids=ids_BT, labels=ids_BT).loss
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0 or step == steps:
            held = held_out_loss(model, held_out_S)
            passed = time.monotonic() - start
            print(f"step {step}: train {loss.item():.3f}, held out {held:.3f} nats, {passed:.0f} s", flush=True)
    model.to(torch.bfloat16).save_pretrained(str(folder))
    print(f"held out, rounded to bfloat16: {held_out_loss(model.float(), held_out_S):.4f} nats a token", flush=True)


def held_out_loss(model: torch.nn.Module, tokens_S: torch.Tensor) -> float:
    """Nats a token over a stream of text, in pieces of the context's length."""
    import torch

    pieces = tokens_S[: len(tokens_S) // CONTEXT * CONTEXT].view(-1, CONTEXT)[:64]
    with torch.no_grad():
        return float(model(input_ids=pieces, labels=pieces).loss)


def _stream(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """All texts in one row of tokens, each with its start and end."""
    import torch

    ids = [token for text in tokenizer(texts, verbose=False)["input_ids"] for token in [*text, tokenizer.eos_token_id]]
    return torch.tensor(ids)


if __name__ == "__main__":
    main()
