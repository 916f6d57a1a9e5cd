"""Streaming decode: whatever the cut, the pieces are whole characters and together the decode of all tokens."""

import itertools
import random
import resource

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from worker_orcd._text import TextDecoder
from worker_orcd.errors import InvalidRequest
from worker_orcd.tokenizer.stream import WindowStreamDecoder
from worker_orcd.tokenizer.tokenizer import Tokenizer
from worker_orcd.tokenizer.vocab import Vocab

#: text of many scripts, in which vocabularies have tokens for parts of a character
MULTIBYTE = [
    "東京タワーは333メートルです。", "春眠不覺曉，處處聞啼鳥。", "한국어 문장은 띄어쓰기를 합니다.",
    "𠮷野家で𩸽を食べる", "\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 family",
    "\U0001f636\u200d\U0001f32b\ufe0f in clouds",
    "\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f",
    "\U0001f1ef\U0001f1f5\U0001f1e9\U0001f1ea", "\U0001f44d\U0001f3fd\U0001f44d\U0001f3ff",
    "1\ufe0f\u20e32\ufe0f\u20e3", "السلام عليكم ورحمة الله وبركاته", "بِسْمِ ٱللَّهِ ٱلرَّحْمَٰنِ",
    "שָׁלוֹם עֲלֵיכֶם", "नमस्ते दुनिया", "বাংলা ভাষা", "தமிழ் மொழி", "ภาษาไทยไม่เว้นวรรค",
    "សួស្តី\u200bពិភពលោក", "မြန်မာဘာသာ", "བོད་སྐད་", "ქართული ენა", "Հայերեն լեզու", "ελληνικά",
    "Съешь ещё этих мягких булок", "e\u0301a\u0300o\u0302n\u0303", "Z\u0351\u036b\u0343\u036a\u0302a\u0357lgo",
    "\u1e9b\u0323 \ufb01 \u2126", "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝒮𝒸𝓇𝒾𝓅𝓉",
    "a\u00a0b\u2003c\ufeffd\u202ee\U0010fffd",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizers(goldens_dir):
    loaded = {}

    def get(name, model_path):
        if name not in loaded:
            if name == "gpt-oss":
                path = model_path("qwen").parent / "gpt-oss-tokenizer" / "tokenizer.json"
                if not path.is_file():
                    pytest.skip(f"{path} is not there")
            else:
                path = goldens_dir / "tokenizers" / f"{name}.gguf"
            loaded[name] = Tokenizer.from_file(path)
        return loaded[name]

    return get


def pieces(stream, ids):
    return [*map(stream.push, ids), stream.flush()]


def test_thirty_cases():
    assert len(set(MULTIBYTE)) == 30


@pytest.mark.parametrize("name", ["qwen2", "gpt-oss", "llama-spm", "phi-3", "gpt-2"])
@pytest.mark.parametrize("text", MULTIBYTE, ids=range(30))
def test_multibyte_text_streams_whole_characters(name, text, tokenizers, model_path):
    tokenizer = tokenizers(name, model_path)
    ids = tokenizer.encode(text, add_bos=False)
    got = pieces(tokenizer.stream(), ids)
    assert "".join(got) == text == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in got)


def test_the_cases_do_split_characters(tokenizers, model_path):
    """Otherwise the test above shows nothing: in most cases some token must end inside a character."""
    tokenizer = tokenizers("qwen2", model_path)
    split = sum("" in pieces(tokenizer.stream(), tokenizer.encode(t))[:-1] for t in MULTIBYTE)
    print(f"{split} of 30 texts have a token that ends inside a character")
    assert split >= 10


@pytest.mark.parametrize("name", ["qwen2", "gpt-oss", "llama-spm"])
def test_any_tokens_stream_as_they_decode(name, tokenizers, model_path):
    """Random ids are mostly ill-formed UTF-8: both ways must put U+FFFD in the same places."""
    tokenizer, rng = tokenizers(name, model_path), random.Random(7)
    lead = [i for i in range(min(tokenizer.n_vocab, 40_000)) if "\ufffd" in tokenizer.decode([i])]
    for _ in range(300):
        ids = [rng.choice(lead) if rng.random() < 0.7 else rng.randrange(tokenizer.n_vocab) for _ in range(12)]
        for skip, continues in itertools.product((False, True), repeat=2):
            stream = tokenizer.stream(skip_special=skip, continues=continues)
            whole = tokenizer.decode(ids, skip_special=skip, continues=continues)
            assert "".join(pieces(stream, ids)) == whole, (ids, skip, continues)


