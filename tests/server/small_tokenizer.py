"""A real byte-level BPE tokenizer of a few hundred tokens, trained here, with control tokens and a ChatML template."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog. The end of the story, and then the beginning.\n",
    "system user assistant\nYou are a helpful assistant. Hello world! Hello there.\n",
    "def main():\n    return 'hello'\n\nprint(main())\n",
    "日本語のテキスト、日本語。 Привет, мир. 12345 67890\n",
]


@cache
def byte_level_bpe(bos: bool = False) -> Tokenizer:
    """Ids 0 to 3: <|im_start|>, <|im_end|>, <|mask|>, <s>; "<think>" is an added token that is not special."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|im_start|>", "<|im_end|>", "<|mask|>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 20, trainer)
    backend.add_tokens([AddedToken("<think>", normalized=False)])
    backend.add_special_tokens([AddedToken("<|late|>", normalized=False, special=True)])
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])
    return backend


def write_folder(folder: Path, template: str | None = TEMPLATE, bos: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    byte_level_bpe(bos).save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder
