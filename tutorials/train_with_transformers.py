"""Train a language model with Hugging Face's Trainer and natural gradients.

A small Llama, made from a config, learns to spell from the help texts that come with Python. Its
optimizer is the only line that knows of the Fisher information: the Trainer calls the model, and
the optimizer watches the model. What it sees while training goes where the Trainer's other numbers
go. Run it:

    python tutorials/train_with_transformers.py

It takes about 20 seconds, prints the loss on text that it has not seen, and writes a checkpoint
from which `trainer.train(resume_from_checkpoint=True)` goes on. Needs the extra `hf`.
"""

import math
from pydoc_data.topics import topics

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import neuromanifold as nm

LENGTH, UNSEEN = 32, 256

text = "".join(topics.values())
alphabet = sorted(set(text))
number = {character: i for i, character in enumerate(alphabet)}
tokens = torch.tensor([number[character] for character in text])
pieces = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
pieces = pieces[torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0))]
data = [{"input_ids": piece, "labels": piece} for piece in pieces]

torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=len(alphabet),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
    )
)
optimizer = nm.optim.kfac(model, nm.Categorical(), lr=0.3)

trainer = Trainer(
    model,
    TrainingArguments(
        output_dir="train_with_transformers",
        per_device_train_batch_size=32,
        max_steps=100,
        lr_scheduler_type="linear",  # of the optimizer's learning rate
        max_grad_norm=0,  # steps are limited in KL already
        save_steps=100,
        logging_steps=20,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    ),
    train_dataset=data[UNSEEN:],
    eval_dataset=data[:UNSEEN],
    optimizers=(optimizer, None),
)
nm.optim.Monitor(optimizer, lambda _, seen: trainer.log({"kl": seen["kl"]}), every=20)

trainer.train()
print(f"Nats per character: {trainer.evaluate()['eval_loss']:.2f}")
print(f"by guessing: {math.log(len(alphabet)):.2f}")
print("Wrote train_with_transformers/checkpoint-100/optimizer.pt")
