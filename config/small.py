# The default: a small model of Python code, trained on the standard library of this machine.
#
#     python train.py config/small.py
#
# Expected result: 1.32 bits per byte of unseen files (xz -9e 1.69, gzip -9 1.95) after all
# steps, and 1.48 after 1,000; the figures of another Python's library differ. A slow machine makes
# fewer steps, as many as fit into `minutes` by its speed until the rate begins to fall; if it
# becomes slower after that, they take longer.

data = "data/python"

block_size = 128  # short windows, and more of them, teach more than long ones (docs/speed.md)
n_layer = 2  # two layers read more than four: in the same time, these learn less
n_head = 4
n_embd = 128
qkv_bias = True  # so a head can look one back whatever stands there, with which copying begins
logit_cap = 0  # without a cap a step takes a sixth less, and teaches as much

steps = 2250
minutes = 3.5  # of the whole command; 0 makes all steps, however long they take
batch_tokens = 16 * 128
lr = 0.014
weight_decay = 0.2
decay = 0.8
grad_clip = 0  # Muon and AdamW take steps of their own length, whatever the gradient's
eval_every = 1500
save_every = 750
log_every = 25
sample_prompt = "def "
