"""Sentences to translate, and the size of their vocabulary."""

PAIRS = [
    ("The house is small.", "Das Haus ist klein."),
    ("The garden is large.", "Der Garten ist groß."),
    ("A street\u2028in the\rcity", "Eine Straße in der Stadt"),
    ("Yes", "Ja"),
    ("", "Leer"),
    ("A sentence that is rather longer than the others, by far", "Ein langer Satz"),
]


ODD = ["naïve 漢字 🙂", "tab\tand  two spaces", "<eos> is no token here", "x"]
SIZE = 300
