"""Reads folders with the `transformers` that runs it: prints, of each one, the tokens and the logits of some texts.

python reading.py CLASS=FOLDER …
"""

import json
import sys

import torch
import transformers

TEXTS = ["my parcel is late", "please help with the password reset code now", " refund, Zürich 7"]


def read(auto_class: str, folder: str) -> dict[str, object]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    stored = getattr(transformers, auto_class).from_pretrained(folder, dtype="auto")
    dtype, model = str(stored.dtype), stored.float().eval()  # as a half rounds what each library adds in another order
    tokens = [dict(tokenizer(text)) for text in TEXTS]
    with torch.no_grad():
        rows = [model(**tokenizer(text, return_tensors="pt")).logits[0].tolist() for text in TEXTS]
    special = {name: tokenizer.convert_tokens_to_ids(found) for name, found in tokenizer.special_tokens_map.items()}
    sides = [tokenizer.padding_side, tokenizer.truncation_side, tokenizer.model_max_length]
    settings = [dtype, special, sides, tokenizer.decode(tokens[0]["input_ids"])]
    return {"tokens": tokens, "logits": rows, "settings": settings}


if __name__ == "__main__":
    found = {folder: read(auto_class, folder) for auto_class, folder in (one.split("=", 1) for one in sys.argv[1:])}
    json.dump({"version": transformers.__version__, "found": found}, sys.stdout)
