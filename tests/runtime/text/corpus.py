"""Lines of text that tokenizers disagree on: many scripts, code, white space, digits, emoji, control characters.

`lines()` is the same on every machine. The reference ids in `reference_ids.json` belong to exactly these lines, so a
change here means running `make_reference_ids.py` again. It imports nothing of ours: that script runs elsewhere.
"""

import random

# Article 1 of the Universal Declaration of Human Rights, or its beginning.
LANGUAGES = {
    "English": "All human beings are born free and equal in dignity and rights. They're endowed with reason.",
    "French": "Tous les êtres humains naissent libres et égaux en dignité et en droits. L'été où j'ai cœur à l'œuvre.",
    "German": "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Straßengrößenüberprüfung, ẞ.",
    "Spanish": "Todos los seres humanos nacen libres e iguales en dignidad y derechos. ¿Qué? ¡Sí, mañana!",
    "Portuguese": "Todos os seres humanos nascem livres e iguais em dignidade e em direitos. Não há ação.",
    "Italian": "Tutti gli esseri umani nascono liberi ed eguali in dignità e diritti. Perché no?",
    "Dutch": "Alle mensen worden vrij en gelijk in waardigheid en rechten geboren. 's-Gravenhage, zo'n ĳsje.",
    "Polish": "Wszyscy ludzie rodzą się wolni i równi pod względem swej godności i swych praw. Zażółć gęślą jaźń.",
    "Czech": "Všichni lidé rodí se svobodní a sobě rovní co do důstojnosti a práv. Příliš žluťoučký kůň.",
    "Hungarian": "Minden emberi lény szabadon születik és egyenlő méltósága és joga van. Árvíztűrő tükörfúrógép.",
    "Romanian": "Toate ființele umane se nasc libere și egale în demnitate și în drepturi.",
    "Swedish": "Alla människor är födda fria och lika i värde och rättigheter. Åäö ÅÄÖ.",
    "Finnish": "Kaikki ihmiset syntyvät vapaina ja tasavertaisina arvoltaan ja oikeuksiltaan.",
    "Icelandic": "Hver maður er borinn frjáls og jafn öðrum að virðingu og réttindum. Þórður, ðæö.",
    "Turkish": "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar. İstanbul'da ılık ışık.",
    "Vietnamese": "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền lợi.",
    "Swahili": "Watu wote wamezaliwa huru, hadhi na haki zao ni sawa. Wote wamejaliwa akili na dhamiri.",
    "Yoruba": "Gbogbo ènìyàn ni a bí ní òmìnira; iyì àti ẹ̀tọ́ kọ̀ọ̀kan sì dọ́gba.",
    "Russian": "Все люди рождаются свободными и равными в своем достоинстве и правах. Ёлка, съёмка, объезд.",
    "Ukrainian": "Всі люди народжуються вільними і рівними у своїй гідності та правах. Під'їзд, ґанок, їжа.",
    "Bulgarian": "Всички хора се раждат свободни и равни по достойнство и права.",
    "Serbian": "Сва људска бића рађају се слободна и једнака у достојанству и правима. Љубав, њива, џеп.",
    "Kazakh": "Барлық адамдар тумысынан азат және қадір-қасиеті мен құқықтары тең болып дүниеге келеді.",
    "Greek": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα. ΣΊΣΥΦΟΣ, ἀρχή.",
    "Armenian": "Բոլոր մարդիկ ծնվում են ազատ ու հավասար իրենց արժանապատվությամբ ու իրավունքներով։",
    "Georgian": "ყველა ადამიანი იბადება თავისუფალი და თანასწორი თავისი ღირსებითა და უფლებებით.",
    "Arabic": "يولد جميع الناس أحرارا متساوين في الكرامة والحقوق. كِتَابٌ، ٢٠٢٤، لا إله",
    "Persian": "تمام افراد بشر آزاد به دنیا می‌آیند و از لحاظ حیثیت و حقوق با هم برابرند. ۱۲۳",
    "Urdu": "تمام انسان آزاد اور حقوق و عزت کے اعتبار سے برابر پیدا ہوئے ہیں۔",
    "Hebrew": "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם. שָׁלוֹם, צה\"ל, ג'ירפה.",
    "Yiddish": "יעדער מענטש װערט געבױרן פֿרײַ און גלײַך אין כּבֿוד און רעכט.",
    "Hindi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है। १२३",
    "Bengali": "সমস্ত মানুষ স্বাধীনভাবে সমান মর্যাদা এবং অধিকার নিয়ে জন্মগ্রহণ করে।",
    "Tamil": "மனிதப் பிறிவியினர் சகலரும் சுதந்திரமாகவே பிறக்கின்றனர்; அவர்கள் மதிப்பிலும் சமமானவர்கள்.",
    "Telugu": "ప్రతిపత్తిస్వత్వముల విషయమున మానవులెల్లరును జన్మతః స్వతంత్రులును సమానులును నగుదురు.",
    "Sinhala": "සියලු මනුෂ්‍යයෝ නිදහස්ව උපත ලබා ඇත. ගරුත්වයෙන් හා අයිතිවාසිකම්වලින් සමාන වෙති.",
    "Thai": "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ ๑๒๓ ก็ไม่เป็นไร",
    "Lao": "ມະນຸດທຸກຄົນເກີດມາມີກຽດສັກສີ, ສິດທິ, ເສລີພາບ ແລະ ຄວາມສະເໝີພາບເທົ່າທຽມກັນ.",
    "Burmese": "လူတိုင်းသည် တူညီ လွတ်လပ်သော ဂုဏ်သိက္ခာဖြင့် လည်းကောင်း မွေးဖွားလာသူများ ဖြစ်သည်။",
    "Khmer": "មនុស្សទាំងអស់កើតមកមានសេរីភាពនិងភាពស្មើគ្នាក្នុងសេចក្ដីថ្លៃថ្នូរនិងសិទ្ធិ។",
    "Tibetan": "འགྲོ་བ་མིའི་རིགས་རྒྱུད་ཡོངས་ལ་སྐྱེས་ཙམ་ཉིད་ནས་ཆེ་མཐོངས་དང༌། ཐོབ་ཐངགི་རང་དབང་འདྲ་མཉམ་དུ་ཡོད་ལ།",
    "Amharic": "የሰው ልጅ ሁሉ ሲወለድ ነጻና በክብርና በመብትም እኩልነት ያለው ነው።",
    "Chinese": "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心！",
    "Traditional Chinese": "人人生而自由，在尊嚴和權利上一律平等。「你好」，世界…… 𠮷野家",
    "Japanese": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。カタカナ、ﾊﾝｶｸ。",
    "Korean": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. ㅋㅋㅋ 한글",
    "Mongolian": "Хүн бүр төрж мэндлэхдээ эрх чөлөөтэй. ᠬᠦᠮᠦᠨ ᠪᠦᠷ",
    "Cherokee": "ᏂᎦᏓ ᎠᏂᏴᏫ ᏂᎨᎫᏓᎸᎾ ᎠᎴ ᎤᏂᏠᏱ ᎤᎾᏕᎿ ᏚᏳᎧᏛ ᎨᏒᎢ.",
    "Gothic": "𐌰𐌻𐌻𐌰𐌹 𐌼𐌰𐌽𐌽𐌰 𐍆𐍂𐌴𐌹𐌰 𐌲𐌰𐌱𐌰𐌿𐍂𐌰𐌽𐌰𐌹",
}

