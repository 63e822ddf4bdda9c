"""Tokenizers of three file formats against the libraries they come from, and against broken folders."""

from __future__ import annotations

import base64
import json
import shutil
import threading
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdeploy.errors import CheckpointError, RequestError
from lmdeploy.text import json_codec
from lmdeploy.text.rank_codec import FAMILIES
from lmdeploy.text.tokenizer import DetokenizeState, Tokenizer
from tests.text.samples import FOLDERS, INTERNLM2, LLAMA2, LLAMA3, QWEN, STORIES, TEXTS, TINY, tokenizer

JSON_FOLDERS = [TINY, STORIES]
SENTENCEPIECE_FOLDERS = [INTERNLM2, LLAMA2]


@pytest.mark.parametrize("folder", JSON_FOLDERS, ids=lambda f: f.name)
@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_json_gives_the_ids_and_the_text_of_transformers(folder: Path, text: str) -> None:
    import transformers

    ours = tokenizer(folder)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("folder", SENTENCEPIECE_FOLDERS, ids=lambda f: f.name)
@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_text_without_special_tokens_is_as_the_library_has_it(folder: Path, text: str) -> None:
    ours = tokenizer(folder)
    raw = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert ours.encode(text, split_special=False) == [raw.bos_id(), *raw.encode(text)]
    ids = ours.encode(text, add_bos=False, split_special=False)
    assert ours.decode(ids, skip_special_tokens=False) == raw.decode(ids) == text


@pytest.mark.parametrize("folder", [LLAMA3, QWEN], ids=lambda f: f.name)
@pytest.mark.parametrize("text", TEXTS)
def test_rank_files_give_the_ids_of_tiktoken(folder: Path, text: str) -> None:
    ours = tokenizer(folder)
    path = folder / ("tokenizer.model" if folder == LLAMA3 else "qwen.tiktoken")
    ranks = {base64.b64decode(a): int(b) for a, b in (line.split() for line in path.read_bytes().splitlines())}
    family = FAMILIES[len(ranks)]
    special = {content: len(ranks) + i for i, content in enumerate(family.special)}
    raw = tiktoken.Encoding("raw", pat_str=family.pattern, mergeable_ranks=ranks, special_tokens=special)
    assert ours.encode(text, add_bos=False) == raw.encode(text, allowed_special="all")
    assert ours.encode(text, add_bos=False, split_special=False) == raw.encode_ordinary(text)
    assert ours.decode(ours.encode(text), skip_special_tokens=False).removeprefix("<|begin_of_text|>") == text


def test_special_tokens_have_their_published_ids() -> None:
    internlm2, llama3, qwen = tokenizer(INTERNLM2), tokenizer(LLAMA3), tokenizer(QWEN)
    names = ["<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>", "<|im_end|>", "<|im_start|>"]
    assert [internlm2.token_id(n) for n in names] == list(range(92538, 92544))
    assert internlm2.encode("<|im_start|>user\n", add_bos=False) == [92543, 1008, 364]
    published = {
        "<|begin_of_text|>": 128000,
        "<|end_of_text|>": 128001,
        "<|reserved_special_token_0|>": 128002,
        "<|reserved_special_token_1|>": 128003,
        "<|finetune_right_pad_id|>": 128004,
        "<|reserved_special_token_2|>": 128005,
        "<|start_header_id|>": 128006,
        "<|end_header_id|>": 128007,
        "<|eom_id|>": 128008,
        "<|eot_id|>": 128009,
        "<|python_tag|>": 128010,
        "<|reserved_special_token_3|>": 128011,
        "<|reserved_special_token_247|>": 128255,
    }
    assert {n: llama3.token_id(n) for n in published} == published
    assert (llama3.vocab_size, llama3.bos_token_id, llama3.eos_token_id) == (128256, 128000, 128001)
    assert [qwen.token_id(n) for n in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|extra_0|>")] == [151643, 151644, 151645, 151646]
    assert (qwen.bos_token_id, qwen.vocab_size, len(qwen.special_ids)) == (None, 151851, 208)


@pytest.mark.parametrize("with_config", [True, False])
def test_internlm2_chat_tokens_are_found_without_an_id_table(tmp_path: Path, with_config: bool) -> None:
    tokenizer(INTERNLM2)
    shutil.copy(INTERNLM2 / "tokenizer.model", tmp_path)
    if with_config:
        (tmp_path / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}))
    found = Tokenizer(tmp_path)
    assert found.encode("<|im_start|>", add_bos=False) == [92543]
    assert 92542 in found.special_ids and found.vocab_size == 92544


