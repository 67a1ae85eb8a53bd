"""A model of under 20,000 parameters and a data set that it can learn, made on the spot."""

import json
import random
from pathlib import Path

WORDS = {
    "refund": "refund money back return paid charge",
    "delivery": "parcel late courier box arrive ship",
    "login": "password login account locked reset code",
}
FILLER = "please my the i it was is now still help with for not and".split()


def write_model(
    folder: Path, num_layers: int = 3, *, width: int = 32, num_positions: int = 64, is_reversed: bool = False
) -> Path:
    """Writes a BERT folder (safetensors, config, tokenizer) and returns it; reversed, words have other ids."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    vocab = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *sorted({w for t in WORDS.values() for w in t.split()} | set(FILLER), reverse=is_reversed),
    ]
    raw = Tokenizer(models.WordPiece({word: i for i, word in enumerate(vocab)}, unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer()
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocab),
        hidden_size=width,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=num_positions,
    )
    folder.mkdir(parents=True, exist_ok=True)
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_bytewise_model(folder: Path, num_layers: int = 2) -> Path:
    """Writes a RoBERTa folder whose tokens are single bytes, and returns it."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import RobertaConfig, RobertaModel, RobertaTokenizer

    marks = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    vocab = {token: i for i, token in enumerate([*marks, *sorted(ByteLevel.alphabet())])}
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": num_layers, "num_attention_heads": 2, "intermediate_size": 48}
    config = RobertaConfig(vocab_size=len(vocab), max_position_embeddings=130, type_vocab_size=1, **sizes)
    RobertaModel(config).save_pretrained(folder)
    RobertaTokenizer(vocab=vocab, merges=[]).save_pretrained(folder)
    return folder


def write_language_model(folder: Path, num_layers: int = 3, *, num_padding: int = 0, is_reversed: bool = False) -> Path:
    """Writes a GPT-2 folder over the words of the data set and returns it.

    It has logits for so many more tokens than there are; reversed, words have other ids.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    known = sorted({w for t in WORDS.values() for w in t.split()} | set(FILLER), reverse=is_reversed)
    words = ["<end>", "<unk>", *known]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="<end>")
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": num_layers, "n_head": 2, "n_positions": 64}
    config = GPT2Config(vocab_size=len(words) + num_padding, bos_token_id=0, eos_token_id=0, **sizes)
    folder.mkdir(parents=True, exist_ok=True)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_data(folder: Path, seed: int = 0) -> dict[str, Path]:
    """Writes three splits of JSON Lines and returns their paths by name."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for split, per_class in (("train", 60), ("validation", 15), ("test", 20)):
        rows = []
        for label, words in WORDS.items():
            for _ in range(per_class):
                text = rng.choices(words.split(), k=3) + rng.choices(FILLER, k=rng.randint(2, 9))
                rng.shuffle(text)
                rows.append(json.dumps({"text": " ".join(text), "label": label}))
        rng.shuffle(rows)
        paths[split] = folder / f"{split}.jsonl"
        paths[split].write_text("\n".join(rows) + "\n")
    return paths


def write_entities(folder: Path) -> dict[str, Path]:
    """Writes the same splits as words, those that tell the class being entities of it, and returns their paths."""
    paths = write_data(folder)
    for path in paths.values():
        rows = []
        for line in path.read_text().splitlines():
            words = json.loads(line)["text"].split()
            kinds = [next((k for k, found in WORDS.items() if word in found.split()), None) for word in words]
            rows.append({"tokens": words, "tags": [f"B-{kind}" if kind else "O" for kind in kinds]})
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


def write_walks(folder: Path, seed: int = 0) -> dict[str, Path]:
    """Writes three splits in which nearly every word says what the next one is, and returns their paths by name."""
    rng = random.Random(seed)
    words = sorted({w for t in WORDS.values() for w in t.split()} | set(FILLER))
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for split, num_rows in (("train", 180), ("validation", 45), ("test", 60)):
        paths[split] = folder / f"{split}.jsonl"
        with paths[split].open("w") as file:
            for _ in range(num_rows):
                place, text = rng.randrange(len(words)), []
                for _ in range(rng.randint(5, 12)):
                    place = (place + (1 if rng.random() < 0.9 else rng.randrange(len(words)))) % len(words)
                    text.append(words[place])
                file.write(json.dumps({"text": " ".join(text)}) + "\n")
    return paths
