"""TRL's DPOTrainer on dpofast. `patch` serves TRL's KTO, GRPO, RLOO and SFT trainers as well.

To leave TRL itself alone, use ``dpofast.integrations.trl.DPOTrainer`` for ``trl.DPOTrainer`` and drop the ``with``.
With ``share_prompt`` the prompt of a pair is run once, where that is less work.
"""

from __future__ import annotations

import tempfile

import tiny
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from dpofast.integrations.trl import patched


def main(steps: int = 20, share_prompt: bool = True) -> list[float]:
    with tempfile.TemporaryDirectory() as folder, patched(share_prompt=share_prompt):
        trainer = DPOTrainer(
            model=tiny.model(),
            ref_model=tiny.model(),
            args=DPOConfig(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=8,
                learning_rate=1e-3,
                lr_scheduler_type="constant",
                logging_steps=1,
                report_to="none",
                save_strategy="no",
                use_cpu=True,
                bf16=False,
            ),
            train_dataset=Dataset.from_list(tiny.pairs(16)),
            processing_class=tiny.tokenizer(),
        )
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