def test_text_that_begins_with_bos_does_not_get_a_second_one() -> None:
    for folder, bos in ((TINY, "<s>"), (LLAMA2, "<s>"), (LLAMA3, "<|begin_of_text|>")):
        ours = tokenizer(folder)
        ids = ours.encode(bos + "Hello")
        assert ids[0] == ours.bos_token_id and ids.count(ids[0]) == 1
        assert ours.encode("Hello")[0] == ours.bos_token_id
        assert ours.encode("Hello", add_bos=False)[0] != ours.bos_token_id


def test_add_bos_token_of_the_config_is_obeyed(tmp_path: Path) -> None:
    shutil.copy(TINY / "tokenizer.json", tmp_path)
    assert Tokenizer(tmp_path).encode("a")[0] == 1  # the post-processor of tokenizer.json puts it there
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "add_bos_token": False}))
    assert Tokenizer(tmp_path).encode("a")[0] != 1


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_user_text_can_be_encoded_without_special_tokens(folder: Path) -> None:
    ours = tokenizer(folder)
    words = [ours.token_text(i) for i in sorted(ours.special_ids)[:12]]
    text = " hi ".join(words)
    assert set(ours.encode(text)) & (ours.special_ids - {ours.bos_token_id})
    safe = ours.encode(text, add_bos=False, split_special=False)
    assert not set(safe) & ours.special_ids
    assert ours.decode(safe) == text


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_guarded_special_tokens_are_ordinary_text_and_others_are_not(folder: Path) -> None:
    ours = tokenizer(folder)
    word = ours.token_text(max(ours.special_ids))
    guarded = ours.guard(f"a {word}{word} b")
    ids = ours.encode(f"{word}x{guarded}", add_bos=False)
    assert ids[0] == max(ours.special_ids) and not set(ids[1:]) & ours.special_ids
    assert ours.decode(ids).replace(" ", "") == f"xa{word}{word}b"
    assert (
        ours.encode(guarded, add_bos=False, split_special=False) == ours.encode(f"a {word}{word} b", add_bos=False, split_special=False)
        or folder in JSON_FOLDERS
    )
    assert ours.guard(guarded) == guarded and ours.guard("plain \ue0f0 text") == "plain \ue0f0 text"
    assert ours.decode(ours.encode("plain \ue0f0 text \ue0f1")) == "plain \ue0f0 text \ue0f1"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_bytes_of_the_pieces_are_the_text(folder: Path) -> None:
    ours = tokenizer(folder)
    for text in TEXTS:
        joined = b"".join(ours.token_bytes(i) for i in ours.encode(text, add_bos=False))
        assert joined.removeprefix(b" " if ours.strip_first_space else b"").decode() == text
    assert ours.token_bytes(ours.vocab_size + 7) == b"" == ours.token_bytes(-1) and ours.token_text(-1) == ""


def test_llama2_has_a_space_after_special_tokens_unless_the_config_says_legacy_false(tmp_path: Path) -> None:
    tokenizer(LLAMA2)
    raw = sentencepiece.SentencePieceProcessor(model_file=str(LLAMA2 / "tokenizer.model"))
    shutil.copy(LLAMA2 / "tokenizer.model", tmp_path)
    assert Tokenizer(tmp_path).encode("<s>Hi") == [1, raw.piece_to_id("▁Hi")]
    (tmp_path / "tokenizer_config.json").write_text('{"legacy": false}')
    assert Tokenizer(tmp_path).encode("<s>Hi") == [1, raw.piece_to_id("Hi")]
    assert Tokenizer(tmp_path).encode("Hi") == [1, raw.piece_to_id("▁Hi")]


