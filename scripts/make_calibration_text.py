"""Make lmdeploy/assets/calibration.txt: text that the embedded model writes (fixed seeds), and the prose of this project's own documents.

    PYTHONPATH=. python scripts/make_calibration_text.py

Nobody else's text is in it. Run it again when the embedded model changes.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

from lmdeploy import GenerationConfig, TurbomindEngineConfig, pipeline

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "lmdeploy" / "assets" / "calibration.txt"
PAGES = ("README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/start.md", "docs/pipeline.md", "docs/serve.md", "docs/add-a-model.md")
HEROES = ("a fox", "a king", "a small boat", "a girl with a lamp", "two brothers", "an old clock", "a bear in winter", "a baker", "the moon", "a brave mouse")
PLACES = ("in a forest", "by the sea", "in a village", "on a hill", "in a big city", "at night", "at school", "in the garden")
OTHERS = (
    "Count from 1 to 20.", "My name is Ann. What is my name?", "What is 17 plus 25?", "Write a JSON object with a name and an age.", "What is the capital of France?",
    "Tell me about the sun.", "Say hello in Chinese.", "Repeat after me: the quick brown fox jumps over the lazy dog.", "你好", "What can you do?",
)  # fmt: skip
LIMIT = 190_000


def prose(text: str) -> str:
    """A page without code blocks and tables."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return "\n".join(line for line in text.splitlines() if not line.startswith(("|", "<"))).strip()


def main() -> None:
    """Write the file."""
    prompts = [f"Tell me a story about {hero} {place}." for hero in HEROES for place in PLACES] * 3 + list(OTHERS) * 2
    random.Random(0).shuffle(prompts)
    parts = [prose((ROOT / page).read_text(encoding="utf-8")) for page in PAGES]
    with pipeline(str(ROOT / "lmdeploy/assets/tiny-internlm2-chat"), backend_config=TurbomindEngineConfig(dtype="float32", session_len=1024)) as pipe:
        configs = [GenerationConfig(max_new_tokens=700, do_sample=True, temperature=0.9, top_p=0.95, random_seed=i) for i in range(len(prompts))]
        for prompt, answer in zip(prompts, pipe(prompts, gen_config=configs), strict=True):
            parts.append(f"{prompt}\n\n{answer.text.strip()}")
    # pages and answers take turns, so that the end, which is held out for perplexity, is like the rest
    pages, answers = parts[: len(PAGES)], parts[len(PAGES) :]
    share = -(-len(answers) // len(pages))
    mixed = [text for i, page in enumerate(pages) for text in (page, *answers[i * share : (i + 1) * share])]
    TARGET.write_text("\n\n".join(mixed)[:LIMIT] + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
