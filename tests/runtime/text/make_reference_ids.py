"""Writes `reference_ids.json`: what llama.cpp makes of every line of the corpus with a GGUF file's tokenizer.

    python make_reference_ids.py SmolLM2-135M-Instruct.Q4_1.gguf

Runs with any Python that has llama-cpp-python; nothing of Treadle is imported. The ids themselves would be large, so
each line keeps a CRC-32 of its ids, written as decimal numbers with spaces between.
"""

import json
import sys
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import corpus


def checksum(ids: list[int]) -> int:
    return zlib.crc32(" ".join(map(str, ids)).encode())


def main(model: str) -> None:
    import llama_cpp

    llama = llama_cpp.Llama(model, vocab_only=True, verbose=False)
    lines = corpus.lines()
    plain = [llama.tokenize(line.encode(), add_bos=False, special=False) for line in lines]
    special = [llama.tokenize(line.encode(), add_bos=False, special=True) for line in lines]
    reference = {
        "source": f"llama-cpp-python {llama_cpp.__version__}",
        "model": Path(model).name,
        "corpus": zlib.crc32("\0".join(lines).encode()),
        "num_lines": len(lines),
        "num_ids": sum(map(len, plain)),
        "plain": [checksum(ids) for ids in plain],
        "special": {i: checksum(ids) for i, ids in enumerate(special) if ids != plain[i]},
    }
    Path(__file__).with_name("reference_ids.json").write_text(json.dumps(reference) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
