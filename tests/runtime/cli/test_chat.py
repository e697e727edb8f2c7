"""`treadle chat` with the real small model."""

# In bfloat16 the two best first tokens of some answers tie, and what is in the prefix cache tips the balance.
EXACT = ("--dtype", "float32")
LONG = "Write a very long story about a king. Do not stop."


def test_a_piped_question_is_answered_and_the_command_ends(treadle):
    done = treadle("chat", "smollm2", stdin="What is the capital of France?\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Paris" in done.stdout and ">" not in done.stdout


def test_each_piped_line_is_a_turn_of_one_conversation(treadle):
    done = treadle("chat", *EXACT, stdin="The secret word is banana.\n\nWhat is the secret word?\n")
    assert done.returncode == 0
    assert "banana" in done.stdout.splitlines()[-1]
    alone = treadle("chat", *EXACT, "--max-tokens", "30", stdin="What is the secret word?\n")
    assert "banana" not in alone.stdout


def test_no_lines_are_no_turns(treadle):
    done = treadle("chat", stdin="")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_oldest_turns_go_with_a_notice_when_the_context_is_full(treadle):
    done = treadle("chat", "--max-context", "128", "--max-tokens", "24", stdin="Tell me about the sea, please.\n" * 4)
    assert done.returncode == 0
    assert "the context is full" in done.stderr and "Traceback" not in done.stderr


def test_a_message_that_does_not_fit_even_alone_is_an_error(treadle):
    done = treadle("chat", "--max-context", "64", stdin="sea " * 200 + "\n")
    assert done.returncode == 1
    assert done.stderr.startswith("treadle: error: the message makes a prompt of ") and done.stdout == ""


def test_a_model_without_a_tokenizer_cannot_chat(treadle):
    done = treadle("chat", "random:tiny-llama", stdin="hello\n")
    assert done.returncode == 1
    assert done.stderr == (
        "treadle: error: random:tiny-llama has no tokenizer, so it cannot chat; try `treadle generate --ids`\n"
    )


def test_ctrl_c_ends_the_answer_and_the_conversation_goes_on(terminal):
    session = terminal("chat", "smollm2", "--max-tokens", "4000", *EXACT)
    session.expect("> ")
    session.type(LONG + "\n")
    session.expect(r"stop\.\s+\S+ \S+ ")
    session.interrupt()
    session.expect(r"\[stopped\]\s+> ")
    session.type("/reset\n")
    session.expect("forgotten.*\\s+> ")
    session.type("What is the capital of France?\n")
    session.expect(r"Paris[^>]*> ")
    assert session.leave_with_ctrl_c() == 0


def test_commands_at_the_prompt(terminal):
    session = terminal("chat", "smollm2")
    session.expect("> ")
    session.type("/help\n")
    assert "/reset" in session.expect(r"/quit[\s\S]*\n> ")
    session.type("/nonsense\n")
    session.expect(r"There is no /nonsense[^>]*> ")
    session.type("/quit\n")
    assert session.exit_code() == 0


def test_ctrl_d_at_the_prompt_leaves(terminal):
    session = terminal("chat", "smollm2")
    session.expect("> ")
    session.type("\x04")
    assert session.exit_code() == 0
