"""Loss, perplexity and bits per byte of GPT-2 on a data set in its tokens; trains nothing.

python train.py config/eval_gpt2.py
python train.py config/eval_gpt2.py --init_from=gpt2-xl --dataset=mine

Hardware: any; loss and time are not yet measured. Downloads GPT-2's weights.
"""

init_from = "gpt2"
eval_only = True
dataset = "shakespeare"

batch_size = 8
eval_tokens = 100_000_000  # all of the split
dtype = "float32"  # GPT-2's logits are near -100, where bfloat16 is too coarse
