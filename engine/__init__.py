"""The machine room: what keeps the book fast and safe, and need not be read to understand a GPT."""

from engine import threads

threads.choose_waiting()  # here, since whatever a command imports first from engine passes by
