"""muP in a LightningModule: plan and apply where the network is built, groups in `configure_optimizers`.

    python examples/lightning_module.py --steps 20

`load_from_checkpoint` builds the module anew, which applies the plan to the fresh init, and then loads over it.
"""

import argparse

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import umup

FEATURES, CLASSES = 16, 4


def mlp(width: int) -> nn.Sequential:
    """Features -> width -> width -> logits."""
    return nn.Sequential(
        nn.Linear(FEATURES, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, CLASSES)
    )


class Classifier(lightning.LightningModule):
    """A wide MLP with the rates tuned at width 64."""

    def __init__(self, width: int, lr: float, steps: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = mlp(width)
        self.plan = umup.plan(self.network, base=lambda: mlp(64), scheme="mup", optimizer="adamw")
        self.plan.apply(self.network)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Mean cross entropy of a batch of (features, label)."""
        features, labels = batch
        loss = F.cross_entropy(self.network(features), labels)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> dict[str, object]:
        """AdamW over the plan's groups, and a schedule that multiplies them at every step."""
        optimizer = torch.optim.AdamW(self.plan.param_groups(self.network, lr=self.hparams["lr"], weight_decay=1e-4))
        self.plan.guard(optimizer)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=self.hparams["steps"])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def batches() -> DataLoader[tuple[Tensor, ...]]:
    """Random features; the label is the largest of the first four."""
    features = torch.randn(256, FEATURES)
    return DataLoader(TensorDataset(features, features[:, :CLASSES].argmax(-1)), batch_size=32)


def main(argv: list[str] | None = None) -> lightning.Trainer:
    """Train; returns the trainer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--width", type=int, default=256)
    args = parser.parse_args(argv)

    trainer = lightning.Trainer(
        max_steps=args.steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(args.width, lr=1e-2, steps=args.steps), batches())
    return trainer


if __name__ == "__main__":
    print(f"loss {main().callback_metrics['train/loss'].item():.4f}")
