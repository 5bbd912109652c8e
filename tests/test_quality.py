"""How an answer is written: loops and sound repeats, languages mixed and foreign words that may be, thought, box and JSON."""

# ruff: noqa: RUF001 - full-width and foreign marks are meant

import time
from pathlib import Path

import pytest

from qvl.scoring.quality import has_one_box, is_json, keeps_thought_form, language_mix, repetition

ROOT = Path(__file__).resolve().parent.parent

REPETITIONS = [
    ("1 2 3 " * 30, True),
    ("\n".join(f"{i}. The cat is black." for i in range(1, 8)), True),
    ("1. the red car\n2. the blue car\n3. a dog\n4. a tree\n5. the sky\n6. one house", False),
    ("- yes\n- no\n- yes\n- yes\n- no\n", False),
    ("the cat " * 20, True),
    ("I see a dog. " * 10, True),
    ("The cat sat on the mat. " * 3, True),
    ("我认为答案是B。" * 6, True),
    ("哈哈", False),
    ("no no no no", False),
    ("ha ha ha", False),
    ("a" * 500, True),
    ("hahaha", False),
    ("haha" * 50, True),
    ("!" * 300, True),
    ("-" * 80, False),
    ("The answer is 5.", False),
    ("", False),
    ("Wait, let me check again. " * 2, False),
    ("Wait, let me check again. " * 5, True),
    ("Hmm. " * 10, True),
    ("0" * 50, False),
    ("0, " * 60, False),
    ("0 " * 1000, True),
    ("The image shows a red car and a blue car and a green car parked near a tree, a dog, a bench and a house.", False),
    (
        "["
        + ", ".join(f'{{"bbox_2d": [{i * 10}, {i * 7}, {i * 10 + 9}, {i * 7 + 8}], "label": "car"}}' for i in range(60))
        + "]",
        False,
    ),
    ("[" + ", ".join('{"bbox_2d": [10, 20, 30, 40], "label": "car"}' for i in range(30)) + "]", True),
    ("| a | b |\n|---|---|\n" + "| 0 | 0 |\n" * 8, False),
    ("<tr>" + "<td></td>" * 12 + "</tr>", False),
    ("<td></td>" * 300, True),
    (
        "Some sound text first, as an answer does begin. Then it goes on" + " and on" * 12,
        True,
    ),
    ("Intro. " + "\n".join(f"{i}. The object number {i} is a box." for i in range(1, 20)), False),
    ("\n".join(f"Step {i}: compute {i} + {i} = {2 * i}." for i in range(1, 30)), False),
    (
        "Row, row, row your boat, gently down the stream. Merrily, merrily, merrily, merrily, life is but a dream.",
        False,
    ),
    ("\\boxed{5}" * 5, True),
    ("A B C D " * 10, True),
    ("the " * 30, True),
    ("很" * 40, True),
    ("很好很好很好", False),
    ("<think>So the answer is B. But wait, let me look at the image again. The image shows a dog. " * 6, True),
    ("good " + "x" * 39, False),
    ("😀" * 5, False),
    ("😀" * 60, True),
    ("\n" * 500, False),
    (" " * 1000, False),
    ("1. apple\n2. banana\n3. apple\n4. banana\n5. apple", False),
    ("yes yes yes yes yes yes yes yes", True),
    (
        " ".join(f"w{i}" for i in range(300))
        + " "
        + " ".join(f"w{i}" for i in range(300))
        + " "
        + " ".join(f"w{i}" for i in range(300)),
        True,
    ),
    ("Buffalo buffalo Buffalo buffalo buffalo buffalo Buffalo buffalo", False),
]


@pytest.mark.parametrize(("answer", "loops"), REPETITIONS)
def test_loops_are_found_and_sound_repeats_are_not(answer: str, loops: bool) -> None:
    assert repetition(answer) is loops


def test_a_loop_is_found_at_the_end_of_a_very_long_answer_and_across_long_periods() -> None:
    sound = " ".join(f"word{i}" for i in range(40_000))
    assert not repetition(sound)
    assert repetition(sound + " and so on" * 50)
    paragraph = " ".join(f"word{i}" for i in range(1_500))
    assert repetition(f"{paragraph} first. {paragraph} second. {paragraph} third.")


def test_hardly_any_sound_text_counts_as_a_loop() -> None:
    """Our own sources and docs, in pieces as long as a long answer."""
    texts = [file.read_text(encoding="utf-8") for top in ("qvl", "docs") for file in (ROOT / top).rglob("*.[pm][yd]")]
    pieces = [text[i : i + 4_000] for text in texts for i in range(0, len(text), 4_000)]
    assert len(pieces) > 200
    assert sum(map(repetition, pieces)) <= len(pieces) / 200


