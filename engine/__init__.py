"""The machine room: what keeps the book's files fast and safe. No GPT needs it to be understood."""
