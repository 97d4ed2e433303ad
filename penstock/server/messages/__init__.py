"""Anthropic's Messages: a dialect of chat. `request` reads it as a chat, `answer` writes its answer."""
