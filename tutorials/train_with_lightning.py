"""Train a network with Lightning and natural gradients.

A conv net learns scikit-learn's handwritten digits. `configure_optimizers` is the only place that
knows of the Fisher information: Lightning calls the module, and the optimizer watches the module.
What it sees while training goes to Lightning's logger. Run it:

    python tutorials/train_with_lightning.py

It takes about 20 seconds, prints the accuracy on digits that it has not seen, and writes a table of
what was logged. Needs the extras `lightning` and `demo`.
"""

import warnings
from pathlib import Path

import lightning
import torch
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import neuromanifold as nm

warnings.filterwarnings("ignore", module="lightning")  # it speaks of few workers, for example


class Digits(lightning.LightningModule):
    """A conv net for 8 × 8 pixels."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, 10),
        )

    def training_step(self, batch, _):
        """The loss of a batch."""
        images, labels = batch
        loss = nn.functional.cross_entropy(self.net(images), labels)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, _):
        """The accuracy on a batch."""
        images, labels = batch
        self.log("accuracy", (self.net(images).argmax(-1) == labels).float().mean())

    def configure_optimizers(self):
        """The module that is watched is the one that `training_step` calls."""
        optimizer = nm.optim.kfac(self.net, nm.Categorical(), lr=0.3, damping=1e-2)
        nm.optim.Monitor(optimizer, lambda step, seen: self.logger.log_metrics(seen, step))
        return optimizer


lightning.seed_everything(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
known, unseen = random_split(TensorDataset(images, torch.tensor(digits.target)), [1500, 297])

logger = CSVLogger(".", name="train_with_lightning")
trainer = lightning.Trainer(
    max_epochs=4, logger=logger, accelerator="cpu", log_every_n_steps=10, enable_progress_bar=False
)
trainer.fit(
    Digits(), DataLoader(known, batch_size=64, shuffle=True), DataLoader(unseen, batch_size=297)
)

print(f"Accuracy: {trainer.callback_metrics['accuracy']:.1%}")
print(f"Wrote {Path(logger.log_dir, 'metrics.csv')}")
