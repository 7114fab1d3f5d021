# The specimen: the smallest model whose attention can be read, for docs/learn. It repeats a string.
#
#     python prepare.py repeat --tokenizer=bytes
#     python train.py config/specimen.py
#     python -m lessons.specimen out/specimen
#
# Expected result: 99.99% of what stands behind the bar is right, 28.3 nats a line where 27.8 is the
# least that is possible. 2 min 24 s of one core of an AMD EPYC.

data = "data/repeat"

block_size = 64
n_layer = 2  # one to find out what stands where, one to look there
n_head = 4
n_embd = 32
rope_base = 100  # the slowest pair turns once in 200 tokens, which is far enough here
norm_weight = True  # heads of 8 channels look sharply only if their norms may grow

steps = 1500
batch_tokens = 64 * 64
dtype = "float32"
threads = "1"
eval_every = 1500
save_every = 1500
log_every = 50
sample_tokens = 20
sample_prompt = "nutshell|"
