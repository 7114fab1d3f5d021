# The default: a small model of Python code, trained on the standard library of this machine.
#
#     python train.py config/small.py
#
# Expected result: 1.36 bits per byte of unseen files (xz -9e 1.69, gzip -9 1.95) after all
# steps; the figures of another Python's library differ. A slow machine makes fewer steps, as many
# as fit into `minutes` by its speed until the rate begins to fall; if it becomes slower after that,
# they take longer. Two shared cores with AVX2 made 1,315 and came to 1.49, and beside a busy
# process 544, for 1.66; two with AMX made 2,823, for 1.37.

data = "data/python"

block_size = 128  # of 1,536 tokens a step, twelve short windows teach more than six long ones
n_layer = 2  # and read more: in the same time, four layers learn less (docs/speed.md)
n_head = 4
n_embd = 128

steps = 3000
minutes = 3.5  # of the whole command; 0 makes all steps, however long they take
batch_tokens = 6 * 256
lr = 0.02
decay = 0.8
grad_clip = 0  # Muon and AdamW take steps of their own length, whatever the gradient's
eval_every = 2000
save_every = 1000
log_every = 25
sample_prompt = "def "
