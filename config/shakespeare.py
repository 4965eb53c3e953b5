"""A small GPT on tiny Shakespeare in GPT-2's tokens.

python train.py config/shakespeare.py

Hardware: any. On 2 CPU cores 5 minutes of training, to a loss of 4.98 (2.32 bits per byte).
"""

dataset = "shakespeare"
out_dir = "out/shakespeare"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
dropout = 0.1
bias = False

batch_size = 16
max_iters = 600
learning_rate = 2e-3
min_lr = 2e-4
beta2 = 0.99

eval_interval = 300
log_interval = 20
