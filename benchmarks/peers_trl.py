"""Train with TRL for `benchmarks/peers.py`, in TRL's own environment; prints the seconds of the training loop as JSON.

    build/peers/trl/bin/python benchmarks/peers_trl.py FOLDER EPOCHS BATCH WORKERS RATE

The folder contains `base/` and `photographs.json`, as `benchmarks/peers.py` writes them. TRL pads batches and computes
all logits, because it refuses packing for vision-language models.
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset, Image
from peft import LoraConfig
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

folder, epochs, batch, workers = Path(sys.argv[1]), *map(int, sys.argv[2:5])
rows = []
for sample in json.loads((folder / "photographs.json").read_text()):
    question, answer = (turn["content"] for turn in sample["conversations"])
    rows.append(
        {
            "images": [str((folder / sample["image"]).absolute())],
            "prompt": [{"role": "user", "content": question.removeprefix("<image>\n")}],
            "completion": [{"role": "assistant", "content": answer}],
        }
    )
trainer = SFTTrainer(
    model=AutoModelForImageTextToText.from_pretrained(folder / "base", dtype=torch.float32),
    args=SFTConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=batch,
        num_train_epochs=epochs,
        learning_rate=float(sys.argv[5]),
        dataloader_num_workers=workers,
        gradient_checkpointing=False,
        max_length=None,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
    ),
    train_dataset=Dataset.from_list(rows).cast_column("images", [Image()]),
    processing_class=AutoProcessor.from_pretrained(folder / "base"),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=r".*language_model\.layers\.\d+\..*proj.*"),
)
print(json.dumps({"seconds": trainer.train().metrics["train_runtime"]}))