def test_spaces_between_special_tokens_can_be_left_out() -> None:
    ours = tokenizer(LLAMA2)
    ids = ours.encode("a</s>b")
    assert ours.decode(ids, skip_special_tokens=False) == "<s> a</s> b"
    assert ours.decode(ids, skip_special_tokens=False, spaces_between_special_tokens=False) == "<s>a</s>b"


def test_added_tokens_beyond_the_vocabulary_file_get_their_ids(tmp_path: Path) -> None:
    tokenizer(LLAMA2)
    shutil.copy(LLAMA2 / "tokenizer.model", tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 32000, "<image>": 32005}')
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": {"content": "<pad>"}}')
    found = Tokenizer(tmp_path)
    assert found.vocab_size == 32006
    assert found.encode("<image>", add_bos=False) == [32005]
    assert 32000 in found.special_ids and 32005 not in found.special_ids
    assert found.decode([32000, 32005]) == "<image>"


def test_tokens_that_only_the_config_names_are_added_to_tokenizer_json(tmp_path: Path) -> None:
    shutil.copy(TINY / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"5120": {"content": "<|new|>", "special": true}}}')
    found = Tokenizer(tmp_path)
    assert found.encode("<|new|>", add_bos=False) == [5120] and 5120 in found.special_ids and found.vocab_size == 5121


def test_offset_decodes_the_continuation() -> None:
    for folder in (TINY, LLAMA2):
        ours = tokenizer(folder)
        ids = ours.encode("Hello there, 你好 world")
        for cut in range(1, len(ids)):
            whole, before = ours.decode(ids), ours.decode(ids[:cut])
            assert ours.decode(ids, offset=cut) == whole[len(before) :]


def test_detokenize_incrementally_keeps_its_place() -> None:
    ours = tokenizer(TINY)
    ids = ours.encode("Hi 你好 😀!")
    state, text = DetokenizeState(), ""
    for end in range(1, len(ids) + 1):
        new, state = ours.detokenize_incrementally(ids[:end], state)
        assert "\ufffd" not in new
        text += new
    assert text == "Hi 你好 😀!" and state.ids_offset == len(ids)


def test_indexes_containing_token_prefers_exact_pieces() -> None:
    ours = tokenizer(TINY)
    assert ours.indexes_containing_token("<|im_end|>") == [5118]
    comma = ours.indexes_containing_token(",")
    assert comma and all("," in ours.decode([i]) for i in comma)
    assert ours.indexes_containing_token("") == [] == ours.indexes_containing_token("no such piece at all")


def test_encode_batch_is_encode_of_each() -> None:
    for folder in FOLDERS:
        assert tokenizer(folder).encode_batch(TEXTS) == [tokenizer(folder).encode(t) for t in TEXTS]


def test_long_text_cut_in_pieces_gives_the_same_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = tokenizer(TINY)
    text = " ".join(TEXTS * 60) + "\n\n  x \n y\nz"
    whole = ours.encode(text)
    monkeypatch.setattr(json_codec, "CHUNK", 50)
    assert ours.encode(text) == whole


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab Z9.\n\t'好é!"), max_size=300))
def test_cuts_of_long_text_never_change_ids(text: str) -> None:
    ours = tokenizer(TINY)
    codec = ours.codec
    assert isinstance(codec, json_codec.JsonCodec)
    whole = codec._inner.encode(text, add_special_tokens=False).ids
    pieces: list[int] = []
    start = 0
    for match in [*json_codec.SAFE_CUT.finditer(text), None]:
        end = match.end() if match else len(text)
        pieces += codec._inner.encode(text[start:end], add_special_tokens=False).ids
        start = end
    assert pieces == whole


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_unfriendly_text_is_encoded_quickly(folder: Path) -> None:
    import time

    ours = tokenizer(folder)
    start = time.perf_counter()
    for text in ("a" * 100_000, " " * 100_000, "\n" * 100_000, "你" * 50_000, "x!" * 50_000, "'s" * 50_000):
        assert ours.decode(ours.encode(text)) == text
    assert time.perf_counter() - start < 10


