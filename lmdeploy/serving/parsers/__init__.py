"""What a model's text means: reasoning, content and tool calls. Pure: text in, events out; knows no HTTP and no engine."""
