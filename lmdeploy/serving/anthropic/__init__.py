"""Anthropic's Messages API over the same model and the same turns as OpenAI's."""
