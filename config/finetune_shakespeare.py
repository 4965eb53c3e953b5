"""GPT-2 (124M), finetuned on tiny Shakespeare.

python train.py config/finetune_shakespeare.py

Hardware: a GPU, or a patient CPU; time and loss are not yet measured. Downloads GPT-2's weights.
"""

init_from = "gpt2"  # or gpt2-medium, -large, -xl, a checkpoint, a folder in transformers' format
dataset = "shakespeare"
out_dir = "out/finetune_shakespeare"

dropout = 0.1
block_size = 256

batch_size = 32
micro_batch_size = 4
max_iters = 100
warmup_iters = 0
learning_rate = 3e-5
schedule = "constant"

eval_interval = 10
patience = 3
