r"""The forms that answers and users' golds take in the wild: what is right, and what only looks like it."""

import time

import pytest

from trl_crisp.evaluation.answers import find_answer, find_letter
from trl_crisp.evaluation.grading import Grade, Grader
from trl_crisp.evaluation.notation import read_answer
from trl_crisp.evaluation.text_answers import first_sentence

SOLUTION = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nShe sold 48+24 = <<48+24=72>>72 clips.\n#### 72"
TOWER = r"\dfrac{5^{5^{5^{5^5}}-4}-5}{16}"

# Response, gold, and what is right: A the answer line, B the box, C the response
MATH = [
    # Emphasis of the word, of the colon, of both
    ("**Answer**: (3, 4)", "(3,4)", "A+ C+"),
    ("*Answer*: 7", "7", "A+ C+"),
    ("__Answer__ : 7", "7", "A+ C+"),
    ("`Answer`: 7", "7", "A+"),
    ("**Final Answer:** $x$", "x", "A+"),
    ("**Answer** : **4**", "4", "A+"),
    (r"\textbf{Answer}: 4", "4", "A+"),
    (r"\textbf{Answer:} 4", "4", "A+"),
    (r"\textbf{Answer: 4}", "4", "A+"),
    (r"$\text{Answer: } 42$", "42", "A+"),
    (r"\boxed{\text{Answer: } 42}", "42", "A+"),
    ("<b>Answer:</b> 42", "42", "A+"),
    ("### **Answer:** 12", "12", "A+"),
    ("- **Answer**: 4", "4", "A+"),
    ("Answer：42", "42", "A+"),  # noqa: RUF001
    ("Answer: 41\n\nWait, a slip.\n\n**Answer**: 42", "42", "A+ C+"),
    ("Answer: 42\n\n**Answer:**", "42", "A+"),
    ("Answer\u200b: \u200b42", "42", "A+ C+"),
    ("Answer: “42”", "42", "A+ C+"),
    # A heading needs no colon
    ("Answer: 41\n\n### Final Answer\n42", "42", "A+ C+"),
    ("**Answer**\n\nFriday", r"\text{Friday}", "A+ C+"),
    ("> **Answer**\n>\n> 42", "42", "A+"),
    ("<h3>Answer</h3>\n<p>42</p>", "42", "A+ C+"),
    ("The answer\n42", "42", "A- C+"),
    # The answer in a block under the line
    ("**Answer:**\n\nFriday", r"\text{Friday}", "A+ C+"),
    ("> **Answer:**\n> 4", "4", "A+"),
    ("Answer:\n\n$$42$$", "42", "A+"),
    ("Answer:\n\\[\n42\n\\]", "42", "A+"),
    ("Answer: \\begin{pmatrix}\n1 \\\\\n2\n\\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", "A+"),
    ("Answer:\n```\n42\n```", "42", "A+"),
    ("Answer:\n- 42", "42", "A+"),
    ("Answer:\n-42", "-42", "A+"),
    ("Answer: ______\n\nNext 5", "42", "A- C-"),
    # A leading point
    ("Answer: .5", "0.5", "A+ C+"),
    ("Answer: .5", "5", "A- C-"),
    ("Answer: $.5$", "0.5", "A+"),
    ("Answer: '.5'", "5", "A- C-"),
    ("Answer: ...5", "5", "A+"),
    ("Answer: -.5.", "-0.5", "A+"),
    ("Answer: **.5**", r"\frac{1}{2}", "A+"),
    (r"\boxed{.5}", "5", "B- C-"),
    ("It is .5", "0.5", "C+"),
    ("It is .5", "5", "C-"),
    # Clock times and dates
    ("Answer: 12:00", "12:00", "A+ C+"),
    ("The train leaves at 10:00.", "10:00", "C+"),
    ("Answer: 10:01", "10:00", "A- C-"),
    (r"\boxed{12:00}", "12:00", "B+ C+"),
    ("Answer: 6:15 PM", r"6:15 \text{ p.m.}", "A+ C+"),
    ("Answer: 18:15", "6:15 p.m.", "A+"),
    ("Answer: 6:15 a.m.", r"6:15 \text{ p.m.}", "A- C-"),
    ("Answer: 5 p.m.", "5 a.m.", "A- C-"),
    ("Answer: 4:10", "6:15", "A- C-"),
    ("Answer: 6:8", "3:4", "A+"),
    ("Answer: 2020-01-01", "2020-01-01", "A+"),
    ("Answer: 2018", "2020-01-01", "A- C-"),
    # Golds of files
    ("Answer: 5", "5.", "A+ C+"),
    ("Answer: 5.", "5.", "A+"),
    ("Answer: 5", "#### 5", "A+"),
    ("Answer: 72", SOLUTION, "A+ C+"),
    ("Answer: 24", SOLUTION, "A- C-"),
    ("Answer: 1200", "Much.\n#### 1,200", "A+"),
    ("Answer: 5", r"so it is \boxed{5}.", "A+"),
    ("Answer: 5", "Answer: 5", "A+"),
    ("Answer: 5", r"\(5\)", "A+"),
    ("Answer: 10^{-5}", "1e-05", "A+"),
    ("Answer: 1e-5", "0.00001", "A+"),
    ("Answer: 2e-06", "1e-06", "A- C-"),
    ("Answer: " + TOWER, TOWER, "A+ C+"),
    (r"\boxed{" + TOWER + "}", TOWER, "B+ C+"),
    # Mixed numbers
    ("Answer: -11 5/6", r"-\frac{71}{6}", "A+"),
    ("Answer: 71/6", "11 5/6", "A+"),
    ("Answer: 2½", "2.5", "A+"),
    ("Answer: 1,234 1/2", "1234.5", "A+"),
    ("It takes 2 1/2 hours", "2.5", "C+"),
    ("Answer: 1 1/2", "11/2", "A- C-"),
    ("Answer: 2 2/3", r"\frac{4}{3}", "A- C-"),
    # Roots, pi, signs, inequalities
    ("Answer: √3/2", r"\frac{\sqrt{3}}{2}", "A+"),
    ("Answer: –5", "-5", "A+ C+"),  # noqa: RUF001
    ("Answer: –5", "5", "A- C-"),  # noqa: RUF001
    ("Answer: －5", "-5", "A+ C+"),  # noqa: RUF001
    ("Answer: 3⁄4", r"\frac{3}{4}", "A+ C+"),  # noqa: RUF001
    (r"Answer: 1\,234", "1234", "A+ C+"),
    ("Answer: x**2+2*x", "x^2+2x", "A+ C+"),
    ("Answer: 3 sqrt(13)", r"3\sqrt{13}", "A+ C+"),
    ("Answer: 3√{13}", r"3\sqrt{13}", "A+ C+"),
    ("Answer: √(x+1)", r"\sqrt{x+1}", "A+"),
    ("Answer: 3 sqrt2", r"3\sqrt{2}", "A+"),
    ("Answer: (3, pi/2)", r"\left( 3, \frac{\pi}{2} \right)", "A+"),
    ("Answer: 288 pi", "288", "A-"),
    ("Answer: x²+2x", "x^2+2x", "A+"),
    ("Answer: (-∞,1)∪(2,∞)", r"(-\infty,1)\cup(2,\infty)", "A+"),  # noqa: RUF001
    (r"Answer: $1 \le x < 3$", "[1,3)", "A+"),
    ("Answer: 1 < x < 3", "[1,3]", "A- C-"),
    ("Answer: x >= 3", r"[3,\infty)", "A+"),
    ("Answer: x = **42**", "42", "A+"),
    ("Answer: x = **(3,4)**", "(3,4)", "A+"),
    # Bases
    ("Answer: 4210_{6}", "4210_5", "A- C-"),
    (r"\boxed{4210_6}", "4210_5", "B- C-"),
    ("So $4210_6$.", "4210_5", "C-"),
    (r"Answer: 4210_{\text{five}}", "4210_5", "A+"),
    ("Answer: 4210 (base 5)", "4210_5", "A+"),
    ("Answer: 4210 in base six", "4210_5", "A- C-"),
    ("Answer: 4210₅", "4210_5", "A+"),
    ("Answer: 4210", "4210_5", "A+"),
    # Values closer than math-verify's tolerance
    ("Answer: 0.0000674", ".0000672", "A- C-"),
    (r"Answer: 6.72 \times 10^{-5}", ".0000672", "A+"),
    ("Answer: 0.0000001", "0", "A- C-"),
    ("Answer: 0.1234567", "0.1234568", "A- C-"),
    ("Answer: 0.333333", r"\frac{1}{3}", "A+"),
    ("Answer: 0.66666666", r"\frac{2}{3}", "A+"),
    ("Answer: 3.141593", r"\pi", "A+"),
    (r"Answer: \{\frac{1}{2006!}, 1\}", r"\{1, \frac{1}{2004!}\}", "A- C-"),
    # Units
    ("Answer: 12 m", r"12 \text{ cm}", "A- C-"),
    ("Answer: 12 centimeters", r"12\text{ cm}", "A+"),
    (r"Answer: 15 \text{ cm}^3", r"15\mbox{ cm}^2", "A- C-"),
    ("Answer: 15 cm²", r"15\mbox{ cm}^2", "A+"),
    ("Answer: 864 square inches", r"864 \mbox{ inches}^2", "A+"),
    ("Answer: $5.4", r"5.4 \text{ cents}", "A- C-"),
    ("Answer: 5.4", r"5.4 \text{ cents}", "A+"),
    ("Answer: 18.90 dollars", r"\$18.90", "A+"),
    ("Answer: 90 radians", r"90^\circ", "A- C-"),
    ("Answer: 90°", r"90^\circ", "A+"),
    ("Answer: 36 km/h", "36 mph", "A- C-"),
    # Words are no products of letters
    ("Answer: Solo", "Oslo", "A- C-"),
    ("Answer: rA", "Ar", "A- C-"),
    ("Answer: true", "True", "A+ C+"),
    ("Answer: new york", "New York", "A+ C+"),
    ("Answer: ba", "ab", "A+"),
    ("Answer: (C)", r"\text{(C)}", "A+"),
]

