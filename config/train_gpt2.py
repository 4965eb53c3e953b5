"""GPT-2 (124M parameters) on OpenWebText.

python prepare.py openwebtext
python train.py config/train_gpt2.py       on several GPUs: docs/scale.md

Hardware: a large GPU. An H200 trains this model, without biases, on 495,000 tokens a second, in
micro-batches of 32; the whole recipe was not run. nanoGPT's README has a loss of 2.85 after four
days on eight A100s.
"""

dataset = "openwebtext"
out_dir = "out/gpt2"

block_size = 1024
vocab_size = 50304  # 50,257 padded to a multiple of 128, which GPUs multiply faster

batch_size = 512
micro_batch_size = 16
max_iters = 19000
warmup_iters = 700
learning_rate = 6e-4
min_lr = 6e-5

eval_interval = 1000
snapshot_interval = 5000