def _bytes_table(strip_space=False):
    return Vocab(bytes(range(256)), [1] * 256, {0}, strip_space).table


def test_dangling_bytes_become_one_replacement():
    for cut in (1, 2, 3):
        stream = TextDecoder(_bytes_table(), False, False)
        assert [stream.push(b) for b in "a\U0001f600".encode()[: 1 + cut]] == ["a", *[""] * cut]
        assert stream.flush() == "\ufffd"
        assert stream.flush() == ""
        assert stream.push(ord("b")) == "b", "a flushed stream starts anew"


def test_invalid_bytes_in_the_middle():
    """One U+FFFD for each maximal part of an ill-formed sequence, as soon as it is known to be one."""
    stream = TextDecoder(_bytes_table(), False, False)
    got = [stream.push(b) for b in b"\xf0\x9fa\xff\xc3(\xe2\x82"]
    assert got == ["", "", "\ufffda", "\ufffd", "", "\ufffd(", "", ""]
    assert stream.flush() == "\ufffd"


def test_leading_space_is_taken_off_once():
    stream = TextDecoder(_bytes_table(strip_space=True), True, False)
    assert [stream.push(b) for b in b"\0  a a"] == ["", "", " ", "a", " ", "a"]
    assert TextDecoder(_bytes_table(strip_space=True), True, True).push(32) == " "


def resident_bytes():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def test_work_per_token_does_not_grow():
    """A long stream holds nothing but an unfinished character."""
    stream = TextDecoder(_bytes_table(), False, False)
    before = resident_bytes()
    for i in range(100_000):
        stream.push(97 + i % 26)
    assert stream.push(0xC3) == "" and stream.push(0xA9) == "é" and stream.flush() == ""
    assert resident_bytes() - before < 1 << 20


def test_negative_id_is_refused():
    with pytest.raises(InvalidRequest):
        TextDecoder(_bytes_table(), False, False).push(-1)


# --- decoders that are no table of bytes ---------------------------------------------------------------------------


@pytest.fixture
def word_pieces(tmp_path):
    vocab = ["[UNK]", "hello", "##ing", "world", ",", "##s", "日", "##本"]
    library = Library(models.WordPiece({t: i for i, t in enumerate(vocab)}, unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece(cleanup=False)
    library.save(str(tmp_path / "tokenizer.json"))
    return Tokenizer.from_file(tmp_path)


def test_unknown_decoder_streams_through_a_window(word_pieces):
    assert isinstance(word_pieces.stream(), WindowStreamDecoder)
    rng = random.Random(3)
    for _ in range(200):
        ids = [rng.randrange(1, 8) for _ in range(rng.randrange(1, 40))]
        assert "".join(pieces(word_pieces.stream(), ids)) == word_pieces.decode(ids)


def test_window_waits_for_characters_and_stays_small():
    longest = 0

    def decode(ids):
        nonlocal longest
        longest = max(longest, len(ids))
        return bytes(ids).decode("utf-8", "replace")

    stream = WindowStreamDecoder(decode)
    data = "aé日\U0001f600".encode() * 50
    assert "".join(pieces(stream, data)) == data.decode()
    for b in b"\xff" * 500:  # never a whole character: must not be held for ever
        stream.push(b)
    print(f"longest window {longest} tokens (limit {2 * WindowStreamDecoder.MAX_WINDOW})")
    assert longest <= 2 * WindowStreamDecoder.MAX_WINDOW


def test_window_refuses_negative_ids(word_pieces):
    with pytest.raises(InvalidRequest):
        word_pieces.decode([1, -5])
    assert word_pieces.decode([1, 999]) == "hello"