TEXT = [
    # Response, golds, correct, anywhere
    ("Answer: Oslo", "Oslo", True, True),
    ("The capital is Canberra.", "Canberra", True, True),
    ("It is Sydney. Some say Canberra.", "Canberra", False, True),
    ("Sydney.\nAnswer: Canberra", "Canberra", True, True),
    ("Canberra is it.\n**Answer**: Sydney", "Canberra", False, True),
    ("Solo", "Oslo", False, False),
    ("rA", "Ar", False, False),
    ("York New", "New York", False, False),
    ("Oslogate", "Oslo", False, False),
    ("the capital is sao paulo", "São Paulo", True, True),
    ("Tromso", "Tromsø", True, True),
    ("**OSLO**", "Oslo", True, True),
    (r"Answer: \boxed{\text{Oslo}}", "Oslo", True, True),
    ("Washington D.C. is it", "Washington, D.C.", True, True),
    ("The United States of America", ["USA", "United States"], True, True),
    ("France", ["USA", "United States"], False, False),
    ("<think>Oslo? No.</think>Bergen.", "Oslo", False, True),
    ("<think>Bergen?</think>\n\nOslo.", "Oslo", True, True),
    ("**Answer**\n\nOslo", "Oslo", True, True),
    ("1. Oslo\n2. Bergen", "Oslo", True, True),
    ("1. Oslo\n2. Bergen", "Bergen", False, True),
    ("ST. PETERSBURG", "St. Petersburg", True, True),
    ("Sen. King and Rev. Hall met in Oslo.", "Oslo", True, True),
    ("OʼBrien", "O'Brien", True, True),  # noqa: RUF001
    ("Os\u00adlo", "Oslo", True, True),
    ("The formula is $H_2O$.", "H2O", True, True),
    (r"\text{C}\text{O}_{2}", "CO2", True, True),
    ("首都は東京です。", "東京", True, True),
    ("首都は東京です。", "京東", False, False),
    ("In 1,969 cases", "1969", True, True),
    ("3.5", "3", False, False),
    ("-5", "5", False, False),
    ("C++", "C", False, False),
    ("", "Oslo", False, False),
]


