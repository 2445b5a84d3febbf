"""The flags with which the faults' training runs."""

TRAIN = (
    "--use_lora true --tune_llm false --lora_r 4 --learning_rate 1e-3 --per_device_train_batch_size 16 "
    "--num_train_epochs 2 --save_strategy steps --save_steps 3 --logging_steps 1"
)
