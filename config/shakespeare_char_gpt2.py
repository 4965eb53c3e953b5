"""nanoGPT's baby GPT on the characters of tiny Shakespeare, by its recipe, for comparison.

python train.py config/shakespeare_char_gpt2.py

Hardware: a GPU; nanoGPT's README has 3 minutes and a loss of 1.47 on an A100.
"""

dataset = "shakespeare_char"
out_dir = "out/shakespeare_char_gpt2"

n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
dropout = 0.2
bias = False
activation = "gelu"

batch_size = 64
max_iters = 5000
learning_rate = 1e-3
min_lr = 1e-4
beta2 = 0.99
