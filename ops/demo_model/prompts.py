"""The examination of the demo model: 32 prompts, 8 kinds in 4 languages, each with a predicate written by hand.

The table was fixed before the training. A held-out prompt never occurs in the corpus.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

Predicate = Callable[[str], bool]

HELD_OUT_SUMS = frozenset({(17, 25), (23, 18), (31, 14), (12, 29)})
HELD_OUT_RANGES = frozenset({(6, 19), (7, 16), (4, 15), (9, 21)})

LONG_STREAM_TOKENS = 200

VIETNAMESE_LETTERS = re.compile("[ăâđêôơưạảấầẩẫậắằẳẵặẹẻẽếềểễệỉịọỏốồổỗộớờởỡợụủứừửữựỳỵỷỹ]", re.IGNORECASE)
LANGUAGE_TESTS: dict[str, Predicate] = {
    "en": lambda text: text.isascii() and bool(re.search(r"\b(the|a|is|of|that|am)\b", text)),
    "ja": lambda text: bool(re.search("[ぁ-んァ-ヶ]", text)),
    "zh": lambda text: bool(re.search("[一-鿿]", text)) and not re.search("[ぁ-んァ-ヶ]", text),
    "vi": lambda text: bool(VIETNAMESE_LETTERS.search(text)),
}


@dataclass(frozen=True, slots=True)
class Examination:
    """One prompt of the table. `wrong` is a plausible answer that the predicate must reject."""

    kind: str
    language: str
    prompt: str
    is_held_out: bool
    passes: Predicate
    wrong: str


def counts(first: int, last: int) -> Predicate:
    """True for an answer whose numbers are exactly first..last in order and that has no other words."""
    expected = [str(number) for number in range(first, last + 1)]
    return lambda text: re.findall(r"\d+", text) == expected and not re.search(r"[^\W\d]", text)


def results_in(value: int) -> Predicate:
    """True for an answer whose last number is the value."""
    return lambda text: re.findall(r"\d+", text)[-1:] == [str(value)]


def says(language: str, *groups: str) -> Predicate:
    """True for a finished sentence in the language that has, of each group `a|b|c`, at least one word."""

    def passes(text: str) -> bool:
        is_finished = text.rstrip().endswith((".", "。", "!", "！"))
        has_words = all(re.search(group, text, re.IGNORECASE) for group in groups)
        return is_finished and has_words and LANGUAGE_TESTS[language](text)

    return passes


def _definitions() -> list[Examination]:
    kind = "deep learning"
    words = {"en": "layer|network", "ja": "層|ネットワーク", "zh": "层|网络", "vi": "lớp|mạng"}
    prompts = {
        "en": "What is deep learning?",
        "ja": "ディープラーニングとは何ですか？",
        "zh": "什么是深度学习？",
        "vi": "Học sâu là gì?",
    }
    wrong = "Redis is a fast database."
    return [Examination(kind, code, prompts[code], False, says(code, words[code]), wrong) for code in prompts]


def _counts_to_ten() -> list[Examination]:
    prompts = {"en": "Count to 10", "ja": "10まで数えてください", "zh": "数到10", "vi": "Đếm đến 10"}
    wrong = "1, 2, 3, 4, 5, 6, 8, 7, 9, 10"
    return [Examination("count to ten", code, prompts[code], False, counts(1, 10), wrong) for code in prompts]


def _ranges() -> list[Examination]:
    rows = [
        ("en", "Please count from 6 to 19.", 6, 19),
        ("ja", "7から16まで数えてください。", 7, 16),
        ("zh", "请从4数到15。", 4, 15),
        ("vi", "Hãy đếm từ 9 đến 21.", 9, 21),
    ]
    return [
        Examination("count a range", code, prompt, True, counts(first, last), "1, 2, 3")
        for code, prompt, first, last in rows
    ]


def _networks() -> list[Examination]:
    rows = [
        ("en", "Would you kindly explain to me what a neural network is?", "layer|neuron", "weight|learn"),
        ("ja", "ニューラルネットワークというものを、やさしく教えていただけますか？", "層|ニューロン", "重み|学"),
        ("zh", "能不能给我简单讲讲神经网络是什么？", "层|神经元", "权重|学"),
        ("vi", "Bạn hãy giải thích giúp tôi mạng nơ-ron là gì nhé?", "lớp|nơ-ron", "trọng số|học"),
    ]
    wrong = "A queue is a line of jobs."
    return [
        Examination("neural network", code, prompt, True, says(code, first, second), wrong)
        for code, prompt, first, second in rows
    ]


def _sums() -> list[Examination]:
    rows = [
        ("en", "What is 17 + 25?", 42),
        ("ja", "23足す18は？", 41),
        ("zh", "31加14等于多少？", 45),
        ("vi", "12 cộng 29 bằng bao nhiêu?", 41),
    ]
    return [
        Examination("sum", code, prompt, True, results_in(value), f"17 + 25 = {value - 10}")
        for code, prompt, value in rows
    ]


def _uses() -> list[Examination]:
    rows = [
        ("en", "Can you say what a GPU is used for?", "matri|parallel|fast"),
        ("ja", "GPUはどんなことに使われますか？", "行列|並列|速"),
        ("zh", "GPU主要用来做什么？", "矩阵|并行|快"),
        ("vi", "Người ta dùng GPU để làm gì?", "ma trận|song song|nhanh"),
    ]
    wrong = "A GPU is a small animal that lives in the sea."
    return [Examination("use of a GPU", code, prompt, True, says(code, words), wrong) for code, prompt, words in rows]


def _capitals() -> list[Examination]:
    rows = [
        ("en", "Could you tell me the capital of Japan?", "Tokyo"),
        ("ja", "ベトナムの首都の名前を教えてください。", "ハノイ"),
        ("zh", "请问法国的首都是哪个城市？", "巴黎"),
        ("vi", "Cho tôi biết thủ đô của Trung Quốc.", "Bắc Kinh"),
    ]
    wrong = "The capital of France is Rome."
    return [Examination("capital", code, prompt, True, says(code, city), wrong) for code, prompt, city in rows]


def _identities() -> list[Examination]:
    rows = [
        ("en", "Who are you?", "demo"),
        ("ja", "あなたは誰ですか？", "デモ"),
        ("zh", "你是谁？", "演示"),
        ("vi", "Bạn là ai?", "minh họa"),
    ]
    wrong = "I am a very large assistant that knows all things."
    return [Examination("who are you", code, prompt, False, says(code, word), wrong) for code, prompt, word in rows]


def examinations() -> list[Examination]:
    """The 32 rows of the table, kind by kind."""
    makers = (_definitions, _counts_to_ten, _ranges, _networks, _sums, _uses, _capitals, _identities)
    return [row for maker in makers for row in maker()]


def raw_prompts() -> list[Examination]:
    """Prompts of the plain generate route, which sees no chat template: all of them are in the corpus."""
    kind, wrong = "raw text", "Deep learning deep learning"
    words = {"en": "layer|network", "ja": "層|ネットワーク", "zh": "层|网络", "vi": "lớp|mạng"}
    prompts = [
        ("en", "What is Deep Learning?"),
        ("en", "What is deep learning?"),
        ("ja", "ディープラーニングとは何ですか？"),
        ("zh", "什么是深度学习？"),
        ("vi", "Học sâu là gì?"),
    ]
    return [Examination(kind, code, prompt, False, says(code, words[code]), wrong) for code, prompt in prompts]


def long_streams() -> list[Examination]:
    """Prompts whose answers are long: at least LONG_STREAM_TOKENS tokens. Those over 100 show where the model ends."""
    counting = [
        ("en", "Count to 100", 100),
        ("ja", "100まで数えてください", 100),
        ("zh", "数到100", 100),
        ("vi", "Đếm đến 100", 100),
        ("en", "Count to 150", 150),
        ("ja", "150まで数えてください", 150),
    ]
    reciting = [
        ("en", "Explain deep learning in detail.", "layers", "gradient"),
        ("ja", "ディープラーニングについて詳しく説明してください", "層", "勾配"),
        ("zh", "请详细解释深度学习。", "层", "梯度"),
        ("vi", "Hãy giải thích chi tiết về học sâu.", "lớp", "gradient"),
        ("en", "Tell me a story.", "token", "keeper"),
        ("ja", "物語を話してください。", "トークン", "番人"),
    ]
    counted = [
        Examination("long" if last <= 100 else "over 100", code, text, False, counts(1, last), "1, 2, 3")
        for code, text, last in counting
    ]
    recited = [Examination("long", code, text, False, says(code, *words), "Hm.") for code, text, *words in reciting]
    return counted + recited


def held_out_prompts() -> list[str]:
    """The prompts that must not occur in the corpus."""
    return [row.prompt for row in examinations() if row.is_held_out]
