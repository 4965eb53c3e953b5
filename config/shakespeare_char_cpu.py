"""A small GPT on the characters of tiny Shakespeare; `python train.py` alone takes it too.

python train.py config/shakespeare_char_cpu.py

Hardware: any CPU. On 2 cores about a minute, to a validation loss of 1.83.
"""

dataset = "shakespeare_char"
out_dir = "out/shakespeare_char_cpu"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
bias = False

batch_size = 12
max_iters = 1500
learning_rate = 4e-3
schedule = "linear"
beta2 = 0.99

eval_interval = 300
log_interval = 50
