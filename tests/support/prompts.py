"""Prompts of mixed length and script for comparisons with the reference."""

LONG = (
    "The loom is a device for weaving threads into cloth. Its basic purpose is to hold the warp threads under tension "
    "so that the weft threads can be passed between them. A treadle is a pedal worked by the foot: pressing it lifts "
    "some of the warp threads, and the gap through which the shuttle flies is called the shed. "
)

PROMPTS = [
    "The capital of France is",
    "1, 2, 3, 4, 5,",
    "def fibonacci(n):\n    ",
    "Once upon a time",
    "Q: What is 17 + 25?\nA:",
    "Le petit prince habitait une planète à peine plus grande que lui et il avait besoin",
    "Der schnelle braune Fuchs springt über den faulen Hund, und danach",
    "El ingenioso hidalgo don Quijote de la",
    "Сегодня хорошая погода, и мы идём",
    "Η Αθήνα είναι η πρωτεύουσα",
    "北京是中国的首都，",
    "東京は日本の首都であり、",
    "대한민국의 수도는",
    "عاصمة مصر هي",
    "भारत की राजधानी",
    "ประเทศไทยมีเมืองหลวงชื่อ",
    "😀 😃 😄 😁 👩‍👩‍👧‍👦 🇫🇷",
    "\t\tif (x == NULL) {\n\t\t\treturn -1;\n\t\t}\n",
    '{"name": "Ada Lovelace", "born": 1815, "fields": ["mathematics",',
    "SELECT name, count(*) FROM orders WHERE",
    "A",
    LONG + "In summary,",
    LONG * 6 + "The text above says that",
    LONG * 16 + "To sum up the passage above in one sentence:",
]
