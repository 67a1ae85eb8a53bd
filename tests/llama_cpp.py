"""A real llama.cpp server on loopback, which tells log probabilities, with the real tiny Llama as a GGUF file."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from worker.engine.gguf_files import write_file
from worker.engine.loading import load_language_model, load_tokenizer

STORIES = Path(__file__).parents[2] / "shared" / "models" / "stories260k"
CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
needs_stories = pytest.mark.skipif(not STORIES.is_dir(), reason=f"the real tiny Llama is not at {STORIES}")


def write_gguf(folder: Path, path: Path, weights: str = "f32") -> Path:
    """Writes a Llama as one file and returns its path; a chat is what its messages say, one after the other."""
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = CHAT
    write_file(load_language_model(folder), tokenizer, path, weights, {})
    return path


@contextmanager
def serving(model: Path) -> Iterator[str]:
    """Yields the address of a server of a GGUF file: four answers at a time, all numbers in float32."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_parallel = 4
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.endpoint_metrics = True
    params.verbosity = 0
    server = xllamacpp.Server(params)
    try:
        yield server.listening_address
    finally:
        del server  # it ends with its object