CODE = [
    "def fib(n: int) -> int:\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\n",
    "class A(B):\n\tdef __init__(self, *args, **kwargs):\n\t\tsuper().__init__(*args, **kwargs)  # noqa: E501\n",
    "if __name__ == '__main__':\n    print(f\"{x!r:>10}\", end='')\n    raise SystemExit(main())\n",
    "for (int i = 0; i < 1024; ++i) { a[i] = b[i] * 0x1Fu + (c->d.e << 3); }\n",
    '#include <stdio.h>\r\nint main(void) {\r\n\tprintf("%d\\n", 42);\r\n\treturn 0;\r\n}\r\n',
    "template <typename T, std::size_t N>\nconstexpr auto size(const T (&)[N]) noexcept { return N; }\n",
    "fn main() -> Result<(), Box<dyn Error>> {\n    let v: Vec<_> = (0..10).map(|x| x * x).collect();\n    Ok(())\n}\n",
    "const f = async ({ a, b = 1, ...rest }) => await fetch(`/api/${a}?q=${b}`).then(r => r.json());\n",
    "<!DOCTYPE html>\n<div class=\"a b\" id='c'>&nbsp;<br/>\n  <p>Hi &amp; bye</p>\n</div>\n<!-- comment -->\n",
    "SELECT u.id, COUNT(*) AS n FROM users u LEFT JOIN orders o ON o.uid = u.id WHERE n >= 10 GROUP BY 1;\n",
    '#!/bin/sh\nset -eu\nfor f in *.txt; do\n  [ -f "$f" ] && grep -oE \'^[a-z]+\' "$f" | sort -u >>log 2>&1\ndone\n',
    '{"name": "get_weather", "arguments": {"city": "Zürich", "days": 3, "units": null, "ok": true}}\n',
    "key: value\nlist:\n  - a\n  - 'b: c'\nanchor: &x {a: 1}\n",
    "func (s *Server) ListenAndServe() error {\n\tif s == nil {\n\t\treturn ErrServerClosed\n\t}\n}\n",
    "main :: IO ()\nmain = mapM_ (putStrLn . show) $ filter even [1..100]\n",
    "\\begin{equation}\n  \\int_0^\\infty e^{-x^2}\\,dx = \\frac{\\sqrt{\\pi}}{2}\n\\end{equation}\n",
    "| a | b |\n|---|:-:|\n| `x` | **y** |\n\n```python\nprint(1)\n```\n",
    "diff --git a/x b/x\n@@ -1,3 +1,4 @@\n-old line\n+new line\n context\n",
    "^(?:[a-z0-9!#$%&'*+/=?^_`{|}~-]+(?:\\.[a-z0-9]+)*)@example\\.com$\n",
    "MOV EAX, [EBX+4*ECX]\n.L3:\n\tjmp .L3\n\tnop\t\t; wait\n",
]