def test_one_tokenizer_serves_many_threads() -> None:
    for folder in FOLDERS:
        ours = tokenizer(folder)
        wanted = [(ours.encode(t), ours.encode(t, split_special=False)) for t in TEXTS]
        wrong: list[str] = []

        def work(ours: Tokenizer = ours, wanted: list[tuple[list[int], list[int]]] = wanted, wrong: list[str] = wrong) -> None:
            for _ in range(20):
                wrong.extend(t for t, (a, b) in zip(TEXTS, wanted, strict=True) if ours.encode(t) != a or ours.encode(t, split_special=False) != b)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []


def test_lone_surrogates_and_wrong_types_are_request_errors() -> None:
    for folder in FOLDERS:
        with pytest.raises(RequestError, match="lone surrogate at position 2"):
            tokenizer(folder).encode("ab\ud800")
    with pytest.raises(RequestError, match="must be a str, not bytes"):
        tokenizer(TINY).encode(b"x")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has none of tokenizer.json"),
        ({"tokenizer.json": b"{"}, "tokenizer.json is not a usable"),
        ({"tokenizer.json": b'{"version": "1.0"}'}, "tokenizer.json is not a usable"),
        ({"tokenizer.model": b""}, "tokenizer.model is not a usable sentencepiece model"),
        ({"tokenizer.model": b"\x00\xff garbage"}, "tokenizer.model is not a usable sentencepiece model"),
        ({"tokenizer.model": b"YQ== 0\nYg== 1\n"}, "tokenizer.model holds 2 ranks"),
        ({"qwen.tiktoken": b"YQ== 0\n!!!\n"}, "qwen.tiktoken: line 2"),
        ({"qwen.tiktoken": b"YQ== 0\nYg== 7\n"}, "not 0..1"),
        ({"tokenizer_config.json": b"[1]", "tokenizer.json": b"{}"}, "tokenizer_config.json must hold a JSON object"),
        ({"tokenizer_config.json": b"{,}"}, "tokenizer_config.json is not valid JSON"),
        ({"tokenizer_config.json": b'{"added_tokens_decoder": {"x": {"content": "a"}}}'}, "has the id 'x'"),
        ({"added_tokens.json": b'{"a": 99999999999}'}, "ids must be in"),
        ({"tokenizer_config.json": b'{"added_tokens_decoder": {"1": {}}}'}, "has no 'content'"),
    ],
)
def test_broken_folders_are_named_in_one_line(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as caught:
        Tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_truncated_vocabularies_are_refused(tmp_path: Path) -> None:
    for folder, name in ((TINY, "tokenizer.json"), (INTERNLM2, "tokenizer.model"), (LLAMA3, "tokenizer.model"), (QWEN, "qwen.tiktoken")):
        tokenizer(folder)
        data = (folder / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        with pytest.raises(CheckpointError, match=name):
            Tokenizer(tmp_path)
        (tmp_path / name).unlink()


def test_unknown_decoders_are_refused_instead_of_decoded_wrongly(tmp_path: Path) -> None:
    inner = tokenizers.Tokenizer(tokenizers.models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    inner.decoder = tokenizers.decoders.WordPiece()
    inner.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="WordPiece"):
        Tokenizer(tmp_path)


def test_metaspace_tokenizers_decode_like_their_library(tmp_path: Path) -> None:
    vocab = {"<unk>": 0, "▁a": 1, "▁": 2, "a": 3, "b": 4, "<0xE4>": 5, "<0xBD>": 6, "<0xA0>": 7}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    inner.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Metaspace()])
    inner.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer(tmp_path)
    ids = ours.encode("ab a你b")
    assert ids == inner.encode("ab a你b").ids
    assert ours.decode(ids) == inner.decode(ids) == "ab a你b"


def test_text_knows_nothing_of_torch() -> None:
    import subprocess
    import sys

    code = "import sys, lmdeploy.text.tokenizer, lmdeploy.text.chat_template; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[2]).returncode == 0
