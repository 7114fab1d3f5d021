"""What bench.py measures beside ours: transformers, CTranslate2 and tiktoken, doing the same work.

Like beside like: shapes, inputs, number types, loss and optimizer come from bench.py and are those
of ours; what would cost time and nothing else, dropout, is off. Weights are random: speed does not
depend on what they have learned.
"""

import json
import os
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def transformers_gpt2(vocab_size: int, block_size: int, n_layer: int, n_head: int, n_embd: int):
    """GPT-2 of the transformers library in that shape, without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = dict(vocab_size=vocab_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    shape |= dict(n_positions=block_size, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(GPT2Config(**shape, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def transformers_decoder(shape: dict, tokens: int, here) -> Callable[[], None]:
    """A function that writes `tokens` greedy tokens behind a prompt of one."""
    import torch

    model = transformers_gpt2(**shape).eval().to(here.device, here.dtype)
    prompt = torch.zeros(1, 1, dtype=torch.long, device=here.device)
    options = dict(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    options |= dict(attention_mask=torch.ones_like(prompt), pad_token_id=0)

    def decode() -> None:
        model.generate(prompt, **options)

    return decode


@contextmanager
def ctranslate2_decoder(shape: dict, tokens: int, dtype: str):
    """The same with CTranslate2, on a CPU, its weights in `dtype`: float32 or int8."""
    import ctranslate2

    with TemporaryDirectory() as folder:
        # the converter reads a folder in Hugging Face layout, tokenizer included
        transformers_gpt2(**shape).save_pretrained(f"{folder}/hf")
        write_tokenizer(Path(folder) / "hf", shape["vocab_size"])
        converter = ctranslate2.converters.TransformersConverter(f"{folder}/hf")
        converter.convert(f"{folder}/ct2", quantization=dtype)
        generator = ctranslate2.Generator(f"{folder}/ct2", "cpu", intra_threads=CORES)

        def decode() -> None:
            options = dict(max_length=tokens, min_length=tokens, sampling_topk=1)
            generator.generate_batch([["t1"]], **options)

        yield decode


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A vocabulary of the right size: speed does not depend on what the tokens mean."""
    from tokenizers import Tokenizer, models

    end = "<|endoftext|>"
    vocab = {end: 0} | {f"t{i}": i for i in range(1, vocab_size)}
    Tokenizer(models.BPE(vocab, [])).save(str(folder / "tokenizer.json"))
    config = dict(tokenizer_class="PreTrainedTokenizerFast")
    config |= dict(eos_token=end, bos_token=end, unk_token=end)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def tiktoken_encode(text: str, name: str) -> int:
    """Tokens of `text`, counted by tiktoken's batch call on all cores, in parts of a megabyte."""
    import tiktoken

    parts = [text[i : i + 1_000_000] for i in range(0, len(text), 1_000_000)]
    encoding = tiktoken.get_encoding(name)
    return sum(map(len, encoding.encode_ordinary_batch(parts, num_threads=CORES)))
