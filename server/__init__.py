"""The HTTP front end: OpenAI's API over the engine."""
