"""muP under transformers' Trainer: overriding `create_optimizer` is all it takes.

    python examples/huggingface_trainer.py --steps 20

The optimizer is made there, not handed over as `optimizers=(...)`, because it must be made from the parameters that
train, which FSDP replaces. The Trainer's schedulers multiply every group's rate, and `guard` sees to it that nothing
else does; what it logs as the learning rate is the first group's.
"""

import argparse
import tempfile
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import umup

VOCAB_SIZE, LENGTH = 256, 32


class PlanTrainer(Trainer):
    """A Trainer whose AdamW has the plan's groups; learning_rate, weight_decay and adam_* are the arguments' own."""

    def __init__(self, *args: Any, plan: umup.ModelPlan, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.plan = plan

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over the plan's groups; `model` is given where it was wrapped before."""
        if self.optimizer is None:
            args = self.args
            groups = self.plan.param_groups(
                self.model if model is None else model,
                lr=args.learning_rate,
                weight_decay=args.weight_decay,
                eps=args.adam_epsilon,
            )
            self.optimizer = torch.optim.AdamW(groups, betas=(args.adam_beta1, args.adam_beta2))
            self.plan.guard(self.optimizer)
        return self.optimizer


def llama(width: int) -> LlamaForCausalLM:
    """A tiny Llama whose heads keep their size."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=2,
        num_attention_heads=width // 16,
        num_key_value_heads=width // 32,
        max_position_embeddings=LENGTH,
    )
    return LlamaForCausalLM(config)


class Counting(Dataset[dict[str, torch.Tensor]]):
    """Sequences that count up from a random byte."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (torch.arange(LENGTH) + 37 * index) % VOCAB_SIZE
        return {"input_ids": tokens, "labels": tokens}


def main(argv: list[str] | None = None) -> PlanTrainer:
    """Train; returns the trainer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--width", type=int, default=128)
    args = parser.parse_args(argv)

    model = llama(args.width)
    plan = umup.plan(model, base=lambda: llama(64), scheme="mup", optimizer="adamw")
    plan.apply(model)
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            output_dir=directory,
            max_steps=args.steps,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            weight_decay=1e-4,
            lr_scheduler_type="linear",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = PlanTrainer(model, arguments, train_dataset=Counting(), plan=plan)
        trainer.train()
    return trainer


if __name__ == "__main__":
    for record in main().state.log_history:
        print(record)