@pytest.fixture(scope="module")
def graded() -> list[Grade]:
    with Grader(workers=2, timeout_s=20.0) as grader:
        return grader.grade_all([case[:2] for case in MATH])


@pytest.mark.parametrize("case", range(len(MATH)), ids=lambda i: f"{MATH[i][0]!r} for {MATH[i][1]}"[:60])
def test_an_answer_in_math_is_graded_as_its_signs_say(graded, case):
    *_, right = MATH[case]
    found = graded[case]
    flags = {"A": found.answer_correct, "B": found.boxed_correct, "C": found.correct}
    assert {sign: flags[sign[0]] for sign in right.split()} == {sign: sign[1] == "+" for sign in right.split()}, found


@pytest.mark.parametrize("case", range(len(TEXT)), ids=lambda i: f"{TEXT[i][0]!r} for {TEXT[i][1]}"[:60])
def test_a_text_is_graded_by_its_first_sentence_and_anywhere(case):
    response, golds, correct, anywhere = TEXT[case]
    with Grader() as grader:
        (found,) = grader.grade_all([(response, golds)], "text")
    assert (found.correct, found.anywhere_correct) == (correct, anywhere)
    assert found.status == ("ok" if response else "unparseable")


def test_the_authors_rules_read_no_other_form():
    assert find_answer("Answer: 41\n\n**Answer**: 42", exact=True) == "41"
    assert find_answer("Answer: .5", exact=True) == ".5"
    pairs = [("Answer: 4210_6", "4210_5"), ("Answer: 11 5/6", r"\frac{71}{6}"), ("Answer: 12:00", "12:00")]
    with Grader(exact=True, workers=1) as grader:
        base, mixed, noon = grader.grade_all(pairs)
        assert grader.grade_all([("**Answer**: B", "B")], "choice")[0].correct is False
    assert (base.correct, mixed.correct, noon.correct, noon.status) == (True, False, False, "error")


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("(b)", "B"),
        ("**B**", "B"),
        ("B.", "B"),
        ("Ｂ", "B"),  # noqa: RUF001
        ("B + C", None),
        ("B Paris", "B"),
        ("Option B", "B"),
        ("The correct answer is (B)", "B"),
        (r"$\boxed{\textbf{(B) } 4}$", "B"),
        ("A is correct", "A"),
        ("A. rectangle", "A"),
        ("A rectangle", None),
        ("I think B", None),
        ("A or B", None),
        ("A, B", None),
        ("Bismuth", None),
        ("D'Artagnan", None),
        ("B2", None),
    ],
)
def test_the_letter_that_an_answer_chooses_is_found(answer, letter):
    assert find_letter(answer) == letter


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("Oslo. It is big.", "Oslo."),
        ("The capital is:\n\nOslo", "The capital is:\n\nOslo"),
        ("It was J. K. Rowling. Yes.", "It was J. K. Rowling."),
        ("St. Petersburg is it! Or so.", "St. Petersburg is it!"),
        ("**\nOslo\nBergen", "Oslo"),
        ("It is 3.5 km. Long.", "It is 3.5 km."),
    ],
)
def test_the_first_sentence_ends_at_its_own_end_mark(text, sentence):
    assert first_sentence(text) == sentence


@pytest.mark.parametrize("part", ["St. ", "A. ", "a.b. ", "\n", "4 ", " base "])
def test_a_long_row_of_the_same_takes_no_time(part):
    """Models that repeat themselves write such."""
    start_s = time.process_time()
    response = "Answer: 5" + part * 30_000 + "x"
    first_sentence(part * 30_000)
    find_letter("Answer" + part * 30_000)
    read_answer(response)
    read_answer("5 base" + " " * 30_000 + "x")
    assert time.process_time() - start_s < 1.0


def test_gold_answers_that_do_not_fit_the_kind_are_named():
    with Grader() as grader:
        with pytest.raises(ValueError, match=r"pair 0 has 2 gold answers.*only texts"):
            grader.grade_all([("Answer: 1", ["1", "2"])])
        with pytest.raises(ValueError, match=r"pair 0 has the gold answer '!'"):
            grader.grade_all([("Oslo", "!")], "text")
        with pytest.raises(ValueError, match=r"kind='words'"):
            grader.grade_all([("Oslo", "Oslo")], "words")
