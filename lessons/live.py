"""The specimen in a browser: docs/learn/page.html, made from lessons/page.html and the weights.

Everything is inside, and the network is never asked. The model itself is there, in plain JavaScript
that says what model.py says for the parts that the specimen has, so it reads any text: type one,
see its tokens with their surprise, who looks where in each head, and what comes next at a
temperature. Weights are 16-bit whole numbers, each matrix with what they are multiplied by: half
the size, and no probability moves by a thousandth.
"""

import base64
import json
from pathlib import Path

import numpy as np

from lessons import PAGES, specimen

TEMPLATE = Path(__file__).with_name("page.html")
PAGE = PAGES / "page.html"
MARK = "/*SPECIMEN*/"
NEEDED = ("n_layer", "n_head", "n_embd", "head_dim", "block_size", "rope_base", "norm_eps")
LARGEST = 2**15 - 1


def content() -> str:
    net, tokenizer = specimen.load()
    config = {name: getattr(net.config, name) for name in (*NEEDED, "logit_cap")}
    config["end_of_text"] = tokenizer.end_of_text
    scales, numbers = [], b""
    for name, p in net.named_parameters():
        w = p.detach().double().numpy()
        scale = float(f"{np.abs(w).max() / LARGEST:.8g}")
        whole = np.rint(w / scale).clip(-LARGEST, LARGEST).astype("<i2")
        scales.append([name, scale, whole.size])
        numbers += whole.tobytes()
    data = dict(config=config, scales=scales, numbers=base64.b64encode(numbers).decode())
    return TEMPLATE.read_text(encoding="utf-8").replace(MARK, json.dumps(data))