EMOJI = [
    "😀😃😄😁", "👍🏽 👎🏿", "👨‍👩‍👧‍👦", "👩🏾‍💻", "🏳️‍🌈🏴‍☠️", "🇨🇭🇩🇪🇯🇵🇺🇸", "❤️‍🔥❤", "1️⃣#️⃣*️⃣", "☺️☺︎", "🏴󠁧󠁢󠁳󠁣󠁴󠁿", "🫠🫡",
    "🧑‍🚀 to the 🌕!", "♟️♠♥♦♣", "😀" * 7, "a😀b", " 😀 ", "👨‍", "‍👩", "🇨", "⌚️⏰⌛️", "✅✔️❌",
    "→⇒≤≠∞∑∫√", "①②③ⅣⅤ", "½⅓¼²³", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟙𝟚𝟛",
]  # fmt: skip

SPACES = [
    " ", "  ", "   ", " " * 4, " " * 7, " " * 8, " " * 16, " " * 33, "\t", "\t\t", "\t\t\t\t",
    " \t", "\t ", "\n",
    "\n\n", "\n\n\n", "\r", "\r\n", "\r\n\r\n", "\n \n", " \n", "\n ", "  \n  ", "\t\n\t", "\v",
    "\f", "\x1c", "\x1d", "\x1e",
    "\x1f", "\x85", "\xa0", "\xa0\xa0", " \xa0", "\xa0 ", "\u1680", "\u180e", "\u2000", "\u2003",
    "\u2009\u200a",
    "\u200b", "\u200d", "\u2028", "\u2029", "\u202f", "\u205f", "\u2060", "\u3000",
    "\u3000\u3000", " \u3000 ",
    "\ufeff",
]  # fmt: skip

DIGITS = [
    "0", "7", "42", "123", "1234", "12345678901234567890", "3.14159", "1,000,000.00", "-1e-9",
    "0xDEADBEEF", "1_000",
    "2024-02-29T23:59:59Z", "192.168.0.1", "+41 44 123 45 67", "50%", "$9.99", "v1.2.3-rc4",
    "٠١٢٣٤٥", "१२३४", "一二三",
    "๑๒๓", "１２３", "Ⅷ", "¼½", "x²+y³", "H₂O", "1st 2nd 3rd", "a1b2c3", "№5", "۴۵", "𝟘𝟙", "4" * 40,
]  # fmt: skip