LANGUAGES = [
    ("The cat sits on the mat.", "en", False),
    ("The answer is 5.", "en", False),
    ("这只猫坐在垫子上。", "zh", False),
    ("猫はマットの上に座っています。", "ja", False),
    ("고양이가 매트 위에 앉아 있습니다.", "ko", False),
    ("Кошка сидит на коврике.", "ru", False),
    ("القطة تجلس على السجادة.", "ar", False),
    ("Le chat est sur le tapis.", "fr", False),
    ("这只猫坐在垫子上。", "en", True),
    ("The cat sits on the mat.", "zh", True),
    ("猫はマットの上に座っています。", "en", True),
    ("猫はマットの上に座っています。", "zh", True),
    ("这只猫坐在垫子上，因为它很累。", "ja", True),
    ("고양이가 매트 위에 앉아 있습니다.", "en", True),
    ("Кошка сидит на коврике у двери.", "en", True),
    ("القطة تجلس على السجادة الحمراء.", "en", True),
    ("The cat sits on the mat.", "ja", True),
    ("The cat sits on the mat.", "ko", True),
    ("The cat sits on the mat.", "ru", True),
    ("The cat sits on the mat.", "ar", True),
    ("这只猫坐在垫子上。", "ko", True),
    ("这只猫坐在垫子上。", "ru", True),
    ("The image shows a cat 坐在 the mat 因为 it is tired.", "en", True),
    ("First we 计算 the area, 然后 add.", "en", True),
    ("The answer is 因为 the triangle 是 equal.", "en", True),
    ("The sign reads 出口, which means exit.", "en", False),
    ('The sign says "欢迎光临" at the door.', "en", False),
    ("Beijing (北京) and Shanghai (上海) are cities.", "en", False),
    ("The character 猫 means cat.", "en", False),
    ("The text in the image is: 欢迎光临", "en", False),
    ("It says 出口 and the other one says 入口.", "en", False),
    ("The triangle is equal. 所以答案是五。", "en", True),
    ("So the area is 12. 因此，选择B。", "en", True),
    ("Let me think. 首先，我们需要看图。 Then the answer is B.", "en", True),
    ("我使用Python和TensorFlow训练模型。", "zh", False),
    ("图中是 iPhone 15 Pro Max。", "zh", False),
    ("这是一只 Golden Retriever 犬。", "zh", False),
    ("答案是 B。", "zh", False),
    ("公式 $x = \\frac{a}{b}$ 表示 x 的值。", "zh", False),
    ("代码如下：\n```python\nfor i in range(10):\n    print(i is not None and i or the)\n```\n结束。", "zh", False),
    ('招牌上写着"Welcome to the city of London"。', "zh", False),
    ("招牌上写着“Welcome to New York”。", "zh", False),
    ("首先 we need to 计算面积, then 得到答案。", "zh", True),
    ("这张图片显示 a cat sitting on the mat。", "zh", True),
    ("因此，the answer is 5。", "zh", True),
    ("他在 New York 和 San Francisco 工作。", "zh", False),
    ("深度学习（deep learning）是机器学习的一种。", "zh", False),
    ("使用 transformer 架构和 attention 机制。", "zh", False),
    ("CPU、GPU、RAM 和 SSD 都很重要。", "zh", False),
    ("参见 https://example.com/the/is/of/and 。", "zh", False),
    ("这家店叫鮮の屋。", "zh", False),
    ("我认为これは猫です。", "zh", True),
    ("这是猫。Это кошка, она сидит на коврике.", "zh", True),
    ("答案是고양이입니다.", "zh", False),
    ("東京都庁舎は新宿区にあります。", "ja", False),
    ("東京特許許可局", "ja", False),
    ("これはPythonのコードです。", "ja", False),
    ("猫です。我们需要计算这个三角形的面积。", "ja", True),
    ("答えは12です。", "ja", False),
    ("이것은 Python 코드입니다.", "ko", False),
    ("서울(首爾)은 수도입니다.", "ko", False),
    ("정답은 B입니다. The reason is that the cat is red.", "ko", True),
    ("정답은 因为这个三角形是等边的.", "ko", True),
    ("Это язык Python и библиотека NumPy.", "ru", False),
    ("Ответ: 5. The answer is five because of this.", "ru", True),
    ("Это 因为 так.", "ru", True),
    ("هذا برنامج Python مفيد.", "ar", False),
    ("الجواب هو 5 because the sum is five.", "ar", True),
    ("هذا 因为 صحيح", "ar", True),
    ("The angle α equals β, so θ = 2π.", "en", False),
    ("Δx → 0", "en", False),
    ("x² + y² = 1", "en", False),
    ("I ❤️ this 😀", "en", False),
    ("", "en", False),
    ("   ", "zh", False),
    ("12345", "zh", False),
    ("café naïve Müller", "en", False),
    ("Kyiv (Київ) is the capital.", "en", False),
    ("The word привет means hello.", "en", False),
    ("He said привет как дела друзья мои to everyone.", "en", True),
    ("<think>我们需要看图片，然后回答。</think>The answer is B.", "en", True),
    ("<think>We need to look at the picture.</think>答案是B。", "zh", True),
    ("<think>我们看图。</think>答案是B。", "zh", False),
    ("\\boxed{\\text{the area}}，所以答案如上。", "zh", False),
    ('[{"bbox_2d": [1,2,3,4], "label": "the cat is on the mat"}]', "zh", False),
    ('{"answer": "猫"}', "en", False),
    ("Réponse : le chat est noir", "fr", False),
    ("Die Antwort ist 42.", "de", False),
    ("Le chat 坐在 le tapis 因为 il est fatigué.", "fr", True),
    ("The color is 红色.", "en", True),
    ("The image shows 一只猫 on the mat.", "en", True),
    ("Kyoto 京都 is a city.", "en", False),
    ("猫 means cat.", "en", False),
    ("使用 for 循环和 if 语句。", "zh", False),
    ("他喜欢 Game of Thrones 和 Lord of the Rings。", "zh", False),
    ("It is red.", "zh", True),
    ("Yes.", "zh", False),
    ("cat", "zh", False),
    ("Ответ because кошка.", "ru", True),
    ("因此 we 可以得到答案。", "zh", True),
    ("北京", "en", False),
    ("The name is 北京.", "en", False),
    ("答案是 yes 或 no。", "zh", False),
    ("이 차는 red 색입니다.", "ko", False),
    ("这是 the 猫。", "zh", True),
    ("Câu trả lời là đúng.", "vi", False),
]


