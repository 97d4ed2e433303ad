"""OpenAI's Responses: a dialect of chat, and a bounded store of what was answered."""
