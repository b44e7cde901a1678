"""Train a network with accelerate and natural gradients.

An MLP learns scikit-learn's handwritten digits in a loop of one's own, with gradients accumulated
over two batches, in bfloat16 where autocast allows it, and with a checkpoint. `accelerate` wraps
the optimizer like any other. Run it:

    python tutorials/train_with_accelerate.py

It takes about 10 seconds, prints the accuracy on digits that it has not seen, and writes a folder
from which `accelerator.load_state(...)` goes on. Needs the extras `hf` and `demo`.
"""

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import neuromanifold as nm

FOLDER, EPOCHS = "train_with_accelerate", 5

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32) / 16
data = TensorDataset(images, torch.tensor(digits.target))
known, unseen = random_split(data, [1500, 297])
loader = DataLoader(known, batch_size=64, shuffle=True)

model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
optimizer = nm.optim.kfac(model, nm.Categorical(), lr=0.3, damping=1e-2)

accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

for epoch in range(EPOCHS):
    for images, labels in loader:
        with accelerator.accumulate(model):
            loss = nn.functional.cross_entropy(model(images), labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

model.eval()
with torch.no_grad():
    images, labels = unseen[:]
    accuracy = (model(images).argmax(-1) == labels).float().mean()
print(f"Accuracy: {accuracy:.1%}")
accelerator.save_state(FOLDER)
print(f"Wrote {FOLDER}/optimizer.bin")
