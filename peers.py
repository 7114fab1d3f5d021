"""What bench.py measures beside ours: transformers, CTranslate2 and tiktoken, doing the same work.

Like beside like: shapes, inputs, number types and optimizer come from bench.py and are those of
ours; what would cost time and nothing else, dropout, is off. Weights are random: speed does not
depend on what they have learned.
"""

import os
from tempfile import TemporaryDirectory

from engine.measure import dimensions, figure, machine_for, timed

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def transformers_gpt2(vocab_size: int, block_size: int, n_layer: int, n_head: int, n_embd: int):
    """GPT-2 of the transformers library in that shape, without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = dict(vocab_size=vocab_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    shape |= dict(n_positions=block_size, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(GPT2Config(**shape, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def transformers_loss(model, tokens, targets):
    """The mean loss that ours gives for the same batch."""
    from torch.nn.functional import cross_entropy

    return cross_entropy(model(tokens).logits.float().flatten(0, 1), targets.flatten())


def transformers(s, dtype: str, compiled: bool = False) -> dict:
    """Greedy tokens behind a prompt of one; `compiled`: with a cache of a fixed size, for which
    `generate` compiles its step on a GPU."""
    import torch

    here, tokens = machine_for(dtype, gpu=compiled), s.tokens
    model = transformers_gpt2(**dimensions(s)).eval().to(here.device, here.dtype)
    prompt = torch.zeros(1, 1, dtype=torch.long, device=here.device)
    options = dict(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    options |= dict(attention_mask=torch.ones_like(prompt), pad_token_id=0)
    options |= dict(cache_implementation="static") if compiled else {}
    return figure(tokens / timed(s.calls, lambda: model.generate(prompt, **options)), "tokens/s")


def ctranslate2(s, dtype: str, samples: int = 1) -> dict:
    """The same with CTranslate2, on a CPU, for a batch, its weights in `dtype`: float32 or int8."""
    from ctranslate2 import Generator
    from ctranslate2.converters import TransformersConverter
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    # a vocabulary of the right size: speed does not depend on what the tokens mean
    vocab = {f"t{i}": i for i in range(s.vocab_size)}
    words = Tokenizer(models.BPE(vocab, []))
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "t0")
    with TemporaryDirectory() as folder:
        # the converter reads a folder in Hugging Face layout, tokenizer included
        transformers_gpt2(**dimensions(s)).save_pretrained(f"{folder}/hf")
        PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(f"{folder}/hf")
        TransformersConverter(f"{folder}/hf").convert(f"{folder}/ct2", quantization=dtype)
        generator = Generator(f"{folder}/ct2", "cpu", intra_threads=CORES)
    options = dict(max_length=s.tokens, min_length=s.tokens, sampling_topk=1)
    seconds = timed(s.calls, lambda: generator.generate_batch([["t1"]] * samples, **options))
    return figure(samples * s.tokens / seconds, "tokens/s")


def tiktoken_encode(text: str, name: str) -> int:
    """Tokens of `text`, counted by tiktoken's batch call on all cores, in parts of a megabyte."""
    import tiktoken

    parts = [text[i : i + 1_000_000] for i in range(0, len(text), 1_000_000)]
    encoding = tiktoken.get_encoding(name)
    return sum(map(len, encoding.encode_ordinary_batch(parts, num_threads=CORES)))
