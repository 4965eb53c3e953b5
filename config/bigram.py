"""The bigram model on the characters of tiny Shakespeare: the baseline that a GPT should beat.

python train.py config/bigram.py

Hardware: any. On 2 CPU cores 5 s in all, to a validation loss of 2.50.
"""

dataset = "shakespeare_char"
out_dir = "out/bigram"

model = "bigram"
block_size = 64

batch_size = 64
max_iters = 1500
learning_rate = 0.1
schedule = "linear"
weight_decay = 0.0

eval_interval = 500
log_interval = 100