@pytest.mark.parametrize(("answer", "language", "mixed"), LANGUAGES)
def test_mixed_languages_are_found_and_names_code_formulas_and_quotes_are_not(
    answer: str, language: str, mixed: bool
) -> None:
    assert language_mix(answer, language) is mixed


@pytest.mark.parametrize("language", ["zh", "ZH", "zh-CN", "zh_Hans", "Chinese", "chinese (simplified)", "中文"])
def test_a_language_is_named_by_code_or_name(language: str) -> None:
    assert language_mix("The cat sits on the mat.", language)
    assert not language_mix("这只猫坐在垫子上。", language)


def test_an_unknown_language_is_an_error() -> None:
    with pytest.raises(ValueError, match="the prompt's language is 'xx'; give a code such as en"):
        language_mix("x", "xx")


@pytest.mark.parametrize(
    ("answer", "thinks", "keeps"),
    [
        ("<think>\nIt is red.\n</think>\n\nRed", True, True),
        ("It is red.</think>Red", True, True),  # the template opened the thought
        ("<think>It is red.", True, False),
        ("<think>It is red.</think>", True, False),
        ("Red", True, False),
        ("Red <think>x</think> Blue", True, False),
        ("<think>a</think>b<think>c</think>d", True, False),
        ("Red", False, True),
        (" ", False, False),
        ("<think>x</think>Red", False, False),
    ],
)
def test_a_thought_stands_first_closes_and_is_followed_by_an_answer(answer: str, thinks: bool, keeps: bool) -> None:
    assert keeps_thought_form(answer, thinks) is keeps


@pytest.mark.parametrize(
    ("answer", "has"),
    [
        (r"So \boxed{5}.", True),
        (r"<think>\boxed{4}</think>\boxed{5}", True),
        (r"\boxed{5} \boxed{5}", False),
        (r"\boxed{}", False),
        (r"\boxed{5", False),
        (r"<think>\boxed{5}", False),
        ("5", False),
    ],
)
def test_one_box_is_closed_and_holds_something(answer: str, has: bool) -> None:
    assert has_one_box(answer) is has


@pytest.mark.parametrize(
    ("answer", "valid"),
    [
        ('{"a": 1}', True),
        ("[]", True),
        ('```json\n{"a": 1}\n```', True),
        ("<think>x</think>\n```\n[1, 2]\n```", True),
        ('Here: {"a": 1}', False),
        ('{"a": 1', False),
        ("5", False),
        ("", False),
        ("[" * 100_000, False),
        ("9" * 100_000, False),
    ],
)
def test_json_is_one_object_or_list_alone(answer: str, valid: bool) -> None:
    assert is_json(answer) is valid


@pytest.mark.parametrize(
    "piece",
    [
        "a",
        "ab ",
        "\n",
        "(",
        "$",
        "`",
        '"',
        "'",
        "\\\\(",
        "中",
        "https://",
        "a/",
        "_",
        "<a",
        "0",
        "a b c d e f g h ",
        "{",
        "\\boxed{",
    ],
)
def test_long_repeats_are_judged_in_bounded_time(piece: str) -> None:
    text = piece * (100_000 // len(piece))
    started = time.process_time()
    for language in ("en", "zh", "ja"):
        language_mix(text, language)
    repetition(text), has_one_box(text), is_json(text), keeps_thought_form(text, True)
    assert time.process_time() - started < 3