WORDS = [
    "don't", "DON'T", "I'm", "we've", "WE'VE", "they'll", "she'd", "it's", "IT'S", "'s", "''t",
    "'tis", "rock'n'roll",
    "o'clock", "can’t", "y'all'd've", "'re're", "'ſ", "café", "cafe\u0301", "naïve", "Ǆungla",
    "ﬁne", "ŉ", "ªº",
    "ʰello", "__init__", "camelCaseWord", "snake_case_word", "SCREAMING", "kebab-case", "a", "I",
    "the", "THE", "hello",
    "World",
    "http://example.com/a?b=c&d=%20#e", "me@example.com", "C:\\Users\\x", "/usr/lib/x86_64",
    "...", "!!!", "?!", "--",
    "—", "“quoted”", "«»", "(((", "[[]]", "{}{}", "<>", "</s>", "<s>", "<|im_end|>", "<|im_start|>user",
    "<|endoftext|>", "<repo_name>", "<|unknown|>", "[INST]", "<0x0A>", "▁a", "Ġa", "Ċ", "\\n",
    "%s", "@@", "~~~", "^_^", ":-)", "\\\\",
]  # fmt: skip

CONTROLS = [chr(code) for code in [*range(0x20), 0x7F, *range(0x80, 0xA0)]]

# Blocks from which unlikely text is drawn: assigned and unassigned code points, private use, marks without a letter.
BLOCKS = [
    (0x20, 0x7E), (0xA0, 0x24F), (0x250, 0x36F), (0x370, 0x52F), (0x530, 0x6FF), (0x700, 0x97F), (0x980, 0xDFF),
    (0xE00, 0x109F), (0x10A0, 0x13FF), (0x1400, 0x18AF), (0x1E00, 0x20CF), (0x2100, 0x2BFF), (0x3000, 0x33FF),
    (0x4E00, 0x9FFF), (0xA000, 0xABFF), (0xAC00, 0xD7A3), (0xF900, 0xFFFD), (0x10000, 0x1FFFF), (0x20000, 0x2FFFF),
]  # fmt: skip


def lines() -> list[str]:
    """About 3,000 different lines, none of them empty, in a fixed order."""
    rng = random.Random(20240229)
    found = [*LANGUAGES.values(), *CODE, *EMOJI, *DIGITS, *WORDS, *SPACES]
    for text in LANGUAGES.values():
        words = text.split()
        found += [text.upper(), text.lower(), text.title(), "\n".join(words), f"  {text} ", text[::-1]]
        found += [" ".join(rng.sample(words, min(4, len(words)))) for _ in range(2)]
    for text in CODE:
        found += [*text.splitlines(keepends=True), text.replace("    ", "\t"), text.replace("\n", "\r\n")]
    for space in SPACES:
        found += [
            f"a{space}b",
            f"{space}a",
            f"a{space}",
            f"1{space}2",
            f"!{space}?",
            f"a {space} b",
            f"{space}'s",
            f"é{space}中",
        ]
    for control in CONTROLS:
        found += [f"a{control}b", f"the {control}the", f"{control * 3}", f"{control}1"]
    for digits in DIGITS:
        found += [f"a{digits}b", f"a {digits} b", f"  {digits}", f"{digits}\n\n{digits}"]
    for word in WORDS:
        found += [f" {word}", f"{word}{word}", f"{word.upper()}.", f"({word})", f"a\n{word}"]
    ingredients = [WORDS, SPACES, DIGITS, EMOJI, [word for text in LANGUAGES.values() for word in text.split()]]
    for _ in range(500):
        found.append("".join(rng.choice(rng.choice(ingredients)) for _ in range(rng.randrange(2, 12))))
    for first, last in BLOCKS:
        for _ in range(24):
            found.append("".join(chr(rng.randint(first, last)) for _ in range(rng.randrange(1, 16))))
    for _ in range(100):
        found.append("".join(chr(rng.randint(*rng.choice(BLOCKS))) for _ in range(rng.randrange(1, 24))))
    return list(dict.fromkeys(found))
