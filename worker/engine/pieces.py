"""Tokenizers with fewer tokens, which read every text that uses the others as before, and any other text in pieces."""

import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from core.errors import StageFailed
from worker.engine.loading import load_tokenizer

BYTE_TOKENS = {f"<0x{number:02X}>" for number in range(256)}
OWN_LISTS = ("vocab.txt", "vocab.json", "merges.txt")  # beside tokenizer.json, and not needed
Contents = dict[str, Any]


def keep_tokens(tokenizer: PreTrainedTokenizerBase, wanted: Iterable[int], folder: Path) -> list[int]:
    """Writes a tokenizer with the wanted tokens and those without which some text could not be read.

    Args:
        tokenizer: The one that has all of them.
        wanted: Ids of tokens; those without which they are not reached are added, and whatever is special.
        folder: Where it is written, as `load_tokenizer` reads it.

    Returns:
        The old id of each token, by its new id; the order stays.

    Raises:
        StageFailed: `export_unsupported` if the tokenizer is of a kind that is not known.
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    contents: Contents = json.loads(path.read_bytes())
    find = _KINDS.get(contents["model"]["type"])
    if find is None:
        message = f"A tokenizer of kind '{contents['model']['type']}' cannot be trimmed."
        raise StageFailed("export_unsupported", message, suggestion="Leave the stage out.")
    ids = tokenizer.get_vocab()
    names = {index: token for token, index in ids.items()}
    needed = find(contents, {names[index] for index in wanted if index in names})
    added = {token["content"] for token in contents["added_tokens"]}
    kept = sorted({ids[name] for name in needed | added | set(tokenizer.all_special_tokens)})
    new_ids = {names[old]: new for new, old in enumerate(kept)}
    _renumber(contents, new_ids)
    path.write_text(json.dumps(contents, ensure_ascii=False), encoding="utf-8")
    _renumber_config(folder / "tokenizer_config.json", {str(old): str(new) for new, old in enumerate(kept)})
    for name in OWN_LISTS:
        (folder / name).unlink(missing_ok=True)
    found = load_tokenizer(folder).get_vocab()
    if found != new_ids:
        message = f"A {type(tokenizer).__name__} does not load with fewer tokens."
        raise StageFailed("export_unsupported", message, suggestion="Leave the stage out.")
    return kept


def _of_words(contents: Contents, wanted: set[str]) -> set[str]:
    return wanted | {contents["model"]["unk_token"]}


def _of_pieces(contents: Contents, wanted: set[str]) -> set[str]:
    """Returns the wanted ones and every single letter, at the beginning of a word and inside it."""
    model = contents["model"]
    prefix = model["continuing_subword_prefix"]
    letters = {token for token in model["vocab"] if len(token.removeprefix(prefix)) == 1}
    return wanted | letters | {model["unk_token"]}


def _of_merges(contents: Contents, wanted: set[str]) -> set[str]:
    """Returns the wanted ones, all that they are merged from, and what no merge makes: letters, or bytes.

    The merges among these make the same tokens of a text as before: all that were made in it are among them, and the
    next one is still the first of those that are possible.
    """
    model = contents["model"]
    parts: dict[str, set[str]] = defaultdict(set)
    for pair in list_merges(model):
        parts[_join(model, pair)] |= {*pair}
    needed, new = set(), wanted | _list_first(contents, set(model["vocab"]) - parts.keys())
    while new:
        needed |= new
        new = {part for token in new for part in parts[token]} - needed
    return needed


def _of_scores(contents: Contents, wanted: set[str]) -> set[str]:
    """Returns the wanted ones and every single letter, or bytes."""
    model = contents["model"]
    letters = {token for token, _ in model["vocab"] if len(token) == 1}
    return wanted | _list_first(contents, letters) | {model["vocab"][model["unk_id"]][0]}


def _list_first(contents: Contents, letters: set[str]) -> set[str]:
    """Returns that of which any text can be made: the letters, of which none are needed where there are bytes."""
    model = contents["model"]
    known = {token for token, _ in model["vocab"]} if isinstance(model["vocab"], list) else set(model["vocab"])
    return BYTE_TOKENS & known if model.get("byte_fallback") and known >= BYTE_TOKENS else letters


_KINDS: dict[str, Callable[[Contents, set[str]], set[str]]] = {
    "WordLevel": _of_words,
    "WordPiece": _of_pieces,
    "BPE": _of_merges,
    "Unigram": _of_scores,
}


def list_merges(model: Contents) -> list[tuple[str, str]]:
    """Returns what is merged by a tokenizer of kind BPE, the first first."""
    return [tuple(merge.split(" ", 1) if isinstance(merge, str) else merge) for merge in model["merges"]]


def _join(model: Contents, pair: tuple[str, str]) -> str:
    first, second = pair
    return first + second.removeprefix(model.get("continuing_subword_prefix") or "")


def _renumber(contents: Contents, new_ids: dict[str, int]) -> None:
    """Leaves out what has no new id, and gives all else its new one."""
    model = contents["model"]
    if model["type"] == "Unigram":
        unknown = model["vocab"][model["unk_id"]][0]
        model["vocab"] = [[token, score] for token, score in model["vocab"] if token in new_ids]
        model["unk_id"] = new_ids[unknown]
    else:
        model["vocab"] = {token: new_ids[token] for token in model["vocab"] if token in new_ids}
    if model["type"] == "BPE":
        pairs = list_merges(model)
        model["merges"] = [[*pair] for pair in pairs if {*pair, _join(model, pair)} <= new_ids.keys()]
    for added in contents["added_tokens"]:
        added["id"] = new_ids[added["content"]]
    if contents.get("post_processor"):
        _renumber_processor(contents["post_processor"], new_ids)
    contents["padding"] = None  # holds an id, and is set where it is used


def _renumber_processor(processor: Contents, new_ids: dict[str, int]) -> None:
    for inner in processor.get("processors", []):
        _renumber_processor(inner, new_ids)
    for role in ("sep", "cls"):
        if role in processor:
            processor[role] = [processor[role][0], new_ids[processor[role][0]]]
    for special in processor.get("special_tokens", {}).values():
        special["ids"] = [new_ids[token] for token in special["tokens"]]


def _renumber_config(path: Path, new_ids: dict[str, str]) -> None:
    config = json.loads(path.read_bytes())
    if "added_tokens_decoder" in config:
        decoder: dict[str, Any] = config["added_tokens_decoder"]
        config["added_tokens_decoder"] = {new_ids[old]: token for old, token in decoder.items() if old in new_ids}
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def renumber_ids(config: Any, kept: Collection[int]) -> None:
    """Gives the special tokens that a config names, as `eos_token_id`, their new ids."""
    new_ids = {old: new for new, old in enumerate(kept)}
    for name, value in vars(config).items():
        if name.endswith("_token_id") and isinstance(value, int):
            setattr(config, name, new_ids.get(value, value))
        elif name.endswith("_token_id") and isinstance(value, list):
            setattr(config, name, [new_ids.get(old, old) for old in value])
